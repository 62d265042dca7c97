"""Recordings to rows of mel spectrograms."""

import io
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from datasets import Array3D, Features, Image, Value
from datasets.features.features import Array3DExtensionType

from tonefield.data.audio_files import AudioError, read_blocks
from tonefield.data.audio_folder import Recording
from tonefield.data.dataset_builder import Part, join_features, table_of
from tonefield.data.loading import RECORD_COLUMN, record_feature
from tonefield.data.loudness import loudness_gain
from tonefield.models.mel_spectrogram import MelSpectrogram


BATCH_SLICES = 64


class MelConverter:
    """
    Args:
        mel: The front end.
        columns: The columns that come along with each recording.
        pad: What becomes of the end of a recording, see [`MelSpectrogram.slice_starts`].
        silence_db: Slices whose peak is below this level, in dB of full scale, are skipped.
        loudness: What to bring each recording to, in LUFS, as far as its peaks allow; `None` leaves it as it is.
        save_images: Whether to add 8-bit pictures.
    """

    def __init__(
        self, mel: MelSpectrogram, columns: Features, pad: str, silence_db: float, loudness: float | None,
        save_images: bool,
    ):  # fmt: skip
        c = mel.config
        self.mel, self.pad, self.silence, self.loudness = mel, pad, 10 ** (silence_db / 20), loudness
        self.sample_rate, self.slice_samples = c.sample_rate, mel.slice_samples
        self.front_end_settings = {name: value for name, value in c.items() if not name.startswith("_")}
        own: dict = {
            "mel": Array3D((1, c.n_mels, c.num_frames), "float16"),
            "audio_file": Value("string"),
            "slice": Value("int32"),
            "start_sample": Value("int64"),
            "valid_frames": Value("int32"),
            RECORD_COLUMN: record_feature({}),
        }
        if loudness is not None:
            own["gain_db"] = Value("float32")
        if c.ref == "slice":
            own["ref_db"] = Value("float32")
        if save_images:
            own["image"] = Image(mode="L")
        self.columns = list(columns)
        self.features = join_features(own, columns)

    def convert(self, part: Part) -> Iterator[pa.Table]:
        """Slices are gathered across recordings and computed in batches of [`BATCH_SLICES`]."""
        rows: list[tuple] = []
        for recording in part.recordings:
            count = 0
            try:
                for row in self._slices(recording, part):
                    rows.append(row)
                    count += 1
                    if len(rows) == part.wanted(BATCH_SLICES):
                        yield self._batch(rows, part)
                        rows = []
            except AudioError as error:
                part.reject(recording, f"{error}; the {count} slices before are kept" if count else str(error))
        if rows:
            yield self._batch(rows, part)

    def _slices(self, recording: Recording, part: Part) -> Iterator[tuple]:
        """The slices of a recording that are not silent: (recording, number, start, gain, samples without padding)."""
        if recording.audio is None:
            raise AudioError("has neither a file nor data")
        rate, size = self.sample_rate, self.slice_samples
        gain = loudness_gain(recording.audio, rate, self.loudness)
        pending, start, number = np.zeros(0, np.float32), 0, 0

        def cut(waveform: np.ndarray) -> Iterator[tuple]:
            nonlocal number
            for offset in self.mel.slice_starts(len(waveform), self.pad):
                window = waveform[offset : offset + size]
                if np.abs(window).max() < self.silence:
                    part.skipped += 1
                else:
                    yield recording, number, start + offset, gain, window
                number += 1

        for block in read_blocks(recording.audio, rate):
            part.heard(len(block) / rate)
            block = block if gain == 1 else block * np.float32(gain)
            pending = np.concatenate([pending, block]) if len(pending) else block
            # Whole slices are cut as soon as they are there; one is kept back, since the last one may reach into it.
            whole = (len(pending) - 1) // size - 1
            if whole > 0:
                yield from cut(pending[: whole * size])
                pending, start = pending[whole * size :], start + whole * size
        if start == 0 and self.pad == "drop" and len(pending) < size:
            raise AudioError(
                f"is shorter than one slice ({len(pending) / rate:.2f} s, a slice is {size / rate:.2f} s; --pad pad"
                " keeps it)"
            )
        yield from cut(pending)

    def _batch(self, rows: list[tuple], part: Part) -> pa.Table:
        recordings, numbers, starts, gains, windows = zip(*rows, strict=True)
        padded = np.zeros((len(rows), self.slice_samples), np.float32)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window)] = window
        exact, reference = self.mel.encode(torch.from_numpy(padded), return_reference=True)
        stored = exact.half()
        self._count(stored.float(), part)
        columns: dict = {
            "mel": _array3d(stored.numpy()),
            "audio_file": [recording.name for recording in recordings],
            "slice": numbers,
            "start_sample": starts,
            "valid_frames": [-(-len(window) // self.mel.config.hop_length) for window in windows],
            RECORD_COLUMN: [0] * len(rows),
        }
        if "gain_db" in self.features:
            columns["gain_db"] = [20 * math.log10(gain) for gain in gains]
        if "ref_db" in self.features:
            columns["ref_db"] = reference.numpy()
        if "image" in self.features:
            columns["image"] = [{"bytes": _png(picture), "path": None} for picture in self.mel.to_image(exact)]
        columns |= {name: [recording.columns[name] for recording in recordings] for name in self.columns}
        return table_of(columns, self.features)

    def _count(self, mels: torch.Tensor, part: Part) -> None:
        squares = mels.flatten(1).square().sum(1, dtype=torch.float64)
        part.add(
            slices=len(mels), values=mels.numel(), sum=mels.sum(dtype=torch.float64).item(),
            squares=squares.sum().item(), norms=squares.sqrt().sum().item(),
            floor=(mels <= -1).sum().item(), ceiling=(mels >= 1).sum().item(),
        )  # fmt: skip

    def record(self, sums: dict[str, float]) -> dict:
        """What a dataset says of itself: the front end, and the statistics of what it is trained on."""
        mean = sums["sum"] / sums["values"]
        return {
            "format": "tonefield-mel",
            "version": 1,
            "front_end": self.front_end_settings,
            "fingerprint": self.mel.fingerprint(),
            "statistics": {
                "slices": int(sums["slices"]),
                "mean": mean,
                "std": math.sqrt(max(0.0, sums["squares"] / sums["values"] - mean**2)),
                "mean_norm": sums["norms"] / sums["slices"],
                "floor_fraction": sums["floor"] / sums["values"],
                "ceiling_fraction": sums["ceiling"] / sums["values"],
            },
        }


def _array3d(values: np.ndarray) -> pa.Array:
    """An array of shape (rows, a, b, c) as the column of an `Array3D` feature, without a copy."""
    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.ListArray.from_arrays(pa.array(np.arange(0, len(array) + 1, size, dtype=np.int32)), array)
    return pa.ExtensionArray.from_storage(Array3DExtensionType(values.shape[1:], str(values.dtype)), array)


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
