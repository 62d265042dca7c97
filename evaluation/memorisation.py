"""Whether generated sounds are copies of what a model was trained on, and how much of the real variety they have.

All of it looks at nearest neighbours among the embeddings of whole recordings, one row each: the mean over its pieces.
"""

from typing import Any

import numpy as np
import torch

from tonefield.evaluation.embeddings import Embedding
from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.sets import AudioSet, EmbeddedSet, read_sample


LISTED = 20  # pairs of a generated and a training sound that a report names
NEAR = 0.05  # the share of held-out recordings that is as near to a training recording as what is called near
NEIGHBOURS = 5  # k of precision, recall, density and coverage, as published
COPY = 0.95  # correlation of waveforms from which on a sound is called a copy (takes of one speaker reach 0.9)
BLOCK = 2**24  # distances in memory at a time


# ----- neighbours


def nearest(
    rows: np.ndarray, others: np.ndarray, k: int = 1, itself: bool = False, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """
    The distances to the k nearest of `others` and their numbers, both (n, k), in float64.

    With `itself`, both are the same rows, and a row is no neighbour of its own.
    """
    most = len(others) - itself
    if k > most:
        raise ValueError(f"{k} neighbours cannot be found among {most} recordings.")
    targets = torch.from_numpy(np.asarray(others, np.float64)).to(device)
    found, block = [], max(1, BLOCK // len(others))
    for start in range(0, len(rows), block):
        some = torch.from_numpy(np.asarray(rows[start : start + block], np.float64)).to(device)
        # Not by the product of matrices, in whose rounding small distances vanish.
        distances = torch.cdist(some, targets, compute_mode="donot_use_mm_for_euclid_dist")
        if itself:
            index = torch.arange(len(some), device=device)
            distances[index, start + index] = torch.inf
        found.append(distances.topk(k, largest=False))
    return tuple(torch.cat([part[i] for part in found]).cpu().numpy() for i in (0, 1))  # pyright: ignore


def count_within(
    rows: np.ndarray, centres: np.ndarray, radii: np.ndarray, device: torch.device | str = "cpu"
) -> np.ndarray:
    """In how many of the balls about `centres` each row lies."""
    targets = torch.from_numpy(np.asarray(centres, np.float64)).to(device)
    limits = torch.from_numpy(np.asarray(radii, np.float64)).to(device)
    counts, block = [], max(1, BLOCK // len(centres))
    for start in range(0, len(rows), block):
        some = torch.from_numpy(np.asarray(rows[start : start + block], np.float64)).to(device)
        distances = torch.cdist(some, targets, compute_mode="donot_use_mm_for_euclid_dist")
        counts.append((distances <= limits).sum(1))
    return torch.cat(counts).cpu().numpy()


def precision_recall(
    reference: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which generated rows lie in the reference's manifold, and which of the reference in the generated one: booleans
    whose means are precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A manifold is the union of balls about all rows, each as large as the distance to the row's k-th neighbour.
    """
    real = nearest(reference, reference, k, itself=True, device=device)[0][:, -1]
    fake = nearest(generated, generated, k, itself=True, device=device)[0][:, -1]
    return count_within(generated, reference, real, device) > 0, count_within(reference, generated, fake, device) > 0


def density_coverage(
    reference: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """
    In how many of the reference's balls each generated row lies, over k, and in which balls any lies: the means are
    density and coverage (Naeem et al. 2020, eq. 4 and 6). An outlier of the reference spoils them less than precision.
    """
    real = nearest(reference, reference, k, itself=True, device=device)[0][:, -1]
    density = count_within(generated, reference, real, device) / k
    return density, nearest(reference, generated, 1, device=device)[0][:, 0] <= real


# ----- sounds as they are compared


def normalize(sound: np.ndarray) -> np.ndarray:
    """A sound from where it first comes within 40 dB of its peak to where it last does, at an RMS of 0.1."""
    loud = np.flatnonzero(np.abs(sound) > np.abs(sound).max() / 100)
    if len(loud) == 0:
        return sound
    sound = sound[loud[0] : loud[-1] + 1]
    return (sound * (0.1 / np.sqrt(np.square(sound, dtype=np.float64).mean()))).astype(np.float32)


class Normalized(Embedding):
    """An embedding to which the level of a sound and the silence around it are nothing."""

    def __init__(self, inner: Embedding):
        self.inner = inner
        self.name, self.sampling_rate, self.dim = inner.name, inner.sampling_rate, inner.dim
        self.window, self.hop, self.least = inner.window, inner.hop, inner.least

    def fingerprint(self) -> str:
        return f"normalized-1-{self.inner.fingerprint()}"

    def embed(self, sounds, batch_size: int = 32) -> list[np.ndarray]:
        return self.inner.embed([normalize(sound) for sound in sounds], batch_size)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """The largest correlation of two waveforms over all shifts, between 0 and 1: a copy has 1 at any level."""
    size = 2 ** int(np.ceil(np.log2(len(first) + len(second))))
    spectra = [np.fft.rfft(sound.astype(np.float64), size) for sound in (first, second)]
    energy = np.sqrt(np.square(first, dtype=np.float64).sum() * np.square(second, dtype=np.float64).sum())
    return float(np.abs(np.fft.irfft(spectra[0] * spectra[1].conj(), size)).max() / energy) if energy > 0 else 0.0


def clip_rows(embedded: EmbeddedSet) -> np.ndarray:
    """One row for each recording, the mean of its rows, float64."""
    sums = np.add.reduceat(np.asarray(embedded.rows, np.float64), embedded.starts[:-1])
    return sums / embedded.counts[:, None]


def nearness_interval(held_out: np.ndarray, generated: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """
    A 95 % interval of the share of distances below the `NEAR` quantile of those of held-out recordings.

    Both sets are drawn anew, with replacement: of few held-out recordings the quantile itself is uncertain.
    """
    rng = np.random.default_rng(seed)
    limits = [np.quantile(rng.choice(held_out, len(held_out)), NEAR) for _ in range(500)]
    shares = [np.mean(rng.choice(generated, len(generated)) < limit) for limit in limits]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


# ----- metrics


def _rows(which: AudioSet, embedding: Embedding, comparison: Comparison) -> np.ndarray:
    return clip_rows(which.embed(embedding, comparison.options.batch_size))


def _scaled(*sets: np.ndarray) -> list[np.ndarray]:
    """All sets with each number in units of its spread in the first one, so that none decides alone."""
    spread = sets[0].std(0)
    spread = np.maximum(spread, spread.max() / 10)  # what hardly varies is noise
    return [rows / np.where(spread > 0, spread, 1) for rows in sets]


def memorisation(comparison: Comparison) -> dict[str, Any]:
    """
    How many generated sounds are nearer to a training sound than real sounds are that the model has not seen.

    `reference` are the held-out recordings. Of these, a share of 5 % is "near" by definition; of a model that has
    learnt and not copied about as many are. The nearest pairs are named, with the correlation of their waveforms:
    close to 1 it is a copy, whatever its level and place.
    """
    assert comparison.reference is not None and comparison.embedding is not None
    options, generated, held_out = comparison.options, comparison.generated, comparison.reference
    training = open_training_set(comparison)
    embedding = Normalized(comparison.embedding)
    train, real, fake = _scaled(*(_rows(one, embedding, comparison) for one in (training, held_out, generated)))
    device = options.device or "cpu"
    distances, places = (found[:, 0] for found in nearest(fake, train, device=device))
    theirs = nearest(real, train, device=device)[0][:, 0]
    threshold = float(np.quantile(theirs, NEAR))
    near = distances < threshold
    pairs = []
    for index in np.argsort(distances)[:LISTED]:
        sample, source = generated.samples[index], training.samples[places[index]]
        sounds = [read_sample(one, embedding.sampling_rate) for one in (sample, source)]
        pairs.append({
            "file": sample.name,
            "nearest": source.name,
            "distance": float(distances[index]),
            # of the held-out recordings, the share that is as near to a training recording
            "held_out_share": float(np.mean(theirs <= distances[index])),
            "correlation": correlation(*sounds),
        })  # fmt: skip
    copies = [pair for pair in pairs if pair["correlation"] > COPY]
    interval, warnings = nearness_interval(theirs, distances, options.seed), []
    if copies:
        warnings.append(
            f"{len(copies)} of the {len(pairs)} nearest pairs are copies, the first one {copies[0]['file']} of"
            f" {copies[0]['nearest']}"
        )
    if interval[0] > 2 * NEAR:
        warnings.append(f"{near.mean():.0%} of the sounds are nearer to training sounds than real ones are")
    return {
        "value": float(near.mean()),
        "interval": interval,
        "expected": NEAR,
        "median_distance": float(np.median(distances)),
        "held_out_median_distance": float(np.median(theirs)),
        "threshold": threshold,
        "copies": len(copies),
        "pairs": pairs,
        "clips": [len(training), len(held_out), len(generated)],
        "warnings": warnings,
    }


def open_training_set(comparison: Comparison) -> AudioSet:
    """What the model was trained on, read once however many metrics and references there are."""
    options, root = comparison.options, comparison.generated
    assert options.training_set is not None
    if "training" not in root.memo:
        root.memo["training"] = AudioSet.open(
            options.training_set, options.num_workers, options.cache_dir, "--training_set"
        )
    return root.memo["training"]


def _shares(comparison: Comparison, function, names: tuple[str, str]) -> list[dict[str, Any]]:
    assert comparison.reference is not None and comparison.embedding is not None
    sets = (comparison.reference, comparison.generated)
    reference, generated = (_rows(one, comparison.embedding, comparison) for one in sets)
    found = function(reference, generated, device=comparison.options.device or "cpu")
    about = {"k": NEIGHBOURS, "clips": [len(reference), len(generated)]}
    return [{"metric": name, "value": float(of.mean())} | about for name, of in zip(names, found, strict=True)]


def precision_and_recall(comparison: Comparison) -> list[dict[str, Any]]:
    return _shares(comparison, precision_recall, ("precision", "recall"))


def density_and_coverage(comparison: Comparison) -> list[dict[str, Any]]:
    return _shares(comparison, density_coverage, ("density", "coverage"))
