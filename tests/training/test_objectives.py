"""Each objective's minimiser on Gaussian data, where it is known, and the targets of the field objectives."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from tonefield.schedulers import PoissonFlowScheduler, ScoreSDEScheduler, empirical_denoiser, poisson_field
from tonefield.training.objectives import (
    ddpm_loss,
    denoiser_loss,
    field_loss,
    perturb,
    score_sde_loss,
    stable_target_loss,
)
from tonefield.training.randomness import derive_seed, make_generators, uniform


SPREAD = 0.7


def gaussian(count, *shape):
    return SPREAD * torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def best_factor(loss):
    """
    The a that minimises the loss of the network a * h(x, t), which is a quadratic function of a: from three values.
    """
    at = {a: loss(torch.tensor(a, dtype=torch.float64)).item() for a in (-1.0, 0.0, 1.0)}
    return (at[-1.0] - at[1.0]) / (2 * (at[-1.0] + at[1.0] - 2 * at[0.0]))


def check_factor(loss_of, optimal, wrong, **tolerance):
    """`optimal(x, t)` is best as it is; a network that is off by a factor of `wrong` is best divided by it."""
    for factor in (1.0, wrong):
        best = best_factor(lambda a, f=factor: loss_of(lambda x, t: a * f * optimal(x, t)))
        assert best == pytest.approx(1 / factor, **tolerance)


@pytest.mark.parametrize("aug_dim", [None, 3.0, 40.0])
def test_denoiser_loss_finds_the_posterior_mean_of_two_points(aug_dim):
    """Data at +1 and -1 in one dimension: E[y | x] is known for any D, and no linear function."""
    scheduler = PoissonFlowScheduler(aug_dim=aug_dim, prediction_type="sample", p_mean=0.0, p_std=0.0)
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    clean = points.repeat(100_000, 1)

    def optimal(x, t):
        return empirical_denoiser(x, points, torch.exp(4 * t), aug_dim)

    def loss_of(network):
        return denoiser_loss(network, clean, torch.Generator().manual_seed(0), scheduler)

    check_factor(loss_of, optimal, 1.5, rel=0.01)
    # The residual of the regression is orthogonal to any function of x, not to the optimum alone.
    for other in (torch.sign, torch.tanh, lambda x: x.clamp(-0.3, 0.3)):
        best = best_factor(lambda a, g=other: loss_of(lambda x, t: optimal(x, t) + a * g(x)))
        assert best == pytest.approx(0, abs=0.01)


def test_denoiser_loss_is_that_of_edm():
    """With Gaussian noise and preconditioning: unit weight on F, whose optimum for Gaussian data is known."""
    scheduler = PoissonFlowScheduler(aug_dim=None, sigma_data=0.5)
    clean = gaussian(200_000, 1)

    def optimal(x, t):  # F = (D - c_skip x) / c_out at the input c_in x
        sigma = torch.exp(4 * t)[:, None]
        total, s = sigma**2 + 0.25, 0.5
        noisy = x * total.sqrt()
        denoised = SPREAD**2 / (SPREAD**2 + sigma**2) * noisy
        return (denoised - s**2 / total * noisy) / (sigma * s / total.sqrt())

    def loss_of(network):
        return denoiser_loss(network, clean, torch.Generator().manual_seed(0), scheduler)

    check_factor(loss_of, optimal, 0.6, rel=0.02)
    zero = loss_of(lambda x, t: 0 * x).item()
    sigma = scheduler.sample_sigmas(400_000, torch.Generator().manual_seed(5)).double()
    total = sigma**2 + 0.25
    # E |F*|^2 of the target F* = (y - c_skip x) / c_out, for independent y and noise of variances SPREAD^2, sigma^2.
    exact = ((sigma**2 / total) ** 2 * SPREAD**2 + (0.25 / total) ** 2 * sigma**2) / (sigma**2 * 0.25 / total)
    assert zero == pytest.approx(exact.mean().item(), rel=0.01)


def test_the_noise_is_the_schedulers_without_truncation():
    scheduler = PoissonFlowScheduler(aug_dim=2, prior_radius_quantile=0.5, sigma_data=0.5)
    clean = gaussian(500, 3).float()
    seeds = make_generators(7, "noise", list(range(500)))
    noisy, sigma, timestep = perturb(clean, scheduler, seeds)
    again = make_generators(7, "noise", list(range(500)))
    expected_sigma = scheduler.sample_sigmas(500, again)
    noise = scheduler.sample_noise((500, 3), again, truncate=False)
    torch.testing.assert_close(sigma, expected_sigma)
    torch.testing.assert_close(noisy, clean + sigma[:, None] * noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(timestep, sigma.log() / 4)
    # Truncation at the median would leave none beyond the median radius.
    radius = ((noisy - clean) / sigma[:, None]).norm(dim=1)
    assert (radius > math.sqrt(3 * 0.7)).float().mean() > 0.4


@pytest.mark.parametrize("classes", [False, True])
def test_field_loss_target_is_the_poisson_field(classes):
    scheduler = PoissonFlowScheduler(aug_dim=1, prediction_type="field", gamma=5.0, p_mean=0.5)
    charges = gaussian(12, 2, 4, 4)
    clean, labels = charges[:6], torch.tensor([0, 1, 0, 2, 1, 0])
    charge_labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1])  # row 3 was told the null class, 2
    noisy, sigma, _ = perturb(clean, scheduler, torch.Generator().manual_seed(3))
    along_x, along_r = torch.empty_like(clean), torch.empty(6, dtype=torch.float64)
    for row in range(6):
        mine = charges[charge_labels == labels[row]] if classes and labels[row] < 2 else charges
        x, r = poisson_field(noisy[row : row + 1], mine, sigma[row : row + 1], 1, 5.0)
        along_x[row], along_r[row] = x[0], r[0]

    def network(x, t):
        torch.testing.assert_close(x, noisy)
        # The last channel counts by its mean alone.
        last = along_r[:, None, None, None] + torch.tensor([1.0, -1.0]).repeat(8).reshape(1, 1, 4, 4)
        return torch.cat([along_x, last], 1)

    def loss_of(network):
        of = (labels, charge_labels) if classes else None
        return field_loss(network, clean, torch.Generator().manual_seed(3), scheduler, charges, of).item()

    assert loss_of(network) == pytest.approx(0, abs=1e-12)
    off = torch.zeros(6, 3, 4, 4, dtype=torch.float64)
    off[:, -1] = 2.0  # an error of 2 in one of N + 1 = 33 components
    assert loss_of(lambda x, t: network(x, t) + off) == pytest.approx(4 / 33, rel=1e-6)


@pytest.mark.parametrize("aug_dim", [2.0, None])
def test_stable_target_is_the_denoiser_of_the_charges(aug_dim):
    scheduler = PoissonFlowScheduler(aug_dim=aug_dim, prediction_type="sample", p_mean=0.0)
    charges, labels = gaussian(30, 5), torch.arange(30) % 3
    clean = charges[:9]
    told = torch.where(torch.arange(9) == 4, 3, labels[:9])

    def optimal(x, t):
        rows = [
            empirical_denoiser(
                x[i : i + 1], charges if told[i] == 3 else charges[labels == told[i]], torch.exp(4 * t[i]), aug_dim
            )
            for i in range(9)
        ]
        return torch.cat(rows)

    def loss_of(network, classes=(told, labels)):
        return stable_target_loss(network, clean, torch.Generator().manual_seed(0), scheduler, charges, classes).item()

    assert loss_of(optimal) == pytest.approx(0, abs=1e-9)
    assert loss_of(optimal, None) > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_loss_finds_the_optimum_for_gaussian_data(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    clean = gaussian(200_000, 1)
    signal = scheduler.alphas_cumprod.double()

    def optimal(x, t):
        a = signal[t][:, None]
        variance = a * SPREAD**2 + 1 - a
        noise, mean = (1 - a).sqrt() / variance * x, a.sqrt() * SPREAD**2 / variance * x
        return noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * mean

    def loss_of(network):
        return ddpm_loss(network, clean, torch.Generator().manual_seed(0), scheduler)

    check_factor(loss_of, optimal, 0.5, rel=0.02)
    seen = []
    loss_of(lambda x, t: seen.append(t) or x)
    assert (seen[0].min().item(), seen[0].max().item()) == (0, 999)
    assert seen[0].double().mean().item() == pytest.approx(499.5, abs=3)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_score_sde_loss_finds_the_score_of_gaussian_data(sde, prediction):
    scheduler = ScoreSDEScheduler(sde, prediction_type=prediction, sigma_max=5.0)
    clean = gaussian(200_000, 1)

    def optimal(x, t):
        mean, std = (value[:, None].double() for value in scheduler.equation.marginal(scheduler.time_of(t)))
        score = -x / (mean**2 * SPREAD**2 + std**2)
        return score if prediction == "score" else -std * score

    def loss_of(network):
        return score_sde_loss(network, clean, torch.Generator().manual_seed(0), scheduler)

    check_factor(loss_of, optimal, 2.0, rel=0.02)


def test_a_batch_of_one_and_seeds_of_their_own():
    """What one sample contributes does not depend on its batch, for every objective's draws."""
    clean = gaussian(4, 1, 4, 4).float()
    losses = {
        "denoiser": (denoiser_loss, PoissonFlowScheduler()),
        "ddpm": (ddpm_loss, DDPMScheduler()),
        "sde": (score_sde_loss, ScoreSDEScheduler("vp")),
    }
    for loss, scheduler in losses.values():
        together = loss(lambda x, t: 0.3 * x, clean, make_generators(0, "noise", [0, 1, 2, 3]), scheduler)
        alone = [
            loss(lambda x, t: 0.3 * x, clean[i : i + 1], make_generators(0, "noise", [i]), scheduler) for i in range(4)
        ]
        torch.testing.assert_close(together, torch.stack(alone).mean())


def test_seeds_differ_and_stay():
    assert len({derive_seed(s, p, i) for s in (0, 1) for p in ("noise", "order") for i in range(100)}) == 400
    assert derive_seed(0, "noise", 17) == 8143088687878282563
    draws = uniform(1000, make_generators(0, "x", list(range(1000))))
    assert draws.mean().item() == pytest.approx(0.5, abs=0.04)
    assert draws.std().item() == pytest.approx(12**-0.5, abs=0.02)
