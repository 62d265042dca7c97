"""The Fréchet audio distance of two sets of 1,000 recordings, against the usual path with the same embedding: file by
file, a batch of one, and scipy's square root of a matrix.

python benchmarks/evaluation.py [--clips 1000] [--seconds 1] [--embeddings mel cnn14=FILE] [--device cuda]

Without weights, `cnn14` is a network with random ones in the published format: of 2048 dimensions as published, but
with a sixteenth of the channels (--width 1: all), so that a computer without a GPU gets through. The second run is one
for which no file has changed.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import scipy.linalg
import soundfile
import torch

import tonefield.data.audio_folder  # noqa: F401 (what takes a second to import is no part of the comparison)
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.evaluation import evaluate, load_embedding
from tonefield.evaluation.cnn14 import CNN14
from tonefield.evaluation.embeddings import Embedding


RATE = 22050


def make(folder: Path, clips: int, seconds: float, seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    long = np.concatenate([synthesize(kind, 20, RATE, seed=seed) for kind in KINDS])
    size = int(seconds * RATE)
    for index in range(clips):
        start = rng.integers(len(long) - size)
        sound = long[start : start + size] * rng.uniform(0.3, 1) + 0.001 * rng.normal(size=size)
        soundfile.write(folder / f"{index:05d}.wav", sound, RATE)


def make_cnn14(file: Path, width: float) -> None:
    """Random weights in the published format, for 32 kHz."""
    torch.manual_seed(0)
    network: Any = CNN14(513, 64, [round(width * 2**index) for index in range(6, 12)], 2048, 527)
    mels = librosa.filters.mel(sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000)
    network.logmel_extractor.melW.copy_(torch.from_numpy(mels.T))
    torch.save({"model": network.state_dict()}, file)


def usual_path(folders: list[Path], embedding: Embedding) -> float:
    """How the distance is commonly computed."""
    moments = []
    for folder in folders:
        rows = []
        for file in sorted(folder.glob("*.wav")):
            sound, _ = librosa.load(file, sr=embedding.sampling_rate)
            rows.append(embedding.embed([sound], batch_size=1)[0])
        joined = np.concatenate(rows).astype(np.float64)
        moments.append((joined.mean(0), np.cov(joined.T)))
    (mean, covariance), (other_mean, other) = moments
    root = np.real(scipy.linalg.sqrtm(covariance @ other))
    return float(np.square(mean - other_mean).sum() + np.trace(covariance + other - 2 * root))


def measure(name: str, sets: list[Path], cache: Path, args: argparse.Namespace) -> None:
    embedding = load_embedding(name, args.device)
    embedding.embed([np.zeros(RATE, np.float32)])  # what is loaded when it is first needed
    librosa.load(sets[0] / "00000.wav", sr=embedding.sampling_rate)
    start = time.perf_counter()
    usual = usual_path(sets, embedding)
    theirs = time.perf_counter() - start

    def ours() -> tuple[float, float]:
        start = time.perf_counter()
        reference, generated = sets
        report = evaluate(
            reference, generated, ["fad"], [embedding], device=args.device, cache_dir=str(cache), bootstrap=0,
            num_workers=args.num_workers, batch_size=args.batch_size,
        )  # fmt: skip
        return report["results"][0]["value"], time.perf_counter() - start

    (first, cold), (second, warm) = ours(), ours()
    for what, seconds, value in [("usual path", theirs, usual), ("tonefield", cold, first), ("again", warm, second)]:
        print(f"| {embedding.name} | {what} | {seconds:.2f} | {theirs / seconds:.1f} | {value:.6g} |", flush=True)


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = [Path(folder, name) for name in ("reference", "generated")]
        for seed, one in enumerate(sets):
            make(one, args.clips, args.seconds, seed)
        print(
            f"two sets of {args.clips} clips of {args.seconds:g} s, {torch.get_num_threads()} threads, {args.device}"
        )
        print("| embedding | | seconds | times faster | FAD |\n|---|---|---|---|---|")
        for index, name in enumerate(args.embeddings):
            if name == "cnn14":
                make_cnn14(Path(folder, "cnn14.pth"), args.width)
                name = f"cnn14={folder}/cnn14.pth"
            measure(name, sets, Path(folder, f"cache-{index}"), args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--embeddings", nargs="+", default=["mel", "cnn14"])
    parser.add_argument("--width", type=float, default=1 / 16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    main(parser.parse_args())
