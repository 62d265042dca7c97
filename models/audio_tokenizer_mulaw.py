"""Sound as codes without any training: the logarithmic quantiser of telephony, sample by sample."""

import hashlib
import json
import math
from numbers import Integral
from typing import ClassVar

import numpy as np
import soxr
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


def mu_law_encode(waveform: torch.Tensor, mu: int) -> torch.Tensor:
    """The nearest of mu + 1 levels that are even in sign(x) ln(1 + mu |x|) / ln(1 + mu) (ITU-T G.711, continuous)."""
    companded = waveform.sign() * torch.log1p(mu * waveform.abs()) / math.log1p(mu)
    return ((companded + 1) * (mu / 2)).round().clamp(0, mu).long()


def mu_law_levels(mu: int) -> torch.Tensor:
    """What the codes 0..mu stand for, in [-1, 1]: the inverse of [`mu_law_encode`], in float64."""
    companded = torch.arange(mu + 1, dtype=torch.float64) * (2 / mu) - 1
    return companded.sign() * torch.expm1(companded.abs() * math.log1p(mu)) / mu


def silence_after(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sounds (batch, samples) without what comes after their lengths."""
    return waveform.masked_fill(torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None], 0)


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


class MuLawTokenizer(ModelMixin, ConfigMixin):
    r"""
    An audio tokenizer that has nothing to learn: each sample becomes the nearest of 256 logarithmic levels.

    The error of a sample x is at most (|x| + 1/mu) ((1 + mu)^(1/mu) - 1), which is 2.2 % of |x| + 0.004 for mu = 255.
    Samples beyond [-1, 1] are clipped. With a hop of H samples a frame is H samples, read as H codebooks in parallel.

    Args:
        sampling_rate (`int`, *optional*, defaults to 8000): Samples per second.
        hop_length (`int`, *optional*, defaults to 1): Samples, hence codebooks, of a frame.
        mu (`int`, *optional*, defaults to 255): One less than the number of levels.
    """

    _keep_in_fp32_modules: ClassVar = ["levels"]

    @register_to_config
    def __init__(self, sampling_rate: int = 8000, hop_length: int = 1, mu: int = 255):
        super().__init__()
        for name, value in dict(sampling_rate=sampling_rate, hop_length=hop_length, mu=mu).items():
            if not value >= 1:
                raise ValueError(f"{name} is at least 1, not {value}.")
        self.register_buffer("levels", mu_law_levels(mu).float())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.levels.dtype != torch.float32:  # moved to half precision with its pipeline: keep the exact levels
            self.levels = mu_law_levels(self.config.mu).to(self.levels.device, torch.float32)
        return self

    @property
    def sampling_rate(self) -> int:
        return self.config.sampling_rate

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def num_codebooks(self) -> int:
        return self.config.hop_length

    @property
    def codebook_size(self) -> int:
        return self.config.mu + 1

    def num_frames(self, samples: int) -> int:
        """The frames of a number of samples at `sampling_rate`: the last one may be incomplete."""
        return -(-samples // self.hop_length)

    def fingerprint(self) -> str:
        """Tells tokenizers apart: equal when the same codes mean the same sound."""
        meaning = ["mulaw", self.sampling_rate, self.hop_length, self.config.mu]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def encode(
        self, waveform: torch.Tensor, sampling_rate: int, lengths: torch.Tensor | list[int] | None = None
    ) -> torch.Tensor:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)` or `(batch, channels, samples)`): Samples in [-1, 1].
            sampling_rate (`int`): Their rate. They are resampled if it is not the tokenizer's.
            lengths (*optional*): The samples of each row; what comes after them is taken for silence.

        Returns:
            `torch.Tensor` of shape `(batch, num_codebooks, num_frames(samples))`, int64. The last one ends in silence.
        """
        waveform, _ = prepare_waveform(waveform, sampling_rate, self.sampling_rate, lengths)
        missing = -waveform.shape[1] % self.hop_length
        frames = torch.nn.functional.pad(waveform, (0, missing)).unflatten(1, (-1, self.hop_length))
        return mu_law_encode(frames.to(self.levels), self.config.mu).transpose(1, 2)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of shape (batch, num_codebooks, frames) to a waveform of shape (batch, frames * hop_length)."""
        check_codes(codes, self.num_codebooks, self.codebook_size)
        return self.levels[codes.to(self.levels.device).transpose(1, 2).flatten(1).long()]
