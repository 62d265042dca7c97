"""Distances between two sets of embeddings, in float64, and how far they can be trusted.

A set is an array of rows (n, d). Several rows may come from one recording ("clip"); whatever says how certain a number
is treats the clips as the independent units, for the rows of one clip resemble one another.
"""

from dataclasses import dataclass, field

import numpy as np


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L with L L^T = covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.clip(values, 0, None))


@dataclass
class GaussianStats:
    """Number, mean and scatter (sum of squares about the mean) of rows that are never all in memory.

    Chan, Golub and LeVeque's pairwise update: statistics of parts, in any order and grouping, merge into those of the
    whole.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray
    _cached_factor: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(cls, dim: int) -> "GaussianStats":
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, rows: np.ndarray, block: int = 65536) -> "GaussianStats":
        """The statistics of rows (n, d), which may be a memory map larger than the memory."""
        stats = cls.empty(rows.shape[1])
        for start in range(0, len(rows), block):
            stats.update(rows[start : start + block])
        return stats

    def update(self, rows: np.ndarray) -> None:
        """Adds rows (n, d) of any precision."""
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"Rows have shape (n, {len(self.mean)}), not {rows.shape}.")
        if len(rows) == 0:
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        centred = rows - mean
        merged = self.merge(GaussianStats(len(rows), mean, centred.T @ centred))
        self.n, self.mean, self.scatter = merged.n, merged.mean, merged.scatter
        self._cached_factor = None

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
        """L with L L^T = covariance."""
        if self._cached_factor is None:
            self._cached_factor = _factor(self.covariance)
        return self._cached_factor

    def rank(self) -> int:
        """How many directions the rows vary in, beyond rounding."""
        values = np.linalg.eigvalsh(self.scatter)
        return int((values > values[-1] * self.dim * np.finfo(np.float64).eps).sum())


def frechet_distance(x: GaussianStats, y: GaussianStats) -> float:
    """
    |µx − µy|² + Tr(Cx) + Tr(Cy) − 2 Tr (Cx Cy)^½ (Dowson and Landau 1982).

    The last trace is the sum of the singular values of Lxᵀ Ly with L Lᵀ = C. Those are exact to rounding where the
    covariances are singular, whereas a square root of the product turns a rounding error ε into √ε.
    """
    cross = np.linalg.svd(x.factor.T @ y.factor, compute_uv=False).sum()
    shift = x.mean - y.mean
    return float(shift @ shift + np.trace(x.covariance) + np.trace(y.covariance) - 2 * cross)
