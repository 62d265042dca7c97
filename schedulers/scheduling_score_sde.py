"""Score-based diffusion in continuous time: VE, VP and sub-VP, predictor-corrector and probability-flow sampling.

Paper: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
https://huggingface.co/papers/2011.13456 ("the paper" below; equation and algorithm numbers are its own).

All three equations are linear, dx = a(t) x dt + g(t) dw for t in [0, 1], so that x(t) = mean(t) x(0) + std(t) noise.
Networks are conditioned as in the paper: on std(t) for VE, on (num_train_timesteps - 1) t for VP and sub-VP.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


# The explicit Runge-Kutta pair of Dormand and Prince, orders 5 and 4 (J. Comp. Appl. Math. 6, 1980, table 2).
RK_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
RK_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the step itself
)
RK_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4

Generators = torch.Generator | list[torch.Generator] | None
Coefficient = float | torch.Tensor


# The three equations. Each method maps times, a tensor, to two tensors of the same shape.


@dataclass(frozen=True)
class VarianceExploding:
    """dx = g dw with std(t) = sigma_min (sigma_max / sigma_min)^t, the limit of SMLD (equation 9; marginals: 29)."""

    sigma_min: float
    sigma_max: float

    def marginal(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean(t) and std(t)."""
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a(t) and g(t)."""
        growth = math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(t), self.marginal(t)[1] * growth

    def discretised(self, t: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a and g of one of `steps` ancestral steps: SMLD's chain, in which sigma_i^2 - sigma_(i-1)^2 is added."""
        index = (t * (steps - 1)).floor()
        ratio = math.log(self.sigma_max / self.sigma_min) / (steps - 1)
        sigma = self.sigma_min * torch.exp(ratio * index)
        previous = torch.where(index > 0, self.sigma_min * torch.exp(ratio * (index - 1)), 0.0)
        return torch.zeros_like(t), torch.sqrt(sigma**2 - previous**2)

    def langevin_scale(self, t: torch.Tensor, steps: int) -> torch.Tensor:
        """alpha in the step size of the correctors (algorithms 4 and 5)."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class VariancePreserving:
    """dx = -beta x / 2 dt + sqrt(beta) dw with beta(t) linear, the limit of DDPM (equation 11; marginals: 29)."""

    beta_min: float
    beta_max: float

    def beta(self, t: torch.Tensor) -> torch.Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean(self, t: torch.Tensor) -> torch.Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def marginal(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean(t) and std(t)."""
        log_mean = self.log_mean(t)
        return log_mean.exp(), torch.sqrt(-torch.expm1(2 * log_mean))

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a(t) and g(t)."""
        return -self.beta(t) / 2, self.beta(t).sqrt()

    def discrete_beta(self, t: torch.Tensor, steps: int) -> torch.Tensor:
        return self.beta((t * (steps - 1)).floor() / (steps - 1)) / steps

    def discretised(self, t: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a and g of one of `steps` ancestral steps: DDPM's x_i = sqrt(1 - beta_i) x_(i-1) + sqrt(beta_i) noise."""
        beta = self.discrete_beta(t, steps)
        return torch.sqrt(1 - beta) - 1, beta.sqrt()

    def langevin_scale(self, t: torch.Tensor, steps: int) -> torch.Tensor:
        """alpha in the step size of the correctors (algorithms 4 and 5)."""
        return 1 - self.discrete_beta(t, steps)


@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """VP with less noise: g = sqrt(beta (1 - mean^4)), std = 1 - mean^2 (equation 12; marginals: 29)."""

    def marginal(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean(t) and std(t)."""
        log_mean = self.log_mean(t)
        return log_mean.exp(), -torch.expm1(2 * log_mean)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a(t) and g(t)."""
        return -self.beta(t) / 2, torch.sqrt(-self.beta(t) * torch.expm1(4 * self.log_mean(t)))

    def discretised(self, t: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a and g of one of `steps` steps: sub-VP is the limit of no chain, Euler-Maruyama takes its place."""
        return euler_maruyama(*self.coefficients(t), 1 / steps)


# Steps. `drift`, `diffusion` and step sizes broadcast against samples.


def euler_maruyama(drift: torch.Tensor, diffusion: torch.Tensor, dt: float) -> tuple[torch.Tensor, torch.Tensor]:
    """a and g of one Euler-Maruyama step: a dt and g sqrt(dt)."""
    return drift * dt, diffusion * math.sqrt(dt)


def predictor_step(
    x: torch.Tensor, score: torch.Tensor, drift: Coefficient, diffusion: Coefficient, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse SDE discretised as the forward one is: x - a x + g^2 score + g noise (equation 46), and its mean."""
    mean = x - drift * x + diffusion**2 * score
    return mean + diffusion * noise, mean


def langevin_step(
    x: torch.Tensor, score: torch.Tensor, step_size: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Langevin dynamics at a fixed time: x + eps score + sqrt(2 eps) noise (algorithms 4 and 5), and its mean."""
    mean = x + step_size * score
    return mean + torch.sqrt(2 * step_size) * noise, mean


def langevin_step_size(
    snr: float, noise_norm: Coefficient, score_norm: Coefficient, alpha: Coefficient
) -> Coefficient:
    """eps = 2 alpha (snr |noise| / |score|)^2 (algorithms 4 and 5); annealed Langevin: |noise| / |score| is std(t)."""
    return 2 * alpha * (snr * noise_norm / score_norm) ** 2


def probability_flow(x: torch.Tensor, score: torch.Tensor, drift: Coefficient, diffusion: Coefficient) -> torch.Tensor:
    """dx/dt = a x - g^2 score / 2, the ODE with the marginals of the SDE (equation 13)."""
    return drift * x - diffusion**2 * score / 2


def posterior_mean(x: torch.Tensor, score: torch.Tensor, mean: Coefficient, std: Coefficient) -> torch.Tensor:
    """The denoised sample E[x(0) | x(t)] = (x + std^2 score) / mean (Tweedie's formula)."""
    return (x + std**2 * score) / mean


# Copied from tonefield.schedulers.scheduling_poisson_flow.per_row
def per_row(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per row (or for all rows), shaped to multiply `like`."""
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


# Copied from tonefield.schedulers.scheduling_poisson_flow.accurate
def accurate(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, or in float32 where the device has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


# Copied from tonefield.schedulers.scheduling_poisson_flow.dormand_prince_stage
def dormand_prince_stage(start: torch.Tensor, slopes: list[torch.Tensor], step: float | torch.Tensor) -> torch.Tensor:
    """The argument of the next stage, x + h sum_j a_j k_j, from the slopes k_j so far; after six of them, the step."""
    weights = RK_STAGES[len(slopes) - 1]
    return start + step * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


# Copied from tonefield.schedulers.scheduling_poisson_flow.integrate_adaptively
def integrate_adaptively(
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
) -> torch.Tensor:
    """
    Solve dy/du = slope(u, y) from `start` to `end` (either direction) with Dormand-Prince 5(4), each row on its own.

    Every row has its own step size, error estimate and acceptance, so that its result does not depend on the batch it
    is in; all rows are evaluated together, and those that have arrived wait. Step control and first step are those of
    Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section II.4.

    Args:
        slope (`Callable`): Maps u of shape `(batch_size,)` and y of shape `(batch_size, M)` to dy/du.
        state (`torch.Tensor` of shape `(batch_size, M)`): y at `start`.
        rtol, atol (`float`): A step is accepted when rms(error / (atol + rtol * |y|)) < 1.
    """

    def size(vector: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (vector / (atol + rtol * reference)).square().mean(dim=1).sqrt()

    direction = 1.0 if end >= start else -1.0
    u = state.new_full((state.shape[0],), start)
    first = slope(u, state)
    # First step: make an Euler step change y by 1 percent, then correct by the curvature met there (step 5 allows
    # h^5 max(|f|, |f'|) = 0.01).
    d0, d1 = size(state, state.abs()), size(first, state.abs())
    trial = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(end - start))
    ahead = slope(u + direction * trial, state + (direction * trial)[:, None] * first)
    d2 = size(ahead - first, state.abs()) / trial
    bound = torch.maximum(d1, d2)
    second = torch.where(bound <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / bound) ** 0.2)
    length = torch.minimum(100 * trial, second)
    smallest = 10 * torch.finfo(state.dtype).eps * max(abs(start), abs(end))
    rejected = torch.zeros_like(u, dtype=torch.bool)
    while True:
        remaining = (end - u).abs()
        active = remaining > 0
        if not active.any():
            return state
        if (active & ~(length >= smallest)).any():  # also when it is NaN
            raise RuntimeError(f"the ODE step fell below {smallest:.1e}: the denoiser is not finite or not smooth.")
        length = torch.minimum(length, remaining)
        step = direction * length
        slopes = [first]
        for node in RK_NODES[1:]:
            slopes.append(slope(u + node * step, dormand_prince_stage(state, slopes, step[:, None])))
        arrived = dormand_prince_stage(state, slopes, step[:, None])
        last = slope(u + step, arrived)
        error = step[:, None] * sum(w * k for w, k in zip(RK_ERROR, [*slopes, last], strict=True) if w)
        error = size(error, torch.maximum(state.abs(), arrived.abs())).nan_to_num(nan=math.inf)
        accepted = active & (error < 1)
        state = torch.where(accepted[:, None], arrived, state)
        first = torch.where(accepted[:, None], last, first)
        u = torch.where(accepted, torch.where(length == remaining, end, u + step), u)
        factor = (0.9 * error**-0.2).clamp(0.2, 10)
        factor = torch.where(rejected | ~accepted, factor.clamp(max=1), factor)  # no growth around a rejection
        length = torch.where(active, length * factor, length)
        rejected = ~accepted


# Copied from tonefield.schedulers.scheduling_poisson_flow.divergence_probes
def divergence_probes(rows: torch.Tensor, kind: str, generator: Generators) -> list[torch.Tensor]:
    """
    Vectors v such that sum_v v^T J v is the trace of J: the unit vectors ("exact"), or one random vector of signs, for
    which it is the trace on average ("hutchinson", https://huggingface.co/papers/2011.13456, equation 40).
    """
    if kind == "exact":
        return [unit.expand_as(rows) for unit in torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)]
    return [randn_tensor(rows.shape, generator, rows.device, torch.float32).to(rows.dtype).sign()]


# Copied from tonefield.schedulers.scheduling_poisson_flow.with_divergence
def with_divergence(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], probes: list[torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Slope of the state (x, integral of div velocity): along dx/du = velocity, d ln p / du = -div velocity."""

    def slope(u: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            dx = velocity(u, x)
            products = [torch.autograd.grad(dx, x, v, retain_graph=True)[0].mul(v).sum(dim=1) for v in probes]
        return torch.cat([dx, torch.stack(products).sum(dim=0)[:, None]], dim=1).detach()

    return slope


@dataclass
class ScoreSDESchedulerOutput(BaseOutput):
    """
    Output of [`ScoreSDEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of the shape of the sample):
            The argument of the next network call.
        prev_sample_mean (`torch.Tensor` of the shape of the sample):
            The same without the noise that was added; the last call of a run returns it as `prev_sample`.
    """

    prev_sample: torch.Tensor
    prev_sample_mean: torch.Tensor


class ScoreSDEScheduler(SchedulerMixin, ConfigMixin):
    """
    Sampling and likelihood of score-based diffusion models in continuous time.

    Start from `torch.randn(shape) * init_noise_sigma`. `timesteps` lists every network call; with a corrector each
    time is there once per corrector call and once for the predictor.

    Args:
        sde (`"ve"`, `"vp"` or `"subvp"`, *optional*, defaults to `"vp"`):
            The equation.
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            VP and sub-VP networks are conditioned on `(num_train_timesteps - 1) * t`.
        sigma_min, sigma_max (`float`, *optional*, defaults to 0.01 and 50.0):
            Noise levels of VE at t = 0 and t = 1.
        beta_min, beta_max (`float`, *optional*, defaults to 0.1 and 20.0):
            beta(0) and beta(1) of VP and sub-VP.
        sampling_eps (`float`, *optional*, defaults to 1e-3):
            Time at which sampling ends; the paper takes 1e-3 for VP and sub-VP, 1e-5 for VE.
        prediction_type (`"epsilon"` or `"score"`, *optional*, defaults to `"epsilon"`):
            What the network returns: the noise, -std times the score, or the score itself.
        solver_type (`"pc"`, `"euler"`, `"heun"` or `"rk45"`, *optional*, defaults to `"pc"`):
            Predictor-corrector sampling of the SDE, or a solver of the probability-flow ODE on the given grid, which
            ends by denoising ([`~ScoreSDEScheduler.integrate`] chooses its steps by their error instead).
        predictor (`str`, *optional*, defaults to `"reverse_diffusion"`):
            Predictor of `"pc"`: `"reverse_diffusion"`, `"euler_maruyama"` or `"none"`.
        corrector (`"none"`, `"langevin"` or `"ald"`, *optional*, defaults to `"none"`):
            Corrector of `"pc"`: none, Langevin, or annealed Langevin dynamics.
        snr (`float`, *optional*, defaults to 0.16):
            Signal-to-noise ratio of the corrector.
        correct_steps (`int`, *optional*, defaults to 1):
            Corrector calls before each predictor call.
    """

    _compatibles = ["ScoreSdeVeScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sde: Literal["ve", "vp", "subvp"] = "vp",
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sampling_eps: float = 1e-3,
        prediction_type: Literal["epsilon", "score"] = "epsilon",
        solver_type: Literal["pc", "euler", "heun", "rk45"] = "pc",
        predictor: Literal["reverse_diffusion", "euler_maruyama", "none"] = "reverse_diffusion",
        corrector: Literal["none", "langevin", "ald"] = "none",
        snr: float = 0.16,
        correct_steps: int = 1,
    ):
        for name, choices in (
            ("sde", ("ve", "vp", "subvp")),
            ("prediction_type", ("epsilon", "score")),
            ("solver_type", ("pc", "euler", "heun", "rk45")),
            ("predictor", ("reverse_diffusion", "euler_maruyama", "none")),
            ("corrector", ("none", "langevin", "ald")),
        ):
            if self.config[name] not in choices:
                raise ValueError(f"`{name}` is {self.config[name]!r}: it must be one of {', '.join(choices)}.")
        if sde == "ve":
            self.equation = VarianceExploding(sigma_min, sigma_max)
        else:
            self.equation = (VariancePreserving if sde == "vp" else SubVariancePreserving)(beta_min, beta_max)
        # Network calls per time: `timesteps` holds this many entries for each.
        self.order = {"euler": 1, "heun": 2, "rk45": 6}.get(solver_type, 1 + correct_steps * (corrector != "none"))
        self.init_noise_sigma = sigma_max if sde == "ve" else 1.0
        self.num_inference_steps = None
        self._set_times(torch.linspace(1, self.config.sampling_eps, num_train_timesteps, dtype=torch.float64), "cpu")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next network call; `None` before the first `step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` of the first network call, if `set_begin_index` gave it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Give the index of the first network call, so that `step` need not look its timestep up (and sync a GPU)."""
        self._begin_index = begin_index

    # Timesteps are what the network is conditioned on; times are t in [0, 1].

    def timestep_of(self, time: torch.Tensor) -> torch.Tensor:
        """What the network is told at a time: std(t) for VE, (num_train_timesteps - 1) t otherwise."""
        if self.config.sde == "ve":
            return self.equation.marginal(time)[1]
        return time * (self.config.num_train_timesteps - 1)

    def time_of(self, timestep: torch.Tensor) -> torch.Tensor:
        """The inverse of `timestep_of`."""
        if self.config.sde == "ve":
            ratio = math.log(self.config.sigma_max / self.config.sigma_min)
            return torch.log(timestep / self.config.sigma_min) / ratio
        return timestep / (self.config.num_train_timesteps - 1)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """mean(t) y + std(t) noise; `timesteps`, one or one per sample, need not lie on the grid."""
        mean, std = self.equation.marginal(self.time_of(torch.as_tensor(timesteps)))
        noisy = per_row(mean, original_samples) * original_samples + per_row(std, original_samples) * noise
        return noisy.to(original_samples.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The network's input, which is the sample."""
        return sample

    def log_prior(self, sample: torch.Tensor) -> torch.Tensor:
        """Log-density of the starting noise, per sample in nats."""
        rows, sigma = accurate(sample).flatten(1), self.init_noise_sigma
        normalisation = rows.shape[1] * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
        return -rows.square().sum(dim=1) / (2 * sigma**2) - normalisation

    def _set_times(self, times: torch.Tensor, device: torch.device | str | None) -> None:
        self.times = times
        if self.config.solver_type == "pc":
            self._call_times = times.repeat_interleave(self.order)
        else:
            nodes = {"euler": (0.0,), "heun": (0.0, 1.0), "rk45": RK_NODES}[self.config.solver_type]
            inner = times[:-1, None] + times.diff()[:, None] * torch.tensor(nodes, dtype=times.dtype)
            self._call_times = torch.cat([inner.flatten(), times[-1:]])
        self.timesteps = self.timestep_of(self._call_times).to(torch.float32).to(device)
        self._step_index = None
        self._begin_index = None
        self._memory = []

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """
        Set the grid of times, uniform from 1 to `sampling_eps`, and forget the previous run.

        Args:
            num_inference_steps (`int`): Number of times.
            device (`torch.device` or `str`, *optional*): Where `timesteps` go.
        """
        least = 2
        if self.config.solver_type == "pc" and self.config.sde != "ve":
            least = math.floor(self.config.beta_max) + 1  # DDPM's beta_i = beta(t) / n stays below 1
        if num_inference_steps < least:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}: it must be at least {least} here.")
        self.num_inference_steps = num_inference_steps
        self._set_times(torch.linspace(1, self.config.sampling_eps, num_inference_steps, dtype=torch.float64), device)

    def _find_step_index(self, timestep: float | torch.Tensor) -> int:
        if self._begin_index is not None:
            return self._begin_index
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep {float(timestep)} is not one of `scheduler.timesteps`: pass those to `step`.")
        # With Heun and rk45 a time that ends one step and begins the next is there twice: begin with the second.
        return int(matches[0 if self.config.solver_type == "pc" else -1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> ScoreSDESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Digest one network call.

        Args:
            model_output (`torch.Tensor`): What the network returned for the sample.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that the network was called with.
            sample (`torch.Tensor`): The sample.
            generator (`torch.Generator` or a list of them, *optional*): Draws the noise of predictor and corrector.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `ScoreSDESchedulerOutput`.
        """
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before `set_timesteps`: call `scheduler.set_timesteps(n)` first.")
        if self._step_index is None:
            self._step_index = self._find_step_index(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} timesteps are done: call `set_timesteps` for another run.")
        x = sample if sample.dtype == torch.float64 else sample.float()
        time = self._call_times[self._step_index]
        score = model_output.to(x.dtype)
        if self.config.prediction_type == "epsilon":
            score = -score / self.equation.marginal(time)[1].item()
        interval, stage = divmod(self._step_index, self.order)
        if self.config.solver_type != "pc":
            mean = following = self._follow_ode(x, score, time, interval, stage)
        else:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=x.dtype)
            move = self._predict if stage == self.order - 1 else self._correct
            following, mean = move(x, score, time, noise)
            if self._step_index == len(self.timesteps) - 1:
                following = mean  # the noise of the last step would stay in the sample
        self._step_index += 1
        following, mean = following.to(sample.dtype), mean.to(sample.dtype)
        if not return_dict:
            return following, mean
        return ScoreSDESchedulerOutput(prev_sample=following, prev_sample_mean=mean)

    @property
    def _steps(self) -> int:
        return self.num_inference_steps or 1

    def _predict(
        self, x: torch.Tensor, score: torch.Tensor, time: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.predictor == "none":
            return x, x
        if self.config.predictor == "euler_maruyama":
            drift, diffusion = euler_maruyama(*self.equation.coefficients(time), 1 / self._steps)
        else:
            drift, diffusion = self.equation.discretised(time, self._steps)
        return predictor_step(x, score, float(drift), float(diffusion), noise)

    def _correct(
        self, x: torch.Tensor, score: torch.Tensor, time: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = float(self.equation.langevin_scale(time, self._steps))
        if self.config.corrector == "ald":
            size = langevin_step_size(self.config.snr, float(self.equation.marginal(time)[1]), 1.0, alpha)
            size = torch.as_tensor(size, dtype=x.dtype)
        else:
            # Norms of each sample by itself, as in the algorithms: a batch must not change its samples.
            norms = noise.flatten(1).norm(dim=1), score.flatten(1).norm(dim=1)
            size = per_row(torch.as_tensor(langevin_step_size(self.config.snr, *norms, alpha)), x)
        return langevin_step(x, score, size, noise)

    def _follow_ode(
        self, x: torch.Tensor, score: torch.Tensor, time: torch.Tensor, interval: int, stage: int
    ) -> torch.Tensor:
        """One stage of the step from `times[interval]`; `_memory` holds samples and slopes of its earlier stages."""
        if interval == len(self.times) - 1:
            return posterior_mean(x, score, *(float(value) for value in self.equation.marginal(time)))
        if stage > 0 and len(self._memory) != stage:
            raise ValueError(f"the run began inside a step: set a begin index that is a multiple of {self.order}.")
        slope = probability_flow(x, score, *(float(value) for value in self.equation.coefficients(time)))
        self._memory = [*self._memory, (x, slope)] if stage else [(x, slope)]
        start, slopes = self._memory[0][0], [slope for _, slope in self._memory]
        dt = (self.times[interval + 1] - self.times[interval]).item()
        if self.config.solver_type == "rk45":
            return dormand_prince_stage(start, slopes, dt)
        return start + dt * sum(slopes) / len(slopes)  # Euler; with a second slope, Heun's trapezoidal rule

    @torch.no_grad()
    def integrate(
        self,
        score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        time_start: float,
        time_end: float,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        log_likelihood: bool = False,
        divergence: Literal["hutchinson", "exact"] = "hutchinson",
        generator: Generators = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Follow the probability-flow ODE adaptively, down (sampling) or up (inversion), each sample with its own steps.

        Args:
            score (`Callable`): Maps a sample and its times, of shape `(batch_size,)`, to the score.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The sample at `time_start`.
            time_start, time_end (`float`): Times in [0, 1].
            rtol, atol (`float`, *optional*, defaults to 1e-5): Relative and absolute tolerance.
            log_likelihood (`bool`, *optional*, defaults to `False`):
                Return the log-likelihood at the earlier time as well, per sample in nats: the density at the later
                time is taken to be that of the starting noise (equation 39).
            divergence (`"hutchinson"` or `"exact"`, *optional*, defaults to `"hutchinson"`):
                An unbiased estimate with one random probe per sample, or the trace, at N times the cost.
            generator (`torch.Generator` or a list of them, *optional*): Draws the probes.

        Returns:
            `torch.Tensor`, or with `log_likelihood` a `tuple` of it and the log-likelihood.
        """
        if divergence not in ("hutchinson", "exact"):
            raise ValueError(f"`divergence` is {divergence!r}: it must be hutchinson or exact.")
        rows, shape = accurate(sample).flatten(1), sample.shape

        def velocity(time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            scores = score(x.reshape(shape).to(sample.dtype), time.to(sample.dtype)).to(x.dtype).flatten(1)
            return probability_flow(x, scores, *(per_row(value, x) for value in self.equation.coefficients(time)))

        if not log_likelihood:
            x = integrate_adaptively(velocity, rows, time_start, time_end, rtol, atol)
            return x.reshape(shape).to(sample.dtype)
        slope = with_divergence(velocity, divergence_probes(rows, divergence, generator))
        state = torch.cat([rows, rows.new_zeros(shape[0], 1)], dim=1)
        state = integrate_adaptively(slope, state, time_start, time_end, rtol, atol)
        arrived, growth = state[:, :-1], state[:, -1]
        upwards = time_end > time_start
        prior = self.log_prior(arrived if upwards else rows)
        return arrived.reshape(shape).to(sample.dtype), prior + growth if upwards else prior - growth

    def integrate_network(
        self,
        network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        upwards: bool,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        [`~ScoreSDEScheduler.integrate`] over all times, for what is a network to any scheduler.

        Args:
            network (`Callable`): Maps a sample and its timesteps, of shape `(batch_size,)`, to its output.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): Clean samples, or noise at t = 1.
            upwards (`bool`): Whether to go from samples to noise, or from noise to samples.
            options: What `integrate` takes besides: tolerances, `log_likelihood`, ...
        """

        def score(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            output = network(x, self.timestep_of(time))
            if self.config.prediction_type == "epsilon":
                return -output / per_row(self.equation.marginal(time)[1], output)
            return output

        end = self.config.sampling_eps
        result = self.integrate(score, sample, *((end, 1.0) if upwards else (1.0, end)), **options)
        if upwards or isinstance(result, tuple):
            return result
        time = result.new_full((len(result),), end)
        return posterior_mean(result, score(result, time), *(per_row(v, result) for v in self.equation.marginal(time)))
