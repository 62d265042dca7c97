# Of the pipeline that the mixin is mixed into, the type checker knows nothing:
# pyright: reportAttributeAccessIssue=false
"""What [`LatentAudioDiffusionPipeline`] is given: whether it goes together, how many sounds it is, and how long.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import torch


Text = str | list[str] | None
Generators = torch.Generator | list[torch.Generator] | None

OUTPUT_TYPES = ("np", "pt", "mel", "pil", "latent")


@dataclass
class Clip:
    """How long the sound is: samples that are returned, frames of their mel, and frames that are computed."""

    samples: int
    frames: int
    computed: int


class LatentInputsMixin:
    """Checks and measures for a pipeline of this kind; it refuses in one line, with the value and the remedy."""

    def _check_sizes(self) -> None:
        c, unet, channels = self.mel.config, self.unet.config, 1
        for name, size in (("n_mels", c.n_mels), ("num_frames", c.num_frames)):
            if size % self._unit:
                halvings = self._unit // self.vae_scale_factor
                raise ValueError(
                    f"{name} is {size}, but the U-Net shrinks its input {halvings} times"
                    f"{f' and the VAE {self.vae_scale_factor} times' * (self.vae is not None)}: use a multiple of"
                    f" {self._unit}."
                )
        if self.vae is not None:
            channels = self.vae.config.latent_channels
        if unet.in_channels != channels:
            what = "the mel has" if self.vae is None else "the VAE makes"
            raise ValueError(f"The U-Net takes {unet.in_channels} channels, but {what} {channels}.")
        seen = (c.n_mels // self.vae_scale_factor, c.num_frames // self.vae_scale_factor)
        size = unet.get("sample_size")
        if size is not None and tuple([size, size] if isinstance(size, int) else size) != seen:
            raise ValueError(f"The U-Net was made for samples of {size}, but the mel gives {seen}.")
        if self.text_encoder is not None and self._reads_text:
            width = self.text_encoder.config.d_model
            if width != self._text_width:
                raise ValueError(
                    f"The U-Net reads text of width {self._text_width}, but the text encoder makes {width}."
                )

    def check_inputs(
        self,
        prompt: Text,
        negative_prompt: Text,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        audio_length_in_s: float | None,
        num_inference_steps: int,
        guidance_rescale: float,
        num_waveforms_per_prompt: int,
        audio: torch.Tensor | np.ndarray | None,
        strength: float | None,
        mask: object,
        loop: bool,
        continuous: bool,
        eta: float,
        latents: torch.Tensor | None,
        output_type: str,
        window_batch_size: int,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        self._check_counts(
            num_inference_steps=num_inference_steps, num_waveforms_per_prompt=num_waveforms_per_prompt,
            window_batch_size=window_batch_size,
        )  # fmt: skip
        if audio_length_in_s is not None and not audio_length_in_s > 0:
            raise ValueError(f"audio_length_in_s is {audio_length_in_s}: it must be positive.")
        self._check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_rescale)
        self._check_strength(audio, strength, mask)
        if audio is not None and strength is None and mask is None and audio_length_in_s is None:
            raise ValueError(
                "audio is given, but not what to do with it: add strength, mask, or an audio_length_in_s beyond it."
            )
        if audio is not None and not (hasattr(self.scheduler, "add_noise") or hasattr(self.scheduler, "scale_noise")):
            raise ValueError(f"{type(self.scheduler).__name__} cannot add noise to the audio: use a DDIMScheduler.")
        if continuous and (loop or latents is not None):
            raise ValueError(f"continuous goes from begin to end: leave out {'loop' if loop else 'latents'}.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}: it must lie between 0 (DDIM) and 1 (as much noise as in DDPM).")
        if eta and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"eta is {eta}, but {type(self.scheduler).__name__} has no eta: use a DDIMScheduler.")
        self._check_outputs(output_type, OUTPUT_TYPES, callback_on_step_end_tensor_inputs)
        self._check_clipping()

    def _check_text(
        self,
        prompt: Text,
        negative_prompt: Text,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        guidance_rescale: float = 0.0,
    ) -> None:
        has_text = prompt is not None or prompt_embeds is not None
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if (has_text or has_negative) and not self._reads_text:
            raise ValueError("There is a prompt, but the network reads no text: leave it out.")
        for words, embeds, name in (
            (prompt, prompt_embeds, "prompt"), (negative_prompt, negative_prompt_embeds, "negative_prompt"),
        ):  # fmt: skip
            if words is not None and embeds is not None:
                raise ValueError(f"{name} and {name}_embeds are both given: leave out one of them.")
            if isinstance(words, (list, tuple)) and not words:
                raise ValueError(f"{name} is an empty list: give at least one text, or leave it out.")
        for words in [prompt] if isinstance(prompt, str) else prompt or []:
            if not isinstance(words, str):
                raise ValueError(f"prompt holds {words!r}: give a text, or a list of texts.")
            if not words.strip():
                raise ValueError("A prompt is empty: leave prompt out for sounds without one.")
        if self._guidance_scale != 1 and not has_text:
            raise ValueError(f"guidance_scale is {self._guidance_scale}, but there is no prompt to guide towards.")
        if has_negative and not has_text:
            raise ValueError("There is a negative prompt, but no prompt to guide towards: add one.")
        if self._guidance_scale == 1 and has_negative:
            raise ValueError("There is a negative prompt, but guidance_scale is 1, which does not look at it.")
        if not 0 <= guidance_rescale <= 1 or (guidance_rescale and not self.do_classifier_free_guidance):
            raise ValueError(
                f"guidance_rescale is {guidance_rescale}: it lies between 0 and 1, and needs a guidance_scale."
            )

    def _check_clipping(self) -> None:
        """Schedulers that clip what the network denoises make something else of what lies beyond their range."""
        config, known = self.scheduler.config, inspect.signature(type(self.scheduler).__init__).parameters
        clips = [name for name in ("clip_sample", "thresholding") if name in known and config.get(name)]
        reach = max(abs(self.mel.standardize(-1.0)), abs(self.mel.standardize(1.0)))
        if self.vae is None and ("clip_sample" not in clips or reach <= config.get("clip_sample_range", 1.0)):
            return
        if clips:
            what = "latents know no range" if self.vae is not None else f"the mels reach {reach:.3g}"
            raise ValueError(
                f"{type(self.scheduler).__name__} has {clips[0]}=True, but {what}: use"
                f" pipe.scheduler.from_config(pipe.scheduler.config, {clips[0]}=False)."
            )

    # ----- how much there is

    @staticmethod
    def _count(
        branches: list[tuple[torch.Tensor, torch.Tensor]],
        audio: torch.Tensor | None,
        new_frames: torch.Tensor | None,
        latents: torch.Tensor | None,
        generator: Generators,
        num_waveforms: int,
    ) -> int:
        """The number of prompts, or of sounds given; whatever is given must be one for all, or one for each."""
        rows = [("prompt", len(states)) for states, _ in branches]
        rows += [("audio", len(audio))] if audio is not None else []
        rows += [("mask", len(new_frames))] if new_frames is not None else []
        if latents is not None and num_waveforms == 1:
            rows.append(("latents", len(latents)))
        num_prompts = max([1, *(count for _, count in rows)])
        batch_size = num_prompts * num_waveforms
        for name, count in rows:
            if count not in (1, num_prompts):
                raise ValueError(f"{name} has {count} entries for {num_prompts} prompts: give one, or one for each.")
        given = [("latents", len(latents))] if latents is not None and len(latents) > 1 else []
        given += [("generator", len(generator))] if isinstance(generator, list) else []
        for name, count in given:
            if count != batch_size:
                raise ValueError(f"{name} has {count} entries for a batch of {batch_size}: give one for each sound.")
        return num_prompts

    def _measure(
        self, audio: torch.Tensor | None, latents: torch.Tensor | None, seconds: float | None, loop: bool
    ) -> Clip:
        c = self.mel.config
        is_mel = audio is not None and audio.ndim == 4
        if loop:
            quantum = self._unit * c.hop_length
            samples = c.num_frames * c.hop_length
            if audio is not None:
                given = audio.shape[-1] * c.hop_length if is_mel else audio.shape[-1]
                samples = round(given / quantum) * quantum
                if seconds is not None or samples - given not in (0, c.method == "image"):
                    raise ValueError(
                        f"audio has {given} samples: a loop has a multiple of {quantum}, and audio_length_in_s is its"
                        " own."
                    )
            elif seconds is not None:
                samples = max(1, round(seconds * c.sample_rate / quantum)) * quantum
            elif latents is not None:
                samples = latents.shape[-1] * self.vae_scale_factor * c.hop_length
            return Clip(samples, samples // c.hop_length, samples // c.hop_length)
        samples = self.mel.slice_samples
        if audio is not None:
            samples = self.mel.samples_for(audio.shape[-1]) if is_mel else audio.shape[-1]
        elif latents is not None:
            samples = self.mel.samples_for(latents.shape[-1] * self.vae_scale_factor)
        if seconds is not None:
            if audio is not None and round(seconds * c.sample_rate) < samples:
                raise ValueError(
                    f"audio_length_in_s is {seconds:g}, but the audio that is to be kept has"
                    f" {samples / c.sample_rate:g} s: cut it first."
                )
            samples = round(seconds * c.sample_rate)
        frames = -(-(samples + (c.method == "image")) // c.hop_length)
        return Clip(samples, frames, max(c.num_frames, -(-frames // self.vae_scale_factor) * self.vae_scale_factor))
