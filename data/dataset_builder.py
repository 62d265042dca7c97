"""Writes a dataset of recordings: in parallel, in bounded memory, and so that a stopped run can be taken up again.

The recordings are dealt into parts. A part is converted by one thread and written to one Arrow file, under a temporary
name until it is complete; a note beside it holds what it counted. When all parts are there their files are moved into
the layout of `datasets.load_from_disk`. Parts and their order follow from the recordings alone, so neither the number
of threads nor an interruption changes the result, nor that several runs (shards) make every N-th part each.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo, Features
from tqdm.auto import tqdm

from tonefield.command_line import UserError
from tonefield.data.audio_folder import AudioColumn, AudioFolder, Recording
from tonefield.data.loading import DATASET_NOTE
from tonefield.files import claim, sync, write_text, writing


MADE_OF = "made_of"  # in that note
REJECTS = "rejects.jsonl"
RESUME = "run the same command with --resume"
PART_RECORDINGS = 256
PART_BYTES = (2**20, 2**26)  # at least and at most, on disk; between them, as many as make 64 parts


class Converter(Protocol):
    """Turns recordings into rows."""

    features: Features

    def record(self, sums: dict[str, float]) -> dict:
        """What a dataset says of itself, given the sums of what it is trained on."""
        ...

    def convert(self, part: "Part") -> Iterator[pa.Table]:
        """Yields the rows of `part.recordings`, up to `part.limit`; tells it what it rejects, skips, reads, sums up.

        `part.rows` counts what was yielded before.
        """
        ...


def join_features(own: dict, columns: Features) -> Features:
    """The columns that a converter makes, and those that come along with each recording."""
    if clash := own.keys() & columns.keys():
        raise UserError(f"The recordings come with a column {min(clash)!r}, a name that is taken: rename it.")
    return Features(own | columns)


def table_of(columns: dict, features: Features) -> pa.Table:
    """Rows for a part; columns are sequences or Arrow arrays."""
    schema = features.arrow_schema
    arrays = [c if isinstance(c := columns[f.name], pa.Array) else pa.array(c, f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass
class Part:
    """A share of the recordings, and what came of it; no more than `limit` rows are wanted."""

    index: int
    split: str
    recordings: list[Recording] = field(repr=False)
    rows: int = 0
    seconds: float = 0.0
    skipped: int = 0
    rejects: list[tuple[str, str]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    on_seconds: Callable[[float], None] = field(default=lambda seconds: None, repr=False)

    def wanted(self, at_most: int) -> int:
        return at_most if self.limit is None else min(at_most, self.limit - self.rows)

    def heard(self, seconds: float) -> None:
        self.seconds += seconds
        self.on_seconds(seconds)

    def reject(self, recording: Recording, reason: str) -> None:
        self.rejects.append((recording.name, reason))

    def add(self, **sums: float) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


@dataclass
class Result:
    """What `build` found; `sums` are per split."""

    rows: dict[str, int]
    seconds: float
    skipped: int
    rejects: list[tuple[str, str]]
    sums: dict[str, dict[str, float]]
    recordings: int


def order(recordings: Iterable[Recording], seed: int) -> list[Recording]:
    """A shuffle that depends on names only: a file keeps its place among the others when files come and go."""
    return sorted(recordings, key=lambda recording: (_hash(seed, recording.name), recording.name))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def plan_parts(source: AudioFolder | AudioColumn, held_out: dict[str, float], seed: int) -> Iterator[Part]:
    """Deals recordings into splits and parts. `held_out` gives the fraction of the files of each split but `train`."""
    index = itertools.count()

    def parts(split: str, recordings: Iterable[Recording], part_bytes: int) -> Iterator[Part]:
        batch, size = [], 0
        for recording in recordings:
            batch.append(recording)
            size += recording.size
            if len(batch) == PART_RECORDINGS or size >= part_bytes:
                yield Part(next(index), split, batch)
                batch, size = [], 0
        if batch:
            yield Part(next(index), split, batch)

    if isinstance(source, AudioFolder):
        recordings = order(source, seed)
        part_bytes = int(np.clip(sum(recording.size for recording in recordings) // 64, *PART_BYTES))
        for split, fraction in held_out.items():
            count = max(1, round(fraction * len(source))) if fraction > 0 else 0
            count = min(count, len(recordings) - 1)  # one at least is left to train on
            yield from parts(split, recordings[:count], part_bytes)
            recordings = recordings[count:]
        yield from parts("train", recordings, part_bytes)
        return

    # How many recordings a stream holds is not known: each is held out with the probability of its split.
    queues: dict[str, list[Recording]] = {split: [] for split in ["train", *held_out]}
    sizes = dict.fromkeys(queues, 0)
    for number, recording in enumerate(source):
        place = int.from_bytes(_hash(seed, f"{recording.name}#{number}")[:8], "big") / 2**64
        chosen = "train"
        for split, fraction in held_out.items():
            if 0 <= place < fraction:
                chosen = split
            place -= fraction
        queues[chosen].append(recording)
        sizes[chosen] += recording.size
        if len(queues[chosen]) == PART_RECORDINGS or sizes[chosen] >= PART_BYTES[1]:
            yield Part(next(index), chosen, queues[chosen])
            queues[chosen], sizes[chosen] = [], 0
    for split, recordings in queues.items():
        if recordings:
            yield Part(next(index), split, recordings)


class DatasetBuilder:
    """
    Args:
        output_dir: Where the dataset will be. Until it is complete it is at `output_dir` + `.partial`.
        settings: What the rows depend on; a run is only taken up again with the same settings.
        resume: Whether to take up a run that was stopped.
        shard: Which of how many runs this is that work side by side; each takes up what it did before.
        merge: Whether such runs have made the parts.
    """

    def __init__(
        self, output_dir: str | Path, settings: dict, resume: bool = False, shard: tuple[int, int] | None = None,
        merge: bool = False,
    ):  # fmt: skip
        self.output_dir = Path(output_dir).resolve()
        self.work = self.output_dir.with_name(self.output_dir.name + ".partial")
        self.settings = json.loads(json.dumps(settings))
        plan = self.work / "plan.json"
        self.shard, self.num_shards = shard, shard and shard[1]
        self._recordings = hashlib.sha256()
        # A run that ended, or was killed when the dataset had taken its place; what it was made of may be left.
        self._made_of = fingerprint_in(self.output_dir) if resume or merge else None
        self.complete = self._made_of is not None
        if not self.complete and self.output_dir.exists() and (
            not self.output_dir.is_dir() or any(self.output_dir.iterdir())
        ):  # fmt: skip
            raise UserError(f"--output_dir {output_dir} is in use: delete it or choose another one.")
        if merge and not self.complete and not plan.exists():
            raise UserError(f"There are no shards in {self.work}: run --num_shards N with --shard_index 0 to N - 1.")
        try:
            if not self.complete:
                self.work.mkdir(parents=True, exist_ok=True)
            lock = ".lock" if shard is None else f".lock-{shard[0]}"
            self._lock = claim(self.work, lock) if self.work.exists() else None
        except OSError as error:
            raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from None
        if not self.complete:
            self._settle_plan(plan, resume, merge)

    def _settle_plan(self, plan: Path, resume: bool, merge: bool) -> None:
        """Writes down the settings, or compares them with those of the run that is taken up."""
        begun = any(self.work.glob("*-*.json"))  # at least one part is finished
        if begun and not (resume or merge or self.shard):
            raise UserError(f"{self.work} holds an unfinished run: add --resume to finish it, or delete that folder.")
        if self.shard:
            self._check_settings(plan, write_first(plan, json.dumps(self.settings | {"num_shards": self.num_shards})))
        elif begun or merge:
            self._check_settings(plan, plan.read_text(encoding="utf-8"), merge)
        else:
            write_text(plan, json.dumps(self.settings))

    def _check_settings(self, plan: Path, text: str, merge: bool = False) -> None:
        try:
            before = dict(json.loads(text))
        except (ValueError, TypeError):
            raise UserError(f"{plan} is damaged: delete {self.work} and start again.") from None
        if merge:
            self.num_shards = before.get("num_shards")
            if self.num_shards is None:
                raise UserError(f"{self.work} holds an unfinished run without shards: finish it with --resume.")
        now = self.settings | ({"num_shards": self.num_shards} if self.num_shards else {})
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                raise UserError(
                    f"The unfinished run in {self.work} had {name} = {before.get(name)}, this one has"
                    f" {now.get(name)}: use the same, or delete that folder."
                )

    # ----- parts

    def _noted(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts as they come, whose recordings count for the fingerprint."""
        for part in parts:
            self._recordings.update(self._digest(part).encode())
            yield part

    def run(
        self, parts: Iterable[Part], converter: Converter, num_proc: int, max_rows: int | None = None,
        held_out: dict[str, float] | None = None, total_bytes: int = 0,
    ) -> list[Part]:  # fmt: skip
        """Converts the parts that are not there yet and returns all of them, in order.

        With `max_rows` the parts are converted one after the other, since each is told how many rows are still wanted
        of its split.
        """
        limits = None
        if max_rows is not None:
            limits = {split: round(fraction * max_rows) for split, fraction in (held_out or {}).items()}
            limits["train"] = max_rows - sum(limits.values())
        stop = threading.Event()
        done: list[Part] = []
        with _Progress(total_bytes) as progress, ThreadPoolExecutor(1 if limits else num_proc) as pool:
            running: set[Future] = set()

            def heard(seconds: float) -> None:
                if stop.is_set():
                    raise InterruptedError("stopped")
                progress.heard(seconds)

            def collect(futures: Iterable[Future]) -> None:
                for future in futures:
                    part = future.result()
                    # The sound itself, if the recordings came with it, has been used.
                    part.recordings = [replace(recording, audio=None) for recording in part.recordings]
                    done.append(part)
                    progress.completed(part)
                    if limits:
                        limits[part.split] -= part.rows

            try:
                for part in self._noted(parts):
                    if self.shard and part.index % self.shard[1] != self.shard[0]:
                        continue
                    if limits and limits[part.split] <= 0:
                        continue
                    part.on_seconds, part.limit = heard, limits and limits[part.split]
                    running.add(pool.submit(self._convert, part, converter))
                    # A few parts ahead keep all threads busy, and a stream from being read into memory.
                    while running and (limits or len(running) > 2 * num_proc):
                        finished = wait(running, return_when=FIRST_COMPLETED).done
                        running -= finished
                        collect(finished)
                collect(running)
            except BaseException as error:
                stop.set()
                for future in running:
                    future.cancel()
                kept = f"{len(done)} parts are finished and kept in {self.work}: {RESUME}"
                if isinstance(error, OSError):
                    raise UserError(f"The run was stopped: {error.strerror or error}. {kept}.") from None
                if isinstance(error, KeyboardInterrupt):
                    print(f"\n{kept}.", file=sys.stderr)
                raise
        return sorted(done, key=lambda part: part.index)

    def gather(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that shards have made: all that there should be, of the recordings that are there now."""
        found, missing, unknown = [], [], {note.stem for note in self.work.glob("*-*.json")}
        for part in tqdm(self._noted(parts), unit="part", desc="parts", dynamic_ncols=True):
            finished = self._finished(part)
            unknown.discard(self._paths(part)[1].stem)
            if finished is None:
                missing.append(part.index)
            else:
                finished.recordings = [replace(recording, audio=None) for recording in part.recordings]
                found.append(finished)
        if missing:
            shards = sorted({index % self.num_shards for index in missing})
            raise UserError(
                f"{len(missing)} of {len(found) + len(missing)} parts are missing in {self.work}: finish --num_shards"
                f" {self.num_shards} with --shard_index {', '.join(map(str, shards))} first."
            )
        if unknown:
            raise UserError(
                f"The recordings have changed since the shards in {self.work} were made, which has parts of more of"
                " them: delete that folder and start again."
            )
        return found

    def _paths(self, part: Part) -> tuple[Path, Path]:
        stem = f"{part.split}-{part.index:06d}"
        return self.work / f"{stem}.arrow", self.work / f"{stem}.json"

    def _digest(self, part: Part) -> str:
        names = [(recording.name, recording.size, recording.columns) for recording in part.recordings]
        return hashlib.sha256(json.dumps(names, default=str).encode()).hexdigest()

    def _finished(self, part: Part) -> Part | None:
        """What an earlier run counted in this part, if it completed it and nothing has happened to it since."""
        arrow, note = self._paths(part)
        try:
            counted = json.loads(note.read_text(encoding="utf-8"))
            digest, size = counted.pop("recordings"), counted.pop("bytes")
            if size != arrow.stat().st_size:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if digest != self._digest(part):
            raise UserError(
                f"The recordings have changed since the unfinished run in {self.work} (near"
                f" {part.recordings[0].name}): delete that folder and start again."
            )
        return Part(**counted, recordings=part.recordings)

    def _convert(self, part: Part, converter: Converter) -> Part:
        """Converts one part, in a thread; leaves a complete file and a note of what it counted, or neither."""
        if (finished := self._finished(part)) is not None:
            part.on_seconds(finished.seconds)
            return finished
        # One thread computes one part: that scales better than several threads for each small operation, and the last
        # bits of a result do not depend on how many there are.
        torch.set_num_threads(1)
        arrow, note = self._paths(part)
        temporary = arrow.with_suffix(".tmp")

        schema = converter.features.arrow_schema
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for table in converter.convert(part):
                stream.write_table(table)
                part.rows += len(table)
                if part.rows == part.limit:
                    break
        sync(temporary)
        os.replace(temporary, arrow)
        counted = {
            name: value for name, value in vars(part).items() if name not in ("recordings", "limit", "on_seconds")
        }
        about = {"recordings": self._digest(part), "bytes": arrow.stat().st_size}
        write_text(note, json.dumps(counted | about), RESUME)
        return part

    # ----- the dataset

    def result(self, parts: list[Part], rejects: list[tuple[str, str]]) -> Result:
        """Adds up the parts."""
        result = Result({}, 0.0, 0, sorted(rejects), {}, 0)
        for part in parts:
            result.rows[part.split] = result.rows.get(part.split, 0) + part.rows
            result.seconds += part.seconds
            result.skipped += part.skipped
            result.recordings += len(part.recordings)
            result.rejects += [tuple(reject) for reject in part.rejects]
            sums = result.sums.setdefault(part.split, {})
            for name, value in part.sums.items():
                sums[name] = sums.get(name, 0.0) + value
        result.rejects.sort()
        return result

    def finish(
        self,
        parts: list[Part],
        result: Result,
        features: Features,
        add_files: Callable[[Path], None] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Moves the parts into a folder that `datasets.load_from_disk` reads, and that folder to its place.

        `add_files` puts more into that folder before; `about` is what else its `DatasetInfo` says.
        """
        dataset = self.work / "dataset"
        with writing(self.output_dir, RESUME):
            self._assemble(dataset, parts, result, DatasetInfo(features=features, **about or {}))
        if add_files is not None:
            add_files(dataset)
        with writing(self.output_dir, RESUME):
            sync(dataset)
            if self.output_dir.exists():
                self.output_dir.rmdir()
            os.replace(dataset, self.output_dir)
        self.discard()

    def confirm(self, parts: Iterable[Part]) -> None:
        """Removes what is left of the run that completed the dataset; refuses one of other recordings or settings."""
        for _ in self._noted(parts):
            pass
        if self._made_of != self._fingerprint():
            raise UserError(
                f"--output_dir {self.output_dir} is in use: the dataset there is complete, and was made of other"
                " recordings or with other settings. Delete it or choose another one."
            )
        self.discard()

    def _fingerprint(self) -> str:
        """Equal where the same settings were given, and the same recordings, used or not."""
        return hashlib.sha256(json.dumps([self.settings, self._recordings.hexdigest()]).encode()).hexdigest()

    def _assemble(self, dataset: Path, parts: list[Part], result: Result, info: DatasetInfo) -> None:
        shutil.rmtree(dataset, ignore_errors=True)
        splits = [split for split in ("train", "validation", "test") if result.rows.get(split)]
        for split in splits:
            folder = dataset / split
            folder.mkdir(parents=True)
            filled = [part for part in parts if part.split == split and part.rows]
            arrows, digests = [self._paths(part)[0] for part in filled], [self._digest(part) for part in filled]
            names = [f"data-{i:05d}-of-{len(arrows):05d}.arrow" for i in range(len(arrows))]
            for arrow, name in zip(arrows, names, strict=True):
                _link(arrow, folder / name)  # not moved: a stop in here loses nothing
            info.write_to_directory(folder)
            state = {
                "_data_files": [{"filename": name} for name in names],
                "_fingerprint": hashlib.sha256(json.dumps([self.settings, split, digests]).encode()).hexdigest()[:16],
                "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
                "_split": split,
            }  # fmt: skip
            (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        (dataset / DATASET_NOTE).write_text(json.dumps({"splits": splits, MADE_OF: self._fingerprint()}))
        write_rejects(dataset / REJECTS, result.rejects)

    def discard(self) -> None:
        """Removes what the run kept for being taken up again."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def fingerprint_in(folder: Path) -> str | None:
    """What a dataset was made of, if it is one that says so."""
    try:
        return json.loads((folder / DATASET_NOTE).read_text(encoding="utf-8")).get(MADE_OF)
    except (OSError, ValueError, AttributeError):
        return None


def write_rejects(path: Path, rejects: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"audio_file": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in rejects]
    path.write_text("".join(lines), encoding="utf-8")


def read_rejects(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    return [(row["audio_file"], row["reason"]) for row in rows]


def write_first(path: Path, text: str) -> str:
    """Writes a file, whole, unless another run that begins at the same time was faster; returns what is in it."""
    handle, own = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        os.link(own, path)
    except OSError:  # it is there, or the file system knows no links
        if not path.exists():
            shutil.copyfile(own, path)
    finally:
        os.unlink(own)
    return path.read_text(encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name; where the file system knows no links, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class _Progress:
    """A bar that counts seconds of sound. How many there are in all is estimated from the bytes read so far."""

    def __init__(self, total_bytes: int):
        self._bar = tqdm(unit="s", unit_scale=True, desc="seconds of sound", dynamic_ncols=True)
        self._lock = threading.Lock()
        self._total_bytes, self._bytes, self._seconds = total_bytes, 0, 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def heard(self, seconds: float) -> None:
        with self._lock:
            self._bar.update(seconds)

    def completed(self, part: Part) -> None:
        self._seconds += part.seconds
        self._bytes += sum(recording.size for recording in part.recordings)
        if self._bytes and self._total_bytes:
            self._bar.total = max(self._bar.n, self._seconds * self._total_bytes / self._bytes)
