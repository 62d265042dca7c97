"""Training data as an endless sequence: the sample at position p is the same whoever asks, and whenever.

Position p lies in epoch p // n of n rows, each with an order of its own. An optimizer step takes the next positions,
and its processes and micro-batches divide them up. So a run continues exactly from the number of its step, and two
processes see what one would.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tonefield.command_line import UserError, first_line
from tonefield.data.loading import load_split, read_record
from tonefield.models.mel_spectrogram import MelSpectrogram
from tonefield.training.interruption import leave_signals_to_the_trainer
from tonefield.training.lanes import Lane, columns_of
from tonefield.training.randomness import derive_seed, make_generators, uniform


# Every trainer sees data of this spread, for which EDM's defaults are made (EDM, table 1: sigma_data).
SIGMA_DATA = 0.5

# The posterior of a mel in a dataset of latents (`training/latents.py`): scaled, hence of unit variance over all rows.
LATENT_COLUMNS = ("latents", "latents_std")


MOST_LANES = 8  # into which a process divides what it reads of a stream, hence the most workers


@dataclass(frozen=True)
class Shares:
    """Which positions each optimizer step, micro-batch and process takes."""

    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    process: int = 0

    @property
    def per_step(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    def positions(self, step: int, micro: int, process: int | None = None) -> list[int]:
        """The positions of one micro-batch of one process, this one unless told otherwise."""
        process = self.process if process is None else process
        start = step * self.per_step + (micro * self.num_processes + process) * self.batch_size
        return list(range(start, start + self.batch_size))

    def from_step(self, step: int) -> Iterator[list[int]]:
        """This process's micro-batches, from a step on, without end."""
        for later in itertools.count(step):
            for micro in range(self.accumulation):
                yield self.positions(later, micro)


class EndlessRows(Dataset):
    """
    Args:
        rows: A dataset with a length, or what else gives a dictionary of columns for a list of row numbers.
        read: Makes a dictionary of tensors from a dictionary of columns and the positions of its rows.
        seed: Decides the order.
        extra: How many more rows to read with each batch, as `charges`, from a second sequence.
    """

    def __init__(self, rows: Any, read: Callable[[dict, list[int]], dict], seed: int, extra: int = 0):
        self.rows, self.read, self.seed, self.extra = rows, read, seed, extra
        self._orders: dict[str, tuple[int, torch.Tensor]] = {}

    def row_of(self, position: int, sequence: str = "order") -> int:
        """The number of the row at a position."""
        epoch, place = divmod(position, len(self.rows))
        if sequence not in self._orders or self._orders[sequence][0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, sequence, epoch))
            self._orders[sequence] = epoch, torch.randperm(len(self.rows), generator=generator)
        return int(self._orders[sequence][1][place])

    def get(self, positions: list[int], sequence: str = "order") -> dict:
        """The samples at some positions."""
        return self.read(self.rows[[self.row_of(position, sequence) for position in positions]], positions)

    def __getitems__(self, positions: list[int]) -> dict:
        batch = self.get(positions)
        if self.extra:
            start = positions[0] // len(positions) * self.extra
            more = self.get(list(range(start, start + self.extra)), "charges")
            batch |= {"charges": more["clean"]}
            batch |= {"charge_labels": more["class_labels"]} if "class_labels" in more else {}
        return batch

    def batches(self, shares: Shares, step: int, num_workers: int = 0, resume_at: dict | None = None) -> DataLoader:
        """This process's batches from a step on; `resume_at` is for streams."""
        return DataLoader(
            self, batch_sampler=shares.from_step(step), num_workers=num_workers, collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(), generator=torch.Generator(), persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_trainer,
        )  # fmt: skip


class EndlessStream(IterableDataset):
    """
    The same for a dataset without a length, which is read shard by shard.

    Shards that can be dealt out evenly are read by one process each. Otherwise every process reads everything, and
    leaves the shares of the others. What a process reads is dealt out again, to lanes that take turns with a batch
    each: a worker reads some of the lanes, and how many workers there are changes nothing.
    """

    def __init__(
        self, rows: datasets.IterableDataset, read: Callable, seed: int, buffer_size: int, divide: bool = True
    ):  # fmt: skip
        self.rows, self.read, self.seed, self.buffer_size = rows, read, seed, buffer_size
        self.num_shards, self.extra = rows.num_shards if divide else 1, 0

    def _divide(self, shares: Shares) -> None:
        """Which shards the lanes of this process have."""
        own = self.num_shards % shares.num_processes == 0
        mine = list(range(self.num_shards))[shares.process :: shares.num_processes] if own else range(self.num_shards)
        count = largest_divisor(len(mine), MOST_LANES) if own else 1
        self.shards = [list(mine[lane::count]) if self.num_shards > 1 else None for lane in range(count)]
        self.divided = {"processes": shares.num_processes if own else 1, "shards": self.num_shards}
        owner = shares.process if own else 0
        self.seeds = [derive_seed(self.seed, "lane", owner, lane) for lane in range(count)]
        self.others = (0, 0) if own else (shares.process, shares.num_processes - 1 - shares.process)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        size, lanes = self.shares.batch_size, {}
        for batch in itertools.count(self.first + first, every):
            number = batch % len(self.shards)
            if number not in lanes:
                block = -(-self.buffer_size // len(self.shards))
                lanes[number] = Lane(
                    self.rows, self.shards[number], self.seeds[number], block, self.places[number]
                )  # fmt: skip
            lane = lanes[number]
            lane.take(self.others[0] * size)
            mine = lane.take(size)
            lane.take(self.others[1] * size)
            positions = self.shares.positions(*divmod(batch, self.shares.accumulation))
            yield self.read(columns_of(mine), positions) | {"lane": (number, lane.place)}

    def batches(
        self, shares: Shares, step: int, num_workers: int = 0, resume_at: dict | None = None
    ) -> Iterator[dict]:
        """This process's batches from a step on, each with where the next one is: what `resume_at` is."""
        self._divide(shares)
        if resume_at is not None and not (isinstance(resume_at, dict) and resume_at.keys() == {"divided", "lanes"}):
            raise UserError(
                "An earlier version of tonefield made the checkpoint, which tells a place in the stream that this one"
                " does not find again: go on without --streaming, or begin anew in another --output_dir."
            )
        if resume_at is None and step:
            raise UserError(
                "The checkpoint is of a run without --streaming, which reads rows in another order: go on without it."
            )
        if resume_at and resume_at["divided"] != self.divided:
            raise UserError(
                "The checkpoint is of a stream of {shards} shards, divided among {processes}".format(
                    **resume_at["divided"]
                )
                + " processes, this one has {shards} among {processes}: use the same number of processes.".format(
                    **self.divided
                )
            )
        self.shares, self.first = shares, step * shares.accumulation
        self.places = list(resume_at["lanes"]) if resume_at else [(0, 0, 0, 0)] * len(self.shards)
        return self._with_places(
            DataLoader(
                self, batch_size=None, num_workers=largest_divisor(len(self.shards), num_workers),
                generator=torch.Generator(), pin_memory=torch.cuda.is_available(),
                worker_init_fn=leave_signals_to_the_trainer,
            )
        )  # fmt: skip

    def _with_places(self, loader: DataLoader) -> Iterator[dict]:
        places = list(self.places)
        for batch in loader:
            lane, place = batch.pop("lane")
            places[lane] = place
            yield batch | {"resume_at": {"divided": self.divided, "lanes": list(places)}}


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`; 0 if that is 0."""
    return max((divisor for divisor in range(1, most + 1) if number % divisor == 0), default=0)


def _as_it_is(batch: Any) -> Any:
    return batch


# What a row becomes. These are classes, not closures, so that worker processes can be given them.


@dataclass(frozen=True)
class ReadMels:
    """
    Mels as the model sees them, with labels: -1 where a row has none. With the shape of latents, also the noise for
    draws from their posteriors.
    """

    mel: MelSpectrogram
    class_column: str | None = None
    latent_shape: tuple[int, int, int] | None = None
    seed: int = 0

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        mels = torch.from_numpy(np.stack([np.asarray(row, dtype=np.float32) for row in columns["mel"]]))
        batch = {"positions": positions, "clean": self.mel.standardize(mels)}
        if self.latent_shape is not None:
            batch["posterior_noise"] = posterior_noise(self.latent_shape, positions, self.seed)
        return batch | labels_of(columns, self.class_column)


@dataclass(frozen=True)
class ReadLatents:
    """Draws from the posteriors that a dataset of latents holds, with noise that belongs to the position."""

    class_column: str | None = None
    seed: int = 0

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        mean, std = (
            torch.from_numpy(np.stack([np.asarray(row, dtype=np.float32) for row in columns[name]]))
            for name in LATENT_COLUMNS
        )
        noise = posterior_noise(mean.shape[1:], positions, self.seed)
        return {"positions": positions, "clean": mean + std * noise} | labels_of(columns, self.class_column)


@dataclass(frozen=True)
class ReadPictures:
    """Pictures in [-1, 1]; flipped and dequantised with numbers that belong to the position."""

    column: str
    mode: str
    size: tuple[int, int]
    class_column: str | None = None
    random_flip: bool = False
    dequantize: bool = False
    seed: int = 0

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        arrays = [np.asarray(image.convert(self.mode), dtype=np.float32) for image in columns[self.column]]
        for array in arrays:
            if array.shape[:2] != self.size:
                raise UserError(
                    f"A picture has {array.shape[1]} x {array.shape[0]} pixels, the first one had"
                    f" {self.size[1]} x {self.size[0]}: all must have one size."
                )
        pixels = torch.from_numpy(np.stack(arrays)).reshape(len(arrays), *self.size, -1).permute(0, 3, 1, 2)
        generators = make_generators(self.seed, "picture", positions)
        if self.random_flip:
            flipped = uniform(len(pixels), generators) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        if self.dequantize:  # from 256 values to the interval that each stands for
            noise = torch.stack([torch.rand(pixels.shape[1:], generator=generator) for generator in generators])
            pixels = (pixels + noise) * (255 / 256)
        batch = {"positions": positions, "clean": pixels / 127.5 - 1}
        return batch | labels_of(columns, self.class_column)


def posterior_noise(shape: Sequence[int], positions: list[int], seed: int) -> torch.Tensor:
    """The same whether latents are read or made: it belongs to the position."""
    generators = make_generators(seed, "posterior", positions)
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def labels_of(columns: dict, name: str | None) -> dict:
    if name is None:
        return {}
    labels = [-1 if label is None or label != label else int(label) for label in columns[name]]  # NumPy has NaN
    return {"class_labels": torch.tensor(labels)}


class Data(Protocol):
    """What the training loop needs to know of a dataset."""

    train: EndlessRows | EndlessStream

    def describe(self) -> dict:
        """What a resumed run must find unchanged."""
        ...

    def validation_batches(self, size: int, process: int = 0, num_processes: int = 1) -> Iterator[dict]:
        """What one process validates with, batch by batch; its positions are those of the noise."""
        ...


@dataclass
class TrainingData:
    """What a trainer needs to know of a dataset."""

    train: EndlessRows | EndlessStream
    validation: Any  # rows like those of `EndlessRows`, or None: at most --max_validation_samples rows
    read: Callable[[dict, list[int]], dict]
    sample_shape: tuple[int, int, int]
    sigma_data: float = SIGMA_DATA
    class_names: list[str] = field(default_factory=list)
    mel: MelSpectrogram | None = None
    vae: dict = field(default_factory=dict)  # of latents: the fingerprint and configuration of their autoencoder

    def describe(self) -> dict:
        """What a resumed run must find unchanged."""
        front_end = {} if self.mel is None else {"mel configuration": self.mel.fingerprint()}
        autoencoder = {"autoencoder": self.vae["fingerprint"]} if self.vae else {}
        return front_end | autoencoder | {"sample shape": list(self.sample_shape), "classes": self.class_names}

    def validation_batches(self, size: int, process: int = 0, num_processes: int = 1) -> Iterator[dict]:
        """The held-out rows of one process, batch by batch; positions are the numbers of the rows."""
        if self.validation is not None:
            mine = list(range(process, len(self.validation), num_processes))
            for start in range(0, len(mine), size):
                yield self.read(self.validation[mine[start : start + size]], mine[start : start + size])


def open_data(args, caption_column: str | None = None) -> TrainingData:
    """The dataset that the flags name: mels or latents with their record, or pictures with --image_column."""
    rows = open_split(args, args.train_split)
    features = rows.features or {}
    pictures = args.image_column is not None
    record = {} if pictures else read_record(rows.features)
    if args.max_train_samples is not None:
        rows = (
            rows.take(args.max_train_samples)
            if args.streaming
            else rows.select(range(min(args.max_train_samples, len(rows))))
        )
    if not args.streaming and len(rows) == 0:
        raise UserError(f"The split {args.train_split!r} of {args.dataset_name} has no rows.")
    if caption_column is not None and caption_column not in features:
        raise UserError(
            f"--caption_column: {args.dataset_name} has no column {caption_column!r}; it has {', '.join(features)}."
        )
    class_column, class_names = find_classes(args, features)
    if record.get("format") == "tonefield-latents" and args.class_conditional is None:
        class_column, class_names = None, []  # what makes sound of latents is told texts, not classes
    validation = open_validation(args)

    vae, columns = {}, ["mel"]
    if pictures:
        columns = [args.image_column]
        read, sigma_data = picture_reader(args, rows, features, class_column)
        shape = (1 if read.mode == "L" else 3, *read.size)
        mel = None
    elif record["format"] == "tonefield-latents":
        vae, columns = record["vae"], list(LATENT_COLUMNS)
        mel = standardized_front_end(record["mel"])
        read, sigma_data = ReadLatents(class_column, args.seed), 1.0
        shape = tuple(features["latents"].shape)
    else:
        mel = standardized_front_end(record)
        read, sigma_data = ReadMels(mel, class_column), SIGMA_DATA
        shape = (1, mel.config.n_mels, mel.config.num_frames)
    columns += [name for name in (class_column, caption_column) if name]
    rows = rows.select_columns(columns)
    if validation is not None:
        validation = validation.select_columns(columns)
    if args.streaming:
        train = EndlessStream(rows, read, args.seed, args.shuffle_buffer, args.max_train_samples is None)
    else:
        train = EndlessRows(rows if pictures else rows.with_format("numpy"), read, args.seed)
    return TrainingData(train, validation, read, shape, sigma_data, class_names, mel, vae)


def open_split(args, split: str):
    try:
        return load_split(args.dataset_name, split, args.streaming, args.dataset_config_name)
    except IndexError:  # what the datasets library makes of an empty split on the disk
        raise UserError(f"The split {split!r} of {args.dataset_name} has no rows.") from None


def standardized_front_end(record: dict) -> MelSpectrogram:
    """The front end of a record, whose `mean` and `std` give the dataset the mean 0 and the spread `SIGMA_DATA`."""
    statistics, front_end = record.get("statistics", {}), record.get("front_end", {})
    if record.get("format") != "tonefield-mel":
        raise UserError(
            f"The dataset holds no mels: the record of its front end is {record.get('format')}. Make mels with"
            " audio_to_images.py."
        )
    try:
        if not statistics.get("std", 0) > 0:
            raise UserError(
                "The dataset's mels are all the same, silence perhaps: there is nothing to learn from them."
            )
        return MelSpectrogram(**front_end | {"mean": statistics["mean"], "std": statistics["std"] / SIGMA_DATA})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The record of the dataset's front end is damaged: {first_line(error)}") from None


def find_classes(args, features) -> tuple[str | None, list[str]]:
    """The column of classes and their names, if the network is to be told the class."""
    feature = features.get(args.class_column)
    known = isinstance(feature, datasets.ClassLabel)
    if args.class_conditional and not known:
        raise UserError(f"--class_conditional: {args.dataset_name} has no column {args.class_column!r} of classes.")
    if args.class_conditional is False or not known or (args.class_conditional is None and feature.num_classes < 2):
        return None, []
    return args.class_column, list(feature.names)


def open_validation(args):
    """The held-out rows, in memory: the first ones of the split. They are few."""
    if not args.validation_steps:
        return None
    try:
        rows = open_split(args, args.validation_split)
    except UserError as error:
        raise UserError(f"{error} (--validation_steps 0 does without validation.)") from None
    if args.image_column is None:
        read_record(rows.features)
    if args.streaming:
        rows = datasets.Dataset.from_list(list(rows.take(args.max_validation_samples)), features=rows.features)
    rows = rows.select(range(min(args.max_validation_samples, len(rows))))
    if len(rows) == 0:
        raise UserError(f"The split {args.validation_split!r} of {args.dataset_name} has no rows.")
    return rows if args.image_column is not None else rows.with_format("numpy")


def picture_reader(args, rows, features, class_column) -> tuple[ReadPictures, float]:
    """How pictures are read, and their spread, from the first 1000 of them."""
    if args.image_column not in features:
        raise UserError(
            f"--image_column: {args.dataset_name} has no column {args.image_column!r}; it has {', '.join(features)}."
        )
    first = list(itertools.islice(iter(rows), 1000))
    if not first:
        raise UserError(f"The split {args.train_split!r} of {args.dataset_name} has no rows.")
    image = first[0][args.image_column]
    if not hasattr(image, "convert"):
        raise UserError(f"--image_column: the column {args.image_column!r} does not hold pictures.")
    mode = "L" if image.mode in ("1", "L", "I", "I;16", "F", "LA") else "RGB"
    read = ReadPictures(
        args.image_column, mode, image.size[::-1], class_column, args.random_flip, args.dequantize, args.seed
    )
    columns = {name: [row[name] for row in first] for name in first[0]}
    pixels = read(columns, list(range(len(first))))["clean"].double()
    return read, max(pixels.std().item(), 1e-3)
