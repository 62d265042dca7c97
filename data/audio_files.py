"""Reading recordings: any format libsndfile or ffmpeg knows, in blocks, mixed to mono and resampled."""

import io
import itertools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr


SOUNDFILE_EXTENSIONS = {
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".caf",
    ".w64",
}
FFMPEG_EXTENSIONS = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka"}

_BLOCK_SAMPLES = 2**18  # about six seconds at 44.1 kHz: large enough to be quick, small enough for any memory


class AudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


def read_blocks(source: Path | bytes, sample_rate: int) -> Iterator[np.ndarray]:
    """The mono float32 samples of a recording at `sample_rate`, block by block.

    Channels are averaged; other rates are resampled by soxr at high quality. `source` is a path, or the bytes of one.
    """
    if isinstance(source, Path) and source.suffix.lower() in FFMPEG_EXTENSIONS:
        blocks = _ffmpeg_blocks(source, sample_rate)
    else:
        blocks = _soundfile_blocks(source, sample_rate)
    samples = 0
    for block in blocks:
        if not np.isfinite(block).all():
            at = (samples + int(np.flatnonzero(~np.isfinite(block))[0])) / sample_rate
            raise AudioError(f"holds a sample that is not a finite number at {at:.3f} s")
        samples += len(block)
        yield block
    if samples == 0:
        raise AudioError("holds no samples")


def read_audio(source: Path | bytes, sample_rate: int) -> np.ndarray:
    """A whole recording as mono float32 samples at `sample_rate`."""
    return np.concatenate(list(read_blocks(source, sample_rate)))


def _soundfile_blocks(source: Path | bytes, sample_rate: int) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            # Not `file.blocks`: where a file is shorter than its header says, that fills up with what it read before.
            reads = (file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True) for _ in itertools.count())
            yield from _mix_and_resample(itertools.takewhile(len, reads), file.samplerate, sample_rate)
    except soundfile.SoundFileError as error:
        if isinstance(source, Path):
            _check_readable(source)
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        if "does not exist" in reason:  # what libsndfile says of an mp3 without any frame
            reason = "Format not recognised"
        raise AudioError(f"cannot be read as audio ({reason})") from None


def _check_readable(path: Path) -> None:
    """Says why a file cannot be opened, which libsndfile does not."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise AudioError(f"cannot be opened ({error.strerror or error})") from None


def _ffmpeg_blocks(path: Path, sample_rate: int) -> Iterator[np.ndarray]:
    if shutil.which("ffmpeg") is None:
        raise AudioError(f"{path.suffix} files need ffmpeg, which is not installed")
    # An AU stream tells rate and channels in its header and needs no length, so it can be read from a pipe.
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-vn", "-c:a", "pcm_f32be", "-f", "au", "-"]
    with (
        tempfile.TemporaryFile() as messages,  # not a pipe, which would be full at some point of a long bad recording
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        header = process.stdout.read(24)
        if len(header) == 24:
            offset, _, _, rate, channels = struct.unpack(">4x5I", header)
            process.stdout.read(offset - 24)
            frames = iter(partial(process.stdout.read, 4 * channels * _BLOCK_SAMPLES), b"")
            blocks = (np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, channels) for data in frames)
            yield from _mix_and_resample(blocks, rate, sample_rate)
        process.wait()
        messages.seek(0)
        reason = messages.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise AudioError(f"cannot be read by ffmpeg ({reason[-1] if reason else process.returncode})")


def _mix_and_resample(blocks: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks of shape (samples, channels) at `rate` to mono at `sample_rate`."""
    resample = (
        soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ") if rate != sample_rate else None
    )
    for block in blocks:
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(1)
        yield mono if resample is None else resample.resample_chunk(mono)
    if resample is not None:
        yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
