"""What the tests of tokens share: sounds whose codes are known, datasets of them, and ways to run the script."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from training_runs import ROOT, reset_accelerate

from tonefield import MuLawTokenizer, audio_to_tokens, train_sedd


CODES = 16  # of the codec below
TINY = "hidden_size: 32\nnum_layers: 2\nnum_heads: 2\ncond_dim: 16\n"


def make_codec(folder: Path, hop_length: int = 1) -> Path:
    """An audio tokenizer of 16 codes that are what they sound like: decoding and encoding changes nothing."""
    MuLawTokenizer(8000, hop_length, mu=CODES - 1).save_pretrained(folder)
    return folder


def write_sounds(folder: Path, codes: dict[str, np.ndarray], hop_length: int = 1) -> Path:
    """A recording of each row of codes (rows, frames * hop), in a folder for each class."""
    levels = MuLawTokenizer(8000, hop_length, mu=CODES - 1).levels.numpy()
    for name, rows in codes.items():
        (folder / name).mkdir(parents=True)
        for index, row in enumerate(rows):
            soundfile.write(folder / name / f"{index:04d}.wav", levels[row], 8000, subtype="FLOAT")
    return folder


def tokenize(sounds: Path, codec: Path, folder: Path, *flags) -> Path:
    argv = [f"--input_dir={sounds}", f"--codec={codec}", f"--output_dir={folder}", "--num_proc=1", *flags]
    audio_to_tokens.main(audio_to_tokens.parse_args(list(map(str, argv))))
    return folder


def motifs(kind: int, count: int, rng: np.random.Generator, repeats: int = 4) -> np.ndarray:
    """Sequences of a motif of five codes over and over; each code is one of the four of its class."""
    return np.tile(4 * kind + rng.integers(0, 4, (count, 5)), (1, repeats))


def flags_of(output: Path, dataset: Path | str, *flags) -> list[str]:
    small = ["--train_batch_size=4", "--gradient_accumulation_steps=2", "--max_train_steps=6", "--lr_warmup_steps=3",
             "--learning_rate=0.003", "--ema_max_decay=0.9", "--validation_steps=0", "--num_validation_samples=2",
             "--num_inference_steps=3", "--num_validation_draws=2", "--logging_steps=1"]  # fmt: skip
    return [f"--dataset_name={dataset}", f"--output_dir={output}", *small, *flags]


def train(output: Path, dataset: Path | str, network: Path, *flags) -> Path:
    """Runs the script in this process; returns its output folder."""
    reset_accelerate()
    train_sedd.main(train_sedd.parse_args(flags_of(output, dataset, f"--model_config={network}", *flags)))
    return Path(output)


def start(output: Path, dataset: Path, network: Path, *flags) -> subprocess.Popen:
    """Starts the script as a process of its own."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_sedd.py"), *flags_of(output, dataset, f"--model_config={network}", *flags)],
        env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
