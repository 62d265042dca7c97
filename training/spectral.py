"""How far a sound is from another: what a codec is trained with, and what its quality is told in."""

import math
from collections.abc import Sequence

import torch


POWER_FLOOR = 1e-7  # 70 dB below noise of unit variance: below it nothing counts
SILENCE = 1e-2  # the level, on average over bins, below which errors no longer count relative to the sound's own level


def window_sizes(sampling_rate: int) -> list[int]:
    """Powers of two nearest to 16, 32, 64 and 128 ms: from single strokes of a voice to its pitch."""
    return [2 ** round(math.log2(sampling_rate * milliseconds / 1000)) for milliseconds in (16, 32, 64, 128)]


def magnitudes(sound: torch.Tensor, size: int) -> torch.Tensor:
    """Magnitudes of Hann windows of unit energy, four on each sample: (batch, samples) -> (batch, bins, frames)."""
    window = torch.hann_window(size, device=sound.device)
    window = window / window.square().sum().sqrt()
    spectra = torch.stft(sound, size, size // 4, window=window, pad_mode="constant", return_complex=True)
    return (torch.view_as_real(spectra).square().sum(-1) + POWER_FLOOR).sqrt()


def spectral_distances(
    estimate: torch.Tensor, target: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Spectral convergence and the mean distance of log-magnitudes (Yamamoto et al. 2020, eq. 4 and 5), averaged over the
    windows: two tensors with a number for each sound.
    """
    convergence, logarithmic = [], []
    for size in sizes:
        ours, theirs = magnitudes(estimate, size), magnitudes(target, size)
        level = theirs.square().mean((1, 2)).sqrt().clamp(min=SILENCE)
        error = (ours - theirs).square().mean((1, 2)).clamp(min=1e-12)  # a root has no gradient at 0
        convergence.append(error.sqrt() / level)
        logarithmic.append((ours.log() - theirs.log()).abs().mean((1, 2)))
    return torch.stack(convergence).mean(0), torch.stack(logarithmic).mean(0)


def codec_loss(
    estimate: torch.Tensor, target: torch.Tensor, sizes: Sequence[int], waveform_weight: float
) -> torch.Tensor:
    """L1 distance of the waveforms, and of their spectra at several resolutions."""
    convergence, logarithmic = spectral_distances(estimate, target, sizes)
    return waveform_weight * (estimate - target).abs().mean() + (convergence + logarithmic).mean()


def si_sdr(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio in dB of each sound (Le Roux et al. 2019, eq. 3)."""
    estimate, target = estimate.double(), target.double()
    tiny = torch.finfo(torch.float64).tiny
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=tiny)
    signal = (scale * target).square().sum(-1)
    distortion = (estimate - scale * target).square().sum(-1)
    return 10 * (signal.clamp(min=tiny) / distortion.clamp(min=tiny)).log10()


def perplexity(codes: torch.Tensor, codebook_size: int) -> float:
    """How many codes are in use: e to the entropy of their frequencies, averaged over codebooks (batch, K, frames)."""
    counts = torch.stack([book.flatten().bincount(minlength=codebook_size) for book in codes.unbind(1)]).double()
    return torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1).exp().mean().item()
