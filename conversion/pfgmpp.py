"""PFGM++ and EDM checkpoints become a MelPFGMPipeline: a SongUNet2DModel with a PoissonFlowScheduler.

    python -m tonefield.conversion.pfgmpp training-state-200000.pt models/cifar10-pfgmpp
    python -m tonefield.conversion.pfgmpp edm-ffhq-64x64-uncond-vp.pkl models/ffhq-edm --license cc-by-nc-sa-4.0

IN is a `training-state-*.pt` or a network `.pkl`, or a folder or Hub repository with just one. These files are pickles
that carry program text; none of it is run. The averaged weights are taken unless --weights net asks for those in
training. The pipeline returns pictures. The published weights may be used for non-commercial purposes only.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from tonefield.command_line import UserError
from tonefield.conversion.command import find_source, importer_parser, load_strictly, run_importer
from tonefield.conversion.inert_pickle import Storages, is_record, mapping_of, read_inert, tensor_of


if TYPE_CHECKING:
    import torch

    from tonefield.models import SongUNet2DModel
    from tonefield.pipelines import MelPFGMPipeline


LICENSE = "cc-by-nc-sa-4.0"  # of the published weights of both
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"

# What a network's arguments are where its checkpoint does not say.
DEFAULTS: dict[str, Any] = dict(
    label_dim=0, augment_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2], channel_mult_emb=4, num_blocks=4,
    attn_resolutions=[16], dropout=0.1, label_dropout=0, embedding_type="positional", channel_mult_noise=1,
    encoder_type="standard", decoder_type="standard", resample_filter=[1, 1],
)  # fmt: skip
FORMS = {
    "ddpmpp": dict(
        embedding_type="positional", channel_mult_noise=1, encoder_type="standard", resample_filter=[1, 1],
        decoder_type="standard", channel_mult_emb=4,
    ),
    "ncsnpp": dict(
        embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1],
        decoder_type="standard", channel_mult_emb=4,
    ),
}  # fmt: skip

# What is inside of a residual block, there and here.
BLOCK = {
    "norm0": "norm1", "conv0": "conv1", "affine": "embedding", "norm1": "norm2", "conv1": "conv2", "skip": "shortcut",
    "norm2": "attention.norm", "qkv": "attention.to_qkv", "proj": "attention.to_out",
}  # fmt: skip


def state_of(value: Any) -> Mapping:
    """What a module in a pickle was to be restored from."""
    if is_record(value, PERSISTENT) and value.arguments:
        value = mapping_of(value.arguments[0]).get("state")
        return mapping_of(value)
    return mapping_of(getattr(value, "state", None))


def class_of(value: Any) -> str:
    if is_record(value, PERSISTENT) and value.arguments:
        return str(mapping_of(value.arguments[0]).get("class_name"))
    return getattr(value, "name", type(value).__name__)


def weights_of(
    module: Any, storages: Storages, prefix: str = "", seen: set | None = None
) -> dict[str, "torch.Tensor"]:
    """The tensors of a module in a pickle, by the names that it gives them."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise ValueError(f"the module {prefix.rstrip('.')} is a part of it twice")
    seen.add(id(module))
    weights, state = {}, state_of(module)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in mapping_of(state.get(kind)).items():
            if tensor is not None:
                weights[f"{prefix}{name}"] = tensor_of(tensor, storages)
    for name, child in mapping_of(state.get("_modules")).items():
        weights |= weights_of(child, storages, f"{prefix}{name}.", seen)
    return weights


def read_network(file: str | os.PathLike, weights: str = "ema") -> tuple[dict, dict, dict[str, "torch.Tensor"]]:
    """The arguments of the preconditioning, those of the network inside, and its tensors, of which nothing was run."""
    path = Path(file)
    try:
        content, storages = read_inert(path)
        networks = mapping_of(content)
        if not is_record(networks.get("ema"), PERSISTENT):
            raise UserError(f"{path} holds no network of PFGM++ or EDM: there is no 'ema' in it.")
        if not is_record(networks.get(weights), PERSISTENT):
            raise UserError(
                f"{path} holds no {weights!r}: only a training-state file has weights besides the average."
            )
        outside = state_of(networks[weights])
        inside = mapping_of(outside.get("_modules")).get("model")
        names = class_of(networks[weights]), class_of(inside)
        if names != ("EDMPrecond", "SongUNet"):
            raise UserError(
                f"{path} holds a {names[1]} in a {names[0]}; only a SongUNet in an EDMPrecond can be imported."
            )
        arguments = dict(mapping_of(outside.get("_init_kwargs"))) | {"sigma_data": outside.get("sigma_data", 0.5)}
        return arguments, dict(mapping_of(state_of(inside).get("_init_kwargs"))), weights_of(inside, storages)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint.") from None
    except (ValueError, BadZipFile, RecursionError) as error:
        raise UserError(f"{path} is damaged or no checkpoint of PFGM++ or EDM: {error}.") from None


def network_for(arguments: Mapping, path: str | os.PathLike) -> "SongUNet2DModel":
    """An empty network for the arguments of a published one."""
    from tonefield.models import SongUNet2DModel

    try:
        given = DEFAULTS | dict(arguments)
        form = [form for form, settings in FORMS.items() if all(given[name] == settings[name] for name in settings)]
        if not form:
            told = ", ".join(f"{name} {given[name]}" for name in FORMS["ddpmpp"])
            raise UserError(f"{path} holds a SongUNet that is neither DDPM++ nor NCSN++, but has {told}.")
        size, levels = given["img_resolution"], range(len(given["channel_mult"]))
        return SongUNet2DModel(
            sample_size=size,
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            form=form[0],  # pyright: ignore[reportArgumentType]
            model_channels=given["model_channels"],
            block_out_channels=tuple(given["model_channels"] * factor for factor in given["channel_mult"]),
            layers_per_block=given["num_blocks"],
            attention_levels=tuple(level for level in levels if size >> level in given["attn_resolutions"]),
            dropout=float(given["dropout"]),
            num_class_embeds=given["label_dim"] + 1 if given["label_dim"] else None,
            augment_dim=given["augment_dim"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds a SongUNet of impossible arguments: {type(error).__name__} {error}.") from None


def module_names(unet: "SongUNet2DModel") -> dict[str, str]:
    """Where the modules of a published network are in ours. It names most of them after their place and size."""
    c = unet.config
    names = {
        "map_layer0": "embedding_1", "map_layer1": "embedding_2", "map_label": "class_embedding",
        "map_augment": "augment_embedding",
    }  # fmt: skip
    down, up = 0, 0
    levels = range(len(c.block_out_channels))
    sizes = [f"{c.sample_size >> level}x{c.sample_size >> level}" for level in levels]
    for level in levels:
        names[f"enc.{sizes[level]}_aux_residual"] = f"pyramid.{level - 1}.0"
        for name in (["down"] if level else []) + [f"block{i}" for i in range(c.layers_per_block)]:
            names[f"enc.{sizes[level]}_{name}"] = f"down_blocks.{down}"
            down += 1
    for level in reversed(levels):
        for name in (["up"] if level < levels[-1] else []) + [f"block{i}" for i in range(c.layers_per_block + 1)]:
            names[f"dec.{sizes[level]}_{name}"] = f"up_blocks.{up}"
            up += 1
    names |= {f"dec.{sizes[-1]}_in{i}": f"mid_blocks.{i}" for i in (0, 1)}
    names |= {f"enc.{sizes[0]}_conv": "conv_in", f"dec.{sizes[0]}_aux_norm": "norm_out"}
    return names | {f"dec.{sizes[0]}_aux_conv": "conv_out"}


def convert_song_unet(unet: "SongUNet2DModel", weights: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """
    The state of a `SongUNet2DModel` from that of a published network.

    Args:
        unet (`SongUNet2DModel`): A network of the same layout; only its structure matters.
        weights (`Mapping[str, torch.Tensor]`): The published tensors by name, such as `enc.32x32_conv.weight`.
    """
    import torch

    names, converted = module_names(unet), {}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if unet.config.form == "ncsnpp" else [1.0, 1.0])
    low_pass = torch.outer(taps, taps) / taps.sum() ** 2
    for key, tensor in weights.items():
        module, _, name = key.rpartition(".")
        if name == "resample_filter":
            if tensor.shape[2:] != low_pass.shape or not torch.allclose(tensor[0, 0].float(), low_pass):
                raise ValueError(f"{key} is not the filter of {unet.config.form}.")
            continue
        if key == "map_noise.freqs":
            converted["frequencies"] = tensor * (2 * torch.pi)
            continue
        if module not in names and module.count(".") == 2:
            outside, _, inside = module.rpartition(".")
            module = f"{names.get(outside, outside)}.{BLOCK.get(inside, inside)}"
        converted[f"{names.get(module, module)}.{name}"] = tensor
    return converted


def convert_pfgmpp(file: str | os.PathLike, weights: str = "ema") -> "MelPFGMPipeline":
    """
    A pipeline of a `training-state-*.pt` or a network `.pkl` of PFGM++ or EDM, of which nothing is executed.

    Args:
        file (`str` or `os.PathLike`): The checkpoint.
        weights (`"ema"` or `"net"`, *optional*, defaults to `"ema"`): The averaged weights, or those in training.
    """
    from tonefield.pipelines import MelPFGMPipeline
    from tonefield.schedulers import PoissonFlowScheduler

    arguments, inside, tensors = read_network(file, weights)
    unet = network_for(inside, file)
    try:
        load_strictly(unet, convert_song_unet(unet, tensors), file)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    aug_dim = arguments.get("D") if arguments.get("pfgmpp") else None
    try:
        scheduler = PoissonFlowScheduler(
            aug_dim=None if aug_dim is None else float(aug_dim), sigma_data=float(arguments["sigma_data"]),
            solver_type="heun",
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} has a preconditioning of impossible arguments: {error}") from None
    kind = "EDM diffusion" if aug_dim is None else f"PFGM++ with D = {aug_dim}"
    about = f"{kind}, imported from a published checkpoint."
    if unet.config.num_class_embeds and not (DEFAULTS | inside)["label_dropout"]:
        about += " The network was always told a class: without `class_labels` it does not know what to do."
    card = {"description": about, "license": LICENSE, "num_inference_steps": 18}
    return MelPFGMPipeline(unet.eval(), scheduler, card=card)


def convert(args: argparse.Namespace) -> "MelPFGMPipeline":
    file = find_checkpoint(args.source)
    return convert_pfgmpp(file, args.weights)


def find_checkpoint(name: str) -> Path:
    patterns = ("*.pt", "*.pkl")
    path = find_source(name, patterns)
    if not path.is_dir():
        return path
    found = sorted(file for pattern in patterns for file in path.glob(pattern))
    if len(found) != 1:
        told = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{name} must hold one checkpoint (*.pt or *.pkl) to choose from, but has {told}.")
    return found[0]


def main(argv=None) -> None:
    parser = importer_parser(__doc__)
    parser.add_argument(
        "--weights", choices=("ema", "net"), default="ema", help="the averaged weights or those in training"
        " (default: %(default)s)",
    )  # fmt: skip
    run_importer(convert, parser, argv)


if __name__ == "__main__":
    main()
