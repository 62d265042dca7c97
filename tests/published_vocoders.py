"""BigVGAN, written down from its description as a plain function of named tensors, and its checkpoints as published.

Nothing of diffusers or of this project is used. The anti-aliasing filters are part of a checkpoint; here they are not
even symmetric, so that one that is forgotten or turned round is seen.
"""

import json
import math

import torch
from published_networks import Weights
from torch.nn import functional as F


CONFIG = {
    "resblock": "1", "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4], "upsample_initial_channel": 8,
    "resblock_kernel_sizes": [3, 9], "resblock_dilation_sizes": [[1, 3], [1, 4]], "activation": "snakebeta",
    "snake_logscale": True, "segment_size": 512, "num_mels": 16, "n_fft": 64, "hop_size": 8, "win_size": 64,
    "sampling_rate": 8000, "fmin": 0, "fmax": None,
}  # fmt: skip
SECOND_GENERATION = {"use_tanh_at_final": False, "use_bias_at_final": False}


def through_filter(x, taps, stride):
    """A convolution (not a correlation) of every channel with the same taps, nothing padded."""
    return F.conv1d(x.flatten(0, 1)[:, None], taps.flip(-1), stride=stride).unflatten(0, x.shape[:2]).squeeze(2)


def snake(w, name, x):
    """x + sin^2(e^a x) / e^b at twice the rate, between filters of 12 taps; the ends are repeated."""
    up, down = (0.3 * w(f"{name}.{place}.filter", 1, 1, 12) for place in ("upsample", "downsample.lowpass"))
    a, b = (w(f"{name}.act.{letter}", x.shape[1])[:, None] for letter in ("alpha", "beta"))
    between = torch.zeros(*x.shape[:2], x.shape[2] + 10, 2, dtype=x.dtype)
    between[..., 0] = F.pad(x, (5, 5), mode="replicate")  # zeros between the samples
    x = 2 * through_filter(between.flatten(2), up, 1)[..., 4:-5]
    x = x + torch.sin(a.exp() * x) ** 2 / (b.exp() + 1e-9)
    return through_filter(F.pad(x, (5, 6), mode="replicate"), down.flip(-1), 2)


def conv(w, name, x, out, kernel, dilation=1, bias=True):
    weight = w(f"{name}.weight", out, x.shape[1], kernel)
    bias = w(f"{name}.bias", out) if bias else None
    return F.conv1d(x, weight, bias, padding=dilation * (kernel // 2), dilation=dilation)


def bigvgan(w, config, mel):
    """Waveforms (batch, 1, samples) of log-magnitudes (batch, num_mels, frames)."""
    width = config["upsample_initial_channel"]
    x = conv(w, "conv_pre", mel, width, 7)
    blocks = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True))
    for level, (rate, kernel) in enumerate(
        zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True)
    ):
        width //= 2
        name = f"ups.{level}.0"
        weight, bias = w(f"{name}.weight", 2 * width, width, kernel), w(f"{name}.bias", width)
        x = F.conv_transpose1d(x, weight, bias, stride=rate, padding=(kernel - rate) // 2)
        made = []
        for index, (size, dilations) in enumerate(blocks):
            name, y = f"resblocks.{level * len(blocks) + index}", x
            for place, dilation in enumerate(dilations):
                z = snake(w, f"{name}.activations.{2 * place}", y)
                z = conv(w, f"{name}.convs1.{place}", z, width, size, dilation)
                z = snake(w, f"{name}.activations.{2 * place + 1}", z)
                y = y + conv(w, f"{name}.convs2.{place}", z, width, size)
            made.append(y)
        x = torch.stack(made).mean(0)
    x = snake(w, "activation_post", x)
    x = conv(w, "conv_post", x, 1, 7, bias=config.get("use_bias_at_final", True))
    return torch.tanh(x) if config.get("use_tanh_at_final", True) else x.clamp(-1, 1)


def random_bigvgan(config, seed=0):
    """Weights in double precision, as functions of their names."""
    weights = Weights(seed)
    bigvgan(weights, config, torch.zeros(1, config["num_mels"], 1, dtype=torch.float64))
    return weights


def with_weight_norm(weights, form):
    """How a checkpoint holds the weights: `"folded"`, or as lengths and directions by PyTorch's old or new names."""
    names = {
        "old": ("weight_g", "weight_v"),
        "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    }.get(form)
    normed = {}
    for key, tensor in weights.items():
        if key.endswith(".filter"):
            normed[key] = 0.3 * tensor
        elif names is None or not key.endswith(".weight"):
            normed[key] = tensor
        else:
            stem, length = key.removesuffix("weight"), torch.linalg.vector_norm(tensor, dim=(1, 2), keepdim=True)
            normed[stem + names[0]] = length
            normed[stem + names[1]] = tensor * torch.linspace(0.5, 2, len(tensor), dtype=tensor.dtype)[:, None, None]
    return normed


def write_bigvgan(folder, second=True, form="old", dtype=torch.float32, seed=0, **changes):
    """A published folder, and the waveforms that its vocoder makes, as a function of mels in double precision."""
    config = CONFIG | (SECOND_GENERATION if second else {}) | changes
    config["hop_size"] = math.prod(config["upsample_rates"])
    weights = random_bigvgan(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = {key: tensor.to(dtype) for key, tensor in with_weight_norm(weights, form).items()}
    torch.save({"generator": generator}, folder / "bigvgan_generator.pt")
    return lambda mel: bigvgan(weights, config, mel.double())
