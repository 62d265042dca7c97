"""Recordings to rows, against the same recordings read at once by librosa and cut by hand."""

import io
import math
from pathlib import Path

import librosa
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from tonefield import MelSpectrogram
from tonefield.command_line import UserError
from tonefield.data.audio_folder import Recording
from tonefield.data.dataset_builder import Part
from tonefield.data.loudness import integrated_loudness
from tonefield.data.mel_converter import MelConverter
from tonefield.data.synthetic import synthesize


HALF = 2**-12 + 1e-5  # the most that rounding to float16 changes in [-1, 1], and some for float32


def noise(path: Path, seconds: float, rate: int = 8000, level: float = 0.1, **options) -> Path:
    samples = level * np.random.default_rng(len(path.name)).standard_normal(round(seconds * rate))
    soundfile.write(path, samples, rate, **options)
    return path


def convert(*files, preset="fsdd-64", pad="overlap", silence_db=-60.0, loudness=None, images=False, limit=None, **mel):
    front_end = MelSpectrogram.from_preset(preset, **mel)
    converter = MelConverter(front_end, Features(), pad, silence_db, loudness, images)
    part = Part(0, "train", [Recording(file.name, file) for file in files], limit=limit)
    tables = []
    for table in converter.convert(part):
        tables.append(table)
        part.rows += len(table)
        if part.rows == limit:
            break
    rows = Dataset(pa.concat_tables(tables)).with_format("numpy")[:] if tables else {}
    return rows, part, converter


def slices_by_hand(waveform: np.ndarray, size: int, pad: str) -> list[tuple[int, int, np.ndarray]]:
    """(start, samples that are not padding, samples) of each slice."""
    result = [(i * size, size, waveform[i * size : (i + 1) * size]) for i in range(len(waveform) // size)]
    rest = len(waveform) % size
    if rest and pad == "overlap" and result:
        result.append((len(waveform) - size, size, waveform[-size:]))
    elif rest and pad != "drop":
        result.append((len(waveform) - rest, rest, np.pad(waveform[-rest:], (0, size - rest))))
    return result


# ----- slices


@pytest.mark.parametrize("preset, rate, size, seconds", [
    ("fsdd-64", 8000, 8191, (0.3, 8191 / 8000, 8192 / 8000, 2 * 8191 / 8000, 75)),
    ("bigvgan_v2_22khz_80band_256x", 44100, 65536, (1, 19.5)),
])  # fmt: skip
@pytest.mark.parametrize("pad", ["overlap", "pad", "drop"])
def test_rows_are_the_slices_of_the_recordings(tmp_path, preset, rate, size, seconds, pad):
    """The last file of each row is several blocks long, and has samples that are in no whole slice."""
    files = [noise(tmp_path / f"{i}.wav", length, rate) for i, length in enumerate(seconds)]
    rows, part, converter = convert(*files, preset=preset, pad=pad)
    mel = converter.mel
    expected = []
    for file in files:
        waveform = librosa.load(file, sr=mel.config.sample_rate)[0]
        slices = slices_by_hand(waveform, size, pad)
        expected += [(file.name, number, *cut) for number, cut in enumerate(slices)]
    names, numbers, starts, valid, samples = zip(*expected, strict=True)
    assert list(rows["audio_file"]) == list(names)
    assert list(rows["slice"]) == list(numbers)
    assert list(rows["start_sample"]) == list(starts)
    assert list(rows["valid_frames"]) == [math.ceil(count / mel.config.hop_length) for count in valid]
    mels = mel.encode(torch.from_numpy(np.stack(samples))).numpy()
    assert mels.std() > 0.02
    np.testing.assert_allclose(rows["mel"], mels, atol=HALF)
    assert abs(part.seconds - sum(seconds)) < 1e-3
    too_short = [
        file.name for file, length in zip(files, seconds, strict=True) if length * mel.config.sample_rate < size
    ]
    assert [name for name, _ in part.rejects] == (too_short if pad == "drop" else [])


def test_why_a_short_recording_is_dropped(tmp_path):
    _, part, _ = convert(noise(tmp_path / "a.wav", 0.5), pad="drop")
    assert part.rejects == [
        ("a.wav", "is shorter than one slice (0.50 s, a slice is 1.02 s; --pad pad keeps it)"),
    ]  # fmt: skip


def test_a_long_recording_is_never_in_memory_as_a_whole(tmp_path):
    mel = MelSpectrogram.from_preset("fsdd-64", num_frames=16)
    part = Part(0, "train", [Recording("a.wav", noise(tmp_path / "a.wav", 130))])
    tables = MelConverter(mel, Features(), "overlap", -60, None, False).convert(part)
    read = []
    for table in tables:
        read.append(part.seconds)
        part.rows += len(table)
    assert 30 < read[0] < 40 and read == sorted(read) and read[-1] == 130


def test_slices_of_many_recordings_share_a_batch(tmp_path):
    files = [noise(tmp_path / f"{'x' * (i % 7)}{i}.wav", 0.5) for i in range(70)]
    rows, _, converter = convert(*files)
    assert list(rows["audio_file"]) == [file.name for file in files]
    alone = [
        converter.mel.encode(torch.from_numpy(np.pad(librosa.load(f, sr=8000)[0], (0, 4191)))[None]) for f in files
    ]
    np.testing.assert_allclose(rows["mel"], torch.cat(alone).numpy(), atol=HALF)


def test_silent_slices_are_skipped_and_counted(tmp_path):
    size = 8191
    for level, kept in (10 ** (-50.1 / 20), [0, 2]), (10 ** (-49.9 / 20), [0, 1, 2]):
        samples = np.concatenate([np.full(size, 0.5), np.full(size, level), np.full(size, 0.5), np.zeros(size)])
        soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
        rows, part, _ = convert(tmp_path / "a.wav", silence_db=-50)
        assert list(rows["slice"]) == kept and list(rows["start_sample"]) == [number * size for number in kept]
        assert part.skipped == 4 - len(kept) and part.rejects == []


# ----- recordings that are bad


def test_a_bad_recording_costs_nothing_but_itself(tmp_path):
    good = [noise(tmp_path / "a.wav", 2), noise(tmp_path / "cc.wav", 3)]
    (tmp_path / "b.wav").write_bytes(b"no sound")
    mixed, part, _ = convert(good[0], tmp_path / "b.wav", tmp_path / "missing.wav", good[1])
    alone, _, _ = convert(*good)
    assert list(mixed["audio_file"]) == list(alone["audio_file"]) == ["a.wav"] * 2 + ["cc.wav"] * 3
    np.testing.assert_array_equal(mixed["mel"], alone["mel"])
    assert part.rejects == [
        ("b.wav", "cannot be read as audio (Format not recognised)"),
        ("missing.wav", "cannot be opened (No such file or directory)"),
    ]


def test_what_comes_before_the_damage_is_kept(tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(80 * 8000)
    samples[70 * 8000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    rows, part, _ = convert(tmp_path / "a.wav")
    whole = 2 * 2**18 // 8191 - 1  # of the two blocks before, but for the last slice that the end may overlap
    assert list(rows["slice"]) == list(range(whole))
    reason = f"holds a sample that is not a finite number at 70.000 s; the {whole} slices before are kept"
    assert part.rejects == [("a.wav", reason)]


def test_a_recording_without_sound():
    converter = MelConverter(MelSpectrogram.from_preset("fsdd-64"), Features(), "overlap", -60, None, False)
    part = Part(0, "train", [Recording("a", None)])
    assert list(converter.convert(part)) == []
    assert part.rejects == [("a", "has neither a file nor data")]


# ----- levels


def test_loudness(tmp_path):
    quiet = 0.02 * synthesize("pads", 5, 8000)
    click = quiet.copy()
    click[20000] = 0.9
    for name, samples in ("a.wav", quiet), ("b.wav", click), ("c.wav", np.zeros(16000)):
        soundfile.write(tmp_path / name, samples, 8000, subtype="FLOAT")
    files = [tmp_path / f"{name}.wav" for name in "abc"]
    rows, _, converter = convert(*files, loudness=-23, silence_db=-math.inf)
    assert list(rows["audio_file"]) == ["a.wav"] * 5 + ["b.wav"] * 5 + ["c.wav"] * 2
    gains = [10 ** (rows["gain_db"][i] / 20) for i in (0, 5, 10)]
    assert abs(integrated_loudness([quiet * gains[0]], 8000) - -23) < 1e-3
    assert abs(gains[1] - 0.99 / 0.9) < 1e-6 and integrated_loudness([click * gains[1]], 8000) < -24
    assert gains[2] == 1
    for first, samples, gain in zip((0, 5), (quiet, click), gains, strict=False):
        assert (rows["gain_db"][first : first + 5] == rows["gain_db"][first]).all()
        expected = converter.mel.encode(converter.mel.slices(torch.from_numpy(samples * np.float32(gain)), "overlap"))
        np.testing.assert_allclose(rows["mel"][first : first + 5], expected.numpy(), atol=HALF)
    plain, _, _ = convert(*files[:1])
    assert "gain_db" not in plain
    assert np.abs(plain["mel"] - rows["mel"][:5]).max() > 0.1


def test_reference_of_each_slice_restores_its_level(tmp_path):
    soundfile.write(tmp_path / "a.wav", synthesize("plucks", 4, 8000), 8000)
    fixed, _, _ = convert(tmp_path / "a.wav")
    relative, _, _ = convert(tmp_path / "a.wav", ref="slice")
    assert "ref_db" not in fixed and relative["ref_db"].std() > 0.3
    assert (relative["mel"].max((1, 2, 3)) == 1).all()
    decibels = [(rows["mel"].astype(np.float64) + 1) * 40 - 80 for rows in (fixed, relative)]
    restored = decibels[1] + relative["ref_db"][:, None, None, None]
    heard = decibels[0] > -79
    assert heard.mean() > 0.3
    np.testing.assert_allclose(restored[heard], decibels[0][heard], atol=0.05)


# ----- columns


@pytest.mark.parametrize("mel", [{}, {"ref": "slice"}])
def test_images_are_those_of_the_exact_mels(tmp_path, mel):
    samples = synthesize("drums", 3, 8000)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    front_end = MelSpectrogram.from_preset("fsdd-64", **mel)
    converter = MelConverter(front_end, Features(), "overlap", -60, None, True)
    (table,) = converter.convert(Part(0, "train", [Recording("a.wav", tmp_path / "a.wav")]))
    expected = front_end.to_image(front_end.encode(front_end.slices(torch.from_numpy(samples), "overlap")))
    for stored, decoded, picture in zip(table["image"].to_pylist(), Dataset(table)["image"], expected, strict=True):
        image = Image.open(io.BytesIO(stored["bytes"]))
        assert image.format == "PNG" and image.mode == decoded.mode == "L" and image.size == (64, 64)
        np.testing.assert_array_equal(np.array(image), np.array(picture))
        np.testing.assert_array_equal(np.array(decoded), np.array(picture))


def test_columns_of_the_recordings_come_along(tmp_path):
    file = noise(tmp_path / "a.wav", 2)
    columns = Features(caption=Value("string"), tags=[Value("string")], bpm=Value("float64"))
    values = {"caption": "noise", "tags": ["a", "b"], "bpm": None}
    converter = MelConverter(MelSpectrogram.from_preset("fsdd-64"), columns, "overlap", -60, None, False)
    (table,) = converter.convert(Part(0, "train", [Recording("a.wav", file, 0, values)]))
    for row in Dataset(table):
        assert {name: row[name] for name in columns} == values


@pytest.mark.parametrize("name, options", [
    ("mel", ()), ("front_end", ()), ("gain_db", (-20.0, False)), ("image", (None, True)),
])  # fmt: skip
def test_a_column_whose_name_is_taken(name, options):
    mel = MelSpectrogram.from_preset("fsdd-64")
    with pytest.raises(
        UserError, match=f"^The recordings come with a column '{name}', a name that is taken: rename it.$"
    ):
        MelConverter(mel, Features({name: Value("string")}), "overlap", -60, *(options or (None, False)))
    if options:
        MelConverter(mel, Features({name: Value("string")}), "overlap", -60, None, False)


# ----- the record


@pytest.mark.parametrize("limit", [None, 70])
def test_statistics_are_those_of_the_rows(tmp_path, limit):
    files = [tmp_path / f"{kind}.wav" for kind in ("plucks", "drums")]
    for file in files:
        soundfile.write(file, 8 * synthesize(file.stem, 11.5, 8000), 8000, subtype="FLOAT")  # some of it too loud
    rows, part, converter = convert(*files, num_frames=16, top_db=40, limit=limit)
    statistics = converter.record(part.sums)["statistics"]
    mels = rows["mel"].astype(np.float64)
    assert statistics["slices"] == len(mels) == limit or (limit is None and 80 < len(mels) < 92)
    assert statistics["mean"] == pytest.approx(mels.mean(), abs=1e-9)
    assert statistics["std"] == pytest.approx(mels.std(), rel=1e-7)
    assert statistics["mean_norm"] == pytest.approx(np.sqrt((mels**2).sum((1, 2, 3))).mean(), rel=1e-7)
    assert statistics["floor_fraction"] == (mels == -1).mean() > 0.01
    assert statistics["ceiling_fraction"] == (mels == 1).mean() > 1e-4


def test_statistics_of_nothing_but_silence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(9000), 8000)
    _, part, converter = convert(tmp_path / "a.wav", silence_db=-math.inf)
    statistics = converter.record(part.sums)["statistics"]
    assert statistics["mean"] == -1 and statistics["std"] == 0 and statistics["floor_fraction"] == 1


def test_the_record_describes_the_front_end(tmp_path):
    _, part, converter = convert(noise(tmp_path / "a.wav", 2), top_db=60, ref="slice")
    record = converter.record(part.sums)
    again = MelSpectrogram(**record["front_end"])
    assert all(again.config[name] == value for name, value in converter.mel.config.items() if name[0] != "_")
    assert again.config.top_db == 60
    assert record["fingerprint"] == again.fingerprint() != MelSpectrogram.from_preset("fsdd-64").fingerprint()
    assert (record["format"], record["version"]) == ("tonefield-mel", 1)
