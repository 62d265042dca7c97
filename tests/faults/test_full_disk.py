"""A job whose disk becomes full says so in one line; when there is room again it goes on, and nothing is missing."""

import shutil
import subprocess

import pytest
from fault_checks import leave_alone, start_again


REMEDIES = ("start the same command again", "run the same command with --resume", "--resume_from_checkpoint latest")


def assert_one_line(ended, folder):
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output
    line = ended.output.strip().splitlines()[-1]
    assert line.startswith("error: ") and str(folder) in line and any(remedy in line for remedy in REMEDIES), line
    assert sum(line.startswith("error: ") for line in ended.output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, stride", [
    ("images", 5), ("images with previews", 13), ("tokens", 9), ("unet", 7), ("vae", 23), ("sedd", 23),
    ("vae and latents", 17), ("codec", 7), ("inference", 3), ("evaluation", 2),
])  # fmt: skip
def test_full_from_some_write_on(runs, jobs, tmp_path, name, stride):
    """In the middle of one write, and all that follow; then there is room again."""
    job = jobs(name)
    whole, ended = leave_alone(runs, job, tmp_path / "whole")
    for number in range(1, ended.writes + 1, stride):
        place = tmp_path / str(number)
        place.mkdir()
        ended = runs.run(job.script, job.flags(place), place, full_at=number)
        if ended.status == 0:  # threads do not always do the same number of things
            continue
        assert_one_line(ended, place)
        start_again(runs, job, place, whole, f"full at write {number}")
        shutil.rmtree(place)


@pytest.fixture
def small_disk(tmp_path):
    """A disk in memory, and a way to set its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")

    resize("1g")
    yield disk, lambda size: resize(size, "remount")
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes", [
    ("images", ("64k", "160k")), ("tokens", ("256k", "700k")), ("unet", ("200k", "600k", "1m")),
    ("inference", ("64k",)), ("evaluation", ("4k", "40k")),
])  # fmt: skip
def test_a_small_disk(runs, jobs, tmp_path, small_disk, name, sizes):
    disk, resize = small_disk
    job, place = jobs(name), disk / "place"
    whole, _ = leave_alone(runs, job, place)
    shutil.rmtree(place)
    for size in sizes:
        resize(size)
        place.mkdir()
        ended = runs.run(job.script, job.flags(place), place)
        assert_one_line(ended, place)
        resize("1g")
        start_again(runs, job, place, whole, f"a disk of {size}")
        shutil.rmtree(place)
