"""The metrics by name, and their run over sets of recordings.

A metric is a function of a [`Comparison`] that returns plain numbers: `value`, which is the metric, and whatever else
explains it (`interval` is a pair of numbers, `warnings` a list of sentences). It stands in `METRICS` with the module it
lives in, so that nothing is imported before it is used.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError


if TYPE_CHECKING:
    from tonefield.evaluation.embeddings import Embedding
    from tonefield.evaluation.sets import AudioSet


@dataclass(frozen=True)
class Metric:
    """
    Args:
        module: Where in `tonefield.evaluation` the function `function` is.
        help: One line for `--help`.
        better: What is better: "lower", "higher", or "" where neither is.
        needs: Of what, beside two sets of recordings, it makes use: "embedding" (it is run for each one), "classifier",
            "captions", "pipeline", "pairs" (files of the same name in both sets).
        reference: Whether it compares with a reference; the others are run once.
    """

    module: str
    function: str
    help: str
    better: str
    needs: tuple[str, ...] = ()
    reference: bool = True

    def load(self) -> Callable[["Comparison"], dict[str, Any]]:
        return getattr(importlib.import_module(f"tonefield.evaluation.{self.module}"), self.function)


METRICS: dict[str, Metric] = {
    "fad": Metric("distances", "fad", "Fréchet audio distance", "lower", ("embedding",)),
    "fad_inf": Metric("distances", "fad_infinity", "the same, for infinitely many clips", "lower", ("embedding",)),
    "kad": Metric("distances", "kad", "kernel audio distance, unbiased at any number of clips", "lower", ("embedding",)),
    "kid": Metric("distances", "kid", "kernel distance of the polynomial kernel", "lower", ("embedding",)),
}  # fmt: skip


@dataclass
class Options:
    """What a user can choose; each is a flag of `evaluate.py` of the same name."""

    device: str | None = None  # None: the GPU if there is one
    batch_size: int = 32
    num_workers: int = 2
    cache_dir: str | None = None
    seed: int = 0
    bootstrap: int = 100  # resamples for an interval; 0: none


@dataclass
class Comparison:
    """What a metric is given. `reference` is None for a metric without one, `embedding` unless it needs one."""

    generated: "AudioSet"
    reference: "AudioSet | None"
    options: Options = field(default_factory=Options)
    embedding: "Embedding | None" = None


def check_metrics(metrics: Sequence[str], options: Options) -> None:
    """Refuses, before anything is read, names that are unknown and metrics that lack what they need."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")


def check_sets(metrics: Sequence[str], generated: "AudioSet", references: Sequence["AudioSet"]) -> None:
    """The same for what the sets must have."""
    for name in metrics:
        if METRICS[name].reference and not references:
            raise UserError(f"The metric {name} compares with a reference: name one with --reference.")


def evaluate(
    reference: "str | Path | AudioSet | Sequence[str | Path | AudioSet]",
    generated: "str | Path | AudioSet",
    metrics: Sequence[str] = ("fad", "kad"),
    embeddings: "Sequence[str | Embedding]" = ("mel",),
    options: Options | None = None,
) -> dict[str, Any]:
    """
    Computes metrics of generated sounds and returns a report of plain numbers, lists and strings.

    Args:
        reference: Folders of recordings to compare with, or sets of them ([`AudioSet`]); the metrics are computed for
            each one.
        generated: The folder or set that is judged.
        metrics: Names out of `METRICS`.
        embeddings: Names for [`load_embedding`], or embeddings.
        options: What else can be chosen.

    Returns:
        `settings`, `generated`, `references`, `embeddings`; `results`, a list with one dictionary for each metric,
        reference and embedding; `warnings`, a list of sentences.
    """
    report, *_ = run_metrics(reference, generated, metrics, embeddings, options or Options())
    return report


def run_metrics(
    reference: Any, generated: Any, metrics: Sequence[str], embeddings: Sequence[Any], options: Options
) -> "tuple[dict[str, Any], AudioSet, list[AudioSet]]":
    """[`evaluate`], with the sets as well."""
    check_metrics(metrics, options)

    import torch

    import tonefield
    from tonefield.evaluation.embeddings import Embedding, load_embedding
    from tonefield.evaluation.sets import AudioSet

    options = replace(options, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = any("embedding" in METRICS[name].needs for name in metrics)
    loaded = [e if isinstance(e, Embedding) else load_embedding(e, options.device) for e in embeddings if wanted]

    def opened(source, flag: str) -> AudioSet:
        if isinstance(source, AudioSet):
            return source
        return AudioSet.open(source, options.num_workers, options.cache_dir, flag)

    if isinstance(reference, (str, Path, AudioSet)):
        reference = [reference]
    judged = opened(generated, "--generated")
    references = [opened(source, "--reference") for source in reference]
    check_sets(metrics, judged, references)

    results = []
    for name in metrics:
        metric = METRICS[name]
        function = metric.load()
        for other in references if metric.reference else [None]:
            for embedding in loaded if "embedding" in metric.needs else [None]:
                found = function(Comparison(judged, other, options, embedding))
                for result in found if isinstance(found, list) else [found]:
                    about = {"metric": name, "reference": other and other.name, "better": metric.better}
                    results.append(about | {"embedding": embedding and embedding.name} | result)
    report = {
        "tonefield": tonefield.__version__,
        "settings": asdict(options) | {"metrics": list(metrics)},
        "generated": judged.about(),
        "references": [other.about() for other in references],
        "embeddings": [
            {
                "name": embedding.name,
                "sampling_rate": embedding.sampling_rate,
                "resampler": "soxr HQ",
                "dim": embedding.dim,
                "windowing": embedding.windowing,
                "fingerprint": embedding.fingerprint(),
            }
            for embedding in loaded
        ],
        "results": results,
        "warnings": [],
    }
    return report, judged, references
