"""Distances between the embeddings of two sets, with what is needed to believe them."""

from typing import Any

import numpy as np

from tonefield.evaluation import statistics
from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.sets import EmbeddedSet


MOST_ROWS = 10000  # of a set that kernels and resamples take, beyond one a clip: their cost is its square
WORST = 20  # how many clips `fad_per_clip` names at either end


def _embedded(comparison: Comparison) -> tuple[EmbeddedSet, EmbeddedSet]:
    assert comparison.reference is not None and comparison.embedding is not None
    size = comparison.options.batch_size
    sets = (comparison.reference, comparison.generated)
    reference, generated = (one.embed(comparison.embedding, size) for one in sets)
    return reference, generated


def _thinned(comparison: Comparison) -> tuple[EmbeddedSet, EmbeddedSet]:
    reference, generated = (one.thinned(MOST_ROWS) for one in _embedded(comparison))
    return reference, generated


def _sizes(reference: EmbeddedSet, generated: EmbeddedSet) -> dict[str, Any]:
    return {
        "clips": [len(reference), len(generated)],
        "rows": [len(reference.rows), len(generated.rows)],
        "dim": reference.rows.shape[1],
    }


def _few_rows(generated: EmbeddedSet, reference: EmbeddedSet) -> list[str]:
    """What a Fréchet distance of so few rows suffers from."""
    dim, sentences = reference.rows.shape[1], []
    for name, rows in ("generated", len(generated.rows)), ("reference", len(reference.rows)):
        if rows <= dim:
            sentences.append(f"the {name} set has {rows} rows, which span only a part of the {dim} dimensions")
        elif rows < 10 * dim:
            sentences.append(f"the {name} set has {rows} rows, fewer than ten for each of {dim} dimensions")
    return sentences


def _floor(reference: EmbeddedSet, generated: EmbeddedSet) -> float:
    """What two perfect sets of these sizes would score."""
    values = reference.stats.eigenvalues()
    sets = (reference, generated)
    return sum(statistics.null_floor(values, statistics.effective_rows(one.rows, one.counts)) for one in sets)


def fad(comparison: Comparison) -> dict[str, Any]:
    """Fréchet audio distance, with the ranks of both covariances and what a perfect set would score."""
    reference, generated = _embedded(comparison)
    value = statistics.frechet_distance(reference.stats, generated.stats)
    result: dict[str, Any] = {"value": value} | _sizes(reference, generated)
    if not comparison.options.bootstrap:  # one of many calls, for a curve
        return result
    floor, warnings = _floor(reference, generated), _few_rows(generated, reference)
    if value < 3 * floor:
        warnings.append(
            f"{value:.3g} is not distinguishable from sampling noise: two sets of the same sounds would score about"
            f" {floor:.3g}"
        )
    thin = [one.thinned(MOST_ROWS) for one in (reference, generated)]
    sets: Any = [(few.rows, few.counts, one.stats) for few, one in zip(thin, (reference, generated), strict=True)]
    interval = None
    if min(len(reference), len(generated)) > 1:
        resamples, seed = comparison.options.bootstrap, comparison.options.seed
        interval = statistics.frechet_interval(value, sets[0], sets[1], resamples, seed)
    return result | {
        "interval": interval,
        "floor": floor,
        "ranks": [reference.stats.rank(), generated.stats.rank()],
        "warnings": warnings,
    }


def fad_infinity(comparison: Comparison) -> dict[str, Any]:
    """Fréchet audio distance extrapolated to infinitely many generated clips."""
    reference, generated = _embedded(comparison)
    line = statistics.frechet_infinity(reference.stats, generated.rows, generated.counts, comparison.options.seed)
    warnings = _few_rows(generated, reference)
    if line.r_squared < 0.5:
        warnings.append(f"the distances do not lie on a line against 1/n (R² = {line.r_squared:.2f})")
    about = {"slope": line.slope, "r_squared": line.r_squared, "sizes": line.sizes, "values": line.values}
    return {"value": line.value} | _sizes(reference, generated) | about | {"warnings": warnings}


def fad_per_clip(comparison: Comparison) -> dict[str, Any]:
    """The Fréchet distance of each generated clip alone: their median, and the names of the worst and the best."""
    reference, generated = _embedded(comparison)
    distances = statistics.frechet_per_clip(reference.stats, generated.rows, generated.counts)
    names = [sample.name for sample in comparison.generated.samples]
    order = [int(index) for index in np.argsort(-distances) if np.isfinite(distances[index])]
    if not order:
        return {
            "value": None,
            "warnings": ["each clip has one row of embeddings, of which there is no distance: use longer clips"],
        } | _sizes(reference, generated)
    warnings = []
    if len(set(generated.counts.tolist())) > 1:
        warnings.append("the clips are of different lengths: a rank says less of the shorter ones")
    listed = [
        {"file": names[index], "value": float(distances[index]), "rows": int(generated.counts[index])}
        for index in order
    ]
    return (
        {"value": float(np.nanmedian(distances))}
        | _sizes(reference, generated)
        | {"worst": listed[:WORST], "best": listed[: -WORST - 1 : -1], "warnings": warnings}
    )


def _kernel_distance(comparison: Comparison, name: str, kernel: statistics.Kernel) -> tuple[float, float]:
    """An unbiased distance and its standard error; what belongs to one set alone is computed once."""
    reference, generated = _thinned(comparison)
    device = comparison.options.device or "cpu"
    sums: Any = []
    for one in (reference, generated):
        if name not in one.memo:
            one.memo[name] = statistics.kernel_sums(one.rows, one.counts, kernel, device)
        sums.append(one.memo[name])
    crossed = statistics.cross_sums(reference.rows, reference.counts, generated.rows, generated.counts, kernel, device)
    return statistics.unbiased_distance(sums[0], sums[1], crossed, reference.counts, generated.counts)


def _interval(value: float, error: float) -> tuple[float, float] | None:
    """The 95 % interval of a value with a standard error; of so few clips that none is known, there is none."""
    return (value - 1.96 * error, value + 1.96 * error) if np.isfinite(error) else None


def _below_zero(interval: tuple[float, float] | None) -> list[str]:
    if interval is None or interval[1] >= 0:
        return []
    return [
        "the sets are more alike than independent ones can be: do they hold takes or pieces of the same recordings?"
    ]


def kad(comparison: Comparison) -> dict[str, Any]:
    """Kernel audio distance (Chung et al. 2025): 100 times the distance with a Gaussian kernel as wide as the
    reference."""
    reference, generated = _thinned(comparison)
    if "bandwidth" not in reference.memo:
        reference.memo["bandwidth"] = statistics.median_distance(reference.rows, comparison.options.seed)
    bandwidth = reference.memo["bandwidth"]
    kernel = statistics.gaussian_kernel(bandwidth)
    value, error = _kernel_distance(comparison, f"gaussian {bandwidth}", kernel)
    interval = _interval(100 * value, 100 * error)
    return {
        "value": 100 * value,
        "interval": interval,
        "bandwidth": bandwidth,
        "warnings": _below_zero(interval),
    } | _sizes(reference, generated)


def kid(comparison: Comparison) -> dict[str, Any]:
    """Kernel distance with the polynomial kernel: of all clips, and over subsets of 1000 as it is published."""
    reference, generated = _thinned(comparison)
    value, error = _kernel_distance(comparison, "polynomial", statistics.polynomial_kernel)
    interval = _interval(value, error)
    result = {"value": value, "interval": interval, "warnings": _below_zero(interval)} | _sizes(reference, generated)
    if comparison.options.bootstrap:
        mean, spread = statistics.kid(
            reference.rows, generated.rows, seed=comparison.options.seed, device=comparison.options.device or "cpu"
        )
        result |= {"subset_mean": mean, "subset_std": spread}
    return result
