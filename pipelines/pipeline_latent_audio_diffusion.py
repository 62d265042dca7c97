# diffusers' `progress_bar` and optional components are typed as something else than they are:
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportReturnType=false
# pyright: reportAssignmentType=false
"""Sound from text with diffusion on mel spectrograms, or on the latents that an autoencoder makes of them."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from .tonefield_calls import CallMixin
from .tonefield_latent_inputs import Clip, LatentInputsMixin, Text
from .tonefield_lora import LoraMixin
from .tonefield_mel_editing import (
    Generators,
    Mask,
    Source,
    beside,
    check_vocoder,
    circular_in_time,
    encode_sound,
    frame_of_samples,
    guided_field,
    interpolate_latents,
    make_sound,
    paste,
    read_mask,
    rescale_guidance,
)
from .tonefield_repository import SelfContainedPipelineMixin
from .tonefield_text import TokenStates, encode_text, join_text
from .tonefield_windows import continuations, in_windows, mirrored


Sounds = torch.Tensor | np.ndarray

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import soundfile
        >>> import tonefield
        >>> import torch

        >>> pipe = tonefield.load("someone/music-from-words").to("cuda")
        >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        >>> music = pipe("slow piano", negative_prompt="drums", num_waveforms_per_prompt=4, generator=seeds)
        >>> soundfile.write("piano.wav", music.audios[0], music.sampling_rate)

        >>> # A minute of it, each window continuing what is there
        >>> minute = pipe("slow piano", audio=music.audios[0], audio_length_in_s=60, continuous=True)

        >>> # The third second anew, a variation, the style of other words for a whole track, a loop without a click
        >>> mended = pipe("slow piano", audio=minute.audios[0], mask=[(2, 3)])
        >>> varied = pipe("slow piano", audio=minute.audios[0], strength=0.3)
        >>> styled = pipe("string quartet", audio=minute.audios[0], strength=0.6)
        >>> loop = pipe("drums", loop=True)
        ```
"""


@dataclass
class LatentAudioDiffusionPipelineOutput(BaseOutput):
    """
    Output of [`LatentAudioDiffusionPipeline`]; what was not asked for is `None`.

    Args:
        audios (`np.ndarray` or `torch.Tensor` of shape `(batch_size, samples)`): Sounds in [-1, 1].
        images (`list[PIL.Image.Image]`): Pictures of the mels.
        mels (`np.ndarray` or `torch.Tensor` of shape `(batch_size, 1, n_mels, frames)`): What was generated.
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The same before the autoencoder.
        sampling_rate (`int`): Samples per second of `audios`.
    """

    audios: np.ndarray | torch.Tensor | None = None
    images: list[PIL.Image.Image] | None = None
    mels: np.ndarray | torch.Tensor | None = None
    latents: torch.Tensor | None = None
    sampling_rate: int | None = None


class LatentAudioDiffusionPipeline(
    LoraMixin, SelfContainedPipelineMixin, CallMixin, LatentInputsMixin, DiffusionPipeline
):
    r"""
    Generates sound with a network that denoises mel spectrograms, or the latents of an autoencoder for them, and reads
    text or does not. The scheduler may be any of diffusers or of tonefield that suits what the network predicts.

    Args:
        unet ([`UNet2DConditionModel`] or [`UNet2DModel`]): The network; the former reads text, the latter does not.
        scheduler ([`DDIMScheduler`], [`DPMSolverMultistepScheduler`], [`PoissonFlowScheduler`], ...):
            Noise law, grid and solver. With a VAE it must not clip: latents know no range.
        mel ([`MelSpectrogram`]): The front end that the networks were trained with.
        vae ([`AutoencoderKL`], *optional*):
            Makes latents of mels: `(latents - shift_factor) * scaling_factor` is what the network sees.
        tokenizer ([`T5Tokenizer`], *optional*), text_encoder ([`T5EncoderModel`], *optional*):
            Make of a prompt what the network reads, see [`encode_text`].
        vocoder ([`MMAudioVocoder`] or [`LTX2Vocoder`], *optional*):
            Makes sound of mels of the method `"bigvgan"`, in the place of the Griffin-Lim algorithm.
        card (`dict`, *optional*):
            What the model card of a saved pipeline tells of the training, see [`SelfContainedPipelineMixin`].
    """

    model_cpu_offload_seq = "text_encoder->unet->vae->vocoder"
    _exclude_from_cpu_offload = ["mel"]  # noqa: RUF012
    _optional_components = ["vae", "tokenizer", "text_encoder", "vocoder"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        mel: ModelMixin,
        vae: AutoencoderKL | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: T5EncoderModel | None = None,
        vocoder: ModelMixin | None = None,
        card: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, mel=mel, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder,
            vocoder=vocoder,
        )  # fmt: skip
        self.register_to_config(card=card)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        check_vocoder(mel, vocoder)
        if unet is not None:
            self._check_sizes()

    @property
    def card_example(self) -> str:
        prompt = '"a few words"' if self.tokenizer is not None else ""
        return (
            f"import {{library}}\nimport soundfile\n\n\npipe = {{load}}\nsound = pipe({prompt})\n"
            'soundfile.write("sound.wav", sound.audios[0], sound.sampling_rate)'
        )

    @property
    def _reads_text(self) -> bool:
        return self.unet.config.get("cross_attention_dim") is not None

    @property
    def _text_width(self) -> int:
        c = self.unet.config
        widths = c.get("encoder_hid_dim") or c.cross_attention_dim
        return widths if isinstance(widths, int) else widths[0]

    @property
    def _unit(self) -> int:
        """Sizes that the networks can halve as often as they do are multiples of this."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.get("block_out_channels") or [1]) - 1)

    # ----- text

    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`prompt_embeds` and `prompt_attention_mask` of one or several prompts, see [`encode_text`]."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("There is no text encoder: give prompt_embeds, and negative_prompt_embeds for guidance.")
        return encode_text(self.tokenizer, self.text_encoder, prompt, self._execution_device)

    def _read_text(
        self, prompt: Text, negative_prompt: Text, given: tuple[torch.Tensor | None, ...]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """States and masks, a row per prompt: of what to guide from, what to guide to, or both."""
        if not self._reads_text:
            return []
        embeds, mask, negative_embeds, negative_mask = given
        texts = [(negative_prompt or "", negative_embeds, negative_mask), (prompt, embeds, mask)]
        if (prompt is None and embeds is None) or self._guidance_scale == 0:
            texts = texts[:1]
        elif self._guidance_scale == 1:
            texts = texts[1:]
        branches = []
        for words, states, tokens in texts:
            if states is None:
                states, tokens = self.encode_prompt(words)
            elif states.ndim != 3 or states.shape[2] != self._text_width:
                wanted = f"(prompts, tokens, {self._text_width})"
                raise ValueError(f"prompt_embeds have shape {tuple(states.shape)}: they must be {wanted}.")
            elif tokens is None:
                tokens = states.new_ones(states.shape[:2], dtype=torch.bool)
            branches.append((states.to(self._execution_device), tokens.to(self._execution_device, torch.bool)))
        return branches

    # ----- sound that comes in

    def _audio_tensor(self, audio: Sounds) -> torch.Tensor:
        """Waveforms (batch, samples), or mels (batch, 1, n_mels, frames)."""
        audio = torch.as_tensor(audio).to(self._execution_device, torch.float32)
        if audio.ndim == 4 and audio.shape[1:3] == (1, self.mel.config.n_mels):
            return audio
        if audio.ndim not in (1, 2) or audio.shape[-1] == 0:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)}: it must be (samples,), (batch_size, samples), or mels of shape"
                f" (batch_size, 1, {self.mel.config.n_mels}, frames)."
            )
        return audio.reshape(-1, audio.shape[-1])

    def _read_audio(self, audio: torch.Tensor, clip: Clip, loop: bool) -> Source:
        """The mel of all that is computed. What lies beyond the end continues the sound backwards, without a jump."""
        if audio.ndim == 4:
            return Source(audio[..., mirrored(clip.computed, audio.shape[-1]).to(audio.device)])
        if loop:
            audio = torch.nn.functional.pad(audio[:, None], (0, clip.samples - audio.shape[1]), mode="replicate")[:, 0]
            return encode_sound(self.mel, audio, loop)
        longer = self.mel.samples_for(clip.computed)
        audio = audio[:, mirrored(longer, audio.shape[1]).to(audio.device)]
        source = encode_sound(self.mel, audio, loop)
        return Source(source.mel, audio[:, : clip.samples], source.reference)

    def _read_mask(
        self, mask: Mask | None, kept: int, clip: Clip, loop: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where sound is new: over the frames that are computed, and over samples, `kept` of which are given."""
        beyond = kept < clip.samples and not loop
        if mask is None and not beyond:
            return None, None
        if mask is None:
            mask = torch.zeros(clip.frames, dtype=torch.bool)
        new_frames, new_samples = (new.cpu() for new in read_mask(mask, self.mel, clip.frames, clip.samples, loop))
        if beyond:
            c = self.mel.config
            frame = frame_of_samples(clip.samples, clip.frames, c.hop_length, c.method == "image", loop)
            # Windows that reach beyond the end have heard something else than the sound.
            first = frame[max(0, kept - c.n_fft // 2)]
            new_frames = new_frames | (torch.arange(clip.frames) >= first)
            new_samples = new_samples | (torch.arange(clip.samples) >= kept)
        return torch.nn.functional.pad(new_frames, (0, clip.computed - clip.frames), value=True), new_samples

    # ----- the autoencoder

    def _ring(self, model: torch.nn.Module, loop: bool, frames: int):
        """A loop of one window is a ring for the network; a longer one is cut into windows all around."""
        return circular_in_time(model) if loop and frames <= self.mel.config.num_frames else nullcontext()

    def _encode(self, mels: torch.Tensor, loop: bool, batch_size: int) -> torch.Tensor:
        """What the network sees of mels."""
        if self.vae is None:
            return mels
        c = self.vae.config

        def encode(mels: torch.Tensor, _) -> torch.Tensor:
            return self.vae.encode(mels.to(self.vae.dtype)).latent_dist.mode().float()

        with self._ring(self.vae, loop, mels.shape[-1]):
            latents = in_windows(encode, mels, self.mel.config.num_frames, self.vae_scale_factor, loop, batch_size)
        return (latents - (c.get("shift_factor") or 0.0)) * c.scaling_factor

    def _decode(self, latents: torch.Tensor, loop: bool, batch_size: int) -> torch.Tensor:
        if self.vae is None:
            return latents
        c = self.vae.config

        def decode(latents: torch.Tensor, _) -> torch.Tensor:
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

        latents = latents / c.scaling_factor + (c.get("shift_factor") or 0.0)
        with self._ring(self.vae, loop, latents.shape[-1] * self.vae_scale_factor):
            return in_windows(decode, latents, self._window, 1, loop, batch_size)

    # ----- the network

    def _predict(
        self,
        scheduler: SchedulerMixin,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TokenStates | None,
        dtype: torch.dtype,
        loop: bool,
        rows: int,
        rescale: float = 0.0,
    ) -> torch.Tensor:
        """
        The network's output, from all windows and guided: Dn_null + w (Dn_text - Dn_null)
        (https://huggingface.co/papers/2207.12598). `dtype` is that of the network, and takes a walk through all of it.

        All predictions but the field of PFGM are affine in the denoised Dn with the same coefficients for all of them,
        so that the outputs can be combined in its place.
        """
        model_input = latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(latents, timestep)
        timestep = timestep.to(latents.device, non_blocking=True)
        field = scheduler.config.get("prediction_type") == "field"
        branches = 1 if text is None else len(text.states)

        def network(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            x, arguments = x.repeat(branches, 1, 1, 1), {}
            time = timestep[row].repeat(branches) if timestep.ndim else timestep
            if text is not None:
                arguments["encoder_hidden_states"] = text.states[:, row].flatten(0, 1).to(dtype)
                arguments["encoder_attention_mask"] = text.mask[:, row].flatten(0, 1)
            output = self.unet(x.to(dtype), time, **arguments).sample.to(x.dtype)
            if field:
                output = scheduler.precondition_outputs(x, output, torch.exp(4 * time))
            return torch.cat(output.chunk(branches), dim=1)

        output = in_windows(network, model_input, self._window, 1, loop, max(1, rows // branches))
        if branches == 2:
            without, towards = output.chunk(2, dim=1)
            output = without + self._guidance_scale * (towards - without)
            if rescale:
                output = rescale_guidance(output, towards, rescale)
        return guided_field(latents, output, torch.exp(4 * timestep), scheduler.config) if field else output

    def _add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        timestep = timestep.to(clean.device, non_blocking=True).expand(len(clean))
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(clean, noise, timestep)
        return self.scheduler.scale_noise(clean, timestep, noise)  # flow matching

    @property
    def _window(self) -> int:
        """Width of what the network was trained on."""
        return self.mel.config.num_frames // self.vae_scale_factor

    def _noise_shape(self, batch_size: int, width: int) -> tuple[int, int, int, int]:
        return batch_size, self.unet.config.in_channels, self.mel.config.n_mels // self.vae_scale_factor, width

    def prepare_noise(self, batch_size: int, width: int, generator: Generators) -> torch.Tensor:
        """Noise of the scheduler's law at unit scale, float32."""
        shape = self._noise_shape(batch_size, width)
        if hasattr(self.scheduler, "sample_noise"):
            return self.scheduler.sample_noise(shape, generator, self._execution_device, torch.float32)
        return randn_tensor(shape, generator, self._execution_device, torch.float32)

    def _timesteps(self, steps: int, walked: int) -> torch.Tensor:
        """Make the scheduler ready for the last `walked` of so many steps."""
        # Where a scheduler looks numbers up by the timestep, they are on the CPU: a step must not wait for a timestep.
        tables = hasattr(self.scheduler, "alphas_cumprod")
        self.scheduler.set_timesteps(steps, device="cpu" if tables else self._execution_device)
        order = self.scheduler.order
        if walked < steps and len(self.scheduler.timesteps) != (steps - 1) * order + 1:
            raise ValueError(f"{type(self.scheduler).__name__} cannot begin within its steps: leave out strength.")
        begin = (steps - walked) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:]

    # ----- what goes out

    def _power(self, mels: torch.Tensor) -> torch.Tensor:
        """Power of each frame, (batch, frames), and 60 dB below the loudest band that a mel can hold."""
        low, high = self.mel.value_range
        level = (self.mel.unstandardize(mels[:, 0]).clamp(-1, 1) + 1) * ((high - low) / 2) + low
        per_unit = np.log(10) / 10 if self.mel.config.method == "image" else 2.0
        return torch.exp(level * per_unit).sum(1) + 1e-6 * np.exp(high * per_unit)

    def _output(
        self,
        mels: torch.Tensor,
        clip: Clip,
        generator: Generators,
        output_type: str,
        loop: bool,
        source: Source | None = None,
        new_frames: torch.Tensor | None = None,
        new_samples: torch.Tensor | None = None,
    ) -> LatentAudioDiffusionPipelineOutput:
        rate, gain = self.mel.config.sample_rate, 1.0
        mels = mels[..., : clip.frames]
        if new_frames is not None:
            new_frames, known = new_frames[..., : clip.frames], source.mel[..., : clip.frames]
            # An autoencoder blurs, and a blurred mel is quieter: as much as where the sound is known.
            power = [(self._power(mel) * ~new_frames).sum(1).clamp(min=1e-30) for mel in (known, mels)]
            gain = (power[0] / power[1]).sqrt()[:, None]
            mels = torch.where(new_frames[:, None, None], mels, known)
        if output_type == "mel":
            return LatentAudioDiffusionPipelineOutput(mels=mels, sampling_rate=rate)
        if output_type == "pil":
            return LatentAudioDiffusionPipelineOutput(images=self.mel.to_image(mels), mels=mels, sampling_rate=rate)
        reference = None if source is None else source.reference
        audios = make_sound(self.mel, self.vocoder, mels, generator, reference, loop)[:, : clip.samples]
        if source is not None and source.waveform is not None and new_samples is not None:
            kept, new = source.waveform.to(audios.device), new_samples.to(audios.device)
            # Nor need the vocoder be as loud as the sound that it joins.
            power = [(sound.square() * ~new).sum(1) / (~new).sum(1).clamp(min=1) + 1e-7 for sound in (kept, audios)]
            gain = gain * (power[0] / power[1]).sqrt()[:, None]
            audios = paste(kept, gain * audios, new.expand(audios.shape), self.mel.config.n_fft // 2, loop)
        if output_type == "np":
            audios, mels = audios.cpu().numpy(), mels.cpu().numpy()
        return LatentAudioDiffusionPipelineOutput(audios=audios, mels=mels, sampling_rate=rate)

    # ----- generation

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: Text = None,
        negative_prompt: Text = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_waveforms_per_prompt: int = 1,
        audio: Sounds | None = None,
        strength: float | None = None,
        mask: Mask | None = None,
        loop: bool = False,
        continuous: bool = False,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        window_batch_size: int = 16,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> LatentAudioDiffusionPipelineOutput | tuple:
        r"""
        Generate sound.

        Args:
            prompt (`str` or `list[str]`, *optional*): What is to be heard; without it, sound of any kind.
            negative_prompt (`str` or `list[str]`, *optional*): What is not; what guidance leads away from.
            audio_length_in_s (`float`, *optional*):
                Length in seconds; by default that of `audio`, or what the network was trained on. A network makes
                longer sounds in overlapping windows of the length that it knows. With a shorter `audio`, what lies
                beyond its end is new.
            num_inference_steps (`int`, *optional*, defaults to 50): Steps from noise to sound.
            guidance_scale (`float`, *optional*):
                1 follows the prompt as it was learnt, more exaggerates it, 0 forgets it. 3 by default.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                How far (0 to 1) to bring the standard deviation, which guidance raises, back to what it was.
            num_waveforms_per_prompt (`int`, *optional*, defaults to 1):
                Sounds for each prompt, which follow one another in what is returned.
            audio (`torch.Tensor` or `np.ndarray`, *optional*):
                Sound to start from, of shape `(samples,)` or `(batch_size, samples)`; or mels as the model sees them,
                `(batch_size, 1, n_mels, frames)`. It may be longer than what the network was trained on.
            strength (`float`, *optional*):
                How far a variation may go from `audio`: 0 returns it (as the autoencoder renders it), 1 does not heed
                it. In between, all windows of a long sound get the same noise, so that one style comes over them.
            mask (`list[tuple[float, float]]`, `torch.Tensor`, `np.ndarray` or `list[bool]`, *optional*):
                Where new sound is wanted in `audio`: spans of seconds, or a boolean for each frame, of shape
                `(frames,)` or `(batch_size, frames)`. All other samples come back as they were, but for a cross-fade
                of half a window (`n_fft / 2`) beside what is new.
            loop (`bool`, *optional*, defaults to `False`):
                Time becomes a ring: the sound can be repeated without a click. Its length is rounded to a multiple of
                the hop that the networks can halve as often as they do.
            continuous (`bool`, *optional*, defaults to `False`):
                Make a long sound window by window, each continuing half a window of what is there, instead of all
                windows together. It then needs no more memory than the network for one window.
            eta (`float`, *optional*, defaults to 0.0): Noise in each step of a [`DDIMScheduler`], 0 to 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all randomness. With a list of one per sound, none depends on the batch it is in.
            latents (`torch.Tensor`, *optional*):
                The noise to start from, at unit scale, as [`~LatentAudioDiffusionPipeline.invert`] returns it. The
                scheduler's `init_noise_sigma` is applied to it here, as diffusers' pipelines do.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask:
                What [`~LatentAudioDiffusionPipeline.encode_prompt`] returns, in the place of the prompts.
            output_type (`str`, *optional*, defaults to `"np"`):
                `"np"` or `"pt"`: sounds and mels; `"mel"`: mels; `"pil"`: pictures of mels; `"latent"`: latents.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`LatentAudioDiffusionPipelineOutput`].
            window_batch_size (`int`, *optional*, defaults to 16): Windows of long sounds that are computed together.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"latents": latents})` after each step. The latents in the
                dictionary that it returns take the place of the old ones.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What the callback is shown.

        Examples:

        Returns:
            [`LatentAudioDiffusionPipelineOutput`], or a `tuple` of what in it is not `None`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if guidance_scale is None:
            null = self.text_encoder is not None or negative_prompt_embeds is not None
            guidance_scale = 3.0 if null and (prompt is not None or prompt_embeds is not None) else 1.0
        self._guidance_scale = guidance_scale
        check_vocoder(self.mel, self.vocoder)  # which may have been set since
        self.check_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, audio_length_in_s, num_inference_steps,
            guidance_rescale, num_waveforms_per_prompt, audio, strength, mask, loop, continuous, eta, latents,
            output_type, window_batch_size, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        device, rows = self._execution_device, window_batch_size

        # What is given, a row for each prompt
        audio = None if audio is None else self._audio_tensor(audio)
        clip = self._measure(audio, latents, audio_length_in_s, loop)
        source = new_frames = new_samples = known = new = None
        if audio is not None:
            kept = self.mel.samples_for(audio.shape[-1]) if audio.ndim == 4 else audio.shape[-1]
            if strength is None and mask is None and kept >= clip.samples:
                raise ValueError("audio is as long as audio_length_in_s: make that longer, or add strength or mask.")
            source = self._read_audio(audio, clip, loop)
            new_frames, new_samples = self._read_mask(mask, kept, clip, loop)
        if continuous and new_frames is not None and len(new_frames) > 1:
            raise ValueError(f"mask has {len(new_frames)} rows, but continuous goes one way for all: give one mask.")
        branches = self._read_text(
            prompt, negative_prompt,
            (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask),
        )  # fmt: skip
        num_prompts = self._count(branches, audio, new_frames, latents, generator, num_waveforms_per_prompt)
        batch_size = num_prompts * num_waveforms_per_prompt
        text, dtype = join_text(branches, num_prompts, num_waveforms_per_prompt), self.unet.dtype

        def for_each(rows: torch.Tensor | None) -> torch.Tensor | None:
            if rows is None:
                return None
            rows = rows.to(device)
            return rows.expand(num_prompts, *rows.shape[1:]).repeat_interleave(num_waveforms_per_prompt, 0)

        if source is not None:
            known = for_each(self._encode(source.mel, loop, rows))
            source = Source(for_each(source.mel), for_each(source.waveform), for_each(source.reference))
        if new_frames is not None:
            new = new_frames.unflatten(1, (-1, self.vae_scale_factor)).any(-1)
            # A frame of latents has seen its neighbours.
            new = for_each(beside(new, loop) if self.vae is not None else new)
            new_frames, new_samples = for_each(new_frames), for_each(new_samples)

        # How the noise becomes sound: in all windows together, or in one after the other
        walked = num_inference_steps
        if strength is not None:
            walked = max(1, round(strength * num_inference_steps)) if strength > 0 else 0
        one_style = walked < num_inference_steps
        width, size = clip.computed // self.vae_scale_factor, self._window
        starts = None
        if continuous and width > size:
            todo = torch.ones(1, width, dtype=torch.bool, device=device) if new is None else new[:1]
            starts = continuations(todo, size)
        if latents is not None:
            expected = self._noise_shape(batch_size, width)
            if latents.shape[1:] != expected[1:]:
                raise ValueError(f"latents have shape {tuple(latents.shape)}: they must be {expected}.")
            noise = latents.to(device, torch.float32).expand(expected)
        elif starts is None:
            noise = self.prepare_noise(batch_size, min(width, size) if one_style else width, generator)
            noise = noise[..., torch.arange(width, device=device) % noise.shape[-1]]
        parameters = inspect.signature(self.scheduler.step).parameters
        step_arguments = {k: v for k, v in (("generator", generator), ("eta", eta)) if k in parameters}
        self._num_timesteps = len(self._timesteps(num_inference_steps, walked)) * len(starts or [0])
        step = 0

        def denoise(noise: torch.Tensor, known: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor:
            nonlocal step
            new = None if new is None else new[:, None, None]
            timesteps = self._timesteps(num_inference_steps, walked)
            if walked == 0:
                return known
            if walked == num_inference_steps:
                latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
            else:
                latents = self._add_noise(known, noise, timesteps[0])
            for t in timesteps:
                if new is not None:  # what is kept lies on its own path from the noise to the source
                    latents = torch.where(new, latents, self._add_noise(known, noise, t))
                output = self._predict(self.scheduler, latents, t, text, dtype, loop, rows, guidance_rescale)
                latents = self.scheduler.step(output, t, latents, return_dict=False, **step_arguments)[0]
                if callback_on_step_end is not None:
                    shown = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)  # there are no others
                    latents = callback_on_step_end(self, step, t, shown).pop("latents", latents)
                step += 1
                bar.update()
            return latents if new is None else torch.where(new, latents, known)

        with self._ring(self.unet, loop, clip.computed), self.progress_bar(total=self._num_timesteps) as bar:
            if starts is None:
                made = denoise(noise, known, new)
            else:
                made = torch.zeros(self._noise_shape(batch_size, width), device=device) if known is None else known
                for start in starts:
                    here = slice(start, start + size)
                    if not one_style or start == starts[0]:
                        noise = self.prepare_noise(batch_size, size, generator)
                    part = denoise(noise, made[..., here], todo[:, here])
                    made = torch.cat([made[..., :start], part, made[..., start + size :]], dim=-1)
                    todo = todo & ~(torch.arange(width, device=device) - start < size)

        if output_type == "latent":
            result = LatentAudioDiffusionPipelineOutput(latents=made, sampling_rate=self.mel.config.sample_rate)
        else:
            mels = self._decode(made, loop, rows)
            if walked == 0 and self.vae is None:
                new_frames = torch.zeros(1, clip.computed, dtype=torch.bool, device=device)
                new_samples = torch.zeros(1, clip.samples, dtype=torch.bool, device=device)
            result = self._output(mels, clip, generator, output_type, loop, source, new_frames, new_samples)
        self.maybe_free_model_hooks()
        return result if return_dict else result.to_tuple()

    # ----- the same path upwards

    @torch.no_grad()
    def invert(
        self,
        audio: Sounds,
        prompt: Text = None,
        negative_prompt: Text = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        window_batch_size: int = 16,
    ) -> torch.Tensor:
        r"""
        The noise from which the model makes a sound: DDIM, or the sampling equation of a [`PoissonFlowScheduler`],
        upwards.

        Args:
            audio (`torch.Tensor` or `np.ndarray`): Sounds or mels, as in `__call__`.
            prompt, negative_prompt, guidance_scale, prompt_embeds, prompt_attention_mask, window_batch_size:
                As in `__call__`, and what will be used there.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps of DDIM; the more, the nearer `__call__` comes to the sound again. A [`PoissonFlowScheduler`]
                chooses its steps by their error.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: `latents` for `__call__`.
        """
        self._guidance_scale = guidance_scale
        self._check_text(prompt, negative_prompt, prompt_embeds, None)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be at least 1.")
        config, rows = self.scheduler.config, window_batch_size
        if not hasattr(self.scheduler, "alphas_cumprod") and not hasattr(self.scheduler, "integrate"):
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot run backwards: use a DDIMScheduler or a PoissonFlowScheduler."
            )
        audio = self._audio_tensor(audio)
        clip = self._measure(audio, None, None, False)
        latents = self._encode(self._read_audio(audio, clip, False).mel, False, rows)
        branches = self._read_text(prompt, negative_prompt, (prompt_embeds, prompt_attention_mask, None, None))
        num_prompts = self._count(branches, latents, None, None, None, 1)
        text, dtype = join_text(branches, num_prompts, 1), self.unet.dtype
        latents = latents.expand(num_prompts, -1, -1, -1)
        if hasattr(self.scheduler, "integrate"):
            scheduler = self.scheduler
            with self.progress_bar(total=float("inf")) as bar:

                def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                    output = self._predict(scheduler, x, scheduler.precondition_noise(sigma), text, dtype, False, rows)
                    bar.update()
                    return scheduler.precondition_outputs(x, output, sigma)

                latents = scheduler.integrate(denoise, latents, config.sigma_min, config.sigma_max) / config.sigma_max
        else:
            spacing = config.get("timestep_spacing")
            spacing = spacing if spacing in ("leading", "trailing") else "trailing"
            # Not `from_config`, which does not hand on what is a default value here, and another one there.
            names = inspect.signature(DDIMInverseScheduler.__init__).parameters
            arguments = {name: config[name] for name in names if name in config}
            arguments |= {"clip_sample": False, "timestep_spacing": spacing}
            scheduler = DDIMInverseScheduler(**arguments)
            scheduler.set_timesteps(num_inference_steps)
            with self.progress_bar(total=num_inference_steps) as bar:
                for t in scheduler.timesteps:
                    output = self._predict(scheduler, latents, t, text, dtype, False, rows)
                    latents = scheduler.step(output, t, latents).prev_sample
                    bar.update()
        self.maybe_free_model_hooks()
        return latents

    @staticmethod
    def slerp(a: torch.Tensor, b: torch.Tensor, weights: float | list[float] | torch.Tensor) -> torch.Tensor:
        """
        From `a` (weight 0) to `b` (weight 1), noise of shape (1, channels, height, width): at a constant angle on the
        great circle, while the norm grows at a constant rate. One row for each weight.
        """
        return interpolate_latents(a, b, torch.as_tensor(weights, dtype=torch.float64).reshape(-1))

    def interpolate(
        self,
        a: Sounds,
        b: Sounds,
        n: int,
        prompt: Text = None,
        negative_prompt: Text = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: str = "np",
    ) -> LatentAudioDiffusionPipelineOutput:
        r"""
        `n` sounds from `a` to `b`: the noise of both is found, and noise between them made into sound.

        Args:
            a, b (`torch.Tensor` or `np.ndarray`): One sound each, equally long.
            n (`int`): Number of sounds, both ends included.
            prompt, negative_prompt, num_inference_steps, guidance_scale, generator, output_type: As in `__call__`.

        Returns:
            [`LatentAudioDiffusionPipelineOutput`]
        """
        a, b = self._audio_tensor(a), self._audio_tensor(b)
        if n < 2 or len(a) != 1 or a.shape != b.shape:
            raise ValueError(
                f"n is {n}, and the sounds are of shape {tuple(a.shape)} and {tuple(b.shape)}: use n >= 2, one sound"
                " each, of the same length."
            )
        latents = self.invert(torch.cat([a, b]), prompt, negative_prompt, num_inference_steps, guidance_scale)
        seconds = a.shape[-1] / self.mel.config.sample_rate if a.ndim == 2 else None
        return self(
            prompt, negative_prompt, seconds, num_inference_steps, guidance_scale,
            latents=self.slerp(latents[:1], latents[1:], torch.linspace(0, 1, n, dtype=torch.float64)),
            generator=generator, output_type=output_type,
        )  # fmt: skip
