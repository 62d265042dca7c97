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
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recordings that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    metadata = next(code for language, code in BLOCKS if language == "csv")
    for index, line in enumerate(metadata.splitlines()[1:]):
        file = folder / "my_sounds" / line.split(",")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, synthesize("drums", 7.0, 22050, seed=index), 22050)
    (folder / "my_sounds" / "metadata.csv").write_text(metadata)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.mark.parametrize("index", [i for i, (language, _) in enumerate(BLOCKS) if language in ("python", "bash")])
def test_block(index, folder):
    language, code = BLOCKS[index]
    lines = [line.split("#")[0].strip() for line in code.splitlines()]
    if language == "python":
        commands = [[sys.executable, "-c", code]]
    else:
        commands = [shlex.split(line) for line in lines if line]
    for command in commands:
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
