"""What tells how good generated sounds are: distances between sets, scores, and how far these can be trusted."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .classifier import SoundClassifier as SoundClassifier
    from .embeddings import load_embedding as load_embedding
    from .metrics import evaluate as evaluate
    from .sets import AudioSet as AudioSet
    from .statistics import GaussianStats as GaussianStats
    from .statistics import frechet_distance as frechet_distance

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AudioSet": "sets",
        "GaussianStats": "statistics",
        "SoundClassifier": "classifier",
        "evaluate": "metrics",
        "frechet_distance": "statistics",
        "load_embedding": "embeddings",
    },
)
