"""A run that is interrupted, watched or divided differently is the same run."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training_runs import differences, start, train

from tonefield.command_line import UserError
from tonefield.training import validation
from tonefield.training.interruption import REASONS, Interruption


# Adam divides by the gradient: with its usual epsilon the rounding of a gradient that should be 0 is a full step.
TOGETHER = ("--train_batch_size=8", "--gradient_accumulation_steps=1")
SMOOTH = ("--adam_epsilon=0.01", "--dropout=0", "--learning_rate=0.05", "--max_train_steps=4")


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_training(first, second, movement=0.01, tolerance=2e-5):
    """Equal up to rounding, which is far less than what the training changed."""
    ours, theirs = weights(first), weights(second)
    moved = max((weights(first / "checkpoint-1")[name] - ours[name]).abs().max().item() for name in ours)
    assert moved > movement
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_kill_and_resume_is_exact(uninterrupted, mels, tmp_path):
    # What it validates after step 4 takes so long that it will not have ended before it is killed.
    flags = ("--checkpointing_steps=4", "--validation_steps=4", "--resume_from_checkpoint=latest")
    process = start(tmp_path, mels, *flags)
    wait_for(tmp_path / "checkpoint-4", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-8").exists()
    (tmp_path / ".checkpoint-7.partial").mkdir()  # as one that was killed while it saved leaves it behind
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')  # and as a full disk does
    train(tmp_path, mels, *flags)
    assert not (tmp_path / ".checkpoint-7.partial").exists()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [(row["step"], "validation_loss" in row) for row in rows]
    assert told == [(step, validated) for step in range(1, 9) for validated in (False, True)[: 1 + (step % 4 == 0)]]
    assert differences(tmp_path / "checkpoint-8", uninterrupted / "checkpoint-8") == []
    assert len(differences(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-8")) > 100


def test_saving_validating_and_workers_change_nothing(uninterrupted, mels, tmp_path):
    flags = ("--checkpointing_steps=3", "--validation_steps=2", "--logging_steps=5", "--dataloader_num_workers=2")
    train(tmp_path, mels, *flags, "--checkpoints_total_limit=2")
    assert differences(tmp_path / "checkpoint-8", uninterrupted / "checkpoint-8") == []
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-6", "checkpoint-8"}
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "validation_loss" in row] == [2, 4, 6, 8]
    assert {path.name for path in (tmp_path / "samples").glob("*0002*")} == {
        "step-0000002.png", "step-0000002-0.wav", "step-0000002-1.wav"
    }  # fmt: skip


def test_dropout_is_that_of_the_sample(uninterrupted, mels, tmp_path, monkeypatch):
    """Whatever else draws from torch's own generator meanwhile: here the validation."""
    draw = validation.draw_samples

    def draw_more(*args):
        torch.rand(7)
        return draw(*args)

    monkeypatch.setattr(validation, "draw_samples", draw_more)
    train(tmp_path, mels, "--validation_steps=3")
    assert differences(tmp_path / "checkpoint-8", uninterrupted / "checkpoint-8") == []


def test_another_seed_is_another_run(uninterrupted, mels, tmp_path):
    train(tmp_path, mels, "--seed=1")
    assert len(differences(tmp_path / "checkpoint-8", uninterrupted / "checkpoint-8")) > 100


@pytest.fixture(scope="module")
def one_process(mels, tmp_path_factory):
    flags = ("--objective=stable_target", "--field_batch_size=16", "--checkpointing_steps=1")
    return train(tmp_path_factory.mktemp("one"), mels, *SMOOTH, *TOGETHER, *flags)


def test_accumulation_equals_a_large_batch(mels, tmp_path):
    together = train(tmp_path / "together", mels, *SMOOTH, *TOGETHER, "--checkpointing_steps=1")
    flags = ("--train_batch_size=2", "--gradient_accumulation_steps=4")
    assert_same_training(together, train(tmp_path / "divided", mels, *SMOOTH, *flags))
    # After a single batch, too: it is no part of the next step.
    shutil.copytree(together / "checkpoint-1", tmp_path / "later" / "checkpoint-1")
    later = train(tmp_path / "later", mels, *SMOOTH, *flags, "--resume_from_checkpoint=latest")
    assert_same_training(together, later)


def test_two_processes_equal_one(one_process, mels, tmp_path):
    # `accelerate launch --cpu` starts one process, however many it is asked for.
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    flags = ("--objective=stable_target", "--field_batch_size=16", "--train_batch_size=4", "--validation_steps=4")
    process = start(tmp_path, mels, *SMOOTH, *flags, "--gradient_accumulation_steps=1", launcher=launcher)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert_same_training(one_process, tmp_path)
    losses = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (one_process, tmp_path)]
    for one, two in zip(*losses, strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert "validation_loss" in losses[1][-1]
    assert {p.name for p in (tmp_path / "checkpoint-4").glob("random_states*")} == {
        "random_states_0.pkl", "random_states_1.pkl"
    }  # fmt: skip


def leave_by(number, mels, folder, status):
    """A run that a signal to all its processes ends, those that read the data among them; the step it ended at."""
    endless = ("--max_train_steps=100000", "--logging_steps=1000", "--dataloader_num_workers=2")
    flags = ("--checkpointing_steps=2", "--checkpoints_total_limit=1", *endless)
    process = start(folder, mels, *flags, start_new_session=True)
    wait_for(folder / "checkpoint-2", process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status, output
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert f"stopped at step {step} by {number.name}" in output
    return step, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_leave(mels, tmp_path, number):
    step, _ = leave_by(number, mels, tmp_path, 75)
    train(tmp_path, mels, "--resume_from_checkpoint=latest", f"--max_train_steps={step + 1}")
    assert (tmp_path / f"checkpoint-{step + 1}").is_dir()
    assert (tmp_path / "model_index.json").exists() or (tmp_path / "unet").is_dir()


def test_control_c_saves_and_leaves(mels, tmp_path):
    _, output = leave_by(signal.SIGINT, mels, tmp_path, 130)
    assert "a checkpoint is saved after this step. Ctrl-C again stops at once" in output
    assert "Traceback" not in output


def test_the_second_control_c_waits_for_nothing():
    before = signal.getsignal(signal.SIGINT)
    with Interruption(None) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert REASONS[interruption.due()] == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Interruption(None) as interruption:  # what a cluster says goes before, and stays
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert REASONS[interruption.due()] == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) is before


def test_max_hours(mels, tmp_path, capsys):
    train(tmp_path, mels, "--max_hours=1e-9")
    assert "stopped at step 1 by --max_hours" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-1").is_dir()
    assert weights(tmp_path)
    assert "| optimizer steps | 1 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("damage", ["truncate", "change", "delete", "no state"])
def test_a_damaged_checkpoint_is_skipped(uninterrupted, mels, tmp_path, damage, caplog):
    train(tmp_path, mels, "--checkpointing_steps=3", "--max_train_steps=7", "--lr_scheduler=constant_with_warmup")
    newest = tmp_path / "checkpoint-7"
    victim = newest / "unet_ema" / "diffusion_pytorch_model.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(data[:-100])
    elif damage == "change":
        data[-100] ^= 1
        victim.write_bytes(data)
    elif damage == "delete":
        victim.unlink()
    else:
        (newest / "state.json").unlink()
    flags = ("--lr_scheduler=constant_with_warmup", "--checkpoints_total_limit=5")
    train(tmp_path, mels, "--resume_from_checkpoint=latest", *flags)
    assert "checkpoint-7 is damaged and skipped" in caplog.text
    assert (tmp_path / "checkpoint-8").is_dir()
    if damage == "truncate":
        reference = train(tmp_path / "reference", mels, "--lr_scheduler=constant_with_warmup")
        assert differences(tmp_path / "checkpoint-8", reference / "checkpoint-8") == []
        with pytest.raises(UserError, match=r"checkpoint-7 is damaged: unet_ema/.* is not what was written"):
            train(tmp_path / "more", mels, f"--resume_from_checkpoint={newest}")


def test_latest_without_a_checkpoint_begins(uninterrupted, mels, tmp_path, caplog):
    train(tmp_path, mels, "--resume_from_checkpoint=latest")
    assert "begins at step 0" in caplog.text
    assert differences(tmp_path / "checkpoint-8", uninterrupted / "checkpoint-8") == []


def test_a_run_that_has_ended_only_writes_the_pipeline(uninterrupted, mels, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-8", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-6").mkdir()  # half removed
    train(tmp_path, mels, "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1")
    assert not (tmp_path / "checkpoint-6").exists()
    for name, value in weights(uninterrupted).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=0)


def test_a_stream_resumes_exactly(mels, tmp_path):
    stream = ("--streaming", "--shuffle_buffer=8", "--checkpointing_steps=6")
    train(tmp_path / "whole", mels, *stream)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    train(tmp_path / "parts", mels, *stream, "--resume_from_checkpoint=latest")
    assert differences(tmp_path / "parts" / "checkpoint-8", tmp_path / "whole" / "checkpoint-8") == []
