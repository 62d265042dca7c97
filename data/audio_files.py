"""Reading recordings: any format libsndfile or ffmpeg knows, in blocks, mixed to mono and resampled."""

import io
import itertools
import shutil
import stat
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
# What ffmpeg may take a file for, whatever its name. Of others, playlists say, it would open what they name.
FFMPEG_FORMATS = "mov,mp4,matroska,webm,aac,asf,mp3,ogg,flac,wav"

_BLOCK_SAMPLES = 2**18  # of all channels, six seconds at 44.1 kHz: enough to be quick, small enough for any memory
RATES = (1000, 1_000_000)  # in Hz. A header beyond is damaged, and resampling would make gigabytes of a few bytes.
LOUDEST = 2.0**32  # beyond, what is computed of a spectrum is no number any more; 32-bit integers as floats are below
UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile says of a length that it does not know
LONGEST = 2**28  # samples that are read as a whole, 1 GiB: a few kilobytes can hold days of silence


NOT_A_FILE = "is not a file, but a pipe or a device"


class AudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


class TooLongError(AudioError):
    """A recording that can only be read block by block."""


def read_blocks(source: Path | bytes, sample_rate: int) -> Iterator[np.ndarray]:
    """The mono float32 samples of a recording at `sample_rate`, block by block.

    Channels are averaged; other rates are resampled by soxr at high quality. `source` is a path, or the bytes of one.
    """
    resample, samples = None, 0
    for block, rate in _blocks(source):
        if rate != sample_rate:
            resample = resample or soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
            block = resample.resample_chunk(block)
        samples += len(block)
        yield block
    if resample is not None:
        last = resample.resample_chunk(np.zeros(0, np.float32), last=True)
        samples += len(last)
        yield last
    if samples == 0:
        raise AudioError("holds no samples")


def read_audio(source: Path | bytes, sample_rate: int, longest: int = LONGEST) -> np.ndarray:
    """A whole recording as mono float32 samples at `sample_rate`; one of more than `longest` samples is refused."""
    return _join(read_blocks(source, sample_rate), sample_rate, longest)


def read_unchanged(source: Path | bytes, longest: int = LONGEST) -> tuple[np.ndarray, int]:
    """The same at the rate that the recording has, and that rate."""
    blocks = _blocks(source)
    for first, rate in blocks:
        return _join(itertools.chain([first], (block for block, _ in blocks)), rate, longest), rate
    raise AudioError("holds no samples")


def _join(blocks: Iterable[np.ndarray], sample_rate: int, longest: int) -> np.ndarray:
    joined, samples = [], 0
    for block in blocks:
        samples += len(block)
        if samples > longest:
            minutes = longest / sample_rate / 60
            raise TooLongError(f"is longer than the {minutes:.0f} minutes that are read at once: cut it into pieces")
        joined.append(block)
    return np.concatenate(joined)


def is_special(path: Path) -> bool:
    """Whether a path leads to what may never end, a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there: reading it will tell
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _blocks(source: Path | bytes) -> Iterator[tuple[np.ndarray, int]]:
    """The mono samples of a recording, and their rate with each block."""
    if isinstance(source, Path) and is_special(source):
        raise AudioError(NOT_A_FILE)
    if isinstance(source, Path) and source.suffix.lower() in FFMPEG_EXTENSIONS:
        blocks = _ffmpeg_blocks(source)
    else:
        blocks = _soundfile_blocks(source)
    samples = 0
    for channels, rate in blocks:
        if not RATES[0] <= rate <= RATES[1]:
            raise AudioError(f"has a sampling rate of {rate} Hz: sound has {RATES[0]} to {RATES[1]} Hz")
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number is told of below
            block = channels[:, 0] if channels.shape[1] == 1 else channels.mean(1)
        if not np.isfinite(block).all():
            at = (samples + int(np.flatnonzero(~np.isfinite(block))[0])) / rate
            raise AudioError(f"holds a sample that is not a finite number at {at:.3f} s")
        if np.abs(block).max() > LOUDEST:
            raise AudioError(f"holds samples of up to {np.abs(block).max():.3g}, where full scale is 1")
        samples += len(block)
        yield block, rate


class _Stream(soundfile.SoundFile):
    """Reads a FLAC file whose header gives no length, as one written to a pipe, to its end without seeking."""

    def seekable(self) -> bool:
        return self.frames < UNKNOWN_LENGTH and super().seekable()


def _soundfile_blocks(source: Path | bytes) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of shape (samples, channels), and their rate."""
    try:
        with _Stream(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            # Not `file.blocks`: where a file is shorter than its header says, that fills up with what it read before.
            frames = max(1, _BLOCK_SAMPLES // file.channels)
            reads = (file.read(frames, dtype="float32", always_2d=True) for _ in itertools.count())
            yield from zip(itertools.takewhile(len, reads), itertools.repeat(file.samplerate), strict=False)
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


def _ffmpeg_blocks(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    if shutil.which("ffmpeg") is None:
        raise AudioError(f"{path.suffix} files need ffmpeg, which is not installed")
    # An AU stream tells rate and channels in its header and needs no length, so it can be read from a pipe.
    options = ["-nostdin", "-v", "error", "-format_whitelist", FFMPEG_FORMATS, "-protocol_whitelist", "file"]
    command = ["ffmpeg", *options, "-i", f"file:{path}", "-vn", "-c:a", "pcm_f32be", "-f", "au", "-"]
    with (
        tempfile.TemporaryFile() as messages,  # not a pipe, which would be full at some point of a long bad recording
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        header = process.stdout.read(24)
        if len(header) == 24:
            offset, _, _, rate, channels = struct.unpack(">4x5I", header)
            process.stdout.read(offset - 24)
            block = 4 * channels * max(1, _BLOCK_SAMPLES // channels)
            frames = iter(partial(process.stdout.read, block), b"")
            blocks = (np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, channels) for data in frames)
            yield from zip(blocks, itertools.repeat(rate), strict=False)
        process.wait()
        messages.seek(0)
        reason = messages.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise AudioError(f"cannot be read by ffmpeg ({reason[-1] if reason else process.returncode})")
