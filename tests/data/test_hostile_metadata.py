"""What others wrote beside recordings, made to do harm: it is read as data, or refused in one line."""

import json
from pathlib import Path

import pytest
from datasets import Value
from PIL import Image

from tonefield import MelSpectrogram
from tonefield.audio_to_images import parse_args
from tonefield.command_line import UserError, printable, run
from tonefield.data.audio_folder import AudioFolder
from tonefield.data.loading import read_record, record_feature
from tonefield.data.pictures import contact_sheet, draw_sounds, shorten
from tonefield.training.data import standardized_front_end


ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for name in "a.wav", "b.wav":
        (tmp_path / "in" / name).touch()
    (tmp_path / "outside.wav").touch()
    return tmp_path / "in"


def opened(folder: Path, name: str, content: str | bytes) -> AudioFolder:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return AudioFolder(folder)


# ----- files beside recordings


@pytest.mark.parametrize("name", [
    "../outside.wav", "/etc/passwd", "{outside}", "C:\\x\\a.wav", "..\\a.wav", "a.wav\0", "\x1b[2Ja.wav", "a.wav/",
    "-rf", "~/a.wav", "a.WAV", "\ufeffa.wav", "http://localhost/a.wav", "file:a.wav", "n" * 300,
    "in/../../outside.wav",
])  # fmt: skip
def test_no_row_names_a_file_that_is_not_in_the_folder(folder, name):
    name = name.replace("{outside}", str(folder.parent / "outside.wav"))
    found = opened(folder, "metadata.jsonl", json.dumps({"file_name": name, "caption": "x"}))
    if name == "a.wav/":  # the same file
        assert [recording.columns["caption"] for recording in found] == ["x", None]
        return
    assert [recording.audio for recording in found] == [folder / "a.wav", folder / "b.wav"]
    assert [recording.columns["caption"] for recording in found] == [None, None]
    assert found.warnings[0].startswith("1 rows of metadata name no file")


@pytest.mark.parametrize("name, content, message", [
    ("metadata.csv", "file_name,caption\na.wav,x\n".encode("utf-16"), "cannot be read: CSV parse error"),
    ("metadata.csv", "file_name,caption\na.wav,café\n".encode("latin-1"), "column 'caption' is not UTF-8 text"),
    ("metadata.csv", bytes(range(256)) * 99, "cannot be read: CSV parse error"),
    ("metadata.csv", "file_name,tag,tag\na.wav,x,y\n", "has two columns 'tag': rename one of them.$"),
    ("metadata.csv", "file_name,file_name\na.wav,b.wav\n", "has two columns 'file_name'"),
    ("metadata.csv", "file_name" + ",c" * 10**5 + "\na.wav" + ",1" * 10**5, "has 100001 columns: leave all"),
    ("metadata.csv", "\n\nfile_name" + ",c" * 1000 + "\na.wav" + ",1" * 1000, "has 1001 columns"),
    ("metadata.csv", "file_name,caption\na.wav," + "x" * 2**21, "metadata.csv cannot be read: straddling"),
    ("metadata.jsonl", json.dumps({"file_name": "a.wav"} | {f"{i}": i for i in range(1000)}), "has 1001 columns"),
    # So much that Arrow, which follows by calling itself, would take the process down.
    ("metadata.jsonl", '{"file_name": "a.wav", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested more than 32 deep.$"),
    ("metadata.jsonl", '{"file_name": "a.wav", "x": ' + '{"a":\n' * 10**5, "nested more than 32 deep.$"),
    ("metadata.jsonl", '{"file_name": "a.wav", "label": ["x"]}', "column 'label' is list<item: string>: a label is a"),
    ("metadata.jsonl", '{"file_name": "a.wav", "label": {"x": 1}}', "column 'label' is struct<x: int64>"),
    ("metadata.jsonl", "[1, 2]", "cannot be read: JSON parse error"),
    ("metadata.jsonl", '{"file_name": "a.wav", "x": "\\ud800"}', "cannot be read: JSON parse error"),
])  # fmt: skip
def test_tables_that_are_none(folder, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        opened(folder, name, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_brackets_in_a_text_are_text(folder):
    text = '[[[{{{"\\' * 50 + "]}"
    rows = [{"file_name": "a.wav", "x": text, "deep": [[[[1]]]]}, {"file_name": "b.wav", "x": text}] * 3
    found = opened(folder, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert [recording.columns["x"] for recording in found] == [text, text]
    assert next(iter(found)).columns["deep"] == [[[[1]]]]
    assert found.warnings == ["4 rows of metadata replace an earlier one, the first a.wav"]


def test_captions_are_kept_as_they_are(folder):
    captions = ["\x1b]0;title\x07 \u202efdp \ufeff e\u0301 é <script>alert(1)</script>", "=cmd|' /C calc'!A0\n" * 1000]
    rows = [
        {"file_name": name, "caption": caption} for name, caption in zip(["a.wav", "b.wav"], captions, strict=True)
    ]
    found = opened(folder, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert [recording.columns["caption"] for recording in found] == captions
    assert found.features["caption"] == Value("string")


def test_a_byte_order_mark_and_a_quote_without_end(folder):
    found = opened(folder, "metadata.csv", '\ufefffile_name,caption\nb.wav,"x\na.wav,y\n')
    assert [recording.columns["caption"] for recording in found] == [None, "x\na.wav,y\n"]


# ----- what reaches a terminal


def test_printable():
    assert printable("a é 日本 \u200d\u0301 $\\n") == "a é 日本 \u200d\u0301 $\\n"
    assert printable("\x1b[31m\r\n\t\0\x7f\x9b") == r"\x1b[31m\r\n\t\x00\x7f\x9b"
    assert printable("\u202e\u2066\u2028\ud800") == r"\u202e\u2066\u2028\ud800"


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    def main(args):
        raise args

    for error in UserError("no class 'x\x1b[2J\ny'"), FileNotFoundError(2, "No such file", "x\x1b[2J\ny"):
        with pytest.raises(SystemExit) as caught:
            run(main, error)
        assert (
            "\n" not in caught.value.code and "\x1b" not in caught.value.code and r"x\x1b[2J\ny" in caught.value.code
        )
    with pytest.raises(SystemExit):
        parse_args(["--input_dir", "x", "--seed", "\x1b[31m"])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and shown.count("\n") == 1


# ----- titles of pictures


@pytest.mark.parametrize(
    "title", [r"$\frac$", "costs $5 and $6", "x" * 10**6, "a\nb" * 1000, "\x1b[31m\0\ud800", "日本"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_can_stand_above_a_picture(tmp_path, title):
    import torch

    sounds = torch.sin(torch.arange(4000) * 0.2)[None]
    draw_sounds(sounds, 8000, tmp_path / "one.png", [title])
    draw_sounds(sounds, 8000, tmp_path / "plain.png", ["plain"])
    contact_sheet([tmp_path / "one.png"], [title], tmp_path / "sheet.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "plain.png") as plain:
        assert one.size == plain.size
    assert len(shorten(title)) <= 40


# ----- recipes


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize("text, message", [
    (f"{LAUGHS}seed: *m\n", "repeats a part of itself with *: write it out"),
    ("input_dir: &a [*a]\n", "repeats a part of itself with *"),
    ("seed: !!python/object/apply:os.mkdir [made]", "is not YAML: could not determine a constructor"),
    ("seed: !!python/name:os.system ''", "is not YAML"), ("!!python/module:os ''", "is not YAML"),
    ("seed: !include /etc/passwd", "is not YAML"),
    ("seed: " + "[" * 1000, "is not YAML"), ("seed: " + "9" * 5000, "is not YAML: Exceeds the limit"),
    ("seed: \x1b[31m", "is not YAML: unacceptable character"), ("? [1, 2]\n: 3", "is not YAML: while constructing"),
    ("seed: 2024-01-01", "--seed: invalid int value: '2024-01-01'"), ("seed: .nan", "invalid int value: 'nan'"),
    ("seed: {a: 1}", "--seed: invalid int value"), ("1: 2", "sets 1, which is no flag"),
    ("---\nseed: 1\n---\nseed: 2", "is not YAML: expected a single document"),
])  # fmt: skip
def test_hostile_recipes(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse_args(["--input_dir", "x", "--config", "recipe.yaml"])
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and message in shown and shown.count("\n") == 1
    assert not Path("made").exists()


# ----- records of datasets


def record(**changes) -> dict:
    front_end = {name: value for name, value in MelSpectrogram.from_preset("fsdd-64").config.items() if name[0] != "_"}
    return {"format": "tonefield-mel", "front_end": front_end | changes, "statistics": {"mean": 0.0, "std": 0.5}}


@pytest.mark.parametrize("changes, message", [
    ({"n_fft": 10**9}, "n_fft is at most 65536, not 1000000000."), ({"n_mels": 10**9}, "n_mels is at most 1024"),
    ({"num_frames": 10**12}, "num_frames is at most"), ({"sample_rate": 10**12}, "sample_rate is at most"),
    ({"n_iter": 10**9}, "n_iter is at most"), ({"hop_length": -1}, "hop_length must be positive, not -1."),
    ({"n_fft": "512"}, "n_fft must be positive, not 512."), ({"n_fft": [512]}, "n_fft must be positive"),
    ({"top_db": float("nan")}, "top_db must be positive, not nan."), ({"top_db": float("inf")}, "top_db is at most"),
    ({"f_max": 1e-9}, "use fewer bands."), ({"trust": True}, "unexpected keyword argument 'trust'"),
])  # fmt: skip
def test_front_ends_of_no_sense_are_refused_before_they_take_memory(changes, message):
    told = json.loads(json.dumps(record(**changes)))
    with pytest.raises(UserError, match=r"^The record of the dataset's front end is damaged: ") as error:
        standardized_front_end(told)
    assert message in str(error.value)


def test_records_that_are_none():
    standardized_front_end(record())
    for statistics in {}, {"std": "1"}, [], {"std": 1}:
        with pytest.raises(UserError):
            standardized_front_end(record() | {"statistics": statistics})
    feature = record_feature({})
    for text in "[" * 10**5, "{", "[]", "null":
        feature.names = [text]
        with pytest.raises(UserError, match="has no column 'front_end' with the settings"):
            read_record({"front_end": feature})


# ----- answers of listeners


def test_hostile_answers(tmp_path):
    from tonefield import evaluate

    key = {
        "format": "tonefield listening key",
        "version": 1,
        "test": "t",
        "type": "mos",
        "items": {"i": {"sounds": ["s"]}},
    }
    (tmp_path / "key.json").write_text(json.dumps(key))
    sheet = {"format": "tonefield listening result", "version": 1, "test": "t", "listener": "x\x1b[2J"}
    answer = {"item": "i", "sounds": ["s"], "rating": 1, "seconds": 1}
    for content in [
        "[" * 10**5,
        json.dumps(sheet | {"answers": [answer | {"item": ["i"]}]}),
        json.dumps(sheet | {"answers": [answer | {"sounds": [{}, []]}]}),
        json.dumps(sheet | {"answers": [answer | {"rating": [1]}]}),
        json.dumps(sheet | {"answers": [answer | {"seconds": float("nan")}]}),
        json.dumps(sheet | {"answers": ["i"]}),
        json.dumps(sheet | {"answers": [], "test": {"$ref": "/etc/passwd"}}),
    ]:
        (tmp_path / "sheet.json").write_text(content)
        with pytest.raises(UserError, match=r"sheet\.json (is damaged|cannot be read|belongs)"):
            evaluate.main(
                evaluate.parse_args(
                    ["listening-results", str(tmp_path / "sheet.json"), "--key", str(tmp_path / "key.json")]
                )
            )
