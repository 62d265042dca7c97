"""Checkpoints that are complete or not there, and that say which run they belong to.

A checkpoint is a folder `checkpoint-<step>`. It is written under another name and renamed when all of it is there;
`state.json` lists the files with their checksums, so that damage which comes later is noticed as well.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file

from tonefield.command_line import UserError, first_line
from tonefield.files import replace_folder, writing
from tonefield.training.engines import DDP
from tonefield.training.lora import has_adapter, restore_lora, save_lora


logger = get_logger(__name__)

FORMAT = "tonefield-checkpoint"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTINUE = "continue with --resume_from_checkpoint latest"


class DamagedCheckpoint(Exception):
    """Files are missing, or are not those that were written."""


class Checkpoints:
    """
    Saves and restores a run: networks, optimizer, learning rate, loss scaler, random state of every process, position.
    Of a network with an adapter (LoRA) the adapter alone.

    Args:
        engine: What prepared the network, the optimizer and the schedule.
        folder: Where the checkpoints lie.
        networks: What is saved, by the name of its subfolder. They are restored in place.
        limit: How many to keep; `None` keeps all.
    """

    def __init__(self, engine: DDP, folder: Path, networks: Mapping[str, Any], limit: int | None = None):
        self.engine, self.folder, self.networks, self.limit = engine, folder, networks, limit
        self.accelerator = accelerator = engine.accelerator
        accelerator.register_save_state_pre_hook(self._save_networks)
        accelerator.register_load_state_pre_hook(self._load_networks)

    def _save_networks(self, _models, weights: list, folder: str) -> None:
        weights.clear()  # accelerate has nothing left to save under names of its own
        for name, network in self.networks.items():
            network = self.engine.whole(network)
            if self.accelerator.is_main_process:
                if has_adapter(network):
                    save_lora(network, Path(folder, name))
                else:
                    network.save_pretrained(Path(folder, name), max_shard_size="1TB")

    def _load_networks(self, models: list, folder: str) -> None:
        models.clear()
        for name, network in self.networks.items():
            if has_adapter(network):
                restore_lora(network, Path(folder, name))
            else:
                weights = load_file(Path(folder, name, WEIGHTS))
                network.load_state_dict(self.engine.shares(network, weights))

    def save(self, step: int, state: dict) -> Path:
        """Every process calls this; when it returns, `checkpoint-<step>` is complete, and old ones are gone."""
        accelerator, final = self.accelerator, self.folder / f"checkpoint-{step}"
        partial = self.folder / f".checkpoint-{step}.partial"
        with writing(final, CONTINUE):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                content = {"format": FORMAT, "step": step, **state, "files": checksums(partial)}
                content["checksum"] = checksum_of(content)
                (partial / "state.json").write_text(json.dumps(content, indent=1))
                replace_folder(partial, final)  # what has the name was damaged and skipped, or the run goes over it
                self.prune(step)
            accelerator.wait_for_everyone()
        return final

    def prune(self, step: int) -> None:
        """Keeps the newest ones up to `step`. Later ones, which are damaged or given up, count for nothing."""
        if self.limit is not None:
            so_far = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
            for old in so_far[: -self.limit]:
                shutil.rmtree(old)

    def restore(self, folder: Path) -> None:
        """Loads a checkpoint that `find_checkpoint` has found whole."""
        self.accelerator.load_state(str(folder))
        # It counts batches, to know where a step ends. Now a step begins, into however many batches it is divided.
        self.accelerator.step = 0


class Best:
    """
    The network with the lowest validation loss, or other metric, so far, in the folder `best`, where a killed run
    leaves it as well.

    Args:
        folder: Where `best` lies.
        name: The subfolder of the network.
        anew: Whether to forget what an earlier run left there.
        metric: What is compared.
    """

    def __init__(self, folder: Path, name: str, anew: bool, metric: str = "validation_loss"):
        self.folder, self.name, self.metric = folder / "best", name, metric
        self.note = self.folder / "best.json"
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            known = json.loads(self.note.read_text())
        except (OSError, ValueError):  # not there, or damaged: the next one is better
            known = {}
        # What was the best by another metric says nothing about this one.
        self.rank = (known["stage"], -known[metric]) if metric in known else (-1, -math.inf)

    def offer(self, network, loss: float, step: int, stage: int = 0) -> None:
        """Keeps a network if it is better. One of a later stage of the training always is: its loss is another."""
        if not math.isfinite(loss) or (stage, -loss) <= self.rank:
            return
        partial = self.folder.with_name(".best.partial")
        with writing(self.folder, CONTINUE):
            shutil.rmtree(partial, ignore_errors=True)
            network.save_pretrained(partial / self.name, max_shard_size="1TB")
            note = {"step": step, self.metric: loss, "stage": stage}
            (partial / self.note.name).write_text(json.dumps(note))
            replace_folder(partial, self.folder)
        self.rank = stage, -loss

    def restore(self, network) -> None:
        """Gives a network the best weights, if there was a validation."""
        if self.note.is_file():
            try:
                weights = load_file(self.folder / self.name / WEIGHTS)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder} is damaged: {first_line(error)}. Delete it and {CONTINUE}, to publish what was"
                    " trained last."
                ) from None
            network.load_state_dict(weights)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of an output folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def fingerprint_of(model: torch.nn.Module, *settings: Any) -> str:
    """Tells networks apart: equal when weights and settings are."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    if settings:
        digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, except `state.json`, which contains them."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "state.json":
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def checksum_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict:
    """The state in a checkpoint, after every file of it was compared with its checksum."""
    try:
        state = json.loads((folder / "state.json").read_text())
        files = dict(state["files"])
    except OSError as error:
        raise DamagedCheckpoint(f"state.json cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint("state.json is not what a training run writes") from None
    if state.pop("checksum", None) not in (None, checksum_of(state)):  # earlier versions wrote none
        raise DamagedCheckpoint("state.json is not what was written")
    there = checksums(folder)
    for name, digest in files.items():
        if there.get(name) != digest:
            raise DamagedCheckpoint(f"{name} is {'not what was written' if name in there else 'missing'}")
    return state


def find_checkpoint(resume: str, folder: Path) -> tuple[Path, dict] | None:
    """
    The checkpoint to continue from and its state.

    `resume` is a path, where damage is an error, or `"latest"`: the newest one of `folder` that is whole. If there is
    no checkpoint at all the run begins at step 0, as the first start of a job that is resubmitted until it ends.
    """
    if resume != "latest":
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise UserError(f"{path} is not a checkpoint of a training run: it has no state.json.")
        try:
            state = read_state(path)
        except DamagedCheckpoint as damage:
            raise UserError(f"The checkpoint {path} is damaged: {damage}.") from None
        if state.get("format") != FORMAT:
            raise UserError(f"{path} is not a checkpoint of a training run: its state.json does not say so.")
        return path, state
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_state(path)
        except DamagedCheckpoint as damage:
            logger.warning(f"The checkpoint {path} is damaged and skipped: {damage}.")
    if list_checkpoints(folder):
        raise UserError(f"All checkpoints in {folder} are damaged: delete them to begin at step 0.")
    logger.warning(f"There is no checkpoint in {folder}: the run begins at step 0.")
    return None


def check_same_run(state: dict, now: dict, path: Path) -> None:
    """Refuses to continue a run with other data or another network; `now` holds what must be equal."""
    then = state.get("run", {})
    for name, value in now.items():
        if name in then and then[name] != json.loads(json.dumps(value)):
            raise UserError(f"{path} was trained with {name} {then[name]}, this run has {value}: they must be equal.")
