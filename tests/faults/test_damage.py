"""Files that are damaged or go away between two starts, or while a run is at work, and two runs in one folder."""

import json
import shutil
import subprocess
import sys

import fault_jobs
import numpy as np
import pytest
from fault_checks import leave_alone, start_again
from training_runs import RECIPE, ROOT, train

from tonefield import evaluate, inference, train_unet
from tonefield.command_line import UserError
from tonefield.data.loading import load_split
from tonefield.training.data import Shares, open_data


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not text": lambda data: b"\xff\xfe" + data,
}


@pytest.fixture
def other_run():
    """Has another process work in a folder."""
    running = []

    def claim(folder):
        program = (
            "import sys; from pathlib import Path; from tonefield.files import claim; lock = claim(Path(sys.argv[1]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", f"{program}; print(1, flush=True); input()", str(folder)], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout.readline() == "1\n"

    yield claim
    for process in running:
        process.communicate("\n")


def make(script, job, folder):
    script.main(script.parse_args(list(map(str, job.flags(folder)))))


# ----- inference


@pytest.fixture(scope="module")
def sounds_made(tmp_path_factory):
    """A job of sounds, and the folder in which it has come to its end."""
    job = fault_jobs.inference_job(tmp_path_factory.mktemp("pipes"))
    folder = tmp_path_factory.mktemp("sounds") / "out"
    make(inference, job, folder)
    return job, folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest(sounds_made, tmp_path, damage):
    """The lines that can be read count, the others are made again."""
    job, whole = sounds_made
    folder = shutil.copytree(whole, tmp_path / "out")
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(DAMAGES[damage](manifest.read_bytes()))
    kept = job.finished(folder)
    assert len(kept) == {"cut short": 2, "empty": 0, "not text": 4}[damage]
    make(inference, job, folder)
    assert job.result(folder) == job.result(whole) and kept <= job.finished(folder)


def test_a_picture_or_a_sound_that_is_gone(sounds_made, tmp_path):
    job, whole = sounds_made
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "001.png").unlink()
    (folder / "003.wav").unlink()
    make(inference, job, folder)
    assert job.result(folder) == job.result(whole)


def test_two_runs_of_inference(sounds_made, tmp_path, other_run):
    job, whole = sounds_made
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "manifest.jsonl").unlink()
    other_run(folder)
    with pytest.raises(
        UserError, match=rf"^Another run is writing to {folder} right now: wait for its end, or choose"
    ):
        make(inference, job, folder)
    assert not list(folder.glob("manifest*"))


# ----- evaluation


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache(tmp_path, damage):
    """Whatever is damaged is computed again, and the numbers stay."""
    job, out = fault_jobs.evaluation_job(tmp_path / "sets"), tmp_path / "out"
    out.mkdir()
    make(evaluate, job, out)
    first = json.loads((out / "report.json").read_text())["results"]
    files = [path for path in (out / "cache").rglob("*") if path.is_file()]
    assert len(files) == 6  # of each set a note, rows and statistics
    for file in files:
        whole = file.read_bytes()
        if file.name == "rows.f32" and damage == "not text":
            continue  # other numbers of the same length cannot be told
        file.write_bytes(DAMAGES[damage](whole))
        make(evaluate, job, out)
        assert json.loads((out / "report.json").read_text())["results"] == first
        assert file.read_bytes() == whole


# ----- training


def test_two_runs_of_training(mels, tmp_path, other_run):
    other_run(tmp_path)
    (tmp_path / ".checkpoint-4.partial").mkdir()  # which the other one is writing
    with pytest.raises(UserError, match=rf"^Another run is writing to {tmp_path} right now"):
        train(tmp_path, mels, "--resume_from_checkpoint=latest")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".checkpoint-4.partial"}


def test_a_dataset_that_is_deleted_while_it_is_read(mels, tmp_path):
    folder = shutil.copytree(mels, tmp_path / "data")

    def batches(dataset):
        args = train_unet.parse_args([f"--config={RECIPE}", f"--dataset_name={dataset}", f"--output_dir={tmp_path}"])
        return iter(open_data(args).train.batches(Shares(4), 0))

    read, again = batches(folder), batches(mels)
    next(read), next(again)
    shutil.rmtree(folder)
    for _ in range(20):
        assert np.array_equal(next(read)["clean"], next(again)["clean"])


@pytest.mark.parametrize("name, damage", [
    ("train/data-00000-of-00001.arrow", "cut short"), ("train/data-00000-of-00001.arrow", "empty"),
    ("train/data-00000-of-00001.arrow", None), ("train/state.json", "cut short"), ("train/state.json", None),
    ("train/dataset_info.json", "cut short"), ("train/dataset_info.json", None), ("dataset_dict.json", "empty"),
    ("dataset_dict.json", "cut short"),
])  # fmt: skip
def test_a_damaged_dataset_is_told_in_one_line(mels, tmp_path, name, damage):
    folder = shutil.copytree(mels, tmp_path / "data")
    file = folder / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UserError, match=rf"^The dataset {folder} cannot be loaded: ") as told:
        load_split(str(folder))
    print(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_an_output_folder_that_is_deleted(runs, jobs, tmp_path):
    job = jobs("unet")
    whole, _ = leave_alone(runs, job, tmp_path / "whole")
    place = tmp_path / "place"
    place.mkdir()
    process = runs.start(job.script, [*job.flags(place), "--max_train_steps=100000", "--lr_scheduler=constant"], place)
    while process.is_alive() and not (place / "out" / "checkpoint-2").exists():
        process.join(0.01)
    for _ in range(100):  # it may make a file meanwhile
        shutil.rmtree(place / "out", ignore_errors=True)
        process.join(0.05)
    ended = runs.ended(process)
    assert ended.status == 1 and "Traceback" not in ended.output, ended.output
    assert ended.output.strip().splitlines()[-1].startswith(f"error: {place / 'out'}")
    shutil.rmtree(place / "out", ignore_errors=True)
    start_again(runs, job, place, whole, "deleted")
