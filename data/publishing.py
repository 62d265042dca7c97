"""Datasets on the Hub, with a card that shows what they hold."""

import os
from pathlib import Path
from typing import Any

from datasets import ClassLabel, load_from_disk
from huggingface_hub import CommitOperationAdd, DatasetCard, create_commit

from tonefield.command_line import UserError
from tonefield.data.loading import CODEC_FOLDER, RECORD_COLUMN, read_record
from tonefield.hub import hub_errors, hub_reason


PREVIEWS = "previews"
SHOWN = 8


def spread(length: int, count: int) -> list[int]:
    """So many rows from all over a dataset: those that its previews show."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def preview_title(row: dict[str, Any]) -> str:
    """What a preview is called: its recording, and which slice of it."""
    return f"{row['audio_file']} #{int(row['slice'])}" if "slice" in row else row["audio_path"]


def publish_dataset(folder: str | os.PathLike, repository: str, private: bool | None = None) -> None:
    """
    Uploads a dataset that `audio_to_images.py` or `audio_to_tokens.py` wrote, with its codec, previews and card.

    What has been uploaded before is not uploaded again, so an upload that was interrupted can simply be repeated.

    Args:
        folder (`str` or `os.PathLike`): Where the dataset is.
        repository (`str`): Where it goes: USER/NAME.
        private (`bool`, *optional*): Whether a repository that is made for it is private.
    """
    from tonefield.pipelines.tonefield_repository import CARD_MARK  # late: whoever pushes nothing needs no pipelines

    folder = Path(folder)
    try:
        dataset: Any = load_from_disk(folder)
        repository = dataset.push_to_hub(repository, private=private).repo_url.repo_id
        card = DatasetCard.load(repository)  # where the splits and columns have just been written down
        files = [file for name in (CODEC_FOLDER, PREVIEWS) for file in sorted((folder / name).glob("*"))]
        added = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
        if CARD_MARK in card.text or not card.text.strip():  # what a person wrote there stays
            write_card(card, folder, dataset, repository)
            added.append(CommitOperationAdd("README.md", str(card).encode()))
        if added:
            create_commit(
                repository, added, commit_message="Add the card, previews and the codec", repo_type="dataset"
            )
    except hub_errors() as error:
        privately = ", private=True" if private else ""
        again = f"tonefield.data.publishing.publish_dataset({str(folder)!r}, {repository!r}{privately})"
        raise UserError(
            f"The dataset is complete in {folder}, but could not be pushed to {repository}: {hub_reason(error)}."
            f" Try again with {again}"
        ) from None
    print(f"pushed to {repository}")


def write_card(card: DatasetCard, folder: Path, dataset: Any, repository: str) -> None:
    """The text of README.md and its metadata, beside what `push_to_hub` has written there."""
    from tonefield.pipelines.tonefield_repository import CARD_MARK, code_span, listen, plain, shown_files, table

    train = dataset["train"]
    record, info = read_record(train.features), train.info
    tokens = "codec" in record
    facts: dict[str, Any] = {"rows": ", ".join(f"{len(rows):,} {split}" for split, rows in dataset.items())}
    facts["command"] = code_span(info.description) if info.description else None
    facts["license"] = info.license or None
    for name, feature in train.features.items():
        if isinstance(feature, ClassLabel) and name != RECORD_COLUMN:
            facts[f"classes ({plain(name)})"] = feature.names
    settings = record["codec"] if tokens else record["front_end"]
    facts |= {name: plain(value) for name, value in sorted(settings.items()) if isinstance(value, (int, float, str))}
    kind, maker, trainer = (
        ("tokens", "audio_to_tokens.py", "train_sedd.py") if tokens
        else ("mel spectrograms", "audio_to_images.py", "train_unet.py")
    )  # fmt: skip
    if info.license:
        card.data.license = info.license
    card.data.tags = list(dict.fromkeys(["tonefield", "audio", *(card.data.get("tags") or [])]))
    card.text = "\n".join([
        f"\n{CARD_MARK}\n", f"# {plain(repository.split('/')[-1])}\n",
        f"Recordings as {kind}, made by `{maker}` of tonefield.\n",
        *listen(shown_files(previews(folder, train), folder), repository, "dataset"),
        "## Data\n", "| | |", "|---|---|", *table(facts), "", "## Use\n",
        f'```python\nfrom datasets import load_dataset\n\n\ndataset = load_dataset("{repository}")\n```\n',
        f"`python {trainer} --dataset_name {repository}` trains a model of it.\n",
    ])  # fmt: skip


def previews(folder: Path, train: Any) -> list[tuple[str, str]]:
    """The first previews, (path, title) each: a picture of all if there is one, else of the first, and the sounds."""
    places = spread(len(train), len(list((folder / PREVIEWS).glob("*.wav"))))
    columns = [name for name in ("audio_file", "slice", "audio_path") if name in train.features]
    titles = [preview_title(row) for row in train.select(places).select_columns(columns)]
    if not titles:
        return []
    overview = (folder / PREVIEWS / "overview.png").exists()
    shown = [(f"{PREVIEWS}/{'overview' if overview else '000'}.png", "previews" if overview else titles[0])]
    for index, title in enumerate(titles[:SHOWN]):
        shown.append((f"{PREVIEWS}/{index:03d}.wav", title))
    return shown
