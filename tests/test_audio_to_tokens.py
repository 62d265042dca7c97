"""From recordings to a dataset of tokens, as a user runs it: codes, rates, batches, pieces, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value, load_from_disk
from fake_hub import FakeHub
from PIL import Image
from token_runs import CODES, make_codec, write_sounds

from tonefield import FSQCodec, MuLawTokenizer
from tonefield.audio_to_tokens import main, parse_args
from tonefield.command_line import UserError
from tonefield.data import dataset_builder
from tonefield.data.loading import read_record
from tonefield.data.synthetic import synthesize
from tonefield.models import load_audio_tokenizer
from tonefield.training.token_data import open_dataset_codec


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    """A codec whose codes depend on what is around them; its random weights are as good as any here."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    FSQCodec.from_preset("digits-8k", width=32, encoder_layers=2, decoder_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Two classes of recordings at 8 kHz, none of a whole number of frames."""
    folder = tmp_path_factory.mktemp("sounds")
    for kind in "plucks", "drums":
        (folder / kind).mkdir()
        for i in range(5):
            soundfile.write(folder / kind / f"{i}.wav", synthesize(kind, 0.4 + i * 0.15137, 8000, seed=i), 8000)
    return folder


def build(sounds, codec, output_dir, *flags) -> DatasetDict:
    flags = ["--input_dir", sounds, "--codec", codec, "--output_dir", output_dir, "--num_proc", 2, *flags]
    main(parse_args(list(map(str, flags))))
    return load_from_disk(output_dir)


def rows_of(result: DatasetDict) -> dict[str, dict]:
    return {row["audio_path"]: row for split in result.values() for row in split.with_format("numpy")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_a_dataset(tmp_path, sounds, codec, capsys):
    result = build(sounds, codec, tmp_path / "out", "--validation_fraction", 0.2, "--test_fraction", 0.1)
    seconds = sum(soundfile.info(file).duration for file in sounds.rglob("*.wav"))
    assert capsys.readouterr().out == (
        f"10 recordings from 10 recordings ({seconds / 60:.1f} minutes) in {tmp_path}/out: 2 validation, 1 test,"
        " 7 train\n"
    )
    original, rows = FSQCodec.from_pretrained(codec), rows_of(result)
    assert result.num_rows == {"train": 7, "validation": 2, "test": 1} and len(rows) == 10
    classes = result["train"].features["label"]
    assert classes.names == ["drums", "plucks"]
    for file in sounds.rglob("*.wav"):
        row = rows[file.relative_to(sounds).as_posix()]
        waveform = torch.from_numpy(librosa.load(file, sr=8000)[0])
        expected = original.encode(waveform[None], 8000)[0].numpy()
        assert row["codes"].shape == expected.shape == (1, -(-len(waveform) // 80))
        np.testing.assert_array_equal(row["codes"], expected)
        assert row["num_samples"] == len(waveform)
        assert classes.int2str(int(row["label"])) == file.parent.name
    feature = result["train"].features["codes"]
    assert feature.feature.feature == Value("uint16")

    record = read_record(result["train"].features)
    frames = sum(row["codes"].shape[1] for row in result["train"].with_format("numpy"))
    samples = sum(result["train"]["num_samples"])
    assert record["statistics"] == {"recordings": 7, "frames": frames, "samples": samples}
    assert record["codec"] | {"config": None} == {
        "class": "FSQCodec", "config": None, "fingerprint": original.fingerprint(), "sampling_rate": 8000,
        "hop_length": 80, "num_codebooks": 1, "codebook_size": 1000,
    }  # fmt: skip
    assert record["codec"]["config"]["width"] == 32
    assert load_audio_tokenizer(tmp_path / "out" / "codec").fingerprint() == original.fingerprint()
    assert not (tmp_path / "out.partial").exists()


def test_several_codebooks(tmp_path):
    codes = np.random.default_rng(0).integers(0, CODES, (1, 30))
    codes[0, -1] = CODES - 1
    row = build(write_sounds(tmp_path / "in", {"a": codes}, 3), make_codec(tmp_path / "codec", 3), tmp_path / "out")
    np.testing.assert_array_equal(row["train"]["codes"][0], codes.reshape(10, 3).T)


def peak_frequency(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 2**18))
    return spectrum.argmax() * rate / 2**18


def test_a_tone_keeps_its_pitch_whatever_the_rate_of_its_file(tmp_path):
    """Files of mixed rates become codes at the one rate of the codec."""
    (tmp_path / "in").mkdir()
    for rate in 8000, 11025, 16000, 44100:
        time = np.arange(rate) / rate
        soundfile.write(tmp_path / "in" / f"{rate}.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    rows = rows_of(build(tmp_path / "in", "mulaw", tmp_path / "out"))
    codec = open_dataset_codec(
        str(tmp_path / "out"), read_record(load_from_disk(tmp_path / "out/train").features)["codec"]
    )
    for name, row in rows.items():
        assert row["num_samples"] == 8000, name
        sound = codec.decode(torch.from_numpy(row["codes"])[None].long())[0].numpy()
        assert peak_frequency(sound, codec.sampling_rate) == pytest.approx(440, rel=0.01), name
        assert np.abs(sound).max() == pytest.approx(0.5, rel=0.05)


def test_batches_threads_and_repetition_change_no_code(tmp_path, sounds, codec):
    folders = {name: tmp_path / name for name in "abcd"}
    for name, flags in {"a": [], "b": [], "c": ["--num_proc", 5], "d": ["--batch_size", 1]}.items():
        build(sounds, codec, folders[name], *flags)
    assert contents(folders["a"]) == contents(folders["b"]) == contents(folders["c"])
    whole, single = rows_of(load_from_disk(folders["a"])), rows_of(load_from_disk(folders["d"]))
    for name, row in whole.items():
        np.testing.assert_array_equal(row["codes"], single[name]["codes"])


def test_long_recordings_in_pieces_have_the_codes_of_the_whole(tmp_path, codec):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).standard_normal((3, 20 * 8000 + 333)) * 0.1
    for index, length in enumerate((20 * 8000 + 333, 9 * 8000, 8 * 8000 + 1)):
        soundfile.write(tmp_path / "in" / f"{index}.wav", noise[index, :length], 8000)
    whole = rows_of(build(tmp_path / "in", codec, tmp_path / "whole", "--chunk_seconds", 60))
    for chunk in 4, 2.503:
        pieces = rows_of(build(tmp_path / "in", codec, tmp_path / str(chunk), "--chunk_seconds", chunk))
        for name, row in whole.items():
            np.testing.assert_array_equal(pieces[name]["codes"], row["codes"])


def test_silence_loudness_and_how_many(tmp_path, sounds, capsys):
    (tmp_path / "in").mkdir()
    for index, peak in enumerate((0.5, 0.25, 0.0, 5e-4)):
        tone = peak * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
        soundfile.write(tmp_path / "in" / f"{index}.wav", tone, 8000, subtype="FLOAT")
    assert set(rows_of(build(tmp_path / "in", "mulaw", tmp_path / "out"))) == {"0.wav", "1.wav"}
    assert "2 recordings were skipped: they peak below -60 dB.\n" in capsys.readouterr().out
    result = rows_of(build(tmp_path / "in", "mulaw", tmp_path / "loud", "--loudness", -20))
    np.testing.assert_array_equal(result["0.wav"]["codes"], result["1.wav"]["codes"])
    assert result["1.wav"]["gain_db"] - result["0.wav"]["gain_db"] == pytest.approx(20 * np.log10(2), abs=0.01)
    assert len(rows_of(build(tmp_path / "in", "mulaw", tmp_path / "all", "--silence_db=-inf"))) == 4
    few = build(sounds, "mulaw", tmp_path / "few", "--max_examples", 4, "--validation_fraction", 0.5)
    assert few.num_rows == {"train": 2, "validation": 2}


def test_previews(tmp_path, sounds, capsys):
    result = build(sounds, "mulaw", tmp_path / "out", "--previews", 2)
    folder = tmp_path / "out" / "previews"
    assert f"2 recordings drawn and turned back into sound in {folder}\n" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "000.wav", "001.png", "001.wav"]
    heard, rate = soundfile.read(folder / "000.wav")
    original = librosa.load(sounds / result["train"]["audio_path"][0], sr=8000)[0]
    assert rate == 8000 and len(heard) == len(original)
    assert np.abs(heard - original).max() <= 0.03
    assert len(np.unique(np.array(Image.open(folder / "000.png").convert("L")))) > 50


def test_rejects(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", synthesize("pads", 0.5, 8000), 8000)
    # A recording that is only found to be bad when most of it has been read
    soundfile.write(tmp_path / "in" / "nan.wav", np.r_[np.full(2**18, 0.1), np.nan], 8000, subtype="FLOAT")
    (tmp_path / "in" / "empty.wav").touch()
    result = build(tmp_path / "in", "mulaw", tmp_path / "out", "--validation_fraction", 0, "--chunk_seconds", 3)
    assert list(rows_of(result)) == ["a.wav"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {line["audio_file"]: line["reason"] for line in lines} == {
        "empty.wav": "cannot be read as audio (Format not recognised)",
        "nan.wav": "holds a sample that is not a finite number at 32.768 s",
    }
    with pytest.raises(UserError, match=r"^--strict: 2 files were rejected"):
        build(tmp_path / "in", "mulaw", tmp_path / "strict", "--strict")
    (tmp_path / "in" / "a.wav").unlink()
    with pytest.raises(UserError, match=r"^No recording came of 2 recordings: 2 files were rejected"):
        build(tmp_path / "in", "mulaw", tmp_path / "none")


def clips(sounds: Path) -> Dataset:
    files = sorted(sounds.rglob("*.wav"))
    rows = {
        "sound": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "caption": [f"number {i}" for i in range(len(files))],
        "label": [i % 2 for i in range(len(files))],
    }
    features = Features(
        sound={"bytes": Value("binary"), "path": Value("string")}, caption=Value("string"),
        label=ClassLabel(names=["even", "odd"]),
    )  # fmt: skip
    return Dataset.from_dict(rows, features=features).cast_column("sound", Audio(decode=False))


def test_a_dataset_with_an_audio_column(tmp_path, sounds):
    clips(sounds).save_to_disk(tmp_path / "clips")
    flags = ["--dataset_name", tmp_path / "clips", "--audio_column", "sound", "--codec", "mulaw", "--num_proc", 1]
    for name, more in ("a", []), ("b", ["--streaming"]):
        main(parse_args(list(map(str, [*flags, "--output_dir", tmp_path / name, "--validation_fraction", 0, *more]))))
    rows = load_from_disk(tmp_path / "a")["train"]
    assert rows[:] == load_from_disk(tmp_path / "b")["train"][:]
    files = sorted(sounds.rglob("*.wav"))
    for row in rows:
        number = int(row["caption"].removeprefix("number "))
        assert row["label"] == number % 2
        original = librosa.load(files[number], sr=8000)[0]
        np.testing.assert_array_equal(row["codes"], MuLawTokenizer().encode(torch.from_numpy(original)[None], 8000)[0])


@pytest.mark.parametrize("flags, message", [
    (["--input_dir", "x"], "--codec is needed: mulaw, a folder that train_codec.py made, or a Hub id"),
    (["--codec", "mulaw"], "give --input_dir or --dataset_name, one of them"),
    (["--input_dir", "x", "--codec", "mulaw", "--batch_size", "0"], "--batch_size is at least 1, not 0"),
    (["--input_dir", "x", "--codec", "mulaw", "--chunk_seconds", "nan"], "--chunk_seconds is a number of seconds abo"),
    (["--input_dir", "x", "--codec", "mulaw", "--num_proc", "0"], "--num_proc is at least 1, not 0"),
])  # fmt: skip
def test_flags_that_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(flags)
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.startswith("error: ") and message in shown and shown.count("\n") == 1


def test_codecs_and_devices_that_are_not_there(tmp_path, sounds):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for codec, message in (tmp_path, "UNet2DModel, which is no audio tokenizer"), (tmp_path / "none", "neither 'mula"):
        with pytest.raises(UserError, match=f"^--codec .* cannot be loaded: .*{message}") as caught:
            build(sounds, codec, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^--device abacus cannot be used"):
        build(sounds, "mulaw", tmp_path / "out", "--device", "abacus")
    assert not (tmp_path / "out.partial").exists()


def start(*flags, **options) -> subprocess.Popen:
    command = [sys.executable, "audio_to_tokens.py", *map(str, flags)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, **options)


def test_a_run_that_was_killed_is_taken_up(tmp_path, codec):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):  # so large that each is a part of its own
        soundfile.write(tmp_path / "in" / f"{i}.wav", 0.1 * rng.standard_normal(70 * 8000), 8000)
    whole = ["--input_dir", tmp_path / "in", "--codec", codec, "--num_proc", 1]
    build(tmp_path / "in", codec, tmp_path / "whole")
    out = tmp_path / "out"
    process = start(*whole, "--output_dir", out)
    while len(list(Path(f"{out}.partial").glob("*-*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    done = len(list(Path(f"{out}.partial").glob("*-*.json")))
    assert 2 <= done < 12
    with pytest.raises(UserError, match="had chunk_seconds = 20, this one has 30"):
        build(tmp_path / "in", codec, out, "--resume", "--chunk_seconds", 30)
    with pytest.raises(UserError, match=r"had codec = .*FSQCodec.*, this one has .*MuLawTokenizer"):
        build(tmp_path / "in", "mulaw", out, "--resume")
    build(tmp_path / "in", codec, out, "--resume")
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_and_their_merge_make_what_one_run_makes(tmp_path, sounds, codec, monkeypatch):
    """The codec comes along as well."""
    monkeypatch.setattr(dataset_builder, "PART_RECORDINGS", 3)
    build(sounds, codec, tmp_path / "whole")
    flags = ["--input_dir", sounds, "--codec", codec, "--output_dir", tmp_path / "out", "--num_proc", 1]
    for more in (["--num_shards", 2, "--shard_index", 1], ["--num_shards", 2, "--shard_index", 0], ["--merge"]):
        main(parse_args(list(map(str, flags + more))))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert any(name.startswith("codec/") for name in contents(tmp_path / "out"))


def test_push_to_the_hub_with_the_codec(tmp_path, sounds):
    check = f"""
from datasets import load_dataset, load_from_disk
from tonefield.data.loading import read_record
from tonefield.training.token_data import open_dataset_codec
there, here = load_dataset("someone/tokens"), load_from_disk({str(tmp_path / "out")!r})
assert {{name: split[:] for name, split in there.items()}} == {{name: split[:] for name, split in here.items()}}
codec = open_dataset_codec("someone/tokens", read_record(there["train"].features)["codec"])
print(type(codec).__name__, codec.fingerprint())
"""
    with FakeHub() as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")
        flags = ["--input_dir", sounds, "--output_dir", tmp_path / "out", "--codec", "mulaw"]
        process = start(*flags, "--push_to_hub", "someone/tokens", env=environment)
        shown = process.communicate()
        assert process.returncode == 0, shown[1]
        assert shown[0].endswith("pushed to someone/tokens\n")
        assert "codec/config.json" in hub.files["datasets", "someone/tokens"]
        result = subprocess.run(
            [sys.executable, "-c", check], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert result.stdout == f"MuLawTokenizer {MuLawTokenizer().fingerprint()}\n", result.stderr
