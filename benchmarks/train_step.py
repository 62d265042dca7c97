"""Seconds per optimizer step of `train_unet.py`'s loop against the bare steps of the same network on the same batch.

Between every two steps of the loop the bare ones are taken, so that all meet the same machine. What the loop adds is
reading the data, noise levels and noise, gradient clipping, the moving average of the weights, and keeping account.

    python benchmarks/train_step.py [--config recipes/fsdd-64-cpu.yaml] [--batch N]
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from _timing import UNCOUNTED, show_steps, time_steps

from tonefield import audio_to_images, train_unet
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.training.arguments import prepare_output_dir
from tonefield.training.data import open_data
from tonefield.training.loop import make_accelerator


def make_dataset(folder: Path, preset: str) -> Path:
    """Made-up sounds in three classes."""
    for index in range(96):
        kind = KINDS[index % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / kind / f"{index}.wav", synthesize(kind, 1.0, 8000, index), 8000)
    flags = [f"--input_dir={folder}", f"--output_dir={folder / 'mels'}", f"--preset={preset}", "--num_proc=1"]
    audio_to_images.main(audio_to_images.parse_args(flags))
    return folder / "mels"


def measure(flags: list[str]) -> tuple[list[np.ndarray], str]:
    """What `time_steps` gives, and the size of the problem in words."""
    args = train_unet.parse_args(flags)
    prepare_output_dir(args.output_dir)
    accelerator, data = make_accelerator(args), open_data(args)
    model, scheduler = train_unet.make_unet(args, data), train_unet.make_scheduler(args, data)

    def loss_of(network, batch):
        timestep = torch.zeros(len(batch["clean"]), device=batch["clean"].device)
        labels = {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}
        return network(batch["clean"], timestep, **labels).sample.square().mean()

    loss = train_unet.make_loss(args, scheduler, data, accelerator)
    seconds = time_steps(args, accelerator, model.to(accelerator.device), data, loss, loss_of)
    shape = "x".join(map(str, data.sample_shape))
    size = sum(parameter.numel() for parameter in model.parameters())
    return seconds, f"{size:,} parameters, batches of {args.train_batch_size} {shape} mels"


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    found, problem = [], ""
    with tempfile.TemporaryDirectory() as folder:
        hidden = io.StringIO()
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            dataset = make_dataset(Path(folder), args.preset)
            for flag in ("--use_ema", "--no-use_ema"):
                flags = [f"--config={args.config}", f"--dataset_name={dataset}", f"--output_dir={folder}/{flag}", flag]
                flags += [f"--train_batch_size={args.batch}", f"--max_train_steps={args.steps + UNCOUNTED}"]
                seconds, problem = measure([*flags, "--validation_steps=0", f"--logging_steps={args.logging_steps}"])
                found.append(seconds)
    print(f"{problem}, {torch.get_num_threads()} threads, medians of {args.steps} steps")
    show_steps("train_unet", *found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "fsdd-64-cpu.yaml"
    parser.add_argument("--config", default=recipe, help="the recipe that says which network")
    parser.add_argument("--preset", default="fsdd-64", help="the front end of the data")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--logging_steps", type=int, default=10)
    main(parser.parse_args())
