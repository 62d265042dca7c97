"""Bring an autoencoder that was trained with latent-diffusion (LDM) into the AutoencoderKL of diffusers.

    python -m tonefield.conversion.ldm_autoencoder models/ldm-autoencoder-kl/last.ckpt models/vae
    python train_unet.py --dataset_name mels/songs --vae models/vae

IN is a Lightning checkpoint (`.ckpt`) or `.safetensors`, of an autoencoder alone or of a whole latent diffusion model.
How large the network is can be read off its tensors, so that no yaml is needed. The loss and its discriminator are
left out. What scales latents to unit variance is in no such checkpoint: networks of audio-diffusion were all trained
with 0.18215, so that is what is saved; say --scaling_factor if you have measured another.
"""

import argparse
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError
from tonefield.conversion.command import find_source, importer_parser, load_strictly, read_checkpoint, run_importer


if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

# What the parts of a block are called there and here; attention is made of 1x1 convolutions there.
RESNET = {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(\w+)")
RESAMPLE = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(down|up)sample\.(conv\.\w+)")
MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(\w+)\.(\w+)")


def name_here(name: str, levels: int) -> str:
    """The name in `AutoencoderKL` of a tensor of an LDM autoencoder with so many levels of resolution."""

    def block(place: str, kind: str, index: int, part: str, leaf: str) -> str:
        if kind == "block":
            return f"{place}.resnets.{index}.{RESNET.get(part, part)}.{leaf}"
        return f"{place}.attentions.{index}.{ATTENTION.get(part, part)}.{leaf}"

    def level(place: str, index: str) -> str:  # there both halves are numbered from the highest resolution
        return f"{place}_blocks.{index if place == 'encoder.down' else levels - 1 - int(index)}"

    if match := BLOCK.fullmatch(name):
        return block(level(match[1], match[2]), match[3], int(match[4]), match[5], match[6])
    if match := RESAMPLE.fullmatch(name):
        return f"{level(match[1], match[2])}.{match[3]}samplers.0.{match[4]}"
    if match := MIDDLE.fullmatch(name):
        return block(f"{match[1]}.mid_block", match[2], int(match[3]) - 1, match[4], match[5])
    return name.replace(".norm_out.", ".conv_norm_out.")


def shape_of(weights: Mapping[str, "torch.Tensor"], file: str | os.PathLike) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL` with tensors of these names and shapes."""

    def size(name: str, axis: int) -> int:
        if name not in weights:
            raise UserError(f"{file} holds no autoencoder of latent-diffusion: there is no {name} in it.")
        return weights[name].shape[axis]

    def count(pattern: str) -> int:
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    size("encoder.down.0.block.0.conv2.weight", 0)  # or it is something else
    levels = count(r"encoder\.down\.(\d+)\.")
    attention = [any(key.startswith(f"encoder.down.{level}.attn.") for key in weights) for level in range(levels)]
    widths = [size(f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(levels)]
    width = size("encoder.conv_in.weight", 0)
    if width != widths[0]:
        raise UserError(f"{file}: ch_mult begins with {widths[0] / width:g}, but that of an AutoencoderKL with 1.")
    latents, embedded = size("decoder.conv_in.weight", 1), size("post_quant_conv.weight", 1)
    if size("encoder.conv_out.weight", 0) != 2 * latents:
        raise UserError(f"{file}: the encoder makes no mean and variance of its latents: it is no KL autoencoder.")
    if embedded != latents:
        raise UserError(f"{file} has z_channels={latents}, but embed_dim={embedded}: an AutoencoderKL has one number.")
    return dict(
        in_channels=size("encoder.conv_in.weight", 1), out_channels=size("decoder.conv_out.weight", 0),
        down_block_types=["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        up_block_types=["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        block_out_channels=widths, layers_per_block=count(r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=latents, mid_block_add_attention="encoder.mid.attn_1.q.weight" in weights,
    )  # fmt: skip


def convert_ldm_autoencoder(source: str | os.PathLike, scaling_factor: float = 0.18215) -> "AutoencoderKL":
    """
    An autoencoder that was trained with latent-diffusion as an `AutoencoderKL`.

    Args:
        source (`str` or `os.PathLike`): A checkpoint, or a folder that holds just one.
        scaling_factor (`float`, *optional*, defaults to 0.18215): What its latents are multiplied by for a network.
    """
    import torch
    from diffusers import AutoencoderKL

    file = find_source(os.fspath(source), ["*.ckpt", "*.safetensors"])
    if file.is_dir():
        found = sorted(path for path in file.iterdir() if path.suffix in (".ckpt", ".safetensors"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"{source} must hold one checkpoint (.ckpt or .safetensors), not {names}: name the file.")
        file = found[0]
    weights = read_checkpoint(file)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    whole = "first_stage_model."  # its name within a latent diffusion model
    if any(str(key).startswith(whole) for key in weights):
        weights = {key.removeprefix(whole): tensor for key, tensor in weights.items() if key.startswith(whole)}
    weights = {key: t for key, t in weights.items() if not str(key).startswith(("loss.", "model_ema."))}
    shape = shape_of(weights, file)
    vae = AutoencoderKL(**shape, scaling_factor=scaling_factor)
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        vae.double()
    expected = vae.state_dict()
    converted = {}
    for key, tensor in weights.items():
        name = name_here(key, len(shape["block_out_channels"]))
        flat = name in expected and expected[name].ndim == 2 and tensor.shape[2:] == (1, 1)
        converted[name] = tensor[:, :, 0, 0] if flat else tensor
    load_strictly(vae, converted, file)
    return vae.requires_grad_(False).eval()


def convert(args: argparse.Namespace) -> "AutoencoderKL":
    if not args.scaling_factor > 0:
        raise UserError(f"--scaling_factor is {args.scaling_factor}: it must be positive.")
    return convert_ldm_autoencoder(args.source, args.scaling_factor)


if __name__ == "__main__":
    parser = importer_parser(__doc__)
    parser.add_argument(
        "--scaling_factor", type=float, default=0.18215, help="what latents are multiplied by for a network"
    )
    run_importer(convert, parser)
