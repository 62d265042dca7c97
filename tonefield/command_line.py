"""What every script does alike: recipes under the flags, and one readable line for a user's error."""

import argparse
import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user can mend. The message names the value and the remedy; no traceback is shown."""


TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: what a job script starts again


class Interrupted(Exception):
    """
    A signal ended the work early; what was done is kept, and said already. `status` is what the script leaves with.
    """

    def __init__(self, status: int = TRY_AGAIN):
        super().__init__(status)
        self.status = status


def first_line(error: object) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# Control characters, line separators, marks that turn the direction of what follows, and bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text of others in one line that does nothing to a terminal but to be read there."""
    return UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), str(text))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"error: {printable(message)} (--help lists all flags)\n"
        )  # one line, without pages of usage above it


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help starts with a script's docstring and that takes a recipe with `--config`."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="a recipe: values for any of these flags; flags win over it"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses flags, with those of the `--config` recipe in front of them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = _Parser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config")
    path = recipe.parse_known_args(argv)[0].config
    return parser.parse_args((_recipe_flags(parser, path) if path else []) + argv)


def _recipe_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        # A few lines of them can stand for more than any memory holds.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            parser.error(f"the recipe {path} repeats a part of itself with *: write it out")
        recipe = yaml.safe_load(text)
    except OSError as error:
        parser.error(f"cannot read the recipe {path}: {error.strerror}")
    except UnicodeDecodeError:
        parser.error(f"the recipe {path} is not UTF-8 text")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        parser.error(f"the recipe {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"the recipe {path} must consist of lines `flag: value`")
    known = {option for action in parser._actions for option in action.option_strings}
    flags = []
    for name, value in recipe.items():
        flag = f"--{name}"
        if flag not in known or name in ("config", "help"):
            parser.error(f"the recipe {path} sets {name!r}, which is no flag of this script")
        if value is True:
            flags += [flag]
        elif value is False:
            flags += [f"--no-{name}"] if f"--no-{name}" in known else []
        elif isinstance(value, dict):
            flags += [f"{flag}={json.dumps(value)}"]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [f"{flag}={value}"]
    return flags


def command_of(launch: Sequence[str], args: argparse.Namespace, defaults: Any, left_out: Sequence[str]) -> str:
    """The call of a script that has these flags, whatever recipe they came from, and folders without their place."""
    words = list(launch)
    for name, value in vars(args).items():
        if name in left_out or value is None or value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            local = isinstance(value, str) and os.path.exists(value)  # which a long JSON does not upset
            words += [f"--{name}", Path(value).resolve().name if local else str(value)]
    return shlex.join(words)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> NoReturn:
    """Runs a script's `main` and leaves: status 0, 1 with one line for a user's error, 130 or 75 when interrupted."""
    try:
        main(args)
    except UserError as error:
        sys.exit(f"error: {printable(error)}")
    except OSError as error:  # a full disk, a missing permission
        folder = getattr(args, "output_dir", None) or getattr(args, "out", None)
        where = error.filename or folder or "the operating system"
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            flag = " with --resume" if hasattr(args, "resume") else ""
            flag = " with --resume_from_checkpoint latest" if hasattr(args, "resume_from_checkpoint") else flag
            remedy = f". Make room, and start the same command again{flag}."
        sys.exit(printable(f"error: {where}: {error.strerror or error}{remedy}"))
    except Interrupted as interrupted:
        sys.exit(interrupted.status)
    except RuntimeError as error:
        if not between_processes(error):
            raise
        sys.exit(f"error: this process cannot reach the others; has one ended, or does it hang? {first_line(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def between_processes(error: BaseException) -> bool:
    """Whether an error comes from what connects the processes of a run."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available():
        return False
    # Those of gloo have no type of their own.
    return isinstance(error, distributed.DistError) or (distributed.is_initialized() and "gloo" in str(error))
