"""Writes what can be read off the code into the pages of docs/: the flags of every script, the pictures.

    make docs

A page says where: what stands between `<!-- flags: python train_unet.py -->` and the next `<!-- end -->` are the flags
of that command, and between `<!-- names: METRICS -->` and `<!-- end -->` those of a table of evaluate.py.
"""

import argparse
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


DOCS = Path(__file__).resolve().parent
GENERATED = re.compile(r"(<!-- (flags|names): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


class _Found(Exception):
    """Carries a parser out of the script that made it."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command such as `python evaluate.py sampling` is about to read its flags with."""
    words = shlex.split(command)[1:]

    def found(parser, *_):
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found), mock.patch("os.cpu_count", return_value=0):
        try:
            run_python(words)
        except _Found as error:
            return error.args[0]
    raise LookupError(f"{command} reads no flags")


def run_python(words: list[str]) -> None:
    """What `python` followed by these words does, in this process; a script is looked for in the repository."""
    module = words[0] == "-m"
    argv = words[1:] if module else [str(DOCS.parent / words[0]), *words[1:]]
    beside = [] if module else [str(Path(argv[0]).parent)]  # where a script may import from
    with (
        mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", [*beside, *sys.path]),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # imported before: no harm
        if module:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")


def argument_of(action: argparse.Action) -> str:
    """What stands behind a flag, as `--help` shows it."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (action.option_strings and action.dest.upper()) or action.dest
    if action.choices is not None and action.metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(name, tuple):
        return " ".join(name)
    return f"{name} [{name} ...]" if action.nargs == "+" else str(name)


def cell(text: str) -> str:
    """A text for a table: neither the end of a cell nor HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def row(action: argparse.Action) -> str:
    """One flag, or argument, as a row of a table."""
    both_ways = isinstance(action, argparse.BooleanOptionalAction)
    shown = action.option_strings if both_ways else action.option_strings[:1] or [""]
    flag = ", ".join(f"`{' '.join(filter(None, (name, argument_of(action))))}`" for name in shown)
    if not both_ways and action.option_strings[1:]:
        flag += ", also " + ", ".join(f"`{name}`" for name in action.option_strings[1:])
    text = ((action.help or "") % vars(action)).replace(", here 1", "")  # which is this machine's
    if action.required and action.option_strings:
        text += " (required)"
    return f"| {cell(flag)} | {cell(text)} |"


def flags(command: str) -> Iterator[str]:
    """The flags of a command, a table for each of their groups."""
    for group in parser_of(command)._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        yield f"**{(group.title or 'options').capitalize()}**"
        if group.description:
            yield group.description
        yield "\n".join(["| flag | |", "|---|---|", *map(row, actions)])


def names(table: str) -> Iterator[str]:
    """The metrics or embeddings of evaluate.py, and what each is."""
    from tonefield.evaluation import metrics

    known = getattr(metrics, table)
    lines = {name: entry.help if table == "METRICS" else entry[0] for name, entry in known.items()}
    yield "\n".join(["| name | |", "|---|---|", *(f"| `{name}` | {cell(line)} |" for name, line in lines.items())])


def filled(text: str) -> str:
    """A page with everything between its marks anew."""

    def fill(found: re.Match) -> str:
        parts = (flags if found[2] == "flags" else names)(found[3])
        return f"{found[1]}\n" + "\n\n".join(parts) + f"\n\n{found[4]}"

    return GENERATED.sub(fill, text)


def pages() -> list[Path]:
    """All pages of docs/."""
    return sorted(DOCS.rglob("*.md"))


def main() -> None:
    import pictures

    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.draw_all(DOCS / "pictures")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
