"""Distances between two sets of embeddings, in float64, and how far they can be trusted.

A set is an array of rows (n, d). Several rows may come from one recording ("clip"); whatever says how certain a number
is treats the clips as the independent units, for the rows of one clip resemble one another.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


class GaussianStats:
    """Number, mean and scatter (sum of squares about the mean) of rows that are never all in memory.

    Chan, Golub and LeVeque's pairwise update: statistics of parts, in any order and grouping, merge into those of the
    whole.
    """

    def __init__(self, n: int, mean: np.ndarray, scatter: np.ndarray | None = None, factor: np.ndarray | None = None):
        self.n, self.mean = n, mean
        self._scatter, self._factor = scatter, factor  # one of them, or both

    @classmethod
    def empty(cls, dim: int) -> "GaussianStats":
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, rows: np.ndarray, block: int | None = None) -> "GaussianStats":
        """The statistics of rows (n, d), which may be a memory map larger than the memory."""
        n, dim = rows.shape
        if 1 < n <= dim:  # the rows themselves are a factor, smaller than any of the covariance
            rows = np.asarray(rows, np.float64)
            mean = rows.mean(0)
            return cls(n, mean, factor=(rows - mean).T / np.sqrt(n - 1))
        stats, block = cls.empty(dim), block or max(1, 2**24 // dim)
        for start in range(0, n, block):
            stats.update(rows[start : start + block])
        return stats

    @property
    def scatter(self) -> np.ndarray:
        if self._scatter is None:
            assert self._factor is not None
            self._scatter = (self.n - 1) * (self._factor @ self._factor.T)
        return self._scatter

    def update(self, rows: np.ndarray) -> None:
        """Adds rows (n, d) of any precision."""
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"Rows have shape (n, {len(self.mean)}), not {rows.shape}.")
        if len(rows) == 0:
            return
        rows, n = np.asarray(rows, np.float64), self.n + len(rows)
        mean = rows.mean(0)
        shift = mean - self.mean
        # What `merge` does, with the shift of the means as one more row of the product.
        deviations = np.concatenate([rows - mean, [shift * np.sqrt(self.n * len(rows) / n)]])
        self._scatter = self.scatter
        self._scatter += deviations.T @ deviations
        self.n, self.mean, self._factor = n, self.mean + shift * (len(rows) / n), None

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        n = self.n + other.n
        if n == 0:
            return self
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        return GaussianStats(n, self.mean + shift * (other.n / n), scatter)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        if self.n < 2:
            raise ValueError(f"A covariance needs two rows at least, not {self.n}.")
        return self.scatter / (self.n - 1)

    @property
    def factor(self) -> np.ndarray:
        """L with L Lᵀ = covariance, which may be singular; as many columns as it takes."""
        if self._factor is None:
            values, vectors = np.linalg.eigh(self.covariance)
            positive = values > max(values[-1], 0) * np.finfo(np.float64).eps * self.dim
            self._factor = vectors[:, positive] * np.sqrt(values[positive])
        return self._factor

    def eigenvalues(self) -> np.ndarray:
        """Of the covariance, without those that are zero but for rounding."""
        values = np.linalg.svd(self.factor, compute_uv=False) ** 2
        return values[values > values.max(initial=0) * np.finfo(np.float64).eps * self.dim]

    def rank(self) -> int:
        """How many directions the rows vary in."""
        return len(self.eigenvalues())


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of a mean, from how values of independent clips scatter; of a single clip there is none."""
    if len(values) < 2:
        return None
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half


# ----- Fréchet distance


def frechet_distance(x: GaussianStats, y: GaussianStats) -> float:
    """
    |µx − µy|² + Tr(Cx) + Tr(Cy) − 2 Tr (Cx Cy)^½ (Dowson and Landau 1982).

    The last trace is the sum of the singular values of Lxᵀ Ly with L Lᵀ = C. Those are exact to rounding where the
    covariances are singular, whereas a square root of the product turns a rounding error ε into √ε.
    """
    if x.dim != y.dim:
        raise ValueError(f"The rows have {x.dim} and {y.dim} numbers: they are not of the same embedding.")
    if min(x.n, y.n) < 2:
        raise ValueError(f"A Fréchet distance needs two rows of each set, not {min(x.n, y.n)}.")
    a, b = x.factor, y.factor
    shift = x.mean - y.mean
    traces = np.square(a).sum() + np.square(b).sum()
    return float(shift @ shift + (traces - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()))


def null_floor(eigenvalues: np.ndarray, n: float) -> float:
    """
    The Fréchet distance that n rows of a Gaussian have to it, on average: what a perfect generator scores.

    The second-order expansion in the error of mean and covariance, (Σᵢ λᵢ + ½ (Σᵢⱼ λᵢλⱼ/(λᵢ+λⱼ) + ½ Σᵢ λᵢ)) / n. Of
    two sets the floors add up. Heavier tails than a Gaussian's have a higher floor.
    """
    values = np.asarray(eigenvalues, np.float64)
    values = values[values > 0]
    pairs = (values[:, None] * values / (values[:, None] + values)).sum()
    return float((values.sum() + 0.5 * (pairs + 0.5 * values.sum())) / n)


def effective_rows(rows: np.ndarray, counts: np.ndarray) -> float:
    """
    How many independent rows tell as much about the mean as these, of which those of a clip resemble one another.

    It is n over the design effect: the squared sums of the deviations in each clip over the sum of their squares.
    """
    if (counts == 1).all():
        return float(len(rows))
    mean, together, apart = rows.mean(0, dtype=np.float64), 0.0, 0.0
    for clips, start, stop in _blocks_of_clips(counts, 65536):
        centred = np.asarray(rows[start:stop], np.float64) - mean
        sums = np.add.reduceat(centred, np.cumsum(counts[clips]) - counts[clips], axis=0)
        together, apart = together + np.square(sums).sum(), apart + np.square(centred).sum()
    return len(rows) * min(1.0, apart / together) if together else float(len(rows))


def _blocks_of_clips(counts: np.ndarray, most: int):
    """Slices of whole clips with about `most` rows, and the rows from `start` to `stop` that belong to them."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        start = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, start + most, side="right")))
        yield slice(first, last), start, ends[last - 1]
        first = last


def rows_of(counts: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """The rows that belong to some clips, one clip after the other; a clip that is named twice comes twice."""
    starts, wanted = np.cumsum(counts)[clips] - counts[clips], counts[clips]
    return np.repeat(starts - np.cumsum(wanted) + wanted, wanted) + np.arange(wanted.sum())


def frechet_bootstrap(
    rows: np.ndarray, counts: np.ndarray, other: GaussianStats, resamples: int, rng: np.random.Generator,
    most_clips: int = 5000,
) -> np.ndarray:  # fmt: skip
    """
    How the Fréchet distance to `other` scatters when the clips are drawn anew, with replacement: its deviations from
    their mean. (Their mean itself says nothing: it is biased once more by what the distance is biased.)

    Of sets larger than `most_clips` as many are drawn, and the deviations are scaled to the size of the set.
    """
    size = min(len(counts), most_clips)
    factor, values = other.factor, np.empty(resamples)
    origin = rows[: 2**16].mean(0, dtype=np.float64)  # near all means, where nothing is lost to rounding
    for index in range(resamples):
        drawn = np.asarray(rows[rows_of(counts, rng.integers(len(counts), size=size))], np.float64) - origin
        mean = drawn.mean(0)
        drawn -= mean
        # The eigenvalues of Lᵀ C L are those of C_other C; a zero that comes out as ε matters in no interval.
        seen = drawn @ factor if len(drawn) >= factor.shape[1] else (drawn @ factor).T
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(seen.T @ seen), 0, None)).sum() / np.sqrt(len(drawn) - 1)
        shift = mean + origin - other.mean
        values[index] = shift @ shift + np.square(drawn).sum() / (len(drawn) - 1) - 2 * cross
    return (values - values.mean()) * np.sqrt(size / len(counts))


def frechet_interval(
    value: float,
    x: tuple[np.ndarray, np.ndarray, GaussianStats],
    y: tuple[np.ndarray, np.ndarray, GaussianStats],
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """
    An interval about a Fréchet distance, from clips of both sets drawn anew; each set is (rows, counts, statistics).

    To first order the errors of the two sets add up, so that each is drawn anew beside the whole of the other.
    """
    rng = np.random.default_rng(seed)
    deviations = frechet_bootstrap(*x[:2], y[2], resamples, rng) + frechet_bootstrap(*y[:2], x[2], resamples, rng)
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(value + low)), float(value + high)  # no distance is below zero


class Extrapolation(NamedTuple):
    """A line through values against 1/n: what they tend to, and how well they lie on it."""

    value: float
    slope: float
    r_squared: float
    sizes: list[int]
    values: list[float]


def frechet_infinity(
    reference: GaussianStats, rows: np.ndarray, counts: np.ndarray, seed: int = 0, points: int = 15
) -> Extrapolation:
    """
    The Fréchet distance of infinitely many clips (Chong and Forsyth 2020): the intercept of a line against 1/n.

    Clips are drawn without replacement: drawn with it, they stand for the clips that there are, and the line tends
    to the distance of those. The smallest sets have twice as many rows as dimensions, or a tenth of all, whatever is
    more (and half of all clips at most).
    """
    n = len(counts)
    least = min(max(round(2 * rows.shape[1] * n / len(rows)), n // 10, 2), max(n // 2, 2))
    sizes = np.unique(np.round(1 / np.linspace(1 / least, 1 / n, points)).astype(int))
    if len(sizes) < 3:
        raise ValueError(f"{n} clips are too few for a line through distances of more and more of them.")
    rng = np.random.default_rng(seed)
    values = np.array([
        frechet_distance(reference, GaussianStats.of(rows[np.sort(rows_of(counts, rng.permutation(n)[:size]))]))
        for size in sizes
    ])  # fmt: skip
    slope, value = np.polyfit(1 / sizes, values, 1)
    residuals = values - (value + slope / sizes)
    r_squared = 1 - np.square(residuals).sum() / max(np.square(values - np.mean(values)).sum(), 1e-300)
    return Extrapolation(float(value), float(slope), float(r_squared), sizes.tolist(), values.tolist())


def frechet_per_clip(reference: GaussianStats, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    The Fréchet distance of each single clip to the reference, less what a perfect clip of as many rows would score.

    It is for ranking the clips of a set. A clip of one row has none: NaN.
    """
    eigenvalues, starts = reference.eigenvalues(), np.cumsum(counts) - counts
    floors = {int(count): null_floor(eigenvalues, count) for count in np.unique(counts) if count > 1}
    return np.array(
        [
            frechet_distance(reference, GaussianStats.of(rows[start : start + count])) - floors[count]
            if count > 1
            else np.nan
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
    )


# ----- kernel distances


Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gaussian_kernel(bandwidth: float) -> Kernel:
    """exp(−|x − y|² / 2σ²)."""
    if not bandwidth > 0:
        raise ValueError(f"The bandwidth of a kernel is positive, not {bandwidth:g}: are all rows the same?")

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
        return torch.sub(squares, x @ y.mT, alpha=2).clamp_(min=0).mul_(-0.5 / bandwidth**2).exp_()

    return kernel


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(xᵀy / d + 1)³, that of KID (Bińkowski et al. 2018)."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def median_distance(rows: np.ndarray, seed: int = 0, pairs: int = 10000) -> float:
    """The median distance of two different rows: of all pairs, or of so many that are drawn."""
    n = len(rows)
    if n < 2:
        raise ValueError("The distance of two rows needs two rows.")
    if n * (n - 1) // 2 <= pairs:
        first, second = np.triu_indices(n, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(n, size=pairs)
        second = (first + rng.integers(1, n, size=pairs)) % n
    difference = np.asarray(rows[first], np.float64) - rows[second]
    return float(np.median(np.sqrt(np.square(difference).sum(1))))


class KernelSums(NamedTuple):
    """Sums of a kernel over the rows of each clip: with all rows of the set, and with those of the clip itself."""

    total: np.ndarray
    within: np.ndarray


def _tensor(rows: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.float64)).to(device)


def _by_clip(values: torch.Tensor, counts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values.cpu().numpy(), np.cumsum(counts) - counts)


def cross_sums(
    x: np.ndarray, x_counts: np.ndarray, y: np.ndarray, y_counts: np.ndarray, kernel: Kernel,
    device: torch.device | str = "cpu", block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Sums of k(x, y) over the rows of each clip of x, and of each clip of y. Block by block: memory is bounded."""
    columns = _tensor(y, device)
    by_row, by_column = [], torch.zeros(len(y), dtype=torch.float64, device=device)
    block = block or max(1, min(2048, 2**23 // len(y)))
    for start in range(0, len(x), block):
        values = kernel(_tensor(x[start : start + block], device), columns)
        by_row.append(values.sum(1))
        by_column += values.sum(0)
    return _by_clip(torch.cat(by_row), x_counts), _by_clip(by_column, y_counts)


def kernel_sums(
    x: np.ndarray, counts: np.ndarray, kernel: Kernel, device: torch.device | str = "cpu", block: int | None = None
) -> KernelSums:
    """The sums of a set with itself."""
    total, _ = cross_sums(x, counts, x, counts, kernel, device, block)
    starts, within = np.cumsum(counts) - counts, np.empty(len(counts))
    for count in np.unique(counts):  # clips of equal length together
        clips = np.flatnonzero(counts == count)
        for some in np.array_split(clips, -(-len(clips) * count**2 // 2**22)):
            rows = _tensor(x[(starts[some][:, None] + np.arange(count)).ravel()], device)
            of_clips = rows.unflatten(0, (len(some), int(count)))
            within[some] = kernel(of_clips, of_clips).sum((1, 2)).cpu().numpy()
    return KernelSums(total, within)


def unbiased_distance(
    x: KernelSums, y: KernelSums, crossed: tuple[np.ndarray, np.ndarray], x_counts: np.ndarray, y_counts: np.ndarray
) -> tuple[float, float]:
    """
    The squared maximum mean discrepancy without bias (Gretton et al. 2012, equation 3), and its standard error.

    Pairs of rows of one clip are left out, as that of a row with itself: two clips of one source are not as similar.
    The standard error is the jackknife's, which leaves out one clip of either set after the other.
    """
    if min(len(x_counts), len(y_counts)) < 2:
        raise ValueError(f"A kernel distance needs two clips of each set, not {min(len(x_counts), len(y_counts))}.")

    def same(sums: KernelSums, counts: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean of pairs of different clips, and that mean without each clip. (Of two clips, without one: none.)"""
        pairs = float(counts.sum()) ** 2 - np.square(counts, dtype=float).sum()
        added = sums.total.sum() - sums.within.sum()
        left = pairs - 2 * counts * (counts.sum() - counts)
        without = added - 2 * (sums.total - sums.within)
        return added / pairs, np.divide(without, left, out=np.full(len(counts), np.nan), where=left > 0)

    rows = float(x_counts.sum()), float(y_counts.sum())
    (xx, xx_without), (yy, yy_without) = same(x, x_counts), same(y, y_counts)
    added = crossed[0].sum()
    xy = added / (rows[0] * rows[1])
    x_without = xx_without - 2 * (added - crossed[0]) / ((rows[0] - x_counts) * rows[1])
    y_without = yy_without - 2 * (added - crossed[1]) / ((rows[1] - y_counts) * rows[0])
    variance = sum((len(v) - 1) / len(v) * np.square(v - v.mean()).sum() for v in (x_without, y_without))
    return float(xx + yy - 2 * xy), float(np.sqrt(variance))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, kernel: Kernel | None = None, x_counts: np.ndarray | None = None,
    y_counts: np.ndarray | None = None, device: torch.device | str = "cpu", block: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    """
    The unbiased squared maximum mean discrepancy of rows (n, d), and its standard error; it may be negative.

    `x` is the reference: it alone decides the bandwidth of the default, a Gaussian kernel. `counts` say how many
    consecutive rows each clip has (one, if there are none).
    """
    kernel = kernel or gaussian_kernel(median_distance(x))
    x_counts = np.ones(len(x), int) if x_counts is None else x_counts
    y_counts = np.ones(len(y), int) if y_counts is None else y_counts
    sums = kernel_sums(x, x_counts, kernel, device, block), kernel_sums(y, y_counts, kernel, device, block)
    crossed = cross_sums(x, x_counts, y, y_counts, kernel, device, block)
    return unbiased_distance(*sums, crossed, x_counts, y_counts)


def kid(
    x: np.ndarray, y: np.ndarray, subset_size: int = 1000, subsets: int = 100, seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:  # fmt: skip
    """KID as it is published: mean and standard deviation over subsets, each drawn without replacement."""
    size, rng = min(subset_size, len(x), len(y)), np.random.default_rng(seed)
    subsets = 1 if size == len(x) == len(y) else subsets
    values = [
        kernel_distance(
            x[np.sort(rng.permutation(len(x))[:size])], y[np.sort(rng.permutation(len(y))[:size])], polynomial_kernel,
            device=device,
        )[0]
        for _ in range(subsets)
    ]  # fmt: skip
    return float(np.mean(values)), float(np.std(values))
