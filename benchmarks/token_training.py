"""Tokens per second of `train_sedd.py`'s loop against the bare steps of the same network on the same batch.

Between every two steps of the loop the bare ones are taken, so that all meet the same machine. What the loop adds is
reading the data, noise levels and noise, gradient clipping, the moving average of the weights, and keeping account.

    python benchmarks/token_training.py [--model_size tiny] [--batch N] [--frames N]
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from _timing import UNCOUNTED, show_steps, time_steps
from datasets import Dataset, DatasetDict, Features, List, Value
from torch.nn.functional import cross_entropy

from tonefield import FSQCodec, train_sedd
from tonefield.data.loading import CODEC_FOLDER, RECORD_COLUMN, record_feature
from tonefield.data.token_converter import FORMAT, codec_record
from tonefield.training.arguments import prepare_output_dir
from tonefield.training.loop import make_accelerator
from tonefield.training.token_data import open_tokens


def make_dataset(folder: Path, frames: int) -> Path:
    """Random codes of the 24 kHz codec, in recordings that are longer than a sequence."""
    codec, rng = FSQCodec.from_preset("music-24k"), np.random.default_rng(0)
    rows = [rng.integers(0, codec.codebook_size, (1, 2 * frames)) for _ in range(256)]
    columns = {
        "codes": rows,
        "num_samples": [2 * frames * codec.hop_length] * len(rows),
        RECORD_COLUMN: [0] * len(rows),
    }
    statistics = {"recordings": len(rows), "frames": 2 * frames * len(rows), "samples": 0}
    record = {"format": FORMAT, "version": 1, "codec": codec_record(codec), "statistics": statistics}
    features = Features(
        {"codes": List(List(Value("uint16"))), "num_samples": Value("int64"), RECORD_COLUMN: record_feature(record)}
    )
    DatasetDict({"train": Dataset.from_dict(columns, features=features)}).save_to_disk(folder)
    codec.save_pretrained(folder / CODEC_FOLDER)
    return folder


def measure(flags: list[str]) -> tuple[list[np.ndarray], int]:
    """What `time_steps` gives, and the size of the network."""
    args = train_sedd.parse_args(flags)
    prepare_output_dir(args.output_dir)
    accelerator, data = make_accelerator(args), open_tokens(args)
    scheduler = train_sedd.make_scheduler(args, data.codec)
    model = train_sedd.make_transformer(args, data, scheduler).to(accelerator.device)

    def loss_of(network, batch):
        return cross_entropy(network(batch["tokens"]).sample.flatten(0, -2), batch["tokens"].flatten())

    condition = train_sedd.make_condition(args, data, None)
    loss = train_sedd.make_loss(args, scheduler, data, condition, args.train_batch_size)
    seconds = time_steps(args, accelerator, model, data, loss, loss_of, "transformer")
    return seconds, sum(parameter.numel() for parameter in model.parameters())


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    found, parameters = [], 0
    with tempfile.TemporaryDirectory() as folder:
        hidden = io.StringIO()
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            dataset = make_dataset(Path(folder, "data"), args.frames)
            for flag in ("--use_ema", "--no-use_ema"):
                flags = [
                    f"--model_size={args.model_size}",
                    f"--dataset_name={dataset}",
                    f"--output_dir={folder}/{flag}",
                ]
                flags += [flag, f"--seq_length={args.frames}", f"--train_batch_size={args.batch}"]
                flags += [f"--max_train_steps={args.steps + UNCOUNTED}", "--validation_steps=0"]
                flags += [f"--mixed_precision={args.mixed_precision}", "--logging_steps=10", "--report_to=none"]
                seconds, parameters = measure(flags)
                found.append(seconds)
    tokens = args.batch * args.frames
    print(f"{parameters:,} parameters, batches of {args.batch} x {args.frames} tokens of 4096 codes,"
          f" {torch.get_num_threads()} threads, medians of {args.steps} steps,"
          f" {tokens / np.median(found[0][0]):,.0f} tokens a second")  # fmt: skip
    show_steps("train_sedd", *found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="tiny", choices=train_sedd.MODEL_SIZES)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5)
    main(parser.parse_args())
