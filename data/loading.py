"""Reading datasets back: from disk or from the Hub, with the record of the front end that made them."""

import json
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, get_dataset_split_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from tonefield.command_line import UserError
from tonefield.hub import hub_errors, hub_reason


# A dataset's features are the one thing that `save_to_disk`, `push_to_hub`, streaming and every transformation of a
# dataset keep (all but `map` of a streamed one: read the record before). So the record is the name of the only class
# of a column of classes: eight bytes a row.
RECORD_COLUMN = "front_end"

DATASET_NOTE = "dataset_dict.json"  # tells that a folder holds a dataset, and its splits

CODEC_FOLDER = "codec"  # within a dataset of tokens: the audio tokenizer that made them

# Of a dataset on the disk that is streamed: most numbers of processes divide it.
STREAM_SHARDS = 240

LOOSE_FILES = (
    "it consists of loose audio files, for which the datasets library wants torchcodec. Download them (hf download"
    " --repo-type dataset NAME --local-dir DIR) and give --input_dir DIR instead of --dataset_name."
)


def record_feature(record: dict) -> ClassLabel:
    """The feature of the column that carries `record`."""
    return ClassLabel(names=[json.dumps(record, sort_keys=True)])


def read_record(features: Features | None, script: str = "audio_to_images.py") -> dict:
    """The record of the front end that made a dataset: its settings, its fingerprint and the dataset's statistics."""
    feature = (features or {}).get(RECORD_COLUMN)
    try:
        record = json.loads(feature.names[0]) if isinstance(feature, ClassLabel) else None
    except (json.JSONDecodeError, RecursionError):
        record = None
    if not isinstance(record, dict) or "format" not in record:
        raise UserError(
            f"The dataset has no column {RECORD_COLUMN!r} with the settings of its front end: make it with {script}."
        )
    return record


def load_split(name: str, split: str = "train", streaming: bool = False, config: str | None = None) -> Any:
    """One split of a dataset: a folder written by this collection or by `save_to_disk`, or a Hub id."""
    try:
        if (Path(name) / DATASET_NOTE).exists() or (Path(name) / "state.json").exists():
            dataset = load_from_disk(name)
            if isinstance(dataset, dict):
                if split not in dataset:
                    raise UserError(f"{name} has no split {split!r}; it has {', '.join(map(str, dataset))}.")
                dataset = dataset[split]
            if not streaming:
                return dataset
            return dataset.to_iterable_dataset(num_shards=min(STREAM_SHARDS, max(1, len(dataset))))
        dataset = load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, *hub_errors()) as error:  # not there, no network, no such split
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(reason, ImportError):
            raise UserError(f"The dataset {name} cannot be loaded: {LOOSE_FILES}") from None
        raise UserError(f"The dataset {name} cannot be loaded: {hub_reason(reason)}") from None
    return dataset


def split_names(name: str, config: str | None = None) -> list[str]:
    """The splits of a dataset that `load_split` loads."""
    if (Path(name) / DATASET_NOTE).exists():
        return json.loads((Path(name) / DATASET_NOTE).read_text())["splits"]
    if (Path(name) / "state.json").exists():
        return ["train"]
    try:
        return list(get_dataset_split_names(name, config))
    except (DatasetsError, *hub_errors()) as error:
        raise UserError(f"The splits of {name} cannot be listed: {hub_reason(error)}") from None
