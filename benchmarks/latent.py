"""Sound and training steps in latents against the same in mels, with a U-Net of the same width.

The first table is what a second of sound costs, the second what a training step does when latents and texts are ready
and when they are made anew in every step. All weights are random; what is measured does not depend on them. Each row
of the first table is a process of its own, so that the memory is its own too.

    python benchmarks/latent.py [--preset fsdd-64] [--model_size small] [--batch N] [--steps N]
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _table import Row, show
from _timing import clock
from accelerate import Accelerator
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tonefield import LatentAudioDiffusionPipeline, MelSpectrogram, train_unet, train_vae
from tonefield.pipelines import encode_text
from tonefield.training.latents import latent_shape
from tonefield.training.loop import memory_in_use
from tonefield.training.text import encode_texts


CAPTIONS = [f"{tempo} {sound} with {other}" for tempo in ("slow", "fast") for sound in ("piano", "drums", "strings")
            for other in ("rain", "bass", "voices")]  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parts(args: argparse.Namespace, latent: bool):
    """Front end, autoencoder, flags, what `train_unet.py` needs to know of the data, and a T5 as large as t5-small."""
    mel = MelSpectrogram.from_preset(args.preset)
    vae: Any = None
    shape = (1, mel.config.n_mels, mel.config.num_frames)
    if latent:
        flags = train_vae.parse_args(["--dataset_name=x", f"--model_size={args.model_size}", "--latent_channels=4"])
        trainable = train_vae.make_vae(flags, SimpleNamespace(sample_shape=shape))
        vae = train_vae.finish(trainable, {"mean": 0.0, "std": 1.0}).requires_grad_(False)
        vae.to(DEVICE)
        shape = latent_shape(vae, mel)
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -3.0) for word in words)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), num_layers=6)).requires_grad_(False).eval()
    data = SimpleNamespace(sample_shape=shape, sigma_data=1.0, class_names=[], vae={}, mel=mel)
    flags = train_unet.parse_args(["--dataset_name=x", f"--model_size={args.model_size}", "--text_encoder=x"])
    unet = train_unet.make_unet(flags, data, encoder.config.d_model).to(DEVICE)
    return SimpleNamespace(
        mel=mel, vae=vae, tokenizer=tokenizer, encoder=encoder, data=data, flags=flags, unet=unet,
        scheduler=train_unet.make_scheduler(flags, data),
    )  # fmt: skip


def generate(args: argparse.Namespace, latent: bool) -> tuple[float, float, int]:
    """Seconds for a second of mel, the most memory in GiB, and the numbers that are denoised at once."""
    parts = make_parts(args, latent)
    pipe = LatentAudioDiffusionPipeline(
        parts.unet.eval(), parts.scheduler, parts.mel, parts.vae, parts.tokenizer, parts.encoder
    ).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    prompts = [CAPTIONS[index % len(CAPTIONS)] for index in range(args.batch)]
    seconds = []
    for steps in (2, args.steps):  # the first finds memory
        start = clock()
        pipe(prompts, num_inference_steps=steps, output_type="mel")
        seconds.append(clock() - start)
    made = args.batch * parts.mel.slice_samples / parts.mel.config.sample_rate
    return seconds[-1] / made, memory_in_use(), int(np.prod(parts.data.sample_shape))


def train_steps(args: argparse.Namespace) -> dict[str, float]:
    """Medians of the seconds of a step of each kind; the kinds take turns, so that all meet the same machine."""
    accelerator, parts = Accelerator(), make_parts(args, True)
    texts = encode_texts(parts.tokenizer, parts.encoder, CAPTIONS, DEVICE, False)
    parts.encoder.to(DEVICE)
    captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(args.batch)]
    optimizer = torch.optim.AdamW(parts.unet.parameters(), 1e-4)
    made = {
        vae is None: train_unet.make_loss(parts.flags, parts.scheduler, parts.data, accelerator, vae, texts)
        for vae in (None, parts.vae)
    }
    mels = torch.randn(args.batch, 1, parts.mel.config.n_mels, parts.mel.config.num_frames, device=DEVICE)
    latents = torch.randn(args.batch, *parts.data.sample_shape, device=DEVICE)
    ready_texts = {name: value.to(DEVICE) for name, value in texts(captions).items()}

    def step(ready: bool, read: bool) -> None:
        batch = {"clean": latents} if ready else {"clean": mels, "posterior_noise": latents}
        if read:
            batch |= ready_texts
        else:
            states, mask = encode_text(parts.tokenizer, parts.encoder, captions)
            batch |= {"text_states": states, "text_mask": mask}
        generators = [torch.Generator(DEVICE).manual_seed(seed) for seed in range(args.batch)]
        made[ready](parts.unet, batch, generators).backward()
        optimizer.step()
        optimizer.zero_grad()

    kinds: dict[str, Callable[[], None]] = {
        "latents and texts ready": lambda: step(True, True),
        "mels encoded": lambda: step(False, True),
        "texts encoded": lambda: step(True, False),
        "both encoded": lambda: step(False, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.train_steps + 2):
        for name, take in kinds.items():
            start = clock()
            take()
            seconds[name].append(clock() - start)
    return {name: float(np.median(times[2:])) for name, times in seconds.items()}


def main(args: argparse.Namespace) -> None:
    threads = f"{torch.get_num_threads()} threads"
    print(f"{args.preset}, {args.model_size}, batches of {args.batch}, {args.steps} steps, {DEVICE}, {threads}")
    print("\n| a second of mel | numbers | time | against mels | memory |\n|---|---|---|---|---|")
    usual, rows = None, []
    for name, latent in (("mels", False), ("latents, decoded", True)):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, memory, numbers = pool.submit(generate, args, latent).result()
        usual = usual or seconds
        print(f"| {name} | {numbers} | {seconds:.3f} s | {seconds / usual:.2f} | {memory:.2f} GiB |")
        rows.append(Row("a second of sound", f"{usual:.3f} s", f"{seconds:.3f} s", usual / seconds, least=1))
    print("\n| a training step | time | against all ready |\n|---|---|---|")
    times = train_steps(args)
    for name, seconds in times.items():
        print(f"| {name} | {seconds * 1e3:.0f} ms | {seconds / next(iter(times.values())):.2f} |")
    print()
    show(rows[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fsdd-64", help="the front end")
    parser.add_argument("--model_size", default="small", choices=train_unet.MODEL_SIZES, help="of both networks")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--train_steps", type=int, default=10)
    main(parser.parse_args())
