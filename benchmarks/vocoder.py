"""Ways from mels to sound: seconds of sound made in a second, and how far the mel of the sound is from the mel given.

Griffin-Lim stands beside BigVGAN, small (`base`) and large, as large as those that are published. Their weights are
random, which changes nothing of the time; the error is then of no use, and is shown only for vocoders that are named.
All of them read the same mels of 100 bands at 24 kHz, a named vocoder those that it was trained on.

    python benchmarks/vocoder.py [nvidia/bigvgan_v2_24khz_100band_256x ...] [--seconds 5] [--batch 1] [--runs 3]
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from _table import Row, show
from _timing import seconds_of
from diffusers import MMAudioVocoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tonefield import MelSpectrogram
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.models import load_vocoder
from tonefield.pipelines.tonefield_mel_editing import make_sound


ITERATIONS = 32


def base() -> ModelMixin:
    """As large as bigvgan_base_24khz_100band."""
    return LTX2Vocoder(
        in_channels=100, hidden_channels=512, out_channels=1, upsample_kernel_sizes=[16, 16, 4, 4],
        upsample_factors=[8, 8, 2, 2], act_fn="snakebeta", antialias=True,
    )  # fmt: skip


def large() -> ModelMixin:
    """As large as bigvgan_v2_24khz_100band_256x."""
    return MMAudioVocoder(100, 1536, (4, 4, 2, 2, 2, 2), (8, 8, 4, 4, 4, 4))


def mel_of(vocoder: ModelMixin | None) -> MelSpectrogram:
    """The front end whose mels a vocoder reads."""
    settings = dict(vocoder.config.get("_mel") or {}) if vocoder is not None else {}
    settings.pop("preset", None)
    if not settings:
        return MelSpectrogram.from_preset("bigvgan_v2_24khz_100band_256x")
    return MelSpectrogram(**settings, method="bigvgan")


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    vocoders: dict[str, Callable[[], ModelMixin | None]] = {
        f"Griffin-Lim, {ITERATIONS} iterations": lambda: None, "BigVGAN base": base, "BigVGAN large": large,
    }  # fmt: skip
    vocoders |= {name: lambda name=name: load_vocoder(name) for name in args.vocoders}
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    places = {"cpu": f"{torch.get_num_threads()} threads of a processor"}
    places |= {"cuda": torch.cuda.get_device_name()} if "cuda" in devices else {}
    print(f"{args.batch} x {args.seconds:g} s, float32")
    print(
        "| | on | parameters | times faster than played | times Griffin-Lim | mel error |\n|---|---|---|---|---|---|"
    )
    baseline, rows = {}, []
    for name, make in vocoders.items():
        vocoder = make()
        mel = mel_of(vocoder)
        rate, size = mel.config.sample_rate, sum(p.numel() for p in vocoder.parameters()) if vocoder else 0
        clips = np.stack([synthesize(KINDS[i % 3], args.seconds, rate, seed=i) for i in range(args.batch)])
        for device in devices:
            mel.to(torch.device(device))  # pyright: ignore
            speaker = None if vocoder is None else vocoder.to(torch.device(device)).eval()  # pyright: ignore
            mels = mel.encode(torch.from_numpy(clips).to(device))

            def speak(mel=mel, speaker=speaker, mels=mels) -> torch.Tensor:
                return make_sound(mel, speaker, mels, torch.Generator().manual_seed(0), None, loop=False)

            speed = args.batch * args.seconds / seconds_of(speak, args.runs)
            baseline.setdefault(device, speed)
            error = "random weights"
            if vocoder is None or name in args.vocoders:
                nats = (mel.value_range[1] - mel.value_range[0]) / 2
                distance = (mel.encode(speak())[..., : mels.shape[-1]] - mels).square().mean().sqrt().item()
                error = f"{20 / math.log(10) * nats * distance:.2f} dB"
            print(
                f"| {name} | {places[device]} | {f'{size / 1e6:.1f} M' if size else ''} | {speed:.2f} |"
                f" {speed / baseline[device]:.3f} | {error} |",
                flush=True,
            )
            if vocoder is None:
                rows.append(Row(f"{name} on {device}", "as fast as played", f"{speed:.1f} times", speed, least=1))
    print()
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "vocoders", nargs="*", metavar="NAME", help="vocoders to try as well: folders, names on the Hub"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each; the median is shown")
    main(parser.parse_args())
