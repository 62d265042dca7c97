"""What a run leaves on the disk: checkpoints, and the best network so far."""

import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from training_runs import reset_accelerate

from tonefield.command_line import UserError
from tonefield.training.checkpoints import Best, Checkpoints, find_checkpoint, list_checkpoints
from tonefield.training.engines import DDP


CONFIG = dict(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
              down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), sample_size=4)  # fmt: skip


@pytest.fixture
def network():
    return UNet2DModel(**CONFIG)


def mark(network, value):
    with torch.no_grad():
        network.conv_out.bias.fill_(value)
    return network


def kept(best, network):
    best.restore(mark(network, -1.0))
    return network.conv_out.bias[0].item()


def test_the_lowest_loss_of_the_last_stage_is_kept(network, tmp_path):
    best = Best(tmp_path, "unet", anew=True)
    assert kept(best, network) == -1  # nothing there yet
    for value, loss, stage, expected in [
        (1, math.nan, 0, -1), (2, 5.0, 0, 2), (3, 6.0, 0, 2), (4, 5.0, 0, 2), (5, 4.0, 0, 5), (6, 9.0, 1, 6),
        (7, 3.0, 0, 6), (8, math.inf, 1, 6), (9, 8.0, 1, 9),
    ]:  # fmt: skip
        best.offer(mark(network, float(value)), loss, step=value, stage=stage)
        assert kept(best, network) == expected, value
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_run_that_goes_on_remembers_and_a_new_one_forgets(network, tmp_path):
    Best(tmp_path, "unet", anew=True).offer(mark(network, 1.0), 5.0, step=1)
    again = Best(tmp_path, "unet", anew=False)
    again.offer(mark(network, 2.0), 6.0, step=2)
    assert kept(again, network) == 1
    new = Best(tmp_path, "unet", anew=True)
    assert kept(new, network) == -1
    new.offer(mark(network, 3.0), 7.0, step=1)
    assert kept(new, network) == 3


def test_a_damaged_best_network_is_told(network, tmp_path):
    best = Best(tmp_path, "unet", anew=True)
    best.offer(network, 5.0, step=1)
    (weights,) = best.folder.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{best.folder} is damaged: .* Delete it and continue with --resume_from_"):
        best.restore(network)
    best.note.write_text("{")  # what it was is not known any more, so the next one is better
    again = Best(tmp_path, "unet", anew=False)
    again.offer(mark(network, 2.0), 6.0, step=2)
    assert kept(again, network) == 2


# ----- checkpoints


def save(network, folder, steps, limit=None):
    """Checkpoints as a run leaves them, with an optimizer."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(DDP(accelerator, model), folder, {"unet": model}, limit)
    for step in steps:
        checkpoints.save(step, {"resume_at": None, "ema_step": 0, "run": {}})


def step_found(folder):
    path, state = find_checkpoint("latest", folder)
    assert path.name == f"checkpoint-{state['step']}"
    return state["step"]


@pytest.fixture
def logging():
    """Warnings of accelerate's logger need its state."""
    reset_accelerate()
    Accelerator(cpu=True)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "with garbage behind it": lambda file: file.write_bytes(file.read_bytes() + b"garbage"),
    "removed": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(
        (data := file.read_bytes())[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed(network, tmp_path, damage, caplog):
    save(network, tmp_path / "run", (2, 4))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    files = [path.relative_to(tmp_path) for path in (tmp_path / "run" / "checkpoint-4").rglob("*") if path.is_file()]
    assert len(files) >= 4 and step_found(tmp_path / "run") == 4
    for file in files:
        DAMAGES[damage](tmp_path / file)
        assert step_found(tmp_path / "run") == 2, file
        assert "checkpoint-4 is damaged and skipped: " in caplog.text
        shutil.copy(tmp_path / "whole" / file.relative_to("run"), tmp_path / file)
    assert step_found(tmp_path / "run") == 4
    for name in ("checkpoint-2", "checkpoint-4"):
        DAMAGES[damage](tmp_path / "run" / name / "unet" / "config.json")
    with pytest.raises(UserError, match=rf"^All checkpoints in {tmp_path / 'run'} are damaged: delete them to begin"):
        find_checkpoint("latest", tmp_path / "run")


def test_every_character_of_the_state_counts(network, tmp_path, logging):
    save(network, tmp_path, (1, 2))
    file = tmp_path / "checkpoint-2" / "state.json"
    text = file.read_text()
    number = text.index('"step": 2') + len('"step": ')
    for changed in (text[:number] + "3" + text[number + 1 :], json.dumps({"files": 5}), "[]", "5", '{"files": {}'):
        file.write_text(changed)
        assert step_found(tmp_path) == 1


def test_a_damaged_newer_checkpoint_does_not_crowd_out_a_whole_one(network, tmp_path, logging):
    save(network, tmp_path, (2, 9))
    (tmp_path / "checkpoint-9" / "unet" / "config.json").unlink()
    assert step_found(tmp_path) == 2
    save(network, tmp_path, (4,), limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-9"]
    assert step_found(tmp_path) == 4
    save(network, tmp_path, (9, 11), limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]
