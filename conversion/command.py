"""
What all importers do alike: find the published files, read them without running anything, load strictly, save.

An importer's --help answers at once, so that whatever is heavy is imported where it is used.
"""

import argparse
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tonefield.command_line import UserError, first_line, make_parser, parse
from tonefield.command_line import run as run_script
from tonefield.hub import hub_errors, hub_reason


if TYPE_CHECKING:
    import torch


# What the licence of published weights must be for a copy of them to be pushed without a warning.
FREE_LICENSES = (
    "apache-2.0",
    "mit",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "unlicense",
)


def importer_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of an importer: where from, where to, and what is to be told of the weights."""
    parser = make_parser(doc)
    parser.add_argument("source", metavar="IN", help="the published file or folder, or its name on the Hub")
    parser.add_argument("target", metavar="OUT", help="the folder to write; what an earlier import wrote is replaced")
    parser.add_argument("--license", help="the licence of the weights, for the model card (an SPDX id, such as mit)")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload the result as well")
    return parser


def find_source(name: str, patterns: Sequence[str]) -> Path:
    """A file or folder of this machine, or the files of a Hub repository that match the patterns."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if os.path.exists(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        raise UserError(f"There is no file or folder {name}, and a name on the Hub has the form USER/NAME.") from None
    except hub_errors() as error:
        raise UserError(
            f"{name} is neither a file, nor a folder, nor can it be had from the Hub: {hub_reason(error)}"
        ) from None


def read_checkpoint(file: Path) -> Any:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint, of which nothing is executed."""
    import torch
    from safetensors.torch import load_file

    if not file.exists():
        raise UserError(f"There is no file {file}.")
    file.open("rb").close()  # which raises what is wrong with a file that may not be read
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader stumbles over in bytes that mean nothing, OSError as well
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} wants to use {forbidden[1]}, which is neither a tensor nor a plain container: it was not run,"
                " and the file is not read."
            ) from None
        # What torch says of a strange pickle is long, and proposes to run it.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {first_line(error).split('. ')[0]}"
        raise UserError(f"{file} is damaged or no checkpoint{reason}. Fetch it again.") from None


def load_strictly(
    model: "torch.nn.Module",
    weights: Mapping[str, "torch.Tensor"],
    file: str | os.PathLike,
    published_name: Callable[[str], str] = str,
) -> None:
    """
    Loads weights whose names and shapes must be exactly the model's.

    Args:
        model (`torch.nn.Module`): What they are for.
        weights (`Mapping[str, torch.Tensor]`): Tensors by name.
        file (`str` or `os.PathLike`): Where they are from, for what an error says.
        published_name (`Callable`, *optional*): From a name of the model's to that in the file, for what errors say.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    if missing or unexpected:
        raise UserError(
            f"{file} does not hold a {type(model).__name__} of this configuration:"
            + (f" {len(missing)} tensors are missing, the first is {published_name(missing[0])}." if missing else "")
            + (f" {len(unexpected)} are unknown, the first is {published_name(unexpected[0])}." if unexpected else "")
        )
    for key, tensor in expected.items():
        if tensor.shape != weights[key].shape:
            raise UserError(
                f"{file}: {published_name(key)} has the shape {tuple(weights[key].shape)}, expected"
                f" {tuple(tensor.shape)}."
            )
    model.load_state_dict(weights)


def run_importer(
    convert: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> NoReturn:
    """Converts, saves and, if asked to, uploads. `convert` returns a pipeline or model with `save_pretrained`."""

    def main(args: argparse.Namespace) -> None:
        check_target(args)
        write(convert(args), args)

    run_script(main, parse(parser, argv))


def check_target(args: argparse.Namespace) -> None:
    """Refuses, before any work, to write where something else stands, and to upload without a token."""
    from huggingface_hub import get_token

    from tonefield.pipelines.tonefield_repository import CARD_MARK

    if args.push_to_hub and get_token() is None:
        raise UserError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    target = Path(args.target)
    card = target / "README.md"
    if target.exists() and (target.is_file() or any(target.iterdir())):
        if not (card.is_file() and CARD_MARK in card.read_text(encoding="utf-8")):
            raise UserError(f"{target} holds something that no import has written: name another folder.")


def write(converted: Any, args: argparse.Namespace) -> None:
    """Saves a converted pipeline or model with a card that tells where it comes from, and uploads it if asked to."""
    from diffusers import DiffusionPipeline

    check_target(args)
    target = Path(args.target).resolve()
    name = args.push_to_hub or target.name
    known = dict(converted.config.get("card") or {})  # what an importer knows; its licence is that of all it imports
    license = args.license or published_license(args.source) or known.get("license")
    facts = {**known, "imported from": source_name(args.source), "license": license}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")  # so that OUT is never half of something
    shutil.rmtree(unfinished, ignore_errors=True)
    if isinstance(converted, DiffusionPipeline):
        converted.register_to_config(card=facts)
        converted.save_pretrained(unfinished)
        card = converted.model_card(name, unfinished)
    else:
        converted.save_pretrained(unfinished)
        card = model_card(converted, name, facts)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    print(f"{args.target} holds a {type(converted).__name__} from {args.source}")
    if args.push_to_hub:
        push(args, license)


def source_name(source: str) -> str:
    """A name on the Hub as it is; a file or folder without its place on this machine."""
    return Path(source).resolve().name if os.path.exists(source) else source


def published_license(source: str) -> str | None:
    """What the model card of a folder or Hub repository says of the licence, if there is one."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(Path(source, "README.md") if os.path.exists(source) else source).data.license
    except hub_errors():
        return None


def model_card(model: "torch.nn.Module", name: str, facts: Mapping[str, Any]) -> str:
    """README.md of a single model; a pipeline writes its own."""
    from huggingface_hub import ModelCardData

    from tonefield.pipelines.tonefield_repository import CARD_MARK, table

    metadata = ModelCardData(library_name="diffusers", tags=["tonefield", "audio"], license=facts["license"])
    rows = "".join(f"{row}\n" for row in table(dict(facts)))
    size = sum(parameter.numel() for parameter in model.parameters())
    cls, library = type(model).__name__, type(model).__module__.split(".")[0]
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n{CARD_MARK}\n\n# {name.split('/')[-1]}\n\nA `{cls}`.\n\n"
        f"| | |\n|---|---|\n| parameters | {size:,} |\n{rows}\n"
        f'```python\nfrom {library} import {cls}\n\n\nmodel = {cls}.from_pretrained("{name}")\n```\n'
    )


def push(args: argparse.Namespace, license: str | None) -> None:
    """Uploads what was saved. Weights that others may not pass on are the user's to judge: the warning says so."""
    from huggingface_hub import create_repo, file_exists, hf_hub_download, upload_folder

    from tonefield.pipelines.tonefield_repository import CARD_MARK

    if license not in FREE_LICENSES:
        known = f"the licence {license} may forbid it" if license else "their licence is not known (--license)"
        print(f"warning: before you make these weights public, make sure that you may: {known}", file=sys.stderr)
    try:
        repository = create_repo(args.push_to_hub, exist_ok=True).repo_id
        kept = []  # the card, if a person wrote it
        if file_exists(repository, "README.md"):
            card = Path(hf_hub_download(repository, "README.md")).read_text(encoding="utf-8")
            kept = [] if CARD_MARK in card else ["README.md"]
        upload_folder(repo_id=repository, folder_path=args.target, ignore_patterns=kept)
    except hub_errors() as error:
        raise UserError(f"The model is in {args.target}, but was not pushed: {hub_reason(error)}") from None
    print(f"pushed to {repository}")
