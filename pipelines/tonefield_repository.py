"""Pipelines whose repositories hold their own code and their own model card.

`DiffusionPipeline.save_pretrained` writes configurations and weights, but not the classes that are not diffusers' own:
such a repository loads only where these classes are installed, and from the Hub not even there. Here the code is
written beside them, in the layout that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` reads:

    model_index.json    "_class_name": ["pipeline_x", "XPipeline"], "scheduler": ["scheduling_y", "YScheduler"], ...
    pipeline_x.py       the pipeline, and the files that it imports with `from .name import ...`
    scheduler/          scheduling_y.py, which imports nothing relatively, and its configuration

This file is one of those that travel with a pipeline, hence no import of tonefield, and a name that nobody else uses:
diffusers puts the files of all local repositories into one package.
"""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import ModelCardData, file_exists, hf_hub_url


PACKAGE = "tonefield"
# What a travelling copy of this file does not do: look for classes that are installed.
INSTALLED = __name__.split(".")[0] == PACKAGE

RELATIVE_IMPORT = re.compile(r"^\s*from\s+(\.+[\w.]*)\s+import", re.MULTILINE)
OWN_IMPORT = re.compile(rf"^\s*(?:from|import)\s+{PACKAGE}\b", re.MULTILINE)
SOUNDS, PICTURES = (".wav", ".flac", ".ogg", ".mp3"), (".png", ".jpg")  # what a card shows
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|<")
CARD_MARK = "<!-- Written with the model, again at each upload. Remove this line to keep what you write here. -->"


def source_files(cls: type, siblings: bool) -> list[Path]:
    """
    The file that defines a class, and the files beside it that it imports.

    Args:
        cls (`type`): A class that is to travel with a repository.
        siblings (`bool`): Whether diffusers fetches siblings: it does for a pipeline, not for a component.
    """
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        raise ValueError(f"{cls.__name__} has no source file to save with the pipeline: define it in a .py file.")
    files = [Path(file)]
    for name in RELATIVE_IMPORT.findall(files[0].read_text(encoding="utf-8")):
        if not siblings or not re.fullmatch(r"\.\w+", name):
            allowed = "`from .sibling import name`" if siblings else "absolute imports"
            raise ValueError(f"{file} imports from `{name}`, which diffusers cannot fetch: use only {allowed}.")
        files.append(files[0].with_name(f"{name[1:]}.py"))
    for file in files:
        code = file.read_text(encoding="utf-8")
        if OWN_IMPORT.search(code):
            raise ValueError(f"{file} imports {PACKAGE}, which may be absent where the repository is loaded.")
        if file != files[0] and RELATIVE_IMPORT.search(code):
            raise ValueError(f"{file} is imported by {files[0].name}, so it cannot use relative imports itself.")
    return files


def copy_source(cls: type, folder: Path, siblings: bool) -> str:
    """Copies [`source_files`] into a folder and returns the name of the module that defines the class."""
    files = source_files(cls, siblings)
    for file in files:
        target = folder / file.name
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
    return files[0].stem


# ----- cards, also of what is no pipeline


def plain(text: object) -> str:
    """Text that says in Markdown what it says, whatever it holds: a caption ends no table and opens no tag."""
    return re.sub(r"[\\`*\[\]<>&|]", lambda found: f"&#{ord(found[0])};", " ".join(str(text).split()))


def code_span(text: str) -> str:
    """The same as a span of code, which knows no entities."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def table(facts: dict[str, Any]) -> list[str]:
    """
    The rows of a table of two columns; what is `None` has none.

    A list is taken as words, what else there is as Markdown of one line that may hold spans of code, but no HTML.
    """
    rows = []
    for key, value in facts.items():
        text = ", ".join(map(plain, value)) if isinstance(value, list) else " ".join(str(value).split())
        text = CODE_SPAN.sub(lambda found: found[0] if found[1] else "&lt;", text)
        text = re.sub(r"(?<!\\)\|", r"\\|", text)
        rows += [] if value is None else [f"| {plain(key.replace('_', ' '))} | {text} |"]
    return rows


def shown_files(samples: Iterable[Sequence[str]] | None, folder: Path) -> list[tuple[str, str]]:
    """Those sounds and pictures, (path, title), that lie within a folder; what leads out of it is passed over."""
    found = []
    for path, title in samples or []:
        inside = ".." not in (place := PurePosixPath(path)).parts and not place.is_absolute()
        if inside and place.suffix in SOUNDS + PICTURES and (file := folder / path).is_file():
            found += [(path, title)] if file.resolve().is_relative_to(folder.resolve()) else []
    return found


def listen(files: list[tuple[str, str]], name: str, kind: str = "model") -> list[str]:
    """The section of a card with pictures, and a player for each sound, of the repository of this name."""
    lines, players = [], []
    for path, title in files:
        # A player's address has to be a whole one: the Hub completes those of pictures only.
        address = hf_hub_url(name, path, repo_type=kind) if "/" in name else quote(path)
        if path.endswith(PICTURES):
            lines += [f"![{plain(title)}]({address})", ""]
        else:
            players.append(f'| {plain(title)} | <audio controls src="{address}"></audio> |')
    if players:
        lines += ["| | |", "|---|---|", *players, ""]
    return ["## Listen", "", *lines] if lines else []


class SelfContainedPipelineMixin:
    """
    Saves a pipeline with its code and a model card. The first of the bases: `class X(SelfContainedPipelineMixin,
    DiffusionPipeline)`.

    What the card tells of the training comes from the `card` of the pipeline's configuration, which is saved and
    loaded with it. `license`, `datasets` (ids on the Hub), `tags` and `language` become the card's metadata,
    `description` its first paragraph, and whatever else there is a row of its table. So are the names of the classes,
    if the configuration has a `label2id`. `samples` are the sounds and pictures that it shows, (path, title) each:
    they are taken along from the folder that the pipeline was loaded from.
    """

    # Code for the card, with {library} to import and {load}, a call that loads the pipeline, to be filled in.
    card_example = "import {library}\n\n\npipe = {load}"

    # ----- saving

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write model_index.json, the code and the card. `save_pretrained` calls this after saving the components."""
        if push_to_hub:
            raise ValueError("save_config uploads no pipeline: use push_to_hub or save_pretrained(push_to_hub=True).")
        super().save_config(save_directory)
        folder = Path(save_directory)
        self._bring_samples(folder)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [copy_source(type(self), folder, siblings=True), type(self).__name__]
        for name, component in self.components.items():
            cls = type(getattr(component, "_orig_mod", component))  # a compiled model wraps the original
            if component is not None and cls.__module__.split(".")[0] not in LOADABLE_CLASSES:
                index[name] = [copy_source(cls, folder / name, siblings=False), cls.__name__]
        index_file.write_text(json.dumps(index), encoding="utf-8")
        for file in [index_file, *(file for name in self.components for file in (folder / name).glob("*config.json"))]:
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # where it was loaded from, on the machine that saves it
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        card = folder / "README.md"
        if not card.exists() or CARD_MARK in card.read_text(encoding="utf-8"):
            card.write_text(self.model_card(folder.resolve().name, folder), encoding="utf-8")

    def _bring_samples(self, folder: Path) -> None:
        """Copies the sounds and pictures of the card from where this pipeline is from, if that is a folder."""
        origin = Path(self.config.get("_name_or_path") or folder)
        for path, _ in shown_files((self.config.get("card") or {}).get("samples"), origin):
            target = folder / path
            if not (target.exists() and target.samefile(origin / path)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin / path, target)

    def _upload_folder(self, working_dir, repo_id: str, token=None, **kwargs):
        # Diffusers has just put its own card here, or the one on the Hub. Only what a person wrote there stays.
        card = Path(working_dir) / "README.md"
        if CARD_MARK in card.read_text(encoding="utf-8") or not file_exists(repo_id, "README.md", token=token):
            card.write_text(self.model_card(repo_id, Path(working_dir)), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def model_card(self, name: str, folder: Path) -> str:
        """The text of README.md for a repository of this name that holds what is in the folder."""
        facts = dict(self.config.get("card") or {})
        metadata = {key: facts.pop(key) for key in ("license", "language", "datasets") if key in facts}
        tags = dict.fromkeys(["diffusers", PACKAGE, "audio", *facts.pop("tags", [])])
        metadata = ModelCardData(library_name="diffusers", tags=list(tags), **metadata)
        description = facts.pop("description", f"A `{type(self).__name__}` that generates sound.")
        samples = shown_files(facts.pop("samples", None), folder)
        parts = ["| component | class | parameters |", "|---|---|---|"]
        for key, component in self.components.items():
            if component is not None:
                sizes = [p.numel() for p in component.parameters()] if hasattr(component, "parameters") else []
                parts.append(f"| {key} | `{type(component).__name__}` | {sum(sizes):,} |")
        if metadata.license or metadata.datasets:
            facts = {"datasets": metadata.datasets, "license": metadata.license, **facts}
        if labels := self.config.get("label2id"):
            facts = {"classes": list(labels), **facts}
        rows = table(dict(sorted(facts.items())))
        training = ["## Training", "", "| | |", "|---|---|", *rows, ""] if rows else []
        lines = [
            f"---\n{metadata.to_yaml()}\n---\n",
            f"{CARD_MARK}\n",
            f"# {plain(name.split('/')[-1])}\n",
            f"{description}\n",
            *listen(samples, name),
            *parts,
            "",
            *training,
            "## Use\n",
            "With [diffusers](https://github.com/huggingface/diffusers) alone, which runs the code in here:\n",
            self._card_snippet("diffusers", f'DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)'),
            f"With {PACKAGE}, which runs its own code:\n",
            self._card_snippet(PACKAGE, f'load("{name}")'),
        ]
        return "\n".join(lines)

    def _card_snippet(self, library: str, load: str) -> str:
        return f"```python\n{self.card_example.format(library=library, load=f'{library}.{load}')}\n```\n"

    # ----- loading. With tonefield installed nothing of the repository has to be run, so nothing has to be trusted:
    # its modules are replaced by the installed ones. `DiffusionPipeline.from_pretrained` does not come through here.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        kwargs.setdefault("use_safetensors", True)  # what is pickled is not taken in their place
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        if "vocoder" in cls._optional_components and isinstance(dtype, torch.dtype):
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = {"default": dtype, "vocoder": torch.float32}  # its half precision is heard
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        config = super()._dict_from_json_file(json_file, **kwargs)
        if INSTALLED and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def load_config(cls, *args, **kwargs):
        loaded = super().load_config(*args, **kwargs)
        if not INSTALLED:
            return loaded
        public = importlib.import_module(PACKAGE)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            if not name.startswith("_") and isinstance(value, list) and value[-1] in dir(public):
                config[name] = [getattr(public, value[-1]).__module__, value[-1]]
        return loaded
