# Of the pipeline that the mixin is mixed into, the type checker knows nothing:
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
"""LoRA: a small adapter that has been trained for the network of a pipeline.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

import hashlib
import os
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from huggingface_hub.errors import HTTPError


logger = logging.get_logger(__name__)


def base_fingerprint(network: torch.nn.Module) -> str:
    """Tells networks apart by their weights; an adapter that is trained in the network does not count."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_lora(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Refuses an adapter that the layers of a network cannot take."""
    if not hasattr(network, "load_lora_adapter"):
        raise ValueError(f"{type(network).__name__} takes no LoRA: only networks that read text do.")
    weights = {name.removeprefix("unet."): value for name, value in weights.items() if name.startswith("unet.")}
    if not weights:
        raise ValueError("These weights are no LoRA of a U-Net: none of their names begins with 'unet.'.")
    layers: Any = dict(network.named_modules())
    for name, value in weights.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):  # what other programs write is left to diffusers
            continue
        if path not in layers:
            raise ValueError(f"The LoRA was trained for another network: this one has no {path}.")
        inputs = part == "lora_A"
        given = value.shape[1 if inputs else 0]
        there = getattr(layers[path], "base_layer", layers[path]).weight.shape[1 if inputs else 0]
        if given != there:
            verb = "takes" if inputs else "makes"
            raise ValueError(
                f"The LoRA was trained for another network: there {path} {verb} {given} numbers, here {there}."
            )


class LoraMixin(StableDiffusionLoraLoaderMixin):
    """
    Loading of adapters for the `unet`, in diffusers' format, as diffusers' pipelines do it: `load_lora_weights`,
    `set_adapters`, `disable_lora`, `enable_lora`, `fuse_lora`, `unfuse_lora`, `delete_adapters`,
    `unload_lora_weights`, all with [peft](https://huggingface.co/docs/peft).
    """

    _lora_loadable_modules = ["unet"]  # noqa: RUF012

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """
        Add an adapter to the network, and use it. Only safetensors are read.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A folder (what `train_unet.py --lora_rank` wrote), a file, a repository on the Hub, or the weights.
            adapter_name (`str`, *optional*): What to call it in `set_adapters` and `delete_adapters`.
            kwargs: What else diffusers' `lora_state_dict` takes: `weight_name`, `subfolder`, `revision`, `token`, ...
        """
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, dict) and not os.path.isfile(given):
            kwargs.setdefault("weight_name", LORA_WEIGHT_NAME_SAFE)
        try:
            weights, alphas, metadata = self.lora_state_dict(  # pyright: ignore
                given,  # pyright: ignore
                use_safetensors=True,
                return_lora_metadata=True,
                **kwargs,
            )
        except (OSError, HTTPError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{given} is no LoRA that can be read, here or on the Hub: {reason}") from error
        check_lora(self.unet, weights)
        base = (metadata or {}).pop("unet.base_model_name_or_path", None)
        alone = self.unet.dtype == torch.float32 and not getattr(self.unet, "peft_config", None)
        if base is not None and alone and base != (here := base_fingerprint(self.unet)):
            logger.warning(f"The LoRA was trained on the network {base}, this one is {here}: it may sound wrong.")
        self.load_lora_into_unet(weights, alphas, self.unet, adapter_name, _pipeline=self, metadata=metadata)

    def fuse_lora(self, components: list[str] | None = None, lora_scale: float = 1.0, **kwargs) -> None:
        """Make the adapters part of the network's weights, `lora_scale` times; see diffusers."""
        super().fuse_lora(components or ["unet"], lora_scale, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Undo [`~LoraMixin.fuse_lora`]."""
        super().unfuse_lora(components or ["unet"], **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        if getattr(self.unet, "peft_config", None):
            raise ValueError(
                "A LoRA is loaded, which is not saved with a pipeline. Before saving, make it part of the network:"
                " pipe.fuse_lora(); pipe.unload_lora_weights(). The latter alone leaves it out."
            )
        super().save_pretrained(*args, **kwargs)
