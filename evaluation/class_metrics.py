"""What a classifier says of generated sounds: are they of the wanted class, clear, and of all classes?

Everything is computed from log-probabilities in float64: probabilities of exactly 0 exist in no formula, so nothing
becomes infinite that is not.
"""

import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from scipy.stats import norm

from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.posteriors import log_posteriors, posterior_model
from tonefield.evaluation.sets import AudioSet, EmbeddedSet, Sample


RESAMPLES = 200  # for the intervals of scores that are not means


# ----- scores of log-probabilities (n, classes)


def log_mean(log_p: np.ndarray) -> np.ndarray:
    """The logarithm of the mean of the probabilities."""
    return np.logaddexp.reduce(log_p, axis=0) - np.log(len(log_p))


def log_inception_score(log_p: np.ndarray) -> float:
    """The mean of KL(p_i || mean p) in nats (Salimans et al. 2016), between 0 and the logarithm of the classes."""
    return float((np.exp(log_p) * (log_p - log_mean(log_p))).sum(1).mean())


def log_modified_inception_score(log_p: np.ndarray) -> float:
    """
    The mean of KL(p_i || p_j) over all pairs in nats (Gurumurthy et al. 2017).

    The pairs need no loop: the mean is that of p_i ln p_i less the mean p times the mean ln p.
    """
    p = np.exp(log_p)
    return float((p * log_p).sum(1).mean() - (p.mean(0) * log_p.mean(0)).sum())


def am_score(log_p: np.ndarray, reference: np.ndarray) -> float:
    """KL(mean p of the reference || mean p) + the mean entropy, in nats (Zhou et al. 2018); 0 is perfect."""
    theirs, ours = log_mean(reference), log_mean(log_p)
    entropy = -(np.exp(log_p) * log_p).sum(1).mean()
    return float((np.exp(theirs) * (theirs - ours)).sum() + entropy)


def confidence(log_p: np.ndarray) -> float:
    """The mean probability of the likeliest class."""
    return float(np.exp(log_p.max(1)).mean())


def class_scores(log_p: np.ndarray) -> dict[str, float]:
    """The scores that need no reference and no wanted class."""
    return {
        "is": float(np.exp(log_inception_score(log_p))),
        "log_mis": log_modified_inception_score(log_p),
        "confidence": confidence(log_p),
    }


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def bootstrap_interval(score, log_p: np.ndarray, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """
    A 95 % interval of a score of a set, from sets drawn from it with replacement.

    Drawn sets repeat clips, which moves some scores. That shift is taken back: it is of the size and direction of the
    bias of the score itself, so the interval lies about the value.
    """
    rng, n = np.random.default_rng(seed), len(log_p)
    values = np.array([score(log_p[rng.integers(n, size=n)]) for _ in range(resamples)])
    low, high = np.quantile(values - values.mean(), [0.025, 0.975])
    value = score(log_p)
    return float(value + low), float(value + high)


# ----- bins


def proportions_differ(first: np.ndarray, second: np.ndarray, alpha: float = 0.05) -> np.ndarray:
    """
    In which bins the shares of two sets differ, by the two-sided two-proportion z-test with the pooled share.

    Args:
        first, second: How many of each set lie in each bin.
    """
    n, m = first.sum(), second.sum()
    pooled = (first + second) / (n + m)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    z = np.divide(np.abs(first / n - second / m), error, out=np.zeros(len(first)), where=error > 0)
    return z > norm.ppf(1 - alpha / 2)


def number_of_different_bins(
    reference: np.ndarray, generated: np.ndarray, bins: int | None = None, alpha: float = 0.05, seed: int = 0
) -> tuple[int, int]:
    """
    NDB and the number of bins (Richardson and Weiss 2018): the bins are clusters of the reference.

    Each feature is scaled to unit variance. Two sets of one law differ in a share `alpha` of the bins. By default
    there are up to 50 bins, with twenty of the reference in each on average.
    """
    bins = bins or max(2, min(50, len(reference) // 20))
    if len(reference) < 2 * bins:
        raise ValueError(f"{bins} bins need {2 * bins} rows of the reference at least, not {len(reference)}.")
    reference, generated = np.asarray(reference, np.float64), np.asarray(generated, np.float64)
    spread = reference.std(0)
    spread[spread == 0] = 1
    rng = np.random.default_rng(seed)
    centres, _ = kmeans2(reference / spread, bins, iter=50, minit="++", seed=rng)  # pyright: ignore[reportCallIssue]

    def counts(rows: np.ndarray) -> np.ndarray:
        nearest = np.concatenate([
            cdist(rows[start : start + 4096] / spread, centres, "sqeuclidean").argmin(1)
            for start in range(0, len(rows), 4096)
        ])  # fmt: skip
        return np.bincount(nearest, minlength=bins)

    return int(proportions_differ(counts(reference), counts(generated), alpha).sum()), bins


# ----- the class that was wanted


def wanted_class(sample: Sample, labels: list[str], class_names: Any = ()) -> str | None:
    """
    The class that a file was made for: the column `label` (or `class`, `class_label`) of a metadata.csv or
    manifest.jsonl, or else the folder it lies in, or the first part of its name that is one.
    """
    for column in ("label", "class", "class_label"):
        value = sample.columns.get(column)
        if isinstance(value, int) and class_names and 0 <= value < len(class_names):
            value = class_names[value]
        if isinstance(value, int) and str(value) not in labels and 0 <= value < len(labels):
            value = labels[value]
        if value is not None and str(value) in labels:
            return str(value)
    path = PurePosixPath(sample.name)
    for part in [*reversed(path.parent.parts), path.stem, *re.split(r"[\W_]+", path.stem)]:
        if part in labels:
            return part
    return None


# ----- metrics


def _model(comparison: Comparison) -> Any:
    return posterior_model(comparison.generated, comparison.options)


def _log_posteriors(which: AudioSet, comparison: Comparison) -> np.ndarray:
    return log_posteriors(which.embed(_model(comparison), comparison.options.batch_size))


def _about(comparison: Comparison) -> dict[str, Any]:
    """What every result has: the classifier, what it is worth, and a warning if that is little."""
    model = _model(comparison)
    card = getattr(model, "card", {})
    about = {"clips": [len(comparison.generated)], "model": model.name}
    if (accuracy := card.get("accuracy")) is not None:
        about["classifier_accuracy"] = accuracy
        if accuracy < 0.9:
            about["warnings"] = [f"the classifier knows {accuracy:.0%} of held-out recordings only"]
    return about


def _score(comparison: Comparison, name: str, score) -> dict[str, Any]:
    log_p = _log_posteriors(comparison.generated, comparison)
    result = {"value": score(log_p)} | _about(comparison)
    if comparison.options.bootstrap:
        result["interval"] = bootstrap_interval(score, log_p, comparison.options.seed)
    # No set of real recordings reaches the ideal of a score: this is how far they come.
    real = getattr(_model(comparison), "card", {}).get("held_out", {}).get(name)
    return result | ({} if real is None else {"held_out_recordings": real})


def inception_score(comparison: Comparison) -> dict[str, Any]:
    return _score(comparison, "is", lambda log_p: float(np.exp(log_inception_score(log_p))))


def modified_inception_score(comparison: Comparison) -> dict[str, Any]:
    return _score(comparison, "log_mis", log_modified_inception_score)


def mean_confidence(comparison: Comparison) -> dict[str, Any]:
    return _score(comparison, "confidence", confidence)


def am(comparison: Comparison) -> dict[str, Any]:
    assert comparison.reference is not None
    reference = _log_posteriors(comparison.reference, comparison)
    result = _score(comparison, "am", lambda log_p: am_score(log_p, reference))
    return result | {"clips": [len(comparison.reference), len(comparison.generated)]}


def accuracy(comparison: Comparison) -> dict[str, Any]:
    """The share of files that the classifier takes for what they were made for, and which classes it confuses."""
    model, generated = _model(comparison), comparison.generated
    labels = getattr(model, "labels", None)
    if labels is None:
        raise ValueError(f"{model.name} does not tell the names of its classes.")
    wanted = [wanted_class(sample, labels, generated.class_names) for sample in generated.samples]
    known = [index for index, name in enumerate(wanted) if name is not None]
    if not known:
        first = generated.samples[0].name
        raise ValueError(
            f"no file tells for which class it was made, such as {first}: put them into folders named like the classes"
            f" ({', '.join(labels[:3])}, ...), or add a manifest.jsonl with file_name and label."
        )
    truth = np.array([labels.index(str(wanted[index])) for index in known])
    guess = _log_posteriors(generated, comparison)[known].argmax(1)
    hits = int((truth == guess).sum())
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (truth, guess), 1)
    result = _about(comparison)
    warnings = result.pop("warnings", [])
    if len(known) < len(generated):
        warnings.append(f"{len(generated) - len(known)} files do not tell their class and are left out")
    real = getattr(model, "card", {}).get("accuracy")
    return result | {
        "value": hits / len(known),
        "interval": share_interval(hits, len(known)),
        "clips": [len(known)],
        "labels": labels,
        "confusion": confusion.tolist(),
        "warnings": warnings,
    } | ({} if real is None else {"held_out_recordings": real})  # fmt: skip


def _embedded(which: AudioSet, comparison: Comparison) -> EmbeddedSet:
    assert comparison.embedding is not None
    return which.embed(comparison.embedding, comparison.options.batch_size)


def ndb(comparison: Comparison) -> dict[str, Any]:
    """The share of bins of the reference's rows of which generated rows are too many or too few."""
    assert comparison.reference is not None
    reference, generated = (_embedded(one, comparison) for one in (comparison.reference, comparison.generated))
    different, bins = number_of_different_bins(reference.rows, generated.rows, seed=comparison.options.seed)
    return {
        "value": different / bins,
        "bins": bins,
        "different": different,
        "expected": 0.05,
        "clips": [len(reference), len(generated)],
        "rows": [len(reference.rows), len(generated.rows)],
    }
