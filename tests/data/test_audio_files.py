"""Reading recordings, against soundfile, librosa, soxr and ffmpeg."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr

from tonefield.data.audio_files import UNKNOWN_LENGTH, AudioError, read_audio, read_blocks, read_unchanged
from tonefield.data.synthetic import synthesize


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stereo() -> np.ndarray:
    """Ten seconds at 44.1 kHz, more than one block; the channels differ."""
    return np.stack([synthesize("plucks", 10, 44100), 0.3 * synthesize("drums", 10, 44100)], axis=1)


# ----- what is read


@pytest.mark.parametrize("extension, subtype", [
    ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("mp3", None),
])  # fmt: skip
def test_formats(tmp_path, stereo, extension, subtype):
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, stereo, 44100, subtype=subtype)
    ours = read_audio(path, 44100)
    expected = soundfile.read(path, dtype="float64")[0].mean(1)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-7)
    np.testing.assert_array_equal(ours, librosa.load(path, sr=None)[0])
    np.testing.assert_array_equal(ours, read_audio(path.read_bytes(), 44100))
    sound, rate = read_unchanged(path)
    assert rate == 44100
    np.testing.assert_array_equal(ours, sound)
    # A lossy file begins and ends a little earlier or later, but it is the same sound.
    assert np.corrcoef(ours[4410:-4410], stereo.mean(1)[4410 : len(ours) - 4410])[0, 1] > 0.99


def test_flac_without_a_length(tmp_path, stereo):
    """As an encoder writes it to a pipe: it is read to its end, and is not whole where it ends amid a frame."""
    path = tmp_path / "sound.flac"
    soundfile.write(path, stereo, 44100)
    whole, data = read_audio(path, 22050), bytearray(path.read_bytes())
    data[21] &= 0xF0  # of the STREAMINFO, 36 bits: the number of samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert soundfile.info(path).frames == UNKNOWN_LENGTH
    for source in path, bytes(data):
        np.testing.assert_array_equal(read_audio(source, 22050), whole)
    with pytest.raises(AudioError, match=r"^cannot be read as audio \(.*flac decoder lost sync\)$"):
        read_audio(bytes(data[: len(data) // 2]), 22050)


def test_float_samples_beyond_full_scale_are_kept(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, 3.0, -7.25]), 8000, subtype="FLOAT")
    assert read_audio(tmp_path / "loud.wav", 8000).tolist() == [0.5, 3.0, -7.25]


@pytest.mark.parametrize("rate, wanted", [(44100, 22050), (8000, 16000), (48000, 22050)])
def test_resampling_block_by_block_is_resampling_at_once(tmp_path, stereo, rate, wanted):
    path = tmp_path / "sound.wav"
    soundfile.write(path, stereo, rate, subtype="FLOAT")
    blocks = list(read_blocks(path, wanted))
    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate(blocks), soxr.resample(stereo.mean(1), rate, wanted, quality="HQ"))


@pytest.mark.parametrize("rate, wanted", [(44100, 22050), (8000, 16000), (44100, 48000)])
def test_a_resampled_sine_is_a_sine(tmp_path, rate, wanted):
    sines = [0.9 * np.sin(2 * np.pi * 1000 * np.arange(12 * r) / r) for r in (rate, wanted)]
    soundfile.write(tmp_path / "sine.wav", sines[0], rate, subtype="FLOAT")
    inner = slice(wanted // 10, -wanted // 10)
    error = read_audio(tmp_path / "sine.wav", wanted)[inner] - sines[1][inner]
    assert 10 * np.log10((sines[1][inner] ** 2).mean() / (error**2).mean()) > 100


# ----- files that are not what they should be


@pytest.mark.parametrize("extension", ["wav", "ogg", "mp3"])
def test_the_sound_of_a_truncated_file_ends_where_the_file_ends(tmp_path, stereo, extension):
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, stereo, 44100)
    whole = read_audio(path, 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    part = read_audio(path, 44100)
    assert 0.5 < len(part) / len(whole) < 0.9
    inner = len(part) - 4410  # the last frame of a codec may be damaged
    np.testing.assert_allclose(part[:inner], whole[:inner], atol=1e-4)


def test_a_truncated_flac_is_refused(tmp_path, stereo):
    path = tmp_path / "sound.flac"
    soundfile.write(path, stereo, 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"^cannot be read as audio \(.*flac decoder lost sync\)$"):
        read_audio(path, 44100)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("content", [b"", b"no sound at all " * 1000, bytes(10000)], ids=["empty", "text", "zeros"])
def test_what_is_no_audio_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for source in tmp_path / name, content:
        with pytest.raises(AudioError, match=r"^cannot be read as audio \(Format not recognised\)$"):
            read_audio(source, 8000)


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 8000)
    for rate in 8000, 16000:
        with pytest.raises(AudioError, match=r"^holds no samples$"):
            read_audio(tmp_path / "a.wav", rate)
    with pytest.raises(AudioError, match=r"^holds no samples$"):
        read_unchanged(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", np.zeros(1), 44100)  # of which nothing is left at 8 kHz
    assert len(read_unchanged(tmp_path / "a.wav")[0]) == 1
    with pytest.raises(AudioError, match=r"^holds no samples$"):
        read_audio(tmp_path / "a.wav", 8000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    samples = np.zeros(80 * 8000)
    samples[70 * 8000] = value
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"^holds a sample that is not a finite number at 70.000 s$"):
        read_audio(tmp_path / "a.wav", 8000)
    with pytest.raises(AudioError, match=r"finite number at (69.9\d|70.00)\d s$"):
        read_audio(tmp_path / "a.wav", 16000)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(AudioError, match=r"^cannot be opened \(No such file or directory\)$"):
        read_audio(tmp_path / "missing.wav", 8000)
    path = tmp_path / "secret.wav"
    soundfile.write(path, np.zeros(100), 8000)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(AudioError, match=r"^cannot be opened \(Permission denied\)$"):
        read_audio(path, 8000)


# ----- ffmpeg

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg")


def convert(source: Path, target: Path, *options: str) -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-i", source, *options, target], check=True)
    return target


@needs_ffmpeg
@pytest.mark.parametrize("rate", [44100, 22050])
def test_ffmpeg_reads_the_same_samples(tmp_path, stereo, rate):
    soundfile.write(tmp_path / "sound.wav", stereo, 44100)
    lossless = convert(tmp_path / "sound.wav", tmp_path / "sound.m4a", "-c:a", "alac")
    np.testing.assert_array_equal(read_audio(lossless, rate), read_audio(tmp_path / "sound.wav", rate))
    assert read_unchanged(lossless)[1] == 44100


@needs_ffmpeg
def test_ffmpeg_keeps_level_and_time_of_a_lossy_file(tmp_path, stereo):
    soundfile.write(tmp_path / "sound.wav", stereo, 44100)
    expected = read_audio(tmp_path / "sound.wav", 44100)
    ours = read_audio(convert(tmp_path / "sound.wav", tmp_path / "sound.m4a", "-b:a", "256k"), 44100)[: len(expected)]
    assert np.corrcoef(ours, expected)[0, 1] > 0.99
    assert abs(10 * np.log10((ours**2).mean() / (expected**2).mean())) < 0.2


@needs_ffmpeg
def test_ffmpeg_says_what_is_wrong(tmp_path):
    (tmp_path / "a.m4a").write_bytes(b"no sound at all " * 1000)
    with pytest.raises(AudioError, match=r"^cannot be read by ffmpeg \(.*Invalid data found"):
        read_audio(tmp_path / "a.m4a", 8000)


def test_without_ffmpeg(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match=r"^.m4a files need ffmpeg, which is not installed$"):
        read_audio(tmp_path / "a.m4a", 8000)


def test_any_number_of_messages_from_ffmpeg(tmp_path):
    """A damaged recording makes it say more than fits into a pipe."""
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nyes 'one of many' | head -n 100000 >&2\nexit 3\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    code = (
        "from pathlib import Path; from tonefield.data.audio_files import read_audio; read_audio(Path('a.m4a'), 8000)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert "cannot be read by ffmpeg (one of many)" in result.stderr
