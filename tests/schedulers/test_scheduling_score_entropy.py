import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import expm

from tonefield.schedulers import ScoreEntropyScheduler
from tonefield.schedulers.scheduling_score_entropy import (
    AbsorbingGraph,
    UniformGraph,
    draw_jumps,
    draw_tokens,
    guided_logits,
    restrict_tokens,
    uniforms,
)


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")
SCHEDULES = ("loglinear", "cosine", "cosine_squared", "geometric", "linear")
CONFIGS = [
    ("absorb", "event", "normalized"),
    ("absorb", "event", "score"),
    ("absorb", "analytic", "normalized"),
    ("absorb", "analytic", "score"),
    ("absorb", "euler", "score"),
    ("absorb", "remdm", "normalized"),
    ("absorb", "confidence", "normalized"),
    ("uniform", "analytic", "normalized"),
    ("uniform", "analytic", "score"),
    ("uniform", "euler", "normalized"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def law(vocab_size, length, seed=0):
    """A law of sequences without any symmetry, `(N, ..., N)` in float64."""
    weights = torch.randn((vocab_size,) * length, generator=seeded(seed), dtype=torch.float64).mul(1.2).exp()
    return weights / weights.sum()


def sequences(states, length):
    return torch.tensor(list(itertools.product(range(states), repeat=length)))


def rate_matrix(graph_type, n):
    """Q, entry by entry from its definition: the rate from row to column."""
    if graph_type == "uniform":
        return np.full((n, n), 1 / n) - np.eye(n)
    q = np.zeros((n + 1, n + 1))
    for a in range(n):
        q[a, a], q[a, n] = -1, 1
    return q


class Oracle:
    """The network that knows the law of the data: what it returns is the truth, by summation over all sequences."""

    def __init__(self, p0, scheduler):
        self.scheduler, self.n, self.length = scheduler, p0.shape[0], p0.ndim
        self.clean, self.weights = sequences(self.n, self.length), p0.flatten()

    def factors(self, tokens, sigma):
        """P(token_i | clean_i) for every sequence, `(batch, sequences, length)`."""
        if self.scheduler.absorbing:
            return ((tokens[:, None] == self.clean) | (tokens[:, None] == self.n)).double()
        alpha = torch.exp(-sigma.double()).reshape(-1, 1, 1)
        return alpha * (tokens[:, None] == self.clean) + (1 - alpha) / self.n

    def __call__(self, tokens, sigma):
        if len(tokens) <= (self.n + 1) ** self.length or not (self.scheduler.absorbing or (sigma == sigma[0]).all()):
            return self.answer(tokens, sigma)
        # One answer for each state, where the noise level is the same or makes no difference.
        states = sequences(self.n + 1, self.length)
        index = (tokens * (self.n + 1) ** torch.arange(self.length - 1, -1, -1)).sum(1)
        return self.answer(states.clamp(max=self.clean.max() + self.scheduler.absorbing), sigma[:1])[index]

    def answer(self, tokens, sigma):
        factors = self.factors(tokens, sigma)
        logits = torch.zeros(*tokens.shape, self.n, dtype=torch.float64)
        for i in range(self.length):
            others = torch.cat([factors[..., :i], factors[..., i + 1 :]], -1).prod(-1) * self.weights
            for y in range(self.n):
                logits[:, i, y] = (others * (self.clean[:, i] == y)).sum(1).log()
        if self.scheduler.config.parameterization == "normalized":
            return logits
        if self.scheduler.absorbing:
            return logits.log_softmax(-1) + math.log(self.n)
        alpha = torch.exp(-sigma.double()).reshape(-1, 1, 1)
        scores = alpha * logits.softmax(-1) + (1 - alpha) / self.n
        return (scores / scores.gather(-1, tokens[..., None])).log()


def table_network(n, length, seed=0, mean=0.0):
    """A network with random logits for every sequence of tokens, wrong everywhere."""
    table = torch.randn(*((n + 1,) * length), length, n, generator=seeded(seed), dtype=torch.float64) + mean

    def network(tokens, sigma):
        return table[tuple(tokens.unbind(-1))]

    return network


def sample(scheduler, network, shape, steps, generator=None, trace=None, **known):
    scheduler.set_timesteps(steps)
    tokens = scheduler.start(shape, generator, **known)
    for t in scheduler.timesteps:
        if trace is not None:
            trace.append(tokens)
        tokens = scheduler.step(network(tokens, t), t, tokens).prev_sample
    return tokens


def frequencies(tokens, n):
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        index = index * n + column
    return torch.bincount(index, minlength=n ** tokens.shape[1]).numpy()


def fits(tokens, expected):
    """The p-value of drawing these tokens from the law `expected`, (N, ..., N)."""
    expected = np.asarray(expected).flatten()
    return stats.chisquare(
        frequencies(tokens, round(len(expected) ** (1 / tokens.shape[1]))), expected * len(tokens)
    ).pvalue


# Noise


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_schedules(schedule):
    eps, low, high = 1e-3, 1e-4, 20.0
    noise = ScoreEntropyScheduler(5, noise_schedule=schedule, sigma_min=low, sigma_max=high, eps=eps).noise
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64, requires_grad=True)
    by_definition = {
        "loglinear": -torch.log(1 - (1 - eps) * t),
        "cosine": -torch.log(eps + (1 - eps) * torch.cos(math.pi / 2 * t)),
        "cosine_squared": -torch.log(eps + (1 - eps) * torch.cos(math.pi / 2 * t) ** 2),
        "geometric": low ** (1 - t) * high**t,
        "linear": low + t * (high - low),
    }[schedule]
    torch.testing.assert_close(noise.sigma(t), by_definition, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise.masked(t), 1 - torch.exp(-by_definition), rtol=1e-9, atol=0)
    (sigma_slope,) = torch.autograd.grad(by_definition.sum(), t, retain_graph=True)
    torch.testing.assert_close(noise.sigma_slope(t), sigma_slope, rtol=1e-10, atol=0)
    (masked_slope,) = torch.autograd.grad(noise.masked(t).sum(), t)
    torch.testing.assert_close(noise.masked_slope(t), masked_slope, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(noise.time(noise.masked(t)), t, rtol=0, atol=1e-7)
    if schedule == "loglinear":
        torch.testing.assert_close(sigma_slope / torch.expm1(by_definition), 1 / t, rtol=1e-10, atol=0)
    ends = noise.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    expected = (0.0, -math.log(eps)) if schedule in SCHEDULES[:3] else (low, high)
    assert ends == pytest.approx(expected, rel=1e-9, abs=1e-15)
    near = noise.masked(torch.tensor([1e-9], dtype=torch.float64)) if ends[0] == 0 else None
    if near is not None:  # digits near t = 0, where 1 - alpha has none
        rate = {"loglinear": 1e-9, "cosine": (math.pi * 1e-9) ** 2 / 8, "cosine_squared": (math.pi * 1e-9) ** 2 / 4}
        assert near.item() == pytest.approx((1 - eps) * rate[schedule], rel=1e-9)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_transitions_are_matrix_exponentials(graph_type, n):
    q = rate_matrix(graph_type, n)
    graph = (AbsorbingGraph if graph_type == "absorb" else UniformGraph)(n)
    states = torch.arange(len(q))
    np.testing.assert_array_equal(graph.rate(states, torch.float64), q)
    np.testing.assert_array_equal(graph.transposed_rate(states, torch.float64), q.T)
    score = torch.rand(4, len(q), generator=seeded(), dtype=torch.float64)
    matrices = {}
    for total in (1e-3, 0.7, 1.7, 3.0, 20.0):
        sigma = torch.full((len(q),), total, dtype=torch.float64)
        matrices[total] = graph.transition(states, sigma).numpy()
        np.testing.assert_allclose(matrices[total], expm(total * q), atol=1e-12)
        np.testing.assert_allclose(graph.transition(states, sigma.float()), expm(total * q), atol=1e-7)
        np.testing.assert_allclose(graph.transposed_transition(states, sigma), expm(total * q).T, atol=1e-12)
        staggered = graph.staggered_score(score, torch.full((4,), total, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(staggered, score.numpy() @ expm(-total * q), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(matrices[total].sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(matrices[0.7] @ matrices[1.7], graph.transition(states, sigma * 0 + 2.4), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_add_noise_follows_the_transition(graph_type, schedule):
    scheduler = ScoreEntropyScheduler(4, graph_type, schedule)
    t = torch.tensor([0.07, 0.8])
    clean = torch.tensor([1, 2]).repeat_interleave(20_000).reshape(2, -1)
    noisy = scheduler.add_noise(clean, t, seeded(1))
    for row in range(2):
        sigma = scheduler.noise.sigma(t[row : row + 1].double())
        expected = scheduler.graph.transition(clean[row, :1], sigma)[0].numpy()
        observed = torch.bincount(noisy[row], minlength=len(expected)).numpy()
        possible = expected > 0
        assert observed[~possible].sum() == 0
        assert stats.chisquare(observed[possible], expected[possible] * 20_000).pvalue > 1e-3
    if (graph_type, schedule) == ("absorb", "loglinear"):
        masks = (noisy == 4).double().mean(1)
        torch.testing.assert_close(masks, (1 - 1e-3) * t.double(), rtol=0, atol=0.012)


def test_noise_without_a_rest():
    """eps = 0: everything is masked at t = 1, and the loss is finite there."""
    for schedule in SCHEDULES[:3]:
        scheduler = ScoreEntropyScheduler(5, noise_schedule=schedule, eps=0.0)
        clean = torch.randint(5, (2, 50), generator=seeded())
        noisy = scheduler.add_noise(clean, torch.ones(2))
        assert (noisy == 5).all()
        assert torch.isfinite(scheduler.sigma(torch.ones(2))).all()
        for parameterization in ("normalized", "score"):
            scheduler = ScoreEntropyScheduler(5, noise_schedule=schedule, eps=0.0, parameterization=parameterization)
            assert torch.isfinite(scheduler.loss(torch.zeros(2, 50, 5), noisy, clean, torch.ones(2))).all()
            tokens = sample(scheduler, lambda tokens, t: torch.zeros(*tokens.shape, 5), (2, 50), 4)
            assert tokens.max() < 5


def forward_law(p0, scheduler, t):
    """p_t over all states, through scipy's matrix exponential."""
    n, length = p0.shape[0], p0.ndim
    sigma = scheduler.noise.sigma(torch.tensor([t], dtype=torch.float64)).item()
    kernel = torch.from_numpy(expm(sigma * rate_matrix(scheduler.config.graph_type, n)))[:n]
    p = p0
    for _ in range(length):
        p = torch.tensordot(p, kernel, dims=([0], [0]))
    return p


def true_scores(p, tokens):
    """p(x with token i set to y) / p(x), (states, length, symbols)."""
    scores = torch.zeros(*tokens.shape, p.shape[0], dtype=torch.float64)
    for i in range(tokens.shape[1]):
        for y in range(p.shape[0]):
            changed = tokens.clone()
            changed[:, i] = y
            scores[:, i, y] = p[tuple(changed.unbind(1))]
    return scores / p[tuple(tokens.unbind(1))][:, None, None]


@pytest.mark.parametrize("parameterization", ["normalized", "score"])
@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_log_scores_of_the_oracle_are_true(graph_type, schedule, parameterization):
    p0 = law(3, 2)
    scheduler = ScoreEntropyScheduler(3, graph_type, schedule, parameterization=parameterization, sigma_min=0.01)
    network = Oracle(p0, scheduler)
    for t in (0.05, 0.5, 0.95):
        p = forward_law(p0, scheduler, t)
        states = sequences(p.shape[0], 2)
        times = torch.full((len(states),), t, dtype=torch.float64)
        scores = scheduler.log_score(network(states, scheduler.noise.sigma(times)), states, times).exp()
        truth = true_scores(p, states)[..., :3]
        moving = states == 3 if graph_type == "absorb" else torch.ones_like(states, dtype=torch.bool)
        torch.testing.assert_close(scores[moving], truth[moving], rtol=1e-9, atol=0)
        if graph_type == "uniform":
            e = math.expm1(scheduler.noise.sigma(times[:1]).item())
            assert e / (e + 3) * (1 - 1e-12) <= scores.min() and scores.max() <= (e + 3) / e * (1 + 1e-12)


@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_kolmogorov_equations(graph_type):
    """dp/dt = sigma' p Q forwards, and -sigma' p R with the reverse rates R = Q^T s backwards."""
    p0, scheduler, t, h = law(3, 2), ScoreEntropyScheduler(3, graph_type, "geometric", 0.01), 0.6, 1e-5
    p = forward_law(p0, scheduler, t)
    slope = ((forward_law(p0, scheduler, t + h) - forward_law(p0, scheduler, t - h)) / (2 * h)).flatten()
    rate = scheduler.noise.sigma_slope(torch.tensor([t], dtype=torch.float64)).item()
    symbols, states = p.shape[0], sequences(p.shape[0], 2)
    forward = torch.zeros(len(states), len(states), dtype=torch.float64)
    backward = torch.zeros_like(forward)
    rates = scheduler.graph.rate(states, torch.float64)
    reverse = scheduler.graph.transposed_rate(states, torch.float64) * true_scores(p, states)
    for a, state in enumerate(states):
        for i in range(2):
            for y in range(symbols):
                if y != state[i]:
                    changed = state.clone()
                    changed[i] = y
                    b = int(changed[0] * symbols + changed[1])
                    forward[a, b] += rates[a, i, y]
                    backward[a, b] += reverse[a, i, y]
    for generator, sign in ((forward, 1), (backward, -1)):
        generator -= torch.diag(generator.sum(1))
        torch.testing.assert_close(sign * rate * p.flatten() @ generator, slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_staggered_score_is_bayes(graph_type):
    p0, scheduler = law(3, 2), ScoreEntropyScheduler(3, graph_type)
    t, s = 0.7, 0.45
    p_t, p_s = forward_law(p0, scheduler, t), forward_law(p0, scheduler, s)
    states = sequences(p_t.shape[0], 2)
    delta = (scheduler.noise.sigma(torch.tensor(t)) - scheduler.noise.sigma(torch.tensor(s))).item()
    sigma = torch.full(states.shape, delta, dtype=torch.float64)
    probabilities = scheduler.graph.staggered_score(true_scores(p_t, states), sigma)
    probabilities = probabilities * scheduler.graph.transposed_transition(states, sigma)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(states.shape, dtype=torch.float64))
    # Bayes for one position, the other one noised to t: p(z_i at s, x_j at t) P(x_i | z_i) / p(x at t)
    kernel = torch.from_numpy(expm(delta * rate_matrix(graph_type, 3)))
    first, second = kernel.T @ p_s.T, p_s @ kernel  # [x_1 or x_0 at t, the other at s]
    for row, (x0, x1) in enumerate(states.tolist()):
        expected_0 = second[:, x1] * kernel[:, x0] / p_t[x0, x1]
        expected_1 = (kernel.T @ p_s)[x0] * kernel[:, x1] / p_t[x0, x1]
        torch.testing.assert_close(probabilities[row, 0], expected_0, rtol=0, atol=1e-6)
        torch.testing.assert_close(probabilities[row, 1], expected_1, rtol=0, atol=1e-6)
    assert first.shape == second.shape


# Loss


def brute_force_entropy(graph_type, n, log_score, sigma, x, x0):
    """sum over y != x of Q[y, x] (s_y - q_y ln s_y + q_y (ln q_y - 1)), from the matrix exponential."""
    q, kernel = rate_matrix(graph_type, n), expm(sigma * rate_matrix(graph_type, n))
    total = 0.0
    for y in range(len(q)):
        if y == x or q[y, x] == 0:
            continue
        ratio = kernel[x0, y] / kernel[x0, x]
        total += q[y, x] * (math.exp(log_score[y]) - ratio * log_score[y])
        total += q[y, x] * ratio * (math.log(ratio) - 1) if ratio > 0 else 0.0
    return total


@pytest.mark.parametrize("sigma", [0.003, 0.3, 2.0])
def test_score_entropy_is_the_definition(sigma):
    n = 4
    absorbing, uniform = AbsorbingGraph(n), UniformGraph(n)
    log_scores = torch.randn(n + 1, n, n, generator=seeded(), dtype=torch.float64)
    sigmas = torch.full((1,), sigma, dtype=torch.float64)
    for x0 in range(n):
        clean = torch.tensor([x0])
        log_score = log_scores[n, x0][None]
        ours = absorbing.score_entropy(log_score + torch.log(torch.expm1(sigmas)), clean) / math.expm1(sigma)
        expected = brute_force_entropy("absorb", n, log_score[0].tolist(), sigma, n, x0)
        assert ours.item() == pytest.approx(expected, rel=1e-9)
        for x in range(n):
            log_score = log_scores[x, x0][None].clone()
            log_score[0, x] = 0
            ours = uniform.score_entropy(log_score, sigmas, torch.tensor([x]), clean).item()
            expected = brute_force_entropy("uniform", n, log_score[0].tolist(), sigma, x, x0)
            assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_score_entropy_is_least_at_the_ratio(graph_type):
    n, sigma, c = 5, 0.8, 1.3
    e, kernel = math.expm1(sigma), expm(sigma * rate_matrix(graph_type, n))
    sigmas, absorbing, uniform = torch.tensor([sigma], dtype=torch.float64), AbsorbingGraph(n), UniformGraph(n)
    x, x0 = (n, 2) if graph_type == "absorb" else (3, 2)

    def entropy(log_score):
        if graph_type == "absorb":
            return absorbing.score_entropy((log_score + math.log(e))[None], torch.tensor([x0])) / e
        return uniform.score_entropy(log_score[None], sigmas, torch.tensor([x]), torch.tensor([x0]))

    ratio = torch.from_numpy(kernel[x0, :n] / kernel[x0, x]).clamp(min=1e-30).log().requires_grad_()
    value = entropy(ratio)
    assert value.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, ratio)
    moving = torch.arange(n) != x
    torch.testing.assert_close(
        gradient[moving], torch.zeros(int(moving.sum()), dtype=torch.float64), atol=1e-12, rtol=0
    )
    for seed in range(20):
        other = ratio.detach() + torch.randn(n, generator=seeded(seed), dtype=torch.float64) * moving
        assert entropy(other).item() > 0
    if graph_type == "absorb":
        expected = (c - 1 - math.log(c)) / e
        assert entropy(ratio.detach() + math.log(c)).item() == pytest.approx(expected, rel=1e-12)
    logits = torch.randn(n, generator=seeded(3), dtype=torch.float64)
    z = logits.exp().sum().item()
    identity = (-logits.log_softmax(0)[x0].item() + z - 1 - math.log(z)) / e
    assert AbsorbingGraph(n).score_entropy(logits[None], torch.tensor([x0])).item() / e == pytest.approx(identity)


def expected_loss(p0, scheduler, network, t):
    """The mean of the loss at t over clean and noisy tokens, all of them."""
    n, length = p0.shape[0], p0.ndim
    sigma = scheduler.noise.sigma(torch.tensor([t], dtype=torch.float64)).item()
    kernel = torch.from_numpy(expm(sigma * rate_matrix(scheduler.config.graph_type, n)))
    clean, states = sequences(n, length), sequences(kernel.shape[0], length)
    pairs = kernel[clean[:, None], states[None]].prod(-1) * p0.flatten()[:, None]
    times = torch.full((len(states),), t, dtype=torch.float64)
    output = network(states, scheduler.noise.sigma(times)).repeat(len(clean), 1, 1)
    noisy, times = states.repeat(len(clean), 1), times.repeat(len(clean))
    losses = scheduler.loss(output, noisy, clean.repeat_interleave(len(states), 0), times)
    return (pairs.flatten() * losses).sum().item()


def mutual_information(p0, scheduler, t):
    n = p0.shape[0]
    sigma = scheduler.noise.sigma(torch.tensor([t], dtype=torch.float64)).item()
    kernel = torch.from_numpy(expm(sigma * rate_matrix(scheduler.config.graph_type, n))).clamp(min=0)
    clean, states = sequences(n, p0.ndim), sequences(kernel.shape[0], p0.ndim)
    given = kernel[clean[:, None], states[None]].prod(-1)
    joint, marginal = given * p0.flatten()[:, None], forward_law(p0, scheduler, t).clamp(min=0).flatten()
    return torch.xlogy(joint, given).sum().item() - torch.xlogy(marginal, marginal).sum().item()


@pytest.mark.parametrize("parameterization", ["normalized", "score"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_the_integral_of_the_oracle_is_the_drop_of_information(graph_type, schedule, parameterization):
    """Noise, graph and loss together: the loss of the true score over [t_a, t_b] is I(x_0; x_ta) - I(x_0; x_tb)."""
    p0 = law(3, 2)
    scheduler = ScoreEntropyScheduler(
        3, graph_type, schedule, sigma_min=1e-4, sigma_max=8.0, parameterization=parameterization
    )
    network = Oracle(p0, scheduler)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    start, end = 0.02, 0.98
    middle, half = (start + end) / 2, (end - start) / 2
    values = [expected_loss(p0, scheduler, network, middle + half * node) for node in nodes]
    drop = mutual_information(p0, scheduler, start) - mutual_information(p0, scheduler, end)
    assert half * np.dot(weights, values) == pytest.approx(drop, rel=1e-6)


def test_the_integral_over_all_times_is_what_there_is_to_learn():
    """Absorbing graph, log-linear: the whole integral is H(x_0) - I(x_0; x_1), and a wrong sum Z of the scores adds
    L (1 - eps) (c - 1 - ln c)."""
    p0 = law(3, 2)
    scheduler = ScoreEntropyScheduler(3, parameterization="score")
    oracle = Oracle(p0, scheduler)
    entropy = -torch.xlogy(p0, p0).sum().item()
    nodes, weights = np.polynomial.legendre.leggauss(12)
    for c, more in ((1.0, 0.0), (1.3, 0.0752)):
        values = [
            expected_loss(p0, scheduler, lambda x, s, c=c: oracle(x, s) + math.log(c), (node + 1) / 2)
            for node in nodes
        ]
        information = entropy - mutual_information(p0, scheduler, 1.0)
        assert np.dot(weights, values) / 2 == pytest.approx(information + more, abs=1e-4)
        exact = information + 2 * (1 - 1e-3) * (c - 1 - math.log(c))
        assert np.dot(weights, values) / 2 == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("parameterization", ["normalized", "score"])
@pytest.mark.parametrize(("n", "per_token"), [(4096, 8.3094), (50257, 10.814)])
def test_initial_loss(n, per_token, parameterization):
    """A network that returns zeros: (1 - eps) ln N per token on average, masks / t ln N for a given draw."""
    scheduler = ScoreEntropyScheduler(n, parameterization=parameterization)
    clean = torch.randint(n, (2, 30), generator=seeded())
    t = torch.tensor([0.2, 0.9])
    noisy = scheduler.add_noise(clean, t, seeded(1))
    masks = (noisy == n).sum(1)
    losses = scheduler.loss(torch.zeros(2, 30, n), noisy, clean, t)
    torch.testing.assert_close(losses, masks / t * math.log(n), rtol=1e-5, atol=0)
    expected_masks = scheduler.noise.masked(t.double()) * 30
    average = expected_masks / t.double() * math.log(n) / 30
    torch.testing.assert_close(average, torch.full((2,), (1 - 1e-3) * math.log(n), dtype=torch.float64))
    assert average[0].item() == pytest.approx(per_token, rel=1e-4)
    _, _, weight = scheduler.sample_noisy(clean, seeded(2), t_sampling="mask_count")
    noisy, t, weight = scheduler.sample_noisy(clean, seeded(2), t_sampling="mask_count")
    losses = weight * scheduler.loss(torch.zeros(2, 30, n), noisy, clean, t)
    torch.testing.assert_close(losses, torch.full_like(losses, 30 * math.log(n)), rtol=1e-5, atol=0)


def test_initial_loss_of_the_uniform_graph():
    n, sigma = 7, 0.4
    r = math.expm1(sigma) / (math.expm1(sigma) + n)
    scheduler = ScoreEntropyScheduler(n, "uniform", "linear", sigma_min=0.1, sigma_max=0.7)
    t, rate = torch.tensor([0.5]), 0.6
    losses = [
        scheduler.loss(torch.zeros(1, 1, n), torch.tensor([[x]]), torch.tensor([[2]]), t).item() / rate for x in (2, 5)
    ]
    expected = [(n - 1) / n * (1 + r * math.log(r) - r), (1 - (1 + math.log(r)) / r) / n]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 256, 4096, 65536])
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_no_digits_are_lost(graph_type, n, dtype):
    """Sigma from 1e-8 to 20, in float32 against float64: finite, right, and with finite gradients."""
    levels = torch.tensor([1e-8, 1e-6, 2e-4, 0.01, 0.5, 3.0, 20.0], dtype=torch.float64)
    for parameterization in ("normalized", "score"):
        scheduler = ScoreEntropyScheduler(
            n, graph_type, "geometric", sigma_min=1e-8, sigma_max=20.0, parameterization=parameterization
        )
        t = scheduler.noise.time(-torch.expm1(-levels))
        torch.testing.assert_close(scheduler.noise.sigma(t), levels, rtol=1e-6, atol=0)
        output = torch.randn(len(t), 2, n, generator=seeded()).to(dtype).requires_grad_()
        clean = torch.tensor([[1, 0]]).expand(len(t), -1)
        noisy = torch.tensor([[0, 0]]).expand(len(t), -1) if graph_type == "uniform" else torch.full((len(t), 2), n)
        losses = scheduler.loss(output, noisy, clean, t)
        assert losses.dtype == torch.float32
        exact = scheduler.loss(output.detach().double(), noisy, clean, t)
        torch.testing.assert_close(losses.double(), exact, rtol=2e-5, atol=1e-3)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        assert torch.isfinite(gradient).all() and torch.isfinite(losses).all()


def test_geometric_schedule_with_4096_codes():
    """Every time there is, in float32: the schedule of the uniform graph on which 1 - N / (E + N) gives NaN."""
    scheduler = ScoreEntropyScheduler(4096, "uniform", "geometric", sigma_min=1e-4, sigma_max=20.0)
    t = torch.linspace(0, 1, 200)
    clean = torch.randint(4096, (200, 2), generator=seeded())
    noisy = scheduler.add_noise(clean, t, seeded(1))
    for x in (noisy, clean):
        losses = scheduler.loss(torch.zeros(200, 2, 4096), x, clean, t)
        assert torch.isfinite(losses).all() and (losses >= 0).all()


# Likelihood


def exact_nll(network, tokens, n):
    """-ln of the law that revealing one token at a time in a random order gives, by recursion over sets of masks."""
    (length,) = tokens.shape

    def probability(revealed):
        if len(revealed) == length:
            return 1.0
        x = torch.full((length,), n)
        x[list(revealed)] = tokens[list(revealed)]
        law = network(x[None], None)[0].softmax(-1)
        rest = [i for i in range(length) if i not in revealed]
        return sum(law[i, tokens[i]].item() * probability((*revealed, i)) for i in rest) / len(rest)

    return -math.log(probability(()))


def order_agnostic_bound(network, tokens, n):
    """The mean over orders of -ln p, by enumeration."""
    orders = list(itertools.permutations(range(len(tokens))))
    total = 0.0
    for order in orders:
        x = torch.full_like(tokens, n)
        for i in order:
            total -= network(x[None], None)[0].log_softmax(-1)[i, tokens[i]].item()
            x[i] = tokens[i]
    return total / len(orders)


def test_bound_of_the_absorbing_graph():
    n, length = 3, 3
    scheduler, tokens = ScoreEntropyScheduler(n, noise_schedule="cosine"), torch.tensor([0, 2, 1])
    for network in (table_network(n, length), Oracle(law(n, length), scheduler)):
        exact, bound = exact_nll(network, tokens, n), order_agnostic_bound(network, tokens, n)
        estimate = scheduler.nll_bound(network, tokens.expand(4000, -1), 3, seeded()).mean().item()
        assert estimate == pytest.approx(bound, abs=0.03)
        if isinstance(network, Oracle):
            truth = -math.log(law(n, length)[0, 2, 1])
            assert exact == pytest.approx(truth, rel=1e-9) and bound == pytest.approx(truth, rel=1e-9)
        else:
            assert bound > exact + 0.1
    wrong_sum = table_network(n, length, mean=1.0)  # a constant more in the logits is no other law
    ours = [
        scheduler.nll_bound(network, tokens[None], 5, seeded()) for network in (table_network(n, length), wrong_sum)
    ]
    torch.testing.assert_close(*ours)


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("parameterization", ["normalized", "score"])
def test_bound_of_the_uniform_graph(schedule, parameterization):
    """With the true score its mean is known: the drop of information, what is left to guess, and the divergence."""
    p0 = law(3, 2)
    scheduler = ScoreEntropyScheduler(
        3, "uniform", schedule, parameterization=parameterization, sigma_min=0.05, sigma_max=1.0
    )
    oracle = Oracle(p0, scheduler)
    tokens = sequences(3, 2)[torch.multinomial(p0.flatten(), 8000, replacement=True, generator=seeded())]
    bound = scheduler.nll_bound(oracle, tokens, 8, seeded(1))
    kernels = [expm(scheduler.noise.sigma(torch.tensor(t)).item() * rate_matrix("uniform", 3)) for t in (0.0, 1.0)]
    divergence = 2 * (kernels[1][0] * np.log(3 * kernels[1][0])).sum()
    left = 0.0
    for i in range(2):  # H(x0_i | x at t = 0) from the joint law of x0_i and both tokens at t = 0
        joint = np.einsum("ab,ax,by->abxy", p0.numpy(), kernels[0], kernels[0]).sum(1 - i)
        given = joint / joint.sum(0, keepdims=True)
        left -= (joint * np.log(given, where=joint > 0, out=np.zeros_like(joint))).sum()
    expected = mutual_information(p0, scheduler, 0.0) - mutual_information(p0, scheduler, 1.0) + divergence + left
    assert bound.mean().item() == pytest.approx(expected, abs=4 * (bound.std() / math.sqrt(len(tokens))).item())
    assert expected > -torch.xlogy(p0, p0).sum().item()
    worse = scheduler.nll_bound(lambda x, s: 0.3 * oracle(x, s), tokens, 8, seeded(1))
    assert worse.mean() > bound.mean() + 0.02


def test_counting_masks_is_unbiased_and_steadier():
    """The four ways to draw times estimate one integral; the loss of counted masks varies least."""
    n, length = 4, 12
    scheduler, network = ScoreEntropyScheduler(n, sampling_eps=1e-3), None
    logits = torch.randn(length, n, generator=seeded(), dtype=torch.float64)
    network = logits.expand(256, -1, -1)
    clean = torch.randint(n, (length,), generator=seeded(1)).expand(256, -1)
    truth = -logits.log_softmax(-1).gather(-1, clean[0, :, None]).sum().item()
    means, spreads = {}, {}
    for t_sampling in ("stratified", "uniform", "importance", "mask_count"):
        batches = []
        for seed in range(100):
            noisy, t, weight = scheduler.sample_noisy(clean, seeded(seed), t_sampling=t_sampling)
            assert t.min() >= 1e-3 * (1 - 1e-9) and t.max() <= 1
            batches.append((weight * scheduler.loss(network, noisy, clean, t)).mean().item())
        means[t_sampling], spreads[t_sampling] = np.mean(batches), np.std(batches)
        assert means[t_sampling] == pytest.approx(truth * (1 if t_sampling == "mask_count" else 1 - 1e-3), rel=0.02)
    assert spreads["mask_count"] < 0.5 * min(spreads["stratified"], spreads["uniform"], spreads["importance"])
    for schedule in ("loglinear", "cosine"):  # the weights are a ratio of two densities, of mean 1
        other = ScoreEntropyScheduler(n, noise_schedule=schedule, sampling_eps=0.2)
        weight = other.sample_noisy(clean, seeded(), t_sampling="importance")[2]
        assert weight.mean().item() == pytest.approx(1, abs=0.02)
    counts = (scheduler.sample_noisy(clean[:12], seeded(), t_sampling="mask_count")[0] == n).sum(1)
    assert sorted(counts.tolist()) == list(range(1, 13))  # one of each
    spread = scheduler.sample_noisy(clean, seeded(), t_sampling="stratified")[1]
    assert (((spread - 1e-3) / (1 - 1e-3) * 256).floor() == torch.arange(256)).all()
    shares = [
        scheduler.sample_noisy(
            clean[:128], seeded(), t_sampling="stratified", strata=(torch.arange(128) * 2 + i, 256)
        )[1]
        for i in range(2)
    ]
    assert (((torch.stack(shares, 1).flatten() - 1e-3) / (1 - 1e-3) * 256).floor() == torch.arange(256)).all()
    with pytest.raises(ValueError, match="`t_sampling` is 'antithetic'"):
        scheduler.sample_noisy(clean, t_sampling="antithetic")
    with pytest.raises(ValueError, match="no masks to count"):
        ScoreEntropyScheduler(n, "uniform").sample_noisy(clean, t_sampling="mask_count")


@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_padding_has_no_part(graph_type):
    """Losses and gradients of a padded batch are those of its parts; padding is never noised, whatever it holds."""
    scheduler = ScoreEntropyScheduler(5, graph_type)
    lengths = torch.tensor([7, 3])
    mask = torch.arange(7) < lengths[:, None]
    clean = torch.randint(5, (2, 7), generator=seeded()).masked_fill(~mask, 9)
    t = torch.tensor([0.5, 0.9])
    noisy = scheduler.add_noise(clean, t, seeded(1), mask)
    assert (noisy[~mask] == 9).all() and (noisy != clean).any(1).all()
    output = torch.randn(2, 7, 5, generator=seeded(2)).requires_grad_()
    losses = scheduler.loss(output, noisy, clean, t, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    assert (gradient[~mask] == 0).all()
    for row, length in enumerate(lengths):
        alone = output.detach()[row : row + 1, :length].requires_grad_()
        part = slice(row, row + 1)
        loss = scheduler.loss(alone, noisy[part, :length], clean[part, :length], t[part])
        torch.testing.assert_close(loss[0], losses[row])
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), alone)[0][0], gradient[row, :length])
    with_masks = clean.masked_fill(~mask, 5)  # padded with the id of the mask
    torch.testing.assert_close(scheduler.loss(output, noisy.masked_fill(~mask, 5), with_masks, t, mask), losses)
    if graph_type == "absorb":
        noisy, _, _ = scheduler.sample_noisy(clean, seeded(1), mask, "mask_count")
        assert (noisy[~mask] == 9).all() and (noisy[mask] == 5).any()
        network = table = torch.randn(7, 5, generator=seeded(3))
        bounds = scheduler.nll_bound(lambda x, s: table.expand(2, -1, -1), clean, 7, seeded(), mask)
        exact = network.log_softmax(-1).gather(-1, clean.clamp(max=4).T)
        torch.testing.assert_close(bounds, -(exact.T * mask).sum(1).double(), rtol=0.5, atol=0)
        alone = scheduler.nll_bound(lambda x, s: table[:3].expand(1, -1, -1), clean[1:, :3], 3, seeded())
        assert alone.shape == (1,)


# Sampling


def step_kernel(scheduler, network, states, k, steps):
    """Where each position goes in step k of the plain sampler, by the formulas of the paper: (states, L, symbols)."""
    n, absorbing = scheduler.config.vocab_size, scheduler.absorbing
    t, s = 1 - k / steps, 1 - (k + 1) / steps
    sigma, sigma_next = (scheduler.noise.sigma(torch.tensor(time, dtype=torch.float64)).item() for time in (t, s))
    sigmas = torch.full((len(states),), sigma, dtype=torch.float64)
    scores = scheduler.log_score(network(states, sigmas), states, torch.full_like(sigmas, t)).exp()
    if absorbing:
        scores = torch.cat([scores, torch.zeros(*states.shape, 1, dtype=torch.float64)], -1)
        scores = scores.scatter(-1, states[..., None], 1)
    last = k == steps - 1
    if scheduler.config.predictor == "euler" and not last:
        rate = scheduler.noise.sigma_slope(torch.tensor([t], dtype=torch.float64)).item() / steps
        jumps = rate * scheduler.graph.transposed_rate(states, torch.float64) * scores
        jumps = jumps.scatter(-1, states[..., None], 0)
        kernel = jumps.scatter(-1, states[..., None], (1 - jumps.sum(-1, keepdim=True)).clamp(min=0))
    else:
        delta = torch.full(states.shape, sigma if last else sigma - sigma_next, dtype=torch.float64)
        kernel = scheduler.graph.staggered_score(scores, delta) * scheduler.graph.transposed_transition(states, delta)
        if last and absorbing:
            kernel[..., n] = 0
    kernel = kernel.clamp(min=0)
    return kernel / kernel.sum(-1, keepdim=True)


def step_law(p, scheduler, network, k, steps):
    """The law of whole sequences after step k, every position on its own given all."""
    states = sequences(p.shape[0], p.ndim)
    kernel = step_kernel(scheduler, network, states, k, steps)
    joint = p.flatten()[:, None] * kernel[:, 0]
    for i in range(1, p.ndim):
        joint = joint[..., None] * kernel[:, i].reshape(len(states), *[1] * i, -1)
    return joint.sum(0).reshape(p.shape)


def plain_law(scheduler, network, length, steps):
    n = scheduler.config.vocab_size
    symbols = n + 1 if scheduler.absorbing else n
    p = torch.zeros((symbols,) * length, dtype=torch.float64)
    if scheduler.absorbing:
        p[(n,) * length] = 1
    else:
        p += n**-length
    for k in range(steps):
        p = step_law(p, scheduler, network, k, steps)
    return p[(slice(0, n),) * length]


def total_variation(p, q):
    return ((p - q).abs().sum() / 2).item()


@pytest.mark.parametrize("schedule", ["loglinear", "geometric", "cosine"])
@pytest.mark.parametrize(
    ("graph_type", "predictor", "parameterization"), [c for c in CONFIGS if c[1] in ("event", "analytic", "euler")]
)
def test_the_law_of_few_steps(graph_type, predictor, parameterization, schedule):
    """Three steps for three positions or fewer steps than positions, against the exact law of the plain sampler."""
    steps = 2 if predictor == "event" else 4
    scheduler = ScoreEntropyScheduler(
        3, graph_type, schedule, 0.02, 4.0, predictor=predictor, parameterization=parameterization
    )
    network = Oracle(law(3, 3), scheduler)
    plain = scheduler if predictor != "event" else scheduler.from_config(scheduler.config, predictor="analytic")
    expected = plain_law(plain, network, 3, steps)
    assert expected.sum().item() == pytest.approx(1)
    tokens = sample(scheduler, network, (20_000, 3), steps, seeded(4))
    assert fits(tokens, expected) > 1e-3
    assert total_variation(expected, law(3, 3)) > 0.02  # and not that of the data


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize(
    ("graph_type", "parameterization"), [("absorb", "score"), ("uniform", "score"), ("uniform", "normalized")]
)
@pytest.mark.parametrize("predictor", ["analytic", "euler"])
def test_the_law_of_each_step(predictor, graph_type, parameterization, schedule):
    """From every token, also where the network is wrong: a step forgets less than a whole run."""
    scheduler = ScoreEntropyScheduler(
        3, graph_type, schedule, 0.02, 4.0, predictor=predictor, parameterization=parameterization
    )
    network = table_network(3, 1)
    if parameterization == "score":  # near the truth, so that no probability is negative
        oracle = Oracle(law(3, 1), scheduler)
        network = lambda x, t: oracle(x, t) + 0.02 * table_network(3, 1)(x, t)  # noqa: E731
    states = sequences(4 if graph_type == "absorb" else 3, 1)
    for k in range(3):
        kernel = step_kernel(scheduler, network, states, k, 3)[:, 0]
        scheduler.set_timesteps(3)
        scheduler.start((8000 * len(states), 1), seeded(k))
        tokens = states.repeat_interleave(8000, 0)
        for index in range(k + 1):
            t = scheduler.timesteps[index]
            arrived = scheduler.step(network(tokens, t), t, tokens).prev_sample
        for state, row in enumerate(arrived.reshape(len(states), 8000)):
            possible = kernel[state] > 1e-3
            observed = torch.bincount(row, minlength=len(kernel[state]))[possible]
            expected = kernel[state][possible] / kernel[state][possible].sum()
            assert observed.sum() > 7900
            if len(expected) > 1:
                assert stats.chisquare(observed.numpy(), (expected * observed.sum()).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_more_steps_come_nearer(graph_type):
    p0, scheduler = law(3, 2), ScoreEntropyScheduler(3, graph_type, predictor="analytic")
    network = Oracle(p0, scheduler)
    distances = [total_variation(plain_law(scheduler, network, 2, steps), p0) for steps in (4, 16, 64)]
    assert distances[1] < distances[0] / 2.5 and distances[2] < distances[1] / 2.5


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("parameterization", ["normalized", "score"])
def test_event_reproduces_the_law_of_the_data(parameterization, schedule):
    p0 = law(3, 3)
    scheduler = ScoreEntropyScheduler(3, noise_schedule=schedule, parameterization=parameterization)
    tokens = sample(scheduler, Oracle(p0, scheduler), (200_000, 3), 3, seeded(5))
    assert len(scheduler.timesteps) == 3
    assert fits(tokens, p0) > 1e-3


def test_event_is_exact_in_every_order():
    """Not by chance: each of the orders occurs equally often, and within each the draws invert the conditionals."""
    scheduler = ScoreEntropyScheduler(3)
    trace = []
    tokens = sample(scheduler, Oracle(law(3, 3), scheduler), (12_000, 3), 3, seeded(6), trace)
    when = sum((x == 3).long() for x in [*trace, tokens])
    orders = torch.bincount((when * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    orders = orders[orders > 0]
    assert len(orders) == 6 and stats.chisquare(orders.numpy()).pvalue > 1e-3
    first = when.argmin(1)
    marginals = [law(3, 3).sum(dim=[j for j in range(3) if j != i]) for i in range(3)]
    for i in range(3):
        assert fits(tokens[first == i][:, i : i + 1], marginals[i]) > 1e-3


def test_steps_at_which_masks_are_revealed():
    """Log-linear: the steps of the pre-drawn sampler are uniform, and so are the calls of the exact one."""
    steps, length = 6, 8
    scheduler = ScoreEntropyScheduler(4, eps=0.0)
    logits = torch.randn(length, 4, generator=seeded())
    trace = []
    sample(scheduler, lambda x, t: logits.expand(len(x), -1, -1), (2000, length), steps, seeded(), trace)
    assert len(scheduler.timesteps) == steps
    sigma = scheduler.timesteps
    levels = scheduler.sigma(1 - torch.arange(steps) / steps)
    reveal = torch.zeros(steps)
    for call, x in enumerate(trace):
        following = trace[call + 1] if call + 1 < len(trace) else torch.zeros_like(x)
        step = (sigma[call][:, None] - levels).abs().argmin(1)
        reveal.index_add_(0, step, ((x == 4) & (following != 4)).sum(1).float())
    assert stats.chisquare(reveal.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [1, 32])
def test_network_calls(batch_size):
    """min(steps, masks) at most; on average steps (1 - (1 - 1 / steps)^length) for one sample, whatever the batch."""
    network = lambda x, t: torch.zeros(*x.shape, 4)  # noqa: E731
    length = 20
    for predictor in ("event", "analytic", "euler", "confidence"):
        scheduler = ScoreEntropyScheduler(4, predictor=predictor)
        for steps in (1, 7, 20, 64, 1000):
            sample(scheduler, network, (batch_size, length), steps, seeded())
            assert len(scheduler.timesteps) <= min(steps, length)
            known = torch.arange(length) < 15
            sample(
                scheduler, network, (batch_size, length), steps, seeded(),
                known_tokens=torch.zeros(length, dtype=torch.long), known_mask=known,
            )  # fmt: skip
            assert len(scheduler.timesteps) <= min(steps, 5)
    scheduler, counts = ScoreEntropyScheduler(4, predictor="analytic", eps=0.0), []
    for seed in range(100):
        scheduler.set_timesteps(24)
        scheduler.start((batch_size, length), seeded(seed))
        counts.append(len(scheduler.timesteps))
    if batch_size == 1:
        expected = 24 * (1 - (1 - 1 / 24) ** length)
        assert abs(np.mean(counts) - expected) < 3 * np.std(counts) / 10
    else:
        assert max(counts) <= 20 and np.mean(counts) < 18  # the largest number of distinct steps, not of all together


def test_small_probabilities_survive():
    """4096 codes, Zipf: tokens come with their probabilities, however small the probability of moving at all."""
    weights = 1 / torch.arange(1, 4097, dtype=torch.float64)
    weights = (weights / weights.sum()).float()[None, None].expand(1, 2000, -1)
    expected = weights[0, 0].double() / weights[0, 0].double().sum() * 2000
    grid = (torch.arange(2000, dtype=torch.float64)[None] + 0.5) / 2000
    counts = torch.bincount(draw_tokens(weights.log(), grid)[0], minlength=4096)
    assert (counts - expected).abs().max() < 1.01  # draws in equal distances: right to one
    # A tail of 2000 tokens of 1e-9 each, which the last digit of a float32 sum near 1 does not see
    tail = torch.cat([torch.tensor([1.0]), torch.full((2000,), 1e-9)]).log()[None, None].expand(1, 2000, -1)
    from_the_top = 1 - (2000 - 2000 * grid) * 1e-9 / (1 + 2e-6)
    assert torch.equal(draw_tokens(tail, from_the_top)[0], 1 + torch.arange(2000))
    masks = torch.full((1, 2000), 4096)
    assert torch.equal(draw_jumps(tail.exp(), masks, from_the_top)[0], 1 + torch.arange(2000))
    for scale in (1e-4, 1e-9):
        total = (scale * weights[0, 0]).double().sum()
        arrived = draw_jumps(scale * weights, masks, grid * total)[0]
        assert (torch.bincount(arrived, minlength=4096) - expected).abs().max() < 1.01
        assert (draw_jumps(scale * weights, masks, total * (1 + grid)) == 4096).all()
    assert (uniforms((1, 99), seeded(), None) * 2**24 % 1 != 0).all()  # and the draws are not float32's multiples
    too_much = draw_jumps(3 * weights, masks, grid)[0]  # as if there were no staying
    assert (torch.bincount(too_much, minlength=4096) - expected).abs().max() < 1.01
    certain = draw_jumps(1e-9 * weights, masks, grid, torch.tensor(True))[0]
    assert (torch.bincount(certain, minlength=4096) - expected).abs().max() < 1.01


def test_impossible_tokens_are_never_drawn():
    """Not by the first or the last number there is, either."""
    weights = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.7, 0.0]).expand(1, 2, -1)
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(weights.log(), ends).tolist() == [[2, 4]]
    masks, certain = torch.full((1, 2), 6), torch.tensor(True)
    assert draw_jumps(weights, masks, ends, certain).tolist() == [[2, 4]]
    assert draw_jumps(0 * weights, masks, ends).tolist() == [[6, 6]]


@pytest.mark.parametrize("predictor", ["event", "analytic"])
def test_no_truncation_at_16384_steps(predictor):
    """One position: what is revealed has the law of the softmax; a float32 race is 31 percent off here."""
    weights = 1 / torch.arange(1, 4097, dtype=torch.float64)
    logits = weights.log().float()
    scheduler = ScoreEntropyScheduler(4096, predictor=predictor)
    observed = torch.zeros(4096)
    for seed in range(20):
        tokens = sample(scheduler, lambda x, t: logits.expand(len(x), 1, -1), (1000, 1), 16384, seeded(seed))
        observed += torch.bincount(tokens[:, 0], minlength=4096)
    edges = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
    bins = torch.bucketize(torch.arange(4096), edges, right=True)
    binned = torch.zeros(len(edges)).index_add_(0, bins, observed)[1:]
    expected = torch.zeros(len(edges), dtype=torch.float64).index_add_(0, bins, weights / weights.sum())[1:]
    assert stats.chisquare(binned.numpy(), (expected * observed.sum()).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("predictor", ["analytic", "euler"])
@pytest.mark.parametrize("log_sum", [-3.0, 3.0])
def test_scores_with_a_wrong_sum(predictor, log_sum):
    """Scores that promise too little or too much: no mask is left, and the tokens have the law of their ratios."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    scheduler = ScoreEntropyScheduler(4, predictor=predictor, parameterization="score")
    network = lambda x, t: (weights.log() + log_sum + math.log(4)).expand(*x.shape, -1)  # noqa: E731
    trace = []
    tokens = sample(scheduler, network, (5000, 1), 4, seeded(), trace)
    assert tokens.max() < 4 and fits(tokens, weights) > 1e-3
    revealed = (trace[1] != 4).double().mean().item()
    assert revealed == pytest.approx(min(1, 0.25 * math.exp(log_sum)), abs=0.01)


def test_euler_is_analytic_for_the_log_linear_schedule():
    network = table_network(4, 3)
    for schedule, same in (("loglinear", True), ("geometric", False)):
        tokens = [
            sample(ScoreEntropyScheduler(4, noise_schedule=schedule, predictor=p), network, (500, 3), 9, seeded())
            for p in ("analytic", "euler")
        ]
        assert torch.equal(*tokens) == same


@pytest.mark.parametrize("predictor", ["event", "analytic", "remdm", "confidence"])
def test_known_tokens(predictor):
    """They come back as they are, and with the exact sampler the others follow the law given them."""
    p0 = law(3, 3)
    scheduler = ScoreEntropyScheduler(3, predictor=predictor, remask_cap=0.5)
    network, known = Oracle(p0, scheduler), torch.tensor([[False, True, False]])
    clean = torch.tensor([[9, 2, 9]])
    trace = []
    tokens = sample(
        scheduler, network, (20_000, 3), 8, seeded(), trace, known_tokens=clean, known_mask=known.expand(20_000, -1)
    )
    assert all((x[:, 1] == 2).all() for x in [*trace, tokens])
    if predictor == "event":
        assert fits(tokens[:, [0, 2]], p0[:, 2] / p0[:, 2].sum()) > 1e-3
    everything = torch.tensor([[0, 1, 2]])
    tokens = sample(scheduler, None, (1, 3), 8, known_tokens=everything, known_mask=everything >= 0)
    assert torch.equal(tokens, everything) and len(scheduler.timesteps) == 0


def test_known_tokens_that_are_none():
    scheduler = ScoreEntropyScheduler(4)
    scheduler.set_timesteps(3)
    known = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a token 4, which is the mask: tokens must lie in 0 \.\.\. 3"):
        scheduler.start((1, 2), known_tokens=torch.tensor([[1, 4]]), known_mask=known)
    with pytest.raises(ValueError, match="a token -1: tokens must lie"):
        scheduler.start((1, 2), known_tokens=torch.tensor([[1, -1]]), known_mask=known)
    with pytest.raises(ValueError, match="pass both"):
        scheduler.start((1, 2), known_mask=known)
    uniform = ScoreEntropyScheduler(4, "uniform")
    uniform.set_timesteps(3)
    with pytest.raises(ValueError, match="uniform graph cannot keep known tokens"):
        uniform.start((1, 2), known_tokens=torch.zeros(1, 2, dtype=torch.long), known_mask=known)


@pytest.mark.parametrize(("graph_type", "predictor", "parameterization"), CONFIGS)
def test_samples_do_not_know_their_batch(graph_type, predictor, parameterization):
    """A generator each: a sample is the same alone, in another order, and with more sites known in its neighbour."""
    scheduler = ScoreEntropyScheduler(
        5, graph_type, predictor=predictor, parameterization=parameterization, temperature=0.9
    )
    network = table_network(5, 4)
    for steps in (3, 16):
        together = sample(scheduler, network, (3, 4), steps, [seeded(i) for i in range(3)])
        again = sample(scheduler, network, (3, 4), steps, [seeded(i) for i in range(3)])
        backwards = sample(scheduler, network, (3, 4), steps, [seeded(i) for i in (2, 1, 0)])
        assert torch.equal(together, again) and torch.equal(together, backwards.flip(0))
        assert together.min() >= 0 and together.max() < 5
        for i in range(3):
            assert torch.equal(sample(scheduler, network, (1, 4), steps, [seeded(i)]), together[i : i + 1])
        if graph_type == "absorb":
            known = torch.zeros(3, 4, dtype=torch.bool)
            known[1, :3] = True
            partly = sample(
                scheduler, network, (3, 4), steps, [seeded(i) for i in range(3)],
                known_tokens=torch.zeros(3, 4, dtype=torch.long), known_mask=known,
            )  # fmt: skip
            assert torch.equal(partly[[0, 2]], together[[0, 2]])
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        sample(scheduler, network, (3, 4), 2, [seeded(), seeded()])


@pytest.mark.parametrize(("graph_type", "predictor", "parameterization"), CONFIGS)
def test_codebooks_are_sites(graph_type, predictor, parameterization):
    """Two codebooks of three positions are six sites: noise, loss, bound and samples are the same."""
    scheduler = ScoreEntropyScheduler(5, graph_type, predictor=predictor, parameterization=parameterization)
    logits = torch.randn(4, 6, 5, generator=seeded())
    clean = torch.randint(5, (4, 6), generator=seeded(1))
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    mask = torch.arange(3) < torch.tensor([[3], [2], [3], [1]])
    stacked = lambda x: x.reshape(4, 2, 3, *x.shape[2:])  # noqa: E731
    noisy = scheduler.add_noise(clean, t, seeded(2), mask.repeat(1, 2))
    assert torch.equal(scheduler.add_noise(stacked(clean), t, seeded(2), mask), stacked(noisy))
    losses = scheduler.loss(logits, noisy, clean, t, mask.repeat(1, 2))
    torch.testing.assert_close(scheduler.loss(stacked(logits), stacked(noisy), stacked(clean), t, mask), losses)
    bound = scheduler.nll_bound(lambda x, s: logits, clean, 3, seeded(3), mask.repeat(1, 2))
    ours = scheduler.nll_bound(lambda x, s: stacked(logits), stacked(clean), 3, seeded(3), mask)
    torch.testing.assert_close(ours, bound)
    for steps in (3, 10):
        flat = sample(scheduler, lambda x, t: logits, (4, 6), steps, seeded(4))
        assert torch.equal(sample(scheduler, lambda x, t: stacked(logits), (4, 2, 3), steps, seeded(4)), stacked(flat))
        if graph_type == "absorb":
            known = dict(known_tokens=clean, known_mask=mask.repeat(1, 2))
            flat = sample(scheduler, lambda x, t: logits, (4, 6), steps, seeded(4), **known)
            known = dict(known_tokens=stacked(clean), known_mask=mask)
            ours = sample(scheduler, lambda x, t: stacked(logits), (4, 2, 3), steps, seeded(4), **known)
            assert torch.equal(ours, stacked(flat))


@pytest.mark.parametrize("predictor", ["event", "analytic", "euler", "remdm"])
def test_logits_are_needed_at_the_positions_only(predictor):
    scheduler, network = ScoreEntropyScheduler(5, predictor=predictor), table_network(5, 4)
    for steps in (1, 3, 30):
        everywhere = sample(scheduler, network, (6, 4), steps, seeded())
        tokens = scheduler.start((6, 4), seeded())
        seen = 0
        for t in scheduler.timesteps:
            logits, positions = network(tokens, t), scheduler.positions
            if positions is None:
                seen += 4
            else:
                seen += positions.shape[1]
                logits = logits.gather(1, positions[..., None].expand(-1, -1, 5))
            tokens = scheduler.step(logits, t, tokens).prev_sample
        assert torch.equal(tokens, everywhere)
        if predictor == "event" and steps == 30:
            assert seen == 4  # one for each token
    with pytest.raises(ValueError, match="calls are done"):
        scheduler.step(logits, t, tokens)
    scheduler.start((6, 4), seeded())
    with pytest.raises(ValueError, match=r"`model_output` has the shape \(6, 4, 6\)"):
        scheduler.step(torch.zeros(6, 4, 6), t, tokens)


def test_noise_levels_that_the_network_is_told():
    """In the exact order the level at which that many masks are usual; in steps the level of the step."""
    scheduler = ScoreEntropyScheduler(4, noise_schedule="cosine")
    scheduler.set_timesteps(64)
    known = torch.arange(8) >= torch.tensor([[8], [2]])
    scheduler.start((2, 8), known_tokens=torch.zeros(2, 8, dtype=torch.long), known_mask=known)
    left = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1], [2, 1, 0, 0, 0, 0, 0, 0]]).T
    alpha = (1 - left / 8).clamp(min=1e-3)
    torch.testing.assert_close(scheduler.timesteps, -torch.log(alpha), rtol=1e-5, atol=1e-7)
    scheduler.set_timesteps(5)
    scheduler.start((2, 100), seeded())
    levels = -torch.log(1e-3 + (1 - 1e-3) * torch.cos(math.pi / 2 * (1 - torch.arange(5) / 5)))
    torch.testing.assert_close(scheduler.timesteps, levels[:, None].expand(-1, 2), rtol=1e-5, atol=1e-6)


def test_remasking_keeps_the_marginals():
    """After each step a token is a mask with probability m, and otherwise has its law, for any cap; the cap 0 is the
    plain sampler."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    network = lambda x, t: weights.log().expand(*x.shape, -1)  # noqa: E731
    for cap in (0.0, 0.3, 1.0):
        scheduler = ScoreEntropyScheduler(4, predictor="remdm", remask_cap=cap)
        trace = []
        tokens = sample(scheduler, network, (20_000, 1), 5, seeded(), trace)
        masks = [(x == 4).double().mean().item() for x in [*trace, tokens]]
        expected = [1 - k / 5 for k in range(6)]
        np.testing.assert_allclose(masks, expected, atol=4 * 0.5 / math.sqrt(20_000))
        for x in [*trace[1:], tokens]:
            assert fits(x[x < 4][:, None], weights) > 1e-3
        changed = sum(((a < 4) & (b == 4)).double().mean().item() for a, b in itertools.pairwise([*trace, tokens]))
        if cap == 0:
            assert changed == 0
        else:  # alpha = k / 5 before step k: a fraction g = min(cap, (1 - alpha') / alpha) of it is masked again
            usual = sum(k / 5 * min(cap, (1 - (k + 1) / 5) / (k / 5)) for k in range(1, 5))
            assert changed == pytest.approx(usual, abs=0.02)
    plain = ScoreEntropyScheduler(3, predictor="analytic")
    scheduler = ScoreEntropyScheduler(3, predictor="remdm", remask_cap=0.0)
    oracle = Oracle(law(3, 3), scheduler)
    assert fits(sample(scheduler, oracle, (20_000, 3), 3, seeded()), plain_law(plain, oracle, 3, 3)) > 1e-3


def test_confidence_reveals_the_surest_first():
    """Without noise: the order of the largest probabilities, as many per call as the schedule says."""
    scheduler = ScoreEntropyScheduler(4, predictor="confidence", confidence_noise=0.0)
    sharpness = torch.tensor([1.0, 5.0, 3.0, 0.5, 4.0, 2.0])
    logits = sharpness[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    network = lambda x, t: logits.expand(len(x), -1, -1)  # noqa: E731
    trace = []
    known = torch.tensor([[False] * 6, [True, False, False, False, False, True]])
    sample(
        scheduler, network, (2, 6), 3, seeded(), trace, known_tokens=torch.zeros(2, 6, dtype=torch.long),
        known_mask=known,
    )  # fmt: skip
    revealed = [(x != 4).nonzero().tolist() for x in trace[1:]]
    assert [i for row, i in revealed[0] if row == 0] == [1, 4]
    assert [i for row, i in revealed[1] if row == 0] == [1, 2, 4, 5]
    assert [i for row, i in revealed[0] if row == 1] == [0, 1, 4, 5]  # 2 of 4, one left per call after that
    cosine = ScoreEntropyScheduler(4, noise_schedule="cosine", predictor="confidence", eps=0.0)
    trace = []
    sample(cosine, lambda x, t: torch.zeros(*x.shape, 4), (1, 100), 10, seeded(), trace)
    left = [(x == 4).sum().item() for x in trace]
    assert left == [math.floor(100 * (1 - math.cos(math.pi / 2 * (1 - k / 10))) + 1e-9) for k in range(10)]
    # The largest of log-probabilities with Gumbel noise: each position comes first in proportion to its probability,
    # and with half of the masks left, when half the noise is added, to its square.
    noisy = scheduler.from_config(scheduler.config, confidence_noise=1.0)
    surest = logits.softmax(-1).amax(-1).double()
    trace = []
    sample(noisy, lambda x, t: logits.expand(len(x), -1, -1), (10_000, 6), 6, seeded(), trace)
    first = (trace[1] != 4).sum(0)
    assert stats.chisquare(first.numpy(), (10_000 * surest / surest.sum()).numpy()).pvalue > 1e-3
    rest = trace[3] == 4
    expected = torch.where(rest, surest**2, 0)
    expected = (expected / expected.sum(1, keepdim=True)).sum(0)
    fourth = ((trace[4] != 4) & rest).sum(0)
    assert stats.chisquare(fourth.numpy(), expected.numpy()).pvalue > 1e-3


def test_restricted_tokens_against_numpy():
    logits = torch.randn(5, 9, generator=seeded(), dtype=torch.float64)
    for row, law_of_row in zip(logits.numpy(), logits.softmax(-1).numpy(), strict=True):
        row_tensor = torch.from_numpy(row)
        order = np.argsort(-row)
        cold = np.exp(row / 0.6) / np.exp(row / 0.6).sum()
        np.testing.assert_allclose(restrict_tokens(row_tensor, 0.6).exp(), cold, rtol=1e-10)
        kept = np.where(np.isin(np.arange(9), order[:3]), law_of_row, 0)
        np.testing.assert_allclose(restrict_tokens(row_tensor, top_k=3).exp(), kept / kept.sum(), rtol=1e-10)
        count = next(k for k in range(1, 10) if law_of_row[order[:k]].sum() >= 0.7)
        kept = np.where(np.isin(np.arange(9), order[:count]), law_of_row, 0)
        np.testing.assert_allclose(restrict_tokens(row_tensor, top_p=0.7).exp(), kept / kept.sum(), rtol=1e-10)
        assert restrict_tokens(row_tensor, 0.0).exp().tolist() == [float(i == order[0]) for i in range(9)]
    torch.testing.assert_close(restrict_tokens(logits, 1.0, 20, 1.0), logits.log_softmax(-1))


@pytest.mark.parametrize(("graph_type", "predictor", "parameterization"), CONFIGS)
def test_restrictions_spare_the_probability_of_moving(graph_type, predictor, parameterization):
    """The same generator: what is revealed, or changes, is the same at every temperature; only the tokens differ."""
    network = lambda x, t: torch.arange(5.0).expand(*x.shape, -1) / 3  # noqa: E731
    traces = []
    for restriction in ({}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        scheduler = ScoreEntropyScheduler(
            5, graph_type, predictor=predictor, parameterization=parameterization, confidence_noise=0.0, **restriction
        )
        trace = []
        tokens = sample(scheduler, network, (50, 30), 6, seeded(), trace)
        traces.append([*trace, tokens])
        if graph_type == "absorb":
            allowed = {
                "top_k": {3, 4},
                "top_p": {3, 4},
                "temperature": {4} if restriction == {"temperature": 0.0} else set(range(5)),
            }
            for name in restriction:
                assert set(tokens.unique().tolist()) <= allowed[name]
    for trace in traces[1:]:
        if graph_type == "absorb":
            for plain, restricted in zip(traces[0], trace, strict=True):
                assert torch.equal(plain == 5, restricted == 5)
        else:  # the tokens before differ after the first step
            assert torch.equal(traces[0][1] != traces[0][0], trace[1] != trace[0])
            assert parameterization == "score" or not torch.equal(traces[0][1], trace[1])


def test_guidance():
    conditional = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    unconditional = torch.randn(4, 6, generator=seeded(1), dtype=torch.float64) + 2
    torch.testing.assert_close(guided_logits(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided_logits(conditional, unconditional, 0.0).softmax(-1), unconditional.softmax(-1))
    product = conditional.softmax(-1) ** 2.5 * unconditional.softmax(-1) ** -1.5
    guided = guided_logits(conditional, unconditional, 2.5)
    torch.testing.assert_close(guided.softmax(-1), product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(guided.logsumexp(-1), conditional.logsumexp(-1))
    conditional[:, 2] = unconditional[:, 2] = -math.inf  # illegal there
    guided = guided_logits(conditional, unconditional, 2.5)
    assert (guided[:, 2] == -math.inf).all() and torch.isfinite(guided.logsumexp(-1)).all()
    # Strong guidance leaves the number of masks per step alone, also where the network has a say in it.
    traces = []
    for scale in (1.0, 5.0):
        scheduler = ScoreEntropyScheduler(6, predictor="analytic", parameterization="score")
        trace = []
        network = lambda x, t, scale=scale: guided_logits(  # noqa: E731
            torch.arange(6.0).expand(*x.shape, -1), torch.zeros(*x.shape, 6), scale
        )
        sample(scheduler, network, (10, 40), 8, seeded(), trace)
        traces.append(trace)
    for a, b in zip(*traces, strict=True):
        assert torch.equal(a == 6, b == 6)


def test_illegal_tokens_never_come():
    """Logits of -inf, as layouts with legal symbols per position have them."""
    legal = torch.arange(6) % 2 == torch.arange(4)[:, None] % 2
    logits = torch.randn(4, 6, generator=seeded()).masked_fill(~legal, -math.inf)
    for predictor in ("event", "analytic", "remdm", "confidence"):
        scheduler = ScoreEntropyScheduler(6, predictor=predictor)
        tokens = sample(scheduler, lambda x, t: logits.expand(len(x), -1, -1), (500, 4), 3, seeded())
        assert (tokens % 2 == torch.arange(4) % 2).all()
    t, clean = torch.full((500,), 0.7), tokens
    output = logits.expand(500, -1, -1).clone().requires_grad_()
    for graph_type in ("absorb", "uniform"):
        scheduler = ScoreEntropyScheduler(6, graph_type)
        losses = scheduler.loss(output, scheduler.add_noise(clean, t, seeded()), clean, t)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()


# As a component of diffusers


def test_configuration_round_trip(tmp_path):
    scheduler = ScoreEntropyScheduler(17, "uniform", "geometric", 1e-5, 15.0, top_k=4)
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert "Infinity" not in text and json.loads(text)["predictor"] == "analytic"
    again = ScoreEntropyScheduler.from_pretrained(tmp_path)
    assert dict(again.config) == dict(scheduler.config) and again.noise == scheduler.noise
    warmer = ScoreEntropyScheduler.from_config(scheduler.config, temperature=1.5, predictor="euler")
    assert (warmer.config.temperature, warmer.config.predictor, warmer.config.vocab_size) == (1.5, "euler", 17)
    assert ScoreEntropyScheduler(17).config.predictor == "event"
    assert ScoreEntropyScheduler(17).mask_token_id == 17 and scheduler.mask_token_id is None


def test_set_timesteps_forgets_the_last_run():
    scheduler, network = ScoreEntropyScheduler(4), table_network(4, 5)
    scheduler.set_timesteps(7)
    first = scheduler.timesteps.clone()
    tokens = scheduler.start((2, 5), seeded())
    (after,) = scheduler.step(network(tokens, None), scheduler.timesteps[0], tokens, return_dict=False)
    assert scheduler.step_index == 1 and not torch.equal(after, tokens)
    scheduler.set_timesteps(7)
    assert torch.equal(scheduler.timesteps, first) and scheduler.step_index is None and first.shape == (7,)
    with pytest.raises(ValueError, match=r"call `scheduler\.start"):
        scheduler.step(network(tokens, None), first[0], tokens)
    assert torch.equal(scheduler.start((2, 5), seeded()), tokens)
    assert torch.equal(scheduler.step(network(tokens, None), None, tokens).prev_sample, after)
    with pytest.raises(ValueError, match=r"call `scheduler\.set_timesteps"):
        ScoreEntropyScheduler(4).start((1, 2))
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        scheduler.set_timesteps(0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"graph_type": "absorbing"}, "`graph_type` is 'absorbing': it must be one of absorb, uniform"),
        ({"noise_schedule": "log"}, "`noise_schedule` is 'log'"),
        ({"parameterization": "subs"}, "`parameterization` is 'subs'"),
        ({"predictor": "none"}, "`predictor` is 'none'"),
        ({"graph_type": "uniform", "predictor": "event"}, "the uniform graph has the predictors analytic and euler"),
        ({"vocab_size": 1}, "`vocab_size` is 1"),
        ({"sigma_min": 0.0}, "`sigma_min` is 0.0"),
        ({"eps": 1.0}, "`eps` is 1.0"),
        ({"eps": 0.0, "graph_type": "uniform"}, "`eps` is 0.0"),
        ({"sampling_eps": 0.0}, "`sampling_eps` is 0.0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"top_k": 0}, "`top_k` 0"),
        ({"top_p": 0.0}, "`top_p` 0.0"),
        ({"remask_cap": 2.0}, "`remask_cap` is 2.0"),
        ({"confidence_noise": -1.0}, "`confidence_noise` -1.0"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ScoreEntropyScheduler(**{"vocab_size": 5, **config})


# Against the original, in float64


@needs_golden
@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("graph_type", ["absorb", "uniform"])
def test_golden_mathematics(graph_type, schedule):
    golden = {
        key: torch.from_numpy(value)
        for key, value in np.load(Path(GOLDEN) / "sedd_math" / f"{graph_type}_{schedule}.npz").items()
    }

    def check(ours, key, atol=1e-14):
        torch.testing.assert_close(ours, golden[key], rtol=1e-10, atol=atol)

    n, t, xt, x0 = int(golden["num_tokens"]), golden["t"], golden["xt"], golden["x0"]
    scheduler = ScoreEntropyScheduler(n, graph_type, schedule, parameterization="score")
    graph, sigma = scheduler.graph, golden["sigma"][:, None].expand(xt.shape)
    check(scheduler.noise.sigma(t), "sigma")
    check(scheduler.noise.sigma_slope(t), "dsigma")
    check(scheduler.noise.sigma(t - golden["dt"]), "sigma_next")
    delta, score = golden["delta_sigma"][:, None].expand(xt.shape), golden["log_score"].exp()
    check(graph.rate(x0, torch.float64), "rate_x0")
    check(graph.transposed_rate(xt, torch.float64), "transp_rate")
    check(graph.transposed_transition(xt, delta), "transp_transition")
    check(graph.staggered_score(score, delta), "staggered_score", 1e-11)
    check(graph.staggered_score(score, delta) * graph.transposed_transition(xt, delta), "probs_analytic", 1e-11)
    check(graph.staggered_score(score, sigma), "staggered_score_denoise", 1e-11)
    logits = golden["log_score"][..., :n]
    if graph_type == "absorb":
        log_e = torch.log(torch.expm1(sigma))
        entropy = graph.score_entropy(logits + log_e[..., None], x0) / torch.expm1(sigma)
        check(torch.where(xt == n, entropy, 0), "score_entropy")
        logits = logits + log_e[..., None] + math.log(n)
    else:
        check(graph.transition(x0, sigma), "transition_x0")
        check(graph.score_entropy(golden["log_score"], sigma, xt, x0), "score_entropy", 1e-9)
    check(scheduler.loss(logits, xt, x0, t), "loss_per_sequence", 1e-9)


@needs_golden
def test_golden_precision():
    """What float32 reaches where the original has no number."""
    golden = np.load(Path(GOLDEN) / "sedd_math" / "uniform_precision.npz")
    sigma = torch.from_numpy(golden["sigma"]).float()
    assert np.isnan(golden["reference_float32"]).sum() == 24
    for row, n in enumerate(golden["num_tokens"].tolist()):
        for column in (0, 1):
            tokens = torch.zeros(len(sigma), dtype=torch.long)
            ours = UniformGraph(n).score_entropy(torch.zeros(len(sigma), n), sigma, tokens, tokens + column)
            np.testing.assert_allclose(ours, golden["stable_float64"][row, :, column], rtol=1e-5, atol=1e-8)
