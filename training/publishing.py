"""What was trained, on the Hub, and what its model card tells of the training."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import auth_check, create_repo, dataset_info, get_token, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from tonefield.command_line import UserError, first_line


HUB_ERRORS = (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError)

# Flags of one machine or one start, which the command in the model card leaves out.
LOCAL_FLAGS = ("config", "output_dir", "resume_from_checkpoint", "max_hours", "dataloader_num_workers", "report_to",
               "tracker_project_name", "push_to_hub", "hub_model_id", "hub_private_repo")  # fmt: skip


def find_repository(args) -> str:
    """
    The repository that --push_to_hub will write to. It is made before the training, since nothing else tells whether a
    token may; but after all that can be refused otherwise, so that no empty repository is left behind.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if get_token() is None:
        raise UserError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    try:
        repository = create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
        auth_check(repository, write=True)  # making what is there already succeeds without any permission
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub cannot write to {name}: {first_line(error)}") from None
    return repository


def settings_of(component) -> dict[str, Any]:
    """The configuration of a network or scheduler."""
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def publish(pipeline, folder: Path, repository: str) -> None:
    """Uploads a pipeline that has been saved, and beside it what its training has told."""
    try:
        pipeline.push_to_hub(repository)
        upload_folder(repo_id=repository, folder_path=folder, allow_patterns=["samples/*", "metrics.jsonl"])
    except HUB_ERRORS as error:
        raise UserError(
            f"The pipeline is in {folder}, but was not pushed: {first_line(error).rstrip('.')}. Try again with"
            f" tonefield.load({str(folder)!r}).push_to_hub({repository!r})."
        ) from None
    print(f"pushed to {repository}")


def publish_folder(folder: Path, repository: str) -> None:
    """Uploads what was trained where that is no pipeline, without the checkpoints."""
    try:
        upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=["checkpoint-*/**", "best/**", ".*", "logs/**"]
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"The model is in {folder}, but was not pushed: {first_line(error).rstrip('.')}. Try again with"
            f" hf upload {repository} {folder} --exclude 'checkpoint-*/**'"
        ) from None
    print(f"pushed to {repository}")


def training_facts(script: str, args, defaults, accelerator) -> dict[str, Any]:
    """What the card of a pipeline tells: the data, the command that repeats the training, and how it went."""
    facts: dict[str, Any] = {"command": f"`{command(script, args, defaults, accelerator.num_processes)}`"}
    if Path(args.dataset_name).exists():
        facts["dataset"] = Path(args.dataset_name).resolve().name
    else:
        facts |= {"datasets": [args.dataset_name], "dataset license": license_of(args.dataset_name)}
    facts["samples per step"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    metrics = last_metrics(Path(args.output_dir, "metrics.jsonl"))
    facts["optimizer steps"] = metrics.get("step", args.max_train_steps)
    for name, key in {"training loss": "loss", "validation loss": "validation_loss",
                      "seconds per step": "seconds_per_step"}.items():  # fmt: skip
        facts[name] = f"{metrics[key]:.4g}" if key in metrics else None
    return facts


def command(script: str, args, defaults, num_processes: int) -> str:
    """The call of a script with these flags, whatever recipe they came from. Folders are named without their place."""
    words = ["python"] if num_processes == 1 else ["accelerate", "launch", "--num_processes", str(num_processes)]
    words.append(script)
    for name, value in vars(args).items():
        if name in LOCAL_FLAGS or value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            local = isinstance(value, str) and os.path.exists(value)  # which a long JSON does not upset
            words += [f"--{name}", Path(value).resolve().name if local else str(value)]
    return shlex.join(words)


def last_metrics(file: Path) -> dict[str, float]:
    """The newest of each number in `metrics.jsonl`."""
    newest: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        newest |= json.loads(line)
    return newest


def license_of(dataset_name: str) -> str | None:
    """The licence of a dataset on the Hub, if it states one and the Hub can be asked."""
    try:
        card = dataset_info(dataset_name).card_data
    except HUB_ERRORS:
        return None
    return card.get("license") if card else None
