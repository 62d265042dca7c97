"""Distances against closed forms, oracles, brute force and simulation."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from tonefield.evaluation.statistics import (
    GaussianStats,
    effective_rows,
    frechet_bootstrap,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    frechet_per_clip,
    gaussian_kernel,
    kernel_distance,
    kid,
    median_distance,
    null_floor,
    polynomial_kernel,
)


def spd(dim, rng, low=0.5, high=2.0):
    """A symmetric positive definite matrix in no special basis."""
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return basis * rng.uniform(low, high, dim) @ basis.T


def exactly(mean, covariance, n, rng):
    """Rows whose sample mean and covariance are these."""
    rows = rng.normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T, ddof=1).reshape(len(mean), -1))).T
    return white @ np.linalg.cholesky(np.atleast_2d(covariance)).T + mean


def distance(x, y):
    return frechet_distance(GaussianStats.of(x), GaussianStats.of(y))


# ----- Fréchet distance


@pytest.mark.parametrize("dim, n", [(8, 1000), (16, 16), (64, 10), (64, 2), (5, 6)])
def test_the_distance_to_an_affine_image_is_the_mean_displacement(dim, n):
    """y = T x + b with T symmetric positive definite is the optimal transport, at any rank."""
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim))
    transport, shift = spd(dim, rng), rng.normal(size=dim)
    y = x @ transport + shift
    centred = x - x.mean(0)
    moved = y.mean(0) - x.mean(0)
    truth = moved @ moved + np.square(centred @ (transport - np.eye(dim))).sum() / (n - 1)
    assert distance(x, y) == pytest.approx(truth, rel=1e-12)


def test_closed_forms():
    rng = np.random.default_rng(0)
    x, y = exactly([1.0], [[4.0]], 50, rng), exactly([3.0], [[9.0]], 40, rng)
    assert distance(x, y) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-12)
    a, b, shift = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6), rng.normal(size=6)
    x, y = exactly(np.zeros(6), np.diag(a), 50, rng), exactly(shift, np.diag(b), 40, rng)
    assert distance(x, y) == pytest.approx(shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


def test_scipy_agrees_where_the_covariances_are_regular():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(300, 12)) + 0.3
    c, d = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c @ d)
    truth = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c + d - 2 * np.real(root))
    assert distance(x, y) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("n", [10, 300])
def test_what_the_distance_does_not_see_and_what_scales_it(n):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(n, 20)) * np.arange(1, 21), rng.normal(size=(n + 3, 20)) * np.arange(2, 22) + 1
    truth = distance(x, y)
    trace = np.trace(np.cov(x.T))
    assert abs(distance(x, x)) <= 1e-12 * trace
    assert abs(distance(x, rng.permutation(x))) <= 1e-12 * trace
    order, rotation = rng.permutation(20), np.linalg.qr(rng.normal(size=(20, 20)))[0]
    for a, b in [(y, x), (x[:, order], y[:, order]), (x @ rotation, y @ rotation), (x + 5, y + 5)]:
        assert distance(a, b) == pytest.approx(truth, rel=1e-11)
    assert distance(3 * x, 3 * y) == pytest.approx(9 * truth, rel=1e-12)
    joined = GaussianStats.of(np.hstack([x, np.zeros_like(x)])), GaussianStats.of(np.hstack([y, np.zeros_like(y)]))
    assert frechet_distance(*joined) == pytest.approx(truth, rel=1e-11)
    assert distance(x, y[:, order]) != pytest.approx(truth, rel=1e-3)  # it is no distance of scalars


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_statistics_of_parts_merge_into_those_of_the_whole(dtype):
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(1000, 7)) + 10).astype(dtype)
    whole = rows.astype(np.float64)
    parts = [GaussianStats.of(part) for part in np.split(rows, [1, 3, 250, 251, 900])]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    right = parts[-1].merge(parts[0]).merge(parts[3].merge(parts[1].merge(parts[4]).merge(parts[2])))
    streamed = GaussianStats.empty(7)
    for start in range(0, 1000, 37):
        streamed.update(rows[start : start + 37])
    streamed.update(rows[:0])
    for stats in (left, right, streamed, GaussianStats.of(rows, block=11)):
        assert stats.n == 1000 and stats.mean.dtype == np.float64
        np.testing.assert_allclose(stats.mean, whole.mean(0), rtol=1e-13)
        np.testing.assert_allclose(stats.covariance, np.cov(whole.T), rtol=1e-12, atol=1e-13)


def test_few_rows_are_their_own_factor_and_agree_with_the_covariance():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 30)), rng.normal(size=(200, 30))
    few = GaussianStats.of(x)
    np.testing.assert_allclose(few.covariance, np.cov(x.T), atol=1e-12 * np.abs(x).max() ** 2)
    by_covariance = GaussianStats(few.n, few.mean, np.cov(x.T) * (few.n - 1))
    assert few.factor.shape == (30, 9) and by_covariance.factor.shape == (30, 8)
    y = GaussianStats.of(y)
    assert frechet_distance(few, y) == pytest.approx(frechet_distance(by_covariance, y), rel=1e-12)
    assert few.rank() == by_covariance.rank() == 8 and y.rank() == 30
    np.testing.assert_allclose(few.factor @ few.factor.T, few.covariance, atol=1e-14)
    few.update(rng.normal(size=(5, 30)))  # the factor does not outlive the rows it was made of
    np.testing.assert_allclose(few.factor @ few.factor.T, few.covariance, atol=1e-14)


def test_what_has_no_distance():
    one, two, other = (GaussianStats.of(np.ones((n, d))) for n, d in [(1, 3), (2, 3), (2, 4)])
    with pytest.raises(ValueError, match="two rows of each set, not 1"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="3 and 4 numbers"):
        frechet_distance(two, other)
    with pytest.raises(ValueError, match=r"shape \(n, 3\), not \(2, 4\)"):
        two.update(np.ones((2, 4)))


# ----- how far it can be trusted


def test_the_floor_is_what_a_perfect_set_scores():
    rng = np.random.default_rng(5)
    values, n = 1 / np.arange(1.0, 33), 400
    truth = GaussianStats(10**9, np.zeros(32), np.diag(values) * (10**9 - 1))
    measured = np.mean(
        [frechet_distance(truth, GaussianStats.of(rng.normal(size=(n, 32)) * np.sqrt(values))) for _ in range(60)]
    )
    assert null_floor(values, n) == pytest.approx(measured, rel=0.05)
    # In one dimension it is variance of the mean, plus that of the standard deviation: 1/n + 1/2n.
    assert null_floor(np.array([1.0, 0.0]), 100) == pytest.approx(0.015)


def test_infinitely_many_clips():
    """On Gaussians whose distance is known, the line removes what the bias of a single set is."""
    rng = np.random.default_rng(6)
    values = 1 / np.arange(1.0, 33)
    reference = GaussianStats(10**9, np.zeros(32), np.diag(values) * (10**9 - 1))
    scale = 1.2
    truth = (scale - 1) ** 2 * values.sum()
    plug_in, extrapolated = [], []
    for _ in range(12):
        rows = rng.normal(size=(500, 32)) * np.sqrt(values) * scale
        plug_in.append(frechet_distance(reference, GaussianStats.of(rows)))
        extrapolated.append(frechet_infinity(reference, rows, np.ones(500, int)).value)
    assert abs(np.mean(extrapolated) - truth) < abs(np.mean(plug_in) - truth) / 5
    line = frechet_infinity(reference, rows, np.ones(500, int), seed=3)
    assert line == frechet_infinity(reference, rows, np.ones(500, int), seed=3)
    assert line.value != frechet_infinity(reference, rows, np.ones(500, int), seed=4).value
    assert line.sizes[0] == 64 and line.sizes[-1] == 500 and line.slope > 0 and line.r_squared > 0.9
    assert line.values[-1] == pytest.approx(plug_in[-1])
    # Three rows a clip: sets are counted in clips, and none is torn apart.
    assert frechet_infinity(reference, rows[:498], np.full(166, 3)).sizes[0] == 21
    with pytest.raises(ValueError, match="2 clips are too few"):
        frechet_infinity(reference, rows[:2], np.ones(2, int))


def test_an_interval_is_as_wide_as_the_value_scatters():
    rng = np.random.default_rng(7)
    n, dim = 200, 6

    def draw():  # two rows a clip, which share most of what they are
        def rows(scale):
            return np.repeat(rng.normal(size=(n, dim)) * scale, 2, 0) + 0.1 * rng.normal(size=(2 * n, dim))

        return rows(1.0), rows(1.5)

    counts = np.full(n, 2)
    values = [distance(*draw()) for _ in range(200)]
    widths = []
    for seed in range(4):
        x, y = draw()
        value = distance(x, y)
        sets = [(rows, counts, GaussianStats.of(rows)) for rows in (x, y)]
        low, high = frechet_interval(value, *sets, 200, seed)
        assert low < value < high
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(np.subtract(*np.quantile(values, [0.975, 0.025])), rel=0.2)
    again = frechet_interval(value, *sets, 50, 1)
    assert again == frechet_interval(value, *sets, 50, 1)
    moved = [(rows + 1000, counts, GaussianStats.of(rows + 1000)) for rows, counts, _ in sets]
    assert frechet_interval(value, *moved, 50, 1) == pytest.approx(again, rel=1e-6)  # where both lie is nothing to it


def test_of_large_sets_fewer_clips_are_drawn_and_the_interval_is_as_wide():
    rng = np.random.default_rng(9)
    rows, counts, other = rng.normal(size=(400, 3)), np.ones(400, int), GaussianStats.of(rng.normal(size=(99, 3)) + 1)
    all_clips, some = (frechet_bootstrap(rows, counts, other, 400, rng, most).std() for most in (400, 40))
    assert some == pytest.approx(all_clips, rel=0.2)


def test_an_interval_knows_the_chance_of_either_set():
    rng = np.random.default_rng(10)
    few, many = [
        (rows, np.ones(len(rows), int), GaussianStats.of(rows))
        for rows in (rng.normal(size=(30, 2)), rng.normal(size=(3000, 2)) + 2)
    ]
    widths = [np.subtract(*frechet_interval(9.0, *sets, 200, 0)[::-1]) for sets in ((few, many), (many, few))]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def test_rows_of_one_clip_count_by_what_they_add():
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(300, 5))
    assert effective_rows(rows, np.ones(300, int)) == 300
    assert effective_rows(np.repeat(rows, 4, 0), np.full(300, 4)) == pytest.approx(300)
    independent = effective_rows(rng.normal(size=(4000, 5)), np.tile([1, 7], 500))
    assert independent == pytest.approx(4000, rel=0.1)


def test_clips_are_ranked_by_their_own_distance():
    rng = np.random.default_rng(9)
    reference = GaussianStats.of(rng.normal(size=(5000, 8)))
    clips = [rng.normal(size=(n, 8)) for n in (30, 30, 6, 1)] + [rng.normal(size=(30, 8)) * 3]
    counts = np.array([len(clip) for clip in clips])
    found = frechet_per_clip(reference, np.concatenate(clips), counts)
    floor = null_floor(reference.eigenvalues(), 30)
    alone = distance(np.concatenate(clips[:1]), exactly(np.zeros(8), np.eye(8), 100, rng))
    assert found[0] == pytest.approx(alone - floor, abs=0.2)
    assert np.isnan(found[3]) and np.nanargmax(found) == 4
    assert abs(found[0]) < floor and found[4] > 10


# ----- kernel distances


def brute_force(x, y, kernel, x_clips, y_clips):
    def mean(pairs):
        return np.mean([float(kernel(torch.from_numpy(a[None]), torch.from_numpy(b[None]))) for a, b in pairs])

    same = [
        mean([(rows[i], rows[j]) for i, j in itertools.permutations(range(len(rows)), 2) if clips[i] != clips[j]])
        for rows, clips in ((x, x_clips), (y, y_clips))
    ]
    return sum(same) - 2 * mean(itertools.product(x, y))


@pytest.mark.parametrize("kernel", [gaussian_kernel(1.3), polynomial_kernel])
def test_kernel_distance_by_brute_force(kernel):
    rng = np.random.default_rng(10)
    x_counts, y_counts = np.array([2, 1, 3, 1]), np.array([1, 1, 4])
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(6, 3)) + 1
    x_clips, y_clips = np.repeat(range(4), x_counts), np.repeat(range(3), y_counts)
    value, error = kernel_distance(x, y, kernel, x_counts, y_counts)
    assert value == pytest.approx(brute_force(x, y, kernel, x_clips, y_clips), rel=1e-12)
    left_out = [brute_force(x[x_clips != c], y, kernel, x_clips[x_clips != c], y_clips) for c in range(4)]
    other = [brute_force(x, y[y_clips != c], kernel, x_clips, y_clips[y_clips != c]) for c in range(3)]
    assert error**2 == pytest.approx(3 / 4 * 4 * np.var(left_out) + 2 / 3 * 3 * np.var(other), rel=1e-10)
    for block in (1, 2, 5, 100):
        assert kernel_distance(x, y, kernel, x_counts, y_counts, block=block) == pytest.approx((value, error))
    each = kernel_distance(x, y, kernel)[0]
    assert each == pytest.approx(brute_force(x, y, kernel, range(7), range(6)), rel=1e-12)


def expected_kernel(shift, covariance, bandwidth):
    """E k(x, y) of Gaussians whose difference has this mean and covariance."""
    dim = len(shift)
    scaled = np.eye(dim) + covariance / bandwidth**2
    exponent = shift @ np.linalg.solve(covariance + bandwidth**2 * np.eye(dim), shift)
    return np.linalg.det(scaled) ** -0.5 * np.exp(-exponent / 2)


def test_kernel_distance_has_no_bias_and_an_honest_error():
    rng = np.random.default_rng(11)
    a, b, shift, sigma = spd(4, rng), spd(4, rng), np.full(4, 0.4), 2.0
    zero = np.zeros(4)
    truth = expected_kernel(zero, 2 * a, sigma) + expected_kernel(zero, 2 * b, sigma)
    truth -= 2 * expected_kernel(shift, a + b, sigma)
    roots = np.linalg.cholesky(a), np.linalg.cholesky(b)
    found = np.array(
        [
            kernel_distance(
                rng.normal(size=(50, 4)) @ roots[0].T,
                rng.normal(size=(40, 4)) @ roots[1].T + shift,
                gaussian_kernel(sigma),
            )
            for _ in range(300)
        ]
    )
    assert abs(found[:, 0].mean() - truth) < 3 * found[:, 0].std() / np.sqrt(300)
    assert np.median(found[:, 1]) == pytest.approx(found[:, 0].std(), rel=0.2)


def test_halves_of_one_set_are_at_no_distance():
    rng = np.random.default_rng(12)
    inside = []
    for _ in range(40):
        rows = rng.normal(size=(200, 16))
        value, error = kernel_distance(rows[:100], rows[100:])
        inside.append(abs(value) < 1.96 * error)
    assert np.mean(inside) >= 0.85


def test_the_bandwidth_is_the_reference_s():
    rng = np.random.default_rng(13)
    x, y = rng.normal(size=(60, 5)), 3 * rng.normal(size=(50, 5))
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
    assert median_distance(x) == pytest.approx(np.median(pairs), rel=1e-12)
    assert kernel_distance(x, y)[0] == kernel_distance(x, y, gaussian_kernel(np.median(pairs)))[0]
    many = rng.normal(size=(3000, 5))
    assert median_distance(many) == median_distance(many) != median_distance(many, seed=1)
    assert median_distance(many) == pytest.approx(np.median(pairs), rel=0.1)
    corners = [median_distance(np.eye(3), seed, pairs=2) for seed in range(20)]
    assert corners == pytest.approx([2**0.5] * 20)  # no row is drawn with itself
    with pytest.raises(ValueError, match="are all rows the same"):
        kernel_distance(np.ones((5, 2)), y[:, :2])
    with pytest.raises(ValueError, match="two clips of each set, not 1"):
        kernel_distance(x, y[:1])


def test_kid():
    rng = np.random.default_rng(14)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(50, 5)) + 0.5
    whole = kernel_distance(x[:50], y, polynomial_kernel)[0]
    assert kid(x[:50], y) == pytest.approx((whole, 0))
    mean, spread = kid(x, y, subset_size=20, subsets=300)
    assert mean == pytest.approx(kernel_distance(x, y, polynomial_kernel)[0], rel=0.15) and spread > 0
    assert kid(x, y, 20, 5) == kid(x, y, 20, 5) != kid(x, y, 20, 5, seed=1)


def test_noise_increases_every_distance():
    rng = np.random.default_rng(15)
    x, y = rng.normal(size=(2, 300, 8))
    bandwidth = gaussian_kernel(median_distance(x))
    found = []
    for level in (0, 0.5, 1, 2):
        noisy = y + level * rng.normal(size=y.shape)
        infinity = frechet_infinity(GaussianStats.of(x), noisy, np.ones(300, int)).value
        found.append((distance(x, noisy), infinity, kernel_distance(x, noisy, bandwidth)[0], kid(x, noisy)[0]))
    assert (np.diff(found, axis=0) > 0).all()
