"""What all importers do alike: find the published files, read them without running anything, load strictly, save."""

import argparse
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData, create_repo, get_token, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from tonefield.command_line import UserError, first_line, make_parser, parse
from tonefield.command_line import run as run_script
from tonefield.pipelines.tonefield_repository import CARD_MARK


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

HUB_ERRORS = (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError)


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
    if os.path.exists(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        raise UserError(f"There is no file or folder {name}, and a name on the Hub has the form USER/NAME.") from None
    except HUB_ERRORS as error:
        raise UserError(
            f"{name} is neither a file, nor a folder, nor can it be had from the Hub: {first_line(error)}"
        ) from None


def read_checkpoint(file: Path) -> Any:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint, of which nothing is executed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is no checkpoint of plain tensors, and nothing else is read: {first_line(error)}"
        ) from None
    except PermissionError:
        raise UserError(f"{file} may not be read.") from None
    except (SafetensorError, RuntimeError, EOFError, BadZipFile, ValueError, OSError) as error:
        raise UserError(f"{file} is damaged or no checkpoint: {first_line(error)}. Fetch it again.") from None


def load_strictly(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], file: str | os.PathLike) -> None:
    """Loads weights whose names and shapes must be exactly the model's."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    if missing or unexpected:
        raise UserError(
            f"{file} does not hold a {type(model).__name__} of this configuration:"
            + (f" {len(missing)} tensors are missing, the first is {missing[0]}." if missing else "")
            + (f" {len(unexpected)} were not expected, the first is {unexpected[0]}." if unexpected else "")
        )
    for key, tensor in expected.items():
        if tensor.shape != weights[key].shape:
            raise UserError(
                f"{file}: {key} has the shape {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}."
            )
    model.load_state_dict(weights)


def run_importer(
    convert: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> NoReturn:
    """Converts, saves and, if asked to, uploads. `convert` returns a pipeline or model with `save_pretrained`."""
    run_script(lambda args: write(convert(args), args), parse(parser, argv))


def write(converted: Any, args: argparse.Namespace) -> None:
    """Saves a converted pipeline or model with a card that tells where it comes from, and uploads it if asked to."""
    if args.push_to_hub and get_token() is None:
        raise UserError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    target = Path(args.target)
    card = target / "README.md"
    if target.exists() and (target.is_file() or any(target.iterdir())):
        if not (card.is_file() and CARD_MARK in card.read_text(encoding="utf-8")):
            raise UserError(f"{target} holds something that no import has written: name another folder.")
    facts = {"imported from": source_name(args.source), "license": args.license}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")  # so that OUT is never half of something
    shutil.rmtree(unfinished, ignore_errors=True)
    if isinstance(converted, DiffusionPipeline):
        converted.register_to_config(card=facts)
        converted.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(converted.model_card(target.resolve().name), encoding="utf-8")
    else:
        converted.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(model_card(converted, target.resolve().name, facts), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    print(f"{target} holds a {type(converted).__name__} from {args.source}")
    if args.push_to_hub:
        push(converted, args)


def source_name(source: str) -> str:
    """A name on the Hub as it is; a file or folder without its place on this machine."""
    return Path(source).resolve().name if os.path.exists(source) else source


def model_card(model: torch.nn.Module, name: str, facts: Mapping[str, Any]) -> str:
    """README.md of a single model; a pipeline writes its own."""
    metadata = ModelCardData(library_name="diffusers", tags=["tonefield", "audio"], license=facts["license"])
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if value is not None)
    size = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n{CARD_MARK}\n\n# {name}\n\nA `{type(model).__name__}`.\n\n"
        f"| | |\n|---|---|\n| parameters | {size:,} |\n{rows}"
    )


def push(converted: Any, args: argparse.Namespace) -> None:
    """Uploads what was saved. Weights that others may not pass on are the user's to judge: the warning says so."""
    if args.license not in FREE_LICENSES:
        known = (
            f"the licence {args.license} may forbid it" if args.license else "their licence is not known (--license)"
        )
        print(f"warning: before you make these weights public, make sure that you may: {known}", file=sys.stderr)
    try:
        repository = create_repo(args.push_to_hub, exist_ok=True).repo_id
        upload_folder(repo_id=repository, folder_path=args.target)
    except HUB_ERRORS as error:
        raise UserError(f"The model is in {args.target}, but was not pushed: {first_line(error)}") from None
    print(f"pushed to {repository}")
