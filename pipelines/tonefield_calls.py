"""What a call of each pipeline has in common: the strength of guidance, the count of steps, plain checks.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

from collections.abc import Sequence


class CallMixin:
    """Beside the other bases of a pipeline, which keeps `_guidance_scale` and `_num_timesteps` while it works."""

    _guidance_scale = 1.0
    _num_timesteps = 0
    _callback_tensor_inputs: list[str]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale not in (0, 1)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @staticmethod
    def _check_counts(**counts: int) -> None:
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: it must be at least 1.")

    @staticmethod
    def _check_strength(audio: object, strength: float | None, mask: object) -> None:
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}: it must lie between 0 (the audio itself) and 1 (new sound).")
        if audio is None and (strength is not None or mask is not None):
            raise ValueError(f"{'mask' if strength is None else 'strength'} needs the audio that it speaks of.")

    def _check_outputs(self, output_type: str, known: Sequence[str], callback_inputs: Sequence[str]) -> None:
        if output_type not in known:
            raise ValueError(f"output_type is {output_type!r}: it must be {', '.join(known[:-1])} or {known[-1]}.")
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {unknown.pop()!r}: it is one of"
                f" {', '.join(self._callback_tensor_inputs)}."
            )
