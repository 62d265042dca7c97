"""The losses of an autoencoder against closed forms, brute force and diffusers; and what its convolutions promise."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tonefield.models import MelSpectrogram
from tonefield.training.autoencoder import (
    TrainableVAE,
    adaptive_weight,
    decibels_per_unit,
    discriminator_loss,
    kl_divergence,
    modulation_spectra,
    reconstruction_quality,
    spectral_loss,
)
from tonefield.training.randomness import make_generators


CONFIG = dict(
    in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
    up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 16, 32), mid_block_add_attention=False,
)  # fmt: skip


def small_vae(cls):
    torch.manual_seed(0)
    return cls(**CONFIG).eval()


def test_forward_is_that_of_diffusers():
    ours, theirs = small_vae(TrainableVAE), small_vae(AutoencoderKL)
    mels = torch.randn(3, 1, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mode, parameters = ours(mels)
        torch.testing.assert_close(mode, theirs(mels).sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(parameters, theirs.encode(mels).latent_dist.parameters, rtol=0, atol=1e-6)
        drawn = ours(mels, make_generators(0, "noise", [5, 6, 7]))[0]
        again = theirs(mels, sample_posterior=True, generator=make_generators(0, "noise", [5, 6, 7])).sample
    torch.testing.assert_close(drawn, again, rtol=0, atol=1e-5)
    assert not torch.allclose(drawn, mode, atol=1e-2)


def test_kl_is_that_of_normal_distributions():
    parameters = torch.randn(5, 6, 2, 3, dtype=torch.float64)
    mean, logvar = parameters.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert kl_divergence(parameters).item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [8, 16])
def test_modulation_spectra_by_brute_force(size):
    mels = torch.randn(2, 1, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = modulation_spectra(mels, size)
    half = size // 2
    padded = np.pad(mels.numpy()[:, 0], [(0, 0), (half, half), (half, half)], mode="reflect")
    hann = np.sin(np.pi * np.arange(size) / size) ** 2
    place = np.arange(size)
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            patch = padded[:, row * half : row * half + size, column * half : column * half + size]
            patch = patch * hann[:, None] * hann
            for u in range(0, size, 3):
                for v in range(0, half + 1, 3):
                    wave = np.exp(-2j * np.pi * (u * place[:, None] + v * place) / size) / size
                    expected = np.sqrt(np.abs((patch * wave).sum((1, 2))) ** 2 + 1e-8)
                    np.testing.assert_allclose(found[:, row, column, u, v], expected, rtol=1e-9)
    assert found.shape == (2, 32 // size + 1, 48 // size + 1, size, half + 1)


def test_a_blur_is_worse_than_a_texture_at_another_place():
    """What L1 has the other way round, which is why reconstructions by L1 are blurred."""
    time = torch.arange(64, dtype=torch.float64)
    texture, moved = (torch.sin(2 * math.pi * (time + shift) / 8).expand(1, 1, 64, 64) for shift in (0, 4))
    blurred = torch.zeros_like(texture)

    def l1(a, b):
        return (a - b).abs().mean()

    assert l1(moved, texture) > 1.5 * l1(blurred, texture)
    assert spectral_loss(moved, texture) < 0.5 * spectral_loss(blurred, texture)
    assert spectral_loss(texture, texture) == 0
    reconstruction = texture.clone().requires_grad_()
    spectral_loss(reconstruction, moved).backward()
    assert reconstruction.grad.isfinite().all()


def test_mels_of_few_bands_have_smaller_patches():
    mels = torch.randn(1, 1, 8, 64)
    expected = (modulation_spectra(mels, 8) - modulation_spectra(0 * mels, 8)).abs().mean()
    torch.testing.assert_close(spectral_loss(0 * mels, mels), expected)


def test_hinge_loss():
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, made).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)


def test_the_adversarial_loss_pulls_as_hard_as_the_reconstruction():
    torch.manual_seed(0)
    last, x, judge = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    last.requires_grad_()
    reconstruction = x @ last
    faithful, adversarial = (reconstruction - x).square().mean(), (reconstruction * judge).sum() * 100
    weight = adaptive_weight(faithful, adversarial, last)
    # d(|x l - x|^2 / 16)/dl = 2 x'(x l - x) / 16, d(sum x l j)/dl = x'j.
    expected = (2 * x.T @ (x @ last - x) / 16).norm() / ((100 * x.T @ judge).norm() + 1e-4)
    assert weight.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not weight.requires_grad
    assert adaptive_weight(faithful, adversarial * 1e-12, last).item() == 1e4
    halved = adaptive_weight(faithful, adversarial, last, reduce=lambda gradient: gradient.square())
    assert halved.item() != pytest.approx(weight.item())
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (faithful, weight * adversarial)]
    torch.testing.assert_close(*pulls, rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", ["fsdd-64", "bigvgan_22khz_80band"])
def test_decibels_are_those_of_the_sound(preset):
    """Half the amplitude is 6.02 dB less, whatever the front end and its standardisation."""
    mel = MelSpectrogram.from_preset(preset, mean=-0.3, std=0.7)
    noise = 0.1 * torch.randn(2, mel.slice_samples, generator=torch.Generator().manual_seed(0))
    loud, quiet = mel.encode(noise), mel.encode(noise / 2)
    quality = reconstruction_quality(quiet, loud, decibels_per_unit(mel))
    assert quality["error_db"].item() == pytest.approx(20 * math.log10(2), rel=1e-3)


def test_signal_to_noise_ratio():
    """A tenth of the amplitude is 20 dB below, a hundredth 40; the mean of both is 30."""
    signal = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    noise = signal.flip(-1) * torch.tensor([0.1, 0.01])[:, None, None, None]
    quality = reconstruction_quality(signal + noise, signal, 3.0)
    assert quality["snr_db"].item() == pytest.approx(30, abs=1e-3)
    rms = signal.square().mean(dim=(1, 2, 3)).sqrt()
    assert quality["error_db"].item() == pytest.approx(3 * (0.1 * rms[0] + 0.01 * rms[1]).item() / 2, rel=1e-4)


def test_a_sound_that_comes_later_has_later_latents():
    """Shifted by a multiple of the factor, within silence, a mel has shifted latents, and these a shifted mel."""
    vae = small_vae(AutoencoderKL).double()
    sound = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    silence = torch.full((1, 1, 16, 512), -1.0, dtype=torch.float64)
    mels = [silence.clone(), silence.clone()]
    mels[0][..., 248:264], mels[1][..., 256:272] = sound, sound
    with torch.no_grad():
        latents = [vae.encode(mel).latent_dist.mean for mel in mels]
        decoded = [vae.decode(latent).sample for latent in latents]
    # Not at the ends, where the convolutions see beyond the mel.
    torch.testing.assert_close(latents[0][..., 40:88], latents[1][..., 42:90], rtol=0, atol=1e-10)
    torch.testing.assert_close(decoded[0][..., 160:352], decoded[1][..., 168:360], rtol=0, atol=1e-10)
    assert (latents[0] - latents[1])[..., 40:88].abs().max() > 0.1
