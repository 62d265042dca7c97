"""The mel front end against librosa: 16 clips of five seconds, encoded and decoded by both in the same run.

python benchmarks/mel.py [--device cuda] [--runs 5]
"""

import argparse
from typing import Any

import librosa
import numpy as np
import torch
from _table import Row, show
from _timing import seconds_of

from tonefield import MelSpectrogram
from tonefield.data.synthetic import KINDS, synthesize


CLIPS, SECONDS, ITERATIONS = 16, 5, 32


def main(args: argparse.Namespace) -> None:
    mel = MelSpectrogram.from_preset("image-22k", n_fft=1024, n_mels=80).to(args.device)
    c = mel.config
    clips = np.stack([synthesize(KINDS[i % 3], SECONDS, c.sample_rate, seed=i) for i in range(CLIPS)])
    waveforms = torch.from_numpy(clips).to(args.device)
    settings: dict[str, Any] = dict(sr=c.sample_rate, n_fft=c.n_fft, hop_length=c.hop_length, pad_mode="constant")

    def librosa_encode():
        return [librosa.power_to_db(librosa.feature.melspectrogram(y=y, n_mels=c.n_mels, **settings)) for y in clips]

    encoded = mel.encode(waveforms)
    powers = [librosa.feature.melspectrogram(y=y, n_mels=c.n_mels, **settings) for y in clips]

    def librosa_decode():
        return [librosa.feature.inverse.mel_to_audio(power, n_iter=ITERATIONS, **settings) for power in powers]

    def error(decoded: torch.Tensor) -> float:
        frames = min(encoded.shape[-1], 1 + decoded.shape[-1] // c.hop_length)
        difference = mel.encode(decoded)[..., :frames] - encoded[..., :frames]
        return (c.top_db / 2 * difference).square().mean().sqrt().item()

    decoded = mel.decode(encoded, n_iter=ITERATIONS, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(np.stack(librosa_decode())).to(args.device)
    rows = [
        (
            "encode",
            seconds_of(librosa_encode, args.runs),
            seconds_of(lambda: mel.encode(waveforms), args.runs),
            "",
            "",
        ),
        (
            f"decode, {ITERATIONS} iterations",
            seconds_of(librosa_decode, 1),
            seconds_of(lambda: mel.decode(encoded, n_iter=ITERATIONS), args.runs),
            f"{error(theirs):.2f} dB",
            f"{error(decoded):.2f} dB",
        ),
    ]
    print(f"{CLIPS} clips of {SECONDS} s, {c.n_mels} bands, {torch.get_num_threads()} threads, {args.device}")
    print("| | librosa | tonefield | times faster | mel error of librosa | of tonefield |\n|---|---|---|---|---|---|")
    for name, baseline, ours, their_error, our_error in rows:
        print(
            f"| {name} | {baseline * 1e3:.0f} ms | {ours * 1e3:.0f} ms | {baseline / ours:.1f} | {their_error} |"
            f" {our_error} |"
        )
    print()
    show(
        Row(f"mels, {name}", f"{baseline * 1e3:.0f} ms", f"{ours * 1e3:.0f} ms", baseline / ours, least=least)
        for (name, baseline, ours, *_), least in zip(rows, (3, 5), strict=True)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each; the median is shown")
    main(parser.parse_args())
