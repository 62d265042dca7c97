"""The weights of published PFGM networks, under the names that they have in diffusers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from tonefield.models.unet_2d_song import SongUNet2DModel


# The published networks number their modules in the order of the forward pass, in one list (DDPM++) or in these.
ORDER = ("all_modules", "time_embed", "input_blocks", "middle_block", "output_blocks", "out")
MODULE = re.compile(rf"(?:module\.)?({'|'.join(ORDER)})\.(\d+)(?:\.(\d+))?\.(.+)")

# What is inside of a module, there and here. `NIN` is a 1x1 convolution with a transposed matrix.
RESNET = {
    "GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "time_emb_proj", "GroupNorm_1": "norm2", "Conv_1": "conv2",
    "Conv_2": "conv_shortcut", "NIN_0": "conv_shortcut",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}
RESAMPLING = {"op": "conv", "conv": "conv"}
NAMES = {ResnetBlock2D: RESNET, Attention: ATTENTION, Downsample2D: RESAMPLING, Upsample2D: RESAMPLING}


def forward_order(unet: torch.nn.Module) -> Iterator[str]:
    """The names of a U-Net's modules in the order in which the published networks number theirs."""
    yield from ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in")
    middle: list[tuple[str, Any]] = [("mid_block", unet.mid_block)]
    down, up = (
        [(f"{name}.{i}", b) for i, b in enumerate(getattr(unet, name))] for name in ("down_blocks", "up_blocks")
    )
    for path, block in down + middle + up:
        attentions = getattr(block, "attentions", [])
        for i in range(len(block.resnets)):
            yield f"{path}.resnets.{i}"
            if i < len(attentions) and not isinstance(attentions[i], torch.nn.Identity):
                yield f"{path}.attentions.{i}"
        for kind in ("downsamplers", "upsamplers"):
            if getattr(block, kind, None):
                yield f"{path}.{kind}.0"
    yield from ("conv_norm_out", "conv_out")


def by_module(weights: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each module of a published network, in the order of the forward pass."""
    published: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        match = MODULE.fullmatch(key)
        if match:  # a table of noise levels is not a weight
            where = (ORDER.index(match[1]), *(int(number) for number in (match[2], match[3]) if number))
            published.setdefault(where, {})[match[4]] = tensor
    return [tensors for _, tensors in sorted(published.items())]


def check_number(published: list, names: list) -> None:
    if len(published) != len(names):
        raise ValueError(f"The weights are of {len(published)} modules, the network has {len(names)}.")


def convert_pfgm_unet(unet: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The state of a `PFGMUNet2DModel` or `PFGMTransformerUNet2DModel` from that of a published network.

    Args:
        unet (`torch.nn.Module`): A network of the same layout; only its structure matters.
        weights (`Mapping[str, torch.Tensor]`): The published tensors by name, in any order.
    """
    published, names = by_module(weights), list(forward_order(unet))
    check_number(published, names)
    converted = {}
    for name, tensors in zip(names, published, strict=True):
        module = unet.get_submodule(name)
        renamed = NAMES.get(type(module))
        for inner, tensor in tensors.items():
            path, _, parameter = inner.rpartition(".")
            if renamed is not None:
                path = renamed.get(path, path)
            if parameter == "W":
                tensor = tensor.T[:, :, None, None] if path == "conv_shortcut" else tensor.T
            parameter = {"W": "weight", "b": "bias"}.get(parameter, parameter)
            converted[".".join(filter(None, (name, path, parameter)))] = tensor
    return converted


# NCSN++ is the network of `SongUNet2DModel`, whose attention is one module with the block before it.
NCSNPP = {
    "GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "embedding", "GroupNorm_1": "norm2", "Conv_1": "conv2",
    "Conv_2": "shortcut", "Conv2d_0": "0",
}  # fmt: skip


def ncsnpp_order(unet: SongUNet2DModel) -> Iterator[str]:
    """The names of a SongUNet2DModel's modules in the order in which NCSN++ numbers its own."""

    def with_attention(name: str) -> Iterator[str]:
        yield name
        if unet.get_submodule(name).attention is not None:
            yield f"{name}.attention"

    yield from ("frequencies", "embedding_1", "embedding_2", "conv_in")
    smaller = iter(range(len(unet.pyramid)))
    for i, block in enumerate(unet.down_blocks):
        yield from with_attention(f"down_blocks.{i}")
        if block.resample is not None:
            yield f"pyramid.{next(smaller)}"
    for part in ("mid_blocks", "up_blocks"):
        for i in range(len(getattr(unet, part))):
            yield from with_attention(f"{part}.{i}")
    yield from ("norm_out", "conv_out")


def convert_ncsnpp(unet: SongUNet2DModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The state of a `SongUNet2DModel` of the form NCSN++ from that of a published PFGM network, which is told ln(z).

    Args:
        unet (`SongUNet2DModel`): A network of the same layout; only its structure matters.
        weights (`Mapping[str, torch.Tensor]`): The published tensors by name, in any order.
    """
    published, names = by_module(weights), list(ncsnpp_order(unet))
    check_number(published, names)
    converted = {}
    for name, tensors in zip(names, published, strict=True):
        if name == "frequencies":  # of a timestep that is ln(z) / 4
            converted[name] = tensors.get("W", torch.empty(0)) * (2 * torch.pi * 4)
        elif name.endswith(".attention") and "NIN_3.W" in tensors:
            # Side by side for each channel: query, key and value.
            matrix, bias = (torch.stack([tensors[f"NIN_{i}.{kind}"] for i in range(3)], dim=-1) for kind in "Wb")
            converted[f"{name}.to_qkv.weight"] = matrix.flatten(1).T[:, :, None, None]
            converted[f"{name}.to_qkv.bias"] = bias.flatten()
            converted[f"{name}.to_out.weight"] = tensors["NIN_3.W"].T[:, :, None, None]
            converted[f"{name}.to_out.bias"] = tensors["NIN_3.b"]
            for parameter in ("weight", "bias"):
                converted[f"{name}.norm.{parameter}"] = tensors[f"GroupNorm_0.{parameter}"]
        else:
            for inner, tensor in tensors.items():
                path, _, parameter = inner.rpartition(".")
                converted[".".join(filter(None, (name, NCSNPP.get(path, path), parameter)))] = tensor
    return converted
