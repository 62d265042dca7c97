"""From recordings to a dataset, as a user runs it: every flag, every refusal, and runs that are cut short."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import librosa
import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value, load_from_disk
from fake_hub import FakeHub
from PIL import Image

from tonefield import MelSpectrogram
from tonefield.audio_to_images import front_end_from, main, parse_args
from tonefield.command_line import UserError
from tonefield.data import dataset_builder
from tonefield.data.loading import read_record
from tonefield.data.synthetic import synthesize
from tonefield.models.mel_spectrogram import PRESETS


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Three classes of four recordings at 8 kHz, of 2 to 4 slices of the preset fsdd-64."""
    folder = tmp_path_factory.mktemp("sounds")
    for kind in "plucks", "pads", "drums":
        (folder / kind).mkdir()
        for i in range(4):
            soundfile.write(folder / kind / f"{i}.wav", synthesize(kind, 1.5 + i * 0.8, 8000, seed=i), 8000)
    return folder


def build(sounds: Path, output_dir: Path, *flags) -> DatasetDict:
    flags = ["--input_dir", sounds, "--output_dir", output_dir, "--preset", "fsdd-64", "--num_proc", 2, *flags]
    main(parse_args(list(map(str, flags))))
    return load_from_disk(output_dir)


def names(split: Dataset) -> set[str]:
    return set(split["audio_file"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----- a folder


def test_a_folder_becomes_a_dataset(tmp_path, sounds, capsys):
    result = build(sounds, tmp_path / "out")
    rows = [row for split in result.values() for row in split.with_format("numpy")]
    expected = {}
    mel = MelSpectrogram.from_preset("fsdd-64")
    for file in sounds.rglob("*.wav"):
        waveform = librosa.load(file, sr=8000)[0]
        starts = [*range(0, len(waveform) - 8191 + 1, 8191), len(waveform) - 8191]
        for number, start in enumerate(starts):
            encoded = mel.encode(torch.from_numpy(waveform[None, start : start + 8191]))[0]
            expected[file.relative_to(sounds).as_posix(), number] = start, encoded.numpy()
    assert {(row["audio_file"], row["slice"]) for row in rows} == expected.keys() and len(rows) == len(expected)
    classes = result["train"].features["label"]
    assert classes == ClassLabel(names=["drums", "pads", "plucks"])
    for row in rows:
        start, encoded = expected[row["audio_file"], row["slice"]]
        assert row["start_sample"] == start and row["valid_frames"] == 64
        np.testing.assert_allclose(row["mel"], encoded, atol=2.6e-4)
        assert classes.int2str(int(row["label"])) == row["audio_file"].split("/")[0]
    assert len(names(result["validation"])) == 1 and not names(result["validation"]) & names(result["train"])

    record = read_record(result["train"].features)
    assert record == read_record(result["validation"].features)
    assert record["fingerprint"] == MelSpectrogram(**record["front_end"]).fingerprint() == mel.fingerprint()
    mels = np.array(result["train"].with_format("numpy")["mel"], dtype=np.float64)
    statistics = record["statistics"]
    assert statistics["mean"] == pytest.approx(mels.mean(), rel=1e-7)
    assert statistics["std"] == pytest.approx(mels.std(), rel=1e-7)
    assert statistics["mean_norm"] == pytest.approx(
        np.linalg.norm(mels.reshape(len(mels), -1), axis=1).mean(), rel=1e-7
    )
    assert statistics["slices"] == len(mels) and statistics["floor_fraction"] == (mels == -1).mean()
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == ""
    assert not (tmp_path / "out.partial").exists()

    seconds = sum(soundfile.info(file).duration for file in sounds.rglob("*.wav"))
    assert capsys.readouterr().out == (
        f"{len(rows)} slices from 12 recordings ({seconds / 60:.1f} minutes) in {tmp_path}/out:"
        f" {len(result['validation'])} validation, {len(mels)} train\n"
    )


def test_metadata_comes_along(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "in" / f"{name}.wav", synthesize("pads", 2, 8000), 8000)
    (tmp_path / "in" / "metadata.csv").write_text("file_name,caption,bpm,label\na.wav,slow chords,,pad\n")
    result = build(tmp_path / "in", tmp_path / "out", "--validation_fraction", 0, "--previews", 1, "--save_images")
    rows = {row["audio_file"]: (row["caption"], row["bpm"], row["label"]) for row in result["train"]}
    assert rows == {"a.wav": ("slow chords", None, 0), "b.wav": (None, None, None)}


def test_threads_and_repetition_change_no_byte(tmp_path, sounds):
    for name, num_proc in ("a", 1), ("b", 1), ("c", 5):
        build(sounds, tmp_path / name, "--num_proc", num_proc, "--save_images", "--loudness", -20)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


# ----- the front end


def config_of(*flags) -> dict:
    return front_end_from(parse_args(["--input_dir", "x", *map(str, flags)])).config


@pytest.mark.parametrize("flags, expected", [
    ([], PRESETS["image-22k"] | {"method": "image", "top_db": 80, "ref": "fixed"}),
    (["--preset", "sc09-128"], PRESETS["sc09-128"]),
    (["--preset", "bigvgan_24khz_100band"], PRESETS["bigvgan_24khz_100band"]),
    (["--bigvgan_model", "bigvgan_24khz_100band"], PRESETS["bigvgan_24khz_100band"]),
    (["--bigvgan_model", "bigvgan_22khz_80band", "--mel_spec_method", "bigvgan", "--ref", "fixed"], {"f_max": 8000}),
    (["--preset", "sc09-64", "--mel_spec_method", "image"], PRESETS["sc09-64"]),
    (["--resolution", "512,128"], {"num_frames": 512, "n_mels": 128}),
    (["--resolution", "64"], {"num_frames": 64, "n_mels": 64}),
    (["--preset", "bigvgan_24khz_100band", "--resolution", "512,100"], {"num_frames": 512, "n_mels": 100}),
    (["--sample_rate", 16000, "--resolution", "256,128"], {"sample_rate": 16000, "hop_length": 256}),
    (["--hop_length", 512], {"hop_length": 512, "n_fft": 2048}),
    (["--n_fft", 4096], {"n_fft": 4096, "hop_length": 256}),
    (["--top_db", 60], {"top_db": 60}),
    (["--ref", "slice"], {"ref": "slice"}),
    (["--preset", "fsdd-64", "--duration", 2], {"num_frames": 128}),  # 125 frames, rounded up to 16
    (["--preset", "fsdd-64", "--duration", 2.048], {"num_frames": 128}),
    (["--preset", "fsdd-64", "--duration", 2.06], {"num_frames": 144}),
    (["--preset", "fsdd-64", "--duration", 2, "--hop_length", 64, "--resolution", 32],
     {"num_frames": 256, "n_mels": 32}),
])  # fmt: skip
def test_front_end_flags(flags, expected):
    config = config_of(*flags)
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("flags, message", [
    (["--preset", "image-44k"], "There is no preset 'image-44k'; there are image-22k, sc09-64, "),
    (["--preset", "bigvgan_9000"], "There is no preset 'bigvgan_9000'; "),
    (["--preset", "sc09-64", "--bigvgan_model", "bigvgan_22khz_80band"], "--preset sc09-64 and --bigvgan_model big"),
    (["--mel_spec_method", "bigvgan"], "--mel_spec_method bigvgan needs a --bigvgan_model, such as "),
    (["--mel_spec_method", "image", "--preset", "bigvgan_22khz_80band"], "--mel_spec_method image contradicts big"),
    (["--preset", "bigvgan_22khz_80band", "--sample_rate", 44100], "sample_rate 22050, which 44100"),
    (["--preset", "bigvgan_22khz_80band", "--resolution", "256,128"], "has n_mels 80, which 128 contradicts"),
    (["--preset", "bigvgan_22khz_80band", "--ref", "slice"], "has ref fixed, which slice contradicts"),
    (["--preset", "bigvgan_22khz_80band", "--top_db", 60], "has top_db 80.0, which 60.0 contradicts"),
    (["--resolution", "wide"], "--resolution wide is not W,H or one number, such as 256,128."),
    (["--resolution", "256,128,64"], "--resolution 256,128,64 is not W,H or one number"),
    (["--resolution", "0,128"], "num_frames must be positive, not 0"),
    (["--duration", 5, "--resolution", "256,128"], "--duration and the width of --resolution say the same thing"),
    (["--n_fft", 512], "39 of 256 mel bands .* use n_fft=1024"),
    (["--hop_length", 2000], "hop_length 2000 must be at most n_fft / 2 = 1024"),
    (["--sample_rate", 0], "sample_rate must be positive, not 0"),
])  # fmt: skip
def test_contradictions(flags, message):
    with pytest.raises(UserError, match=message):
        config_of(*flags)


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert [name for name in PRESETS if name not in shown] == []


def test_the_front_end_reaches_the_rows(tmp_path, sounds):
    flags = ["--resolution", "32,40", "--sample_rate", 4000, "--n_fft", 512, "--hop_length", 100, "--top_db", 50]
    result = build(sounds, tmp_path / "out", *flags)
    waveform = librosa.load(sounds / "pads" / "3.wav", sr=4000)[0]
    row = next(
        row for split in result.values() for row in split if (row["audio_file"], row["slice"]) == ("pads/3.wav", 1)
    )
    power = librosa.feature.melspectrogram(
        y=waveform[3199 : 2 * 3199], sr=4000, n_fft=512, hop_length=100, n_mels=40, pad_mode="constant"
    )
    full_scale = MelSpectrogram(**read_record(result["train"].features)["front_end"]).full_scale_power
    expected = librosa.power_to_db(power, ref=full_scale, amin=1e-12, top_db=None).clip(-50, 0) / 25 + 1
    np.testing.assert_allclose(np.array(row["mel"])[0], expected, atol=1e-3)


# ----- slices


def test_what_is_left_over(tmp_path, sounds):
    rows = {pad: build(sounds, tmp_path / pad, "--pad", pad) for pad in ("overlap", "pad", "drop")}
    counts = {pad: sum(split.num_rows for split in result.values()) for pad, result in rows.items()}
    assert counts == {"overlap": 3 * 13, "pad": 3 * 13, "drop": 3 * 9}
    valid = {pad: [n for split in result.values() for n in split["valid_frames"]] for pad, result in rows.items()}
    assert set(valid["overlap"]) == set(valid["drop"]) == {64} and min(valid["pad"]) < 64


def test_silence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    samples = np.repeat([0.5, 0.02, 0.0, 0.0], 8191)  # four slices
    for i in range(2):
        soundfile.write(tmp_path / "in" / f"{i}.wav", samples, 8000)
    few = build(tmp_path / "in", tmp_path / "few")
    assert sum(split.num_rows for split in few.values()) == 4
    assert "4 slices were skipped: they peak below -60 dB.\n" in capsys.readouterr().out
    none = build(tmp_path / "in", tmp_path / "all", "--silence_db=-inf")
    assert sum(split.num_rows for split in none.values()) == 8
    loud = build(tmp_path / "in", tmp_path / "loud", "--silence_db", "-20")
    assert sum(split.num_rows for split in loud.values()) == 2


def test_loudness_and_reference(tmp_path, sounds):
    plain = build(sounds, tmp_path / "plain")["train"]
    loud = build(sounds, tmp_path / "loud", "--loudness", -30)["train"]
    relative = build(sounds, tmp_path / "relative", "--ref", "slice")["train"]
    assert set(loud.column_names) - set(plain.column_names) == {"gain_db"}
    assert set(relative.column_names) - set(plain.column_names) == {"ref_db"}
    decibels = [(np.array(split["mel"][0]) + 1) * 40 - 80 for split in (plain, loud, relative)]
    heard = (decibels[0] > -75) & (decibels[1] > -79)
    assert heard.any() and abs(loud["gain_db"][0]) > 1
    np.testing.assert_allclose(decibels[1][heard] - decibels[0][heard], loud["gain_db"][0], atol=0.05)
    np.testing.assert_allclose(decibels[2][heard] - decibels[0][heard], -relative["ref_db"][0], atol=0.05)


def test_max_examples(tmp_path, sounds):
    whole = build(sounds, tmp_path / "whole", "--validation_fraction", 0.2, "--test_fraction", 0.2)
    few = build(sounds, tmp_path / "few", "--validation_fraction", 0.2, "--test_fraction", 0.2, "--max_examples", 15)
    assert {name: split.num_rows for name, split in few.items()} == {"train": 9, "validation": 3, "test": 3}
    for name, split in few.items():
        assert split["audio_file"][:] == whole[name]["audio_file"][: len(split)]
    mels = np.array(few["train"]["mel"], dtype=np.float64)
    assert read_record(few["train"].features)["statistics"]["mean"] == pytest.approx(mels.mean(), rel=1e-7)


# ----- the dataset


def test_splits(tmp_path, sounds):
    results = {
        "third": ["--validation_fraction", 0.34], "seed": ["--validation_fraction", 0.34, "--seed", 1],
        "three": ["--validation_fraction", 0.34, "--test_fraction", 0.25], "one": ["--validation_fraction", 0],
    }  # fmt: skip
    results = {name: build(sounds, tmp_path / name, *flags) for name, flags in results.items()}
    files = {name: {split: names(rows) for split, rows in result.items()} for name, result in results.items()}
    assert {name: {split: len(each) for split, each in splits.items()} for name, splits in files.items()} == {
        "third": {"train": 8, "validation": 4}, "seed": {"train": 8, "validation": 4},
        "three": {"train": 5, "validation": 4, "test": 3}, "one": {"train": 12},
    }  # fmt: skip
    assert all(len(set.union(*splits.values())) == 12 for splits in files.values())
    assert files["third"]["validation"] == files["three"]["validation"] != files["seed"]["validation"]
    assert list(results["third"]["train"]["audio_file"]) != sorted(results["third"]["train"]["audio_file"])


def test_a_single_recording_is_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", synthesize("pads", 3, 8000), 8000)
    assert build(tmp_path / "in", tmp_path / "out").num_rows == {"train": 3}


def test_saved_images_are_those_of_the_mels(tmp_path, sounds):
    result = build(sounds, tmp_path / "out", "--save_images")["train"]
    mel = MelSpectrogram.from_preset("fsdd-64")
    for row in result.select(range(5)):
        # Half a grey level, and what rounding to float16 adds.
        error = mel.from_image(row["image"])[0] - torch.tensor(row["mel"])
        assert row["image"].mode == "L" and error.abs().max() <= 1 / 255 + 3e-4
    assert "image" not in build(sounds, tmp_path / "plain")["train"].features


@pytest.mark.parametrize("ref", ["fixed", "slice"])
def test_previews(tmp_path, sounds, capsys, ref):
    rows = build(sounds, tmp_path / "out", "--previews", 3, "--ref", ref)["train"]
    folder = tmp_path / "out" / "previews"
    assert f"3 slices drawn and turned back into sound in {folder}\n" in capsys.readouterr().out
    expected = [f"{i:03d}.{kind}" for i in range(3) for kind in ("png", "wav")] + ["overview.png"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    for path in folder.glob("*.png"):
        picture = Image.open(path)
        assert picture.format == "PNG" and len(np.unique(np.array(picture.convert("L")))) > 50
    fixed = MelSpectrogram.from_preset("fsdd-64")
    rows = rows.select([0, len(rows) // 3, 2 * len(rows) // 3])  # from all over the dataset
    for i in range(3):
        heard, rate = soundfile.read(folder / f"{i:03d}.wav", dtype="float32")
        assert rate == 8000 and len(heard) == 8191
        # The same spectrogram and level as the piece of the recording that the row names.
        source = librosa.load(sounds / rows[i]["audio_file"], sr=8000)[0]
        source = source[rows[i]["start_sample"] :][:8191]
        mels = fixed.encode(torch.from_numpy(np.stack([heard, source])))
        assert (mels[0] - mels[1]).square().mean().sqrt() * 40 < 6
        assert abs(10 * np.log10((heard**2).mean() / (source**2).mean())) < 1


def test_the_default_output_folder(tmp_path, sounds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(parse_args(["--input_dir", str(sounds), "--preset", "fsdd-64", "--num_proc", "1", "--max_examples", "2"]))
    assert load_from_disk(tmp_path / "mels" / sounds.name).num_rows == {"train": 2}
    assert parse_args(["--input_dir", "some/where/"]).output_dir == os.path.join("mels", "where")
    assert parse_args(["--dataset_name", "someone/clips"]).output_dir == os.path.join("mels", "clips")


def test_a_recipe(tmp_path, sounds):
    (tmp_path / "recipe.yaml").write_text("validation_fraction: 0.5\nmax_examples: 9\nsave_images: true\n")
    result = build(sounds, tmp_path / "out", "--config", tmp_path / "recipe.yaml", "--max_examples", 6)
    assert result.num_rows == {"train": 3, "validation": 3} and "image" in result["train"].features


# ----- recordings that are bad


def test_rejects(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "in" / f"{i}.wav", synthesize("pads", 2, 8000), 8000)
    soundfile.write(tmp_path / "in" / "nan.wav", np.full(9000, np.nan), 8000, subtype="FLOAT")
    (tmp_path / "in" / "empty.wav").touch()
    (tmp_path / "in" / "cover.jpg").touch()
    (tmp_path / "in" / "gone.wav").symlink_to("nowhere")
    expected = [
        ("cover.jpg", "is not audio by its name (.jpg)"),
        ("empty.wav", "cannot be read as audio (Format not recognised)"),
        ("gone.wav", "cannot be opened (No such file or directory)"),
        ("nan.wav", "holds a sample that is not a finite number at 0.000 s"),
    ]
    result = build(tmp_path / "in", tmp_path / "out")
    assert sum(split.num_rows for split in result.values()) == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["audio_file"], line["reason"]) for line in lines] == expected
    first = f"the first: {' '.join(expected[0])}."
    assert f"4 files were rejected, see rejects.jsonl; {first}\n" in capsys.readouterr().out

    with pytest.raises(UserError, match=f"^--strict: 4 files were rejected, see {tmp_path}/strict/rejects.jsonl.$"):
        build(tmp_path / "in", tmp_path / "strict", "--strict", "--push_to_hub", "someone/sounds")
    assert contents(tmp_path / "strict" / "train") == contents(tmp_path / "out" / "train")

    for i in range(3):
        (tmp_path / "in" / f"{i}.wav").unlink()
    message = (
        rf"^No slice came of 3 recordings: 4 files were rejected \(see {tmp_path}/none-rejects.jsonl; the first:"
        r" cover.jpg: is not audio by its name \(.jpg\)\), 0 slices were silent.$"
    )
    with pytest.raises(UserError, match=message):
        build(tmp_path / "in", tmp_path / "none")
    assert (tmp_path / "none-rejects.jsonl").read_text() == (tmp_path / "out" / "rejects.jsonl").read_text()
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


# ----- a dataset as the source


@pytest.fixture(scope="module")
def clips(sounds) -> Dataset:
    files = sorted(sounds.rglob("*.wav")) * 3
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


def build_from(name, output_dir, *flags) -> DatasetDict:
    flags = ["--dataset_name", name, "--output_dir", output_dir, "--preset", "fsdd-64", "--num_proc", 2, *flags]
    main(parse_args(list(map(str, flags))))
    return load_from_disk(output_dir)


def test_a_dataset_with_an_audio_column(tmp_path, sounds, clips):
    DatasetDict(train=clips.select(range(12)), more=clips).save_to_disk(tmp_path / "clips")
    flags = ["--audio_column", "sound", "--validation_fraction", 0.3, "--test_fraction", 0.1]
    small = build_from(tmp_path / "clips", tmp_path / "small", *flags)
    assert {caption for split in small.values() for caption in split["caption"]} == {f"number {i}" for i in range(12)}

    more = build_from(tmp_path / "clips", tmp_path / "more", *flags, "--split", "more")
    assert set(more) == {"train", "validation", "test"}
    captions = {name: set(split["caption"]) for name, split in more.items()}
    assert sum(map(len, captions.values())) == len(set.union(*captions.values())) == 36  # each in one split
    for row in more["train"]:
        number = int(row["caption"].removeprefix("number "))
        assert row["label"] == number % 2 and row["audio_file"] == f"{number % 4}.wav"
    assert more["train"].features["label"].names == ["even", "odd"]

    files = build(sounds, tmp_path / "files")
    expected = {np.array(row["mel"]).tobytes() for split in files.values() for row in split}
    assert {np.array(row["mel"]).tobytes() for split in more.values() for row in split} == expected

    streamed = build_from(tmp_path / "clips", tmp_path / "streamed", *flags, "--split", "more", "--streaming")
    assert {name: split[:] for name, split in streamed.items()} == {name: split[:] for name, split in more.items()}


def test_configurations_and_streaming_of_files(tmp_path, clips, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "clips").mkdir()
    for name, rows in ("small", range(6)), ("large", range(20)):
        clips.select(rows).to_parquet(tmp_path / "clips" / f"{name}.parquet")
    (tmp_path / "clips" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small.parquet\n"
        "- config_name: large\n  data_files: large.parquet\n---\n"
    )
    flags = ["--audio_column", "sound", "--validation_fraction", 0]
    streamed = build_from(tmp_path / "clips", tmp_path / "a", *flags, "--dataset_config_name", "small", "--streaming")
    assert not list(cache.rglob("*.arrow"))
    loaded = build_from(tmp_path / "clips", tmp_path / "b", *flags, "--dataset_config_name", "small")
    assert list(cache.rglob("*.arrow"))
    assert set(loaded["train"]["caption"]) == {f"number {i}" for i in range(6)}
    assert streamed["train"][:] == loaded["train"][:]
    large = build_from(tmp_path / "clips", tmp_path / "c", *flags, "--dataset_config_name", "large")
    assert len(set(large["train"]["caption"])) == 20


def test_datasets_that_cannot_be_used(tmp_path, clips):
    clips.save_to_disk(tmp_path / "clips")
    with pytest.raises(UserError, match=r"no column 'audio'; its columns are sound, caption, label.$"):
        build_from(tmp_path / "clips", tmp_path / "out")
    with pytest.raises(UserError, match=r"^Column 'label' holds no audio but ClassLabel"):
        build_from(tmp_path / "clips", tmp_path / "out", "--audio_column", "label")
    with pytest.raises(UserError, match=r"^The dataset someone/none cannot be loaded: "):
        build_from("someone/none", tmp_path / "out")
    with pytest.raises(UserError, match="come with a column 'mel', a name that is taken"):
        clips.rename_column("caption", "mel").save_to_disk(tmp_path / "taken")
        build_from(tmp_path / "taken", tmp_path / "out", "--audio_column", "sound")
    assert not (tmp_path / "out.partial").exists()


# ----- several runs side by side


@pytest.mark.parametrize("column", [False, True])
def test_shards_and_their_merge_make_what_one_run_makes(tmp_path, sounds, clips, monkeypatch, capsys, column):
    """With the same flags to all of them; previews are drawn of the whole."""
    monkeypatch.setattr(dataset_builder, "PART_RECORDINGS", 2)
    source = ["--dataset_name", tmp_path / "clips", "--audio_column", "sound"] if column else ["--input_dir", sounds]
    if column:
        clips.save_to_disk(tmp_path / "clips")
    flags = [*source, "--preset", "fsdd-64", "--num_proc", 2, "--previews", 1, "--validation_fraction", 0.3]

    def run(folder, *more):
        main(parse_args(list(map(str, [*flags, "--output_dir", tmp_path / folder, *more]))))

    run("whole")
    for index in range(2):
        run("out", "--num_shards", 2, "--shard_index", index)
        assert not (tmp_path / "out").exists()
    assert f"recordings in {tmp_path}/out.partial. When all shards are there: --merge\n" in capsys.readouterr().out
    run("out", "--merge")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ----- refusals, as they are shown


@pytest.mark.parametrize("flags, message", [
    ([], "give --input_dir or --dataset_name, one of them"),
    (["--input_dir", "x", "--dataset_name", "y"], "give --input_dir or --dataset_name, one of them"),
    (["--input_dir", "x", "--num_proc", "0"], "--num_proc is at least 1, not 0"),
    (["--input_dir", "x", "--max_examples", "0"], "--max_examples is at least 1, not 0"),
    (["--input_dir", "x", "--previews", "-1"], "--previews is at least 0, not -1"),
    (["--input_dir", "x", "--duration", "0"], "--duration is a number of seconds above 0, not 0"),
    (["--input_dir", "x", "--duration", "inf"], "--duration is a number of seconds above 0, not inf"),
    (["--input_dir", "x", "--validation_fraction", "-0.1"], "--validation_fraction -0.1 and --test_fraction 0 must"),
    (["--input_dir", "x", "--test_fraction", "0.97"], "--validation_fraction 0.05 and --test_fraction 0.97 must"),
    (["--input_dir", "x", "--pad", "mirror"], "argument --pad: invalid choice: 'mirror'"),
    (["--input_dir", "x", "--num_shards", "2"], "--num_shards and --shard_index go together: give both"),
    (["--input_dir", "x", "--shard_index", "0"], "--num_shards and --shard_index go together: give both"),
    (["--input_dir", "x", "--num_shards", "2", "--shard_index", "2"], "--shard_index 2 must lie between 0 and 1, for"),
    (["--input_dir", "x", "--num_shards", "2", "--shard_index", "0", "--merge"], "--merge is for the run after those"),
    (["--input_dir", "x", "--merge", "--max_examples", "9"], "--max_examples counts all rows, which runs side by"),
    (["--input_dir", "x", "--preview", "3"], "unrecognized arguments: --preview 3"),
])  # fmt: skip
def test_flags_that_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(flags)
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.startswith("error: ") and message in shown and shown.count("\n") == 1


def start(*flags, **options) -> subprocess.Popen:
    command = [sys.executable, "audio_to_images.py", *map(str, flags)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    # What a shell starts in the background ignores interrupts, and so would what the tests start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_status_and_the_one_line(tmp_path):
    for flags, status, line in [
        (["--input_dir", tmp_path / "none"], 1, f"error: --input_dir {tmp_path}/none does not exist.\n"),
        (["--num_proc", 1], 2, "error: give --input_dir or --dataset_name, one of them (--help lists all flags)\n"),
    ]:
        process = start(*flags)
        assert (*process.communicate(), process.returncode) == ("", line, status)


# ----- runs that are cut short


@pytest.fixture(scope="module")
def long_sounds(tmp_path_factory) -> Path:
    """Recordings so large that each is a part of its own, and one that is not."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    for i in range(20):
        seconds = 70 if i else 20
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(seconds * 8000), 8000)
    return folder


LONG = ["--preset", "image-22k", "--num_proc", 1, "--validation_fraction", 0.1]


@pytest.fixture(scope="module")
def uninterrupted(long_sounds, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    build(long_sounds, folder / "out", *LONG)
    return contents(folder / "out")


def finished_parts(output_dir: Path) -> int:
    return len(list(Path(f"{output_dir}.partial").glob("*-*.json")))


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_is_taken_up(tmp_path, long_sounds, uninterrupted, stop, status):
    out = tmp_path / "out"
    process = start("--input_dir", long_sounds, "--output_dir", out, *LONG)
    while not finished_parts(out):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(stop)
    _, shown = process.communicate()
    assert process.returncode == status
    assert 0 < finished_parts(out) < 20
    if stop == signal.SIGINT:
        assert f"parts are finished and kept in {out}.partial: run the same command with --resume.\n" in shown
        assert shown.endswith("\ninterrupted\n") and "Traceback" not in shown
    assert not out.exists()
    for folder in out, f"{out}.partial":
        with pytest.raises(FileNotFoundError):
            load_from_disk(folder)

    with pytest.raises(UserError, match="holds an unfinished run: add --resume"):
        build(long_sounds, out, *LONG)
    with pytest.raises(UserError, match="had pad = overlap, this one has drop"):
        build(long_sounds, out, *LONG, "--resume", "--pad", "drop")
    with pytest.raises(UserError, match=r"had front_end = .*this one has"):
        build(long_sounds, out, *LONG, "--resume", "--top_db", 70)
    build(long_sounds, out, *LONG, "--resume", "--num_proc", 2)
    assert contents(out) == uninterrupted


def test_a_full_disk(tmp_path, long_sounds, uninterrupted):
    """Files cannot grow beyond a size that only the part of the short recording stays below."""
    out = tmp_path / "out"
    limit = 24 * 2 * 256 * 256 - 1
    process = start(
        "--input_dir", long_sounds, "--output_dir", out, *LONG,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    _, shown = process.communicate()
    assert process.returncode == 1 and "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("error: The run was stopped: ")
    assert "File too large" in shown and shown.endswith(
        f"kept in {out}.partial: run the same command with --resume.\n"
    )
    assert not out.exists()
    build(long_sounds, out, *LONG, "--resume")
    assert contents(out) == uninterrupted


# ----- the Hub


def test_push_to_the_hub_and_load_from_it(tmp_path, sounds, clips):
    push = ["--push_to_hub", "someone/sounds", "--hub_private_repo", "--save_images", "--validation_fraction", 0.3]
    compare = f"""
import numpy as np
from datasets import load_dataset, load_from_disk
from tonefield.audio_to_images import main, parse_args
from tonefield.data.loading import read_record
there, here = load_dataset("someone/sounds"), load_from_disk({str(tmp_path / "out")!r})
assert there.num_rows == here.num_rows, there.num_rows
for name, split in here.items():
    assert there[name].features == split.features
    for a, b in zip(there[name], split, strict=True):
        image = a.pop("image"), b.pop("image")
        assert a == b and (np.array(image[0]) == np.array(image[1])).all()
    stream = load_dataset("someone/sounds", split=name, streaming=True)
    assert read_record(stream.features) == read_record(split.features)
    assert [row["mel"] for row in stream] == split["mel"][:]
flags = "--audio_column sound --preset fsdd-64 --dataset_name someone/clips --output_dir".split()
for streaming in [], ["--streaming"]:
    main(parse_args([*flags, {str(tmp_path)!r} + "/clips" + "".join(streaming), *streaming]))
print("the same")
"""
    with FakeHub() as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")
        flags = ["--input_dir", sounds, "--output_dir", tmp_path / "out", "--preset", "fsdd-64", *push]
        process = start(*flags, env=environment)
        shown = process.communicate()
        assert process.returncode == 0, shown[1]
        assert shown[0].endswith("pushed to someone/sounds\n")
        files = hub.files["datasets", "someone/sounds"]
        assert {name.split("/")[-1].split("-")[0] for name in files} == {"train", "validation", "README.md"}
        assert ("datasets", "someone/sounds") in hub.private

        buffer = io.BytesIO()
        clips.to_parquet(buffer)
        hub.files["datasets", "someone/clips"] = {"data/train-00000-of-00001.parquet": buffer.getvalue()}
        result = subprocess.run(
            [sys.executable, "-c", compare], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert result.stdout.endswith("the same\n"), result.stderr
    loaded, streamed = (load_from_disk(tmp_path / name) for name in ("clips", "clips--streaming"))
    assert {name: split[:] for name, split in loaded.items()} == {name: split[:] for name, split in streamed.items()}
    assert len({caption for split in loaded.values() for caption in split["caption"]}) == 36


def test_a_push_that_fails_keeps_the_dataset(tmp_path, sounds, capsys):
    message = f"^The dataset is complete in {tmp_path}/out, but could not be pushed to someone/sounds: .*offline"
    with pytest.raises(UserError, match=message) as caught:
        build(sounds, tmp_path / "out", "--push_to_hub", "someone/sounds")
    assert "\n" not in str(caught.value)
    assert sum(load_from_disk(tmp_path / "out").num_rows.values()) == 39
    before = contents(tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(UserError, match=message):  # what is missing is the push, and no more is done again
        build(sounds, tmp_path / "out", "--push_to_hub", "someone/sounds", "--resume")
    assert capsys.readouterr().out == f"The dataset in {tmp_path}/out is finished already.\n"
    assert contents(tmp_path / "out") == before


def test_what_was_rejected_is_known_when_it_is_finished_already(tmp_path):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    soundfile.write(sounds / "a.wav", synthesize("plucks", 1.5, 8000), 8000)
    (sounds / "b\u2028.wav").write_bytes(b"no sound")
    for flags in ["--strict"], ["--strict", "--resume"]:
        with pytest.raises(UserError, match=f"^--strict: 1 files were rejected, see {tmp_path}/out/rejects.jsonl.$"):
            build(sounds, tmp_path / "out", *flags)
    build(sounds, tmp_path / "out", "--resume")
