"""Files and folders that are whole or not there: killed at each operation, on a full disk, with two runs at once."""

import ctypes.util
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from fault_runs import compile_faults

from tonefield.command_line import UserError
from tonefield.files import claim, tidy, write_sound, writing


ROOT = Path(__file__).resolve().parents[1]

# Processes that import nothing heavy. Each call gets a folder of its own, in which `prepare` has been.
FORKS = """
import ctypes, json, os, sys
from pathlib import Path
from tonefield.command_line import UserError
from tonefield.files import *
library, folder = sys.argv[1:]
faults = ctypes.CDLL(library)
"""


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    return compile_faults(tmp_path_factory.mktemp("faults"))


def walk(faults, folder, prepare, action, kind):
    """
    Does `action` in a process for each operation, which is killed at that operation or finds the disk full at that
    write; yields the folder and what the process said. The last one ends undisturbed.
    """
    program = (
        FORKS
        + f"""
for number in range(1, 200):
    place = Path(folder, str(number))
    place.mkdir(parents=True)
    os.chdir(place)
    {prepare}
    print(number, end=" ", flush=True)
    child = os.fork()
    if child == 0:
        faults.arm_faults(str(place).encode(), *{"(number, 0)" if kind == "killed" else "(0, number)"})
        try:
            {action}
        except UserError as error:
            print(json.dumps(str(error)), end=" ", flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if status == 0:
        break
"""
    )
    command = [sys.executable, "-c", program, faults, folder]
    env = os.environ | {"LD_PRELOAD": str(faults), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for line in ended.stdout.splitlines():
        number, _, said = line.partition(" ")
        said, _, status = said.rpartition(" ")
        yield folder / number, said, int(status)


WRITE = 'write_text(Path("a.txt"), "new " * 5000)'
WRITE_OLD = 'Path("a.txt").write_text("old")'
REPLACE_OLD = "[(Path(n).mkdir(), Path(n, 'x').write_text(n), Path(n, 'y').write_text(n)) for n in ('old', 'new')]; os.rename('old', 'place')"  # noqa: E501
REPLACE = 'replace_folder(Path("new"), Path("place"))'


def test_a_file_is_the_old_or_the_new_one(faults, tmp_path):
    contents, statuses = [], []
    for folder, _, status in walk(faults, tmp_path, WRITE_OLD, WRITE, "killed"):
        contents.append((folder / "a.txt").read_text())
        statuses.append(status)
    assert set(contents[:-1]) == {"old"} and contents[-1] == "new " * 5000
    assert len(contents) >= 4  # the file is made, written, and takes its place
    assert set(statuses[:-1]) == {-signal.SIGKILL}


def test_a_full_disk_leaves_the_old_file(faults, tmp_path):
    *full, (end, _, status) = walk(faults, tmp_path, WRITE_OLD, WRITE, "full")
    assert status == 0 and (end / "a.txt").read_text() == "new " * 5000
    assert full
    for folder, said, status in full:
        assert status == 1 and (folder / "a.txt").read_text() == "old"
        assert json.loads(said) == (
            "a.txt cannot be written: No space left on device. What was finished before is whole: make room, or mend"
            " what it is, and start the same command again."
        )


def test_a_folder_is_the_old_or_the_new_one(faults, tmp_path):
    found = []
    for folder, _, _ in walk(faults, tmp_path, REPLACE_OLD, REPLACE, "killed"):
        tidy(folder)
        found.append("".join(path.read_text() for path in sorted((folder / "place").iterdir())))
        assert not list(folder.glob(".*"))
    assert set(found) == {"oldold", "newnew"} and found == sorted(found, reverse=True)
    assert found.count("newnew") >= 3 and found.count("oldold") >= 2  # what was set aside is removed piece by piece


def test_tidy_removes_what_is_half_written(tmp_path):
    (tmp_path / ".checkpoint-4.partial").mkdir()
    (tmp_path / ".checkpoint-4.partial" / "x").touch()
    (tmp_path / ".report.json.partial").touch()
    (tmp_path / "unet").mkdir()
    for name in (".hidden", ".tmpabc123", "unet/.tmpPyDKlh", "unet/.tmp", "unet/config.json"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        ".hidden", "unet", "unet/.tmp", "unet/config.json",
    }  # fmt: skip


def test_sounds_are_whole_as_well(faults, tmp_path):
    write_sound(tmp_path / "a.flac", [0.0, 0.5, -0.5, 0.25], 8000)
    assert soundfile.info(tmp_path / "a.flac").format == "FLAC"
    assert soundfile.read(tmp_path / "a.flac")[0].tolist() == [0.0, 0.5, -0.5, 0.25]
    write = "import soundfile; write_sound(Path('a.wav'), [0.5] * 9000, 8000)"
    for folder, _, status in walk(faults, tmp_path, "pass", write, "killed"):
        assert (folder / "a.wav").exists() == (status == 0)
    for folder, said, status in walk(faults, tmp_path / "full", "pass", write, "full"):
        assert status == 0 or json.loads(said).startswith("a.wav cannot be written: ")
        assert (folder / "a.wav").exists() == (status == 0)


def test_only_what_tells_of_writing_is_said_in_one_line(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(UserError, match=r"^here cannot be written: file write failed\. .*, and call\.$"):
        with writing(Path("here"), "call"):
            raise RuntimeError("file write failed.\nmore")
    with pytest.raises(UserError, match=r"^here cannot be written: No space left on device\."):
        with writing(Path("here")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_run_at_a_time(tmp_path):
    """The claim of a run that is killed ends with it, though a worker that it has forked lives on."""
    program = (
        FORKS
        + """
lock = claim(Path(folder))
if os.fork() == 0:
    input()
    os._exit(0)
print("claimed", flush=True)
import time
time.sleep(1000)
"""
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, ctypes.util.find_library("c") or "libc.so.6", str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=rf"^Another run is writing to {tmp_path} right now: wait for its end, or"):
            claim(tmp_path)
        other.kill()
        other.wait()
        claim(tmp_path).close()
        other.stdin.write("\n")  # the worker may end


def test_a_process_that_is_lost_is_no_full_disk(tmp_path):
    from torch.distributed import DistNetworkError

    with pytest.raises(DistNetworkError), writing(tmp_path / "checkpoint-3"):
        raise DistNetworkError("Connection reset by peer")
