"""Adapters of low rank (LoRA, https://huggingface.co/papers/2106.09685): W x + B A x in the place of W x.

A and B have few numbers, and only they are trained. B begins with 0, so that the training starts from the network as
it is. What is saved is in diffusers' format, at the end as in each checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file

from tonefield.command_line import UserError
from tonefield.pipelines.tonefield_lora import base_fingerprint
from tonefield.pipelines.tonefield_repository import code_span, plain
from tonefield.training.publishing import write_card


NAME = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of attention, to the text and to the sound itself


def has_adapter(network: Any) -> bool:
    return bool(getattr(network, "peft_config", None))


def add_lora(args, network) -> None:
    """Freezes a network and adds what is trained in its place."""
    if not hasattr(network, "add_adapter"):
        raise UserError(
            f"--lora_rank: the {type(network).__name__} of {args.from_pretrained} takes no adapter, only networks that"
            " read text do. Without --lora_rank all of its weights are trained."
        )
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora_rank needs peft: pip install tonefield[lora]") from None
    base = base_fingerprint(network)
    network.requires_grad_(False)
    torch.manual_seed(args.seed)
    network.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=list(PROJECTIONS)))
    network.base_fingerprint = base


def save_lora(network, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    settings = network.peft_config[NAME].to_dict()
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    settings["base_model_name_or_path"] = (
        network.base_fingerprint
    )  # here, not before: peft would look for it on the Hub
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, dict(get_peft_model_state_dict(network, adapter_name=NAME)), unet_lora_adapter_metadata=settings
    )


def restore_lora(network, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    weights = {name.removeprefix("unet."): value for name, value in load_file(folder / WEIGHTS).items()}
    set_peft_model_state_dict(network, weights, adapter_name=NAME)


def write_lora(args, network, facts: dict, folder: Path, repository: str | None) -> None:
    """The trained adapter and a model card that says how to use it."""
    save_lora(network, folder)
    local = Path(args.from_pretrained).exists()
    base = Path(args.from_pretrained).resolve().name if local else args.from_pretrained
    name = repository or folder.resolve().name
    write_card(
        folder, name, f"A LoRA for the pipeline {code_span(base)}.",
        {"rank": args.lora_rank, "trained for": plain(base), **facts},
        f'import tonefield\n\n\npipe = tonefield.load("{base}")\n'
        f'pipe.load_lora_weights("{name}", adapter_name="mine")\n'
        'pipe.set_adapters("mine", 0.8)  # weaker; pipe.unload_lora_weights() ends it',
        ["lora"], base_model=None if local else base,
    )  # fmt: skip
