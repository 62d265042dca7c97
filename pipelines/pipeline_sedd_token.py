# diffusers' `progress_bar` and optional components are typed as something else than they are:
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportReturnType=false
# pyright: reportAssignmentType=false
"""Sound from score-entropy discrete diffusion on the tokens of an audio codec."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .tonefield_calls import CallMixin
from .tonefield_classes import Labels, order_names, read_labels
from .tonefield_mel_editing import Mask, around_ring, decode_ring, is_spans, paste, read_frames, samples_of_spans
from .tonefield_repository import SelfContainedPipelineMixin


logger = logging.get_logger(__name__)

Generators = torch.Generator | list[torch.Generator] | None
Sounds = torch.Tensor | np.ndarray
Prompts = str | list[str] | None

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import soundfile
        >>> import tonefield
        >>> import torch

        >>> pipe = tonefield.load("someone/piano-tokens").to("cuda")
        >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        >>> piano = pipe(batch_size=4, generator=seeds)
        >>> soundfile.write("piano.wav", piano.audios[0], piano.sampling_rate)

        >>> # The second after the first anew, the rest as it was
        >>> other = pipe(audio=piano.audios[0], mask=[(1.0, 2.0)])

        >>> # How it might go on, for half a minute, in windows that overlap by two seconds
        >>> longer = pipe(audio=piano.audios[0], audio_length_in_s=30.0, overlap_in_s=2.0)

        >>> # Without a click when played over and over
        >>> loop = pipe(loop=True).audios[0]
        ```
"""


@dataclass
class SEDDTokenPipelineOutput(BaseOutput):
    """
    Output of [`SEDDTokenPipeline`].

    Args:
        audios (`np.ndarray` or `torch.Tensor` of shape `(batch_size, samples)`, *optional*):
            Sounds in [-1, 1]; `None` for the output type `"tokens"`, and without an audio tokenizer.
        tokens (`np.ndarray` or `torch.Tensor` of shape `(batch_size, num_codebooks, frames)`):
            The codes of the audio tokenizer.
        sampling_rate (`int`): Samples per second of `audios`.
    """

    audios: np.ndarray | torch.Tensor | None = None
    tokens: np.ndarray | torch.Tensor | None = None
    sampling_rate: int | None = None


@dataclass
class _Canvas:
    """What is to be filled in: known codes and where new ones are wanted, with the sound that they come from."""

    codes: torch.Tensor  # (rows, codebooks, frames)
    new_frames: torch.Tensor  # (rows, frames), on the CPU
    num_samples: int
    waveform: torch.Tensor | None = None  # (rows, num_samples)
    new_samples: torch.Tensor | None = None


@dataclass
class _NoCodec:
    """Stands for the audio tokenizer where there is none: a frame is a sample, and a second long."""

    num_codebooks: int
    codebook_size: int
    sampling_rate: int = 1
    hop_length: int = 1

    def num_frames(self, samples: int) -> int:
        return samples


def window_starts(frames: int, window: int, overlap: int) -> list[int]:
    """Where windows begin that cover all frames; each shares at least `overlap` of them with the one before."""
    starts = [0]
    while starts[-1] + window < frames:
        starts.append(min(starts[-1] + window - overlap, frames - window))
    return starts


def generators_of_runs(generator: Generators, count: int) -> list[Generators]:
    """
    For `count` runs one after the other. How much a run draws may depend on the batch, so that a sample's own
    generator can serve one run only: of several, each gets one that is seeded by it.
    """
    if count == 1 or not isinstance(generator, list):
        return [generator] * count
    seeds = [torch.randint(2**62, (count,), generator=source, device=source.device).tolist() for source in generator]
    return [
        [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(generator, row, strict=True)]
        for row in zip(*seeds, strict=True)
    ]


class SEDDTokenPipeline(SelfContainedPipelineMixin, CallMixin, DiffusionPipeline):
    r"""
    Generates sound as the tokens of an audio codec, all of them masks (or noise) in the beginning.

    Known tokens condition a model of the absorbing graph exactly. So there is one mechanism for inpainting,
    continuation, loops and sounds that are longer than what the model was trained on: some tokens are known.

    The null condition, which guidance starts from, is the class `num_classes` of the transformer (one more than there
    are labels) and a text without words. Sampling without labels or prompts uses it.

    Args:
        transformer ([`SEDDTransformer1DModel`]): Says what each token is likely to be, given the others.
        scheduler ([`ScoreEntropyScheduler`]): Noise law, predictor, temperature.
        audio_tokenizer ([`FSQCodec`], [`TransformersCodec`], [`MuLawTokenizer`], ..., *optional*):
            The codec that the training data was encoded with. Without it the pipeline makes tokens alone, of anything:
            what is counted in seconds is counted in tokens then, and `.tokens` of the output is for you to decode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Splits prompts.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Encodes prompts, such as a `T5EncoderModel`.
        card (`dict`, *optional*):
            What the model card of a saved pipeline tells of the training, see [`SelfContainedPipelineMixin`].
        label2id (`dict[str, int]`, *optional*):
            The names of the classes and their labels, so that sounds can be asked for by name.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload = ["audio_tokenizer"]  # noqa: RUF012
    _optional_components = ["audio_tokenizer", "tokenizer", "text_encoder"]  # noqa: RUF012
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        audio_tokenizer: ModelMixin | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        card: dict | None = None,
        label2id: dict[str, int] | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            audio_tokenizer=audio_tokenizer,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
        )
        label2id = order_names(label2id, self.num_classes)
        self.register_to_config(card=card, label2id=label2id)
        self._check_components()

    def _check_components(self) -> None:
        network, law, codec = self.transformer.config, self.scheduler.config, self._codec
        books, size = network.num_codebooks, network.vocab_size
        if self.in_sequence:
            size //= books
        if (books, size) != (codec.num_codebooks, codec.codebook_size):
            raise ValueError(
                f"The audio tokenizer has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, but the"
                f" transformer was made for {books} of {size}: use the codec that its data was encoded with."
            )
        if (law.vocab_size, law.graph_type) != (network.vocab_size, network.graph_type):
            raise ValueError(
                f"The scheduler has the graph {law.graph_type!r} on {law.vocab_size} symbols, but the transformer was"
                f" made for {network.graph_type!r} on {network.vocab_size}: they must agree."
            )
        if (self.tokenizer is None) != (self.text_encoder is None):
            raise ValueError("A tokenizer and a text_encoder need one another: pass both, or none.")
        if self.text_encoder is not None and self.text_encoder.config.hidden_size != network.text_dim:
            raise ValueError(
                f"The text encoder's states are {self.text_encoder.config.hidden_size} wide, but the transformer was"
                f" made for {network.text_dim} (text_dim)."
            )

    @property
    def _codec(self):
        """The audio tokenizer, or what is known without one."""
        c = self.transformer.config
        size = c.vocab_size // c.num_codebooks if self.in_sequence else c.vocab_size
        return self.audio_tokenizer or _NoCodec(c.num_codebooks, size)

    @property
    def num_classes(self) -> int:
        """The number of labels, without the null class."""
        return self.transformer.config.num_classes or 0

    @property
    def in_sequence(self) -> bool:
        """Whether the transformer reads several codebooks one after the other rather than side by side."""
        c = self.transformer.config
        return c.num_codebooks > 1 and c.layout != "parallel"

    @property
    def card_example(self) -> str:
        label = "".join(f"class_labels={name!r}" for name in list(self.config.label2id or {})[:1])
        call = 'pipe(prompt="a piano")' if self.text_encoder is not None else f"pipe({label})"
        if self.audio_tokenizer is None:
            return f"import {{library}}\n\n\npipe = {{load}}\ntokens = {call}.tokens"
        return (
            f"import {{library}}\nimport soundfile\n\n\npipe = {{load}}\nsound = {call}\n"
            'soundfile.write("sound.wav", sound.audios[0], sound.sampling_rate)'
        )

    # ----- what comes in

    def _read_length(
        self, audio_length_in_s: float | None, num_frames: int | None, source_samples: int | None, loop: bool
    ) -> tuple[int, int]:
        """Samples and frames of what is to be made."""
        codec, longest = self._codec, self.transformer.config.max_length
        hop, rate = codec.hop_length, codec.sampling_rate
        if audio_length_in_s is not None and num_frames is not None:
            raise ValueError(f"audio_length_in_s is {audio_length_in_s} and num_frames {num_frames}: give only one.")
        if audio_length_in_s is not None:
            samples = round(audio_length_in_s * rate)
        elif num_frames is not None:
            samples = num_frames * hop
        elif source_samples is not None:
            samples = source_samples
        elif longest is not None:
            samples = longest * hop
        else:
            raise ValueError("The transformer does not say how long its sounds are: give audio_length_in_s.")
        if samples < 1:
            raise ValueError(f"The sound would have {samples} samples: audio_length_in_s and num_frames are positive.")
        if source_samples is not None and source_samples > samples:
            raise ValueError(
                f"What is given has {source_samples} samples ({source_samples / rate:g} s), but the sound shall have"
                f" {samples} ({samples / rate:g} s): cut it, or leave the length out."
            )
        frames = codec.num_frames(samples)
        return (frames * hop if loop else samples), frames

    def _read_windows(self, frames: int, overlap_in_s: float | None) -> tuple[int, int]:
        """Frames of a window and what two of them share."""
        codec, longest = self._codec, self.transformer.config.max_length
        seconds = codec.hop_length / codec.sampling_rate
        overlap = None if overlap_in_s is None else round(overlap_in_s / seconds)
        if overlap is not None and longest is not None and not 0 < overlap < longest:
            raise ValueError(
                f"overlap_in_s is {overlap_in_s:g}, but windows have {longest * seconds:g} s: use something between."
            )
        if longest is None or frames <= longest:
            return frames, 0
        if overlap is None:
            raise ValueError(
                f"The sound has {frames} frames ({frames * seconds:g} s), but the transformer has seen at most"
                f" {longest} ({longest * seconds:g} s): make it shorter, or give overlap_in_s, the seconds that"
                " windows of that length shall share."
            )
        return longest, overlap

    def _read_codes(self, tokens: Sounds) -> torch.Tensor:
        """Codes of the audio tokenizer, (rows, codebooks, frames)."""
        codec = self._codec
        codes = torch.as_tensor(tokens).to(self._execution_device)
        if codes.is_floating_point() or codes.ndim != 3 or codes.shape[1] != codec.num_codebooks:
            raise ValueError(
                f"tokens are {codes.dtype} of shape {tuple(codes.shape)}: they must be integers of shape (batch_size,"
                f" {codec.num_codebooks}, frames)."
            )
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= codec.codebook_size:
            wrong = low if low < 0 else high
            mask = (
                " (the mask id)"
                if wrong == codec.codebook_size and self.scheduler.config.graph_type == "absorb"
                else ""
            )
            raise ValueError(f"tokens hold {wrong}{mask}: codes lie in 0..{codec.codebook_size - 1}.")
        return codes.long()

    def _read_audio(self, audio: Sounds, sampling_rate: int | None) -> torch.Tensor:
        audio = torch.as_tensor(audio).to(self._execution_device, torch.float32)
        if audio.ndim not in (1, 2) or audio.numel() == 0:
            raise ValueError(f"audio has shape {tuple(audio.shape)}: it must be (samples,) or (batch_size, samples).")
        rate = self.audio_tokenizer.sampling_rate
        if sampling_rate not in (None, rate):
            raise ValueError(
                f"audio has {sampling_rate} samples per second, but the audio tokenizer works at {rate}: resample it."
            )
        return audio.reshape(-1, audio.shape[-1])

    def _encode_ring(self, waveform: torch.Tensor) -> torch.Tensor:
        """Codes of a loop, each with what is around it on the ring."""
        codec, margin = self.audio_tokenizer, self._ring_margin
        around = around_ring(waveform.shape[1], margin * codec.hop_length).to(waveform.device)
        codes = codec.encode(waveform[:, around], codec.sampling_rate)
        return codes[..., margin : margin + waveform.shape[1] // codec.hop_length]

    @property
    def _ring_margin(self) -> int:
        """Frames of context around a loop: half a second."""
        return -(-self.audio_tokenizer.sampling_rate // (2 * self.audio_tokenizer.hop_length))

    def _read_canvas(
        self,
        audio: torch.Tensor | None,
        codes: torch.Tensor | None,
        mask: Mask | None,
        num_samples: int,
        frames: int,
        loop: bool,
    ) -> _Canvas:
        """Given sound and the mask on as many frames as are wanted; what lies beyond the sound is new."""
        codec, device = self._codec, self._execution_device
        hop = codec.hop_length
        if audio is None and codes is None:
            codes = torch.zeros(1, codec.num_codebooks, frames, dtype=torch.long, device=device)
            return _Canvas(codes, torch.ones(1, frames, dtype=torch.bool), num_samples)
        known = audio.shape[1] if audio is not None else codes.shape[2] * hop
        if mask is None:
            new_samples = torch.zeros(1, num_samples, dtype=torch.bool)
        elif is_spans(mask):
            new_samples = samples_of_spans(mask, codec.sampling_rate, num_samples)
        else:
            new_samples = read_frames(mask, frames).cpu().repeat_interleave(hop, dim=1)[:, :num_samples].clone()
        if known < num_samples:
            new_samples[:, known:] = True
        # A frame of which any sample is to be new is new.
        spread = torch.nn.functional.pad(new_samples, (0, frames * hop - num_samples))
        new_frames = spread.unflatten(1, (frames, hop)).any(dim=2)
        if audio is None:
            missing = frames - codes.shape[2]
            return _Canvas(torch.nn.functional.pad(codes, (0, missing)), new_frames, num_samples)
        ring = loop and known == num_samples
        codes = self._encode_ring(audio) if ring else codec.encode(audio, codec.sampling_rate)
        codes = torch.nn.functional.pad(codes.to(device), (0, frames - codes.shape[2]))
        waveform = torch.nn.functional.pad(audio, (0, num_samples - known))
        return _Canvas(codes, new_frames, num_samples, waveform, new_samples)

    def encode_prompt(self, prompt: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of texts, `(texts, words, text_dim)`, and where there are words, `(texts, words)`."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        for text, whole, kept in zip(texts, self.tokenizer(texts).input_ids, inputs.attention_mask, strict=True):
            if len(whole) > kept.sum():
                logger.warning(f"The text encoder reads the first {int(kept.sum())} tokens of {text!r}, and no more.")
        inputs = inputs.to(self._execution_device)
        states = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return states.to(self.transformer.dtype), inputs.attention_mask.bool()

    def check_inputs(
        self,
        batch_size: int,
        prompt: Prompts,
        negative_prompt: Prompts,
        class_labels: Labels,
        guidance_scale: float,
        num_inference_steps: int,
        audio: Sounds | None,
        tokens: Sounds | None,
        mask: Mask | None,
        audio_length_in_s: float | None,
        num_frames: int | None,
        overlap_in_s: float | None,
        loop: bool,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        self._check_counts(batch_size=batch_size, num_inference_steps=num_inference_steps)
        if (prompt is not None or negative_prompt is not None) and self.text_encoder is None:
            raise ValueError(f"prompt is {prompt or negative_prompt!r}, but the pipeline reads no text: leave it out.")
        if guidance_scale != 1 and class_labels is None and prompt is None:
            raise ValueError(f"guidance_scale is {guidance_scale}, but there is no class and no prompt to go towards.")
        if negative_prompt is not None and guidance_scale == 1:
            raise ValueError("negative_prompt is where guidance starts from: give a guidance_scale other than 1.")
        if audio is not None and tokens is not None:
            raise ValueError("audio and tokens are both given: they are two ways to say the same, give one.")
        if audio is not None and self.audio_tokenizer is None:
            raise ValueError("audio is given, but the pipeline has no audio_tokenizer to encode it: give tokens.")
        given = "tokens" if audio is None else "audio"
        if audio is None and tokens is None and mask is not None:
            raise ValueError("mask needs the audio (or the tokens) that it speaks of.")
        nothing_new = mask is None and audio_length_in_s is None and num_frames is None
        if (audio is not None or tokens is not None) and nothing_new:
            raise ValueError(f"{given} is given, but not what to do: add mask, or audio_length_in_s to go on.")
        if self.scheduler.config.graph_type == "uniform":
            asked = {given: audio is not None or tokens is not None, "overlap_in_s": overlap_in_s, "loop": loop}
            for name, value in asked.items():
                if value:
                    raise ValueError(
                        f"{name} needs tokens that stay as they are, which the uniform graph does not have: use a"
                        " model of the absorbing graph."
                    )
        self._check_outputs(output_type, ("np", "pt", "tokens"), callback_on_step_end_tensor_inputs)

    # ----- conditions of the network

    def _conditions(
        self, batch_size: int, labels: torch.Tensor | None, prompt: Prompts, negative_prompt: Prompts
    ) -> dict[str, torch.Tensor]:
        """
        What the transformer is called with besides the tokens: one row per sound; with guidance one more for each in
        front, of the null condition or the negative prompt.
        """
        guided, towards = self.do_classifier_free_guidance, self._guidance_scale != 0
        result = {}
        if self.num_classes:
            null = torch.full((1,), self.num_classes, device=self._execution_device)
            wanted = null if labels is None or not towards else labels
            rows = [null, wanted] if guided else [wanted]
            result["class_labels"] = torch.cat([row.expand(batch_size) for row in rows])
        given = [negative_prompt, prompt] if guided else [prompt if towards else negative_prompt]
        if any(texts is not None for texts in given):
            texts = []
            for part in given:
                texts += [part] * batch_size if not isinstance(part, list) else part * (batch_size // len(part))
            different = list(dict.fromkeys(texts))
            states, words = self.encode_prompt([text or "" for text in different])
            words &= torch.tensor([[bool(text)] for text in different], device=words.device)  # "" is no text either
            index = torch.tensor([different.index(text) for text in texts], device=words.device)
            result |= dict(encoder_hidden_states=states[index], encoder_attention_mask=words[index])
        return result

    def _predict(self, tokens: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> torch.Tensor:
        """The network's logits where the scheduler needs them, guided."""
        positions = self.scheduler.positions
        if not self.do_classifier_free_guidance:
            return self.transformer(tokens, timestep, positions=positions, **conditions).sample
        positions = None if positions is None else torch.cat([positions] * 2)
        timestep = torch.cat([timestep] * 2)
        logits = self.transformer(torch.cat([tokens] * 2), timestep, positions=positions, **conditions).sample
        without, towards = logits.chunk(2)
        return self.scheduler.guide(towards, without, self.guidance_scale)

    # ----- tokens

    def _to_tokens(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codebooks, frames) in the layout of the transformer."""
        c = self.transformer.config
        if not self.in_sequence:
            return codes if c.num_codebooks > 1 else codes[:, 0]
        first_symbols = self._codec.codebook_size * torch.arange(c.num_codebooks, device=codes.device)
        codes = codes + first_symbols[:, None]
        return (codes.transpose(1, 2) if c.layout == "flatten" else codes).flatten(1)

    def _to_codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        c = self.transformer.config
        if not self.in_sequence:
            return tokens if c.num_codebooks > 1 else tokens[:, None]
        if c.layout == "flatten":
            tokens = tokens.unflatten(1, (-1, c.num_codebooks)).transpose(1, 2)
        return tokens.reshape(len(tokens), c.num_codebooks, -1) % self._codec.codebook_size

    def _fill(
        self, codes: torch.Tensor, new: torch.Tensor, generator: Generators, conditions: dict, bar, callback, shown
    ) -> torch.Tensor:
        """Draw the frames (batch, frames) that are `new`, given the others, in one run of the scheduler."""
        tokens = self._to_tokens(codes)
        known = {}
        if not new.all():
            sites = (~new)[:, None].expand(-1, codes.shape[1], -1)
            if self.in_sequence and self.transformer.config.layout == "flatten":
                sites = sites.transpose(1, 2)
            known = dict(known_tokens=tokens, known_mask=sites.reshape(tokens.shape).to(tokens.device))
        tokens = self.scheduler.start(tokens.shape, generator, tokens.device, **known)
        bar.total = bar.n + len(self.scheduler.timesteps)
        for t in self.scheduler.timesteps:
            tokens = self.scheduler.step(self._predict(tokens, t, conditions), t, tokens, return_dict=False)[0]
            if callback is not None:
                given = {"tokens": tokens} if "tokens" in shown else {}
                tokens = callback(self, self._num_timesteps, t, given).pop("tokens", tokens)
            self._num_timesteps += 1
            bar.update()
        return self._to_codes(tokens)

    # ----- generation

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        prompt: Prompts = None,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        audio_length_in_s: float | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 128,
        negative_prompt: Prompts = None,
        audio: Sounds | None = None,
        sampling_rate: int | None = None,
        tokens: Sounds | None = None,
        mask: Mask | None = None,
        loop: bool = False,
        overlap_in_s: float | None = None,
        generator: Generators = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["tokens"],  # noqa: B006
    ) -> SEDDTokenPipelineOutput | tuple:
        r"""
        Generate sound.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                How many sounds; as many as there are in `prompt`, `class_labels`, `audio`, `tokens` or `mask` when
                those are several.
            prompt (`str` or `list[str]`, *optional*): One text for all, or one per sound.
            class_labels (`int`, `str` or a list of them, *optional*):
                One label for all, or one per sound: a number, or a name of `pipe.config.label2id`.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                1 follows the condition as it was learnt, more exaggerates it, 0 forgets it.
            audio_length_in_s (`float`, *optional*): Length in seconds.
            num_frames (`int`, *optional*):
                Length in frames of the audio tokenizer, in the place of seconds. Without either, the sound is as long
                as `audio` or `tokens`, or else as the longest that the transformer was trained on.
            num_inference_steps (`int`, *optional*, defaults to 128):
                The most network calls (per window). With the scheduler's predictor `"event"`, as many as there are
                tokens is exact, and more change nothing.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from, instead of no text.
            audio (`torch.Tensor` or `np.ndarray` of shape `(samples,)` or `(batch_size, samples)`, *optional*):
                Sound to keep, but for `mask` and what comes after its end.
            sampling_rate (`int`, *optional*): The rate of `audio`, to be checked against the audio tokenizer's.
            tokens (`torch.Tensor` or `np.ndarray` of shape `(batch_size, num_codebooks, frames)`, *optional*):
                The same as codes, such as another call returned.
            mask (`list[tuple[float, float]]`, `torch.Tensor`, `np.ndarray` or `list[bool]`, *optional*):
                Where new sound is wanted: spans of seconds, or a boolean for each frame of the result, of shape
                `(frames,)` or `(batch_size, frames)`. The rest of `audio` comes back as it was, sample for sample, but
                for a cross-fade of a hundredth of a second, or a frame if that is longer, beside what is new.
            loop (`bool`, *optional*, defaults to `False`):
                The sound, of whole frames, can be repeated without a click: what lies beside the seam is drawn again,
                given what precedes and follows it on the ring.
            overlap_in_s (`float`, *optional*):
                Allows sounds that are longer than what the transformer was trained on: they are made in windows of
                that length, each given so much (or more) of the one before.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all randomness. With a list of one per sound, none depends on the batch it is in.
            output_type (`str`, *optional*, defaults to `"np"`):
                `"np"` or `"pt"`: sounds and tokens; `"tokens"`: tokens alone, as tensors, which are not decoded.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`SEDDTokenPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"tokens": tokens})` after each network call, with the tokens
                of the window as the transformer sees them. Those in the dictionary that it returns take their place.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["tokens"]`):
                What the callback is shown.

        Examples:

        Returns:
            [`SEDDTokenPipelineOutput`], or a `tuple` of what in it is not `None`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            batch_size, prompt, negative_prompt, class_labels, guidance_scale, num_inference_steps, audio, tokens,
            mask, audio_length_in_s, num_frames, overlap_in_s, loop, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._check_components()
        self._guidance_scale, self._num_timesteps = guidance_scale, 0
        codec, device = self._codec, self._execution_device
        labels = read_labels(class_labels, self.num_classes, self.config.label2id, self._execution_device)
        waveform = None if audio is None else self._read_audio(audio, sampling_rate)
        codes = None if tokens is None else self._read_codes(tokens)
        given = None if waveform is None else waveform.shape[1]
        given = given if codes is None else codes.shape[2] * codec.hop_length
        num_samples, frames = self._read_length(audio_length_in_s, num_frames, given, loop)
        window, overlap = self._read_windows(frames, overlap_in_s)
        canvas = self._read_canvas(waveform, codes, mask, num_samples, frames, loop)

        rows = {"tokens" if audio is None else "audio": len(canvas.codes), "mask": len(canvas.new_frames)}
        rows["class_labels"] = 1 if labels is None else len(labels)
        for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            rows[name] = len(texts) if isinstance(texts, list) else 1
        if batch_size == 1:
            batch_size = max(rows.values())
        if isinstance(generator, list):
            rows["generator"] = len(generator)
        for name, count in rows.items():
            if count != batch_size and (count != 1 or name == "generator"):
                raise ValueError(f"{name} has {count} entries for a batch of {batch_size}: give one for each sound.")
        conditions = self._conditions(batch_size, labels, prompt, negative_prompt)

        codes = canvas.codes.expand(batch_size, -1, -1).clone()
        new = canvas.new_frames.expand(batch_size, -1).clone()
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=0) as bar:
            arguments = (conditions, bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            starts = window_starts(frames, window, overlap)
            generators = generators_of_runs(generator, len(starts) + loop)
            for start, source in zip(starts, generators, strict=False):
                here = slice(start, start + window)
                codes[..., here] = self._fill(codes[..., here], new[:, here], source, *arguments)
                new[:, here] = False
            if loop:
                # Turned so that the seam lies within a window, a quarter of which is drawn again
                turned = codes.roll(window // 2, -1)
                new = canvas.new_frames.roll(window // 2, -1)[:, :window].expand(batch_size, -1)
                new = new & ((torch.arange(window) - window // 2 + 0.5).abs() < max(1, window // 8))
                turned[..., :window] = self._fill(turned[..., :window], new, generators[-1], *arguments)
                codes = turned.roll(-(window // 2), -1)

        result = self._output(codes, canvas, output_type, loop)
        self.maybe_free_model_hooks()
        return result if return_dict else result.to_tuple()

    # ----- what goes out

    def _output(self, codes: torch.Tensor, canvas: _Canvas, output_type: str, loop: bool) -> SEDDTokenPipelineOutput:
        codec = self.audio_tokenizer
        if codec is None:
            return SEDDTokenPipelineOutput(tokens=codes.cpu().numpy() if output_type == "np" else codes)
        if output_type == "tokens":
            return SEDDTokenPipelineOutput(tokens=codes, sampling_rate=codec.sampling_rate)
        if loop:
            audios = decode_ring(codec.decode, codes, codec.hop_length, self._ring_margin, same_phases=True)
        else:
            audios = codec.decode(codes)[:, : canvas.num_samples]
        audios = audios.float().clamp(-1, 1)
        if canvas.waveform is not None:
            # Beside what is new, the codec's own sound follows the kept one, phases and all.
            kept = canvas.waveform.to(audios.device).expand_as(audios)
            new = canvas.new_samples.to(audios.device).expand(audios.shape)
            fade = max(codec.hop_length, codec.sampling_rate // 100)
            audios = paste(kept, audios, new, fade, loop, same_phases=True)
        if output_type == "np":
            audios, codes = audios.cpu().numpy(), codes.cpu().numpy()
        return SEDDTokenPipelineOutput(audios=audios, tokens=codes, sampling_rate=codec.sampling_rate)
