"""Recordings made to do harm: each is read or refused in one line, in bounded memory, and the others go on."""

import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import load_from_disk

from tonefield import MelSpectrogram
from tonefield.audio_to_images import main, parse_args
from tonefield.command_line import UserError
from tonefield.data.audio_files import AudioError, TooLongError, read_audio, read_blocks
from tonefield.data.audio_folder import AudioFolder
from tonefield.data.synthetic import synthesize
from tonefield.evaluation.sets import AudioSet
from tonefield.training.recordings import READ_AHEAD, gather, open_recordings


ROOT = Path(__file__).parents[2]
MANY = 2**24  # samples; none of the small files below may become more


def wav(channels=1, rate=8000, data=bytes(1600), claimed=None, riff=None, bits=16, kind=1) -> bytes:
    """A WAV file whose header says what it is told to say."""
    form = struct.pack("<HHIIHH", kind, channels, rate, 0, channels * bits // 8 & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"
    body += struct.pack("<I", len(data) if claimed is None else claimed) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def encoded(samples, rate=8000, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def flac(total: int | None = None, rate: int | None = None) -> bytes:
    """A FLAC file of 8000 samples. Its header has 20 bits of rate, 3 of channels, 5 of depth, 36 of samples."""
    data = bytearray(encoded(np.zeros(8000), format="flac"))
    facts = int.from_bytes(data[18:26], "big")
    facts = facts if total is None else facts >> 36 << 36 | total
    facts = facts if rate is None else facts & (1 << 44) - 1 | rate << 44
    data[18:26] = facts.to_bytes(8, "big")
    return bytes(data)


def read(data: bytes, rate: int = 22050) -> int | str:
    """How many samples there are, or why it is refused."""
    samples = 0
    try:
        for block in read_blocks(data, rate):
            samples += len(block)
            assert samples <= MANY
    except AudioError as error:
        assert "\n" not in str(error)
        return str(error)
    return samples


# ----- headers


@pytest.mark.parametrize("data, expected", [
    # What the file holds counts, not what it says to hold.
    (wav(claimed=2**31 - 1), 2205), (wav(claimed=2**32 - 1), 2205), (wav(claimed=2 * 10**9), 2205),
    (wav(riff=0), 2205), (wav(riff=1), 2205), (wav(riff=2**32 - 1), 2205),
    (wav(claimed=0), "holds no samples"),
    (wav(channels=1024, data=bytes(2048 * 800)), 2205),
    (wav(channels=0), "cannot be read as audio (Channel count is zero)"),
    (wav(channels=65535), "cannot be read as audio (Too many channels specified)"),
    (wav(rate=0), "cannot be read as audio ("), (wav(rate=2**31), "cannot be read as audio ("),
    # Resampled, a byte would become 11025 samples, which were gigabytes of a small file.
    (wav(rate=1), "has a sampling rate of 1 Hz: sound has 1000 to 1000000 Hz"),
    (flac(rate=1), "has a sampling rate of 1 Hz: sound has 1000 to 1000000 Hz"),
    (wav(rate=999), "has a sampling rate of 999 Hz"), (wav(rate=1000), 17640),
    (wav(rate=10**6), 18), (wav(rate=2**31 - 1), "has a sampling rate of 2147483647 Hz"),
    (wav(bits=0), "cannot be read as audio ("), (wav(bits=65535), "cannot be read as audio ("),
    (wav(kind=0xFFFF), "cannot be read as audio ("),
    (flac(total=0), 22050), (flac(total=2**36 - 1), "cannot be read as audio ("),
    (flac(total=10**9), "cannot be read as audio ("),
    (b"RIFF", "cannot be read as audio ("), (b"fLaC" + bytes(100), "cannot be read as audio ("),
])  # fmt: skip
def test_headers(data, expected):
    found = read(data)
    assert found == expected if isinstance(expected, int) else str(found).startswith(expected)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, with flipped bits, other bytes in its header, absurd numbers, insertions or omissions."""
    result, place = bytearray(data), rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            return data[:place]
        case 1:
            for _ in range(rng.randrange(1, 8)):
                result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            for _ in range(rng.randrange(1, 6)):
                result[rng.randrange(200)] = rng.randrange(256)
        case 3:
            place = rng.randrange(120)
            result[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        case 4:
            result[place:place] = rng.randbytes(rng.randrange(1, 500))
        case 5:
            del result[place : rng.randrange(place, len(data))]
    return bytes(result)


FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "MS_ADPCM"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"),
    ("WAVEX", "PCM_24"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "ULAW"), ("CAF", "PCM_16"),
    ("CAF", "ALAC_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None),
]  # fmt: skip


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # soundfile's, of seeking before 0
def test_damaged_files_are_read_or_refused(kind, count):
    rng = random.Random(str(kind))
    stereo = 0.5 * np.stack([synthesize("plucks", 1, 8000), synthesize("drums", 1, 8000)], axis=1)
    samples = stereo[:, 0] if kind[1] == "GSM610" else stereo
    whole = encoded(samples, format=kind[0], subtype=kind[1])
    assert read(whole) > 20000
    for _ in range(count):
        read(damaged(whole, rng))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.caf"])
def test_random_bytes(tmp_path, name):
    rng = random.Random(name)
    for size in 1, 11, 44, 1000, 100000:
        (tmp_path / name).write_bytes(rng.randbytes(size))
        with pytest.raises(AudioError, match=r"^cannot be read as audio \(.+\)$"):
            read_audio(tmp_path / name, 8000)


# ----- memory


@pytest.mark.parametrize("length", ["told", "not told"])
def test_hours_in_a_hundred_kilobytes_is_read_in_little_memory(tmp_path, length):
    """2^24 samples in a file, 2^27 when resampled, which are 512 MiB; 128 MiB are not reached."""
    with soundfile.SoundFile(tmp_path / "bomb.flac", "w", 1000, 1, "PCM_16") as file:
        for _ in range(4):
            file.write(np.full(2**22, 8192, np.int16))
    assert (tmp_path / "bomb.flac").stat().st_size < 2**19
    if length == "not told":
        with (tmp_path / "bomb.flac").open("r+b") as file:
            file.seek(22)
            file.write(bytes(4))
    code = """
import re, sys
from pathlib import Path
from tonefield.data.audio_files import read_blocks
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before, path = peak(), Path(sys.argv[1])
print(sum(map(len, read_blocks(path, 8000))), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb.flac"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    samples, kilobytes = map(int, done.stdout.split())
    assert samples == 2**27 and kilobytes < 2**17
    # As a whole it is refused, after no more than is allowed.
    with pytest.raises(
        TooLongError, match=r"^is longer than the 2 minutes that are read at once: cut it into pieces$"
    ):
        read_audio(tmp_path / "bomb.flac", 8000, longest=2**20)


@pytest.mark.slow
def test_a_sound_of_days_is_refused_where_it_must_be_read_as_a_whole(tmp_path):
    with soundfile.SoundFile(tmp_path / "bomb.flac", "w", 1000, 1, "PCM_16") as file:
        for _ in range(65):
            file.write(np.zeros(2**22, np.int16))
    with pytest.raises(TooLongError, match=r"^is longer than the 559 minutes that are read at once"):
        read_audio(tmp_path / "bomb.flac", 8000)
    with pytest.raises(UserError, match=r"None of the 1 recordings in .* can be used; bomb.flac is longer than the"):
        AudioSet.open(tmp_path)


def test_the_longest_sound_is_not_too_long(tmp_path):
    data = wav(data=bytes(2000))
    assert len(read_audio(data, 8000, longest=1000)) == 1000
    with pytest.raises(TooLongError):
        read_audio(data, 8000, longest=999)


def test_long_recordings_are_gathered_block_by_block(tmp_path, capsys):
    """One that is longer than what is read ahead, one that breaks off after that, and a short one."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    long = rng.uniform(-0.5, 0.5, READ_AHEAD + 12345).astype(np.float32)
    broken = long.copy()
    broken[-1] = np.nan
    for name, samples in ("a", broken), ("b", long), ("c", long[:100]), ("d", np.zeros(READ_AHEAD + 1)):
        soundfile.write(tmp_path / "in" / f"{name}.wav", samples, 8000, subtype="FLOAT")
    gather(AudioFolder(tmp_path / "in"), 8000, tmp_path / "train.f32")
    recordings = open_recordings(tmp_path / "train.f32")
    assert recordings.names == ["b.wav", "c.wav"] and [recordings.length(i) for i in (0, 1)] == [len(long), 100]
    np.testing.assert_array_equal(recordings.samples, np.concatenate([long, long[:100]]))
    assert "2 recordings are left out, the first one a.wav: holds a sample that is not a" in capsys.readouterr().out
    gather(AudioFolder(tmp_path / "in"), 8000, tmp_path / "one.f32", limit=1)
    assert open_recordings(tmp_path / "one.f32").names == ["b.wav"]


# ----- samples


def test_samples_too_large_for_a_spectrum(tmp_path):
    """Their power is infinite in float32, and NaN after the filterbank."""
    for value in 1e10, -1e20, 3e38:
        with pytest.raises(
            AudioError, match=rf"^holds samples of up to {abs(value):.3g}, where full scale is 1$".replace("+", r"\+")
        ):
            read_audio(encoded([0.0, value], format="wav", subtype="FLOAT"), 8000)
    assert read_audio(encoded([0.0, -(2.0**31)], format="wav", subtype="FLOAT"), 8000).tolist() == [0, -(2.0**31)]


@pytest.mark.parametrize("ref", ["fixed", "slice"])
def test_a_spectrum_of_any_sound_that_is_read_is_finite(ref):
    mel = MelSpectrogram.from_preset("fsdd-64", ref=ref)
    sine = torch.sin(torch.arange(mel.slice_samples) * 0.3)
    levels = torch.tensor([0, 1e-45, 1e-38, 1e-20, 1, 2.0**32])
    sounds = torch.cat([levels[:, None] * sine, levels[:, None].expand(-1, len(sine))])  # the others: nothing but DC
    assert mel.encode(sounds).isfinite().all()
    for value, what in (1e18, r"1e\+18, where full scale is 1"), (-math.inf, "not a finite number"):
        sounds[3, 700] = value
        with pytest.raises(ValueError, match=rf"^Sample 700 of waveform 3 is {what}\.$"):
            mel.encode(sounds)


# ----- files


def test_a_folder_of_hostile_files(tmp_path, capfd):
    """Those that can be used become rows, the others a line each, and no name reaches the terminal raw."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows = {
        "good.wav": encoded(synthesize("pads", 1.1, 8000), format="wav"),
        "one sample.wav": encoded([0.5], format="wav"),
        "constant.wav": encoded(np.full(9000, 0.7), format="wav"),
        "long header.wav": wav(data=bytes(range(256)) * 100, claimed=2**32 - 1),
        "-rf.wav": encoded(synthesize("pads", 1.1, 8000), format="wav"),
        f"{'n' * 251}.wav": encoded(synthesize("pads", 1.1, 8000), format="wav"),
        "e\u0301.wav": encoded(synthesize("pads", 1.1, 8000), format="wav"),
        "\u00e9.wav": encoded(synthesize("drums", 1.1, 8000), format="wav"),
    }
    rejects = {
        "denormal\n.wav": "has a name with control characters: rename it",
        "\x1b[31mred.wav": "has a name with control characters: rename it",
        "\u202efdp.wav": "has a name with control characters: rename it",
        "huge.wav": "holds samples of up to 1e+30, where full scale is 1",
        "rate.wav": "has a sampling rate of 1 Hz: sound has 1000 to 1000000 Hz",
        "channels.wav": "cannot be read as audio (Too many channels specified)",
        "random.flac": "cannot be read as audio (Format not recognised)",
    }
    for name, data in rows.items():
        (folder / name).write_bytes(data)
    for name in rejects:
        (folder / name).write_bytes(rows["good.wav"])
    (folder / "huge.wav").write_bytes(encoded(np.full(9000, 1e30), format="wav", subtype="FLOAT"))
    (folder / "rate.wav").write_bytes(wav(rate=1, data=bytes(20000)))
    (folder / "channels.wav").write_bytes(wav(channels=65535, data=bytes(20000)))
    (folder / "random.flac").write_bytes(random.Random(0).randbytes(5000))
    # A denormal is silence, which is no mistake.
    (folder / "denormal.wav").write_bytes(encoded(np.full(9000, 1e-40), format="wav", subtype="FLOAT"))
    os.mkfifo(folder / "pipe.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "metadata.jsonl")
    (folder / "loop.wav").symlink_to("loop.wav")
    rejects |= dict.fromkeys(["pipe.wav", "device.wav", "metadata.jsonl"], "is not a file, but a pipe or a device")
    rejects["loop.wav"] = "cannot be opened (Too many levels of symbolic links)"

    flags = ["--input_dir", folder, "--output_dir", tmp_path / "out", "--preset", "fsdd-64", "--num_proc", 2]
    main(parse_args([*map(str, flags), "--validation_fraction", "0"]))
    dataset = load_from_disk(tmp_path / "out")["train"].with_format("torch")
    assert set(dataset["audio_file"]) == set(rows)
    assert torch.stack(list(dataset["mel"])).isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    escaped = {
        name.encode("unicode_escape").decode() if "control" in why else name: why for name, why in rejects.items()
    }
    assert {line["audio_file"]: line["reason"] for line in lines} == escaped
    said = "".join(capfd.readouterr())
    assert "\x1b[31m" not in said and "\u202e" not in said and r"\u202efdp.wav has a name with control" in said

    judged = AudioSet.open(folder)
    assert {sample.name for sample in judged.samples} == {*rows, "denormal.wav"}
    assert dict(judged.rejects) == escaped


def test_a_pipe_that_a_dataset_names(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in tmp_path / "pipe.wav", Path("/dev/zero"):
        with pytest.raises(AudioError, match=r"^is not a file, but a pipe or a device$"):
            read_audio(path, 8000)


# ----- ffmpeg


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg")
@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.aac"])
def test_a_playlist_is_not_followed(tmp_path, name):
    """ffmpeg goes by what a file holds, not by its name, and would open what a list names."""
    soundfile.write(tmp_path / "other.wav", np.full(8000, 0.25), 8000)
    (tmp_path / name).write_text("ffconcat version 1.0\nfile other.wav\n")
    with pytest.raises(AudioError, match=r"^cannot be read by ffmpeg"):
        read_audio(tmp_path / name, 8000)


def test_ffmpeg_is_told_which_formats_it_may_read(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >&2\nexit 1\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / "-i.m4a", 8000)
    said = str(caught.value)
    assert "-format_whitelist mov,mp4,matroska,webm,aac,asf,mp3,ogg,flac,wav -protocol_whitelist file -i" in said
    assert f"-i file:{tmp_path}/-i.m4a" in said
