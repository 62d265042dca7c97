"""Weights, gradients, moments and averages divided among the processes: FSDP, by PyTorch's `fully_shard`.

Each process keeps a share of every weight, of its first dimension. The weights of a block are put together where the
block computes, and forgotten after it; of an averaged gradient each process keeps its share. What is written is whole:
checkpoints hold the same files as without, so that a run goes on with any number of processes, divided or not.

Papers: ZeRO https://huggingface.co/papers/1910.02054, FSDP 2304.11277.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from tonefield.command_line import UserError


def launcher_wants(name: str, default: str = "false") -> bool:
    """What `accelerate launch` was told; it tells the processes by variables."""
    return bool(str_to_bool(os.environ.get(name, default)))


def read_launcher() -> bool | None:
    """
    Whether the launcher asks for FSDP, and if so whether the weights of a block are forgotten between its forward and
    its backward pass. It is taken off the environment: accelerate would wrap by names of classes that few networks
    have, and save by pickling; and transformers would leave text encoders empty in all processes but the first.
    """
    wanted = launcher_wants("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if not wanted:
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("The launcher asks for FSDP 1, with which this does not train: set fsdp_version: 2.")
    if launcher_wants("FSDP_OFFLOAD_PARAMS"):
        raise UserError("The launcher asks for fsdp_offload_params, with which this does not train: leave it out.")
    if launcher_wants("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("The launcher asks for fsdp_activation_checkpointing: use --gradient_checkpointing instead.")
    return launcher_wants("FSDP_RESHARD_AFTER_FORWARD", "true")


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: the blocks of a U-Net or of a transformer."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child.children() if next(block.parameters(), None) is not None)
        else:
            yield from blocks_of(child)


def whole_of(value: Any) -> Any:
    """What is divided, whole; every process calls this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor, like: Any) -> Tensor:
    """Of what each process has whole the share of this one, divided as another tensor is; all of it if that is not."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Sharding:
    """
    How the networks of a run are divided.

    Args:
        accelerator: Knows the processes.
        model: What the divided networks look like. It is not divided yet.
        reshard: Whether the weights of a block are forgotten between its forward and its backward pass.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, reshard: bool):
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.reshard, self.writes = reshard, accelerator.is_main_process
        without = {id(value): nn.Parameter(value.to("meta"), value.requires_grad) for value in model.parameters()}
        self.skeleton = copy.deepcopy(model, memo=without).eval()

    def divide(self, network: nn.Module) -> nn.Module:
        """In place. An optimizer is to be made after it."""
        for block in blocks_of(network):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=self.reshard)
        fully_shard(network, mesh=self.mesh)
        return network

    def whole(self, network: nn.Module) -> Any:
        """A copy that is not divided; every process calls this."""
        copied = copy.deepcopy(self.skeleton)
        weights = {name: whole_of(value) for name, value in network.state_dict().items()}
        copied.load_state_dict(weights, assign=True)
        return copied

    @staticmethod
    def shares(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A process's share of weights that each process has read whole."""
        now = network.state_dict()
        return {name: share_of(value, now.get(name)) for name, value in weights.items()}

    def save_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an optimizer tell its state whole, to the process that writes, and take its share of what is whole."""

        def tell(_optimizer, state: dict) -> dict:
            def told(value):
                if not isinstance(value, DTensor):
                    return value
                value = value.full_tensor()
                return value.cpu() if self.writes else value.new_empty(0)

            return tree_map(told, state)

        def take_share(optimizer, state: dict) -> dict:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            shares = {
                number: {name: share_of(value, parameters[number]) if torch.is_tensor(value) and value.ndim else value
                         for name, value in values.items()}
                for number, values in state["state"].items()
            }  # fmt: skip
            return state | {"state": shares}

        optimizer.register_state_dict_post_hook(tell)
        optimizer.register_load_state_dict_pre_hook(take_share)
