# diffusers' `progress_bar` and optional components are typed as something else than they are:
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportReturnType=false
# pyright: reportAssignmentType=false
"""Sound from Poisson flow and diffusion on mel spectrograms, and pictures from the same models without a mel."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from .tonefield_calls import CallMixin
from .tonefield_classes import Labels, order_names, read_labels
from .tonefield_mel_editing import (
    Mask,
    Source,
    check_vocoder,
    circular_in_time,
    encode_sound,
    guided_field,
    interpolate_latents,
    is_spans,
    make_sound,
    paste,
    read_frames,
    read_mask,
)
from .tonefield_repository import SelfContainedPipelineMixin


Generators = torch.Generator | list[torch.Generator] | None
Sounds = torch.Tensor | np.ndarray

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import soundfile
        >>> import tonefield
        >>> import torch

        >>> pipe = tonefield.load("someone/drum-loops").to("cuda")
        >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        >>> drums = pipe(batch_size=4, generator=seeds)
        >>> soundfile.write("drums.wav", drums.audios[0], drums.sampling_rate)

        >>> # The last half second anew, the rest as it was
        >>> end = drums.audios.shape[1] / drums.sampling_rate
        >>> other = pipe(audio=drums.audios[0], mask=[(end - 0.5, end)])

        >>> # Without a click when played over and over
        >>> loop = pipe(loop=True).audios[0]
        ```
"""


@dataclass
class MelPFGMPipelineOutput(BaseOutput):
    """
    Output of [`MelPFGMPipeline`]; what was not asked for is `None`.

    Args:
        audios (`np.ndarray` or `torch.Tensor` of shape `(batch_size, samples)`): Sounds in [-1, 1].
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Pictures.
        mels (`np.ndarray` or `torch.Tensor` of shape `(batch_size, 1, n_mels, frames)`): What the model generated.
        sampling_rate (`int`): Samples per second of `audios`.
    """

    audios: np.ndarray | torch.Tensor | None = None
    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    mels: np.ndarray | torch.Tensor | None = None
    sampling_rate: int | None = None


@dataclass
class MelPFGMLikelihoodOutput(BaseOutput):
    """
    Output of [`MelPFGMPipeline.log_likelihood`].

    Args:
        log_likelihood (`torch.Tensor` of shape `(batch_size,)`): In nats, the density of what the model sees.
        bits_per_dimension (`torch.Tensor` of shape `(batch_size,)`): The negative in bits, per number of the mel.
    """

    log_likelihood: torch.Tensor
    bits_per_dimension: torch.Tensor


class MelPFGMPipeline(SelfContainedPipelineMixin, CallMixin, DiffusionPipeline):
    r"""
    Generates sound with a network that denoises mel spectrograms: PFGM, PFGM++, EDM diffusion or a score SDE, as the
    scheduler says. Without a mel it generates pictures.

    A class-conditional network has one class more than there are labels: the last one, `num_class_embeds - 1`, is the
    null class. Training puts it in the place of the labels that it drops, guidance starts from it, and sampling
    without labels uses it.

    Args:
        unet ([`UNet2DModel`]): Any model that is called as `unet(sample, timestep, class_labels=...)`.
        scheduler ([`PoissonFlowScheduler`], [`ScoreSDEScheduler`], [`EDMEulerScheduler`], ...):
            Noise law, grid and solver.
        mel ([`MelSpectrogram`], *optional*): The front end that the network was trained with.
        vocoder ([`MMAudioVocoder`] or [`LTX2Vocoder`], *optional*):
            Makes sound of mels of the method `"bigvgan"`, in the place of the Griffin-Lim algorithm.
        card (`dict`, *optional*):
            What the model card of a saved pipeline tells of the training, see [`SelfContainedPipelineMixin`]. Its
            example takes `num_inference_steps` from here.
        label2id (`dict[str, int]`, *optional*):
            The names of the classes and their labels, so that sounds can be asked for by name.
    """

    model_cpu_offload_seq = "unet->vocoder"
    _exclude_from_cpu_offload = ["mel"]  # noqa: RUF012
    _optional_components = ["mel", "vocoder"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        mel: ModelMixin | None = None,
        vocoder: ModelMixin | None = None,
        card: dict | None = None,
        label2id: dict[str, int] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, mel=mel, vocoder=vocoder)
        label2id = order_names(label2id, self.num_classes)
        self.register_to_config(card=card, label2id=label2id)
        check_vocoder(mel, vocoder)

    @property
    def num_classes(self) -> int:
        """The number of labels, without the null class."""
        return (self.unet.config.get("num_class_embeds") or 1) - 1

    @property
    def card_example(self) -> str:
        options = [f"class_labels={name!r}" for name in list(self.config.label2id or {})[:1]]
        if steps := (self.config.card or {}).get("num_inference_steps"):
            options.append(f"num_inference_steps={steps}")
        if self.mel is None:
            options.append('output_type="pil"')
        options = ", ".join(options).replace("{", "{{").replace("}", "}}")
        if self.mel is None:
            return f'import {{library}}\n\n\npipe = {{load}}\npipe({options}).images[0].save("picture.png")'
        return (
            f"import {{library}}\nimport soundfile\n\n\npipe = {{load}}\nsound = pipe({options})\n"
            'soundfile.write("sound.wav", sound.audios[0], sound.sampling_rate)'
        )

    # ----- what comes in

    def _sample_shape(self) -> tuple[int, int, int]:
        channels = self.unet.config.in_channels
        if self.mel is not None:
            return channels, self.mel.config.n_mels, self.mel.config.num_frames
        size = self.unet.config.sample_size
        return channels, *((size, size) if isinstance(size, int) else size)

    def _read_audio(self, audio: Sounds, loop: bool = False) -> Source:
        audio = torch.as_tensor(audio).to(self._execution_device, torch.float32)
        shape = self._sample_shape()
        if audio.ndim == 4:
            if audio.shape[1:] != shape:
                raise ValueError(
                    f"audio has shape {tuple(audio.shape)}: a mel must be of shape (batch_size, {shape})."
                )
            return Source(audio)
        if self.mel is None:
            raise ValueError(
                f"audio is a waveform, but there is no mel to see it with: pass (batch_size, {shape}), or add a mel."
            )
        if audio.ndim not in (1, 2):
            raise ValueError(f"audio has shape {tuple(audio.shape)}: it must be (samples,) or (batch_size, samples).")
        audio = audio.reshape(-1, audio.shape[-1])
        c, expected = self.mel.config, self.mel.slice_samples
        ring = c.num_frames * c.hop_length
        if audio.shape[1] != expected and not (loop and audio.shape[1] == ring):
            raise ValueError(
                f"audio has {audio.shape[1]} samples, but the model sees {expected} ({expected / c.sample_rate:.3f} s"
                f" at {c.sample_rate} Hz): cut it with `pipe.mel.slices`, or fill it up with zeros."
            )
        if loop:
            audio = torch.nn.functional.pad(audio[:, None], (0, ring - audio.shape[1]), mode="replicate")[:, 0]
        return encode_sound(self.mel, audio, loop)

    def _read_mask(self, mask: Mask, loop: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mask over frames and the mask over samples; the latter is `None` without a mel."""
        frames = self._sample_shape()[2]
        if self.mel is None:
            if is_spans(mask):
                raise ValueError(f"mask is {mask}, but there are no seconds without a mel: give {frames} booleans.")
            return read_frames(mask, frames), None
        num_samples = frames * self.mel.config.hop_length if loop else self.mel.slice_samples
        return read_mask(mask, self.mel, frames, num_samples, loop)

    def check_inputs(
        self,
        batch_size: int,
        class_labels: Labels,
        num_inference_steps: int,
        guidance_scale: float,
        audio: Sounds | None,
        strength: float | None,
        mask: Mask | None,
        temperature: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        self._check_counts(batch_size=batch_size, num_inference_steps=num_inference_steps)
        if guidance_scale != 1 and class_labels is None:
            raise ValueError(f"guidance_scale is {guidance_scale}, but there are no class_labels to guide towards.")
        self._check_strength(audio, strength, mask)
        if audio is not None and strength is None and mask is None:
            raise ValueError("audio is given, but not what to do with it: add strength (0 to 1), or mask.")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it must be positive; 1 leaves the noise as it is.")
        check_vocoder(self.mel, self.vocoder)  # which may have been set since
        self._check_outputs(output_type, ("np", "pt", "mel", "pil"), callback_on_step_end_tensor_inputs)

    # ----- the network

    def _network(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The network's output in the precision of the sample; its own `dtype` takes a walk through all of it."""
        return self.unet(sample.to(dtype), timestep, class_labels=labels).sample.to(sample.dtype)

    def _all_labels(self, labels: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
        """One label per sample; the null class where none is given."""
        if self.num_classes == 0:
            return None
        if labels is None:
            labels = torch.full((1,), self.num_classes, device=self._execution_device)  # no copy, no waiting
        return labels.expand(batch_size)

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """
        The network's output, guided: Dn = Dn_null + w (Dn_label - Dn_null) (https://huggingface.co/papers/2207.12598).

        All predictions but the field are affine in Dn with the same coefficients for both, so that the outputs can be
        combined in its place.
        """
        model_input = self.scheduler.scale_model_input(latents, timestep)
        if not self.do_classifier_free_guidance:
            return self._network(model_input, timestep, labels, dtype)
        null = torch.full_like(labels, self.num_classes)
        outputs = self._network(torch.cat([model_input] * 2), timestep, torch.cat([null, labels]), dtype)
        config = self.scheduler.config
        if config.get("prediction_type") != "field":
            without, towards = outputs.chunk(2)
            return without + self.guidance_scale * (towards - without)
        sigma = torch.exp(4 * timestep)
        denoised = self.scheduler.precondition_outputs(torch.cat([latents] * 2), outputs, sigma)
        without, towards = denoised.chunk(2)
        return guided_field(latents, without + self.guidance_scale * (towards - without), sigma, config)

    def _integrate(self, sample: torch.Tensor, labels: torch.Tensor | None, upwards: bool, **options):
        """All the way from samples to noise, or from noise to samples."""
        if not hasattr(self.scheduler, "integrate_network"):
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot run backwards: only a network that was trained for a"
                " PoissonFlowScheduler or a ScoreSDEScheduler can."
            )
        dtype = self.unet.dtype
        with self.progress_bar(total=float("inf")) as bar:

            def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                bar.update()
                return self._network(x, timestep, labels, dtype)

            return self.scheduler.integrate_network(network, sample, upwards, **options)

    # ----- what goes out

    def _output(
        self,
        mels: torch.Tensor,
        generator: Generators,
        output_type: str,
        loop: bool = False,
        source: Source | None = None,
        new_samples: torch.Tensor | None = None,
    ) -> MelPFGMPipelineOutput:
        if self.mel is None:
            kind = "latent" if output_type == "mel" else output_type
            return MelPFGMPipelineOutput(images=VaeImageProcessor().postprocess(mels, output_type=kind))
        rate = self.mel.config.sample_rate
        if output_type == "mel":
            return MelPFGMPipelineOutput(mels=mels, sampling_rate=rate)
        if output_type == "pil":
            return MelPFGMPipelineOutput(images=self.mel.to_image(mels), mels=mels, sampling_rate=rate)
        source = source or Source(mels)
        reference = None if source.reference is None else source.reference.expand(len(mels))
        audios = make_sound(self.mel, self.vocoder, mels, generator, reference, loop)
        if source.waveform is not None and new_samples is not None:
            kept = source.waveform.to(audios.device).expand_as(audios)
            new = new_samples.to(audios.device).expand(audios.shape)
            audios = paste(kept, audios, new, self.mel.config.n_fft // 2, loop)
        if output_type == "np":
            audios, mels = audios.cpu().numpy(), mels.cpu().numpy()
        return MelPFGMPipelineOutput(audios=audios, mels=mels, sampling_rate=rate)

    # ----- generation

    @property
    def _first_noise_level(self) -> float:
        """Where the sampling equation starts, whatever grid the scheduler was last made ready for."""
        return type(self.scheduler).from_config(self.scheduler.config).init_noise_sigma

    def prepare_noise(self, batch_size: int, generator: Generators) -> torch.Tensor:
        """Noise of the scheduler's law at unit scale, float32."""
        shape = (batch_size, *self._sample_shape())
        if hasattr(self.scheduler, "sample_noise"):
            return self.scheduler.sample_noise(shape, generator, self._execution_device, torch.float32)
        return randn_tensor(shape, generator, self._execution_device, torch.float32)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Labels = None,
        num_inference_steps: int = 18,
        guidance_scale: float = 1.0,
        audio: Sounds | None = None,
        strength: float | None = None,
        mask: Mask | None = None,
        temperature: float = 1.0,
        loop: bool = False,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> MelPFGMPipelineOutput | tuple:
        r"""
        Generate sound.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                How many sounds; as many as there are in `audio`, `latents` or `class_labels` when those are several.
            class_labels (`int`, `str` or a list of them, *optional*):
                One label for all, or one per sound: a number, or a name of `pipe.config.label2id`.
            num_inference_steps (`int`, *optional*, defaults to 18): Steps from noise to sound.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                1 follows the labels as they were learnt, more exaggerates them, 0 forgets them.
            audio (`torch.Tensor` or `np.ndarray`, *optional*):
                Sound to start from, of shape `(samples,)` or `(batch_size, samples)` and of `mel.slice_samples`
                samples; or the mels (pictures) themselves, as the model sees them, `(batch_size, channels, n_mels,
                frames)`.
            strength (`float`, *optional*):
                How far a variation may go from `audio`: 0 returns it, 1 does not heed it.
            mask (`list[tuple[float, float]]`, `torch.Tensor`, `np.ndarray` or `list[bool]`, *optional*):
                Where new sound is wanted in `audio`: spans of seconds, or a boolean for each frame, of shape
                `(frames,)` or `(batch_size, frames)`. All other samples come back as they were, but for a cross-fade
                of half a window (`n_fft / 2`) beside what is new. The less is kept, the less it decides: replacing it
                at each step is not drawing from the exact conditional law.
            temperature (`float`, *optional*, defaults to 1.0): Factor on the norm of the noise (of the latents).
            loop (`bool`, *optional*, defaults to `False`):
                Time becomes a ring: the sound, of `frames * hop_length` samples, can be repeated without a click.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all randomness. With a list of one per sound, none depends on the batch it is in.
            latents (`torch.Tensor`, *optional*):
                The noise to start from, at unit scale, as [`~MelPFGMPipeline.invert`] returns it. The scheduler's
                `init_noise_sigma` is applied to it here, as diffusers' pipelines do.
            output_type (`str`, *optional*, defaults to `"np"`):
                `"np"` or `"pt"`: sounds and mels (without a mel, pictures in [0, 1]); `"mel"`: what the model
                generated, as it is; `"pil"`: pictures.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`MelPFGMPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"latents": latents})` after each step. The latents in the
                dictionary that it returns take the place of the old ones.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What the callback is shown.

        Examples:

        Returns:
            [`MelPFGMPipelineOutput`], or a `tuple` of what in it is not `None`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            batch_size, class_labels, num_inference_steps, guidance_scale, audio, strength, mask, temperature,
            output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        device = self._execution_device
        labels = read_labels(class_labels, self.num_classes, self.config.label2id, self._execution_device)
        source = None if audio is None else self._read_audio(audio, loop)
        new_frames, new_samples = (None, None) if mask is None else self._read_mask(mask, loop)

        given = {"audio": source and source.mel, "latents": latents, "class_labels": labels, "mask": new_frames}
        rows = {name: len(value) for name, value in given.items() if value is not None}
        if batch_size == 1:
            batch_size = max([1, *rows.values()])
        if isinstance(generator, list):
            rows["generator"] = len(generator)
        for name, count in rows.items():
            if count != batch_size and (count != 1 or name == "generator"):
                raise ValueError(f"{name} has {count} entries for a batch of {batch_size}: give one for each sound.")
        if latents is not None and latents.shape[1:] != self._sample_shape():
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: they must be (batch, {self._sample_shape()})."
            )
        labels = self._all_labels(labels if guidance_scale != 0 else None, batch_size)

        # The part of the grid that is walked, and the noise to begin with
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        walked = num_inference_steps
        if strength is not None:
            walked = max(1, round(strength * num_inference_steps)) if strength > 0 else 0
        begin = (num_inference_steps - walked) * self.scheduler.order
        timesteps = self.scheduler.timesteps[begin:]
        self._num_timesteps = len(timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        if latents is None:
            noise = self.prepare_noise(batch_size, generator)
        else:
            noise = latents.to(device, torch.float32).expand(batch_size, -1, -1, -1)
        noise = temperature * noise
        if walked == num_inference_steps:
            latents = noise * self.scheduler.init_noise_sigma
        elif walked == 0:
            latents = source.mel.expand_as(noise)
            new_samples = torch.zeros(1, 1, dtype=torch.bool)
        else:
            latents = self.scheduler.add_noise(source.mel.expand_as(noise), noise, timesteps[:1].expand(batch_size))

        if new_frames is not None:
            new_frames = new_frames.to(device)[:, None, None]
        # Solvers of diffusers that add no noise take no generator.
        random = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"return_dict": False} | ({"generator": generator} if random else {})
        dtype = self.unet.dtype

        with circular_in_time(self.unet) if loop else nullcontext(), self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if new_frames is not None:
                    # What is kept lies on its own path from the noise to the source, y + sigma * noise.
                    known = self.scheduler.add_noise(source.mel.expand_as(noise), noise, t.expand(batch_size))
                    latents = torch.where(new_frames, latents, known)
                output = self._predict(latents, t, labels, dtype)
                latents = self.scheduler.step(output, t, latents, **options)[0]
                if callback_on_step_end is not None:
                    shown = {}
                    for name in callback_on_step_end_tensor_inputs:
                        shown[name] = locals()[name]
                    latents = callback_on_step_end(self, i, t, shown).pop("latents", latents)
                bar.update()
        if new_frames is not None:
            latents = torch.where(new_frames, latents, source.mel)

        result = self._output(latents, generator, output_type, loop, source, new_samples)
        self.maybe_free_model_hooks()
        return result if return_dict else result.to_tuple()

    # ----- the same path upwards

    @torch.no_grad()
    def invert(
        self, audio: Sounds, class_labels: Labels = None, rtol: float = 1e-5, atol: float = 1e-5
    ) -> torch.Tensor:
        r"""
        The noise from which the model makes a sound: the sampling equation, solved upwards. (A [`ScoreSDEScheduler`]
        makes the sound of it again with a `solver_type` other than `"pc"`, which adds noise of its own.)

        Args:
            audio (`torch.Tensor` or `np.ndarray`): Sounds (or mels, or pictures), as in `__call__`.
            class_labels (`int`, `str` or a list of them, *optional*): Their labels.
            rtol, atol (`float`, *optional*, defaults to 1e-5): Tolerances of the solver.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, n_mels, frames)`: `latents` for `__call__`, at unit scale.
        """
        mels = self._read_audio(audio).mel
        labels = self._all_labels(
            read_labels(class_labels, self.num_classes, self.config.label2id, self._execution_device), len(mels)
        )
        latents = self._integrate(mels, labels, upwards=True, rtol=rtol, atol=atol)
        self.maybe_free_model_hooks()
        return latents / self._first_noise_level

    @torch.no_grad()
    def interpolate(
        self,
        a: Sounds,
        b: Sounds,
        n: int,
        class_labels: Labels = None,
        generator: Generators = None,
        output_type: str = "np",
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> MelPFGMPipelineOutput:
        r"""
        `n` sounds from `a` to `b`: the noise of both is found, and noise between them made into sound. The noise turns
        from the one direction to the other at a constant angle while its norm grows at a constant rate.

        Args:
            a, b (`torch.Tensor` or `np.ndarray`): One sound each, as in `__call__`.
            n (`int`): Number of sounds, both ends included.
            class_labels (`int` or `str`, *optional*): The label of both.
            generator, output_type: As in `__call__`; a list of generators has `n` entries.
            rtol, atol (`float`, *optional*, defaults to 1e-5): Tolerances of the solver.

        Returns:
            [`MelPFGMPipelineOutput`]
        """
        ends = [self._read_audio(sound).mel for sound in (a, b)]
        if n < 2 or any(len(mel) != 1 for mel in ends):
            raise ValueError(
                f"n is {n}, and there are {len(ends[0])} and {len(ends[1])} sounds: use n >= 2, one each."
            )
        labels = read_labels(class_labels, self.num_classes, self.config.label2id, self._execution_device)
        latents = self.invert(torch.cat(ends), class_labels, rtol, atol)
        path = interpolate_latents(latents[:1], latents[1:], torch.linspace(0, 1, n, dtype=torch.float64))
        path = path * self._first_noise_level
        mels = self._integrate(path, self._all_labels(labels, n), upwards=False, rtol=rtol, atol=atol)
        result = self._output(mels, generator, output_type)
        self.maybe_free_model_hooks()
        return result

    def log_likelihood(
        self,
        audio: Sounds,
        class_labels: Labels = None,
        divergence: str = "hutchinson",
        generator: Generators = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> MelPFGMLikelihoodOutput:
        r"""
        How likely the model holds sounds to be: the density of their mels (as the model sees them, with noise of the
        smallest level), by the change of density along the sampling equation.

        Args:
            audio (`torch.Tensor` or `np.ndarray`): Sounds (or mels, or pictures), as in `__call__`.
            class_labels (`int`, `str` or a list of them, *optional*): Their labels.
            divergence (`"hutchinson"` or `"exact"`, *optional*, defaults to `"hutchinson"`):
                An unbiased estimate, or the exact value at as many times the cost as a mel has numbers.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Draws the probes of the estimate.
            rtol, atol (`float`, *optional*, defaults to 1e-5): Tolerances of the solver.

        Returns:
            [`MelPFGMLikelihoodOutput`]
        """
        mels = self._read_audio(audio).mel
        labels = self._all_labels(
            read_labels(class_labels, self.num_classes, self.config.label2id, self._execution_device), len(mels)
        )
        _, nats = self._integrate(
            mels, labels, upwards=True, rtol=rtol, atol=atol, log_likelihood=True, divergence=divergence,
            generator=generator,
        )  # fmt: skip
        self.maybe_free_model_hooks()
        bits = -nats / (mels[0].numel() * np.log(2))
        return MelPFGMLikelihoodOutput(log_likelihood=nats, bits_per_dimension=bits)
