"""Seconds per optimizer step of `train_unet.py`'s loop against the bare steps of the same network on the same batch.

Between every two steps of the loop the bare ones are taken, so that all meet the same machine. What the loop adds is
reading the data, noise levels and noise, gradient clipping, the moving average of the weights, and keeping account.

    python benchmarks/train_step.py [--config recipes/fsdd-64-cpu.yaml] [--batch N]
"""

import argparse
import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from diffusers.training_utils import EMAModel

from tonefield import audio_to_images, train_unet
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.training.arguments import prepare_output_dir
from tonefield.training.data import open_data
from tonefield.training.loop import make_accelerator, train


UNCOUNTED = 3  # first steps, in which memory is found


def make_dataset(folder: Path, preset: str) -> Path:
    """Made-up sounds in three classes."""
    for index in range(96):
        kind = KINDS[index % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / kind / f"{index}.wav", synthesize(kind, 1.0, 8000, index), 8000)
    flags = [f"--input_dir={folder}", f"--output_dir={folder / 'mels'}", f"--preset={preset}", "--num_proc=1"]
    audio_to_images.main(audio_to_images.parse_args(flags))
    return folder / "mels"


def bare_step(model: torch.nn.Module, args: argparse.Namespace, averaged: bool) -> Callable[[dict], None]:
    """Forward, backward and optimizer step of a copy of a network; if asked, clipping and the average as well."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    average = EMAModel(model.parameters(), foreach=True) if averaged else None

    def step(batch: dict) -> None:
        timestep = torch.zeros(len(batch["clean"]), device=batch["clean"].device)
        labels = {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}
        model(batch["clean"], timestep, **labels).sample.square().mean().backward()
        if average:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.step(model.parameters())

    return step


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(flags: list[str]) -> tuple[dict[str, list[float]], str]:
    """Seconds of each step, by name, and the size of the problem in words."""
    args = train_unet.parse_args(flags)
    prepare_output_dir(args.output_dir)
    accelerator, data = make_accelerator(args), open_data(args)
    model, scheduler = train_unet.make_unet(args, data), train_unet.make_scheduler(args, data)
    model.to(accelerator.device)
    bare = {"bare": bare_step(model, args, False), "bare, clipped and averaged": bare_step(model, args, True)}
    seconds: dict[str, list[float]] = {"loop": [], **{name: [] for name in bare}}
    compute_loss, left = train_unet.make_loss(args, scheduler, data, accelerator), 0.0

    def between_steps(network, batch, generators):
        nonlocal left
        start = clock()
        if left:
            seconds["loop"].append(start - left)
        for name, step in bare.items():
            start = clock()
            step(batch)
            seconds[name].append(clock() - start)
        left = clock()
        return compute_loss(network, batch, generators)

    train(args, accelerator, model, data, between_steps)
    shape = "x".join(map(str, data.sample_shape))
    size = sum(parameter.numel() for parameter in model.parameters())
    return seconds, f"{size:,} parameters, batches of {args.train_batch_size} {shape} mels"


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    rows: dict[str, tuple[float, float]] = {}
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        hidden = io.StringIO()
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            dataset = make_dataset(Path(folder), args.preset)
            for name, flag in {"the loop without average": "--no-use_ema", "the loop": "--use_ema"}.items():
                flags = [f"--config={args.config}", f"--dataset_name={dataset}", f"--output_dir={folder}/{flag}", flag]
                flags += [f"--train_batch_size={args.batch}", f"--max_train_steps={args.steps + UNCOUNTED}"]
                seconds, problem = measure([*flags, "--validation_steps=0", f"--logging_steps={args.logging_steps}"])
                loop, bare, averaged = (
                    np.array(times[UNCOUNTED : args.steps + UNCOUNTED - 1]) for times in seconds.values()
                )
                rows["bare forward, backward, AdamW"] = np.median(bare), 1.0
                rows["bare with clipping and average"] = np.median(averaged), np.median(averaged / bare)
                rows[name] = np.median(loop), np.median(loop / bare)
    print(f"{problem}, {torch.get_num_threads()} threads, medians of {args.steps} steps")
    print("| a step of | time | against the bare one |\n|---|---|---|")
    for name, (typical, ratio) in rows.items():
        print(f"| {name} | {typical * 1e3:.1f} ms | {ratio:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "fsdd-64-cpu.yaml"
    parser.add_argument("--config", default=recipe, help="the recipe that says which network")
    parser.add_argument("--preset", default="fsdd-64", help="the front end of the data")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--logging_steps", type=int, default=10)
    main(parser.parse_args())
