"""Bring a BigVGAN vocoder, as NVIDIA publishes them, into the classes that diffusers has for it.

    python -m tonefield.conversion.bigvgan nvidia/bigvgan_v2_44khz_128band_256x vocoders/44khz
    python -m tonefield.conversion.bigvgan runs/my_bigvgan/g_05000000 vocoders/mine --license mit

IN is a name on the Hub, a folder that holds config.json and bigvgan_generator.pt, or the file of a generator with
config.json beside it. The second generation (`bigvgan_v2_*`) becomes an MMAudioVocoder, the first an LTX2Vocoder: both
compute what the published program computes. The mel that the vocoder was trained on is saved with it, so that a
pipeline of other mels refuses it.

In Python no command is needed: `tonefield.load("me/drums", vocoder="nvidia/bigvgan_v2_44khz_128band_256x")`.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import find_source, importer_parser, load_strictly, read_checkpoint, run_importer
from tonefield.conversion.weight_norm import fold_weight_norm


if TYPE_CHECKING:
    import torch

CONFIG, GENERATOR = "config.json", "bigvgan_generator.pt"

# What config.json says of the network and of its mel; whatever else there is concerns training.
SHAPE = (
    "upsample_initial_channel", "upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes",
    "resblock_dilation_sizes",
)  # fmt: skip
KIND = ("resblock", "activation", "snake_logscale")
MEL = ("sampling_rate", "n_fft", "win_size", "hop_size", "num_mels", "fmin", "fmax")

# The published names of tensors, and those in LTX2Vocoder. MMAudioVocoder has the published ones.
LTX2_NAMES = (
    (r"conv_pre\.", "conv_in."),
    (r"conv_post\.", "conv_out."),
    (r"activation_post\.", "act_out."),
    (r"ups\.(\d+)\.0\.", r"upsamplers.\1."),
    (r"resblocks\.", "resnets."),
    (r"(.*\.)activations\.(\d+)\.", lambda match: f"{match[1]}acts{int(match[2]) % 2 + 1}.{int(match[2]) // 2}."),
    (r"(.*\.)lowpass\.filter", r"\1filter"),
)


# Weight norm keeps a weight as a length and a direction; PyTorch has had two ways to name these.
def read_config(file: Path) -> dict[str, Any]:
    """A published config.json, of which everything that is needed here is there and can be had."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: a BigVGAN's config.json belongs there. {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {first_line(error)}") from None
    missing = [key for key in (*SHAPE, *KIND, *MEL) if not isinstance(config, dict) or key not in config]
    if missing:
        raise UserError(f"{file} is no BigVGAN's: it does not say {', '.join(missing)}.")
    for key, known in dict(
        resblock="1", activation="snakebeta", snake_logscale=True, win_size=config["n_fft"]
    ).items():
        if config[key] != known:
            raise UserError(f"{file} has {key}={config[key]!r}, but only {key}={known!r} can be brought in.")
    hop = math.prod(config["upsample_rates"])
    if hop != config["hop_size"]:
        raise UserError(f"{file}: upsample_rates make {hop} samples of a frame, but hop_size is {config['hop_size']}.")
    return config


def mel_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The mel that a vocoder reads, in the words of `MelSpectrogram`, and the name of the preset that makes it."""
    from tonefield.models.mel_spectrogram import PRESETS

    mel = {
        "sample_rate": config["sampling_rate"], "n_fft": config["n_fft"], "hop_length": config["hop_size"],
        "n_mels": config["num_mels"], "f_min": float(config["fmin"]),
        "f_max": float(config["fmax"] or config["sampling_rate"] / 2),
    }  # fmt: skip
    presets: Any = PRESETS
    for name, preset in presets.items():
        made = {"f_min": 0.0, **preset, "f_max": float(preset.get("f_max") or preset["sample_rate"] / 2)}
        if preset.get("method") == "bigvgan" and all(made[key] == value for key, value in mel.items()):
            return mel | {"preset": name}
    return mel


def make_vocoder(config: Mapping[str, Any]) -> "torch.nn.Module":
    """The network that a config.json describes, of random weights."""
    from diffusers import MMAudioVocoder
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    bands, width, rates, kernels, block_kernels, dilations = (config[key] for key in ("num_mels", *SHAPE))
    tanh, bias = config.get("use_tanh_at_final", True), config.get("use_bias_at_final", True)
    if not tanh and not bias:
        vocoder = MMAudioVocoder(bands, width, rates, kernels, block_kernels, dilations)
    else:
        vocoder = LTX2Vocoder(
            in_channels=bands, hidden_channels=width, out_channels=1, upsample_kernel_sizes=kernels,
            upsample_factors=rates, resnet_kernel_sizes=block_kernels, resnet_dilations=dilations, act_fn="snakebeta",
            antialias=True, final_act_fn="tanh" if tanh else "clamp", final_bias=bias,
            output_sampling_rate=config["sampling_rate"],
        )  # fmt: skip
    vocoder.register_to_config(_mel=mel_of(config))
    return vocoder


def convert_bigvgan(source: str | os.PathLike) -> "torch.nn.Module":
    """
    A published BigVGAN as an `MMAudioVocoder` or `LTX2Vocoder`, in the precision of its weights. It cannot be trained
    on: weight norm is folded into the weights.

    Args:
        source (`str` or `os.PathLike`):
            A name on the Hub, a folder that holds config.json and bigvgan_generator.pt, or the file of a generator
            with config.json beside it.
    """
    import torch

    found = find_source(os.fspath(source), [CONFIG, GENERATOR])
    file = found / GENERATOR if found.is_dir() else found
    config = read_config(file.with_name(CONFIG))
    weights = read_checkpoint(file)
    if not isinstance(weights, dict) or not isinstance(weights.get("generator"), dict):
        raise UserError(f"{file} holds no generator: give a BigVGAN's {GENERATOR}, not what belongs to its training.")
    weights = fold_weight_norm(weights["generator"])
    vocoder = make_vocoder(config)
    if type(vocoder).__name__ == "LTX2Vocoder":
        for published, here in LTX2_NAMES:
            weights = {re.sub(f"^{published}", here, key): tensor for key, tensor in weights.items()}
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        vocoder.double()
    load_strictly(vocoder, weights, file)
    return vocoder.requires_grad_(False).eval()


def convert(args: argparse.Namespace) -> "torch.nn.Module":
    if args.source.startswith("nvidia/bigvgan"):
        args.license = args.license or "mit"  # as the model cards there say
    return convert_bigvgan(args.source)


if __name__ == "__main__":
    run_importer(convert, importer_parser(__doc__))
