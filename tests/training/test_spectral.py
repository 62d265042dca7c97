"""Measures of sounds against closed forms."""

import math

import numpy as np
import pytest
import torch

from tonefield.training.spectral import (
    codec_loss,
    magnitudes,
    perplexity,
    si_sdr,
    spectral_distances,
    window_sizes,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decibel", [-10.0, 0.0, 25.0])
def test_si_sdr_of_a_known_distortion(decibel):
    target, other = noise(2, 5000), noise(2, 5000, seed=1)
    other -= (other * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True) * target  # orthogonal
    other *= target.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
    estimate = target + 10 ** (-decibel / 20) * other
    torch.testing.assert_close(si_sdr(estimate, target), torch.full((2,), decibel).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(si_sdr(0.1 * estimate, 3 * target), si_sdr(estimate, target), atol=1e-3, rtol=0)


def test_magnitudes_are_those_of_numpy():
    x = noise(1, 1000).double()
    window = np.hanning(129)[:-1]
    padded = np.pad(x[0].numpy(), 64)[5 * 32 : 5 * 32 + 128]
    expected = np.abs(np.fft.rfft(padded * window)) / np.sqrt((window**2).sum())
    np.testing.assert_allclose(magnitudes(x, 128)[0, :, 5], np.sqrt(expected**2 + 1e-7), rtol=1e-5)
    assert magnitudes(noise(1, 50_000), 256).square().mean().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_distances_of_a_gain(gain):
    target = noise(3, 4000)
    convergence, logarithmic = spectral_distances(gain * target, target, window_sizes(8000))
    torch.testing.assert_close(convergence, torch.full((3,), abs(gain - 1)), rtol=1e-4, atol=0)
    torch.testing.assert_close(logarithmic, torch.full((3,), abs(math.log(gain))), rtol=1e-3, atol=0)
    expected = 10 * abs(gain - 1) * target.abs().mean().item() + abs(gain - 1) + abs(math.log(gain))
    assert codec_loss(gain * target, target, window_sizes(8000), 10.0).item() == pytest.approx(expected, rel=1e-3)


def test_silence_neither_breaks_nor_dominates():
    estimate = (0.01 * noise(2, 2000)).requires_grad_()
    target = torch.stack([torch.zeros(2000), noise(2000)])
    loss = codec_loss(estimate, target, [128, 256], 1.0)
    loss.backward()
    assert loss.item() < 10
    assert estimate.grad.isfinite().all()
    still = torch.zeros(1, 2000, requires_grad=True)
    codec_loss(still, torch.zeros(1, 2000), [128], 1.0).backward()
    assert still.grad.isfinite().all()


def test_window_sizes():
    assert window_sizes(8000) == [128, 256, 512, 1024]
    assert window_sizes(24000) == [512, 1024, 2048, 4096]


def test_perplexity():
    even = torch.arange(12).view(2, 1, 6)
    assert perplexity(even, 100) == pytest.approx(12)
    assert perplexity(even * 0 + 99, 100) == pytest.approx(1)
    both = torch.cat([even, even * 0], dim=1)
    assert perplexity(both, 100) == pytest.approx(6.5)
    skewed = torch.tensor([[[0, 0, 0, 1]]])
    assert perplexity(skewed, 2) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
