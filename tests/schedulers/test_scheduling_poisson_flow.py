import inspect
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.utils.torch_utils import randn_tensor
from scipy import special, stats
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from tonefield.schedulers import PoissonFlowScheduler, empirical_denoiser, poisson_field
from tonefield.schedulers.scheduling_poisson_flow import (
    edm_denoised,
    field_denoised,
    integrate_adaptively,
    student_t_log_density,
)


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")
SOLVERS = ("euler", "heun", "dpmsolver++", "rk45")


def call_levels(scheduler):
    """The noise level of every network call, from the grid and the definition of each solver."""
    sigmas = scheduler.sigmas[:-1]
    if scheduler.config.solver_type == "heun":
        return torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
    if scheduler.config.solver_type == "rk45":
        ends = zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)
        nodes = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
        inner = [start ** (1 - node) * end**node for start, end in ends for node in nodes]
        return torch.tensor([*inner, sigmas[-1].item()], dtype=torch.float64)
    return sigmas


def run(scheduler, denoise, sample, denoise_last=True):
    """The diffusers loop with an oracle; without the last call the sample is the one at the smallest noise level."""
    levels = call_levels(scheduler)
    torch.testing.assert_close(scheduler.timesteps, (levels.log() / 4).float())
    for t, sigma in list(zip(scheduler.timesteps, levels, strict=True))[: None if denoise_last else -1]:
        scaled = scheduler.scale_model_input(sample, t)
        assert scaled is sample  # prediction_type="sample"
        sample = scheduler.step(denoise(scaled, sigma.item()), t, sample).prev_sample
    return sample


def oracle(**config):
    return PoissonFlowScheduler(**{"prediction_type": "sample", "solver_type": "heun", **config})


def points(count, dim, seed=0, scale=0.5):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# The noise law


@pytest.mark.parametrize(
    ("dim", "aug_dim", "median", "count"),
    [
        (2, 1, None, 40_000),
        (64, 1, None, 40_000),
        (3072, 1, 1.482, 40_000),
        (3072, 128, 1.003, 40_000),
        (3072, 1e7, None, 40_000),
        (16384, 2048, 1.000, 4_000),
        (5, 3.5, None, 40_000),
        (5, None, None, 40_000),
        pytest.param(16384, 2048, 1.000, 40_000, marks=pytest.mark.slow),
    ],
)
def test_kernel_law(dim, aug_dim, median, count):
    scheduler, generator = oracle(aug_dim=aug_dim), torch.Generator().manual_seed(1)
    squares = torch.cat(
        [scheduler.sample_noise((1000, dim), generator).double().square().sum(1) for _ in range(count // 1000)]
    ).numpy()
    if aug_dim is None:
        assert stats.kstest(squares, stats.chi2(dim).cdf).pvalue > 0.05
    else:
        uniform = special.betainc(dim / 2, aug_dim / 2, squares / (squares + aug_dim))
        assert stats.kstest(uniform, "uniform").pvalue > 0.05
        assert stats.kstest(squares / dim, stats.f(dim, aug_dim).cdf).pvalue > 0.05
    if median:
        assert np.sqrt(np.median(squares) / dim) == pytest.approx(median, rel=0.02)


def test_noise_is_scipys_multivariate_t():
    """Not only the radius: the joint law of two coordinates, through the maximum of their absolute values."""
    noise = oracle(aug_dim=3).sample_noise((40_000, 2), torch.Generator().manual_seed(0)).double()
    largest = noise.abs().amax(1).numpy()
    law = stats.multivariate_t([0, 0], np.eye(2), df=3)
    grid = np.array([0.5, 1.0, 2.0, 4.0])
    expected = [law.cdf([q, q], lower_limit=[-q, -q], random_state=0) for q in grid]
    observed = [(largest < q).mean() for q in grid]
    np.testing.assert_allclose(observed, expected, atol=4 * 0.5 / math.sqrt(40_000))


def test_cauchy_noise_is_the_pfgm_prior():
    """PFGM: b ~ Beta(N / 2, 1 / 2), R = z sqrt(b / (1 - b)); here that law's distribution against our draws."""
    scheduler = oracle(aug_dim=1, sigma_max=40.0)
    noise = (
        scheduler.sample_noise((20_000, 192), torch.Generator().manual_seed(3)).double() * scheduler.init_noise_sigma
    )
    beta = np.random.default_rng(0).beta(96, 0.5, size=20_000)
    theirs = 40 * np.sqrt(beta / (1 - beta))
    assert stats.ks_2samp(noise.norm(dim=1).numpy(), theirs).pvalue > 0.05


@pytest.mark.parametrize(("dim", "aug_dim"), [(64, 1), (64, 128), (512, 2048), (16, 1e10), (16, None)])
def test_prior_radius_is_truncated_not_clipped(dim, aug_dim):
    plain, cut = oracle(aug_dim=aug_dim), oracle(aug_dim=aug_dim, prior_radius_quantile=0.8)
    everything = plain.sample_noise((10_000, dim), torch.Generator().manual_seed(0)).double()
    inside = cut.sample_noise((10_000, dim), torch.Generator().manual_seed(0)).double()
    square = inside.square().sum(1).numpy()
    if aug_dim is None:
        uniform = special.gammainc(dim / 2, square / 2) / 0.8
    elif aug_dim < 1e9:
        uniform = stats.f(dim, aug_dim).cdf(square / dim) / 0.8
    else:
        uniform = special.gammainc(dim / 2, square / 2) / 0.8  # scipy's F has lost its digits here
    assert uniform.max() <= 1 + 1e-6
    assert stats.kstest(uniform, "uniform").pvalue > 0.05
    cosine = torch.nn.functional.cosine_similarity(inside, everything)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)
    untouched = cut.sample_noise((10_000, dim), torch.Generator().manual_seed(0), truncate=False).double()
    assert torch.equal(untouched, everything)


def test_gaussian_limit_draws_diffusers_tensor():
    ours = oracle(aug_dim=None).sample_noise((3, 2, 4), torch.Generator().manual_seed(5))
    assert torch.equal(ours, randn_tensor((3, 2, 4), torch.Generator().manual_seed(5)))
    nearly = oracle(aug_dim=1e10).sample_noise((3, 2, 4), torch.Generator().manual_seed(5))
    torch.testing.assert_close(nearly, ours, rtol=1e-4, atol=0)


@pytest.mark.parametrize("quantile", [None, 0.9])
def test_each_generator_makes_its_own_sample(quantile):
    scheduler = oracle(aug_dim=3, prior_radius_quantile=quantile)
    seeds = [4, 8, 15, 16]
    batch = scheduler.sample_noise((4, 2, 5), [torch.Generator().manual_seed(s) for s in seeds])
    for row, seed in zip(batch, seeds, strict=True):
        alone = scheduler.sample_noise((1, 2, 5), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(row, alone[0], rtol=1e-6 if quantile else 0, atol=0)
    with pytest.raises(ValueError, match="3 generators for 4 samples"):
        scheduler.sample_noise((4, 2), [torch.Generator()] * 3)


@pytest.mark.parametrize("aug_dim", [1, 2.5, 64, None])
def test_log_prior(aug_dim):
    scheduler, x = oracle(aug_dim=aug_dim, sigma_max=7.0), points(5, 3, scale=9.0)
    shape = 49.0 * np.eye(3)
    law = (
        stats.multivariate_normal(np.zeros(3), shape)
        if aug_dim is None
        else stats.multivariate_t(np.zeros(3), shape, df=aug_dim)
    )
    np.testing.assert_allclose(scheduler.log_prior(x).numpy(), law.logpdf(x.numpy()), rtol=1e-12)


def test_log_prior_of_pfgm_lives_on_the_sphere_of_n_plus_1_dimensions():
    """p(x) = 2 z / (S_{N+1} |(x, z)|^(N+1)) with S_n = 2 pi^(n/2) / Gamma(n/2); S_N would be off by 0.69 nats."""
    x, z = points(4, 2, scale=9.0), 5.0
    sphere = 2 * math.pi**1.5 / math.gamma(1.5)
    expected = np.log(2 * z / (sphere * (x.square().sum(1) + z**2).numpy() ** 1.5))
    np.testing.assert_allclose(oracle(aug_dim=1, sigma_max=z).log_prior(x).numpy(), expected, rtol=1e-13)


def test_add_noise_takes_any_level_and_training_draws_the_stated_law():
    scheduler, clean = oracle(solver_type="euler"), points(6, 4).float()
    sigma = scheduler.sample_sigmas(6, torch.Generator().manual_seed(0))
    noise = scheduler.sample_noise((6, 4), torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(clean, noise, scheduler.precondition_noise(sigma))
    torch.testing.assert_close(noisy, clean + sigma[:, None] * noise, rtol=2e-6, atol=1e-6)
    scheduler.set_timesteps(10)
    one = scheduler.add_noise(clean, noise, scheduler.timesteps[3:4])
    torch.testing.assert_close(one, clean + scheduler.sigmas[3].float() * noise, rtol=2e-6, atol=1e-5)
    log_sigmas = scheduler.sample_sigmas(20_000, torch.Generator().manual_seed(0)).log().numpy()
    assert stats.kstest(log_sigmas, stats.norm(-1.2, 1.2).cdf).pvalue > 0.05
    # Unit weight on F: the weighted error of Dn equals the error of F.
    sigma, sample, output = torch.tensor([0.3]), torch.tensor([0.7]), torch.tensor([0.2])
    target = torch.tensor([-0.4])
    c_skip, c_out = 0.25 / (0.09 + 0.25), 0.3 * 0.5 / math.sqrt(0.09 + 0.25)
    denoised = edm_denoised(sample, output, sigma, 0.5)
    weighted = scheduler.loss_weight(sigma) * (denoised - target) ** 2
    torch.testing.assert_close(weighted, (output - (target - c_skip * sample) / c_out) ** 2)


# Solvers against closed forms


def gaussian_data(spread):
    """D = infinity, data N(0, s^2): Dn = s^2 x / (s^2 + sigma^2) and x ~ sqrt(s^2 + sigma^2)."""
    return (
        lambda x, sigma: spread**2 * x / (spread**2 + sigma**2),
        lambda x, start, end: x * math.sqrt((spread**2 + end**2) / (spread**2 + start**2)),
    )


def cauchy_data(spread):
    """D = 1, data multivariate Cauchy of scale s: Dn = s x / (s + sigma) and x ~ s + sigma."""
    return (
        lambda x, sigma: spread * x / (spread + sigma),
        lambda x, start, end: x * (spread + end) / (spread + start),
    )


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [("euler", 1, (160, 320)), ("heun", 2, (80, 160)), ("dpmsolver++", 2, (160, 320)), ("rk45", 5, (24, 48))],
)
@pytest.mark.parametrize("problem", [gaussian_data, cauchy_data])
def test_order_of_each_solver(solver, order, steps, problem):
    denoise, solution = problem(0.5)
    sample, errors = torch.tensor([[1.0, -2.0]], dtype=torch.float64), []
    for count in steps:
        scheduler = oracle(solver_type=solver)
        scheduler.set_timesteps(sigmas=torch.logspace(1, -1, count + 1, dtype=torch.float64))
        final = run(scheduler, denoise, sample, denoise_last=False)
        errors.append((final / solution(sample, 10.0, 0.1) - 1).abs().max().item())
    # Cauchy data: Dn is constant along a trajectory, on which all but the solver in ln(sigma) are exact.
    if problem is cauchy_data and solver != "rk45":
        assert max(errors) < 1e-13
    else:
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_single_charge_draws_a_straight_line(solver):
    charge, start = points(1, 6), points(3, 6, seed=1, scale=40.0)
    scheduler = oracle(solver_type=solver, aug_dim=1, sigma_max=40.0)
    for count in (1, 2, 7):
        scheduler.set_timesteps(count)
        final = run(scheduler, lambda x, sigma: charge.expand_as(x), start, denoise_last=False)
        expected = charge + (start - charge) * (scheduler.sigmas[-2] / 40.0)
        torch.testing.assert_close(final, expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize("aug_dim", [1, 3.5, 64, 1e6])
def test_quantiles_are_preserved_in_one_dimension(aug_dim):
    """
    sum_j T_D((x - y_j) / sigma) does not change along the ODE, whatever the dataset: scipy's distribution function and
    a root finder against the solver, with nothing shared between the two.
    """
    data, start, end = torch.tensor([[-1.3], [0.2], [1.0]], dtype=torch.float64), 50.0, 0.01
    scheduler = oracle(aug_dim=aug_dim)
    scheduler.set_timesteps(sigmas=torch.logspace(math.log10(start), math.log10(end), 4001, dtype=torch.float64))
    x = torch.tensor([[-70.0], [-20.0], [-0.4], [13.0], [55.0]], dtype=torch.float64)
    final = run(scheduler, lambda x, sigma: empirical_denoiser(x, data, sigma, aug_dim), x, denoise_last=False)
    adaptive = scheduler.integrate(
        lambda x, sigma: empirical_denoiser(x, data, sigma, aug_dim), x, start, end, rtol=1e-10, atol=1e-10
    )

    def quantile(value, sigma):
        return stats.t.cdf((value - data.numpy()[:, 0]) / sigma, aug_dim).mean()

    for before, after, precise in zip(x[:, 0].tolist(), final[:, 0].tolist(), adaptive[:, 0].tolist(), strict=True):
        q = quantile(before, start)
        root = brentq(lambda value: quantile(value, end) - q, -100, 100, xtol=1e-14, rtol=1e-14)  # noqa: B023
        assert abs(after - root) <= 5e-8
        assert abs(precise - root) <= 1e-9


@pytest.mark.parametrize(
    ("aug_dim", "weights"),
    [
        (1, (0.2,) * 5),
        (64, (0.2,) * 5),
        (2048, (0.2,) * 5),
        (None, (0.2,) * 5),
        (1, (0.5, 0.2, 0.15, 0.1, 0.05)),
        (64, (0.5, 0.2, 0.15, 0.1, 0.05)),
    ],
)
def test_tiny_dataset_comes_back_with_its_frequencies(aug_dim, weights):
    # Weighted charges are repeated ones; the points are about 5.6 apart.
    data, n = points(5, 64), 20_000
    copies = data.repeat_interleave(torch.tensor([round(20 * w) for w in weights]), dim=0)
    scheduler = oracle(aug_dim=aug_dim, sigma_max=40.0 if aug_dim == 1 else 80.0)
    scheduler.set_timesteps(18)
    assert len(scheduler.timesteps) == 35
    noise = scheduler.sample_noise((n, 64), torch.Generator().manual_seed(0), dtype=torch.float64)
    final = run(
        scheduler, lambda x, sigma: empirical_denoiser(x, copies, sigma, aug_dim), noise * scheduler.init_noise_sigma
    )
    distance, mode = torch.cdist(final, data, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    frequencies = torch.bincount(mode, minlength=5).double() / n
    # Three standard errors, and the small bias of a finite sigma_max towards equal weights.
    bias = 0 if len(set(weights)) == 1 else 0.012
    assert (frequencies - torch.tensor(weights)).abs().max() < 3 * 0.0028 * 1.3 + bias
    if aug_dim == 1:  # a heavy tail: far-out samples are not resolved by 18 steps
        assert (distance > 0.05).double().mean() < 0.005 and distance.median() <= 6e-8
    else:
        assert distance.max() <= 6e-8


def test_pfgm_needs_truncation_and_the_final_denoising():
    data, z_min, count = points(5, 64), 1e-3, 2000

    def denoise(x, sigma):
        return empirical_denoiser(x, data, sigma, 1)

    def distances(scheduler, denoise_last):
        scheduler.set_timesteps(100)
        noise = scheduler.sample_noise((count, 64), torch.Generator().manual_seed(0), dtype=torch.float64)
        final = run(scheduler, denoise, noise * scheduler.init_noise_sigma, denoise_last)
        return torch.cdist(final, data, compute_mode="donot_use_mm_for_euclid_dist").amin(1)

    config = {"aug_dim": 1, "sigma_min": z_min, "sigma_max": 40.0, "sigma_schedule": "exponential"}
    raw = distances(oracle(**config), denoise_last=False)
    assert raw.median() == pytest.approx(1.48 * z_min * 8, rel=0.1)
    assert (raw > 0.05).double().mean() == pytest.approx(0.12, abs=0.02)
    assert (distances(oracle(**config), denoise_last=True) > 0.05).double().mean() < 0.003
    assert distances(oracle(**config, prior_radius_quantile=0.95), denoise_last=True).max() <= 6e-8


# Adaptive integration, inversion, likelihood


def test_adaptive_solver_takes_the_steps_of_scipy():
    """Same pair, same control, same number of evaluations, for every row by itself."""
    data = points(5, 12)
    starts = torch.cat([points(2, 12, seed=1, scale=60.0), points(1, 12, seed=2, scale=3.0)])
    evaluations = []

    def slope(u, x):
        return x - empirical_denoiser(x, data, u.exp(), 1)

    for start in starts:
        theirs = solve_ivp(
            lambda u, x: slope(torch.tensor([u]), torch.from_numpy(x)[None])[0].numpy(),
            (math.log(40), math.log(1e-3)),
            start.numpy(),
            rtol=1e-6,
            atol=1e-6,
        )
        calls = []
        ours = integrate_adaptively(
            lambda u, x: (calls.append(1), slope(u, x))[1],  # noqa: B023
            start[None],
            math.log(40),
            math.log(1e-3),
            rtol=1e-6,
            atol=1e-6,
        )
        np.testing.assert_allclose(ours[0].numpy(), theirs.y[:, -1], rtol=1e-9, atol=1e-12)
        assert len(calls) == theirs.nfev
        evaluations.append(len(calls))
    together = integrate_adaptively(slope, starts, math.log(40), math.log(1e-3), 1e-6, 1e-6)
    alone = [integrate_adaptively(slope, s[None], math.log(40), math.log(1e-3), 1e-6, 1e-6) for s in starts]
    assert len(set(evaluations)) > 1
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-13)


def test_adaptive_solver_cost_on_the_oracle():
    data, calls = points(5, 192), []
    scheduler = oracle(aug_dim=1, sigma_min=1e-3, sigma_max=40.0, prior_radius_quantile=0.9)
    x = scheduler.sample_noise((32, 192), torch.Generator().manual_seed(0), dtype=torch.float64) * 40

    def denoise(x, sigma):
        calls.append(1)
        return empirical_denoiser(x, data, sigma, 1)

    final = scheduler.integrate(denoise, x, 40.0, 0, rtol=1e-4, atol=1e-4)
    assert 80 <= len(calls) <= 116
    assert torch.cdist(final, data, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-6


@pytest.mark.parametrize(("steps", "error"), [(50, 8e-4), (400, 1e-5)])
def test_round_trip_on_a_fixed_grid(steps, error):
    """Down with the scheduler's Heun, up with the adaptive solver."""
    data, dim = points(5, 64), 64
    scheduler = oracle(aug_dim=1, sigma_min=0.05, sigma_max=40.0, sigma_schedule="exponential")
    scheduler.set_timesteps(steps + 1)
    latents = scheduler.sample_noise((16, dim), torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = latents * scheduler.init_noise_sigma

    def denoise(x, sigma):
        return empirical_denoiser(x, data, sigma, 1)

    sample = run(scheduler, denoise, latents, denoise_last=False)
    back = scheduler.integrate(denoise, sample, 0.05, 40.0, rtol=1e-11, atol=1e-11)
    assert ((back - latents).norm(dim=1) / latents.norm(dim=1)).median() < error


def test_inversion_of_held_out_data_has_the_noise_law():
    """Samples of the density at sigma = 0.5 invert to latents that follow the Student-t law, and come back."""
    data, scheduler = points(5, 16), oracle(aug_dim=4, sigma_max=200.0)
    generator = torch.Generator().manual_seed(0)
    clean = data[torch.randint(0, 5, (2000,), generator=generator)]
    sample = clean + 0.5 * scheduler.sample_noise(clean.shape, generator, dtype=torch.float64)

    def denoise(x, sigma):
        return empirical_denoiser(x, data, sigma, 4)

    latents = scheduler.integrate(denoise, sample, 0.5, 200.0, rtol=1e-7, atol=1e-7)
    assert stats.kstest((latents.square().sum(1) / 16 / 200**2).numpy(), stats.f(16, 4).cdf).pvalue > 0.05
    back = scheduler.integrate(denoise, latents, 200.0, 0.5, rtol=1e-7, atol=1e-7)
    assert ((back - sample).norm(dim=1) / sample.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize(("dim", "aug_dim"), [(1, 1), (2, 1), (3, 1), (2, 2), (1, 64), (3, 64), (2, 1e7), (3, 1e7)])
def test_likelihood_is_exact(dim, aug_dim):
    data, low, high = points(4, dim), 0.3, 200.0
    x = data + 0.4 * points(4, dim, seed=1)
    scheduler = oracle(aug_dim=aug_dim, sigma_max=high)

    def log_mixture(x, sigma):
        """The density of the dataset at a noise level, from scipy."""
        law = stats.multivariate_t(np.zeros(dim), sigma**2 * np.eye(dim), df=aug_dim)
        return special.logsumexp([np.atleast_1d(law.logpdf(x.numpy() - y)) for y in data.numpy()], axis=0) - math.log(
            4
        )

    def denoise(x, sigma):
        return empirical_denoiser(x, data, sigma, aug_dim)

    options = {"rtol": 1e-10, "atol": 1e-10, "log_likelihood": True, "divergence": "exact"}
    latents, log_p = scheduler.integrate(denoise, x, low, high, **options)
    exact = log_mixture(x, low)
    growth = log_p - scheduler.log_prior(latents)
    # scipy's constant ln Gamma loses digits at D = 10^7, 10^-8 here; it is the same in both densities and cancels.
    np.testing.assert_allclose(growth.numpy() + log_mixture(latents, high), exact, rtol=0, atol=2e-9)
    np.testing.assert_allclose(log_p.numpy(), exact, rtol=0, atol=5e-3)
    samples, log_q = scheduler.integrate(denoise, latents, high, low, **options)
    torch.testing.assert_close(samples, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_q, log_p, rtol=0, atol=1e-6)


def test_hutchinson_is_unbiased():
    data, x = points(4, 6), points(1, 6, seed=1).expand(600, 6)
    scheduler = oracle(aug_dim=3, sigma_max=100.0)

    def log_likelihood(sample, divergence):
        return scheduler.integrate(
            lambda x, sigma: empirical_denoiser(x, data, sigma, 3),
            sample,
            0.3,
            100.0,
            log_likelihood=True,
            divergence=divergence,
            generator=torch.Generator().manual_seed(0),
        )[1]

    estimates = log_likelihood(x, "hutchinson")
    exact = log_likelihood(x[:1], "exact").item()
    error = estimates.std().item() / math.sqrt(600)
    assert estimates.std() > 0.01
    assert abs(estimates.mean().item() - exact) < 4 * error


def test_integration_reports_a_broken_denoiser():
    with pytest.raises(RuntimeError, match="not finite"):
        oracle().integrate(lambda x, sigma: x * math.nan, torch.ones(2, 3), 80.0, 0)
    with pytest.raises(ValueError, match="sigma_min"):
        oracle().integrate(lambda x, sigma: x, torch.ones(2, 3), 0.0, 80.0)
    with pytest.raises(ValueError, match="hutchinson"):
        oracle().integrate(lambda x, sigma: x, torch.ones(2, 3), 1.0, 80.0, log_likelihood=True, divergence="trace")


# Against diffusers' EDM schedulers and EDM's paper


def network(x, t):
    """Some smooth function of the scaled input and of the timestep."""
    return torch.sin(3 * x) * torch.cos(2 * t) + 0.2 * x.flip(-1)


@pytest.mark.parametrize(
    ("solver", "theirs"), [("euler", EDMEulerScheduler), ("dpmsolver++", EDMDPMSolverMultistepScheduler)]
)
@pytest.mark.parametrize("steps", [5, 18, 40])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_gaussian_limit_equals_diffusers(solver, theirs, steps, schedule):
    ours = PoissonFlowScheduler(aug_dim=None, solver_type=solver, sigma_schedule=schedule, sigma_max=60.0)
    theirs = theirs(sigma_schedule=schedule, sigma_max=60.0)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas.float(), theirs.sigmas.float(), rtol=5e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=2e-5, atol=1e-6)
    latents = ours.sample_noise((2, 3, 8), torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    results = []
    for scheduler in (ours, theirs):
        sample = latents
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(sample, t), t)
            sample = scheduler.step(output, t, sample).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_heun_equals_the_paper_s_algorithm():
    """EDM, algorithm 1, written out in float64."""
    scheduler = PoissonFlowScheduler(aug_dim=None, solver_type="heun")
    scheduler.set_timesteps(18)
    latents = points(2, 8, scale=80.0)

    def denoise(x, sigma):
        scaled = x / np.sqrt(sigma**2 + 0.25)
        output = network(scaled, torch.tensor(np.log(sigma) / 4))
        return 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / np.sqrt(sigma**2 + 0.25) * output

    ramp = np.arange(18) / 17
    grid = [*(80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), grid, rtol=1e-12)
    x = latents
    for sigma, following in itertools.pairwise(grid):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        x = (
            euler
            if following == 0
            else x + (following - sigma) / 2 * (slope + (euler - denoise(euler, following)) / following)
        )
    sample = latents
    for t in scheduler.timesteps:
        sample = scheduler.step(network(scheduler.scale_model_input(sample, t), t), t, sample).prev_sample
    torch.testing.assert_close(sample, x, rtol=0, atol=2e-5)  # the timesteps are float32


@pytest.mark.parametrize("gamma", [0.1, 5.0])
@pytest.mark.parametrize("aug_dim", [1, 16])
def test_a_field_network_is_a_denoiser(gamma, aug_dim):
    """The exact field, laid out as a network lays it out, gives the exact denoiser and the samples it gives."""
    data = points(5, 48).reshape(5, 3, 4, 4)
    field_scheduler = PoissonFlowScheduler(
        aug_dim=aug_dim, prediction_type="field", solver_type="heun", gamma=gamma, sigma_max=40.0
    )
    sample_scheduler = oracle(aug_dim=aug_dim, sigma_max=40.0)
    x = field_scheduler.sample_noise((6, 3, 4, 4), torch.Generator().manual_seed(0), dtype=torch.float64) * 40
    y = x
    field_scheduler.set_timesteps(12)
    sample_scheduler.set_timesteps(12)
    ripple = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t, sigma in zip(field_scheduler.timesteps, call_levels(field_scheduler).tolist(), strict=True):
        along_x, along_r = poisson_field(x, data, sigma, aug_dim, gamma)
        last = (along_r[:, None, None] + ripple - ripple.mean())[:, None]  # only its mean counts
        x = field_scheduler.step(torch.cat([along_x, last], dim=1), t, x).prev_sample
        y = sample_scheduler.step(empirical_denoiser(y, data, sigma, aug_dim), t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_substituted_component_is_the_published_rule():
    """Below `z_exp`: n = |f_x| / sqrt(N), e = gamma n / (1 - n), f_z = -sqrt(N) z / (sqrt(e^2 + z^2) + gamma)."""
    field, x, gamma = points(3, 40, scale=0.3).reshape(3, 10, 2, 2), points(3, 36, seed=1).reshape(3, 9, 2, 2), 5.0
    z = torch.tensor([0.3, 2.0, 20.0], dtype=torch.float64)
    flat, read = field[:, :9].flatten(1).numpy(), field[:, 9].mean(dim=(1, 2)).numpy()
    n = np.linalg.norm(flat, axis=1) / 6
    e = gamma * n / (1 - n)
    f_z = np.where(z.numpy() < 5, -6 * z.numpy() / (np.sqrt(e**2 + z.numpy() ** 2) + gamma), read)
    expected = x.flatten(1).numpy() - (z.numpy() / f_z)[:, None] * flat
    scheduler = PoissonFlowScheduler(aug_dim=1, prediction_type="field", z_exp=5.0)
    ours = scheduler.precondition_outputs(x, field, z)
    np.testing.assert_allclose(ours.flatten(1).numpy(), expected, rtol=1e-12)
    # On the exact field the rule is off by r^2 / (2 gamma |E_x|), little in many dimensions.
    data = points(4, 4096)
    x = data[:3] + 1.0 * oracle(aug_dim=64).sample_noise((3, 4096), torch.Generator().manual_seed(0)).double()
    along_x, along_r = poisson_field(x, data, 1.0, 1, gamma)
    exact, wrong = empirical_denoiser(x, data, 1.0, 1), torch.full_like(along_r, -123.0)
    ours = field_denoised(x, torch.cat([along_x, wrong[:, None]], dim=1), 1.0, gamma, substitute_below=5.0)
    size = (x - exact).norm(dim=1)
    torch.testing.assert_close((ours - exact).norm(dim=1) / size, 1 / (2 * gamma * size), rtol=0.1, atol=0)


# As a diffusers scheduler


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_equals_its_samples(solver):
    data = points(5, 12)
    scheduler = oracle(solver_type=solver, aug_dim=2)
    latents = scheduler.sample_noise((4, 12), torch.Generator().manual_seed(0), dtype=torch.float64) * 80

    def sample(x):
        scheduler.set_timesteps(9)
        return run(scheduler, lambda x, sigma: empirical_denoiser(x, data, sigma, 2), x)

    together = sample(latents)
    torch.testing.assert_close(together, torch.cat([sample(row[None]) for row in latents]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together, sample(latents), rtol=0, atol=0)  # nothing is left of the run before


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_can_begin_in_the_middle(solver):
    """With or without a begin index, a run equals a fresh one on the rest of the grid."""
    denoise, _ = gaussian_data(0.5)
    scheduler, rest = oracle(solver_type=solver), oracle(solver_type=solver)
    scheduler.set_timesteps(10)
    rest.set_timesteps(sigmas=scheduler.sigmas[4:])
    x = points(2, 3, scale=scheduler.sigmas[4].item())
    expected = run(rest, denoise, x)
    assert rest.num_inference_steps == 6
    first, levels = 4 * scheduler.order, call_levels(scheduler)
    for use_begin_index in (False, True):
        scheduler.set_timesteps(10)
        if use_begin_index:
            scheduler.set_begin_index(first)
        sample = x
        for t, sigma in zip(scheduler.timesteps[first:], levels[first:].tolist(), strict=True):
            sample = scheduler.step(denoise(sample, sigma), t, sample).prev_sample
        torch.testing.assert_close(sample, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("prediction", ["edm", "sample", "field"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_step_never_waits_for_the_device(solver, prediction):
    """Tensors on the meta device have no values: whatever asks for one raises."""
    scheduler = PoissonFlowScheduler(prediction_type=prediction, solver_type=solver, z_exp=1.0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps.to("meta"):
        scaled = scheduler.scale_model_input(sample, t)
        output = torch.cat([scaled, scaled[:, :1]], dim=1) if prediction == "field" else scaled
        sample = scheduler.step(output, t, sample).prev_sample
    assert sample.shape == (2, 3, 4, 4)


def test_config_round_trips(tmp_path):
    for aug_dim in (1, 0.5, None):
        scheduler = PoissonFlowScheduler(aug_dim=aug_dim, solver_type="heun", prior_radius_quantile=0.99)
        scheduler.save_pretrained(tmp_path)
        text = (tmp_path / "scheduler_config.json").read_text()
        assert "Infinity" not in text and json.loads(text)["aug_dim"] == aug_dim
        again = PoissonFlowScheduler.from_pretrained(tmp_path)
        config = dict(scheduler.config)
        config.pop("_use_default_values")
        assert again.config == config
        assert PoissonFlowScheduler.from_config(scheduler.config).config.aug_dim == aug_dim


@pytest.mark.parametrize("edm", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_config_to_and_from_diffusers(edm, tmp_path):
    theirs = edm(sigma_min=0.01, sigma_max=30.0, rho=5.0, sigma_data=0.8)
    theirs.save_pretrained(tmp_path)  # a saved configuration names every option, defaults too
    for ours in (
        PoissonFlowScheduler.from_config(theirs.config, aug_dim=None),
        PoissonFlowScheduler.from_pretrained(tmp_path, aug_dim=None),
    ):
        assert (ours.config.sigma_min, ours.config.sigma_max, ours.config.rho) == (0.01, 30.0, 5.0)
        assert (ours.config.sigma_data, ours.config.prediction_type, ours.config.aug_dim) == (0.8, "edm", None)
    options = {"solver_type": "midpoint"} if edm is EDMDPMSolverMultistepScheduler else {}
    back = edm.from_config(ours.config, prediction_type="epsilon", **options)
    ours.set_timesteps(7)
    back.set_timesteps(7)
    torch.testing.assert_close(back.sigmas.double(), ours.sigmas, rtol=2e-5, atol=0)
    assert PoissonFlowScheduler.from_config(PoissonFlowScheduler(aug_dim=3).config).config.aug_dim == 3
    default = PoissonFlowScheduler()
    there = edm.from_config(default.config)
    config = PoissonFlowScheduler.from_config(there.config).config
    assert {k: config[k] for k in inspect.signature(PoissonFlowScheduler).parameters} == {
        k: default.config[k] for k in inspect.signature(PoissonFlowScheduler).parameters
    }


def test_compatible_classes_keep_a_saved_configuration(tmp_path):
    """As diffusers' own test of compatibles, with every option explicit."""
    PoissonFlowScheduler(aug_dim=7, solver_type="rk45", prediction_type="sample", z_exp=1.0).save_pretrained(tmp_path)
    scheduler = PoissonFlowScheduler.from_pretrained(tmp_path)
    assert scheduler.compatibles == [EDMEulerScheduler]
    for other in scheduler.compatibles:
        assert PoissonFlowScheduler.from_config(other.from_config(scheduler.config).config).config == scheduler.config


def test_interface_of_a_scheduler():
    scheduler = PoissonFlowScheduler()
    assert len(scheduler) == 1000 and len(scheduler.timesteps) == 1000
    assert scheduler.init_noise_sigma == 80.0
    sample = torch.randn(2, 3, 4, 4)
    assert scheduler.scale_model_input(sample, 0.0).shape == sample.shape  # any timestep will do, here sigma = 1
    torch.testing.assert_close(scheduler.scale_model_input(sample, 0.0), sample / math.sqrt(1.25))
    scheduler.set_timesteps(10)
    grid = scheduler.sigmas.clone()
    for count in (5, 10):
        scheduler.set_timesteps(count)
    assert torch.equal(scheduler.sigmas, grid) and scheduler.sigmas.dtype == torch.float64
    assert (grid[0], grid[-2], grid[-1]) == (80.0, 0.002, 0.0)
    t = scheduler.timesteps[0]
    as_object = scheduler.step(sample, t, sample)
    scheduler.set_timesteps(10)
    as_tuple = scheduler.step(sample, t, sample, return_dict=False)
    assert torch.equal(as_tuple[0], as_object.prev_sample)
    assert torch.equal(as_tuple[1], as_object.pred_original_sample)
    half = sample.half()
    scheduler.set_timesteps(10)
    assert scheduler.step(half, t, half).prev_sample.dtype == torch.float16
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.1, 0.0])
    assert scheduler.init_noise_sigma == 10.0 and len(scheduler.timesteps) == 3
    scheduler.set_timesteps(1)
    assert scheduler.sigmas.tolist() == [80.0, 0.0]


def test_errors_name_value_and_remedy():
    for option, message in (
        ({"aug_dim": 0}, r"`aug_dim` is 0: .* None"),
        ({"aug_dim": math.inf}, "None for the limit"),
        ({"aug_dim": None, "prediction_type": "field"}, "needs a finite `aug_dim`"),
        ({"solver_type": "rk4"}, "'rk4': it must be one of euler, heun"),
        ({"prediction_type": "v_prediction"}, "'v_prediction': it must be one of edm"),
        ({"sigma_schedule": "linear"}, "'linear': it must be one of karras"),
        ({"sigma_min": 90.0}, "90.0"),
        ({"prior_radius_quantile": 1.5}, "1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            PoissonFlowScheduler(**option)
    scheduler, x = oracle(), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="before `set_timesteps`"):
        scheduler.step(x, scheduler.timesteps[0], x)
    for arguments in ({}, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}):
        with pytest.raises(ValueError, match="either"):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ValueError, match="must be positive and decrease"):
        scheduler.set_timesteps(sigmas=[1.0, 2.0])
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="not one of"):
        scheduler.step(x, 7.0, x)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="inside a step"):
        scheduler.step(x, scheduler.timesteps[1], x)
    scheduler.set_timesteps(1)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="are done"):
        scheduler.step(x, scheduler.timesteps[0], x)


@needs_golden
@pytest.mark.parametrize("case", ["pfgmpp_song_ddpmpp", "pfgmpp_song_ncsnpp"])
def test_grid_of_the_original_pfgmpp(case):
    from safetensors.torch import load_file

    golden = load_file(Path(GOLDEN) / case / "io.safetensors")
    scheduler = PoissonFlowScheduler(aug_dim=128, solver_type="heun")
    scheduler.set_timesteps(18)
    torch.testing.assert_close(scheduler.sigmas, golden["heun18_sigmas"], rtol=1e-12, atol=0)


@needs_golden
@pytest.mark.parametrize("case", "abcde")
def test_loss_weight_of_the_original(case):
    golden = np.load(Path(GOLDEN) / "pfgmpp_math" / f"case_{case}.npz")
    sigma = torch.from_numpy(golden["sigma"]).double()
    clean = torch.from_numpy(golden["images"][: int(golden["small_batch_size"])]).double()
    scheduler = PoissonFlowScheduler(sigma_data=float(golden["sigma_data"]))
    loss = scheduler.loss_weight(sigma).reshape(-1, 1, 1, 1) * clean**2
    np.testing.assert_allclose(loss.numpy(), golden["loss_of_zero_denoiser"], rtol=1e-5)


@needs_golden
@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_prior_radii_of_the_original_pfgm(case):
    """Their unclipped radii, drawn through a Beta law, are draws of our density: probability integral transform."""
    golden = np.load(Path(GOLDEN) / "pfgm_prior" / f"case_{case}.npz")
    dim, z_max = int(golden["data_dim"]), float(golden["z_max"])
    assert stats.kstest((golden["radius_unclipped"] / z_max) ** 2 / dim, stats.f(dim, 1).cdf).pvalue > 0.01
    # The density itself, integrated numerically over the spheres up to each radius, gives the same probabilities.
    radius = z_max * np.logspace(-3, 5, 20_001) * math.sqrt(dim)
    log_density = (
        student_t_log_density(torch.from_numpy(np.outer(radius, np.eye(1, dim)[0])), z_max, 1.0).numpy()
        + (dim - 1) * np.log(radius)
        + math.log(2)
        + dim / 2 * math.log(math.pi)
        - math.lgamma(dim / 2)
    )
    cumulative = np.concatenate(
        [
            [0],
            np.cumsum(
                np.diff(np.log(radius))
                * (np.exp(log_density[1:]) * radius[1:] + np.exp(log_density[:-1]) * radius[:-1])
                / 2
            ),
        ]
    )
    ours = np.interp(golden["radius_unclipped"], radius, cumulative)
    np.testing.assert_allclose(
        ours, golden["beta_draw"] * 0 + stats.f(dim, 1).cdf((golden["radius_unclipped"] / z_max) ** 2 / dim), atol=1e-4
    )
