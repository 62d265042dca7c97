"""Distances between the embeddings of two sets, with what is needed to believe them."""

from typing import Any

from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.statistics import frechet_distance


def _embedded(comparison: Comparison):
    assert comparison.reference is not None and comparison.embedding is not None
    size = comparison.options.batch_size
    return comparison.reference.embed(comparison.embedding, size), comparison.generated.embed(
        comparison.embedding, size
    )


def fad(comparison: Comparison) -> dict[str, Any]:
    """Fréchet audio distance."""
    reference, generated = _embedded(comparison)
    return {"value": frechet_distance(reference.stats, generated.stats)}
