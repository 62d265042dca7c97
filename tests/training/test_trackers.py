"""What trackers are given, and precisions and trackers that are not there."""

import importlib.util
import io
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import reset_accelerate, train

from tonefield.command_line import UserError
from tonefield.training.checkpoints import Checkpoints
from tonefield.training.engines import DDP


def test_tensorboard_has_numbers_pictures_and_sounds(mels, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, mels, "--report_to=tensorboard", "--max_train_steps=2", "--validation_steps=2")
    (events,) = (tmp_path / "logs" / "tonefield").glob("events.*")
    tracked = accumulator.EventAccumulator(str(events), {"images": 0, "audio": 0, "scalars": 0})
    tracked.Reload()
    for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        for name in row.keys() - {"step"}:
            values = {event.step: event.value for event in tracked.Scalars(name)}
            assert values[row["step"]] == pytest.approx(row[name], rel=1e-6)
    (picture,) = tracked.Images("samples")
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    drawn = Image.open(tmp_path / "samples" / "step-0000002.png").convert("RGB")
    np.testing.assert_array_equal(shown, np.asarray(drawn))
    for index in range(2):
        (sound,) = tracked.Audio(f"samples/{index}")
        heard, rate = soundfile.read(io.BytesIO(sound.encoded_audio_string))
        written, _ = soundfile.read(tmp_path / "samples" / f"step-0000002-{index}.wav")
        assert (sound.step, rate) == (2, 4000)
        np.testing.assert_allclose(heard, written, atol=1e-4)
        assert np.abs(heard).max() > 0.01


def test_what_is_not_there_is_refused(mels, tmp_path):
    def refused(message, flag):
        with pytest.raises(UserError, match=message) as error:
            train(tmp_path, mels, flag)
        assert "\n" not in str(error.value)
        assert os.listdir(tmp_path) == []

    absent = next(name for name in ("dvclive", "clearml", "aim") if importlib.util.find_spec(name) is None)
    refused(f"--report_to {absent}: its package is not installed. Install {absent}", f"--report_to={absent}")
    refused("nonsense. Choose between .*tensorboard", "--report_to=nonsense")
    if not torch.cuda.is_available():
        refused("--mixed_precision fp16 needs a GPU: use bf16 or no", "--mixed_precision=fp16")


def test_the_loss_scaler_is_saved(tmp_path):
    """Only fp16 has one, and only GPUs have fp16. The scaler of the CPU is of the same class."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=24.0)
    checkpoints = Checkpoints(DDP(accelerator, torch.nn.Identity()), tmp_path, {})
    folder = checkpoints.save(1, {})
    accelerator.scaler.scale(torch.ones(1))  # it begins with the first loss
    accelerator.scaler.update(3.0)
    assert accelerator.scaler.get_scale() == 3
    checkpoints.restore(folder)
    assert accelerator.scaler.get_scale() == 24
