"""Recordings as training data: crops of them, one after another without end."""

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm.auto import tqdm

from tonefield.command_line import UserError, printable
from tonefield.data.audio_files import AudioError, TooLongError, read_audio, read_blocks
from tonefield.data.audio_folder import AudioColumn, AudioFolder, Recording
from tonefield.data.loading import load_split
from tonefield.training.data import EndlessRows, TrainingData
from tonefield.training.randomness import derive_seed, make_generators, uniform


READ_AHEAD = 2**23  # samples of a recording that is read while others are; a longer one is written block by block


@dataclass(frozen=True)
class Recordings:
    """Sounds, mono and at one rate, one behind the other in one array: sound i is `samples[ends[i - 1] : ends[i]]`.

    The array is a file that is mapped into memory: any crop is there at once, and all processes share it.
    """

    samples: np.ndarray
    ends: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def crop(self, index: int, place: float, size: int) -> np.ndarray:
        """`size` samples from the beginning of a recording (`place` 0) to its end (1); silence follows a short one."""
        end, length = self.ends[index], self.length(index)
        start = end - length + int(place * max(0, length - size) + 0.5)
        samples = self.samples[start : min(start + size, end)]
        return np.pad(samples, (0, size - len(samples)))

    def length(self, index: int) -> int:
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))


class Crops:
    """Rows for `EndlessRows`, the numbers of recordings: a long recording has as many rows as crops fit into it."""

    def __init__(self, recordings: Recordings, size: int):
        lengths = np.diff(recordings.ends, prepend=0)
        self.recording = np.repeat(np.arange(len(recordings)), np.maximum(1, lengths // size))

    def __len__(self) -> int:
        return len(self.recording)

    def __getitem__(self, rows: list[int]) -> dict:
        return {"recording": self.recording[rows].tolist()}


@dataclass(frozen=True)
class ReadCrops:
    """A crop of each recording: at a place that belongs to the position, or with `seed=None` from the middle."""

    recordings: Recordings
    size: int
    seed: int | None

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        if self.seed is None:
            places = [0.5] * len(positions)
        else:
            places = uniform(len(positions), make_generators(self.seed, "crop", positions)).tolist()
        crops = [self.recordings.crop(i, p, self.size) for i, p in zip(columns["recording"], places, strict=True)]
        return {"positions": positions, "clean": torch.from_numpy(np.stack(crops))}


def gather(source: Iterable[Recording], sampling_rate: int, path: Path, limit: int | None = None) -> None:
    """Writes the sounds of a source to `path` and what `open_recordings` needs beside it; says what it leaves out.

    At most `limit` recordings are taken. A sound without a single sample above 0.0001 teaches nothing.
    """
    lengths, names, rates, rejects = [], [], Counter(), []

    recordings = iter(source)

    def read(recording: Recording) -> tuple[Iterable[np.ndarray], int, str]:
        try:
            if recording.audio is None:
                raise AudioError("has no audio")
            try:
                blocks: Iterable[np.ndarray] = [read_audio(recording.audio, sampling_rate, READ_AHEAD)]
            except TooLongError:
                blocks = read_blocks(recording.audio, sampling_rate)
            try:
                audio = BytesIO(recording.audio) if isinstance(recording.audio, bytes) else recording.audio
                rate = soundfile.info(audio).samplerate
            except soundfile.SoundFileError:  # what ffmpeg has read
                rate = sampling_rate
        except AudioError as error:
            return (), 0, str(error)
        return blocks, rate, ""

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, ThreadPoolExecutor() as pool, tqdm(unit=" recordings", disable=None) as bar:
        while some := list(islice(recordings, 64)):
            for recording, (blocks, rate, reason) in zip(some, pool.map(read, some), strict=True):
                bar.update()
                if limit is not None and len(names) == limit:
                    break
                start, loud = file.tell(), False
                try:
                    for block in blocks:
                        file.write(block.astype(np.float32).tobytes())
                        loud = loud or np.abs(block).max(initial=0) >= 1e-4
                except AudioError as error:
                    reason = str(error)
                if reason or not loud:
                    rejects.append((recording.name, reason or "is silent"))
                    file.seek(start)
                    file.truncate()
                else:
                    lengths.append((file.tell() - start) // 4)
                    names.append(recording.name)
                    rates[rate] += 1
            if limit is not None and len(names) == limit:
                break
    if rejects:
        tqdm.write(
            f"{len(rejects)} recordings are left out, the first one {printable(rejects[0][0])}: {rejects[0][1]}"
        )
    if set(rates) - {sampling_rate}:
        found = ", ".join(f"{count} of {rate} Hz" for rate, count in sorted(rates.items()))
        tqdm.write(f"recordings are resampled to {sampling_rate} Hz: {found}")
    if not names:
        raise UserError(f"None of {len(rejects)} recordings can be used; {rejects[0][0]} {rejects[0][1]}."
                        if rejects else "There are no recordings to train on.")  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps({"lengths": lengths, "names": names}))


def open_recordings(path: Path) -> Recordings:
    """What `gather` has written."""
    index = json.loads(path.with_suffix(".json").read_text())
    return Recordings(np.memmap(path, np.float32, "r"), np.cumsum(index["lengths"]), index["names"])


def hold_out(recordings: list[Recording], fraction: float) -> tuple[list[Recording], list[Recording]]:
    """Whole recordings for training and for validation; which is which follows from their names alone."""
    order = sorted(range(len(recordings)), key=lambda i: derive_seed("held out", recordings[i].name))
    held = set(order[: min(max(1, round(fraction * len(recordings))), len(recordings) - 1)])
    return (
        [recording for i, recording in enumerate(recordings) if i not in held],
        [recording for i, recording in enumerate(recordings) if i in held],
    )


def find_sources(args) -> tuple[Iterable[Recording], Iterable[Recording] | None]:
    """The recordings to train on, and those that are held out: of a folder a fraction, of a dataset a split."""
    validate = args.validation_steps > 0
    if args.input_dir is not None:
        recordings = list(AudioFolder(args.input_dir))
        if not validate:
            return recordings, None
        if len(recordings) < 2:
            raise UserError(f"{args.input_dir} has one recording, of which none can be held out: add some, or give"
                            " --validation_steps 0.")  # fmt: skip
        return hold_out(recordings, args.validation_fraction)

    def column(split: str) -> AudioColumn:
        rows = load_split(args.dataset_name, split, args.streaming, args.dataset_config_name)
        if args.streaming and split == args.train_split:
            rows = rows.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        return AudioColumn(rows, args.audio_column)

    try:
        return column(args.train_split), column(args.validation_split) if validate else None
    except UserError as error:
        hint = " (--validation_steps 0 does without validation.)" if args.validation_split in str(error) else ""
        raise UserError(f"{error}{hint}") from None


def open_audio(args, accelerator, sampling_rate: int, size: int) -> tuple[TrainingData, Recordings | None]:
    """Crops of `size` samples of the recordings that the flags name, and the held-out recordings themselves."""
    folder = Path(args.output_dir, ".audio")
    if accelerator.is_main_process:
        train, held_out = find_sources(args)
        gather(train, sampling_rate, folder / "train.f32", args.max_train_samples)
        if held_out is not None:
            gather(held_out, sampling_rate, folder / "validation.f32", args.max_validation_samples)
    accelerator.wait_for_everyone()
    train = open_recordings(folder / "train.f32")
    held_out = open_recordings(folder / "validation.f32") if args.validation_steps else None
    return (
        TrainingData(
            train=EndlessRows(Crops(train, size), ReadCrops(train, size, args.seed), args.seed),
            validation=None if held_out is None else Crops(held_out, len(held_out.samples)),  # a row each
            read=ReadCrops(held_out or train, size, None),
            sample_shape=(1, 1, size),
        ),
        held_out,
    )
