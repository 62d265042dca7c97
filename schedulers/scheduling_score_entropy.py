"""Score-entropy discrete diffusion: noise laws on tokens, their losses, likelihood bounds and samplers.

Papers:
    SEDD            Lou et al., "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution",
                    https://huggingface.co/papers/2310.16834
    RADD            Ou et al., "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of
                    Clean Data", https://huggingface.co/papers/2406.03736
    MDLM            Sahoo et al., "Simple and Effective Masked Diffusion Language Models",
                    https://huggingface.co/papers/2406.07524
    first hitting   Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit
                    Inaccurate Categorical Sampling", https://huggingface.co/papers/2409.02908
    ReMDM           Wang et al., "Remasking Discrete Diffusion Models with Inference-Time Scaling",
                    https://huggingface.co/papers/2503.00307

Symbols: N real tokens, M = N the mask, t in [0, 1] from clean to noise, sigma(t) the total noise, alpha = exp(-sigma)
the probability that a token is still untouched, m = 1 - alpha, E = exp(sigma) - 1 = m / alpha, s_y the score, that is
the probability of a sequence with one token changed to y over the probability of the sequence as it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


Generators = torch.Generator | list[torch.Generator] | None

GRAPHS = ("absorb", "uniform")
PARAMETERIZATIONS = ("normalized", "score")
PREDICTORS = ("event", "analytic", "euler", "remdm", "confidence")
T_SAMPLINGS = ("stratified", "uniform", "importance", "mask_count")


def accurate(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, or in float32 where the device has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Network outputs of half precision in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def per_row(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per row (or for all rows), shaped to multiply `like`."""
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def per_site(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A mask over (rows and) positions, spread over the codebooks of `tokens` if it has them."""
    if mask.ndim == 2 and tokens.ndim == 3:
        mask = mask[:, None]
    return mask.to(tokens.device, torch.bool).expand(tokens.shape)


def uniforms(shape: Sequence[int], generator: Generators, device: torch.device | str | None) -> torch.Tensor:
    """
    Float64 numbers in [0, 1), from a generator per row if there is a list of them.

    Float32 numbers are multiples of 2^-24: an event with a smaller probability would come with a wrong one.
    """
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples: pass one, or one per sample.")
    rows, device = shape[0] // len(generators), torch.device(device or "cpu")
    parts = []
    for source in generators:
        origin = source.device if source is not None else device
        dtype = torch.float32 if origin.type == "mps" else torch.float64
        parts.append(torch.rand(rows, *shape[1:], generator=source, device=origin, dtype=dtype))
    return placed(torch.cat(parts), device)


def placed(draws: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers in [0, 1) on a device; where it has no float64, cut to the digits of float32, which would round to 1."""
    if device.type == "mps" and draws.dtype == torch.float64:
        draws = ((2**24 * draws).floor() / 2**24).float()
    return draws.to(device, non_blocking=device.type != "cpu")  # a copy to the CPU is read at once


def unit_vectors(tokens: torch.Tensor, states: int, dtype: torch.dtype) -> torch.Tensor:
    """1 at the token, 0 at the other states; `one_hot` in the dtype that is wanted."""
    return torch.zeros(*tokens.shape, states, dtype=dtype, device=tokens.device).scatter_(-1, tokens[..., None], 1)


# Noise schedules. Each method maps times, a tensor, to a tensor of the same shape.

# m(t) = (1 - eps) g(t): g, its derivative and its inverse, for alpha = 1 - (1 - eps) t and for MDLM's alpha =
# eps + (1 - eps) cos(pi t / 2) and its square. Working with m keeps the digits near t = 0 and makes eps = 0 legal.
MASKED_SHAPES: dict[str, tuple[Callable, Callable, Callable]] = {
    "loglinear": (lambda t: t, torch.ones_like, lambda g: g),
    "cosine": (
        lambda t: 2 * torch.sin(math.pi / 4 * t).square(),
        lambda t: math.pi / 2 * torch.sin(math.pi / 2 * t),
        lambda g: 4 / math.pi * torch.asin((g / 2).sqrt()),
    ),
    "cosine_squared": (
        lambda t: torch.sin(math.pi / 2 * t).square(),
        lambda t: math.pi / 2 * torch.sin(math.pi * t),
        lambda g: 2 / math.pi * torch.asin(g.sqrt()),
    ),
}
NOISE_SCHEDULES = (*MASKED_SHAPES, "geometric", "linear")


@dataclass(frozen=True)
class MaskedFractionSchedule:
    """A schedule given by m(t), the probability that a token has been touched."""

    shape: str
    eps: float

    def masked(self, t: torch.Tensor) -> torch.Tensor:
        """m(t)."""
        return (1 - self.eps) * MASKED_SHAPES[self.shape][0](t)

    def masked_slope(self, t: torch.Tensor) -> torch.Tensor:
        """dm / dt."""
        return (1 - self.eps) * MASKED_SHAPES[self.shape][1](t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """-ln(1 - m(t)); at most 36.7, so that networks get a number at m = 1."""
        return -torch.log1p(-self.masked(t).clamp(max=1 - 2**-53 if t.dtype == torch.float64 else 1 - 2**-24))

    def sigma_slope(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        return self.masked_slope(t) / (1 - self.masked(t))

    def time(self, masked: torch.Tensor) -> torch.Tensor:
        """t of m; 1 for what is above m(1)."""
        return MASKED_SHAPES[self.shape][2]((masked / (1 - self.eps)).clamp(max=1))


@dataclass(frozen=True)
class SigmaSchedule:
    """A schedule given by sigma(t): sigma_min^(1 - t) sigma_max^t, or linear in between."""

    geometric: bool
    sigma_min: float
    sigma_max: float

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """sigma(t)."""
        if self.geometric:
            return self.sigma_min ** (1 - t) * self.sigma_max**t
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def sigma_slope(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        if self.geometric:
            return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def masked(self, t: torch.Tensor) -> torch.Tensor:
        """m(t)."""
        return -torch.expm1(-self.sigma(t))

    def masked_slope(self, t: torch.Tensor) -> torch.Tensor:
        """dm / dt."""
        return self.sigma_slope(t) * torch.exp(-self.sigma(t))

    def time(self, masked: torch.Tensor) -> torch.Tensor:
        """t of m, kept in [0, 1]."""
        sigma = -torch.log1p(-masked)
        if self.geometric:
            t = torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        else:
            t = (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)
        return t.clamp(0, 1)


# The two graphs: Markov chains in which every token jumps on its own, with the generator sigma'(t) Q. Each method maps
# tokens (...) to rows (..., states); sigma has as many dimensions as the tokens, and can be broadcast to them.


@dataclass(frozen=True)
class AbsorbingGraph:
    """Every token becomes the mask, the last state, at unit rate, and stays it."""

    vocab_size: int

    def _unit(self, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The unit vectors of the tokens, and 1 where they are masks."""
        masked = (tokens == self.vocab_size)[..., None]
        return unit_vectors(tokens, self.vocab_size + 1, dtype), masked.to(dtype)

    def rate(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q[x, y], from the token x to every y."""
        to_mask = torch.zeros(self.vocab_size + 1, dtype=dtype, device=tokens.device)
        to_mask[-1] = 1
        return to_mask - self._unit(tokens, dtype)[0]

    def transposed_rate(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q[y, x], from every y to the token x: times the score, the rate from x to y of the reverse chain."""
        unit, masked = self._unit(tokens, dtype)
        return masked - unit

    def transition(self, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """exp(sigma Q)[x, y], the law after the total noise sigma of what was x."""
        unit, _ = self._unit(tokens, sigma.dtype)
        law = torch.exp(-sigma)[..., None] * unit
        law[..., -1] = law[..., -1] - torch.expm1(-sigma)
        return law

    def transposed_transition(self, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """exp(sigma Q)[y, x]: the probability of x where the token had been y."""
        unit, masked = self._unit(tokens, sigma.dtype)
        return torch.exp(-sigma)[..., None] * unit - torch.expm1(-sigma)[..., None] * masked

    def staggered_score(self, score: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The score, with its noise taken back by sigma: exp(-sigma Q) applied to the scores of all states."""
        staggered = torch.exp(sigma)[..., None] * score
        staggered[..., -1] = staggered[..., -1] - torch.expm1(sigma) * score.sum(-1)
        return staggered

    def score_entropy(self, log_ratio: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """
        Score entropy of a masked token, times E: Z - ln(E s_x0) - 1, where Z = sum_y E s_y is 1 at the truth.

        With p = E s / Z it is -ln p_x0 + Z - 1 - ln Z. (Tokens that are no mask have none.) `log_ratio` is ln(E s).
        """
        log_z = torch.logsumexp(log_ratio, -1)
        cross_entropy = log_z - log_ratio.gather(-1, clean[..., None])[..., 0]
        return cross_entropy + torch.expm1(log_z) - log_z


@dataclass(frozen=True)
class UniformGraph:
    """Every token is replaced at unit rate by one drawn from all N, itself included."""

    vocab_size: int

    def rate(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q[x, y], from the token x to every y; Q is symmetric."""
        return 1 / self.vocab_size - unit_vectors(tokens, self.vocab_size, dtype)

    transposed_rate = rate

    def transition(self, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """exp(sigma Q)[x, y], which is symmetric too."""
        unit = unit_vectors(tokens, self.vocab_size, sigma.dtype)
        return torch.exp(-sigma)[..., None] * unit - torch.expm1(-sigma)[..., None] / self.vocab_size

    transposed_transition = transition

    def staggered_score(self, score: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The score, with its noise taken back by sigma: exp(-sigma Q) applied to the scores of all states."""
        sigma = sigma[..., None]
        return torch.exp(sigma) * score - torch.expm1(sigma) / self.vocab_size * score.sum(-1, keepdim=True)

    def score_entropy(
        self, log_score: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, clean: torch.Tensor
    ) -> torch.Tensor:
        """
        (1 / N) sum over y != x of q_y h(ln s_y - ln q_y), h(d) = e^d - 1 - d, q the ratios of the law given the clean
        token. In float32 each term keeps its digits, down to the tiny ones near the truth.

        Where the token is untouched all q_y are r = E / (E + N), elsewhere that of the clean token is 1 / r and the
        others are 1. (As 1 - N / (E + N), r would be 0 for a large N and a small sigma, and r ln r not a number.)
        """
        n = self.vocab_size
        inverse_r = 1 + n / torch.expm1(sigma)
        log_r = -torch.log(inverse_r)
        untouched = tokens == clean
        log_q = torch.where(untouched, log_r, 0)
        distance = log_score - log_q[..., None]
        distance = distance.scatter(-1, tokens[..., None], 0).scatter(-1, clean[..., None], 0)
        others = torch.exp(log_q) * (torch.expm1(distance) - distance).sum(-1)
        distance = log_score.gather(-1, clean[..., None])[..., 0] + log_r
        return (others + torch.where(untouched, 0, inverse_r * (torch.expm1(distance) - distance))) / n


def leave_one_out_log_score(log_probs: torch.Tensor, masked: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Log-scores of the uniform graph from pi, the law of the clean token given the *other* positions: s_y = c_y / c_x,

        c_y = alpha pi_y + m / N.

    They have the bounds of true scores, E / (E + N) and its inverse.

    Args:
        log_probs (`torch.Tensor` of shape `(..., N)`): ln pi.
        masked (`torch.Tensor`): m, with the dimensions of `tokens`.
        tokens (`torch.Tensor` of shape `(...)`): x.
    """
    masked = masked[..., None]
    law = torch.log((1 - masked) * log_probs.exp() + masked / log_probs.shape[-1])
    return law - law.gather(-1, tokens[..., None])


# What the network's logits say


def cross_entropy(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """-ln softmax(logits) at the clean tokens."""
    return F.cross_entropy(logits.flatten(0, -2), clean.flatten(), reduction="none").reshape(clean.shape)


def restrict_tokens(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """
    Normalised log-probabilities at a temperature, of the k likeliest tokens, of the fewest with a mass of at least p.

    Temperature 0 leaves the likeliest token.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    log_probs = torch.log_softmax(logits / temperature, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        best, index = log_probs.topk(top_k, -1)
        log_probs = torch.full_like(log_probs, -math.inf).scatter(-1, index, best).log_softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = log_probs.sort(-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        kept = torch.where(mass_before < top_p, ordered, -math.inf)
        log_probs = torch.empty_like(log_probs).scatter(-1, index, kept).log_softmax(-1)
    return log_probs


def guided_logits(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """
    Logits of p_c^w p_u^(1 - w), normalised to the sum that the conditional ones have; 1 is no guidance.

    Guidance of the reverse rates multiplies the rate of unmasking as well, so that strong guidance reveals everything
    at once. Here it moves probability between tokens, and the sum, which is the rate of unmasking, stays.
    """
    log_probs = torch.log_softmax(unconditional, -1)
    guided = log_probs + guidance_scale * (torch.log_softmax(conditional, -1) - log_probs)
    guided = torch.where(conditional == -math.inf, conditional, guided)  # tokens that are illegal there
    return torch.log_softmax(guided, -1) + torch.logsumexp(conditional, -1, keepdim=True)


def draw_tokens(log_probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """
    Tokens by the inverse of the distribution function, in float64; `draws` are uniform in [0, 1).

    A race of exponential variates in float32 gives a token of probability p the rate p a / (e^a - 1), a = 2^-24 / p.
    """
    cumulative = accurate(log_probs).exp().cumsum(-1)
    return torch.searchsorted(cumulative, (draws * cumulative[..., -1])[..., None], right=True)[..., 0]


def draw_jumps(
    weights: torch.Tensor, tokens: torch.Tensor, draws: torch.Tensor, certain: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Tokens that jump to y with the probability `weights[..., y]` (0 for the token itself), and stay with what is left.

    Weights with a sum above 1 are normalised, and those of a jump that is `certain` in any case. The probability of
    staying never meets that of a single token, which may lie below the last digit of their sum.
    """
    cumulative = accurate(weights).cumsum(-1)
    total = cumulative[..., -1]
    scale = total.clamp(min=1)
    draws = draws * (scale if certain is None else torch.where(certain, total, scale))
    arrived = torch.searchsorted(cumulative, draws[..., None], right=True)[..., 0]
    return torch.where(draws < total, arrived, tokens)


@dataclass
class PlannedCall:
    """What one network call reveals, known before the run; sites are positions of all codebooks in one row."""

    positions: torch.Tensor  # (batch_size, count): the sites where the network's output is needed
    targets: torch.Tensor  # the same, with one past the last site where a row has fewer of them
    draws: torch.Tensor  # a number in [0, 1) for each
    remasked: torch.Tensor | None = None  # (batch_size, sites): what becomes a mask after this call

    def to(self, device: torch.device) -> "PlannedCall":
        """The plan on the device of the tokens, so that no step has to wait for it."""
        parts = {name: placed(part, device) for name, part in vars(self).items() if part is not None}
        return PlannedCall(**parts)


def planned_call(revealed: torch.Tensor, draws: torch.Tensor, remasked: torch.Tensor | None = None) -> PlannedCall:
    """The call that reveals the sites where `revealed`, `(batch_size, sites)`, is True."""
    rows, sites = revealed.nonzero(as_tuple=True)
    counts = revealed.sum(1)
    slots = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    shape = len(revealed), max(1, int(counts.max()))
    positions, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, revealed.shape[1])
    positions[rows, slots] = sites
    targets[rows, slots] = sites
    if shape[1] == revealed.shape[1]:  # everything in some row: in the order of the sites in all of them
        positions = torch.arange(shape[1]).expand(shape)
        targets = torch.where(revealed, positions, shape[1])
    return PlannedCall(positions, targets, draws.gather(1, positions), remasked)


@dataclass
class ScoreEntropySchedulerOutput(BaseOutput):
    """
    Output of [`ScoreEntropyScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of the shape of the sample):
            The tokens for the next network call.
    """

    prev_sample: torch.Tensor


class ScoreEntropyScheduler(SchedulerMixin, ConfigMixin):
    """
    Noise, loss, likelihood bound and sampling of score-entropy diffusion on tokens of shape `(batch_size, length)` or
    `(batch_size, codebooks, length)`; several codebooks are just more sites.

    The network gets tokens and `sigma` per sample, and returns logits f over the N real tokens, `(*tokens.shape, N)`.
    Sampling:

        scheduler.set_timesteps(num_inference_steps)
        tokens = scheduler.start((batch_size, length), generator, device)
        for t in scheduler.timesteps:  # sigma, of shape (batch_size,)
            logits = network(tokens, t, positions=scheduler.positions)
            tokens = scheduler.step(logits, t, tokens).prev_sample

    `start` plans the run, and with it the number of network calls. `positions`, `(batch_size, count)` indices into the
    codebooks one after the other (codebook * length + position), is what the next call will reveal, so that the head
    need only be computed there, for logits of shape `(batch_size, count, N)`; `None` stands for all. `step` takes the
    logits of all positions just as well. With a list of generators each sample has its own, and depends on no other.

    Predictors:

    - `"event"` (absorbing graph): whether a mask is revealed in a step does not depend on the network, so the steps
      are drawn first, and each sample jumps to its next step that reveals something: no more calls than steps or
      masks. With as many steps as masks the order is random, one by one, and nothing is left to discretise.
    - `"analytic"`: the reverse transition over a step (tau-leaping with the staggered score), `"euler"`: its rate
      times the step. With the absorbing graph and normalised logits both skip the steps that reveal nothing.
    - `"remdm"` (absorbing): also makes tokens masks again, with the same marginals; one call per step.
    - `"confidence"` (absorbing): reveals where the likeliest token is most probable; good with few steps, biased.

    The last step of each denoises fully: no mask is left.

    Args:
        vocab_size (`int`): N, the number of real tokens. With the absorbing graph N itself is the mask.
        graph_type (`"absorb"` or `"uniform"`, *optional*, defaults to `"absorb"`):
            Noise makes a token a mask, or replaces it by a random one.
        noise_schedule (*optional*, defaults to `"loglinear"`):
            `"loglinear"`, `"cosine"`, `"cosine_squared"` (with `eps`), `"geometric"`, `"linear"` (with `sigma_min`,
            `sigma_max`).
        sigma_min, sigma_max (`float`, *optional*, defaults to 1e-4 and 20.0): sigma(0) and sigma(1).
        eps (`float`, *optional*, defaults to 1e-3): alpha(1).
        parameterization (`"normalized"` or `"score"`, *optional*, defaults to `"normalized"`):
            `"normalized"`: softmax(f) is the law of the clean token, given the unmasked ones, or for the uniform graph
            given the other positions. `"score"`: s = e^f / (E N) for the absorbing graph, s = e^f for the uniform one.
        predictor (`str`, *optional*): See above; `"event"`, or `"analytic"` for the uniform graph, when not given.
        temperature, top_k, top_p (*optional*, defaults to 1.0, `None`, `None`):
            Restrict the law of a revealed token, or of a token that changes; never whether it is revealed.
        sampling_eps (`float`, *optional*, defaults to 1e-3): Smallest t in training.
        remask_cap (`float`, *optional*, defaults to 0.02): Largest probability that `"remdm"` masks a token in a step.
        confidence_noise (`float`, *optional*, defaults to 1.0):
            Gumbel noise on the log-probabilities that `"confidence"` compares, times the share of masks left.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        graph_type: Literal["absorb", "uniform"] = "absorb",
        noise_schedule: Literal["loglinear", "geometric", "cosine", "cosine_squared", "linear"] = "loglinear",
        sigma_min: float = 1e-4,
        sigma_max: float = 20.0,
        eps: float = 1e-3,
        parameterization: Literal["normalized", "score"] = "normalized",
        predictor: Literal["event", "analytic", "euler", "remdm", "confidence"] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        sampling_eps: float = 1e-3,
        remask_cap: float = 0.02,
        confidence_noise: float = 1.0,
    ):
        # diffusers takes arguments given by position for defaults, which `from_config` would drop.
        self.register_to_config(_use_default_values=[])
        if predictor is None:
            self.register_to_config(predictor="event" if graph_type == "absorb" else "analytic")
        for name, choices in (
            ("graph_type", GRAPHS),
            ("noise_schedule", NOISE_SCHEDULES),
            ("parameterization", PARAMETERIZATIONS),
            ("predictor", PREDICTORS),
        ):
            if self.config[name] not in choices:
                raise ValueError(f"`{name}` is {self.config[name]!r}: it must be one of {', '.join(choices)}.")
        if graph_type == "uniform" and self.config.predictor not in ("analytic", "euler"):
            raise ValueError(f"`predictor` is {predictor!r}: the uniform graph has the predictors analytic and euler.")
        if vocab_size < 2:
            raise ValueError(f"`vocab_size` is {vocab_size}: there must be at least 2 tokens.")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"`sigma_min` is {sigma_min}, `sigma_max` {sigma_max}: use 0 < sigma_min < sigma_max.")
        if not 0 <= eps < 1 or (eps == 0 and graph_type == "uniform"):
            raise ValueError(f"`eps` is {eps}: it must lie in [0, 1), above 0 for the uniform graph.")
        if not 0 < sampling_eps < 1:
            raise ValueError(f"`sampling_eps` is {sampling_eps}: it must lie in (0, 1).")
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(
                f"`temperature` is {temperature}, `top_k` {top_k}, `top_p` {top_p}: use 0 or more, 1 or more, (0, 1]."
            )
        if not 0 <= remask_cap <= 1 or confidence_noise < 0:
            raise ValueError(
                f"`remask_cap` is {remask_cap}, `confidence_noise` {confidence_noise}: use [0, 1] and 0 or more."
            )
        if noise_schedule in MASKED_SHAPES:
            self.noise: MaskedFractionSchedule | SigmaSchedule = MaskedFractionSchedule(noise_schedule, eps)
        else:
            self.noise = SigmaSchedule(noise_schedule == "geometric", sigma_min, sigma_max)
        self.graph = AbsorbingGraph(vocab_size) if graph_type == "absorb" else UniformGraph(vocab_size)
        self.num_inference_steps = None
        self.timesteps = torch.empty(0)
        self._step_index: int | None = None

    @property
    def absorbing(self) -> bool:
        """Whether noise makes tokens masks."""
        return self.config.graph_type == "absorb"

    @property
    def mask_token_id(self) -> int | None:
        """The mask, N, with the absorbing graph."""
        return self.config.vocab_size if self.absorbing else None

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next network call; `None` before `start`."""
        return self._step_index

    # Noise

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The network's timestep: the total noise sigma(t), in float32."""
        return self.noise.sigma(accurate(t)).float()

    def check_tokens(self, tokens: torch.Tensor) -> None:
        """Refuse what is no token: a ValueError that names it."""
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        n = self.config.vocab_size
        if low < 0 or high >= n:
            mask = ", which is the mask" if self.absorbing and high == n and low >= 0 else ""
            raise ValueError(f"there is a token {low if low < 0 else high}{mask}: tokens must lie in 0 ... {n - 1}.")

    def sample_limit(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Tokens that are all noise: masks, or uniformly random tokens."""
        if self.absorbing:
            return torch.full(tuple(shape), self.config.vocab_size, device=device)
        return (uniforms(shape, generator, device) * self.config.vocab_size).long()

    def add_noise(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        generator: Generators = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Touch each token with the probability m(t).

        Args:
            tokens (`torch.Tensor`): Clean tokens.
            t (`torch.Tensor` of shape `(batch_size,)`): Times in [0, 1].
            generator (`torch.Generator` or a list of them, *optional*): A list draws sample by sample.
            mask (`torch.Tensor`, *optional*):
                True for tokens, False for padding, which stays as it is: `(batch_size, length)` or like the tokens.
        """
        touched = uniforms(tokens.shape, generator, tokens.device) < per_row(self.noise.masked(accurate(t)), tokens)
        if mask is not None:
            touched &= per_site(mask, tokens)
        return torch.where(touched, self.sample_limit(tokens.shape, generator, tokens.device), tokens)

    def sample_noisy(
        self,
        tokens: torch.Tensor,
        generator: Generators = None,
        mask: torch.Tensor | None = None,
        t_sampling: Literal["stratified", "uniform", "importance", "mask_count"] = "stratified",
        strata: tuple[torch.Tensor, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        A training batch: noisy tokens, their times t from `sampling_eps` to 1, and the weights of `loss` for them.

        `"stratified"` puts one uniform time into each of `batch_size` equal parts. `"importance"` makes ln m uniform
        (MDLM's change of time): the weight of the cross-entropy, m' / m, becomes the same at all times.
        `"mask_count"` masks k of the n tokens, k stratified in 1 ... n, and its weights make the loss the
        order-agnostic bound n / k * cross-entropy (RADD), of smaller variance than with a random number of masks.
        For a batch that is a share of a larger one, `strata` gives the number of each sample's part, and of all parts.
        """
        if t_sampling not in T_SAMPLINGS:
            raise ValueError(f"`t_sampling` is {t_sampling!r}: it must be one of {', '.join(T_SAMPLINGS)}.")
        rows = len(tokens)
        draws = uniforms((rows, 1), generator, tokens.device)[:, 0]
        if t_sampling != "uniform":
            part, parts = strata or (torch.arange(rows, device=tokens.device), rows)
            draws = (part + draws) / parts
        if t_sampling == "mask_count":
            noisy, share = self._mask_share(tokens, draws, generator, mask)
            t = self.noise.time(share)
            return noisy, t, self.noise.masked(t) / self.noise.masked_slope(t) / share
        low = self.config.sampling_eps
        t, weight = low + (1 - low) * draws, torch.ones_like(draws)
        if t_sampling == "importance":
            first, last = self.noise.masked(draws.new_tensor([low, 1.0])).log()
            t = self.noise.time(torch.exp(first + (last - first) * draws))
            weight = (last - first) / (1 - low) * self.noise.masked(t) / self.noise.masked_slope(t)
        return self.add_noise(tokens, t, generator, mask), t, weight

    def _mask_share(
        self, tokens: torch.Tensor, quantile: torch.Tensor, generator: Generators, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask k tokens of each row, k the quantile of the uniform law on 1 ... n; also k / n."""
        if not self.absorbing:
            raise ValueError("the uniform graph has no masks to count: use another `t_sampling`.")
        order = uniforms(tokens.shape, generator, tokens.device)
        if mask is not None:
            order = order.masked_fill(~per_site(mask, tokens), 2)
        order = order.flatten(1)
        count = (order < 2).sum(1)
        masked = (quantile * count).floor() + 1
        chosen = (order.argsort(1).argsort(1) < masked[:, None]).reshape(tokens.shape)
        return tokens.masked_fill(chosen, self.config.vocab_size), masked / count.clamp(min=1)

    def _summed(self, entropy: torch.Tensor, noisy: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The sum over what has a loss: not padding, and with the absorbing graph only masks."""
        if self.absorbing:
            entropy = torch.where(noisy == self.config.vocab_size, entropy, 0)
        if mask is not None:
            entropy = torch.where(per_site(mask, noisy), entropy, 0)
        return entropy.flatten(1).sum(1)

    # Loss and likelihood

    def log_score(self, model_output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """
        ln s_y for the N real tokens; 0 at the token itself for the uniform graph. Only masks have scores in the other.

        Args:
            model_output (`torch.Tensor` of shape `(*noisy.shape, N)`): What the network returned.
            noisy (`torch.Tensor`): Its argument.
            t (`torch.Tensor` of shape `(batch_size,)`): Times.
        """
        output, t = at_least_float32(model_output), accurate(t)
        if self.absorbing:
            log_e = per_row(torch.log(torch.expm1(self.noise.sigma(t))), output).to(output.dtype)
            if self.config.parameterization == "score":
                return output - math.log(self.config.vocab_size) - log_e
            return output.log_softmax(-1) - log_e
        if self.config.parameterization == "score":
            return output.scatter(-1, noisy[..., None], 0)
        masked = per_row(self.noise.masked(t), noisy).to(output.dtype)
        return leave_one_out_log_score(output.log_softmax(-1), masked, noisy)

    def loss(
        self,
        model_output: torch.Tensor,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        sigma'(t) times the score entropy, summed over the tokens: per sequence, in nats. Its mean over t bounds -ln p.

        Args:
            model_output (`torch.Tensor` of shape `(*noisy.shape, N)`): What the network returned.
            noisy (`torch.Tensor`): Its argument, from `add_noise`.
            clean (`torch.Tensor`): The clean tokens; anything in padding.
            t (`torch.Tensor` of shape `(batch_size,)`): Times.
            mask (`torch.Tensor`, *optional*): True for tokens, False for padding, which has no loss.
        """
        output, t = at_least_float32(model_output), accurate(t)
        clean = clean.clamp(0, self.config.vocab_size - 1)
        if isinstance(self.graph, AbsorbingGraph):
            # sigma' / E = m' / m, also at alpha = 0, where sigma is infinite
            weight = self.noise.masked_slope(t) / self.noise.masked(t)
            if self.config.parameterization == "normalized":
                entropy = cross_entropy(output, clean)
            else:
                entropy = self.graph.score_entropy(output - math.log(self.config.vocab_size), clean)
        else:
            weight = self.noise.sigma_slope(t)
            noisy = noisy.clamp(0, self.config.vocab_size - 1)
            sigma = per_row(self.noise.sigma(t), noisy).to(output.dtype)
            entropy = self.graph.score_entropy(self.log_score(output, noisy, t), sigma, noisy, clean)
        return weight.to(output.dtype) * self._summed(entropy, noisy, mask)

    @torch.no_grad()
    def nll_bound(
        self,
        network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tokens: torch.Tensor,
        num_draws: int = 16,
        generator: Generators = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        An unbiased estimate of an upper bound of -ln p(tokens), per sequence in nats.

        Absorbing graph: the mean over k in 1 ... n and over k masks among the n tokens of n / k * cross-entropy
        (RADD), which is the mean over all orders of -ln of what the exact `"event"` sampler gives; it needs no t.
        Uniform graph: the integral of the loss over t, what remains to be guessed at t = 0, and the Kullback-Leibler
        divergence of the noise at t = 1 from its limit. In both, k and t are stratified over the draws.

        Args:
            network (`Callable`): Maps tokens and sigma, of shape `(batch_size,)`, to logits.
            tokens (`torch.Tensor`): Clean tokens.
            num_draws (`int`, *optional*, defaults to 16): Network calls.
            generator (`torch.Generator` or a list of them, *optional*): A list draws sample by sample.
            mask (`torch.Tensor`, *optional*): True for tokens, False for padding.
        """
        total = accurate(torch.zeros(len(tokens), device=tokens.device))
        clean = tokens.clamp(0, self.config.vocab_size - 1)
        for draw in range(num_draws):
            quantile = (draw + uniforms((len(tokens), 1), generator, tokens.device)[:, 0]) / num_draws
            if self.absorbing:
                noisy, share = self._mask_share(tokens, quantile, generator, mask)
                output = at_least_float32(network(noisy, self.sigma(self.noise.time(share))))
                total += self._summed(cross_entropy(output, clean), noisy, mask) / share / num_draws
            else:
                t = 1 - quantile
                noisy = self.add_noise(tokens, t, generator, mask)
                total += self.loss(network(noisy, self.sigma(t)), noisy, tokens, t, mask) / num_draws
        return total if self.absorbing else total + self._boundary_terms(network, tokens, generator, mask)

    def _boundary_terms(
        self,
        network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tokens: torch.Tensor,
        generator: Generators,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the bound of the uniform graph has besides the integral over t, per sequence."""
        n, ends = self.config.vocab_size, torch.tensor([0.0, 1.0], dtype=torch.float64)
        sigma_0, sigma_1 = self.noise.sigma(ends).tolist()
        other, own = -math.expm1(-sigma_1) / n, math.exp(-sigma_1) - math.expm1(-sigma_1) / n
        terms = torch.full(tokens.shape, (n - 1) * other * math.log(n * other) + own * math.log(n * own))
        terms = accurate(terms.to(tokens.device))
        if sigma_0 > 0:
            t = torch.zeros(len(tokens), device=tokens.device)
            noisy = self.add_noise(tokens, t, generator, mask)
            law = self._denoised_law(accurate(network(noisy, self.sigma(t))), noisy, 0.0, sigma_0)
            clean = tokens.clamp(0, n - 1)[..., None]
            terms = terms - (law.gather(-1, clean) / law.sum(-1, keepdim=True)).log()[..., 0]
        return (terms if mask is None else torch.where(per_site(mask, tokens), terms, 0)).flatten(1).sum(1)

    # Sampling

    def guide(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """Logits for `step` that follow a condition more than the network does (see [`guided_logits`])."""
        return guided_logits(conditional, unconditional, guidance_scale)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """
        Set the number of steps from t = 1 to t = 0. `start` plans a run with them.

        Args:
            num_inference_steps (`int`): With `"event"`, as many as there are tokens is as exact as it gets.
            device (`torch.device` or `str`, *optional*): Where `timesteps` go.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}: it must be at least 1.")
        self.num_inference_steps = num_inference_steps
        # On the CPU, where reading a number does not wait for a GPU.
        self._times = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        self._masked = self.noise.masked(self._times)
        self._masked[-1] = 0  # the last step denoises fully
        self.timesteps = self.sigma(self._times[:-1]).to(device)
        self._step_index = None

    def start(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        known_tokens: torch.Tensor | None = None,
        known_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Plan a run: sets `timesteps`, one row of sigma per network call, and returns the tokens to begin with.

        Args:
            shape (`Sequence[int]`): `(batch_size, length)` or `(batch_size, codebooks, length)`.
            generator (`torch.Generator` or a list of them, *optional*):
                Draws everything in this run, also in `step`; a list draws sample by sample.
            device (`torch.device` or `str`, *optional*): Where the tokens go.
            known_tokens (`torch.Tensor` of that shape, *optional*): Tokens to keep.
            known_mask (`torch.Tensor`, *optional*):
                True where they are to be kept: of that shape, or `(batch_size, length)`. Samples are conditioned on
                these exactly, so that no step touches them.
        """
        if self.num_inference_steps is None:
            raise ValueError("`start` was called before `set_timesteps`: call `scheduler.set_timesteps(n)` first.")
        sample = self.sample_limit(shape, generator, device)
        free = torch.ones(sample.shape, dtype=torch.bool)
        if known_mask is not None and known_tokens is not None:
            if not self.absorbing:
                raise ValueError("the uniform graph cannot keep known tokens: use a network of the absorbing graph.")
            known, known_tokens = per_site(known_mask, sample), known_tokens.to(sample.device)
            self.check_tokens(known_tokens.expand(sample.shape)[known])
            sample = torch.where(known, known_tokens, sample)
            free = ~known.cpu()
        elif known_mask is not None or known_tokens is not None:
            raise ValueError("pass both `known_tokens` and `known_mask`, or neither.")
        self._generator, self._step_index, self._sites = generator, 0, free[0].numel()
        self.timesteps = self._plan(free.flatten(1)).to(sample.device)
        self._calls = [call.to(sample.device) for call in self._calls]
        self._counts = self._counts.to(sample.device)
        return sample

    def _plan(self, free: torch.Tensor) -> torch.Tensor:
        """Draw what can be drawn before the run, for the sites where `free`; returns sigma per call and sample."""
        self._calls, self._counts = [], torch.zeros(1, len(free), dtype=torch.long)
        every_step = self.sigma(self._times[:-1])[:, None].expand(-1, len(free))
        if not free.any():
            return every_step[:0]
        predictor = self.config.predictor
        if predictor == "confidence":
            return self._plan_counts(free)
        if predictor == "remdm":
            self._plan_remasking(free)
        elif predictor == "event" or (self.absorbing and self.config.parameterization == "normalized"):
            return self._plan_reveals(free)
        return every_step

    @property
    def positions(self) -> torch.Tensor | None:
        """Where the next call's logits are needed, `(batch_size, count)` indices of sites; `None` for everywhere."""
        if self._step_index is None or self._step_index >= len(self._calls):
            return None
        positions = self._calls[self._step_index].positions
        return positions if positions.shape[1] < self._sites else None

    def _reveal_probabilities(self) -> torch.Tensor:
        """Per step, the probability that a mask is revealed: (m_k - m_k+1) / m_k, or Euler's rate m' / m times dt."""
        if self.config.predictor != "euler":
            return 1 - self._masked[1:] / self._masked[:-1]
        rate = self.noise.masked_slope(self._times[:-1]) / self._masked[:-1]
        probabilities = (rate / len(rate)).clamp(max=1)
        probabilities[-1] = 1
        return probabilities

    def _plan_reveals(self, free: torch.Tensor) -> torch.Tensor:
        """
        Draw the step in which each free site is revealed, and number the steps of each sample that reveal any.

        The law is that of the step-by-step sampler, since revealing does not depend on the tokens. Returns sigma per
        call and sample.
        """
        rows, sites = free.shape
        steps = len(self._masked) - 1
        when, draws = uniforms((rows, 2, sites), self._generator, "cpu").unbind(1)
        when = when.masked_fill(~free, 2)
        revealed_by = 1 - (1 - self._reveal_probabilities()).cumprod(0)
        order = when.argsort(1)
        step = torch.searchsorted(
            revealed_by, when.gather(1, order), right=True
        )  # the last ones, `steps`, are not free
        number = free.sum(1, keepdim=True)
        # With as many steps as masks, `"event"` reveals one by one. Else a call is for all that have the same step.
        exact = (number <= steps) & (self.config.predictor == "event")
        first = torch.ones_like(free)
        first[:, 1:] = exact | (step[:, 1:] != step[:, :-1])
        call = ((first & (step < steps)).cumsum(1) - 1).masked_fill(step == steps, sites)
        own_step = torch.zeros(rows, sites + 1, dtype=torch.long).scatter_(1, call, step)[:, :sites]
        # One by one, the network is told the noise at which that many masks are usual.
        left = (number - torch.arange(sites)).clamp(min=0).double() / sites
        levels = self.sigma(self._times)[own_step]
        levels = torch.where(exact, self.sigma(self.noise.time(left)), levels)
        total = int(call.masked_fill(call == sites, -1).max()) + 1
        call = torch.empty_like(call).scatter_(1, order, call)
        self._calls = [planned_call(call == index, draws) for index in range(total)]
        return levels[:, :total].T

    def _plan_remasking(self, free: torch.Tensor) -> None:
        """
        ReMDM's chain of masks, which does not depend on the tokens: with g = min(cap, (1 - alpha') / alpha), a token
        becomes a mask with probability g, a mask is revealed with (alpha' - (1 - g) alpha) / (1 - alpha).
        """
        is_mask = free
        for masked, masked_next in zip(self._masked[:-1].tolist(), self._masked[1:].tolist(), strict=True):
            alpha = 1 - masked
            remask = min(self.config.remask_cap, masked_next / alpha) if alpha > 0 else 0.0
            reveal = (masked - masked_next + remask * alpha) / masked
            when, draws = uniforms((len(free), 2, free.shape[1]), self._generator, "cpu").unbind(1)
            revealed, remasked = is_mask & (when < reveal), free & ~is_mask & (when < remask)
            self._calls.append(planned_call(revealed, draws, remasked))
            is_mask = (is_mask & ~revealed) | remasked

    def _plan_counts(self, free: torch.Tensor) -> torch.Tensor:
        """What `"confidence"` reveals per call and sample: as many as the schedule on average, and at least one."""
        numbers = free.sum(1)
        own_calls = numbers.clamp(max=len(self._masked) - 1)
        calls = int(own_calls.max())
        done = torch.arange(calls + 1)[:, None]
        times = (1 - done / own_calls.clamp(min=1).double()).clamp(min=0)
        masked = self.noise.masked(times)
        left = (numbers * masked / masked[0]).floor().long().masked_fill(times == 0, 0)
        left = ((torch.maximum(left, own_calls - done) + done).cummin(0).values - done).clamp(min=0)
        self._counts = left
        self._most = [int(count) for count in (left[:-1] - left[1:]).amax(1)]
        return self.sigma(times[:-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> ScoreEntropySchedulerOutput | tuple[torch.Tensor]:
        """
        Digest one network call.

        Args:
            model_output (`torch.Tensor` of shape `(*sample.shape, N)` or `(batch_size, count, N)`):
                The logits for `sample`, everywhere or at `positions`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps`; calls are counted, so that it is not read.
            sample (`torch.Tensor`): The tokens.
            generator (`torch.Generator` or a list of them, *optional*): In place of that of `start`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `ScoreEntropySchedulerOutput`.
        """
        index = self._step_index
        if index is None:
            raise ValueError("`step` was called before `start`: call `scheduler.start(shape)` for the first tokens.")
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} calls are done: call `scheduler.start` for another run.")
        tokens = sample.flatten(1)
        output = at_least_float32(model_output).reshape(len(tokens), -1, model_output.shape[-1])
        call = self._calls[index] if self._calls else None
        count = tokens.shape[1]
        if call is not None and output.shape[1] != count:
            count = call.positions.shape[1]
        if output.shape[1:] != (count, self.config.vocab_size):
            raise ValueError(
                f"`model_output` has the shape {tuple(model_output.shape)}, `sample` {tuple(sample.shape)}: logits of "
                f"{self.config.vocab_size} tokens are needed for all positions, or for `scheduler.positions`."
            )
        if call is not None:
            tokens = self._reveal_planned(output, tokens, call)
        elif self.config.predictor == "confidence":
            tokens = self._reveal_confident(output, tokens, index, generator)
        else:
            draws = uniforms(tokens.shape, generator or self._generator, tokens.device)
            tokens = self._jump(output, tokens, index, draws)
        self._step_index = index + 1
        prev_sample = tokens.reshape(sample.shape)
        if not return_dict:
            return (prev_sample,)
        return ScoreEntropySchedulerOutput(prev_sample=prev_sample)

    def _restricted(self, logits: torch.Tensor) -> torch.Tensor:
        return restrict_tokens(logits, self.config.temperature, self.config.top_k, self.config.top_p)

    def _reveal_planned(self, output: torch.Tensor, tokens: torch.Tensor, call: PlannedCall) -> torch.Tensor:
        positions = call.positions
        if output.shape[1] == tokens.shape[1]:
            output = output.gather(1, positions[..., None].expand(-1, -1, output.shape[2]))
        revealed = draw_tokens(self._restricted(output), call.draws)
        tokens = F.pad(tokens, (0, 1)).scatter(1, call.targets, revealed)[:, :-1]
        return tokens if call.remasked is None else tokens.masked_fill(call.remasked, self.config.vocab_size)

    def _reveal_confident(
        self, output: torch.Tensor, tokens: torch.Tensor, index: int, generator: Generators
    ) -> torch.Tensor:
        shape = len(tokens), 2, tokens.shape[1]
        noise, draws = uniforms(shape, generator or self._generator, tokens.device).unbind(1)
        left, after = self._counts[index], self._counts[index + 1]
        share = (left / self._counts[0].clamp(min=1))[:, None]
        confidence = output.amax(-1) - output.logsumexp(-1)
        confidence = confidence - self.config.confidence_noise * share * torch.log(
            -torch.log(noise + torch.finfo(noise.dtype).tiny)
        )
        confidence = confidence.masked_fill(tokens != self.config.vocab_size, -math.inf)
        positions = confidence.topk(self._most[index], -1).indices
        revealed = output.gather(1, positions[..., None].expand(-1, -1, output.shape[2]))
        revealed = draw_tokens(self._restricted(revealed), draws.gather(1, positions))
        wanted = torch.arange(positions.shape[1], device=tokens.device) < (left - after)[:, None]
        return tokens.scatter(1, positions, torch.where(wanted, revealed, tokens.gather(1, positions)))

    def _jump(self, output: torch.Tensor, tokens: torch.Tensor, index: int, draws: torch.Tensor) -> torch.Tensor:
        """A step in which the network says what moves: scores that are not normalised, or the uniform graph."""
        last = index == len(self.timesteps) - 1
        if self.absorbing:
            probability = self._reveal_probabilities()[index].item()
            is_mask = tokens == self.config.vocab_size
            log_mass = torch.logsumexp(output, -1, keepdim=True) - math.log(self.config.vocab_size)
            weights = torch.where(is_mask[..., None], probability * (log_mass + self._restricted(output)).exp(), 0)
            return draw_jumps(weights, tokens, draws, is_mask if last else None)
        weights = self._uniform_weights(output, tokens, index, last).scatter(-1, tokens[..., None], 0)
        total = weights.sum(-1, keepdim=True)
        if (self.config.temperature, self.config.top_k, self.config.top_p) != (1.0, None, None):
            weights = total * self._restricted(weights.log()).exp()
        return draw_jumps(weights, tokens, draws)

    def _uniform_weights(self, output: torch.Tensor, tokens: torch.Tensor, index: int, last: bool) -> torch.Tensor:
        """Probabilities of a step to every token of the uniform graph."""
        t, t_next = self._times[index], self._times[index + 1]
        sigma = self.noise.sigma(t).item()
        if last:
            return self._denoised_law(output, tokens, 0.0, sigma)
        if self.config.predictor == "analytic":
            return self._denoised_law(output, tokens, self.noise.sigma(t_next).item(), sigma)
        scores = self.log_score(output, tokens, output.new_full((1,), t.item())).exp()
        rate = self.noise.sigma_slope(t).item() / len(self.timesteps)
        return rate * self.graph.transposed_rate(tokens, scores.dtype) * scores

    def _denoised_law(
        self, output: torch.Tensor, tokens: torch.Tensor, sigma_next: float, sigma: float
    ) -> torch.Tensor:
        """
        The law of the token at the noise sigma_next (uniform graph): staggered score times transposed transition.

        With pi, the law of the clean token given the other positions, it is Bayes' rule, which needs no difference of
        large numbers: (alpha' pi_z + m' / N) exp(-(sigma - sigma') Q)[z, x] / (alpha pi_x + m / N).
        """
        n, delta, own = self.config.vocab_size, sigma - sigma_next, tokens[..., None]
        if self.config.parameterization == "score":  # with differences, in float64
            scores = accurate(output).scatter(-1, own, 0).exp()
            deltas = scores.new_full(tokens.shape, delta)
            law = self.graph.staggered_score(scores, deltas) * self.graph.transposed_transition(tokens, deltas)
            law = law.clamp(min=0)
            return law / law.sum(-1, keepdim=True)
        pi = output.softmax(-1)
        prior = math.exp(-sigma_next) * pi - math.expm1(-sigma_next) / n
        law = (-math.expm1(-delta) / n * prior).scatter_add(-1, own, math.exp(-delta) * prior.gather(-1, own))
        return law / (math.exp(-sigma) * pi.gather(-1, own) - math.expm1(-sigma) / n)
