"""What networks are trained to do, one function each: the loss of a batch, averaged over its elements.

Each takes a `network(x, timestep)` that returns a tensor, the clean samples, and the scheduler that will sample from
the network. Noise levels, noise law and preconditioning are the scheduler's, so that training and sampling cannot
disagree. `generator` is one generator, or one per sample.

Papers: PFGM https://huggingface.co/papers/2209.11178, PFGM++ 2302.04265, EDM 2206.00364, stable targets 2302.00670,
DDPM 2006.11239, v-prediction 2202.00512, score SDEs 2011.13456.
"""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from tonefield.schedulers import empirical_denoiser, poisson_field
from tonefield.training.randomness import uniform


Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def perturb(clean: torch.Tensor, scheduler, generator: Generators) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy samples, their noise levels sigma and the timesteps that stand for them, of a Poisson flow scheduler."""
    sigma = scheduler.sample_sigmas(len(clean), generator, clean.device)
    # Not truncated: the regression finds E[y | x] for the exact law only.
    noise = scheduler.sample_noise(clean.shape, generator, clean.device, clean.dtype, truncate=False)
    timestep = scheduler.precondition_noise(sigma)
    return scheduler.add_noise(clean, noise, timestep), sigma, timestep


def denoising_error(
    network: Network, noisy: torch.Tensor, sigma: torch.Tensor, timestep: torch.Tensor, target: torch.Tensor, scheduler
) -> torch.Tensor:
    """The mean over the batch of lambda(sigma) |Dn(noisy, sigma) - target|^2 / N."""
    output = network(scheduler.scale_model_input(noisy, timestep), timestep)
    error = scheduler.precondition_outputs(noisy, output, sigma) - target
    return (scheduler.loss_weight(sigma) * error.square().flatten(1).mean(dim=1)).mean()


def denoiser_loss(network: Network, clean: torch.Tensor, generator: Generators, scheduler) -> torch.Tensor:
    """PFGM++ and EDM: lambda(sigma) |Dn(y + sigma noise, sigma) - y|^2 (PFGM++, equation 4; EDM, equation 2)."""
    noisy, sigma, timestep = perturb(clean, scheduler, generator)
    return denoising_error(network, noisy, sigma, timestep, clean, scheduler)


def stable_target_loss(
    network: Network,
    clean: torch.Tensor,
    generator: Generators,
    scheduler,
    charges: torch.Tensor,
    classes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The denoiser's loss with E[y | x] over a large batch in place of the one y that x was made of: less variance for a
    bias that vanishes with the size of that batch (stable targets, equation 7, for any D).

    Args:
        charges (`torch.Tensor` of shape `(K, ...)`): The large batch; the samples of `clean` must be among it.
        classes (`tuple`, *optional*): The classes that the network is told of `clean`, and those of `charges`.
    """
    noisy, sigma, timestep = perturb(clean, scheduler, generator)
    target = empirical_denoiser(noisy, charges, sigma, scheduler.config.aug_dim, same_class(classes))
    return denoising_error(network, noisy, sigma, timestep, target, scheduler)


def field_loss(
    network: Network,
    clean: torch.Tensor,
    generator: Generators,
    scheduler,
    charges: torch.Tensor,
    classes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    PFGM: |f - field(x)|^2 / (N + 1) with the normalised Poisson field of a large batch (PFGM, equation 5).

    The network returns one channel more than a sample has; its mean is the component along the augmented axis.
    `charges` and `classes` are those of `stable_target_loss`.
    """
    noisy, sigma, timestep = perturb(clean, scheduler, generator)
    config = scheduler.config

    along_x, along_r = poisson_field(noisy, charges, sigma, config.aug_dim, config.gamma, same_class(classes))
    output = network(noisy, timestep)
    error_x = (output[:, :-1] - along_x).flatten(1).square().sum(dim=1)
    error_r = (output[:, -1].flatten(1).mean(dim=1) - along_r).square()
    return ((error_x + error_r) / (clean[0].numel() + 1)).mean()


def same_class(classes: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor | None:
    """
    A conditional network learns the field of its class alone: True where a charge has the class of a row, of shape
    `(rows, charges)`. A row whose class no charge has was told the null class, and sees them all.
    """
    if classes is None:
        return None
    of_rows, of_charges = classes
    same = of_rows[:, None] == of_charges
    return same | ~same.any(dim=1, keepdim=True)


def ddpm_loss(network: Network, clean: torch.Tensor, generator: Generators, scheduler) -> torch.Tensor:
    """DDPM's |noise - prediction|^2 (equation 14), or the same for v, as diffusers' scheduler is configured."""
    steps = scheduler.config.num_train_timesteps
    timestep = (uniform(len(clean), generator, clean.device) * steps).long()
    noise = randn_tensor(clean.shape, generator, clean.device, clean.dtype)
    noisy = scheduler.add_noise(clean, noise, timestep)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, timestep) if velocity else noise
    return (network(noisy, timestep) - target).square().mean()


def score_sde_loss(network: Network, clean: torch.Tensor, generator: Generators, scheduler) -> torch.Tensor:
    """Denoising score matching in continuous time, weighted with the variance (score SDEs, equation 7)."""
    start = scheduler.config.sampling_eps
    time = start + (1 - start) * uniform(len(clean), generator, clean.device)
    noise = randn_tensor(clean.shape, generator, clean.device, clean.dtype)
    timestep = scheduler.timestep_of(time)
    output = network(scheduler.add_noise(clean, noise, timestep), timestep)
    if scheduler.config.prediction_type == "score":  # noise = -std * score
        std = scheduler.equation.marginal(time)[1]
        output = -output * std.reshape(-1, *[1] * (output.ndim - 1))
    return (output - noise).square().mean()
