"""Datasets of tokens as a trainer reads them: random crops within a recording, windows of all that is held out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from huggingface_hub import snapshot_download

from tonefield.command_line import UserError
from tonefield.data.loading import CODEC_FOLDER, read_record
from tonefield.data.token_converter import FORMAT
from tonefield.hub import hub_errors, hub_reason
from tonefield.models import load_audio_tokenizer
from tonefield.models.token_layouts import apply_layout, token_places
from tonefield.training.data import EndlessRows, EndlessStream, find_classes, labels_of, open_split
from tonefield.training.randomness import make_generators, uniform


USUAL_LENGTH = 1024  # frames, when the flags do not say and the recordings are longer


@dataclass(frozen=True)
class ReadTokens:
    """
    Rows as tokens in a layout, with a mask where some are padding, labels (-1 where a row has none) and the words of
    captions.

    Args:
        num_frames: The longest sequence. Of longer rows a part is taken: where it begins belongs to the position.
        words: Turns captions into a dictionary of tensors.
    """

    num_frames: int
    codebook_size: int
    layout: str = "parallel"
    class_column: str | None = None
    caption_column: str | None = None
    words: Callable[[list[str | None]], dict] | None = None
    seed: int = 0

    def __call__(self, columns: dict, positions: list[int]) -> dict:
        rows = [np.asarray(codes) for codes in columns["codes"]]
        places = uniform(len(rows), make_generators(self.seed, "crop", positions)).tolist()
        spare = [max(0, row.shape[1] - self.num_frames) for row in rows]
        starts = [int(place * (more + 1)) for place, more in zip(places, spare, strict=True)]
        return self.batch(rows, starts, columns, positions)

    def batch(self, rows: list[np.ndarray], starts: list[int], columns: dict, positions: list[int]) -> dict:
        """The frames from `starts` on of some rows."""
        rows = [row[:, start : start + self.num_frames] for row, start in zip(rows, starts, strict=True)]
        for row in rows:
            check_codes(int(row.min()), int(row.max()), self.codebook_size)
        lengths = [row.shape[1] for row in rows]
        # In a layout that puts codebooks one after the other all sequences have the same places.
        longest = max(lengths) if self.layout == "parallel" else self.num_frames
        codes = np.zeros((len(rows), len(rows[0]), longest), np.int64)
        for padded, row in zip(codes, rows, strict=True):
            padded[:, : row.shape[1]] = row
        tokens = apply_layout(torch.from_numpy(codes), self.layout, self.codebook_size)
        batch = {"positions": positions, "places": torch.tensor(positions), "tokens": tokens}
        if min(lengths) < longest:
            frames = torch.arange(longest)
            if self.layout != "parallel":
                frames = token_places(self.layout, len(rows[0]), longest)[0]
            batch["mask"] = frames < torch.tensor(lengths)[:, None]
        if self.words is not None:
            batch |= self.words([columns[self.caption_column][index] for index in range(len(rows))])
        return batch | labels_of(columns, self.class_column)


def check_codes(low: int, high: int, codebook_size: int) -> None:
    if low < 0 or high >= codebook_size:
        wrong = low if low < 0 else high
        mask = ", the mask," if wrong == codebook_size else ""
        raise UserError(
            f"The dataset has a code {wrong}{mask} which its codec does not have: they lie in 0..{codebook_size - 1}."
            " Make it again with audio_to_tokens.py."
        )


@dataclass
class TokenData:
    """What a trainer needs to know of a dataset of tokens."""

    train: EndlessRows | EndlessStream
    validation: "datasets.Dataset | None"  # at most --max_validation_samples rows
    read: ReadTokens
    codec: Any
    num_frames: int
    mean_frames: float  # of what is trained on
    class_names: list[str] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)  # row and first frame of all that is held out

    def describe(self) -> dict:
        """What a resumed run must find unchanged."""
        return {
            "codec": f"{type(self.codec).__name__} {self.codec.fingerprint()}",
            "sequence length": self.num_frames,
            "classes": self.class_names,
        }

    def captions(self, count: int) -> list[str] | None:
        """Texts of what is held out, if the network is told any."""
        if self.read.caption_column is None or self.validation is None:
            return None
        texts = [str(text) for text in self.validation[self.read.caption_column] if text]
        return [texts[index % len(texts)] for index in range(count)] if texts else None

    def validation_batches(self, size: int, process: int = 0, num_processes: int = 1) -> Iterator[dict]:
        """The held-out windows of one process, batch by batch; positions are the numbers of the windows."""
        if self.validation is None:
            return
        mine = list(range(process, len(self.windows), num_processes))
        for start in range(0, len(mine), size):
            positions = mine[start : start + size]
            rows, starts = zip(*(self.windows[position] for position in positions), strict=True)
            columns = self.validation[list(rows)]
            yield self.read.batch([np.asarray(codes) for codes in columns["codes"]], list(starts), columns, positions)


def open_tokens(args, layout: str = "parallel", words: Callable | None = None) -> TokenData:
    """The dataset that the flags name, with its codec; whatever cannot be trained on is refused here."""
    rows = open_split(args, args.train_split)
    features = rows.features or {}
    record = read_record(rows.features, "audio_to_tokens.py")
    if record["format"] != FORMAT:
        raise UserError(
            f"{args.dataset_name} holds no tokens: the record of its front end is {record['format']}. Make tokens with"
            " audio_to_tokens.py."
        )
    codec = open_dataset_codec(args.dataset_name, record["codec"])
    class_column, class_names = find_classes(args, features)
    caption_column = args.caption_column if words is not None else None
    if caption_column is not None and caption_column not in features:
        raise UserError(
            f"--caption_column: {args.dataset_name} has no column {caption_column!r}; it has {', '.join(features)}."
        )
    columns = ["codes", "num_samples", *(name for name in (class_column, caption_column) if name)]
    rows = rows.select_columns(columns)
    if args.max_train_samples is not None:
        few = args.max_train_samples
        rows = rows.take(few) if args.streaming else rows.select(range(min(few, len(rows))))
    validation = open_held_out(args, columns)

    hop = codec.hop_length
    if args.streaming:  # what is not known without reading it all is taken from the record
        statistics = record["statistics"]
        frames = np.array([statistics["frames"] / statistics["recordings"]])
        longest = None
    else:
        frames = check_rows(args.dataset_name, rows, codec.codebook_size, hop)
        longest = int(frames.max())
    num_frames = sequence_length(args, longest)
    read = ReadTokens(num_frames, codec.codebook_size, layout, class_column, caption_column, words, args.seed)
    windows = []
    if validation is not None:
        held_out = check_rows(args.dataset_name, validation, codec.codebook_size, hop)
        windows = [(row, start) for row, count in enumerate(held_out) for start in range(0, int(count), num_frames)]
        validation = validation.with_format("numpy")
    if args.streaming:
        train = EndlessStream(rows, read, args.seed, args.shuffle_buffer, args.max_train_samples is None)
    else:
        train = EndlessRows(rows.with_format("numpy"), read, args.seed)
    mean_frames = float(np.minimum(frames, num_frames).mean())
    return TokenData(train, validation, read, codec, num_frames, mean_frames, class_names, windows)


def open_held_out(args, columns: list[str]):
    """The held-out rows, all of them unless the flags want fewer; streamed ones are read into memory."""
    if not args.validation_steps:
        return None
    try:
        rows = open_split(args, args.validation_split)
    except UserError as error:
        raise UserError(f"{error} (--validation_steps 0 does without validation.)") from None
    rows, most = rows.select_columns(columns), args.max_validation_samples
    if args.streaming:
        rows = datasets.Dataset.from_list(list(rows if most is None else rows.take(most)), features=rows.features)
    return rows if most is None else rows.select(range(min(most, len(rows))))


def check_rows(name: str, rows: datasets.Dataset, codebook_size: int, hop: int) -> np.ndarray:
    """The frames of every row, after a look at every code."""
    if len(rows) == 0:
        raise UserError(f"A split of {name} has no rows.")
    counts, low, high = [], 0, 0
    table: Any  # of Arrow
    for table in rows.with_format("arrow").iter(1000):
        counts.append(-(-table["num_samples"].to_numpy() // hop))
        bounds = pc.min_max(pc.list_flatten(pc.list_flatten(table["codes"]))).as_py()
        low, high = min(low, bounds["min"] or 0), max(high, bounds["max"] or 0)
    check_codes(low, high, codebook_size)
    frames = np.concatenate(counts)
    if frames.min() < 1:
        raise UserError(f"Row {int(frames.argmin())} of {name} has no frames: make it again with audio_to_tokens.py.")
    return frames


def sequence_length(args, longest: int | None) -> int:
    """The frames of a sequence: those of --seq_length, or of the longest recording up to `USUAL_LENGTH`."""
    if args.seq_length is None:
        return min(longest or USUAL_LENGTH, USUAL_LENGTH)
    if longest is not None and args.seq_length > longest:
        raise UserError(
            f"--seq_length {args.seq_length} is longer than any recording of {args.dataset_name}: the longest has"
            f" {longest} frames."
        )
    return args.seq_length


def open_dataset_codec(name: str, record: dict):
    """The codec that lies within a dataset, here or on the Hub; another one than its record tells of is refused."""
    folder = Path(name, CODEC_FOLDER)
    try:
        if not Path(name).exists():
            patterns = f"{CODEC_FOLDER}/*"
            folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns), CODEC_FOLDER)
        codec = load_audio_tokenizer(folder)
    except hub_errors() as error:
        raise UserError(f"The codec of {name} cannot be loaded from {folder}: {hub_reason(error)}") from None
    if codec.fingerprint() != record["fingerprint"]:
        raise UserError(
            f"The codec in {folder} is {type(codec).__name__} {codec.fingerprint()}, the tokens of {name} were made by"
            f" {record['class']} {record['fingerprint']}: put that one back, or make the dataset again."
        )
    return codec.eval()
