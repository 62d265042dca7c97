"""Waveforms to mel spectrograms in the range of a model, and back to waveforms."""

import hashlib
import json
import math
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


# Front ends by name. The `bigvgan_*` rows are the mel settings of the published vocoders of the same names, so that a
# vocoder understands what a model trained on such mels generates.
PRESETS = {
    "image-22k": dict(sample_rate=22050, n_fft=2048, hop_length=256, n_mels=256, num_frames=256),
    "sc09-64": dict(sample_rate=16000, n_fft=1024, hop_length=256, n_mels=64, num_frames=64),
    "sc09-128": dict(sample_rate=16000, n_fft=1024, hop_length=128, n_mels=128, num_frames=128),
    "fsdd-64": dict(sample_rate=8000, n_fft=512, hop_length=128, n_mels=64, num_frames=64),
} | {
    name: dict(
        sample_rate=sample_rate,
        n_fft=n_fft,
        hop_length=hop,
        n_mels=bands,
        f_max=f_max,
        num_frames=256,
        method="bigvgan",
    )
    for name, sample_rate, n_fft, hop, bands, f_max in [
        ("bigvgan_v2_44khz_128band_512x", 44100, 2048, 512, 128, None),
        ("bigvgan_v2_44khz_128band_256x", 44100, 1024, 256, 128, None),
        ("bigvgan_v2_24khz_100band_256x", 24000, 1024, 256, 100, None),
        ("bigvgan_v2_22khz_80band_256x", 22050, 1024, 256, 80, None),
        ("bigvgan_v2_22khz_80band_fmax8k_256x", 22050, 1024, 256, 80, 8000),
        ("bigvgan_24khz_100band", 24000, 1024, 256, 100, None),
        ("bigvgan_base_24khz_100band", 24000, 1024, 256, 100, None),
        ("bigvgan_22khz_80band", 22050, 1024, 256, 80, 8000),
        ("bigvgan_base_22khz_80band", 22050, 1024, 256, 80, 8000),
    ]
}

# The quietest and loudest log-magnitude of BigVGAN mels: its own floor, and what material peaking at 1 hardly exceeds.
# More than any front end has, less than what fills a memory: a configuration may come from anywhere.
LIMITS = {"sample_rate": 10**6, "n_fft": 2**16, "n_mels": 1024, "num_frames": 2**22}
LOUDEST = 2.0**32  # of a sample whose power can still be told; full scale is 1
BIGVGAN_VALUE_RANGE = (math.log(1e-5), 2.1)
AT_ONCE = 2**19  # samples, in all windows, that a processor transforms fastest: few enough to stay in its cache


def hz_to_mel(hz: torch.Tensor, scale: str = "slaney") -> torch.Tensor:
    """
    Slaney's mel scale (Auditory Toolbox): 200/3 Hz a mel up to 1 kHz, then 27 mels for each factor of 6.4; or that of
    HTK, 2595 log10(1 + f / 700).
    """
    if scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)
    return torch.where(hz < 1000, 3 * hz / 200, 15 + 27 / math.log(6.4) * torch.log(hz.clamp(min=1000) / 1000))


def mel_to_hz(mel: torch.Tensor, scale: str = "slaney") -> torch.Tensor:
    """The inverse of [`hz_to_mel`]."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return torch.where(mel < 15, 200 * mel / 3, 1000 * torch.exp(math.log(6.4) / 27 * (mel - 15)))


def mel_frequencies(n_mels: int, f_min: float, f_max: float, scale: str = "slaney") -> torch.Tensor:
    """The `n_mels + 2` corners in Hz of `n_mels` triangles: band k rises from corner k, peaks at k+1, ends at k+2."""
    low, high = hz_to_mel(torch.tensor([f_min, f_max], dtype=torch.float64), scale).tolist()
    return mel_to_hz(torch.linspace(low, high, n_mels + 2, dtype=torch.float64), scale)


def mel_filterbank(
    sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float, scale: str = "slaney"
) -> torch.Tensor:
    """Triangles of unit area in Hz (Slaney's normalisation), as a float64 matrix of shape (n_mels, n_fft // 2 + 1)."""
    corners = mel_frequencies(n_mels, f_min, f_max, scale)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return triangles * 2 / (right - left)


def stft(signal: torch.Tensor, window: torch.Tensor, hop: int) -> torch.Tensor:
    """Spectra of the windows that fit into `signal`: (batch, samples) -> complex (batch, frames, bins)."""
    return torch.fft.rfft(signal.unfold(-1, window.numel(), hop) * window)


def power(spectra: torch.Tensor) -> torch.Tensor:
    """|z|^2. All parts are squared in their order in memory: `spectra.real` alone would be every second number."""
    parts = torch.view_as_real(spectra).square()
    return parts[..., 0] + parts[..., 1]


def istft(spectra: torch.Tensor, window: torch.Tensor, hop: int) -> torch.Tensor:
    """The signal whose [`stft`] is nearest to `spectra` in the least-squares sense (Griffin and Lim 1984, eq. 6)."""

    def overlap_add(frames):  # the frames are cut in pieces of one hop: piece j of frame i belongs to hop i + j
        batch, count, size = frames.shape
        pieces = math.ceil(size / hop)
        frames = torch.nn.functional.pad(frames, (0, pieces * hop - size)).view(batch, count, pieces, hop)
        signal = frames.new_zeros(batch, count + pieces - 1, hop)
        for piece in range(pieces):
            signal[:, piece : piece + count] += frames[:, :, piece]
        return signal.flatten(1)[:, : (count - 1) * hop + size]

    signal = overlap_add(torch.fft.irfft(spectra, n=window.numel()) * window)
    envelope = overlap_add(window.square().expand(1, spectra.shape[1], -1))
    return signal / envelope.clamp(min=1e-8)


def near_diagonal(matrix: torch.Tensor, width: int) -> list[tuple[slice, slice]]:
    """For each `width` columns of a matrix, the rows that hold all of their non-zeros: a list of (rows, columns)."""
    blocks = []
    for start in range(0, matrix.shape[1], width):
        columns = slice(start, start + width)
        rows = matrix[:, columns].any(1).nonzero().flatten().tolist() or [0]
        blocks.append((slice(rows[0], rows[-1] + 1), columns))
    return blocks


def multiply(x: torch.Tensor, matrix: torch.Tensor, blocks: list[tuple[slice, slice]]) -> torch.Tensor:
    """`x @ matrix` without most of the zeros: a mel band spans few bins, and a bin lies in at most two bands."""
    return torch.cat([x[..., rows] @ matrix[rows, columns] for rows, columns in blocks], dim=-1)


def invert_filterbank(mel: torch.Tensor, filterbank: torch.Tensor, n_iter: int = 20) -> torch.Tensor:
    """A non-negative spectrum whose mel bands are `mel`: (..., n_mels) -> (..., bins).

    The multiplicative update of Lee and Seung (2001, eq. 5) with the filterbank held fixed. It keeps x >= 0, never
    increases the Kullback-Leibler divergence of `filterbank @ x` from `mel`, and leaves bins that no band covers at 0.
    """
    columns = filterbank.sum(0)
    covered = columns > 0
    weights = torch.where(covered, filterbank / columns.where(covered, torch.ones_like(columns)), 0)
    # The start spreads each band over its bins; it is off by the overlap of the bands, which the updates mend.
    to_bins, to_bands = near_diagonal(weights, 128), near_diagonal(filterbank.T, 32)
    spectrum = multiply(mel / filterbank.sum(1), weights, to_bins)
    tiny = torch.finfo(mel.dtype).tiny
    for _ in range(n_iter):
        bands = multiply(spectrum, filterbank.T, to_bands)
        spectrum *= multiply(mel / bands.clamp_(min=tiny), weights, to_bins)
    return spectrum


def griffin_lim(
    magnitude: torch.Tensor, window: torch.Tensor, hop: int, n_iter: int, phases: torch.Tensor, momentum: float = 0.99
) -> torch.Tensor:
    """A signal with the given STFT magnitudes: the fast Griffin-Lim algorithm (Perraudin et al. 2013, algorithm 2).

    Magnitudes are (batch, frames, bins), `phases` is a complex tensor of the same shape with |phases| = 1, and the
    signal covers every sample that a window touches.
    """
    spectra = magnitude * phases
    previous = torch.zeros_like(spectra)
    for _ in range(n_iter):
        consistent = stft(istft(spectra, window, hop), window, hop)
        accelerated = consistent - momentum / (1 + momentum) * previous
        previous = consistent
        spectra = magnitude * torch.sgn(accelerated)
    return istft(spectra, window, hop)


class MelSpectrogram(ModelMixin, ConfigMixin):
    r"""
    The mel front end: what a model sees of a sound, and how a sound is made of what a model says.

    It holds no trained weights; it is a model so that a pipeline can save it, load it and move it to a device. All of
    its arithmetic is in float32 whatever the precision of the pipeline.

    What happens to unusual input: channels of (batch, channels, samples) are averaged; silence becomes the floor of
    the value range (and the floor comes back as exact silence); a waveform shorter than one window is read as if
    silence followed; samples beyond [-1, 1] are kept and saturate at the ceiling of the value range; NaN and infinity
    are refused.

    Args:
        sample_rate (`int`, *optional*, defaults to 22050): Samples per second.
        n_fft (`int`, *optional*, defaults to 1024): Length of the Hann window and of the Fourier transform.
        hop_length (`int`, *optional*, defaults to 256): Samples from one frame to the next.
        n_mels (`int`, *optional*, defaults to 80): Mel bands, the height of the picture.
        num_frames (`int`, *optional*, defaults to 256): Frames of one slice, the width of the picture.
        method (`"image"` or `"bigvgan"`, *optional*, defaults to `"image"`):
            `"image"`: power in decibels, frames centred on multiples of the hop with zeros around the signal
            (librosa's `melspectrogram` with `pad_mode="constant"`). `"bigvgan"`: natural logarithm of the magnitude,
            the signal reflected at its ends, frames between multiples of the hop (the mel of BigVGAN vocoders).
        top_db (`float`, *optional*, defaults to 80): For `"image"`: how far the floor lies below the reference.
        f_min (`float`, *optional*, defaults to 0), f_max (`float`, *optional*, half the sample rate when `None`):
            Edges of the bands in Hz.
        mel_scale (`"slaney"` or `"htk"`, *optional*, defaults to `"slaney"`): On it the bands are equally wide.
        ref (`"fixed"` or `"slice"`, *optional*, defaults to `"fixed"`):
            For `"image"`, what 0 dB is. `"fixed"`: the loudest band of a full-scale sine, so that levels are kept.
            `"slice"`: the loudest bin of each waveform; `encode(..., return_reference=True)` tells where that lies.
        value_range (`tuple[float, float]`, *optional*):
            The decibels (or log-magnitudes) that become -1 and 1; `(-top_db, 0)` or `(ln 1e-5, 2.1)` by default.
        mean, std (`float`, *optional*, defaults to 0 and 1):
            Standardisation of what the model sees: `encode` subtracts and divides, `decode` undoes it.
        n_iter (`int`, *optional*, defaults to 32):
            Iterations of the Griffin-Lim algorithm in `decode`; more sound cleaner, up to about 100.
    """

    _keep_in_fp32_modules: ClassVar = ["filterbank"]

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 22050,
        n_fft: int = 1024,
        hop_length: int = 256,
        n_mels: int = 80,
        num_frames: int = 256,
        method: str = "image",
        top_db: float = 80.0,
        f_min: float = 0.0,
        f_max: float | None = None,
        mel_scale: str = "slaney",
        ref: str = "fixed",
        value_range: tuple[float, float] | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        n_iter: int = 32,
    ):
        super().__init__()
        if method not in ("image", "bigvgan"):
            raise ValueError(f"method is 'image' or 'bigvgan', not {method!r}.")
        if ref not in ("fixed", "slice") or (ref == "slice" and method != "image"):
            raise ValueError(f"ref is 'fixed', or 'slice' with method='image', not {ref!r} with method={method!r}.")
        if mel_scale not in ("slaney", "htk"):
            raise ValueError(f"mel_scale is 'slaney' or 'htk', not {mel_scale!r}.")
        for name, value in dict(
            sample_rate=sample_rate, n_fft=n_fft, hop_length=hop_length, n_mels=n_mels, num_frames=num_frames,
            top_db=top_db, std=std, n_iter=n_iter,
        ).items():  # fmt: skip
            if not isinstance(value, Real) or not value > 0:
                raise ValueError(f"{name} must be positive, not {value}.")
            if value > LIMITS.get(name, LIMITS["n_fft"]):
                raise ValueError(f"{name} is at most {LIMITS.get(name, LIMITS['n_fft'])}, not {value}.")
        if hop_length > n_fft // 2:
            raise ValueError(f"hop_length {hop_length} must be at most n_fft / 2 = {n_fft // 2}: windows overlap.")
        f_max = sample_rate / 2 if f_max is None else f_max
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(f"0 <= f_min < f_max <= {sample_rate / 2:g} must hold, not f_min={f_min}, f_max={f_max}.")
        low, high = value_range or (BIGVGAN_VALUE_RANGE if method == "bigvgan" else (-top_db, 0.0))
        if not low < high:
            raise ValueError(f"value_range must rise, not go from {low} to {high}.")
        self.value_range = (low, high)

        filterbank = mel_filterbank(sample_rate, n_fft, n_mels, f_min, f_max, mel_scale)
        empty = (filterbank == 0).all(1).nonzero().flatten().tolist()
        if empty:
            enough = n_fft
            while (mel_filterbank(sample_rate, enough, n_mels, f_min, f_max, mel_scale) == 0).all(1).any():
                enough *= 2
                if enough > LIMITS["n_fft"]:
                    break
            more = f"use n_fft={enough}, or fewer bands" if enough <= LIMITS["n_fft"] else "use fewer bands"
            raise ValueError(
                f"{len(empty)} of {n_mels} mel bands lie between two bins of a transform of n_fft={n_fft} at"
                f" {sample_rate} Hz and would always be empty: {more}."
            )
        self.register_buffer("filterbank", filterbank.float())
        self._blocks = near_diagonal(filterbank.T, 16)
        # A full-scale sine on bin b has power (n_fft/4)^2 there and a quarter of it in each neighbour (Hann window).
        leaking = filterbank + (filterbank.roll(1, 1) + filterbank.roll(-1, 1)) / 4
        self.full_scale_power = (n_fft / 4) ** 2 * leaking.max().item()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MelSpectrogram":
        """A front end by name (see `PRESETS`), with any argument changed: `from_preset("fsdd-64", num_frames=128)`."""
        if name not in PRESETS:
            raise ValueError(f"There is no mel preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.filterbank.dtype != torch.float32:  # moved to half precision with its pipeline: keep the exact bands
            c = self.config
            f_max = c.f_max or c.sample_rate / 2
            exact = mel_filterbank(c.sample_rate, c.n_fft, c.n_mels, c.f_min, f_max, c.mel_scale)
            self.filterbank = exact.to(self.filterbank.device, torch.float32)
        return self

    def fingerprint(self) -> str:
        """Tells front ends apart: equal when the same number in a mel means the same sound.

        The number of frames and the standardisation are left out: they may differ between a dataset and a model.
        """
        c = self.config
        meaning = [
            c.sample_rate,
            c.n_fft,
            c.hop_length,
            c.n_mels,
            c.method,
            c.f_min,
            c.f_max or c.sample_rate / 2,
            c.ref,
        ]
        meaning = [float(x) if isinstance(x, int) else x for x in [*meaning, *self.value_range]]
        meaning += [c.mel_scale] * (c.mel_scale != "slaney")
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    # ----- lengths

    @property
    def slice_samples(self) -> int:
        """Samples of one slice: as many as give exactly `num_frames` frames."""
        return self.samples_for(self.config.num_frames)

    def samples_for(self, num_frames: int) -> int:
        """The longest waveform that has this many frames (for `"bigvgan"`: the shortest)."""
        return num_frames * self.config.hop_length - (self.config.method == "image")

    def frames_for(self, seconds: float) -> int:
        """The number of frames that comes nearest to a length in seconds, at least one."""
        return max(1, round(seconds * self.config.sample_rate / self.config.hop_length))

    def slice_starts(self, num_samples: int, pad: str = "pad") -> list[int]:
        """Where the slices of a waveform begin.

        Slices follow one another without a gap. What is left at the end becomes a slice followed by silence (`"pad"`),
        a slice that ends with the waveform and so repeats a part of the one before (`"overlap"`, which pads only what
        is shorter than one slice), or nothing (`"drop"`).
        """
        if pad not in ("pad", "overlap", "drop"):
            raise ValueError(f"pad is 'pad', 'overlap' or 'drop', not {pad!r}.")
        size = self.slice_samples
        starts = list(range(0, num_samples - size + 1, size))
        covered = len(starts) * size
        if covered < num_samples and pad != "drop":
            starts.append(num_samples - size if pad == "overlap" and starts else covered)
        return starts

    def slices(self, waveform: torch.Tensor, pad: str = "pad") -> torch.Tensor:
        """Cuts a waveform (samples,) into slices (count, slice_samples), see [`~MelSpectrogram.slice_starts`]."""
        starts = self.slice_starts(waveform.shape[-1], pad)
        if not starts:
            return waveform.new_zeros(0, self.slice_samples)
        missing = max(0, starts[-1] + self.slice_samples - waveform.shape[-1])
        waveform = torch.nn.functional.pad(waveform, (0, missing))
        return torch.stack([waveform[start : start + self.slice_samples] for start in starts])

    # ----- waveform to mel

    @property
    def _margin(self) -> int:
        """Samples before the first sample of the waveform that the first window sees."""
        c = self.config
        return c.n_fft // 2 if c.method == "image" else (c.n_fft - c.hop_length) // 2

    def _frames(self, waveform: torch.Tensor) -> torch.Tensor:
        """The stretches of a waveform (batch, samples) that the windows see: (batch, frames, n_fft), a view."""
        c = self.config
        if c.method == "image":
            waveform = torch.nn.functional.pad(waveform, (self._margin, c.n_fft // 2))
        else:
            if waveform.shape[-1] < c.n_fft:
                waveform = torch.nn.functional.pad(waveform, (0, c.n_fft - waveform.shape[-1]))
            margins = (self._margin, c.n_fft - c.hop_length - self._margin)
            waveform = torch.nn.functional.pad(waveform[:, None], margins, mode="reflect")[:, 0]
        return waveform.unfold(-1, c.n_fft, c.hop_length)

    def _bands(self, waveform: torch.Tensor) -> torch.Tensor:
        """Mel bands on a linear scale, (batch, frames, bands): power for `"image"`, magnitude for `"bigvgan"`."""
        c = self.config
        window = torch.hann_window(c.n_fft, device=waveform.device)

        def bands(frames: torch.Tensor) -> torch.Tensor:
            spectrum = power(torch.fft.rfft(frames * window))
            spectrum = spectrum if c.method == "image" else (spectrum + 1e-9).sqrt()
            return multiply(spectrum, self.filterbank.T, self._blocks)

        if waveform.device.type != "cpu":
            return bands(self._frames(waveform))
        # In pieces: several rows, or a part of a long one. Temporary results of a large batch at once would leave the
        # cache, and the system would be asked for their memory each time.
        most, parts = AT_ONCE // c.n_fft, []
        for rows in waveform.split(max(1, most // (1 + waveform.shape[-1] // c.hop_length))):
            frames = self._frames(rows)
            pieces = frames.chunk(math.ceil(frames.shape[0] * frames.shape[1] / most), dim=1)
            parts.append(torch.cat([bands(piece) for piece in pieces], dim=1))
        return torch.cat(parts)

    def encode(self, waveform: torch.Tensor, return_reference: bool = False) -> Any:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)` or `(batch, channels, samples)`): Samples in [-1, 1].
            return_reference (`bool`, *optional*, defaults to `False`):
                Whether to return also what 0 dB stands for in each waveform, in dB of full scale: `decode` takes it.

        Returns:
            `torch.Tensor` of shape `(batch, 1, n_mels, frames)`, float32, in [-1, 1] before standardisation. There are
            `1 + samples // hop_length` frames with `"image"`, `samples // hop_length` with `"bigvgan"`.
        """
        if waveform.ndim == 3:
            waveform = waveform.mean(1)
        if waveform.ndim != 2 or waveform.shape[-1] == 0:
            raise ValueError(f"A waveform has shape (batch, samples), not {tuple(waveform.shape)}.")
        waveform = waveform.to(self.filterbank)
        lowest, highest = waveform.aminmax()
        if not torch.maximum(-lowest, highest) <= LOUDEST:  # of what is no number neither
            row, sample = (~(waveform.abs() <= LOUDEST)).nonzero()[0].tolist()
            value = waveform[row, sample].item()
            what = f"{value:.3g}, where full scale is 1" if math.isfinite(value) else "not a finite number"
            raise ValueError(f"Sample {sample} of waveform {row} is {what}.")
        mel = self._bands(waveform)
        low, high = self.value_range
        reference = torch.zeros(len(mel), device=mel.device)
        if self.config.method == "bigvgan":
            mel, unit = mel.clamp(min=math.exp(low)).log(), 1.0
        else:
            mel, unit = mel.clamp(min=1e-10).log10(), 10.0
            full_scale = math.log10(self.full_scale_power)
            if self.config.ref == "slice":
                loudest = mel.amax((1, 2), keepdim=True)
                mel, reference = mel - loudest, 10 * (loudest[:, 0, 0] - full_scale)
            else:
                low, high = low + 10 * full_scale, high + 10 * full_scale
        # From [low, high] to [-1, 1], with as few passes over the memory as can be.
        scale = 2 / (high - low)
        mel = (mel * (unit * scale) - (low * scale + 1)).clamp(-1, 1)
        mel = self.standardize(mel).transpose(1, 2)[:, None]
        return (mel, reference) if return_reference else mel

    def standardize(self, mel: torch.Tensor) -> torch.Tensor:
        """From [-1, 1], as datasets store mels, to what the model sees."""
        mean, std = self.config.mean, self.config.std
        return mel if (mean, std) == (0, 1) else (mel - mean) / std

    def unstandardize(self, mel: torch.Tensor) -> torch.Tensor:
        """From what the model sees to [-1, 1]."""
        return mel * self.config.std + self.config.mean

    # ----- mel to waveform

    @torch.no_grad()
    def decode(
        self,
        mel: torch.Tensor,
        n_iter: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Finds a sound that has the given mel: the bands are spread over the bins of the transform, then Griffin-Lim
        looks for phases. Levels are kept, so nothing is normalised afterwards, with one exception: with `ref="slice"`
        and no `reference` the level is unknown, and each waveform is scaled to a peak of 0.95. (A band of magnitudes
        does not tell a tone from noise: through `"bigvgan"` mels a lone sine comes back up to 5 dB too quiet.)

        Args:
            mel (`torch.Tensor` of shape `(batch, 1, n_mels, frames)`): What `encode` returns, or a model generates.
            n_iter (`int`, *optional*): Griffin-Lim iterations, in the place of the configuration's.
            generator (`torch.Generator` or a list with one for each mel, *optional*): Draws the initial phases.
            reference (`torch.Tensor` of shape `(batch,)`, *optional*): What `encode` returned beside the mel.

        Returns:
            `torch.Tensor` of shape `(batch, samples)`: `frames * hop_length` samples, one less for `"image"`.
        """
        c = self.config
        if mel.ndim != 4 or mel.shape[1:3] != (1, c.n_mels):
            raise ValueError(f"A mel has shape (batch, 1, {c.n_mels}, frames), not {tuple(mel.shape)}.")
        low, high = self.value_range
        values = self.unstandardize(mel.to(self.filterbank)[:, 0].transpose(1, 2)).clamp(-1, 1)
        silent = values <= -1
        values = (values + 1) * ((high - low) / 2) + low
        if c.method == "image":
            offset = 0 if reference is None else reference.to(values)[:, None, None]
            bands = self.full_scale_power * 10 ** ((values + offset) / 10)
        else:
            bands = values.exp()
        bands = bands.masked_fill(silent, 0)

        magnitude = invert_filterbank(bands, self.filterbank)
        magnitude = magnitude.sqrt() if c.method == "image" else magnitude
        phases = torch.view_as_complex(randn_tensor((*magnitude.shape, 2), generator, magnitude.device, torch.float32))
        window = torch.hann_window(c.n_fft, device=magnitude.device)
        waveform = griffin_lim(
            magnitude, window, c.hop_length, c.n_iter if n_iter is None else n_iter, torch.sgn(phases)
        )
        length = self.samples_for(mel.shape[-1])
        waveform = waveform[:, self._margin : self._margin + length]
        waveform = torch.nn.functional.pad(waveform, (0, length - waveform.shape[-1]))
        if c.ref == "slice" and reference is None:
            return waveform * (0.95 / waveform.abs().amax(1, keepdim=True).clamp(min=1e-8))
        # Griffin-Lim loses energy where its spectra contradict one another; give it back.
        tiny = torch.finfo(waveform.dtype).tiny
        energy = power(torch.fft.rfft(self._frames(waveform) * window)).sum((1, 2)).clamp(min=tiny)
        return waveform * (magnitude.square().sum((1, 2)) / energy).sqrt()[:, None]

    # ----- mel to picture: 8 bits, for looking at and for exchange with pipelines that train on pictures

    def to_image(self, mel: torch.Tensor) -> list[Image.Image]:
        """Grey pictures of mels (batch, 1, n_mels, frames): black is the floor, white the ceiling, row 0 the bass."""
        grey = (self.unstandardize(mel.float()).clamp(-1, 1) + 1) * 127.5
        return [Image.fromarray(picture) for picture in (grey[:, 0] + 0.5).floor().byte().cpu().numpy()]

    def from_image(self, images: Image.Image | list[Image.Image]) -> torch.Tensor:
        """The mels of pictures made by [`~MelSpectrogram.to_image`], to within half a grey level (top_db / 510 dB)."""
        images = images if isinstance(images, list) else [images]
        grey = torch.from_numpy(np.stack([np.array(image.convert("L"), dtype=np.float32) for image in images]))
        if grey.shape[1] != self.config.n_mels:
            raise ValueError(f"A picture of {grey.shape[1]} rows is not a mel of {self.config.n_mels} bands.")
        return self.standardize(grey[:, None].to(self.filterbank) / 127.5 - 1)
