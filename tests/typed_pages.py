"""What the tests of README.md and docs/ share: they type what a page tells its readers to type, in its order."""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from tonefield.data.synthetic import synthesize


ROOT = Path(__file__).parents[1]

# How pages are generated is no part of the package; its module knows how scripts are run and parsed.
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


@dataclass(frozen=True)
class Block:
    """A piece of code: its language, itself, its section, and where it stands."""

    language: str
    code: str
    section: int
    place: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block of bash, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks_of(page: Path) -> list[Block]:
    """All pieces of code of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        Block(
            match[1],
            match[2],
            len(re.findall(r"^## ", text[: match.start()], re.MULTILINE)),
            f"{page.relative_to(ROOT)}, line {text.count(chr(10), 0, match.start()) + 1}",
        )
        for match in found
    ]


def type_in(block: Block, known: dict) -> None:
    """Types a block of Python or bash in the folder where the process is; `known` are the names that Python knows."""
    if block.language == "python":
        exec(compile(block.code, block.place, "exec"), known)
        return
    for command in block.commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), block.place
            continue
        assert words[0] == "python", f"{block.place}: {command}"
        run_python(words[1:], block.place)


def run_python(words: list[str], place: str) -> None:
    """Runs what `python` is told to, as a process of its own would, but without its seconds of imports."""
    from training_runs import reset_accelerate

    reset_accelerate()
    try:
        build.run_python(words)
    except SystemExit as left:
        assert left.code in (None, 0), f"{place}: {' '.join(words)}\n{left.code}"


def make_recordings(folder: Path, metadata: str, seconds: float, rate: int) -> None:
    """A folder of made-up sounds with the names and captions of a `metadata.csv`."""
    for index, line in enumerate(metadata.splitlines()[1:]):
        file = folder / line.split(",")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, synthesize("drums", seconds, rate, seed=index), rate)
    (folder / "metadata.csv").write_text(metadata)


def make_strikes(folder: Path, count: int = 10, rate: int = 8000) -> None:
    """Drum hits in two classes, for pages that need more than a few files."""
    rng = np.random.default_rng(0)
    time = np.arange(rate) / rate
    for name, pitch, noise in (("kick", 80, 0.05), ("snare", 220, 0.7)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            tone = np.sin(2 * np.pi * pitch * rng.uniform(0.8, 1.2) * time)
            sound = (tone + noise * rng.standard_normal(rate)) * np.exp(-time * rng.uniform(6, 12))
            soundfile.write(folder / name / f"{index:02d}.wav", 0.4 * sound, rate)
