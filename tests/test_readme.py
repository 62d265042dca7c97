"""Everything the README tells its readers to type is typed here, in the order in which it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from tonefield.data.synthetic import synthesize


ROOT = Path(__file__).parents[1]
PARTS = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
# Language, code, and the number of the section: what is typed into Python goes on with what was typed there before.
BLOCKS = [
    (language, code, section)
    for section, text in enumerate(PARTS)
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recordings that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    metadata = next(code for language, code, _ in BLOCKS if language == "csv")
    for index, line in enumerate(metadata.splitlines()[1:]):
        file = folder / "my_sounds" / line.split(",")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, synthesize("drums", 7.0, 22050, seed=index), 22050)
    (folder / "my_sounds" / "metadata.csv").write_text(metadata)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.fixture(scope="module")
def typed():
    """What is known in Python, for each section."""
    return {section: {} for _, _, section in BLOCKS}


@pytest.mark.parametrize("index", [i for i, (kind, *_) in enumerate(BLOCKS) if kind in ("python", "bash")])
def test_block(index, folder, typed, monkeypatch):
    language, code, section = BLOCKS[index]
    if language == "python":
        monkeypatch.chdir(folder)
        exec(compile(code, f"README.md, section {section}", "exec"), typed[section])
        return
    lines = [line.split("#")[0].strip() for line in code.splitlines()]
    for command in [shlex.split(line) for line in lines if line]:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        if command[0] == "python":
            command = [sys.executable, str(ROOT / command[1]), *command[2:]]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_dataset_holds_what_the_readme_says(folder):
    dataset = folder / "mels" / "my_sounds"
    assert (dataset / "previews" / "overview.png").stat().st_size > 10_000
    assert (dataset / "previews" / "000.wav").exists()
    assert (dataset / "rejects.jsonl").read_text() == ""


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
