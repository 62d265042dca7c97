"""A small trainable audio codec: convolutions at the frame rate between a Fourier transform and its inverse."""

import hashlib
import json
import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import soxr
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


# Codecs by name. Frames overlap fourfold. 1.6 M parameters and 1 kbit/s; 4.4 M and 0.9 kbit/s.
PRESETS = {
    "digits-8k": dict(
        sampling_rate=8000,
        hop_length=80,
        n_fft=320,
        levels=(8, 5, 5, 5),
        width=160,
        encoder_layers=3,
        decoder_layers=6,
    ),
    "music-24k": dict(
        sampling_rate=24000,
        hop_length=320,
        n_fft=1280,
        levels=(8, 8, 8, 8),
        width=256,
        encoder_layers=3,
        decoder_layers=6,
    ),
}


def quantize(latents: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite scalar quantisation (Mentzer et al. 2023, section 3): each latent is rounded to one of L values.

    It is squashed to (-1/2, L - 1/2) and rounded to a digit 0..L-1; gradients pass as if it had not been rounded. The
    squashing is a sigmoid that is close to the normal distribution function, L sigmoid(1.7 z) - 1/2, so that latents
    of unit variance use all digits about equally. Returns the digits centred and scaled to [-1, 1], and the digits.
    """
    squashed = levels * torch.sigmoid(1.7 * latents) - 0.5
    digits = torch.minimum(squashed.detach().round().clamp(min=0), levels - 1)
    return center(squashed + (digits - squashed).detach(), levels), digits.long()


def center(digits: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Digits 0..L-1 to even steps from -1 to 1."""
    return 2 * digits / (levels - 1) - 1


def digits_to_codes(digits: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Digits (..., D) to numbers in the mixed base of the levels, the first digit counting ones."""
    places = torch.cat([levels.new_ones(1), levels[:-1].cumprod(0)]).long()
    return (digits * places).sum(-1)


def codes_to_digits(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The inverse of [`digits_to_codes`]."""
    places = torch.cat([levels.new_ones(1), levels[:-1].cumprod(0)]).long()
    return codes[..., None].div(places, rounding_mode="floor") % levels.long()


def unit_window(size: int, device: torch.device) -> torch.Tensor:
    """A Hann window of unit energy: the spectrum of white noise has the noise's variance."""
    window = torch.hann_window(size, device=device)
    return window / window.square().sum().sqrt()


def stft(signal: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """Spectra of (batch, frames * hop) samples, one for each hop: complex (batch, frames, bins)."""
    margin = (n_fft - hop) // 2
    frames = nn.functional.pad(signal, (margin, margin)).unfold(-1, n_fft, hop)
    return torch.fft.rfft(frames * unit_window(n_fft, signal.device))


def overlap_add(frames: torch.Tensor, hop: int) -> torch.Tensor:
    """The sum of frames (batch, frames, size), each a hop after the other. (`fold` is slower, and wrong compiled.)"""
    # The frames are cut in pieces of one hop: piece j of frame i belongs to hop i + j.
    pieces = nn.functional.pad(frames, (0, -frames.shape[2] % hop)).unflatten(-1, (-1, hop))
    last = pieces.shape[2] - 1
    padded = [nn.functional.pad(pieces[:, :, j], (0, 0, j, last - j)) for j in range(last + 1)]
    return sum(padded).flatten(1)


def istft(spectra: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """The signal (batch, frames * hop) whose [`stft`] is nearest to `spectra` (Griffin and Lim 1984, eq. 6)."""
    window = unit_window(n_fft, spectra.device)
    count, margin = spectra.shape[1], (n_fft - hop) // 2

    inside = slice(margin, margin + count * hop)  # further out the windows sum to nothing
    signal = overlap_add(torch.fft.irfft(spectra, n=n_fft) * window, hop)[:, inside]
    return signal / overlap_add(window.square().expand(1, count, -1), hop)[:, inside]


# Copied from tonefield.models.audio_tokenizer_mulaw.silence_after
def silence_after(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sounds (batch, samples) without what comes after their lengths."""
    return waveform.masked_fill(torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None], 0)


# Copied from tonefield.models.audio_tokenizer_mulaw.prepare_waveform
def prepare_waveform(
    waveform: torch.Tensor, sampling_rate: int, own_rate: int, lengths: torch.Tensor | list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mono float32 sounds (batch, samples) at `own_rate`, silent after their lengths, and the lengths at that rate.

    Channels of (batch, channels, samples) are averaged; other rates are resampled by soxr at high quality.
    """
    if not isinstance(sampling_rate, Integral) or sampling_rate <= 0:
        raise ValueError(f"sampling_rate is a whole number of samples per second, not {sampling_rate!r}.")
    if waveform.ndim == 3:
        waveform = waveform.mean(1)
    if waveform.ndim != 2 or 0 in waveform.shape:
        raise ValueError(f"A waveform has shape (batch, samples), not {tuple(waveform.shape)}.")
    waveform = waveform.float()
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=waveform.device)
        if lengths.shape != waveform.shape[:1] or lengths.min() < 1 or lengths.max() > waveform.shape[1]:
            raise ValueError(
                f"lengths are {waveform.shape[0]} numbers from 1 to {waveform.shape[1]}, not {lengths.tolist()}."
            )
        waveform = silence_after(waveform, lengths)
    if not waveform.sum().isfinite():  # one pass, and anything that is no number spreads to the sum
        row, sample = (~waveform.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"Sample {sample} of waveform {row} is not a finite number.")
    if sampling_rate != own_rate:
        samples = -(-waveform.shape[1] * own_rate // sampling_rate)
        resampled = soxr.resample(waveform.T.cpu().numpy(), sampling_rate, own_rate, quality="HQ")
        resampled = np.pad(resampled, [(0, max(0, samples - len(resampled))), (0, 0)])[:samples]
        waveform = torch.from_numpy(np.ascontiguousarray(resampled.T)).to(waveform.device)
        if lengths is not None:  # what resampling makes of the end of a sound reaches beyond it
            lengths = -(-lengths * own_rate // int(sampling_rate))
            waveform = silence_after(waveform, lengths)
    return waveform, lengths


# Copied from tonefield.models.audio_tokenizer_mulaw.check_codes
def check_codes(codes: torch.Tensor, num_codebooks: int, codebook_size: int) -> None:
    """Refuses what no tokenizer of this shape can have written."""
    if codes.ndim != 3 or codes.shape[1] != num_codebooks or 0 in codes.shape:
        raise ValueError(f"Codes have shape (batch, {num_codebooks}, frames), not {tuple(codes.shape)}.")
    if codes.is_floating_point():
        raise ValueError(f"Codes are integers, not {codes.dtype}.")
    bad = (codes < 0) | (codes >= codebook_size)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(f"Codes lie in 0..{codebook_size - 1}; {codes[tuple(place)]} at {place} does not.")


@dataclass
class FSQCodecOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(batch, samples)`): The sound that the codes stand for.
        codes (`torch.Tensor` of shape `(batch, num_codebooks, frames)`): The codes.
    """

    sample: torch.Tensor
    codes: torch.Tensor


class Block(nn.Module):
    """ConvNeXt's block over time (Liu et al. 2022): each channel along the frames, then all channels of a frame."""

    def __init__(self, width: int, expansion: int, kernel_size: int, scale: float):
        super().__init__()
        # Two dimensions of which one is 1: a transposed sequence has its channels last, which spares copies.
        self.mix = nn.Conv2d(width, width, (1, kernel_size), padding=(0, kernel_size // 2), groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Frames (batch, frames, width); where `mask` (batch, frames, 1) is 0 neighbours see the end of the sound."""
        mixed = self.mix((x if mask is None else x * mask).transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        return x + self.scale * self.narrow(nn.functional.gelu(self.widen(self.norm(mixed))))


class FSQCodec(ModelMixin, ConfigMixin):
    r"""
    An audio codec of a few million parameters: mono sound to one code a frame, and back.

    The spectrum of each frame goes through ConvNeXt blocks at the frame rate; a handful of latents are rounded to
    `levels`, and the digits read as one number are the code. More such blocks predict magnitudes and phases, of which
    an inverse Fourier transform makes sound. Nothing is causal; a code depends on few seconds of sound at most, so any
    length can be coded. `train_codec.py` trains it.

    Args:
        sampling_rate (`int`, *optional*, defaults to 24000): Samples per second.
        hop_length (`int`, *optional*, defaults to 320): Samples of a frame.
        n_fft (`int`, *optional*, defaults to 1280): Length of the windows.
        levels (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 8, 8)`): What each latent is rounded to; the
            codebook size is their product.
        num_codebooks (`int`, *optional*, defaults to 1): Codes of a frame, each of a group of latents of its own.
        width (`int`, *optional*, defaults to 256): Channels.
        encoder_layers, decoder_layers (`int`, *optional*, defaults to 3 and 6): Blocks.
        expansion (`int`, *optional*, defaults to 3): How much wider the blocks are inside.
        kernel_size (`int`, *optional*, defaults to 7): Frames that a block sees.
    """

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 24000,
        hop_length: int = 320,
        n_fft: int = 1280,
        levels: tuple[int, ...] = (8, 8, 8, 8),
        num_codebooks: int = 1,
        width: int = 256,
        encoder_layers: int = 3,
        decoder_layers: int = 6,
        expansion: int = 3,
        kernel_size: int = 7,
    ):
        super().__init__()
        if hop_length < 1 or n_fft < 2 * hop_length or n_fft % 2 or (n_fft - hop_length) % 2:
            raise ValueError(
                f"n_fft must be even and at least two hops long, and differ from the hop by an even number: not"
                f" n_fft={n_fft} with hop_length={hop_length}."
            )
        if not levels or min(levels) < 2:
            raise ValueError(f"levels are numbers from 2 on, not {tuple(levels)}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is odd, not {kernel_size}.")
        bins, latents = n_fft // 2 + 1, num_codebooks * len(levels)
        self.embed = nn.Linear(3 * bins, width)
        self.embed_norm = nn.LayerNorm(width)
        self.encoder = nn.ModuleList(
            Block(width, expansion, kernel_size, 1 / encoder_layers) for _ in range(encoder_layers)
        )
        project, predict = nn.Linear(width, latents), nn.Linear(width, 2 * bins)
        nn.init.normal_(project.weight, std=width**-0.5)  # latents of unit variance, which use all codes
        nn.init.constant_(predict.bias[:bins], -4.0)  # begin quietly
        self.to_latents = nn.Sequential(nn.LayerNorm(width), project)
        self.from_latents = nn.Sequential(nn.Linear(latents, width), nn.LayerNorm(width))
        self.decoder = nn.ModuleList(
            Block(width, expansion, kernel_size, 1 / decoder_layers) for _ in range(decoder_layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), predict)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "FSQCodec":
        """A new codec by name (see `PRESETS`), with any argument changed."""
        if name not in PRESETS:
            raise ValueError(f"There is no codec preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def sampling_rate(self) -> int:
        return self.config.sampling_rate

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        return math.prod(self.config.levels)

    def num_frames(self, samples: int) -> int:
        """The frames of a number of samples at `sampling_rate`: the last one may be incomplete."""
        return -(-samples // self.hop_length)

    def fingerprint(self) -> str:
        """Tells tokenizers apart: equal when the same codes mean the same sound."""
        meaning = {name: value for name, value in sorted(self.config.items()) if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(meaning).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _levels(self) -> torch.Tensor:
        return torch.tensor(self.config.levels, device=self.device, dtype=torch.float32)

    def _latents(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, frames * hop) samples to latents (batch, frames, num_codebooks, digits), float32."""
        spectra = stft(waveform, self.config.n_fft, self.hop_length)
        magnitude = spectra.abs() + 1e-4
        # The logarithm tells levels; real and imaginary parts, with their range compressed, tell phases.
        compressed = torch.view_as_real(spectra * magnitude**-0.7).flatten(-2)
        x = self.embed_norm(self.embed(torch.cat([magnitude.log() / 4, compressed], dim=-1).to(self.dtype)))
        mask = None
        if lengths is not None:
            starts = torch.arange(x.shape[1], device=x.device) * self.hop_length
            mask = (starts < lengths[:, None])[..., None].to(x.dtype)
        for block in self.encoder:
            x = block(x, mask)
        return self.to_latents(x).float().unflatten(-1, (self.num_codebooks, -1))

    def _sound(self, values: torch.Tensor) -> torch.Tensor:
        """Quantised latents (batch, frames, num_codebooks, digits) to samples (batch, frames * hop), float32."""
        x = self.from_latents(values.flatten(2).to(self.dtype))
        for block in self.decoder:
            x = block(x)
        log_magnitude, phase = self.head(x).float().chunk(2, dim=-1)
        spectra = torch.polar(log_magnitude.clamp(max=6).exp(), phase)
        return istft(spectra, self.config.n_fft, self.hop_length)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> FSQCodecOutput | tuple:
        """What encoding and decoding make of a waveform (batch, samples) at `sampling_rate`, with gradients."""
        samples = sample.shape[1]
        missing = self.num_frames(samples) * self.hop_length - samples
        values, digits = quantize(self._latents(nn.functional.pad(sample.float(), (0, missing))), self._levels())
        codes = digits_to_codes(digits, self._levels()).transpose(1, 2)
        sound = self._sound(values)[:, :samples]
        return FSQCodecOutput(sample=sound, codes=codes) if return_dict else (sound, codes)

    @torch.no_grad()
    def encode(
        self, waveform: torch.Tensor, sampling_rate: int, lengths: torch.Tensor | list[int] | None = None
    ) -> torch.Tensor:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)` or `(batch, channels, samples)`): Samples in [-1, 1].
            sampling_rate (`int`): Their rate. They are resampled if it is not the codec's.
            lengths (*optional*): The samples of each row. What comes after them changes no code of the row.

        Returns:
            `torch.Tensor` of shape `(batch, num_codebooks, num_frames(samples))`, int64. The last one ends in silence.
        """
        waveform, lengths = prepare_waveform(waveform, sampling_rate, self.sampling_rate, lengths)
        missing = self.num_frames(waveform.shape[1]) * self.hop_length - waveform.shape[1]
        waveform = nn.functional.pad(waveform, (0, missing)).to(self.device)
        lengths = None if lengths is None else lengths.to(self.device)
        _, digits = quantize(self._latents(waveform, lengths), self._levels())
        return digits_to_codes(digits, self._levels()).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, chunk_frames: int | None = None) -> torch.Tensor:
        """
        Args:
            codes (`torch.Tensor` of shape `(batch, num_codebooks, frames)`): What `encode` returns.
            chunk_frames (`int`, *optional*):
                Decode so many frames at a time, for sounds that do not fit into memory. Each chunk sees all the
                neighbours that it depends on, so the sound is the same.

        Returns:
            `torch.Tensor` of shape `(batch, frames * hop_length)`, float32.
        """
        check_codes(codes, self.num_codebooks, self.codebook_size)
        c, frames = self.config, codes.shape[2]
        values = center(codes_to_digits(codes.to(self.device).transpose(1, 2), self._levels()), self._levels())
        if chunk_frames is None or chunk_frames >= frames:
            return self._sound(values)
        around = c.decoder_layers * (c.kernel_size // 2) + -(-c.n_fft // c.hop_length)
        pieces = []
        for start in range(0, frames, chunk_frames):
            first, end = max(0, start - around), min(frames, start + chunk_frames)
            sound = self._sound(values[:, first : end + around])
            pieces.append(sound[:, (start - first) * c.hop_length : (end - first) * c.hop_length])
        return torch.cat(pieces, dim=1)
