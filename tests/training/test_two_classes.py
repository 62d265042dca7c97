"""Trained on two classes that differ in pitch, the network makes sounds of the class it is asked for."""

import random
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from training_runs import make_dataset, make_sounds, train

from tonefield.models import MelSpectrogram
from tonefield.schedulers import PoissonFlowScheduler
from tonefield.training.validation import draw_samples


FLAGS = (
    "--max_train_steps=400", "--train_batch_size=16", "--gradient_accumulation_steps=1", "--learning_rate=0.004",
    "--dropout=0", "--lr_warmup_steps=20", "--ema_max_decay=0.98", "--logging_steps=100",
)  # fmt: skip

HOP = "--hop_length=128"  # a quarter of the window: Griffin-Lim wants no less overlap


def spectral_centroid(sounds, sample_rate):
    power = torch.fft.rfft(sounds).abs().square()
    frequencies = torch.linspace(0, sample_rate / 2, power.shape[-1])
    return (power * frequencies).sum(-1) / power.sum(-1)


def accuracy(folder):
    """How many of 40 sounds have the pitch of the class that was asked for: "high" is above 750 Hz."""
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    mel = MelSpectrogram.from_pretrained(folder, subfolder="mel")
    scheduler = PoissonFlowScheduler.from_pretrained(folder, subfolder="scheduler")
    labels = torch.arange(40) % 2
    mels = draw_samples(unet, scheduler, (1, 16, 16), 40, 18, 0, labels)
    sounds = mel.decode(mels, generator=torch.Generator().manual_seed(0))
    high = spectral_centroid(sounds, mel.config.sample_rate) > 750
    return (high == (labels == 0)).float().mean().item()


@pytest.mark.slow
def test_generated_sounds_have_the_class_that_was_asked_for(tmp_path):
    sounds = make_sounds(tmp_path / "sounds", per_class=60)
    right = accuracy(train(tmp_path / "right", make_dataset(sounds, tmp_path / "right-data", HOP), *FLAGS))
    # The same with labels that say nothing: the classes are shuffled among the recordings.
    files = sorted(sounds.rglob("*.wav"))
    random.Random(0).shuffle(files)
    for index, file in enumerate(files):
        target = tmp_path / "shuffled" / ("high", "low")[index % 2] / f"{file.parent.name}-{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    wrong = accuracy(
        train(tmp_path / "wrong", make_dataset(tmp_path / "shuffled", tmp_path / "wrong-data", HOP), *FLAGS)
    )
    assert right >= 0.95
    assert 0.2 <= wrong <= 0.8
