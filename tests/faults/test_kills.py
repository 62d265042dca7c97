"""A job that is killed, whenever that is, and started again until it ends, ends as one that was left alone."""

import random
import shutil
import time
from itertools import count

import pytest
from fault_checks import leave_alone, start_again


def kill_everywhere(runs, job, folder, stride):
    whole, ended = leave_alone(runs, job, folder / "whole")
    assert ended.operations > 20
    for number in range(1, ended.operations + 1, stride):
        place = folder / str(number)
        place.mkdir()
        ended = runs.run(job.script, job.flags(place), place, kill_at=number)
        if ended.status == 0:  # threads do not always do the same number of things
            continue
        assert ended.killed, ended.output
        start_again(runs, job, place, whole, f"killed at operation {number}")
        shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("name, stride", [
    ("images", 1), ("images with previews", 7), ("tokens", 2), ("unet", 2), ("vae", 11), ("sedd", 11),
    ("vae and latents", 7), ("codec", 3),
    ("inference", 1), ("evaluation", 1),
])  # fmt: skip
def test_killed_at_each_operation(runs, jobs, tmp_path, name, stride):
    """At each operation that changes files, in the middle of each write."""
    kill_everywhere(runs, jobs(name), tmp_path, stride)


@pytest.mark.slow
@pytest.mark.parametrize("name, kills", [
    ("images", 30), ("tokens", 30), ("unet", 30), ("vae", 8), ("sedd", 8), ("inference", 30), ("evaluation", 30),
    ("vae and latents", 8), ("codec", 15),
])  # fmt: skip
def test_killed_at_random_moments(runs, jobs, tmp_path, name, kills):
    """Up to six times in the same folder."""
    job, moments = jobs(name), random.Random(name)
    start = time.monotonic()
    whole, _ = leave_alone(runs, job, tmp_path / "whole")
    seconds = time.monotonic() - start
    for attempt in count():
        place = tmp_path / str(attempt)
        place.mkdir()
        for _ in range(6):
            finished = job.finished(place)
            ended = runs.run(job.script, job.flags(place), place, seconds=moments.uniform(0, 1.1 * seconds))
            assert ended.killed or ended.status == 0, ended.output
            kills -= ended.killed
            if not ended.killed:
                assert finished <= job.kept(place, ended.output) and job.result(place) == whole
                break
        else:
            start_again(runs, job, place, whole, "killed six times")
        shutil.rmtree(place)
        if kills <= 0:
            return
