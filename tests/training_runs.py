"""What the tests of training share: sounds of two classes, datasets of them, and ways to run the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from tonefield import audio_to_images, train_unet


ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "test-tiny.yaml"
TINY_CODEC = """
sampling_rate: 4000
hop_length: 40
n_fft: 160
levels: [5, 5]
width: 16
encoder_layers: 1
decoder_layers: 1
"""


def make_sounds(folder, per_class=12, seed=0, seconds=1.0):
    """Two classes that any ear tells apart: decaying tones around 300 Hz and around 1500 Hz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(4096 * seconds)) / 4000
    for name, frequency in (("high", 1500), ("low", 300)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            tone = np.sin(2 * np.pi * frequency * rng.uniform(0.9, 1.1) * time)
            sound = 0.5 * tone * np.exp(-time * rng.uniform(1, 5)) + 1e-3 * rng.standard_normal(len(time))
            soundfile.write(folder / name / f"{index}.wav", sound, 4000)
    return folder


def make_dataset(sounds, folder, *flags):
    defaults = ["--sample_rate=4000", "--resolution=16,16", "--n_fft=512", "--hop_length=256", "--num_proc=1"]
    argv = [f"--input_dir={sounds}", f"--output_dir={folder}", *defaults, "--validation_fraction=0.2", *flags]
    audio_to_images.main(audio_to_images.parse_args(argv))
    return folder


def reset_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(output, dataset, *flags, config=RECIPE, script=train_unet):
    """Runs a script in this process; returns its output folder."""
    reset_accelerate()
    argv = [f"--config={config}", f"--dataset_name={dataset}", f"--output_dir={output}", *flags]
    script.main(script.parse_args(argv))
    return Path(output)


def start(output, dataset, *flags, launcher=(), config=RECIPE, script=train_unet, start_new_session=False):
    """Starts a script as a process of its own."""
    argv = [f"--config={config}", f"--dataset_name={dataset}", f"--output_dir={output}", *flags]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script.__file__), *argv],
        env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=start_new_session,
    )  # fmt: skip


def contents(checkpoint):
    """Everything that a checkpoint restores, as one flat dictionary of tensors and numbers."""
    found = {}
    for weights in sorted(checkpoint.glob("*/diffusion_pytorch_model.safetensors")):
        found |= {f"{weights.parent.name}.{key}": value for key, value in load_file(weights).items()}
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    for index, moments in optimizer["state"].items():
        found |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    found["schedule"] = torch.load(checkpoint / "scheduler.bin", weights_only=True)
    found["groups"] = optimizer["param_groups"]
    found["ema_step"] = json.loads((checkpoint / "state.json").read_text())["ema_step"]
    return found


def differences(first, second):
    """The names of what is not equal bit for bit."""
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    assert len(first) > 100
    return [
        name for name, value in first.items()
        if not (torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name])
    ]  # fmt: skip
