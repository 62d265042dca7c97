"""Recipes, and what a user sees of an error."""

import argparse
import sys

import pytest

from tonefield.command_line import UserError, first_line, make_parser, parse, run


@pytest.fixture
def parser():
    parser = make_parser("What it does.\n\n    an example\n")
    parser.add_argument("--rate", type=int, default=1)
    parser.add_argument("--level", type=float, default=0.0)
    parser.add_argument("--name", default="nobody")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--fast", action="store_true")
    return parser


def recipe(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return f"--config={tmp_path / 'recipe.yaml'}"


def refused(parser, argv, capsys) -> str:
    """The one line that is shown."""
    with pytest.raises(SystemExit) as caught:
        parse(parser, argv)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    return shown


def test_help_begins_with_the_docstring_and_keeps_its_lines(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(parser, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does.\n\n    an example\n" in shown and "--config FILE.yaml" in shown


def test_a_recipe_stands_for_flags(parser, tmp_path):
    path = recipe(tmp_path, "rate: 5\nlevel: -60\nname: a b=c\nseeds: [1, 2]\nfast: true\n")
    args = parse(parser, [path])
    assert (args.rate, args.level, args.name, args.seeds, args.fast) == (5, -60.0, "a b=c", [1, 2], True)
    assert args.config == str(tmp_path / "recipe.yaml")


def test_flags_win_wherever_they_stand(parser, tmp_path):
    path = recipe(tmp_path, "rate: 5\nname: recipe\nseeds: [1, 2]\n")
    for argv in ["--rate", "7", path, "--seeds", "3"], [path, "--seeds", "3", "--rate=7"]:
        args = parse(parser, argv)
        assert (args.rate, args.name, args.seeds) == (7, "recipe", [3])


def test_null_and_false_leave_a_default(parser, tmp_path):
    args = parse(parser, [recipe(tmp_path, "rate:\nname: null\nfast: false\n")])
    assert (args.rate, args.name, args.fast) == (1, "nobody", False)


def test_false_negates_a_flag_that_can_be_negated(tmp_path):
    import argparse

    parser = make_parser(None)
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True)
    assert parse(parser, []).ema
    assert not parse(parser, [recipe(tmp_path, "ema: false")]).ema


def test_values_are_checked_as_those_of_flags(parser, tmp_path, capsys):
    assert "--rate: invalid int value: 'fast'" in refused(parser, [recipe(tmp_path, "rate: fast")], capsys)


@pytest.mark.parametrize("text, message", [
    ("rates: 5", "sets 'rates', which is no flag of this script"),
    ("rat: 5", "sets 'rat', which is no flag of this script"),
    ("config: other.yaml", "sets 'config', which is no flag of this script"),
    ("help: true", "sets 'help', which is no flag of this script"),
    ("rate: [1", "is not YAML: "),
    ("- rate", "must consist of lines `flag: value`"),
    ("", "must consist of lines `flag: value`"),
])  # fmt: skip
def test_recipes_that_cannot_be_used(parser, tmp_path, capsys, text, message):
    shown = refused(parser, [recipe(tmp_path, text)], capsys)
    assert f"the recipe {tmp_path / 'recipe.yaml'} {message}" in shown


def test_recipes_that_cannot_be_read(parser, tmp_path, capsys):
    shown = refused(parser, ["--config", str(tmp_path / "none.yaml")], capsys)
    assert f"cannot read the recipe {tmp_path / 'none.yaml'}: No such file or directory" in shown
    (tmp_path / "binary.yaml").write_bytes(b"rate: \xff\xfe")
    assert "binary.yaml is not UTF-8 text" in refused(parser, ["--config", str(tmp_path / "binary.yaml")], capsys)
    assert "expected one argument" in refused(parser, ["--config"], capsys)


def test_flags_are_not_abbreviated(parser, capsys):
    assert "unrecognized arguments: --ra=5" in refused(parser, ["--ra=5"], capsys)


def test_a_recipe_cannot_run_code(parser, tmp_path, capsys):
    text = f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']"
    assert "is not YAML" in refused(parser, [recipe(tmp_path, text)], capsys)
    assert not (tmp_path / "made").exists()


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize("error, code", [
    (UserError("no such thing: make one"), "error: no such thing: make one"),
    (FileNotFoundError(2, "No such file", "a.txt"), "error: a.txt: No such file"),
    (OSError(28, "No space left on device"), "error: the operating system: No space left on device. Make room, and"
     " start the same command again."),
    (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_exit_status(error, code):
    with pytest.raises(SystemExit) as caught:
        run(raising(error), None)
    assert caught.value.code == code


@pytest.mark.parametrize("flags, said", [
    ({"output_dir": "out", "resume": True}, "error: out: No space left on device. Make room, and start the same"
     " command again with --resume."),
    ({"output_dir": "out", "resume_from_checkpoint": None}, "error: out: No space left on device. Make room, and start"
     " the same command again with --resume_from_checkpoint latest."),
    ({"out": "r.json"}, "error: r.json: No space left on device. Make room, and start the same command again."),
])  # fmt: skip
def test_a_full_disk_names_the_place_and_how_to_go_on(flags, said):
    with pytest.raises(SystemExit) as caught:
        run(raising(OSError(28, "No space left on device")), argparse.Namespace(**flags))
    assert caught.value.code == said


def test_success_and_defects():
    with pytest.raises(SystemExit) as caught:
        run(print, "done")
    assert caught.value.code == 0
    with pytest.raises(ZeroDivisionError):  # ours to mend: it keeps its traceback
        run(raising(ZeroDivisionError()), None)


def test_arguments_of_the_process(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--rate", "3"])
    assert parse(parser).rate == 3


def test_first_line():
    assert first_line(ValueError("\none\ntwo")) == "one"
    assert first_line(ConnectionError()) == "ConnectionError"
