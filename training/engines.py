"""How the processes of a run share the work, and what each of them keeps: all of it (DDP), or a share of it.

FSDP, as PyTorch's `fully_shard` does it: each process keeps a share of every weight, of its first dimension, of its
gradient, its moments and its average. The weights of a block are put together where the block computes, and forgotten
after it. ZeRO 1 and 2, as DeepSpeed does it: each process keeps all weights, and a share of the moments and, with ZeRO
2, of the gradients; the moments may lie in the memory of the machine.

What is written is whole: checkpoints hold the same files with each of them, so that a run goes on with another.

Papers: ZeRO https://huggingface.co/papers/1910.02054, ZeRO-Offload 2101.06840, FSDP 2304.11277.
"""

import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from tonefield.command_line import UserError
from tonefield.training.lora import has_adapter


class DDP:
    """
    Each process keeps all of it; gradients are averaged. One process alone is a case of it.

    Args:
        accelerator: Knows the processes.
        model: What is trained. It is on its device.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator, self.model = accelerator, model

    def average_of(self, model: nn.Module) -> nn.Module:
        """A copy that the average is kept in. Weights that are not trained are there once, for both."""
        frozen = {id(value): value for value in model.parameters() if not value.requires_grad}
        return copy.deepcopy(model, memo=dict(frozen))

    def prepare(self, optimizer: torch.optim.Optimizer, schedule: Any) -> tuple[Any, Any, Any]:
        """What is called in the place of the model, of its optimizer, and of the schedule."""
        return self.accelerator.prepare(self.model, optimizer, schedule)

    def accumulate(self, networks: Sequence[nn.Module]) -> AbstractContextManager:
        """Within it, gradients of a part of a step are added up."""
        return self.accelerator.accumulate(*networks)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self, networks: Sequence[nn.Module], optimizer: Any, max_norm: float) -> Tensor | None:
        """Does a step, if all of its parts are there; the norm of the gradient of the first network."""
        norm = None
        if self.accelerator.sync_gradients:
            norm = whole_of(torch.as_tensor(self.accelerator.clip_grad_norm_(networks[0].parameters(), max_norm)))
            for other in networks[1:]:  # accelerate has unscaled all gradients, and does so only once
                torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def whole(self, network: nn.Module) -> Any:
        """A network that can be used and saved; every process calls this."""
        return network

    def shares(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a process keeps of weights that it has read whole."""
        return weights


# ----- FSDP


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


class FSDP(DDP):
    """
    Each process keeps a share of everything.

    Args:
        reshard: Whether the weights of a block are forgotten between its forward and its backward pass.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, reshard: bool):
        super().__init__(accelerator, model)
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.reshard = reshard
        without = {id(value): nn.Parameter(value.to("meta"), value.requires_grad) for value in model.parameters()}
        self.skeleton = copy.deepcopy(model, memo=without)
        self.divide(model)

    def divide(self, network: nn.Module) -> nn.Module:
        for block in blocks_of(network):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=self.reshard)
        fully_shard(network, mesh=self.mesh)
        return network

    def average_of(self, model: nn.Module) -> nn.Module:
        return self.divide(self.whole(model))

    def prepare(self, optimizer: torch.optim.Optimizer, schedule: Any) -> tuple[Any, Any, Any]:
        optimizer.register_state_dict_post_hook(self._tell_whole)
        optimizer.register_load_state_dict_pre_hook(self._take_share)
        network = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # which is all but DDP
        return network, *self.accelerator.prepare(optimizer, schedule)

    def whole(self, network: nn.Module) -> Any:
        copied = copy.deepcopy(self.skeleton)
        weights = {name: whole_of(value) for name, value in network.state_dict().items()}
        copied.load_state_dict(weights, assign=True)
        return copied

    def shares(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        now = network.state_dict()
        return {name: share_of(value, now.get(name)) for name, value in weights.items()}

    def _tell_whole(self, _optimizer, state: dict) -> dict:
        """The state of the optimizer as the process that writes tells it."""

        def told(value):
            if not isinstance(value, DTensor):
                return value
            value = value.full_tensor()
            return value.cpu() if self.accelerator.is_main_process else value.new_empty(0)

        return tree_map(told, state)

    def _take_share(self, optimizer, state: dict) -> dict:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        shares = {
            number: {name: share_of(value, parameters[number]) if torch.is_tensor(value) and value.ndim else value
                     for name, value in values.items()}
            for number, values in state["state"].items()
        }  # fmt: skip
        return state | {"state": shares}


# ----- ZeRO


class ZeRO(DDP):
    """
    Each process keeps all weights, and a share of the moments.

    DeepSpeed lays all weights end to end and cuts the line into equal pieces; `_hp_mapping` of a parameter says what
    of it lies where in the piece of this process.

    Args:
        stage: 1, or 2, where each process keeps a share of the gradients only.
        offload: Whether moments lie in the memory of the machine, where the optimizer then computes.
        config: Batches and norms, as DeepSpeed calls them.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, accelerator: Accelerator, model: nn.Module, stage: int, offload: bool, config: dict):
        super().__init__(accelerator, model)
        self.config = config | {
            "zero_optimization": {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
            "zero_allow_untested_optimizer": True,  # PyTorch's own, fused
            "zero_force_ds_cpu_optimizer": False,
        }

    def prepare(self, optimizer: torch.optim.Optimizer, schedule: Any) -> tuple[Any, Any, Any]:
        os.environ.setdefault("DS_ACCELERATOR", self.accelerator.device.type)
        import deepspeed  # pyright: ignore[reportMissingImports]

        deepspeed.utils.logger.setLevel("WARNING")
        self.parameters = list(optimizer.param_groups[0]["params"])
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        optimizer.register_state_dict_post_hook(self._tell_whole)
        optimizer.register_load_state_dict_pre_hook(self._take_share)
        return self.engine, *self.accelerator.prepare(optimizer, schedule)

    def accumulate(self, networks: Sequence[nn.Module]) -> AbstractContextManager:
        return self.accelerator.accumulate()  # DeepSpeed counts by itself

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def update(self, networks: Sequence[nn.Module], optimizer: Any, max_norm: float) -> Tensor | None:
        self.engine.step()  # which clips, and forgets the gradients
        if not self.accelerator.sync_gradients:
            return None
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.accelerator.device)

    def _tell_whole(self, _optimizer, state: dict) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        (group,), numbers, states = state["param_groups"], range(len(self.parameters)), {}
        for line in state["state"].values():  # the only one; before the first step there is none
            for number in numbers:
                moments = {name: safe_get_full_optimizer_state(self.parameters[number], name) for name in self.MOMENTS}
                kept = {name: value.cpu() for name, value in moments.items() if self.accelerator.is_main_process}
                states[number] = {"step": line["step"].clone()} | kept
        return {"state": states, "param_groups": [group | {"params": list(numbers)}]}

    def _take_share(self, optimizer, state: dict) -> dict:
        self.engine.optimizer.refresh_fp32_params()  # its copy of the weights, which have been restored
        (line,) = optimizer.param_groups[0]["params"]
        share = {name: torch.zeros_like(line) for name in self.MOMENTS}
        for number, parameter in enumerate(self.parameters):
            if (mapping := parameter._hp_mapping) is None:  # it lies in the pieces of others
                continue
            of, to = (slice(at.start, at.start + at.numel)
                      for at in (mapping.lp_fragment_address, mapping.hp_fragment_address))  # fmt: skip
            for name in self.MOMENTS if state["state"] else ():
                share[name][to] = state["state"][number][name].flatten()[of].to(line.device)
        states = {0: share | {"step": state["state"][0]["step"]}} if state["state"] else {}
        return {"state": states, "param_groups": [state["param_groups"][0] | {"params": [0]}]}


# ----- what the launcher asks for


def refused(wanted: str, remedy: str) -> UserError:
    return UserError(f"The launcher asks for {wanted}, with which this does not train: {remedy}.")


def read_launcher(args) -> tuple[type[DDP], dict[str, Any]]:
    """
    The engine that the launcher asks for by variables, and its settings, some of which are flags.

    They are taken off the environment. With FSDP accelerate would wrap by names of classes that few networks have, and
    save by pickling, and transformers would leave text encoders empty in all processes but the first; with DeepSpeed
    accelerate would round the weights to the precision of the computation, and save by pickling.
    """
    asked = {name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if parse_flag_from_env(f"ACCELERATE_USE_{name}")}
    for name in asked:
        os.environ.pop(f"ACCELERATE_USE_{name}")
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # which is a flag of the script
    if "MEGATRON_LM" in asked:
        raise refused("Megatron-LM", "use --multi_gpu (DDP)")
    if "FSDP" in asked:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise refused("FSDP 1", "set fsdp_version: 2")
        if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise refused("fsdp_offload_params", "leave it out")
        if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
            raise refused("fsdp_activation_checkpointing", "use --gradient_checkpointing")
        return FSDP, {"reshard": parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)}
    if "DEEPSPEED" in asked:
        names = ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
        stage, offload, offload_weights, file = (
            os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none") for name in names
        )
        if file != "none":
            raise refused(f"deepspeed_config_file: {file}", "set zero_stage and offload_optimizer_device instead")
        if stage not in ("1", "2", "none"):
            raise refused(f"zero_stage: {stage}", "use 1 or 2, or FSDP, which divides the weights as well")
        if offload not in ("cpu", "none") or offload_weights != "none":
            raise refused("offload_param_device or nvme", "only offload_optimizer_device: cpu is supported")
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("The launcher asks for DeepSpeed, which is not installed: pip install deepspeed.")
        config = {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }
        return ZeRO, {"stage": 2 if stage == "none" else int(stage), "offload": offload == "cpu", "config": config}
    return DDP, {}


def check_engine(engine: type[DDP], precision: str, model: nn.Module, opponent: Any) -> None:
    """Refuses what an engine cannot do."""
    what = None
    if opponent:  # whose weight needs gradients of the last layer, whole
        what = "An opponent (--discriminator_weight)"
    elif has_adapter(model):
        what = "--lora_rank"
    elif precision == "fp16":  # processes would not know of overflows in the shares of others
        what = "--mixed_precision fp16"
    if engine is not DDP and what:
        raise UserError(f"{what} does not go with {engine.__name__}: leave it out, or launch with --multi_gpu (DDP).")
