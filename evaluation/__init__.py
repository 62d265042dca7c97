"""What tells how good generated sounds are: distances between sets, scores, and how far these can be trusted."""

from typing import TYPE_CHECKING

from tonefield._lazy import attach


if TYPE_CHECKING:
    from .classifier import SoundClassifier as SoundClassifier
    from .embeddings import load_embedding as load_embedding
    from .listening_results import analyse_listening as analyse_listening
    from .listening_test import make_listening_test as make_listening_test
    from .metrics import evaluate as evaluate
    from .report import write_report as write_report
    from .sets import AudioSet as AudioSet
    from .statistics import GaussianStats as GaussianStats
    from .statistics import frechet_distance as frechet_distance

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AudioSet": "sets",
        "GaussianStats": "statistics",
        "SoundClassifier": "classifier",
        "analyse_listening": "listening_results",
        "evaluate": "metrics",
        "frechet_distance": "statistics",
        "load_embedding": "embeddings",
        "make_listening_test": "listening_test",
        "write_report": "report",
    },
)
