"""The exact Poisson field of a finite dataset: the truth that a Poisson flow network learns to approximate.

Symbols: N elements per sample, D augmented dimensions (`aug_dim`), augmented radius r = sigma * sqrt(D). At noise
level sigma a data point y is spread over x as p_sigma(x | y) ~ (|x - y|^2 + r^2)^(-(N + D) / 2), which tends to the
Gaussian N(y, sigma^2) when D grows: `aug_dim=None` is that limit. D = 1 is PFGM, any D is PFGM++
(https://huggingface.co/papers/2209.11178 and https://huggingface.co/papers/2302.04265).
"""

import math

import torch


# Rows of the dataset are widened to float64 a chunk at a time; a chunk holds at most this many numbers (256 MiB).
MAX_CHUNK_ELEMENTS = 2**25


def squared_distances(x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """
    |x_i - y_j|^2 for all pairs, as one matrix product: |x|^2 + |y|^2 - 2 x.y.

    The field raises distances to the power N + D, so that their relative error is multiplied by (N + D) / 2, about
    10^4 for a spectrogram. The product therefore runs in float64 and around a common centre, which keeps the
    cancellation of |x|^2 + |y|^2 against 2 x.y harmless; in float32 it would leave nothing of the weights.

    Args:
        x (`torch.Tensor` of shape `(batch_size, N)`): Points, float64.
        data (`torch.Tensor` of shape `(K, N)`): Data points.

    Returns:
        `torch.Tensor` of shape `(batch_size, K)`, float64.
    """
    centre = data.mean(dim=0, dtype=torch.float64)
    x = x - centre
    x_norm = x.square().sum(dim=1, keepdim=True)
    distances = []
    for chunk in data.split(max(1, MAX_CHUNK_ELEMENTS // data.shape[1])):
        chunk = chunk.double() - centre
        distances.append(torch.addmm(x_norm + chunk.square().sum(dim=1), x, chunk.T, alpha=-2))
    return torch.cat(distances, dim=1).clamp(min=0)


def posterior_weights(distances: torch.Tensor, sigma: torch.Tensor, aug_dim: float | None, dim: int) -> torch.Tensor:
    """
    p(y_j | x, sigma) over equally likely data points, from squared distances d_j^2: a softmax over j of

        -(N + D) / 2 * log(d_j^2 + r^2),    or    -d_j^2 / (2 sigma^2)    in the limit D -> infinity.

    The nearest point is taken out first, log((d_j^2 + r^2) / (d_0^2 + r^2)) = log1p((d_j^2 - d_0^2) / (d_0^2 + r^2)):
    nothing is lost for huge D, where r^2 would swallow d_j^2, and nothing overflows for sigma near 0.

    Args:
        distances (`torch.Tensor` of shape `(batch_size, K)`): Squared distances, float64.
        sigma (`torch.Tensor` of shape `(batch_size, 1)`): Noise levels, float64.
        aug_dim (`float`, *optional*): D, or `None` for the Gaussian limit.
        dim (`int`): N.
    """
    nearest = distances.detach().amin(dim=1, keepdim=True)  # a shift common to all j, hence without a gradient
    excess = distances - nearest
    tiny = torch.finfo(torch.float64).tiny  # x on a data point at sigma = 0: 0 / tiny gives that point all the weight
    if aug_dim is None:
        logits = -excess / (2 * sigma.square()).clamp(min=tiny)
    else:
        logits = -0.5 * (dim + aug_dim) * torch.log1p(excess / (nearest + aug_dim * sigma.square()).clamp(min=tiny))
    return logits.softmax(dim=1)


def with_float64(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, and on the CPU where the device has none: in float32 nothing would be left of the weights."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def levels_of(sigma: float | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Noise levels, one or one per row, beside the rows."""
    if not isinstance(sigma, torch.Tensor):
        return rows.new_full((1,), sigma)
    return with_float64(sigma).to(rows.device).reshape(-1)


def empirical_denoiser(
    x: torch.Tensor,
    data: torch.Tensor,
    sigma: float | torch.Tensor,
    aug_dim: float | None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The best denoiser for a finite dataset: E[y | x, sigma] = sum_j w_j y_j, with the weights of `posterior_weights`.

    Two matrix products; memory grows as batch size times K. Computed in float64, returned in the type of `x`.

    Args:
        x (`torch.Tensor` of shape `(batch_size, ...)`): Noisy samples.
        data (`torch.Tensor` of shape `(K, ...)`): The dataset, or a large batch of it, equally weighted.
        sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): Noise level, one for all rows or one per row.
        aug_dim (`float`, *optional*): D, or `None` for the Gaussian limit.
        among (`torch.Tensor` of shape `(batch_size, K)`, *optional*):
            True for the points that a row may come from, one at least; without it, all of them.

    Returns:
        `torch.Tensor` of the shape of `x`.
    """
    if aug_dim is not None and not 0 < aug_dim < math.inf:
        raise ValueError(f"`aug_dim` is {aug_dim}: it must be a positive number, or None for the limit D -> infinity.")
    if x.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"rows of `x` have shape {tuple(x.shape[1:])}, of `data` {tuple(data.shape[1:])}: reshape one."
        )
    rows, points = with_float64(x.flatten(1)), data.flatten(1)
    points = points.to(rows.device)
    distances = squared_distances(rows, points)
    if among is not None:
        distances = distances.masked_fill(~among.to(rows.device), math.inf)
    weights = posterior_weights(distances, levels_of(sigma, rows)[:, None], aug_dim, rows.shape[1])
    chunk_rows = max(1, MAX_CHUNK_ELEMENTS // points.shape[1])
    denoised = sum(
        w @ chunk.double() for w, chunk in zip(weights.split(chunk_rows, dim=1), points.split(chunk_rows), strict=True)
    )
    return denoised.reshape(x.shape).to(x.dtype).to(x.device)


def poisson_field(
    x: torch.Tensor,
    data: torch.Tensor,
    sigma: float | torch.Tensor,
    aug_dim: float,
    gamma: float,
    among: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The normalised field that a PFGM network predicts: -sqrt(N) * E / (|E| + gamma), with E = (x - E[y | x, sigma], r).

    E is the field of the data points divided by the sum of their weights. Its last component is r exactly, because
    every data point lies at r = 0.

    Args:
        x, data, sigma, aug_dim, among: As in `empirical_denoiser`; `aug_dim` must be finite, since E contains r.
        gamma (`float`): Shrinks the field where |E| is small, that is close to the data.

    Returns:
        `tuple`: the components along `x` (of the shape of `x`) and the one along r (of shape `(batch_size,)`).
    """
    if aug_dim is None:
        raise ValueError("`aug_dim` is None: the field needs a finite D, its last component is sigma * sqrt(D).")
    rows = with_float64(x)
    displacement = rows - empirical_denoiser(rows, data, sigma, aug_dim, among)
    radius = levels_of(sigma, rows) * math.sqrt(aug_dim)
    radius = radius.expand(x.shape[0])
    norm = torch.sqrt(displacement.flatten(1).square().sum(dim=1) + radius.square())
    scale = -math.sqrt(x[0].numel()) / (norm + gamma)
    field_x = displacement * scale.reshape(-1, *[1] * (x.ndim - 1))
    return field_x.to(x.dtype).to(x.device), (radius * scale).to(x.dtype).to(x.device)


def pfgm_hyperparameters(
    data_norm: float, data_dim: int, sigma: float = 0.01, tau: float = 0.03
) -> tuple[int, float, float]:
    """
    PFGM's recipe for the reach of the field, from the mean norm of the (scaled) data and their dimension.

        M = floor(3/4 * ln(data_norm^2 / (2 sqrt(N) sigma^2)) / ln(1 + tau)) + 1
        z_max = sqrt(2 / pi) * sigma * (1 + tau)^M,    upper_norm = sqrt(N) * sigma * (1 + tau)^M

    Args:
        data_norm (`float`): Mean L2 norm of the samples.
        data_dim (`int`): N.
        sigma (`float`, *optional*, defaults to `0.01`): Scale of the perturbation before it is multiplied.
        tau (`float`, *optional*, defaults to `0.03`): Growth of that scale: (1 + tau)^m with m up to M.

    Returns:
        `tuple`: M, the largest z, and the largest norm of a perturbed sample.
    """
    exponent = 0.75 * math.log(data_norm**2 / (2 * math.sqrt(data_dim) * sigma**2)) / math.log1p(tau)
    m = int(exponent) + 1
    largest = sigma * (1 + tau) ** m
    return m, math.sqrt(2 / math.pi) * largest, math.sqrt(data_dim) * largest
