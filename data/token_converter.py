"""Recordings to rows of codes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value

from tonefield.data.audio_files import AudioError, read_blocks
from tonefield.data.audio_folder import Recording
from tonefield.data.dataset_builder import Part, join_features, table_of
from tonefield.data.loading import RECORD_COLUMN, record_feature
from tonefield.data.loudness import loudness_gain


FORMAT = "tonefield-tokens"

CONTEXT_SECONDS = 2  # what is encoded around a piece of a long recording, so that its codes are those of the whole
WAITING_SAMPLES = 2**23  # read before they are encoded, so that pieces of like lengths can be put together


@dataclass
class _Row:
    """A recording on its way to a row: its pieces are encoded in any order."""

    recording: Recording
    gain: float
    samples: int = 0
    peak: float = 0.0
    pieces: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass
class _Window:
    """A piece of a recording with what surrounds it, of which the frames from `first` to `last` are wanted."""

    row: _Row
    number: int
    samples: np.ndarray
    first: int
    last: int | None


class TokenConverter:
    """
    Args:
        codec: An audio tokenizer, on the device that is to encode.
        columns: The columns that come along with each recording.
        silence_db: Recordings whose peak is below this level, in dB of full scale, are skipped.
        loudness: What to bring each recording to, in LUFS, as far as its peaks allow; `None` leaves it as it is.
        batch_size: How many recordings, or pieces of them, to encode at a time.
        chunk_seconds: Longer recordings are encoded in pieces of this length.
    """

    def __init__(
        self, codec, columns: Features, silence_db: float, loudness: float | None, batch_size: int,
        chunk_seconds: float,
    ):  # fmt: skip
        self.codec, self.batch_size, self.loudness = codec, batch_size, loudness
        self.silence = 10 ** (silence_db / 20)
        frame_rate = codec.sampling_rate / codec.hop_length
        self.chunk = max(1, round(chunk_seconds * frame_rate)) * codec.hop_length
        self.context = min(self.chunk, math.ceil(CONTEXT_SECONDS * frame_rate) * codec.hop_length)
        self.codec_record = codec_record(codec)
        self.dtype = np.dtype("uint16" if codec.codebook_size <= 2**16 else "int32")
        own: dict = {
            "codes": List(List(Value(self.dtype.name))),
            "num_samples": Value("int64"),
            "audio_path": Value("string"),
            RECORD_COLUMN: record_feature({}),
        }
        if loudness is not None:
            own["gain_db"] = Value("float32")
        self.columns = list(columns)
        self.features = join_features(own, columns)

    def convert(self, part: Part) -> Iterator[pa.Table]:
        """One table for all rows of a part: they are small."""
        rows: list[_Row] = []
        waiting: list[_Window] = []
        for recording in part.recordings:
            if len(rows) == part.wanted(len(part.recordings)):
                break
            try:
                if recording.audio is None:
                    raise AudioError("has neither a file nor data")
                row = _Row(recording, loudness_gain(recording.audio, self.codec.sampling_rate, self.loudness))
                for window in self._windows(row, part):
                    waiting.append(window)
                    if sum(len(each.samples) for each in waiting) >= WAITING_SAMPLES:
                        self._encode(waiting)
                        waiting = []
            except AudioError as error:
                part.reject(recording, str(error))
                waiting = [window for window in waiting if window.row.recording is not recording]
                continue
            if row.peak < self.silence:
                part.skipped += 1
                waiting = [window for window in waiting if window.row is not row]
            else:
                rows.append(row)
        self._encode(waiting)
        if rows:
            yield self._table(rows, part)

    def _windows(self, row: _Row, part: Part) -> Iterator[_Window]:
        """A recording in pieces that overlap by their contexts; a short one whole."""
        assert row.recording.audio is not None
        rate, hop, chunk, context = self.codec.sampling_rate, self.codec.hop_length, self.chunk, self.context
        pending, before, number = np.zeros(0, np.float32), 0, 0
        for block in read_blocks(row.recording.audio, rate):
            part.heard(len(block) / rate)
            block = block if row.gain == 1 else block * np.float32(row.gain)
            row.samples += len(block)
            row.peak = max(row.peak, float(np.abs(block).max(initial=0.0)))
            pending = np.concatenate([pending, block]) if len(pending) else block
            while len(pending) > before + chunk + context:
                yield _Window(row, number, pending[: before + chunk + context], before // hop, (before + chunk) // hop)
                pending = pending[before + chunk - context :]
                before, number = context, number + 1
        yield _Window(row, number, pending, before // hop, None)

    def _encode(self, windows: list[_Window]) -> None:
        """Encodes windows in batches of like lengths and gives each row its pieces."""
        windows = sorted(windows, key=lambda window: len(window.samples))
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            lengths = [len(window.samples) for window in batch]
            padded = np.zeros((len(batch), lengths[-1]), np.float32)
            for line, window in zip(padded, batch, strict=True):
                line[: len(window.samples)] = window.samples
            waveform = torch.from_numpy(padded).to(self.codec.device)
            codes = self.codec.encode(waveform, self.codec.sampling_rate, lengths).cpu().numpy().astype(self.dtype)
            for each, window, length in zip(codes, batch, lengths, strict=True):
                whole = each[:, : self.codec.num_frames(length)]
                window.row.pieces[window.number] = whole[:, window.first : window.last]

    def _table(self, rows: list[_Row], part: Part) -> pa.Table:
        codes = [np.concatenate([row.pieces[n] for n in range(len(row.pieces))], axis=1) for row in rows]
        samples = [row.samples for row in rows]
        part.add(recordings=len(rows), samples=sum(samples), frames=sum(each.shape[1] for each in codes))
        columns: dict = {
            "codes": [list(each) for each in codes],
            "num_samples": samples,
            "audio_path": [row.recording.name for row in rows],
            RECORD_COLUMN: [0] * len(rows),
        }
        if "gain_db" in self.features:
            columns["gain_db"] = [20 * math.log10(row.gain) for row in rows]
        columns |= {name: [row.recording.columns[name] for row in rows] for name in self.columns}
        return table_of(columns, self.features)

    def record(self, sums: dict[str, float]) -> dict:
        """What a dataset says of itself: the codec that made it, and how much there is to train on."""
        statistics = {name: int(sums[name]) for name in ("recordings", "samples", "frames")}
        return {"format": FORMAT, "version": 1, "codec": self.codec_record, "statistics": statistics}


def codec_record(codec) -> dict:
    """What identifies an audio tokenizer, and what a reader of its codes must know."""
    return {
        "class": type(codec).__name__,
        "config": {name: value for name, value in codec.config.items() if not name.startswith("_")},
        "fingerprint": codec.fingerprint(),
        "sampling_rate": codec.sampling_rate,
        "hop_length": codec.hop_length,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
    }
