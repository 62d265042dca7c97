"""The Fréchet audio distance of two sets of 1,000 recordings, against the usual path to the same number.

python benchmarks/evaluation.py [--clips 1000] [--seconds 1] [--embeddings mel cnn14] [--device cuda]

The usual path is what published tools do: file by file, `librosa.load` at the rate of the embedding, features by
librosa (`mel`) or the network layer by layer as it was published, with its Fourier transform as a convolution
(`cnn14`), in a batch of one; then `np.cov` and `scipy.linalg.sqrtm` of the product. Tonefield's part is `evaluate` as
a user calls it: it also looks for damaged, silent and double files and keeps what it has computed. "again" is a second
run for which no file has changed; "the distance alone" is that of embeddings which are there already.

Both come to the same distance, but for what scipy's root loses when there are fewer clips than dimensions.

CNN14 has random weights in the published format, of 2048 dimensions as published, but with a sixteenth of the
channels (--width 1: all), so that a computer without a GPU gets through. Only the ratios of a computer that does
nothing else count.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import scipy.linalg
import soundfile
import torch
from _table import Row, show
from torch.nn.functional import conv1d, pad

import tonefield.data.audio_folder  # noqa: F401 (what takes a second to import is no part of the comparison)
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.evaluation import evaluate, load_embedding
from tonefield.evaluation.cnn14 import CNN14
from tonefield.evaluation.embeddings import MelStatistics
from tonefield.evaluation.statistics import GaussianStats, frechet_distance


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


class PublishedCNN14(CNN14):
    """The network as it was published: windows and Fourier transform are one convolution."""

    real: torch.Tensor
    imag: torch.Tensor

    def __init__(self, width: float):
        super().__init__(513, 64, [round(width * 2**index) for index in range(6, 12)], 2048, 527)
        for module in self.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.kaiming_normal_(module.weight)  # sounds that differ get rows that differ
        mels = librosa.filters.mel(sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000)
        self.logmel_extractor.melW.copy_(torch.from_numpy(mels.T))
        waves = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024) * np.hanning(1025)[:-1]
        self.register_buffer("real", torch.from_numpy(waves.real[:, None]).float(), persistent=False)
        self.register_buffer("imag", torch.from_numpy(waves.imag[:, None]).float(), persistent=False)

    def log_mel(self, sounds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        padded = pad(sounds[:, None], (512, 512), mode="reflect")
        power = conv1d(padded, self.real, stride=320) ** 2 + conv1d(padded, self.imag, stride=320) ** 2
        return 10 * torch.log10(torch.clamp(power.transpose(1, 2) @ self.logmel_extractor.melW, min=1e-10))


def usual_cnn14(network: PublishedCNN14, device: str) -> Callable[[np.ndarray], np.ndarray]:
    def embed(sound: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            batch = torch.from_numpy(sound)[None].to(device)
            return network(batch, torch.tensor([len(sound)], device=device)).cpu().numpy()

    return embed


def usual_mel(full_scale_power: float) -> Callable[[np.ndarray], np.ndarray]:
    """What [`MelStatistics`] says of each second, by librosa and numpy."""

    def embed(sound: np.ndarray) -> np.ndarray:
        rows = []
        for piece in np.split(sound, range(16000, len(sound) - 3999, 16000)):
            power = librosa.feature.melspectrogram(
                y=piece[:16000], sr=16000, n_fft=1024, hop_length=256, n_mels=32, fmin=20, pad_mode="constant"
            )
            decibels = librosa.power_to_db(power, ref=full_scale_power, amin=1e-10 * full_scale_power, top_db=None)
            mels = np.clip(decibels, -80, 0) / 10 + 8
            grouped = mels.reshape(16, 2, -1).mean(1)
            steps = grouped[:, 8:] - grouped[:, :-8]
            moves = [np.sqrt((np.clip(steps, *ends) ** 2).mean(1)) for ends in ((0, None), (None, 0))]
            rows.append(np.concatenate([mels.mean(1), mels.std(1), *moves]))
        return np.array(rows)

    return embed


def usual_distance(rows: list[np.ndarray]) -> float:
    (mean, covariance), (other_mean, other) = [(of.mean(0), np.cov(of.T)) for of in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # of a singular product
        root = np.real(scipy.linalg.sqrtm(covariance @ other))
    return float(np.square(mean - other_mean).sum() + np.trace(covariance + other - 2 * root))


def usual_rows(folder: Path, rate: int, embed: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    rows = [embed(librosa.load(file, sr=rate)[0]) for file in sorted(folder.glob("*.wav"))]
    return np.concatenate(rows).astype(np.float64)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def measure(
    name: str, usual: Callable[[np.ndarray], np.ndarray], sets: list[Path], cache: Path, args
) -> Iterator[Row]:
    embedding = load_embedding(name, args.device)
    embedding.embed([np.zeros(RATE, np.float32)])  # what is loaded when it is first needed
    usual(librosa.load(sets[0] / "00000.wav", sr=embedding.sampling_rate)[0])
    rows, reading = timed(lambda: [usual_rows(folder, embedding.sampling_rate, usual) for folder in sets])
    value, distance = timed(lambda: usual_distance(rows))

    def ours() -> float:
        reference, generated = sets
        report = evaluate(
            reference, generated, ["fad"], [embedding], device=args.device, cache_dir=str(cache), bootstrap=0,
            num_workers=args.num_workers, batch_size=args.batch_size,
        )  # fmt: skip
        return report["results"][0]["value"]

    found = {"cold": timed(ours), "again": timed(ours)}
    found["the distance alone"] = timed(lambda: frechet_distance(*map(GaussianStats.of, rows)))
    for what, (ours_is, seconds) in found.items():
        theirs = distance if what == "the distance alone" else reading + distance
        print(
            f"| {embedding.name} | {what} | {theirs:.2f} | {seconds:.2f} | {theirs / seconds:.1f} | {value:.7g}"
            f" | {ours_is:.7g} |",
            flush=True,
        )
        least = 5 if what == "cold" else None
        yield Row(
            f"FAD of {name.split('=')[0]}, {what}", f"{theirs:.2f} s", f"{seconds:.2f} s", theirs / seconds, least
        )


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = [Path(folder, name) for name in ("reference", "generated")]
        for seed, one in enumerate(sets):
            make(one, args.clips, args.seconds, seed)
        print(
            f"two sets of {args.clips} clips of {args.seconds:g} s, {torch.get_num_threads()} threads, {args.device}"
        )
        print("| embedding | | usual path, s | tonefield, s | times faster | FAD, usual | FAD, tonefield |")
        print("|---|---|---|---|---|---|---|")
        rows: list[Row] = []
        for index, name in enumerate(args.embeddings):
            if name == "cnn14":
                torch.manual_seed(0)
                network = PublishedCNN14(args.width).eval()
                torch.save({"model": network.state_dict()}, Path(folder, "cnn14.pth"))
                name, usual = f"cnn14={folder}/cnn14.pth", usual_cnn14(network.to(args.device), args.device)
            else:
                usual = usual_mel(MelStatistics().mel.full_scale_power)
            rows += measure(name, usual, sets, Path(folder, f"cache-{index}"), args)
    print()
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--embeddings", nargs="+", default=["mel", "cnn14"], choices=["mel", "cnn14"])
    parser.add_argument("--width", type=float, default=1 / 16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    main(parser.parse_args())
