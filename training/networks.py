"""The U-Net for a dataset: a size by name, or a network of one's own from a file or a recipe."""

import importlib
from pathlib import Path

from tonefield.command_line import UserError, first_line


# Networks by name; attention from the given level on. Sizes for a test, a laptop, a 24 GB card, and 8 GPUs.
MODEL_SIZES = {
    "tiny": dict(block_out_channels=(8, 16), layers=1, attention_from=1, head_dim=8, groups=4),
    "small": dict(block_out_channels=(16, 32, 64, 128), layers=1, attention_from=2, head_dim=32, groups=8),
    "medium": dict(block_out_channels=(64, 128, 256, 256), layers=2, attention_from=2, head_dim=64, groups=32),
    "large": dict(block_out_channels=(128, 256, 384, 512), layers=3, attention_from=2, head_dim=64, groups=32),
}  # fmt: skip

# What --model_config may name, and where it is found.
NETWORKS = {
    "UNet2DModel": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "PFGMUNet2DModel": "tonefield.models",
    "PFGMTransformerUNet2DModel": "tonefield.models",
    "SongUNet2DModel": "tonefield.models",
}
OF_NOISE_LEVELS = ("PFGMUNet2DModel", "PFGMTransformerUNet2DModel", "SongUNet2DModel")

MAX_ATTENTION = 4096  # positions that attend to one another; the cost grows with their square

# The objectives of Poisson flow: their networks are told noise levels.
POISSON = ("pfgmpp", "stable_target", "field")


def read_model_config(given: str) -> dict:
    """What `--model_config` gives: the arguments of a network in a file, or JSON itself, as a recipe passes them."""
    import yaml

    inline = given.lstrip().startswith("{")
    source = "model_config" if inline else f"--model_config {given}"
    try:
        config = yaml.safe_load(given if inline else Path(given).read_text(encoding="utf-8"))  # YAML contains JSON
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{source} cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} must consist of the arguments of a network.")
    return {name: number(value) for name, value in config.items()}


def read_network(given: str, usual: str) -> tuple[str, dict]:
    """The class of a U-Net, and its arguments."""
    config = read_model_config(given)
    class_name = config.get("_class_name", usual)
    if class_name not in NETWORKS:
        source = "model_config" if given.lstrip().startswith("{") else f"--model_config {given}"
        raise UserError(f"{source} names the network {class_name}; there are {', '.join(NETWORKS)}.")
    return class_name, {name: value for name, value in config.items() if not name.startswith("_")}


def number(value):
    """YAML takes 1e-6, which has no point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def make_unet(args, data, text_width: int | None = None):
    """The network for the data: the flags' layout, one channel more for a field, one class more for "no class"; with
    the width of the text that it is to be told, one that reads it."""
    import torch

    channels, height, width = data.sample_shape
    derived = {
        "sample_size": [height, width],
        "in_channels": channels,
        "out_channels": channels + (args.objective == "field"),
        "num_class_embeds": len(data.class_names) + 1 if data.class_names else None,
    }
    reading = {} if text_width is None else {"cross_attention_dim": text_width}
    derived |= reading
    class_name = "UNet2DConditionModel" if reading else next(iter(NETWORKS))
    if args.model_config:
        class_name, config = read_network(args.model_config, class_name)
        if (class_name == "UNet2DConditionModel") != bool(reading):
            why = "does not read text" if reading else "reads text"
            raise UserError(f"{class_name} {why}: use UNet2DConditionModel with --text_encoder, and without it not.")
        for name, meaning in {
            "num_class_embeds": "one for each class and one for none",
            "in_channels": "channels of the data",
            "out_channels": "channels of what the objective predicts",
            **dict.fromkeys(reading, "the width of the text encoder"),
        }.items():
            if config.get(name, derived[name]) != derived[name]:
                raise UserError(
                    f"--model_config has {name} {config[name]}, the dataset wants {derived[name]} ({meaning})."
                )
        if class_name in OF_NOISE_LEVELS and args.objective not in POISSON:
            raise UserError(
                f"{class_name} sees noise levels, which --objective {args.objective} does not have:"
                f" use {', '.join(POISSON)}, or a network of diffusers."
            )
        config = config | derived | ({} if args.dropout is None else {"dropout": args.dropout})
    else:
        size = MODEL_SIZES[args.model_size]
        positions = [(height >> level) * (width >> level) for level in range(len(size["block_out_channels"]))]
        attention = [
            level >= size["attention_from"] and count <= MAX_ATTENTION for level, count in enumerate(positions)
        ]
        config = derived | {
            "block_out_channels": size["block_out_channels"],
            "layers_per_block": size["layers"],
            "norm_num_groups": size["groups"],
            "dropout": args.dropout or 0.0,
        }
        blocks = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if reading else ("AttnDownBlock2D", "AttnUpBlock2D")
        config["down_block_types"] = [blocks[0] if here else "DownBlock2D" for here in attention]
        config["up_block_types"] = [blocks[1] if here else "UpBlock2D" for here in reversed(attention)]
        if reading:  # where diffusers calls the number of heads their dimension
            heads = tuple(max(1, count // size["head_dim"]) for count in size["block_out_channels"])
            config["attention_head_dim"] = heads
        else:
            config |= {"add_attention": attention[-1], "attention_head_dim": size["head_dim"]}
    levels = len(config.get("block_out_channels", (224, 448, 672, 896)))
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        kind, unit = (" latents", data.mel.config.n_mels // height * factor) if data.vae else ("", factor)
        raise UserError(
            f"{levels} levels halve the input {levels - 1} times, which {height} x {width}{kind} does not allow. Use"
            f" a dataset with multiples of {unit} (audio_to_images.py --resolution), or fewer levels (--model_size)."
        )
    torch.manual_seed(args.seed)
    try:
        unet = getattr(importlib.import_module(NETWORKS[class_name]), class_name)(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{class_name} cannot be built: {first_line(error)}") from None
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet
