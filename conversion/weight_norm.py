"""Published weights whose length and direction are stored apart, as weight normalisation trains them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# Where the length is, and where the direction: in the older form of PyTorch and in the newer one.
NORMED = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}


def fold_weight_norm(weights: Mapping[str, "torch.Tensor"]) -> "dict[str, torch.Tensor]":
    """The weights themselves: w = g v / |v|, the norm over all dimensions but the first (Salimans and Kingma 2016)."""
    folded = dict(weights)
    for length, direction in NORMED.items():
        for key in [key for key in weights if key.endswith(f".{length}")]:
            other = key.removesuffix(length) + direction
            if other in weights:
                g, v = folded.pop(key), folded.pop(other)
                exact = v.double()
                norm = exact.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
                folded[key.removesuffix(length) + "weight"] = (g.double() * exact / norm).to(v.dtype)
    return folded
