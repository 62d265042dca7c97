"""What was trained, on the Hub, and what its model card tells of the training."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    ModelCardData,
    auth_check,
    create_repo,
    file_exists,
    get_token,
    hf_hub_download,
    upload_folder,
)

from tonefield.command_line import UserError, command_of
from tonefield.files import write_text
from tonefield.hub import hub_errors, hub_reason, license_of
from tonefield.pipelines.tonefield_repository import CARD_MARK, code_span, listen, plain, shown_files, table


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
    except hub_errors() as error:
        raise UserError(f"--push_to_hub cannot write to {name}: {hub_reason(error)}") from None
    return repository


def settings_of(component) -> dict[str, Any]:
    """The configuration of a network or scheduler."""
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def publish(pipeline, folder: Path, repository: str) -> None:
    """Uploads a pipeline that has been saved, and beside it what its training has told."""
    pipeline.register_to_config(_name_or_path=str(folder))  # the card's sounds are taken from there
    try:
        pipeline.push_to_hub(repository)
        upload_folder(repo_id=repository, folder_path=folder, allow_patterns=["samples/*", "metrics.jsonl"])
    except hub_errors() as error:
        raise UserError(
            f"The pipeline is whole in {folder}, but was not pushed: {hub_reason(error)}. Try again with"
            f" tonefield.load({str(folder)!r}).push_to_hub({repository!r})."
        ) from None
    print(f"pushed to {repository}")


# What a training leaves in its folder and nobody else needs. training.json names places on this machine.
KEPT_HERE = ("checkpoint-*/**", "best/**", "logs/**", ".*", "training.json")


def publish_folder(folder: Path, repository: str) -> None:
    """Uploads what was trained where that is no pipeline, without the checkpoints; but no card over a person's."""
    try:
        kept = [*KEPT_HERE, *([] if may_write_card(repository) else ["README.md"])]
        upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept)
    except hub_errors() as error:
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in KEPT_HERE)
        raise UserError(
            f"The model is whole in {folder}, but was not pushed: {hub_reason(error)}. Try again with"
            f" hf upload {repository} {shlex.quote(str(folder))} . {excluded}"
        ) from None
    print(f"pushed to {repository}")


def may_write_card(repository: str, kind: str = "model") -> bool:
    """Whether the repository has no card, or one that nobody has changed."""
    if not file_exists(repository, "README.md", repo_type=kind):
        return True
    card = Path(hf_hub_download(repository, "README.md", repo_type=kind)).read_text(encoding="utf-8")
    return CARD_MARK in card


def write_card(
    folder: Path,
    name: str,
    description: str,
    facts: dict[str, Any],
    use: str,
    tags: Sequence[str] = (),
    library: str = "diffusers",
    base_model: str | None = None,
) -> None:
    """README.md of what is no pipeline; one that a person wrote stays. `facts` are as in the card of a pipeline."""
    card = folder / "README.md"
    if card.exists() and CARD_MARK not in card.read_text(encoding="utf-8"):
        return
    facts = dict(facts)
    samples = shown_files(facts.pop("samples", None), folder)
    data = ModelCardData(
        library_name=library, tags=list(dict.fromkeys([library, "tonefield", "audio", *tags])),
        license=facts.get("license"), datasets=facts.get("datasets"), base_model=base_model,
    )  # fmt: skip
    lines = [
        f"---\n{data.to_yaml()}\n---\n", f"{CARD_MARK}\n", f"# {plain(name.split('/')[-1])}\n", f"{description}\n",
        *listen(samples, name), "## Training\n", "| | |", "|---|---|", *table(dict(sorted(facts.items()))), "",
        "## Use\n", f"```python\n{use}\n```\n",
    ]  # fmt: skip
    write_text(card, "\n".join(lines))


def newest_samples(folder: Path, titles: Sequence[str] = (), most: int = 8) -> list[tuple[str, str]]:
    """What a card shows of `samples/`: the picture and the first sounds of the last validation, (path, title) each."""
    pictures = {int(file.stem.split("-")[1]): file for file in (folder / "samples").glob("step-*.png")}
    if not pictures:
        return []
    step = max(pictures)
    shown = [(f"samples/{pictures[step].name}", f"after {step:,} steps")]
    for index in range(most):
        name = f"samples/{pictures[step].stem}-{index}.wav"
        if (folder / name).exists():
            shown.append((name, titles[index] if index < len(titles) else f"sound {index}"))
    return shown


def training_facts(script: str, args, defaults, accelerator, titles: Sequence[str] = ()) -> dict[str, Any]:
    """
    What a card tells: the data, the command that repeats the training, how it went, and what it sounds like.

    `titles` are those of the validation's sounds.
    """
    facts: dict[str, Any] = {"command": code_span(command(script, args, defaults, accelerator.num_processes))}
    local = args.dataset_name or args.input_dir
    if Path(local).exists():
        facts["dataset"] = plain(Path(local).resolve().name)
    else:
        facts |= {"datasets": [args.dataset_name], "dataset license": license_of(args.dataset_name)}
    facts["samples per step"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    metrics = last_metrics(Path(args.output_dir, "metrics.jsonl"))
    facts["optimizer steps"] = metrics.get("step", args.max_train_steps)
    for name, key in {"training loss": "loss", "validation loss": "validation_loss",
                      "seconds per step": "seconds_per_step"}.items():  # fmt: skip
        facts[name] = f"{metrics[key]:.4g}" if key in metrics else None
    facts["samples"] = newest_samples(Path(args.output_dir), titles) or None
    return facts


def command(script: str, args, defaults, num_processes: int) -> str:
    """The call of a script that trains with these flags, whatever recipe they came from."""
    launch = ["python"] if num_processes == 1 else ["accelerate", "launch", "--num_processes", str(num_processes)]
    return command_of([*launch, script], args, defaults, LOCAL_FLAGS)


def last_metrics(file: Path) -> dict[str, float]:
    """The newest of each number in `metrics.jsonl`."""
    newest: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        newest |= json.loads(line)
    return newest
