"""Reading recordings: any format libsndfile or ffmpeg knows, in blocks, mixed to mono and resampled."""

import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr


SOUNDFILE_EXTENSIONS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
FFMPEG_EXTENSIONS = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka"}

_BLOCK_SAMPLES = 2**18  # about six seconds at 44.1 kHz: large enough to be quick, small enough for any memory


class AudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


def read_blocks(source: Path | bytes, sample_rate: int) -> Iterator[np.ndarray]:
    """The mono float32 samples of a recording at `sample_rate`, block by block.

    Channels are averaged; other rates are resampled by soxr at high quality. `source` is a path or the bytes of a file.
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
            resample = None
            if file.samplerate != sample_rate:
                resample = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
            for block in file.blocks(_BLOCK_SAMPLES, dtype="float32", always_2d=True):
                mono = block.mean(1)
                yield mono if resample is None else resample.resample_chunk(mono)
            if resample is not None:
                yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(f"cannot be read as audio ({reason})") from None
    except OSError as error:
        raise AudioError(f"cannot be opened ({error.strerror or error})") from None


def _ffmpeg_blocks(path: Path, sample_rate: int) -> Iterator[np.ndarray]:
    if shutil.which("ffmpeg") is None:
        raise AudioError(f"{path.suffix} files need ffmpeg, which is not installed")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-vn", "-ac", "1", "-ar", str(sample_rate)]
    with subprocess.Popen([*command, "-f", "f32le", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while data := process.stdout.read(4 * _BLOCK_SAMPLES):
            yield np.frombuffer(data, np.float32)
        reason = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise AudioError(f"cannot be read by ffmpeg ({reason[-1] if reason else process.returncode})")
