"""The metrics by name, and their run over sets of recordings.

A metric is a function of a [`Comparison`] that returns plain numbers: `value`, which is the metric (or None), and
whatever else explains it (`interval` is a pair of numbers, `warnings` a list of sentences); or a list of such
dictionaries, each with a name of its own in `metric`. It stands in `METRICS` with the module it lives in, so that
nothing is imported before it is used.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line


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
        needs: What it uses beside two sets of recordings: "embedding" (it is run for each one), "classifier",
            "captions" (in the generated set), "pairs" (files of the same name in both sets), "training" (what the
            model was trained on).
        reference: Whether it compares with a reference; the others are run once.
        curve: Whether it can be computed for many subsets, to see how many clips it takes.
    """

    module: str
    function: str
    help: str
    better: str
    needs: tuple[str, ...] = ()
    reference: bool = True
    curve: bool = True

    def load(self) -> Callable[["Comparison"], Any]:
        return getattr(importlib.import_module(f"tonefield.evaluation.{self.module}"), self.function)


EMBEDDING = ("embedding",)

METRICS: dict[str, Metric] = {
    "fad": Metric("distances", "fad", "Fréchet audio distance", "lower", EMBEDDING),
    "fad_inf": Metric(
        "distances", "fad_infinity", "the same, extrapolated to infinitely many clips", "lower", EMBEDDING, curve=False
    ),
    "fad_per_clip": Metric(
        "distances", "fad_per_clip", "the same of each clip alone: which ones are worst", "lower", EMBEDDING,
        curve=False,
    ),
    "kad": Metric(
        "distances", "kad", "kernel audio distance, unbiased for any number of clips", "lower", EMBEDDING
    ),
    "kid": Metric("distances", "kid", "the same with the polynomial kernel", "lower", EMBEDDING),
    "clap_score": Metric(
        "text_score", "clap_score", "how well sounds fit their captions: cosine of CLAP's embeddings", "higher",
        ("captions",), reference=False,
    ),
    "kl": Metric(
        "posteriors", "kl", "KL divergence of a classifier's posteriors on files of the same name", "lower",
        ("classifier", "pairs"),
    ),
    "accuracy": Metric(
        "class_metrics", "accuracy", "how many sounds a classifier takes for what they were made for", "higher",
        ("classifier",), reference=False,
    ),
    "confidence": Metric(
        "class_metrics", "mean_confidence", "how sure it is (of one sound over and over as well)", "higher",
        ("classifier",), reference=False,
    ),
    "is": Metric(
        "class_metrics", "inception_score", "inception score: clear sounds of all classes", "higher",
        ("classifier",), reference=False,
    ),
    "log_mis": Metric(
        "class_metrics", "modified_inception_score", "logarithm of the modified inception score", "higher",
        ("classifier",), reference=False,
    ),
    "am": Metric(
        "class_metrics", "am", "AM score: clear sounds, classes as frequent as in the reference", "lower",
        ("classifier",),
    ),
    "ndb": Metric(
        "class_metrics", "ndb", "NDB/K: share of bins of the reference that are too full or too empty", "lower",
        EMBEDDING,
    ),
    "memorisation": Metric(
        "memorisation", "memorisation", "how many sounds are suspiciously near to one of --training_set", "lower",
        ("embedding", "training"), curve=False,
    ),
    "precision_recall": Metric(
        "memorisation", "precision_and_recall", "share of sounds among the reference's neighbours, and conversely",
        "higher", EMBEDDING, curve=False,
    ),
    "density_coverage": Metric(
        "memorisation", "density_and_coverage", "the same, less swayed by outliers", "higher", EMBEDDING, curve=False
    ),
    "sounds": Metric(
        "sounds", "summaries", "length, level, loudness, spectrum and tempo of both sets", "lower", curve=False
    ),
    "pair_distances": Metric(
        "sounds", "pair_distances", "spectral distances and SI-SDR of files of the same name", "lower", ("pairs",),
        curve=False,
    ),
}  # fmt: skip


# Embeddings: what is said of them, and where the class is that makes one (`from_name(weights, device)`). What follows
# NAME= on the command line are the weights; those without a default have to be given.
EMBEDDINGS: dict[str, tuple[str, str, str]] = {
    "mel": ("statistics of mel spectrograms, 96 numbers a second; nothing to download", "embeddings", "MelStatistics"),
    "clap": ("CLAP, =MODEL of transformers (laion/clap-htsat-unfused) or a .pt of LAION", "clap", "ClapEmbedding"),
    "encodec": ("EnCodec before its codes, =MODEL (facebook/encodec_24khz)", "encoders", "EncodecEmbedding"),
    "encoder": ("wav2vec 2.0, HuBERT, WavLM, MERT, =MODEL or =MODEL@LAYER", "encoders", "SpeechEmbedding"),
    "vggish": ("VGGish without its last ReLU, =vggish-10086976.pth", "vggish", "VGGishEmbedding"),
    "classifier": (
        "what evaluate.py train-classifier makes, =DIR",
        "classifier",
        "ClassifierFeatures",
    ),
    "cnn14": ("PANNs CNN14 of 8, 16 or 32 kHz, =FILE.pth", "cnn14", "CNN14Embedding"),
}


@dataclass
class Options:
    """What a user can choose; each is a flag of `evaluate.py` of the same name."""

    device: str | None = None  # None: the GPU if there is one
    batch_size: int = 32
    num_workers: int = 2
    cache_dir: str | None = None
    seed: int = 0
    bootstrap: int = 100  # resamples for an interval; 0: the value alone, as quickly as can be
    curve: bool = False
    precision: float = 0.1
    classifier: str | None = None
    clap: str | None = None
    training_set: str | None = None
    caption_column: str = "caption"


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
        needs = METRICS[name].needs
        if "classifier" in needs and options.classifier is None:
            raise UserError(
                f"The metric {name} needs --classifier: one that evaluate.py train-classifier has made, or an audio"
                " classifier of transformers."
            )
        if "captions" in needs and options.clap is None:
            raise UserError(f"The metric {name} needs --clap, a CLAP model of transformers: its folder or Hub id.")
        if "training" in needs and options.training_set is None:
            raise UserError(
                f"The metric {name} needs --training_set, the recordings that the model was trained on (those of"
                " --reference it has not seen)."
            )


def check_sets(
    metrics: Sequence[str], options: Options, generated: "AudioSet", references: "Sequence[AudioSet]"
) -> None:
    """The same for what the sets must have."""
    for name in metrics:
        if METRICS[name].reference and not references:
            raise UserError(f"The metric {name} compares with recordings: name them with --reference.")
        if "captions" in METRICS[name].needs:
            for sample in generated.samples:
                if not isinstance(sample.columns.get(options.caption_column), str):
                    raise UserError(
                        f"The metric {name} needs a caption of every file, and {sample.name} has none: put a"
                        f" metadata.csv or manifest.jsonl with the columns file_name and {options.caption_column} into"
                        f" {generated.name}, or name another column with --caption_column."
                    )
        if "pairs" in METRICS[name].needs:
            names = {sample.name for sample in generated.samples}
            for reference in references:
                if not names & {sample.name for sample in reference.samples}:
                    raise UserError(
                        f"The metric {name} compares files of the same name, and {generated.name} and {reference.name}"
                        " have none in common."
                    )


def evaluate(
    reference: "str | Path | AudioSet | Sequence[str | Path | AudioSet]",
    generated: "str | Path | AudioSet",
    metrics: Sequence[str] = ("fad", "kad"),
    embeddings: "Sequence[str | Embedding]" = ("mel",),
    **options: Any,
) -> dict[str, Any]:
    """
    Computes metrics of generated sounds and returns a report of plain numbers, lists and strings.

    Args:
        reference: Folders of recordings to compare with, or sets of them ([`AudioSet`]); the metrics are computed for
            each one.
        generated: The folder or set that is judged.
        metrics: Names out of `METRICS`.
        embeddings: Names for [`load_embedding`], or embeddings.
        options: Fields of [`Options`], such as `device="cuda"` or `classifier="digits-classifier"`.

    Returns:
        `settings`, `generated`, `references`, `embeddings`; `results`, a list with one dictionary for each metric,
        reference and embedding; `curves`, likewise; `warnings`, a list of sentences.
    """
    return run_metrics(reference, generated, metrics, embeddings, Options(**options))[0]


def run_metrics(
    reference: Any, generated: Any, metrics: Sequence[str], embeddings: Sequence[Any], options: Options
) -> "tuple[dict[str, Any], AudioSet, list[AudioSet]]":
    """[`evaluate`], with the sets as well."""
    if isinstance(reference, (str, Path)) or hasattr(reference, "samples"):
        reference = [reference]
    check_metrics(metrics, options)
    for flag, source in [("--generated", generated), *(("--reference", source) for source in reference)]:
        if isinstance(source, (str, Path)) and not Path(source).is_dir():  # known before anything heavy is imported
            raise UserError(f"{flag} {source} {'is not a folder' if Path(source).exists() else 'does not exist'}.")

    import torch

    import tonefield
    from tonefield.evaluation.embeddings import Embedding, load_embedding
    from tonefield.evaluation.sets import RESAMPLER, AudioSet

    options = replace(options, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used: {first_line(error)}") from None
    wanted = any("embedding" in METRICS[name].needs for name in metrics)
    device = options.device or "cpu"
    loaded = [e if isinstance(e, Embedding) else load_embedding(e, device) for e in embeddings if wanted]

    def opened(source, flag: str) -> AudioSet:
        if isinstance(source, AudioSet):
            return source
        return AudioSet.open(source, options.num_workers, options.cache_dir, flag)

    judged = opened(generated, "--generated")
    references = [opened(source, "--reference") for source in reference]
    check_sets(metrics, options, judged, references)

    results, curves, warnings = [], [], compare_sets(judged, references)
    for name in metrics:
        metric = METRICS[name]
        function = metric.load()
        for other in references if metric.reference else [None]:
            for embedding in loaded if "embedding" in metric.needs else [None]:
                comparison = Comparison(judged, other, options, embedding)
                about = {"metric": name, "reference": other and other.name, "better": metric.better}
                about |= {"embedding": embedding and embedding.name}
                parts = [name, embedding.name if embedding else "", f"to {other.name}" if other else ""]
                title = " ".join(filter(None, parts))
                try:
                    found = function(comparison)
                    if options.curve and metric.curve:
                        curves.append(about | trace_curve(function, comparison))
                except ValueError as error:
                    raise UserError(f"{title}: {error}") from None
                for result in found if isinstance(found, list) else [found]:
                    results.append(about | result)
                    warnings += [f"{title}: {sentence}" for sentence in result.get("warnings", ())]
    report = {
        "tonefield": tonefield.__version__,
        "settings": asdict(options) | {"metrics": list(metrics)},
        "generated": judged.about(),
        "references": [other.about() for other in references],
        "embeddings": [
            {
                "name": embedding.name,
                "sampling_rate": embedding.sampling_rate,
                "resampler": RESAMPLER,
                "dim": embedding.dim,
                "windowing": embedding.windowing,
                "fingerprint": embedding.fingerprint(),
            }
            for embedding in loaded
        ],
        "results": results,
        "curves": curves,
        "warnings": warnings,
    }
    return report, judged, references


def compare_sets(generated: "AudioSet", references: "Sequence[AudioSet]") -> list[str]:
    """What is odd about the sets themselves, in sentences."""
    warnings = []
    for one in (generated, *references):
        if one.rejects:
            file, reason = one.rejects[0]
            warnings.append(f"{one.name}: {len(one.rejects)} files are left out, the first one {file}: {reason}")
        if one.silent:
            warnings.append(
                f"{one.name}: {len(one.silent)} files are silent, the first one {one.silent[0]}; they count like all"
            )
        if len({sample.digest for sample in one.samples}) < len(one):
            warnings.append(f"{one.name}: some files are copies of one another")
        warnings += [f"{one.name}: {sentence}" for sentence in one.warnings]
    digests = {sample.digest for sample in generated.samples}
    rates = {sample.sampling_rate for sample in generated.samples}
    for one in references:
        if common := len(digests & {sample.digest for sample in one.samples}):
            warnings.append(f"{generated.name}: {common} files are in {one.name} as well")
        if rates.isdisjoint(theirs := {sample.sampling_rate for sample in one.samples}):
            rate, other = (", ".join(map(str, sorted(some, key=str))) for some in (rates, theirs))
            warnings.append(
                f"{generated.name} has sampling rates of {rate} Hz, {one.name} of {other} Hz: what one of them lacks"
                " at the top counts as a difference"
            )
    return warnings


def trace_curve(function: Callable[[Comparison], Any], comparison: Comparison, repeats: int = 5) -> dict[str, Any]:
    """
    A metric of more and more generated clips, with intervals from subsets that are drawn without replacement (of a
    metric that returns several values, the first).

    Subsets of a set are more alike than new sets would be: the variance is that of new ones, by the correction for
    finite populations. `smallest_n` is the first number of clips whose interval reaches no further
    than `precision` times the value of all clips, to either side.
    """
    import numpy as np

    options, n = comparison.options, len(comparison.generated)
    rng = np.random.default_rng(options.seed)
    quick = replace(options, bootstrap=0)

    def value_of(indices) -> float:
        part = replace(comparison, generated=comparison.generated.subset(indices), options=quick)
        found = function(part)
        return (found[0] if isinstance(found, list) else found)["value"]

    sizes = np.unique(np.geomspace(min(10, max(2, n // 4)), n // 2, 8).round().astype(int)) if n >= 4 else []
    points, whole = [], value_of(range(n))
    for size in map(int, sizes):
        values = [value_of(np.sort(rng.permutation(n)[:size])) for _ in range(repeats)]
        half = 1.96 * float(np.std(values, ddof=1) * np.sqrt(n / (n - size)))
        mean = float(np.mean(values))
        points.append({"n": size, "value": mean, "interval": (mean - half, mean + half)})
    narrow = [
        point["n"] for point in points
        if (point["interval"][1] - point["interval"][0]) / 2 <= options.precision * abs(whole)
    ]  # fmt: skip
    points.append({"n": n, "value": whole, "interval": None})
    return {"points": points, "precision": options.precision, "smallest_n": narrow[0] if narrow else None}
