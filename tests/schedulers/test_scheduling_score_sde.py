import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from scipy import stats

import tonefield.schedulers.scheduling_poisson_flow as poisson_flow
import tonefield.schedulers.scheduling_score_sde as score_sde
from tonefield.schedulers import ScoreSDEScheduler
from tonefield.schedulers.scheduling_score_sde import (
    euler_maruyama,
    langevin_step,
    langevin_step_size,
    predictor_step,
    probability_flow,
)


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")
SDES = ("ve", "vp", "subvp")


def gaussian_variance(scheduler, time, spread):
    """Variance at a time of data N(0, spread^2)."""
    mean, std = scheduler.equation.marginal(torch.as_tensor(time, dtype=torch.float64))
    return mean**2 * spread**2 + std**2


def run(scheduler, spread, sample, generator=None, calls=None):
    """The diffusers loop with the exact score of data N(0, spread^2)."""
    times = scheduler._call_times
    torch.testing.assert_close(scheduler.timesteps, scheduler.timestep_of(times).float())
    for t, time in list(zip(scheduler.timesteps, times, strict=True))[:calls]:
        score = -sample / gaussian_variance(scheduler, time, spread)
        sample = scheduler.step(score, t, sample, generator).prev_sample
    return sample


@pytest.mark.parametrize("sde", SDES)
def test_marginals_solve_their_moment_equations(sde):
    """d mean / dt = a mean and d var / dt = 2 a var + g^2, by automatic differentiation of the marginals."""
    equation = ScoreSDEScheduler(sde).equation
    t = torch.linspace(0.01, 1, 37, dtype=torch.float64, requires_grad=True)
    mean, std = equation.marginal(t)
    drift, diffusion = equation.coefficients(t.detach())
    (mean_rate,) = torch.autograd.grad(mean.sum() + 0 * t.sum(), t, retain_graph=True)
    (variance_rate,) = torch.autograd.grad(std.square().sum(), t)
    mean, variance = mean.detach(), std.detach() ** 2
    torch.testing.assert_close(mean_rate, drift * mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance_rate, 2 * drift * variance + diffusion**2, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize(("solver", "order", "steps"), [("euler", 1, 400), ("heun", 2, 200), ("rk45", 5, 40)])
def test_order_of_each_ode_solver(sde, solver, order, steps):
    # Spreads for which the leading error terms do not happen to cancel at these step sizes.
    errors, spread = [], 0.5 if sde == "ve" else 2.0
    for count in (steps, 2 * steps):
        scheduler = ScoreSDEScheduler(sde, solver_type=solver, prediction_type="score", sampling_eps=0.1, sigma_max=5)
        scheduler.set_timesteps(count + 1)
        start = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
        final = run(scheduler, spread, start, calls=-1)
        exact = start * (gaussian_variance(scheduler, 0.1, spread) / gaussian_variance(scheduler, 1.0, spread)).sqrt()
        errors.append((final / exact - 1).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("sde", SDES)
def test_ode_ends_with_the_posterior_mean(sde):
    scheduler = ScoreSDEScheduler(sde, solver_type="euler", prediction_type="score")
    scheduler.set_timesteps(20)
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    scheduler.set_begin_index(19)
    variance = gaussian_variance(scheduler, scheduler.config.sampling_eps, 0.5)
    mean, _ = scheduler.equation.marginal(scheduler.times[-1])
    denoised = scheduler.step(-x / variance, scheduler.timesteps[-1], x).prev_sample
    torch.testing.assert_close(denoised, mean * 0.25 / variance * x, rtol=1e-10, atol=0)  # E[x0 | x] of two Gaussians


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize(
    ("predictor", "corrector", "snr"),
    [
        ("reverse_diffusion", "none", 0.16),
        ("euler_maruyama", "none", 0.16),
        ("reverse_diffusion", "langevin", 0.1),
        ("none", "ald", 0.1),
    ],
)
def test_predictor_and_corrector_sample_the_data(sde, predictor, corrector, snr):
    """
    With the linear score -x / V every call maps a variance v to gain^2 v + noise^2: what the whole run should give is
    known without sampling, and close to the data where there is a predictor.
    """
    spread, steps, dim = 0.5, 500, 1000  # Langevin steps from the norms of one sample are biased by 1 / dim
    scheduler = ScoreSDEScheduler(
        sde, prediction_type="score", predictor=predictor, corrector=corrector, snr=snr, sigma_max=10.0
    )
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps * (1 if corrector == "none" else 2)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, dim, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    final = run(scheduler, spread, start, generator)

    equation, variance = scheduler.equation, scheduler.init_noise_sigma**2
    for time in torch.linspace(1, 1e-3, steps, dtype=torch.float64):
        exact = gaussian_variance(scheduler, time, spread).item()
        (drift, diffusion), (_, std) = equation.coefficients(time), equation.marginal(time)
        if corrector != "none":
            alpha = (
                1 if sde == "ve" else 1 - equation.beta(torch.floor(time * (steps - 1)) / (steps - 1)).item() / steps
            )
            size = 2 * alpha * snr**2 * (std.item() ** 2 if corrector == "ald" else exact**2 / variance)
            variance = (1 - size / exact) ** 2 * variance + 2 * size
        if predictor == "euler_maruyama":
            drift, diffusion = drift / steps, diffusion / math.sqrt(steps)
        elif predictor == "reverse_diffusion":
            drift, diffusion = equation.discretised(time, steps)
        else:
            drift = diffusion = torch.zeros(())
        mean_variance = (1 - drift.item() - diffusion.item() ** 2 / exact) ** 2 * variance
        variance = mean_variance + diffusion.item() ** 2
    assert final.std().item() == pytest.approx(math.sqrt(mean_variance), rel=0.015)
    if predictor != "none":
        assert final.std().item() == pytest.approx(spread, rel=0.06)
        assert stats.kstest(final[:, ::4].flatten().numpy() / final.std().item(), "norm").pvalue > 0.01


def test_only_the_last_call_adds_no_noise():
    scheduler, sample = ScoreSDEScheduler("subvp", corrector="langevin"), torch.ones(1, 8)
    scheduler.set_timesteps(25)
    quiet = []
    for t in scheduler.timesteps:
        output = scheduler.step(torch.ones(1, 8), t, sample)
        quiet.append(torch.equal(output.prev_sample, output.prev_sample_mean))
        sample = output.prev_sample
    assert quiet == [False] * 49 + [True]


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama"])
@pytest.mark.parametrize("sde", SDES)
def test_predictor_error_vanishes_with_the_step(sde, predictor):
    """
    With a linear score one step maps variance v to (1 - a - g^2 / V)^2 v + g^2: the variance of the whole run follows
    without sampling, and tends to the data's at first order.
    """
    spread, errors = 0.5, []
    for steps in (1000, 2000):
        scheduler = ScoreSDEScheduler(sde, sigma_max=10.0, sampling_eps=1e-4)
        times = torch.linspace(1, 1e-4, steps, dtype=torch.float64)
        variance = gaussian_variance(scheduler, 1.0, spread)
        for time in times[: -steps // 4]:
            if predictor == "euler_maruyama":
                drift, diffusion = euler_maruyama(*scheduler.equation.coefficients(time), 1 / steps)
            else:
                drift, diffusion = scheduler.equation.discretised(time, steps)
            one = torch.ones((), dtype=torch.float64)
            gain = predictor_step(one, -one / gaussian_variance(scheduler, time, spread), drift, diffusion, 0 * one)[1]
            variance = gain**2 * variance + diffusion**2
        errors.append((variance / gaussian_variance(scheduler, times[-steps // 4], spread) - 1).abs().item())
    assert errors[0] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("sde", SDES)
def test_likelihood_of_gaussian_data(sde):
    scheduler, spread, eps = ScoreSDEScheduler(sde), 0.7, 1e-3
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread

    def score(x, time):
        return -x / gaussian_variance(scheduler, time, spread)[:, None]

    def log_normal(x, time):
        return stats.norm(scale=gaussian_variance(scheduler, time, spread).sqrt().item()).logpdf(x.numpy()).sum(1)

    options = {"rtol": 1e-10, "atol": 1e-10, "log_likelihood": True}
    latents, log_p = scheduler.integrate(score, x, eps, 1.0, divergence="exact", **options)
    growth = (log_p - scheduler.log_prior(latents)).numpy()
    np.testing.assert_allclose(growth + log_normal(latents, 1.0), log_normal(x, eps), rtol=0, atol=1e-7)
    np.testing.assert_allclose(log_p.numpy(), log_normal(x, eps), rtol=0, atol=1e-3)
    # The velocity is a multiple of x, of which a probe of signs gives the trace without error.
    torch.testing.assert_close(scheduler.integrate(score, x, eps, 1.0, **options)[1], log_p, rtol=0, atol=1e-8)
    back, log_q = scheduler.integrate(score, latents, 1.0, eps, divergence="exact", **options)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_q, log_p, rtol=0, atol=1e-6)


def test_variance_exploding_equals_diffusers():
    """Predictor and Langevin corrector against ScoreSdeVeScheduler, one sample (it averages norms over a batch)."""
    config = {"num_train_timesteps": 200, "snr": 0.15, "sigma_max": 50.0, "sigma_min": 0.01, "sampling_eps": 1e-5}
    ours = ScoreSDEScheduler("ve", prediction_type="score", corrector="langevin", **config)
    theirs = ScoreSdeVeScheduler(**config)
    ours.set_timesteps(200)
    theirs.set_timesteps(200)
    theirs.set_sigmas(200)

    def network(x):
        return 0.4 * torch.sin(x) - 0.2 * x

    x = y = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for index, t in enumerate(theirs.timesteps[:-1]):
        for call in range(2):
            output = ours.step(network(x), ours.timesteps[2 * index + call], x, first)
            x = output.prev_sample
        y = theirs.step_correct(network(y), y, generator=second).prev_sample
        y = theirs.step_pred(network(y), t, y, generator=second).prev_sample
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize(
    "options",
    [
        {"corrector": "langevin"},
        {"corrector": "ald", "correct_steps": 2},
        {"solver_type": "heun"},
        {"solver_type": "rk45"},
    ],
)
def test_a_batch_equals_its_samples(sde, options):
    scheduler = ScoreSDEScheduler(sde, **options)
    start = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start * scheduler.init_noise_sigma

    def sample(x, seeds):
        scheduler.set_timesteps(25)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generators).prev_sample
        return x

    together = sample(start, (5, 6, 7))
    alone = [sample(start[i : i + 1], (5 + i,)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["pc", "heun", "rk45"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_step_never_waits_for_the_device(solver, corrector):
    """Tensors on the meta device have no values: whatever asks for one raises."""
    scheduler = ScoreSDEScheduler("subvp", solver_type=solver, corrector=corrector)
    scheduler.set_timesteps(22)
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps.to("meta"):
        sample = scheduler.step(sample, t, sample).prev_sample
    assert sample.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("sde", SDES)
def test_add_noise_and_labels(sde):
    scheduler = ScoreSDEScheduler(sde)
    time = torch.tensor([0.02, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(scheduler.time_of(scheduler.timestep_of(time)), time, rtol=1e-12, atol=0)
    clean, noise = torch.ones(3, 4, dtype=torch.float64), torch.full((3, 4), 2.0, dtype=torch.float64)
    noisy = scheduler.add_noise(clean, noise, scheduler.timestep_of(time))
    beta = 0.1 * time + 19.9 * time**2 / 2  # the integral of beta(t)
    mean, std = {
        "ve": (torch.ones(3), 0.01 * 5000**time),
        "vp": ((-beta / 2).exp(), (1 - (-beta).exp()).sqrt()),
        "subvp": ((-beta / 2).exp(), 1 - (-beta).exp()),
    }[sde]
    torch.testing.assert_close(noisy, (mean + 2 * std)[:, None].expand(3, 4), rtol=1e-10, atol=0)
    law = stats.norm(scale=scheduler.init_noise_sigma)
    np.testing.assert_allclose(scheduler.log_prior(noisy).numpy(), law.logpdf(noisy.numpy()).sum(1), rtol=1e-12)


def test_copied_constants_are_copies():
    for name in ("RK_NODES", "RK_STAGES", "RK_ERROR"):
        assert getattr(score_sde, name) == getattr(poisson_flow, name)


def test_config_round_trips_and_errors(tmp_path):
    scheduler = ScoreSDEScheduler("subvp", corrector="ald", correct_steps=3)
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    config.pop("_use_default_values")
    assert ScoreSDEScheduler.from_pretrained(tmp_path).config == config
    assert scheduler.order == 4
    ve = ScoreSDEScheduler.from_config(ScoreSdeVeScheduler(sigma_max=90.0).config, sde="ve", prediction_type="score")
    assert (ve.config.sigma_max, ve.init_noise_sigma) == (90.0, 90.0)
    saved = ScoreSDEScheduler.from_pretrained(tmp_path)
    assert ScoreSDEScheduler.from_config(ScoreSdeVeScheduler.from_config(saved.config).config).config == saved.config
    for option, message in (
        ({"sde": "v"}, "'v': it must be one of ve, vp, subvp"),
        ({"predictor": "ancestral"}, "'ancestral': it must be one of reverse_diffusion"),
        ({"corrector": "hmc"}, "'hmc': it must be one of none, langevin"),
        ({"solver_type": "rk4"}, "'rk4'"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreSDEScheduler(**option)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="before `set_timesteps`"):
        scheduler.step(x, 0.0, x)
    with pytest.raises(ValueError, match=r"is 20: it must be at least 21"):
        ScoreSDEScheduler("vp").set_timesteps(20)
    scheduler.set_timesteps(30)
    with pytest.raises(ValueError, match="not one of"):
        scheduler.step(x, -3.0, x)


@needs_golden
@pytest.mark.parametrize("sde", SDES)
def test_against_the_original(sde):
    golden = {k: torch.from_numpy(v) for k, v in np.load(Path(GOLDEN) / "score_sde" / f"{sde}.npz").items()}
    limits = {k: golden[k].item() for k in ("sigma_min", "sigma_max", "beta_min", "beta_max") if k in golden}
    scheduler = ScoreSDEScheduler(sde, num_train_timesteps=golden["num_scales"].item(), **limits)
    equation, t, x, score = scheduler.equation, golden["t"], golden["x"], golden["score"]
    steps, snr = golden["num_scales"].item(), golden["snr"].item()

    def wide(value):
        return value.reshape(-1, 1, 1, 1)

    def check(ours, key):
        torch.testing.assert_close(ours, golden[key], rtol=1e-10, atol=1e-12, msg=lambda m: f"{key}: {m}")

    mean, std = equation.marginal(t)
    check(wide(mean) * golden["x0"], "marginal_mean")
    check(std, "marginal_std")
    check(scheduler.timestep_of(t), "network_label")
    drift, diffusion = equation.coefficients(t)
    check(wide(drift) * x, "drift")
    check(diffusion, "diffusion")
    # The original's drift in continuous time contains a float32 evaluation of the network.
    ours = probability_flow(x, score, wide(drift), wide(diffusion))
    torch.testing.assert_close(ours, golden["reverse_drift_ode"], rtol=5e-6, atol=1e-6)
    a, g = equation.discretised(t, steps)
    check(wide(a) * x, "discrete_f")
    check(probability_flow(x, score, wide(a), wide(g)), "reverse_f_ode")
    check(g, "discrete_G")
    check(scheduler.log_prior(x), "prior_logp")
    moved, moved_mean = predictor_step(x, score, wide(a), wide(g), golden["noise"])
    check(moved_mean, "predictor_x_mean")
    check(moved, "predictor_x")
    if "langevin_x" not in golden:
        return
    alpha = equation.langevin_scale(t, steps)
    # The original averages the norms over the batch; the scheduler takes those of each sample.
    norms = [value.flatten(1).norm(dim=1).mean() for value in (golden["noise"], score)]
    moved, moved_mean = langevin_step(x, score, wide(langevin_step_size(snr, *norms, alpha)), golden["noise"])
    check(moved_mean, "langevin_x_mean")
    check(moved, "langevin_x")
    moved, moved_mean = langevin_step(x, score, wide(langevin_step_size(snr, std, 1.0, alpha)), golden["noise"])
    check(moved_mean, "annealed_langevin_x_mean")
    check(moved, "annealed_langevin_x")
