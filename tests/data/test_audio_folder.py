"""What recordings a source holds, and what is known of them."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, Value, load_dataset

from tonefield.command_line import UserError
from tonefield.data.audio_files import read_audio
from tonefield.data.audio_folder import AudioColumn, AudioFolder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def columns(folder: Path | AudioFolder) -> dict[str, dict]:
    return {recording.name: recording.columns for recording in AudioFolder(folder)}


# ----- a folder


def test_every_recording_at_any_depth_in_the_order_of_names(tmp_path):
    touch(tmp_path, "b.WAV", "a/z.flac", "a/b/c/d.mp3", "a.ogg", "x.M4A")
    touch(tmp_path, ".hidden.wav", ".git/a.wav", "README.md", "LICENSE", "a/cover.jpg", "a/noext")
    folder = AudioFolder(tmp_path)
    assert [recording.name for recording in folder] == ["a.ogg", "a/b/c/d.mp3", "a/z.flac", "b.WAV", "x.M4A"]
    assert all(recording.audio == tmp_path / recording.name for recording in folder)
    assert sorted(folder.rejects) == [
        ("a/cover.jpg", "is not audio by its name (.jpg)"), ("a/noext", "is not audio by its name (no extension)"),
    ]  # fmt: skip
    assert not folder.features and not folder.warnings


def test_sizes_are_those_of_the_files(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"12345")
    (tmp_path / "b.wav").symlink_to("nowhere.wav")
    assert [recording.size for recording in AudioFolder(tmp_path)] == [5, 0]


def test_a_name_that_is_not_utf8_is_rejected(tmp_path):
    touch(tmp_path, "a.wav")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")).touch()
    except OSError:
        pytest.skip("this file system knows UTF-8 only")
    folder = AudioFolder(tmp_path)
    assert [recording.name for recording in folder] == ["a.wav"]
    assert folder.rejects == [("caf?.wav", "has a name that is not UTF-8: rename it")]


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "^--input_dir .*sounds does not exist.$"),
    (lambda path: path.touch(), "^--input_dir .*sounds is not a folder.$"),
    (lambda path: path.mkdir(), r"^There are no recordings in .*sounds \(looked for .aac .*.wav"),
    (lambda path: touch(path, "a.txt", "metadata.csv"), "^There are no recordings in"),
])  # fmt: skip
def test_no_recordings(tmp_path, make, message):
    make(tmp_path / "sounds")
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path / "sounds")


# ----- classes


def test_folders_are_classes(tmp_path):
    touch(tmp_path, "dog/a.wav", "cat/deep/b.wav", "cat/c.wav")
    folder = AudioFolder(tmp_path)
    assert folder.features == Features(label=ClassLabel(names=["cat", "dog"]))
    assert columns(tmp_path) == {"cat/c.wav": {"label": 0}, "cat/deep/b.wav": {"label": 0}, "dog/a.wav": {"label": 1}}


@pytest.mark.parametrize("names", [("cat/a.wav", "cat/b.wav"), ("cat/a.wav", "dog/b.wav", "c.wav")])
def test_one_folder_or_files_beside_the_folders_are_no_classes(tmp_path, names):
    touch(tmp_path, *names)
    assert not AudioFolder(tmp_path).features


# ----- metadata


def test_csv(tmp_path):
    touch(tmp_path, "a.wav", "sub/b.wav", "c.wav")
    (tmp_path / "metadata.csv").write_text(
        "file_name,caption,take,level,day,label,empty\n"
        'a.wav,"A bell, struck ""hard"".\nTwice.",1,-3.5,2024-02-29,bell,\n'
        "./sub/b.wav,NA,2,0,2024-03-01,a drum,\n"
        "c.wav,ö,,,,bell,\n"
    )
    folder = AudioFolder(tmp_path)
    assert folder.features == Features(
        caption=Value("string"), take=Value("int64"), level=Value("float64"), day=Value("date32"),
        label=ClassLabel(names=["a drum", "bell"]), empty=Value("string"),
    )  # fmt: skip
    a, b, c = (columns(tmp_path)[name] for name in ("a.wav", "sub/b.wav", "c.wav"))
    assert a["caption"] == 'A bell, struck "hard".\nTwice.' and b["caption"] == "NA" and c["caption"] == "ö"
    assert [row["take"] for row in (a, b, c)] == [1, 2, None]
    assert [row["level"] for row in (a, b, c)] == [-3.5, 0.0, None]
    assert [row["label"] for row in (a, b, c)] == [1, 0, 1]
    assert str(a["day"]) == "2024-02-29"


def test_a_long_csv_with_line_breaks_in_its_captions(tmp_path):
    """Such files are read in blocks, which must not end within a caption."""
    touch(tmp_path, "last.wav")
    caption = "one line\n" * 20
    filler = "".join(f'{i}.wav,"{caption}"\n' for i in range(20000))
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\n{filler}last.wav,done\n")
    folder = AudioFolder(tmp_path)
    assert folder.warnings == ["20000 rows of metadata name no file, the first one 0.wav"]
    assert columns(tmp_path) == {"last.wav": {"caption": "done"}}


def test_jsonl_with_lists_and_structures(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    rows = [
        {"file_name": "a.wav", "tags": ["x", "y"], "loop": True, "of": {"bars": 4}},
        {"file_name": "b.wav", "tags": [], "loop": None, "of": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = AudioFolder(tmp_path)
    schema = folder.features.arrow_schema
    assert str(schema.field("tags").type) == "list<item: string>" and str(schema.field("loop").type) == "bool"
    assert columns(tmp_path)["a.wav"] == {"tags": ["x", "y"], "loop": True, "of": {"bars": 4}}


def test_metadata_of_subfolders_is_relative_to_them_and_put_together(tmp_path):
    touch(tmp_path, "bells/a.wav", "drums/a.wav", "drums/b.wav")
    (tmp_path / "bells/metadata.csv").write_text("file_name,caption,bpm\na.wav,a bell,\n")
    (tmp_path / "drums/metadata.jsonl").write_text(
        '{"file_name": "a.wav", "bpm": 120, "kit": 1}\n{"file_name": "b.wav", "bpm": 90, "kit": 2}\n'
    )
    folder = AudioFolder(tmp_path)
    # Numbers that are given somewhere; folders are classes still, since no metadata has a label.
    assert {name: str(kind.dtype) for name, kind in folder.features.items()} == {
        "caption": "string", "bpm": "int64", "kit": "int64", "label": "int64",
    }  # fmt: skip
    assert columns(tmp_path) == {
        "bells/a.wav": {"caption": "a bell", "bpm": None, "kit": None, "label": 0},
        "drums/a.wav": {"caption": None, "bpm": 120, "kit": 1, "label": 1},
        "drums/b.wav": {"caption": None, "bpm": 90, "kit": 2, "label": 1},
    }
    assert not folder.warnings


def test_a_label_in_the_metadata_wins_over_folders_and_numbers_keep_their_order(tmp_path):
    names = [f"{place}/{i}.wav" for i in range(11) for place in "xy"]
    touch(tmp_path, *names)
    lines = [f"{name},{name.split('/')[1].removesuffix('.wav')}\n" for name in names]
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(lines))
    assert AudioFolder(tmp_path).features["label"].names == [str(i) for i in range(11)]
    assert all(f"/{row['label']}.wav" in name for name, row in columns(tmp_path).items())


def test_rows_and_files_that_do_not_meet(tmp_path):
    touch(tmp_path / "in", "a.wav", "b.wav", "c.wav")
    touch(tmp_path, "outside.wav")
    (tmp_path / "in" / "metadata.csv").write_text(
        f"file_name,label\n../outside.wav,x\n{tmp_path}/outside.wav,x\nsub/../b.wav,y\ngone.wav,z\n"
    )
    folder = AudioFolder(tmp_path / "in")
    assert folder.warnings == [
        "3 rows of metadata name no file, the first one ../outside.wav",
        "2 files have no row of metadata, the first one a.wav",
    ]
    assert folder.features["label"].names == ["y"]
    assert columns(tmp_path / "in") == {"a.wav": {"label": None}, "b.wav": {"label": 0}, "c.wav": {"label": None}}


@pytest.mark.parametrize("name, text, message", [
    ("metadata.csv", "file,caption\na.wav,x\n", "has no column 'file_name'; its columns are file, caption."),
    ("metadata.csv", "file_name,caption\na.wav,x,y\n", "metadata.csv cannot be read: .*Expected 2 columns, got 3"),
    ("metadata.csv", "", "metadata.csv cannot be read: Empty CSV file"),
    ("metadata.jsonl", '{"file_name": "a.wav"', "metadata.jsonl cannot be read: JSON parse error"),
    ("b/metadata.csv", "file_name,bpm\nc.wav,fast\n", "b/metadata.csv: column 'bpm' is string, elsewhere int64"),
])  # fmt: skip
def test_metadata_that_cannot_be_used(tmp_path, name, text, message):
    touch(tmp_path, "a.wav", "b/c.wav")
    (tmp_path / "metadata.csv").write_text("file_name,bpm\na.wav,120\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path)


# ----- a dataset with an audio column


@pytest.fixture
def sounds() -> Dataset:
    def wav(level: float) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(800, level), 8000, format="wav")
        return buffer.getvalue()

    rows = {
        "audio": [{"bytes": wav(0.25), "path": "x/one.wav"}, {"bytes": wav(0.5), "path": None}, None],
        "caption": ["first", None, "third"],
        "label": [1, 0, 1],
        "vector": [[1.0], [2.0], [3.0]],
    }
    features = Features(
        audio={"bytes": Value("binary"), "path": Value("string")}, caption=Value("string"),
        label=ClassLabel(names=["cat", "dog"]),
        vector=[Value("float32")],
    )  # fmt: skip
    return Dataset.from_dict(rows, features=features).cast_column("audio", Audio(decode=False))


def streamed(dataset: Dataset, tmp_path: Path):
    dataset.to_parquet(tmp_path / "sounds.parquet")
    return load_dataset("parquet", data_files=str(tmp_path / "sounds.parquet"), split="train", streaming=True)


@pytest.mark.parametrize("how", ["in memory", "iterable", "streamed"])
def test_audio_column(tmp_path, sounds, how):
    if how == "iterable":
        sounds = sounds.to_iterable_dataset()
    elif how == "streamed":
        sounds = streamed(sounds, tmp_path)
    source = AudioColumn(sounds, "audio")
    assert source.features == Features(caption=Value("string"), label=ClassLabel(names=["cat", "dog"]))
    assert source.warnings == ["column 'vector' is left out"]
    first, second, third = source
    assert [recording.name for recording in (first, second, third)] == ["one.wav", "00000001", "00000002"]
    assert first.columns == {"caption": "first", "label": 1} and second.columns == {"caption": None, "label": 0}
    assert (read_audio(first.audio, 8000) == 0.25).all() and (read_audio(second.audio, 8000) == 0.5).all()
    assert third.audio is None
    assert first.size == len(first.audio)


def test_a_column_of_paths(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(10, 0.25), 8000)
    (recording,) = AudioColumn(Dataset.from_dict({"file": [str(tmp_path / "a.wav")]}), "file")
    assert recording.name == "a.wav" and recording.audio == tmp_path / "a.wav"


def test_a_column_that_is_not_there_or_no_audio(sounds):
    with pytest.raises(UserError, match="no column 'sound'; its columns are audio, caption, label, vector"):
        AudioColumn(sounds, "sound")
    for column in "label", "vector":
        with pytest.raises(UserError, match=f"^Column '{column}' holds no audio but .*--audio_column"):
            AudioColumn(sounds, column)
