"""Sets of recordings: what is in them, what cannot be used, and their embeddings, kept for the next time."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import soxr
from tqdm.auto import tqdm

from tonefield.command_line import UserError
from tonefield.data.audio_files import AudioError, read_audio, read_unchanged
from tonefield.evaluation.statistics import GaussianStats
from tonefield.files import claim, sync, writing


if TYPE_CHECKING:
    from tonefield.evaluation.embeddings import Embedding

T = TypeVar("T")
R = TypeVar("R")

SILENCE_DB = -60.0  # of full scale: a recording that peaks below is called silent
RESAMPLER = "soxr HQ"
FORMAT = 2  # of the cache; what an earlier number has written is computed anew
CHUNK = (256, 2**25)  # recordings and samples that are in memory at a time, at most
GROUP = (16, 60.0)  # recordings that a thread reads at a time, and their seconds
FILES = (16, 2**23)  # the same before their lengths are known, in bytes
HELD = 2**26  # samples that stay in memory after a file was looked at, so that it need not be read again


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tonefield" / "evaluation"


def in_parallel(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Iterator[R]:
    """`map` by several threads, in order, a few items ahead of what is asked for."""
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def portions(items: Iterable[T], size_of: Callable[[T], float], most: tuple[int, float]) -> Iterator[list[T]]:
    """Consecutive items together: at most so many, and no more once their sizes reach a limit."""
    portion, size = [], 0.0
    for item in items:
        portion.append(item)
        size += size_of(item)
        if len(portion) == most[0] or size >= most[1]:
            yield portion
            portion, size = [], 0.0
    if portion:
        yield portion


@dataclass(frozen=True)
class Sample:
    """One file of a set. `digest` is the hash of its contents; audio in memory comes with its sampling rate."""

    name: str
    source: Any
    digest: str
    columns: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    sampling_rate: int | None = None
    peak: float = 0.0


class EmbeddedSet:
    """
    The embeddings of a set: rows (n, d) of float32, a memory map as a rule, in the order of the files.

    Args:
        counts: How many rows each file has.
    """

    def __init__(self, rows: np.ndarray, counts: np.ndarray, stats: GaussianStats | None = None):
        self.rows, self.counts = rows, counts
        if stats is not None:
            self.stats = stats
        self.memo: dict[str, Any] = {}  # for what a metric computes of a set once and wants again

    @cached_property
    def stats(self) -> GaussianStats:
        return GaussianStats.of(self.rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each file, and the number of all rows."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def clips(self) -> np.ndarray:
        """The index of the file that each row comes from."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def __len__(self) -> int:
        """The number of files."""
        return len(self.counts)

    def of_clip(self, index: int) -> np.ndarray:
        return self.rows[self.starts[index] : self.starts[index + 1]]

    def thinned(self, most: int) -> "EmbeddedSet":
        """About `most` rows: every second row of each file, say, which is much like the first. Each file keeps one."""
        step = -(-len(self.rows) // most)
        if step == 1 or (self.counts == 1).all():
            return self
        if f"thinned {step}" not in self.memo:
            places = np.arange(len(self.rows)) - np.repeat(self.starts[:-1], self.counts)
            kept = self.rows[np.flatnonzero(places % step == 0)]
            self.memo[f"thinned {step}"] = EmbeddedSet(kept, -(-self.counts // step))
        return self.memo[f"thinned {step}"]

    def subset(self, indices: Sequence[int]) -> "EmbeddedSet":
        """The embeddings of some of the files, in the order of `indices`, which may repeat one."""
        places = np.asarray(indices)
        counts = self.counts[places]
        before = np.repeat(self.starts[places] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return EmbeddedSet(self.rows[before + np.arange(counts.sum())], counts)


class SampleSet:
    """
    Files that are judged together, in the order of their names.

    A subclass says how a file is read for an embedding (`load`).

    Args:
        name: What reports call the set.
        samples: The files that can be used.
        rejects: (name, reason) of those that cannot.
        num_workers: Threads that read.
        cache_dir: Where embeddings are kept; `None`: in a folder that goes with the process.
    """

    def __init__(
        self,
        name: str,
        samples: list[Sample],
        rejects: Sequence[tuple[str, str]] = (),
        num_workers: int = 2,
        cache_dir: str | Path | None = None,
    ):
        self.name, self.samples, self.rejects = name, samples, list(rejects)
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.parent: SampleSet | None = None
        self.indices: Sequence[int] = ()
        self.memo: dict[str, Any] = {}  # for what a metric makes of a set once and wants again
        self._embedded: dict[str, EmbeddedSet] = {}

    def load(self, samples: Sequence[Sample], embedding: "Embedding") -> list[np.ndarray]:
        """What an embedding is given of files."""
        raise NotImplementedError

    @property
    def root(self) -> "SampleSet":
        """The set that this one is a part of, or itself."""
        return self if self.parent is None else self.parent.root

    def about(self) -> dict[str, Any]:
        """What a report says of the set."""
        return {
            "name": self.name,
            "files": len(self),
            "fingerprint": self.fingerprint,
            "rejects": [{"file": file, "reason": reason} for file, reason in self.rejects],
        }

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """Tells sets apart: equal when the contents of all files are."""
        return hashlib.sha256("".join(sample.digest for sample in self.samples).encode()).hexdigest()[:16]

    def subset(self, indices: Sequence[int]) -> "SampleSet":
        """Some of the files. Their embeddings are those of the whole set, computed once."""
        part = object.__new__(type(self))
        part.__dict__.update({k: v for k, v in vars(self).items() if k != "fingerprint"})
        part.samples = [self.samples[index] for index in indices]
        part.parent, part.indices, part.memo = self, indices, {}
        return part

    def embed(self, embedding: "Embedding", batch_size: int = 32) -> EmbeddedSet:
        """The embeddings of all files: from memory, from the cache, or computed in batches."""
        if self.parent is not None:
            return self.parent.embed(embedding, batch_size).subset(self.indices)
        what = [FORMAT, self.fingerprint, embedding.fingerprint(), embedding.sampling_rate, embedding.windowing]
        key = hashlib.sha256(json.dumps([*what, RESAMPLER]).encode()).hexdigest()[:32]
        if key not in self._embedded:
            if self.cache_dir is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="tonefield-")
                folder = Path(self._scratch.name, key)
            else:
                folder = Path(self.cache_dir, key)
            try:
                self._embedded[key] = read_embedded(folder)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged
                shutil.rmtree(folder, ignore_errors=True)
                self._compute(embedding, batch_size, folder, what)
                self._embedded[key] = read_embedded(folder)
        return self._embedded[key]

    def _compute(self, embedding: "Embedding", batch_size: int, folder: Path, what: list) -> None:
        """Writes rows as they come, so that memory does not grow with the set; the folder is complete or not there."""
        with unfinished(folder.parent) as partial:
            counts: list[int] = []
            with (partial / "rows.f32").open("wb") as file:
                for inputs in self._chunks(embedding):
                    rows = embedding.embed(inputs, batch_size)
                    joined = np.concatenate(rows).astype(np.float32, copy=False)
                    if not np.isfinite(joined).all():
                        bad = next(i for i, of in enumerate(rows) if not np.isfinite(of).all())
                        name = self.samples[len(counts) + bad].name
                        raise UserError(f"{embedding.name} makes numbers that are not finite of {name}.")
                    with writing(f"--cache_dir {folder.parent}"):
                        file.write(joined.tobytes())
                        file.flush()
                    counts += map(len, rows)
            about = json.dumps({"what": what, "resampler": RESAMPLER, "embedding": embedding.name})
            kept: dict[str, Any] = {"counts": counts, "dim": embedding.dim, "about": about}
            # Fewer rows than dimensions tell all there is to know of a covariance, and more quickly than it does.
            if sum(counts) > embedding.dim:
                stats = GaussianStats.of(_rows(partial, sum(counts), embedding.dim))
                kept |= {"mean": stats.mean, "scatter": stats.scatter}
            with writing(f"--cache_dir {folder.parent}"):
                np.savez(partial / "stats.npz", **kept)
                sync(partial)
            try:
                partial.rename(folder)
                (folder / ".lock").unlink()
            except OSError:  # another process was faster
                if not (folder / "stats.npz").is_file():
                    raise

    def _groups(self) -> Iterator[list[Sample]]:
        """The files in handy portions."""
        return portions(self.samples, lambda sample: sample.seconds, GROUP)

    def _chunks(self, embedding: "Embedding") -> Iterator[list[np.ndarray]]:
        loaded = in_parallel(lambda some: self.load(some, embedding), self._groups(), self.num_workers)
        files = itertools.chain.from_iterable(loaded)
        bar = tqdm(files, f"{embedding.name}: {self.name}", len(self), unit="file", disable=None, leave=False)
        return portions(bar, lambda data: data.size, CHUNK)


def _rows(folder: Path, n: int, dim: int) -> np.ndarray:
    return np.memmap(folder / "rows.f32", np.float32, "r", shape=(n, dim))


@contextmanager
def unfinished(cache: Path) -> Iterator[Path]:
    """A folder in the cache for what is not complete. What runs that were killed have left there is removed."""
    with writing(f"--cache_dir {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache)
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        lock = claim(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(cache: Path) -> None:
    """Removes the unfinished folders that no run claims."""
    for partial in cache.glob(".partial-*/.lock"):
        try:
            lock = claim(partial.parent)
        except (UserError, FileNotFoundError):  # another run is at it, or has just come to its end
            continue
        if lock is not None:
            shutil.rmtree(partial.parent, ignore_errors=True)
            lock.close()


def read_embedded(folder: Path) -> EmbeddedSet:
    with np.load(folder / "stats.npz", allow_pickle=False) as file:
        counts = file["counts"]
        n, dim = int(counts.sum()), int(file["dim"])
        stats = GaussianStats(n, file["mean"], file["scatter"]) if n > dim else None
    return EmbeddedSet(_rows(folder, n, dim), counts, stats)


class AudioSet(SampleSet):
    """Recordings. `AudioSet.open` reads a folder, `AudioSet.of` takes sounds in memory."""

    class_names: Sequence[str] = ()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        num_workers: int = 2,
        cache_dir: str | Path | None = None,
        flag: str = "",
    ) -> "AudioSet":
        """
        The recordings below a folder, with what metadata files and folders say of them.

        Every file is read once, for its hash, length and peak; a known hash saves the rest. Files that cannot be used
        come into `rejects`, with the reason. `flag` is what an error calls the folder.
        """
        from tonefield.data.audio_folder import AudioFolder

        source = AudioFolder(folder, flag)
        # Pictures may lie beside sounds, as inference.py leaves them.
        rejects = [(name, why) for name, why in source.rejects if not name.lower().endswith(".png")]
        samples, held, size = [], {}, 0
        files = list(portions(source, lambda recording: recording.size, FILES))
        digests = list(itertools.chain.from_iterable(in_parallel(_digests, files, num_workers)))
        note = None
        if cache_dir is not None:
            what = [
                FORMAT,
                *((Path(recording.name).suffix, of) for recording, of in zip(source, digests, strict=True)),
            ]
            note = Path(cache_dir, f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.json")
        found = _read_note(note, len(digests)) if note else None
        if found is None:
            scanned = itertools.chain.from_iterable(in_parallel(_scan, files, num_workers))
            bar = tqdm(scanned, f"reading {folder}", len(source), unit="file", disable=None, leave=False)
            found = []
            for recording, (facts, sound) in zip(source, bar, strict=True):
                found.append(facts)
                if sound is not None and size + len(sound) <= HELD:
                    held[recording.name] = sound, facts[2]
                    size += len(sound)
            if note:
                _write_note(note, found)
        for recording, digest, (reason, *facts) in zip(source, digests, found, strict=True):
            if reason is None:
                samples.append(Sample(recording.name, recording.audio, digest, recording.columns, *facts))
            else:
                rejects.append((recording.name, reason))
        if not samples:
            raise UserError(
                f"None of the {len(source)} recordings in {folder} can be used; {rejects[0][0]} {rejects[0][1]}."
            )
        opened = cls(str(folder), samples, sorted(rejects), num_workers, cache_dir)
        opened.class_names = getattr(source.features.get("label"), "names", ())
        opened.warnings, opened.held = source.warnings, held
        return opened

    @classmethod
    def of(
        cls, sounds: Sequence[np.ndarray], sampling_rate: int, name: str = "sounds", columns: Sequence[dict] = ()
    ) -> "AudioSet":
        """Sounds in memory, each of shape (samples,)."""
        samples = []
        for index, sound in enumerate(sounds):
            sound = np.ascontiguousarray(sound, np.float32)
            if sound.ndim != 1 or len(sound) == 0 or not np.isfinite(sound).all():
                raise ValueError(f"Sound {index} is not a line of finite numbers; its shape is {sound.shape}.")
            digest = hashlib.sha256(sound.tobytes() + str(sampling_rate).encode()).hexdigest()
            samples.append(
                Sample(
                    f"{index:05d}", (sound, sampling_rate), digest, columns[index] if columns else {},
                    len(sound) / sampling_rate, sampling_rate, float(np.abs(sound).max()),
                )
            )  # fmt: skip
        return cls(name, samples)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.warnings: list[str] = []
        self.held: dict[str, tuple[np.ndarray, int]] = {}  # sounds, and their rates

    @property
    def silent(self) -> list[str]:
        """The files that are too quiet to be heard. They count like all others."""
        return [sample.name for sample in self.samples if sample.peak < 10 ** (SILENCE_DB / 20)]

    @property
    def labels(self) -> list[int | None]:
        """The class of each file, a place in `class_names`."""
        return [sample.columns.get("label") for sample in self.samples]

    def about(self) -> dict[str, Any]:
        rates = Counter(sample.sampling_rate for sample in self.samples)
        return super().about() | {
            "seconds": sum(sample.seconds for sample in self.samples),
            "sampling_rates": {str(rate or "unknown"): count for rate, count in sorted(rates.items(), key=str)},
            "silent": self.silent,
        }

    def load(self, samples: Sequence[Sample], embedding: "Embedding") -> list[np.ndarray]:
        return self._read(samples, embedding.sampling_rate)

    def waveforms(self, sampling_rate: int) -> Iterator[np.ndarray]:
        """The sounds as mono float32 at a rate, in order, read ahead by several threads."""
        groups = in_parallel(lambda group: self._read(group, sampling_rate), self._groups(), self.num_workers)
        yield from itertools.chain.from_iterable(groups)

    def _read(self, samples: Sequence[Sample], sampling_rate: int) -> list[np.ndarray]:
        held = (replace(one, source=self.held[one.name]) if one.name in self.held else one for one in samples)
        return [read_sample(sample, sampling_rate) for sample in held]


def read_sample(sample: Sample, sampling_rate: int) -> np.ndarray:
    """A sound as mono float32 samples, resampled by soxr at high quality."""
    if isinstance(sample.source, tuple):
        sound, rate = sample.source
        return sound if rate == sampling_rate else soxr.resample(sound, rate, sampling_rate, quality="HQ")
    try:
        return read_audio(sample.source, sampling_rate)
    except AudioError as error:  # it could be read a moment ago
        raise UserError(f"{sample.name} {error}.") from None


def _digests(recordings) -> list[str]:
    return [_digest(recording.audio) for recording in recordings]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be opened ({error.strerror or error})"


def _scan(recordings) -> list[tuple[tuple, np.ndarray | None]]:
    """Reads each file once: (why it cannot be used, seconds, sampling rate, peak), and its sound at that rate."""
    found = []
    for recording in recordings:
        try:
            sound, rate = read_unchanged(recording.audio)
        except AudioError as error:
            found.append(((str(error),), None))
        else:
            found.append(((None, len(sound) / rate, rate, float(max(sound.max(), -sound.min()))), sound))
    return found


def _read_note(note: Path, count: int) -> list | None:
    try:
        facts = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, list) and len(facts) == count else None


def _write_note(note: Path, facts: list) -> None:
    with unfinished(note.parent) as folder, writing(f"--cache_dir {note.parent}"):
        (folder / note.name).write_text(json.dumps(facts))
        sync(folder / note.name)
        os.replace(folder / note.name, note)
