import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

from tonefield.schedulers import PoissonFlowScheduler, empirical_denoiser, pfgm_hyperparameters, poisson_field
from tonefield.schedulers.poisson_field import posterior_weights, squared_distances


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")


def naive_weights(x, data, sigma, aug_dim):
    """Pair by pair in float64, straight from the kernel's formula."""
    rows = []
    for point, level in zip(x, np.broadcast_to(sigma, len(x)), strict=True):
        squares = np.array([np.sum((point - y) ** 2) for y in data])
        if aug_dim is None:
            logits = -squares / (2 * level**2)
        else:
            logits = -(x.shape[1] + aug_dim) / 2 * np.log1p(squares / (aug_dim * level**2))
        rows.append(np.exp(logits - special.logsumexp(logits)))
    return np.array(rows)


def near_duplicates(dim=16384, count=12, gap=0.02, radius=1.28):
    """Points a hair apart and samples at a radius where several of them matter."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=dim) * 0.5
    offsets = rng.normal(size=(count, dim))
    data = centre + gap * offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    directions = rng.normal(size=(4, dim))
    x = data[:4] + radius * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return x, data, radius / math.sqrt(dim)


def total_variation(a, b):
    return np.abs(a - b).sum(axis=1).max() / 2


def weights_of(x, data, sigma, aug_dim):
    x, data = torch.from_numpy(x), torch.from_numpy(data)
    sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
    return posterior_weights(squared_distances(x, data), sigma, aug_dim, x.shape[1]).numpy()


@pytest.mark.parametrize("aug_dim", [1, 3.5, 64, 1e6, None])
def test_denoiser_is_the_kernel_weighted_mean(aug_dim):
    rng = np.random.default_rng(1)
    data, sigma = rng.normal(size=(9, 6)), np.array([0.05, 0.7, 3.0, 40.0])
    x = data[:4] + sigma[:, None] * rng.standard_t(3, size=(4, 6))
    expected = naive_weights(x, data, sigma, aug_dim) @ data
    ours = empirical_denoiser(torch.from_numpy(x), torch.from_numpy(data), torch.from_numpy(sigma), aug_dim)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("aug_dim", [1, 2.5])
def test_denoiser_is_the_posterior_mean_by_quadrature(aug_dim):
    """Two points on a line against Bayes' rule with scipy's Student-t density: independent of the kernel's formula."""
    data, sigma, x = np.array([-1.0, 1.0]), 0.8, np.array([-2.0, 0.1, 9.0])
    density = np.array([stats.t(aug_dim, loc=y, scale=sigma).pdf(x) for y in data])
    ours = empirical_denoiser(torch.tensor(x)[:, None], torch.tensor(data)[:, None], sigma, aug_dim)
    np.testing.assert_allclose(ours[:, 0].numpy(), data @ density / density.sum(0), atol=1e-14)


@pytest.mark.parametrize("aug_dim", [1, 128, 1e10, None])
def test_exact_on_near_duplicates_where_float32_fails(aug_dim):
    x, data, sigma = near_duplicates()
    expected = naive_weights(x, data, sigma, aug_dim)
    assert expected.max() < 0.9  # several points matter
    assert total_variation(weights_of(x, data, sigma, aug_dim), expected) <= 1e-10

    xf, yf = torch.from_numpy(x).float(), torch.from_numpy(data).float()
    squares = (xf.square().sum(1, keepdim=True) + yf.square().sum(1) - 2 * xf @ yf.T).clamp(min=0)
    radius = float("inf") if aug_dim is None else aug_dim * sigma**2
    logits = -squares / (2 * sigma**2) if aug_dim is None else -(x.shape[1] + aug_dim) / 2 * (squares / radius).log1p()
    assert total_variation(logits.softmax(1).numpy(), expected) > (0.5 if aug_dim != 1 else 0.2)


def test_limit_of_many_augmented_dimensions():
    rng = np.random.default_rng(2)
    data, x = torch.from_numpy(rng.normal(size=(7, 8))), torch.from_numpy(rng.normal(size=(5, 8)))
    gaussian = empirical_denoiser(x, data, 0.9, None)
    gaps = {d: (empirical_denoiser(x, data, 0.9, d) - gaussian).abs().max().item() for d in (128, 2048, 1e6, 1e10)}
    assert gaps[1e10] <= 1e-9
    for small, large in ((128, 2048), (2048, 1e6)):  # the gap closes as 1 / D
        assert gaps[small] / gaps[large] == pytest.approx(large / small, rel=0.1)


def test_extremes_stay_finite_and_right():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(6, 200_000, generator=generator)
    on_a_point = empirical_denoiser(data[2:3], data, 0.0, 1)
    torch.testing.assert_close(on_a_point, data[2:3], rtol=0, atol=0)
    for aug_dim in (1, 1e10, None):
        for sigma in (0.0, 1e-300, 1e-8, 1.0):
            nearest = empirical_denoiser(data[:2] + 1e-3, data, sigma, aug_dim)
            torch.testing.assert_close(nearest, data[:2], rtol=0, atol=1e-6)
        far = empirical_denoiser(data[:1] * 1e6, data, 1e6, aug_dim)
        assert far.isfinite().all()
    doubled = torch.cat([data[:2], data[:2]])  # coincident points share their weight
    torch.testing.assert_close(empirical_denoiser(data[:2], doubled, 1e-6, 1), data[:2], rtol=0, atol=1e-6)


def test_field_of_a_single_charge_and_identities():
    rng = np.random.default_rng(3)
    data, x = torch.from_numpy(rng.normal(size=(5, 2, 3, 4))), torch.from_numpy(rng.normal(size=(6, 2, 3, 4)))
    sigma, aug_dim, gamma = torch.from_numpy(rng.uniform(0.1, 30, size=6)), 7.0, 5.0
    radius, root_n = sigma * math.sqrt(aug_dim), math.sqrt(24)
    field_x, field_r = poisson_field(x, data, sigma, aug_dim, gamma)
    flat = field_x.flatten(1)
    assert (flat.square().sum(1) + field_r**2 < 24).all()
    direction = (x - empirical_denoiser(x, data, sigma, aug_dim)).flatten(1)
    torch.testing.assert_close(flat / field_r[:, None], direction / radius[:, None], rtol=1e-13, atol=2e-15)
    norm = torch.sqrt(direction.square().sum(1) + radius**2)
    torch.testing.assert_close(field_r * (norm + gamma), -root_n * radius, rtol=1e-14, atol=0)
    # |E_x| from |f_x| alone, the inverse of the normalisation: with s = sqrt(N) / |f_x|,
    # e = (gamma s + sqrt(gamma^2 + (s^2 - 1) r^2)) / (s^2 - 1).
    s = root_n / flat.norm(dim=1)
    e = (gamma * s + torch.sqrt(gamma**2 + (s**2 - 1) * radius**2)) / (s**2 - 1)
    torch.testing.assert_close(e, direction.norm(dim=1), rtol=1e-12, atol=0)

    alone_x, alone_r = poisson_field(x, data[:1], sigma, 1, 0.0)
    away = torch.cat([(x - data[:1]).flatten(1), sigma[:, None]], dim=1)
    expected = -root_n * away / away.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cat([alone_x.flatten(1), alone_r[:, None]], 1), expected, rtol=1e-13, atol=1e-14)


def test_field_is_the_gradient_of_the_potential():
    """In N + D = 3 dimensions the field of point charges is -grad of sum 1 / distance; here N = 2, D = 1."""
    data = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    at = torch.tensor([0.7, 0.2, 0.6], dtype=torch.float64, requires_grad=True)
    charges = torch.cat([data, torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    (gradient,) = torch.autograd.grad((1 / (at - charges).norm(dim=1)).sum(), at)
    field_x, field_r = poisson_field(at[None, :2].detach(), data, 0.6, 1, 0.0)
    ours = torch.cat([field_x[0], field_r])
    torch.testing.assert_close(ours / ours.norm(), gradient / gradient.norm(), rtol=1e-13, atol=1e-14)


def test_chunks_do_not_change_the_result(monkeypatch):
    import sys

    module = sys.modules[empirical_denoiser.__module__]
    generator = torch.Generator().manual_seed(0)
    data, x = torch.randn(50, 8, generator=generator), torch.randn(3, 8, generator=generator)
    whole = empirical_denoiser(x, data, 0.7, 3)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 56)
    torch.testing.assert_close(empirical_denoiser(x, data, 0.7, 3), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("norm", "dim", "m", "z_max", "upper"),
    [(30, 3072, 287, 38.568, 2679.13)],
)
def test_hyperparameters(norm, dim, m, z_max, upper):
    ours = pfgm_hyperparameters(norm, dim)
    assert ours[0] == m
    assert ours[1:] == (pytest.approx(z_max, rel=1e-5), pytest.approx(upper, rel=1e-5))


@pytest.mark.parametrize(
    ("m", "dim", "z_max", "upper"),
    [
        (291, 3072, 43.41, 3015.4),
        (291, 12288, 43.41, 6030.8),
        (293, 16384, 46.05, 7387.8),
        (268, 4096, 21.99, 1764.2),
        (356, 196608, 296.5, 164760),
        (377, 16000, 551.5, 87437),
    ],
)
def test_hyperparameters_of_published_recipes(m, dim, z_max, upper):
    # A data norm in the middle of those that lead to this M.
    norm = math.sqrt(2 * math.sqrt(dim) * 1e-4 * math.exp((m - 0.5) * math.log(1.03) / 0.75))
    ours = pfgm_hyperparameters(norm, dim)
    assert ours[0] == m
    assert ours[1:] == (pytest.approx(z_max, rel=5e-4), pytest.approx(upper, rel=5e-4))


def test_regression_on_the_noise_law_finds_the_denoiser():
    """E[y | x] by Monte Carlo over the noise that the sampler draws (2 points in one dimension, D = 1)."""
    generator = torch.Generator().manual_seed(0)
    n, sigma = 2_000_000, 1.0
    clean = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    noise = PoissonFlowScheduler(aug_dim=1).sample_noise((n, 1), generator=generator, dtype=torch.float64)
    x = clean + sigma * noise
    for at, exact in ((2.0, 0.6667), (10.0, 0.196)):
        near = (x - at).abs() < 0.02 * at
        mean, error = clean[near].mean().item(), clean[near].std().item() / math.sqrt(near.sum().item())
        formula = empirical_denoiser(torch.tensor([[at]]), torch.tensor([[-1.0], [1.0]]), sigma, 1).item()
        assert formula == pytest.approx(exact, abs=2e-3)
        assert abs(mean - formula) < 4 * error and error < 0.02


def test_errors_name_value_and_remedy():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"`aug_dim` is -1: .* None"):
        empirical_denoiser(x, x, 1.0, -1)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        empirical_denoiser(x, torch.zeros(5, 4), 1.0, 1)
    with pytest.raises(ValueError, match="finite D"):
        poisson_field(x, x, 1.0, None, 5.0)


@needs_golden
@pytest.mark.parametrize("case", ["case_a", "case_b", "case_c", "case_d", "mixing_a", "mixing_b", "mixing_c"])
def test_pfgm_targets_of_the_original(case):
    golden = np.load(Path(GOLDEN) / "pfgm_field" / f"{case}.npz")
    x, data, z = (torch.from_numpy(golden[key]).double() for key in ("perturbed_x", "batch", "z"))
    field_x, field_z = poisson_field(x, data, z, 1, float(golden["gamma"]))
    np.testing.assert_allclose(field_x.numpy(), golden["target_x_float64"], atol=1e-9)
    np.testing.assert_allclose(field_z.numpy(), golden["target_z_float64"], atol=1e-9)


@needs_golden
@pytest.mark.parametrize("case", "abcde")
def test_pfgmpp_posterior_means_of_the_original(case):
    golden = np.load(Path(GOLDEN) / "pfgmpp_math" / f"case_{case}.npz")
    data = torch.from_numpy(golden["images"]).double()
    for points, prefix in (("perturbed", ""), ("mixing_x", "mixing_")):
        x, sigma = (torch.from_numpy(golden[key]).double() for key in (points, f"{prefix}sigma"))
        ours = empirical_denoiser(x, data, sigma, float(golden["D"])).flatten(1).numpy()
        np.testing.assert_allclose(ours, golden[f"{prefix}posterior_mean_float64"], atol=1e-12)
        ours = empirical_denoiser(x, data, sigma, None).flatten(1).numpy()
        np.testing.assert_allclose(ours, golden[f"{prefix}gaussian_posterior_mean"], atol=1e-5)


@needs_golden
def test_hyperparameters_of_the_original():
    for row in json.loads((Path(GOLDEN) / "pfgm_hyperparameters" / "table.json").read_text())["poisson_flow"]:
        ours = pfgm_hyperparameters(row["data_norm"], row["data_dim"], row["sigma"], row["tau"])
        assert ours[0] == row["M"]
        assert ours[1:] == (pytest.approx(row["z_max"], rel=1e-12), pytest.approx(row["upper_norm"], rel=1e-12))
