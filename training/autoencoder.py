"""What a variational autoencoder of mels is trained to do, and how good it is at it.

Papers: VAE https://huggingface.co/papers/1312.6114, pix2pix 1611.07004, VQGAN 2012.09841, latent diffusion 2112.10752.
"""

import math

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from tonefield.models.mel_spectrogram import MelSpectrogram
from tonefield.training.data import TrainingData


SPECTRAL_WINDOWS = (8, 16, 32)


class TrainableVAE(AutoencoderKL):
    """diffusers' autoencoder; its `forward`, through which alone several processes can train, tells the posterior."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sample: torch.Tensor, generator: list[torch.Generator] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction of a draw from the posterior, or of its mean without generators; and its parameters."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.mean
        if generator is not None:
            latents = latents + posterior.std * randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        return self.decode(latents).sample, posterior.parameters


def kl_divergence(parameters: torch.Tensor) -> torch.Tensor:
    """KL(posterior | N(0, 1)) in nats, summed over latents (VAE, appendix B) and averaged over samples."""
    return DiagonalGaussianDistribution(parameters.float()).kl().mean()


def modulation_spectra(mels: torch.Tensor, size: int) -> torch.Tensor:
    """
    Magnitudes of the two-dimensional spectra of the patches of a mel, which overlap by half: how strongly its texture
    goes up and down in time and over the bands, whatever the phase.

    Args:
        mels (`torch.Tensor` of shape `(batch, 1, n_mels, frames)`).
        size (`int`): Height and width of a patch, at most those of the mel.

    Returns:
        `torch.Tensor` of shape `(batch, rows, columns, size, size // 2 + 1)`.
    """
    window = torch.hann_window(size, device=mels.device, dtype=mels.dtype)
    # Reflected at its edges, so that every value of the mel counts as much as any other.
    mels = torch.nn.functional.pad(mels, [size // 2] * 4, mode="reflect")[:, 0]
    patches = mels.unfold(1, size, size // 2).unfold(2, size, size // 2)
    spectra = torch.fft.rfft2(patches * (window[:, None] * window), norm="ortho")
    return (spectra.real.square() + spectra.imag.square() + 1e-8).sqrt()  # a magnitude has no slope at 0


def spectral_loss(reconstruction: torch.Tensor, mels: torch.Tensor) -> torch.Tensor:
    """
    The mean difference of modulation spectra at several scales.

    Where L1 is unsure of the phase of a texture it is least for a blur. Here a blur, which has lost the texture, is
    worse than the texture at another place.
    """
    sizes = [size for size in SPECTRAL_WINDOWS if size <= min(mels.shape[-2:])]
    losses = [(modulation_spectra(reconstruction, s) - modulation_spectra(mels, s)).abs().mean() for s in sizes]
    return torch.stack(losses).mean()


def discriminator_loss(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The hinge loss of a discriminator that is to say more than 1 of what is real, less than -1 of what is made."""
    return ((1 - real).relu().mean() + (1 + made).relu().mean()) / 2


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last: torch.Tensor, reduce=lambda grad: grad
) -> torch.Tensor:
    """
    What makes the adversarial loss pull at the last layer as hard as the reconstruction loss (VQGAN, equation 7).

    `reduce` averages a gradient over processes, so that all of them use the same weight.
    """
    norms = [
        reduce(torch.autograd.grad(loss, last, retain_graph=True)[0]).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


def decibels_per_unit(mel: MelSpectrogram) -> float:
    """What a difference of 1 between standardised mels is in decibels."""
    low, high = mel.value_range
    nepers = 20 / math.log(10) if mel.config.method == "bigvgan" else 1.0
    return mel.config.std * (high - low) / 2 * nepers


def reconstruction_quality(reconstruction: torch.Tensor, mels: torch.Tensor, decibels: float) -> dict:
    """
    The mean over samples of the root mean square error in dB, and of the signal-to-noise ratio of a mel in dB: the
    energy of the standardised mel over that of the error.
    """
    error = (reconstruction.float() - mels).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    power = mels.square().flatten(1).mean(dim=1)
    return {"error_db": decibels * error.sqrt().mean(), "snr_db": 10 * (power / error).log10().mean()}


@torch.no_grad()
def measure_reconstruction(
    vae: AutoencoderKL, mel: MelSpectrogram, accelerator: Accelerator, data: TrainingData, size: int
) -> dict[str, float]:
    """The `reconstruction_quality` of the held-out rows; nothing if there are none."""
    sums: dict[str, float] = {}
    decibels = decibels_per_unit(mel)
    for batch in data.validation_batches(size):
        mels = batch["clean"].to(accelerator.device)
        with accelerator.autocast():
            made = vae.decode(vae.encode(mels).latent_dist.mean).sample
        for name, value in reconstruction_quality(made, mels, decibels).items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(mels) / len(data.validation)
    return sums
