"""PFGM, PFGM++ and EDM diffusion as one scheduler: one ODE, one parameter D, and a noise law that depends on it.

Papers:
    PFGM    Xu et al., "Poisson Flow Generative Models", https://huggingface.co/papers/2209.11178
    PFGM++  Xu et al., "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models",
            https://huggingface.co/papers/2302.04265
    EDM     Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
            https://huggingface.co/papers/2206.00364

Symbols: N elements per sample, D augmented dimensions, sigma the noise level, r = sigma * sqrt(D) the augmented radius
(PFGM's z when D = 1), Dn(x, sigma) = E[y | x, sigma] the denoiser. Only the noise law knows D: a clean sample y at
level sigma has the density p(x | y) ~ (|x - y|^2 + r^2)^(-(N + D) / 2), and every D shares the ODE of EDM,

    dx / dsigma = (x - Dn(x, sigma)) / sigma.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


SOLVERS = {"euler": 1, "heun": 2, "dpmsolver++": 1, "rk45": 6}  # network calls per step

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


def per_row(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per row (or for all rows), shaped to multiply `like`."""
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def accurate(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, or in float32 where the device has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


# The noise law


def student_t_noise(
    shape: Sequence[int],
    aug_dim: float | None,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    The perturbation kernel of PFGM++ at sigma = 1, which is the multivariate Student-t law with D degrees of freedom:

        x = g * sqrt(D / chi2_D),   g ~ N(0, I_N),   one chi2_D for the whole sample.

    The Gaussian part is the very tensor that `randn_tensor` draws, so the limit D -> infinity reproduces diffusers.
    """
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples: pass one, or one per sample.")
    dtype = dtype or torch.float32
    gaussian = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    if aug_dim is None:
        return gaussian
    rows = shape[0] // len(generators)
    scales = []
    for source in generators:
        if source is not None and source.device.type == "mps":  # which draws no gamma variates
            seed = torch.randint(2**62, (1,), generator=source, device=source.device)
            source = torch.Generator().manual_seed(int(seed))
        device = "cpu" if source is None else source.device
        half_dim = torch.full((rows,), aug_dim / 2, dtype=torch.float64, device=device)
        chi2 = 2 * torch._standard_gamma(half_dim, generator=source)
        scales.append(torch.sqrt(aug_dim / chi2).to(dtype).to(gaussian.device))
    return gaussian * per_row(torch.cat(scales), gaussian)


def truncate_radius(noise: torch.Tensor, aug_dim: float | None, quantile: float) -> torch.Tensor:
    """
    Noise at sigma = 1 with its radius R = |x| kept below a quantile q of its law: R becomes R' = F^-1(q F(R)).

    F(R) = I_{R^2 / (R^2 + D)}(N / 2, D / 2), the regularised incomplete beta function. F(R) is uniform on (0, 1), so
    that R' follows F truncated at q. (PFGM clips instead, which piles up most of its draws on one sphere.)
    """
    from scipy import special

    half_n = noise[0].numel() / 2
    square = accurate(noise).flatten(1).square().sum(dim=1).cpu().numpy()
    if aug_dim is None:
        truncated = 2 * special.gammaincinv(half_n, quantile * special.gammainc(half_n, square / 2))
    else:
        # In terms of D / (R^2 + D) ~ Beta(D / 2, N / 2), which keeps its digits far out in the tail.
        upper_tail = special.betainc(aug_dim / 2, half_n, aug_dim / (square + aug_dim))
        inside = special.betaincinv(aug_dim / 2, half_n, 1 - quantile * (1 - upper_tail))
        truncated = aug_dim * (1 - inside) / inside
    scale = torch.from_numpy((truncated / square) ** 0.5)
    return noise * per_row(scale.to(noise.dtype), noise)


def student_t_log_density(x: torch.Tensor, sigma: float, aug_dim: float | None) -> torch.Tensor:
    """
    Log-density of the noise law at level sigma, per sample, in float64 nats:

        ln G((N + D) / 2) - ln G(D / 2) - N/2 ln(pi D) - N ln(sigma) - (N + D)/2 log1p(|x|^2 / (D sigma^2)).
    """
    rows = accurate(x).flatten(1)
    n, square = rows.shape[1], rows.square().sum(dim=1) / sigma**2
    if aug_dim is None:
        return -0.5 * square - n * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    constant = math.lgamma((n + aug_dim) / 2) - math.lgamma(aug_dim / 2) - n / 2 * math.log(math.pi * aug_dim)
    return constant - n * math.log(sigma) - (n + aug_dim) / 2 * torch.log1p(square / aug_dim)


# Grids and network outputs


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """sigma_i = (sigma_max^(1/rho) + i / (n - 1) * (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (EDM, equation 5)."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def exponential_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """Uniform in ln(sigma), from sigma_max down to sigma_min."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), num_steps, dtype=torch.float64).exp()


def edm_denoised(
    sample: torch.Tensor, output: torch.Tensor, sigma: float | torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """Dn = c_skip x + c_out F, c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2) (EDM, eq. 7)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total * sample + sigma * sigma_data / total**0.5 * output


def field_denoised(
    sample: torch.Tensor, field: torch.Tensor, radius: float | torch.Tensor, gamma: float, substitute_below: float
) -> torch.Tensor:
    """
    The denoiser inside a PFGM network, which predicts f = -sqrt(N) * E / (|E| + gamma), E = (x - Dn, r).

    Both parts share their factor, so that Dn = x - r f_x / f_r. Close to the data f_r is small and badly learnt. PFGM
    therefore computes it from n = |f_x| / sqrt(N) when r < `substitute_below`: n = |E_x| / (|E_x| + gamma) gives
    |E_x| = gamma n / (1 - n), up to a relative error of r^2 / (2 gamma |E_x|), hence |E|^2 = |E_x|^2 + r^2 and f_r.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): x.
        field (`torch.Tensor` of shape `(batch_size, channels + 1, ...)`): The mean of its last channel is f_r.
        radius (`float` or `torch.Tensor`): r.
        gamma (`float`): The constant of the normalisation that the network was trained with.
        substitute_below (`float`): Radius below which f_r is not read.
    """
    along_x, along_r = field[:, :-1], field[:, -1:].mean(dim=tuple(range(1, field.ndim)), keepdim=True)
    radius = radius * torch.ones_like(along_r)
    root_n = math.sqrt(along_x[0].numel())
    size = along_x.flatten(1).norm(dim=1).reshape(along_r.shape) / root_n
    norm = torch.sqrt((gamma * size / (1 - size)) ** 2 + radius**2)
    along_r = torch.where(radius < substitute_below, -root_n * radius / (norm + gamma), along_r)
    return sample - radius * along_x / along_r


# Solvers of dx / dsigma = (x - Dn) / sigma, one function each. `denoised` is Dn(sample, sigma).


def euler_step(sample: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x + (sigma' - sigma) (x - Dn) / sigma, of first order; for sigma' = 0 that is Dn, the final denoising."""
    return denoised + sigma_next / sigma * (sample - denoised)


def heun_step(
    sample: torch.Tensor,
    denoised: torch.Tensor,
    predicted: torch.Tensor,
    denoised_next: torch.Tensor,
    sigma: float,
    sigma_next: float,
) -> torch.Tensor:
    """The trapezoidal rule, of second order, with Euler's `predicted` sample at sigma' (EDM, algorithm 1)."""
    slope, slope_next = (sample - denoised) / sigma, (predicted - denoised_next) / sigma_next
    return sample + (sigma_next - sigma) / 2 * (slope + slope_next)


def dpmsolver_2m_step(
    sample: torch.Tensor,
    denoised: torch.Tensor,
    denoised_previous: torch.Tensor,
    sigma: float,
    sigma_next: float,
    sigma_previous: float,
) -> torch.Tensor:
    """
    DPM-Solver++(2M), of second order with one network call (https://huggingface.co/papers/2211.01095, algorithm 2).

    In -ln(sigma) the linear part of the ODE is solved exactly, and Dn is extrapolated to the middle of the step from
    its last two values: the step is Euler's with Dn + h / (2 h_previous) (Dn - Dn_previous) in place of Dn.
    """
    half_ratio = 0.5 * math.log(sigma / sigma_next) / math.log(sigma_previous / sigma)
    return euler_step(sample, denoised + half_ratio * (denoised - denoised_previous), sigma, sigma_next)


def dormand_prince_stage(start: torch.Tensor, slopes: list[torch.Tensor], step: float | torch.Tensor) -> torch.Tensor:
    """The argument of the next stage, x + h sum_j a_j k_j, from the slopes k_j so far; after six of them, the step."""
    weights = RK_STAGES[len(slopes) - 1]
    return start + step * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


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


def divergence_probes(rows: torch.Tensor, kind: str, generator: Generators) -> list[torch.Tensor]:
    """
    Vectors v such that sum_v v^T J v is the trace of J: the unit vectors ("exact"), or one random vector of signs, for
    which it is the trace on average ("hutchinson", https://huggingface.co/papers/2011.13456, equation 40).
    """
    if kind == "exact":
        return [unit.expand_as(rows) for unit in torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)]
    return [randn_tensor(rows.shape, generator, rows.device, torch.float32).to(rows.dtype).sign()]


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
class PoissonFlowSchedulerOutput(BaseOutput):
    """
    Output of [`PoissonFlowScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of the shape of the sample):
            The argument of the next network call.
        pred_original_sample (`torch.Tensor` of the shape of the sample):
            The denoised sample Dn(x, sigma) of this call.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class PoissonFlowScheduler(SchedulerMixin, ConfigMixin):
    """
    Sampling, noise law and likelihood of PFGM (`aug_dim=1`), PFGM++ (any `aug_dim`) and EDM (`aug_dim=None`).

    Start from `sample_noise(shape) * init_noise_sigma`: the ODE does not know D, the starting noise must, and it must
    be the noise the network was trained with. A network of diffusers' EDM schedulers was trained with Gaussian noise:
    `PoissonFlowScheduler.from_config(edm.config, aug_dim=None)`. The way back wants diffusers' name for the network's
    output: `EDMEulerScheduler.from_config(scheduler.config, prediction_type="epsilon")`.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            Length of the grid before `set_timesteps`; training draws continuous levels with `sample_sigmas`.
        aug_dim (`float`, *optional*, defaults to 128):
            D > 0, the number of augmented dimensions; `None` is the limit D -> infinity, Gaussian noise.
        sigma_min (`float`, *optional*, defaults to 0.002):
            Smallest noise level of the grid; one denoising step leads from there to 0.
        sigma_max (`float`, *optional*, defaults to 80.0):
            Largest noise level.
        sigma_data (`float`, *optional*, defaults to 0.5):
            Standard deviation of the data, for the preconditioning.
        rho (`float`, *optional*, defaults to 7.0):
            Exponent of the Karras grid.
        sigma_schedule (`"karras"` or `"exponential"`, *optional*, defaults to `"karras"`):
            Spacing of the grid.
        prediction_type (`"edm"`, `"sample"` or `"field"`, *optional*, defaults to `"edm"`):
            What the network returns: the preconditioned output F of EDM (`"epsilon"` in diffusers' EDM schedulers, a
            name accepted here too), the denoised sample, or the normalised field of PFGM with one more channel.
        solver_type (`"dpmsolver++"`, `"heun"`, `"euler"` or `"rk45"`, *optional*, defaults to `"dpmsolver++"`):
            ODE solver of `step`. `"heun"` calls the network twice per step, `"rk45"` (Dormand-Prince, on the given
            grid) six times; [`~PoissonFlowScheduler.integrate`] chooses its steps by their error instead.
        gamma (`float`, *optional*, defaults to 5.0):
            Normalisation constant of the field, for `prediction_type="field"`.
        p_mean, p_std (`float`, *optional*, defaults to -1.2 and 1.2):
            Training noise levels: ln(sigma) ~ N(p_mean, p_std^2).
        prior_radius_quantile (`float`, *optional*):
            Truncate the radius of the starting noise at this quantile, for small D with its heavy tail.
        z_exp (`float`, *optional*, defaults to 0.0):
            Radius below which a PFGM network's last component is computed from the others (see `field_denoised`);
            published networks were sampled with 5 (CIFAR-10) and 1 (spectrograms).
    """

    _compatibles = ["EDMEulerScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        aug_dim: float | None = 128,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        prediction_type: Literal["edm", "sample", "field"] = "edm",
        solver_type: Literal["dpmsolver++", "heun", "euler", "rk45"] = "dpmsolver++",
        gamma: float = 5.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        prior_radius_quantile: float | None = None,
        z_exp: float = 0.0,
    ):
        # diffusers' EDM schedulers have these two names for the same network output and the same solver.
        if prediction_type == "epsilon":
            self.register_to_config(prediction_type="edm")
        if solver_type == "midpoint":
            self.register_to_config(solver_type="dpmsolver++")
        for name, choices in (
            ("prediction_type", ("edm", "sample", "field")),
            ("solver_type", tuple(SOLVERS)),
            ("sigma_schedule", ("karras", "exponential")),
        ):
            if self.config[name] not in choices:
                raise ValueError(f"`{name}` is {self.config[name]!r}: it must be one of {', '.join(choices)}.")
        if aug_dim is not None and not 0 < aug_dim < math.inf:
            raise ValueError(f"`aug_dim` is {aug_dim}: it must be positive, or None for the limit D -> infinity.")
        if aug_dim is None and prediction_type == "field":
            raise ValueError("`prediction_type='field'` needs a finite `aug_dim` (1 for PFGM), but it is None.")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"`sigma_min` is {sigma_min}, `sigma_max` {sigma_max}: use 0 < sigma_min < sigma_max.")
        if prior_radius_quantile is not None and not 0 < prior_radius_quantile <= 1:
            raise ValueError(f"`prior_radius_quantile` is {prior_radius_quantile}: it must lie in (0, 1], or be None.")
        self.num_inference_steps = None
        self._set_grid(self._sigma_grid(num_train_timesteps), "cpu")

    @property
    def order(self) -> int:
        """Network calls per step: `timesteps` holds this many entries for each step but the last, which needs one."""
        return SOLVERS[self.config.solver_type]

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the starting noise: the first noise level, `sigma_max` unless `set_timesteps` was given others."""
        return self.sigmas[0].item()

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

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # Noise

    def sample_noise(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        truncate: bool = True,
    ) -> torch.Tensor:
        """
        Draw noise at sigma = 1.

        Args:
            shape (`Sequence[int]`): Shape, batch first.
            generator (`torch.Generator` or a list of them, *optional*): A list draws sample by sample.
            truncate (`bool`, *optional*, defaults to `True`):
                Obey `prior_radius_quantile`. Training must not: the regression finds E[y | x] for the exact law only.
        """
        noise = student_t_noise(shape, self.config.aug_dim, generator, device, dtype)
        if truncate and self.config.prior_radius_quantile is not None:
            noise = truncate_radius(noise, self.config.aug_dim, self.config.prior_radius_quantile)
        return noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """y + sigma * noise; `timesteps` (ln(sigma) / 4, one or one per sample) need not lie on the grid."""
        noisy = original_samples + per_row(self._sigma_of(timesteps), original_samples) * noise
        return noisy.to(original_samples.dtype)

    def sample_sigmas(
        self, batch_size: int, generator: Generators = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Noise levels to train at, ln(sigma) ~ N(p_mean, p_std^2) (EDM, table 1)."""
        return (self.config.p_mean + self.config.p_std * randn_tensor((batch_size,), generator, device)).exp()

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """(sigma^2 + s^2) / (sigma s)^2 on |Dn - y|^2: unit weight on the network output F (EDM, table 1)."""
        return (sigma**2 + self.config.sigma_data**2) / (sigma * self.config.sigma_data) ** 2

    def log_prior(self, sample: torch.Tensor) -> torch.Tensor:
        """Log-density of the starting noise, `sigma_max` times the (untruncated) law, per sample in nats."""
        return student_t_log_density(sample, self.config.sigma_max, self.config.aug_dim)

    # Preconditioning

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """The timestep of a noise level: c_noise = ln(sigma) / 4 (EDM, table 1)."""
        return torch.log(torch.as_tensor(sigma)) / 4

    @staticmethod
    def _sigma_of(timestep: float | torch.Tensor) -> torch.Tensor:
        return torch.exp(4 * torch.as_tensor(timestep))

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The network's input: c_in x = x / sqrt(sigma^2 + sigma_data^2) for `"edm"` (EDM, eq. 7), x otherwise."""
        if self.config.prediction_type != "edm":
            return sample
        c_in = (self._sigma_of(timestep) ** 2 + self.config.sigma_data**2) ** -0.5
        return (sample * per_row(c_in, sample)).to(sample.dtype)

    def precondition_outputs(
        self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """
        The denoised sample Dn(x, sigma) from what the network returned for it.

        Args:
            sample (`torch.Tensor`): x, before `scale_model_input`.
            model_output (`torch.Tensor`): The network's output.
            sigma (`float` or `torch.Tensor`): Noise level, one or one per sample.
        """
        if isinstance(sigma, torch.Tensor):
            sigma = per_row(sigma, sample)
        if self.config.prediction_type == "edm":
            return edm_denoised(sample, model_output, sigma, self.config.sigma_data)
        if self.config.prediction_type == "field":
            radius = sigma * math.sqrt(self.config.aug_dim)
            return field_denoised(sample, model_output, radius, self.config.gamma, self.config.z_exp)
        return model_output

    # Sampling

    def _sigma_grid(self, num_steps: int) -> torch.Tensor:
        low, high = self.config.sigma_min, self.config.sigma_max
        if self.config.sigma_schedule == "karras":
            sigmas = karras_sigmas(num_steps, low, high, self.config.rho)
        else:
            sigmas = exponential_sigmas(num_steps, low, high)
        sigmas[-1], sigmas[0] = low, high  # to the last digit
        return sigmas

    def _set_grid(self, sigmas: torch.Tensor, device: torch.device | str | None) -> None:
        # `sigmas` stays on the CPU, where reading a number does not wait for a GPU.
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        nodes = {"heun": (0.0, 1.0), "rk45": RK_NODES}.get(self.config.solver_type, (0.0,))
        log_sigmas = sigmas.log()
        self._call_log_sigmas = torch.cat(
            [
                (
                    log_sigmas[:-1, None] + log_sigmas.diff()[:, None] * torch.tensor(nodes, dtype=sigmas.dtype)
                ).flatten(),
                log_sigmas[-1:],
            ]
        )
        self.timesteps = (self._call_log_sigmas / 4).to(torch.float32).to(device)
        self._step_index = None
        self._begin_index = None
        self._memory: list = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Set the grid of noise levels, and forget the previous run.

        Args:
            num_inference_steps (`int`, *optional*): Number of noise levels above 0.
            device (`torch.device` or `str`, *optional*): Where `timesteps` go.
            sigmas (`Sequence[float]`, *optional*): The noise levels, decreasing, with or without the final 0.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("pass either `num_inference_steps` or `sigmas` to `set_timesteps`.")
        if sigmas is None:
            assert num_inference_steps is not None
            if num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` is {num_inference_steps}: it must be at least 1.")
            grid = self._sigma_grid(num_inference_steps)
        else:
            grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
            grid = grid[:-1] if len(grid) and grid[-1] == 0 else grid
            if len(grid) == 0 or grid[-1] <= 0 or (grid.diff() >= 0).any():
                raise ValueError(f"`sigmas` is {list(sigmas)}: noise levels must be positive and decrease.")
        self.num_inference_steps = len(grid)
        self._set_grid(grid, device)

    def _find_step_index(self, timestep: float | torch.Tensor) -> int:
        if self._begin_index is not None:
            return self._begin_index
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep {float(timestep)} is not one of `scheduler.timesteps`: pass those to `step`.")
        # A level that ends one step and begins the next is there twice; a run begins with the second.
        return int(matches[-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PoissonFlowSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Digest one network call.

        Args:
            model_output (`torch.Tensor`): What the network returned for `scale_model_input(sample, timestep)`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that the network was called with.
            sample (`torch.Tensor`): The sample, before `scale_model_input`.
            generator (`torch.Generator`, *optional*): Unused, the ODE is deterministic; pipelines pass one.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `PoissonFlowSchedulerOutput`.
        """
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before `set_timesteps`: call `scheduler.set_timesteps(n)` first.")
        if self._step_index is None:
            self._step_index = self._find_step_index(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} timesteps are done: call `set_timesteps` for another run.")
        x = sample if sample.dtype == torch.float64 else sample.float()
        denoised = self.precondition_outputs(
            x, model_output.to(x.dtype), math.exp(self._call_log_sigmas[self._step_index].item())
        )
        prev_sample = self._advance(x, denoised, *divmod(self._step_index, self.order))
        self._step_index += 1
        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return PoissonFlowSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _advance(self, x: torch.Tensor, denoised: torch.Tensor, interval: int, stage: int) -> torch.Tensor:
        """One stage of the step from `sigmas[interval]`; `_memory` holds what the solver needs of earlier calls."""
        sigma, sigma_next = self.sigmas[interval].item(), self.sigmas[interval + 1].item()
        solver = self.config.solver_type
        if stage > 0 and len(self._memory) != stage:
            raise ValueError(f"the run began inside a step: set a begin index that is a multiple of {self.order}.")
        if solver == "euler" or sigma_next == 0:
            return euler_step(x, denoised, sigma, sigma_next)
        if solver == "heun":
            if stage == 0:
                self._memory = [(x, denoised)]
                return euler_step(x, denoised, sigma, sigma_next)
            start, denoised_start = self._memory[0]
            return heun_step(start, denoised_start, x, denoised, sigma, sigma_next)
        if solver == "rk45":
            # In ln(sigma) the slope is x - Dn; the memory holds it with the sample it belongs to.
            self._memory = [*self._memory, (x, x - denoised)] if stage else [(x, x - denoised)]
            start, slopes = self._memory[0][0], [slope for _, slope in self._memory]
            return dormand_prince_stage(start, slopes, math.log(sigma_next / sigma))
        previous, self._memory = self._memory, [denoised]
        if not previous:
            return euler_step(x, denoised, sigma, sigma_next)
        sigma_previous = self.sigmas[interval - 1].item()
        return dpmsolver_2m_step(x, denoised, previous[0], sigma, sigma_next, sigma_previous)

    @torch.no_grad()
    def integrate(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        sigma_start: float,
        sigma_end: float,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        log_likelihood: bool = False,
        divergence: Literal["hutchinson", "exact"] = "hutchinson",
        generator: Generators = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Follow the ODE adaptively, down (sampling) or up (inversion), with the error controlled sample by sample.

        The change of density along the ODE, d ln p / d sigma = -div, gives the log-likelihood at the smaller of both
        noise levels; at the larger one the density is taken to be the noise law of that level.

        Args:
            denoise (`Callable`): Maps a sample and its noise levels, of shape `(batch_size,)`, to Dn(x, sigma).
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The sample at `sigma_start`.
            sigma_start (`float`): Noise level to start from; invert clean samples from `sigma_min`.
            sigma_end (`float`): Noise level to end at. At 0 the last move is a denoising from `sigma_min`.
            rtol, atol (`float`, *optional*, defaults to 1e-5): Relative and absolute tolerance.
            log_likelihood (`bool`, *optional*, defaults to `False`): Return a log-likelihood as well.
            divergence (`"hutchinson"` or `"exact"`, *optional*, defaults to `"hutchinson"`):
                An unbiased estimate with one random probe per sample, or the trace, at N times the cost.
            generator (`torch.Generator` or a list of them, *optional*): Draws the probes.

        Returns:
            `torch.Tensor`, or with `log_likelihood` a `tuple` of it and the log-likelihood per sample, in nats.
        """
        end = sigma_end or self.config.sigma_min
        if sigma_start <= 0 or sigma_end < 0 or (sigma_end == 0 and (log_likelihood or sigma_start < end)):
            raise ValueError(f"cannot integrate from sigma {sigma_start} to {sigma_end}: use `sigma_min` for 0.")
        if divergence not in ("hutchinson", "exact"):
            raise ValueError(f"`divergence` is {divergence!r}: it must be hutchinson or exact.")
        rows, shape = accurate(sample).flatten(1), sample.shape

        def velocity(log_sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            denoised = denoise(x.reshape(shape).to(sample.dtype), log_sigma.exp().to(sample.dtype))
            return x - denoised.to(x.dtype).flatten(1)

        span = math.log(sigma_start), math.log(end)
        if not log_likelihood:
            x = integrate_adaptively(velocity, rows, *span, rtol, atol).reshape(shape).to(sample.dtype)
            return x if sigma_end else denoise(x, x.new_full((shape[0],), end))
        slope = with_divergence(velocity, divergence_probes(rows, divergence, generator))
        state = integrate_adaptively(slope, torch.cat([rows, rows.new_zeros(shape[0], 1)], 1), *span, rtol, atol)
        arrived, growth = state[:, :-1], state[:, -1]
        upwards = sigma_end > sigma_start
        prior = student_t_log_density(arrived if upwards else rows, max(sigma_start, sigma_end), self.config.aug_dim)
        return arrived.reshape(shape).to(sample.dtype), prior + growth if upwards else prior - growth

    def integrate_network(
        self,
        network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        upwards: bool,
        **options,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        [`~PoissonFlowScheduler.integrate`] over all noise levels, for what is a network to any scheduler.

        Args:
            network (`Callable`): Maps its input and its timesteps, of shape `(batch_size,)`, to its output.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): Clean samples, or noise at `sigma_max`.
            upwards (`bool`): Whether to go from samples to noise, or from noise to samples.
            options: What `integrate` takes besides: tolerances, `log_likelihood`, ...
        """

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            timestep = self.precondition_noise(sigma)
            return self.precondition_outputs(x, network(self.scale_model_input(x, timestep), timestep), sigma)

        c = self.config
        span = (c.sigma_min, c.sigma_max) if upwards else (c.sigma_max, 0)
        return self.integrate(denoise, sample, *span, **options)
