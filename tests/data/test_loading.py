"""The record of the front end stays with a dataset whatever is done with it."""

import json

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset

from tonefield.command_line import UserError
from tonefield.data.loading import RECORD_COLUMN, load_split, read_record, record_feature


RECORD = {"format": "tonefield-mel", "front_end": {"sample_rate": 8000, "f_max": None}, "text": "ö \"'\n: {}"}


@pytest.fixture
def dataset() -> Dataset:
    features = Features({"mel": Array3D((1, 2, 3), "float16"), RECORD_COLUMN: record_feature(RECORD)})
    mels = np.linspace(-1, 1, 30).reshape(5, 1, 2, 3).astype(np.float16)
    return Dataset.from_dict({"mel": mels, RECORD_COLUMN: [0] * 5}, features=features)


def parquet(dataset, tmp_path, streaming):
    dataset.to_parquet(tmp_path / "data.parquet")
    files = str(tmp_path / "data.parquet")
    return load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path))


def on_disk(dataset, tmp_path, streaming=False):
    dataset.save_to_disk(tmp_path / "saved")
    return load_split(str(tmp_path / "saved"), streaming=streaming)


WAYS = {
    "disk": on_disk,
    "streamed from disk": lambda dataset, path: on_disk(dataset, path, streaming=True),
    "parquet": lambda dataset, path: parquet(dataset, path, streaming=False),
    "streamed parquet": lambda dataset, path: parquet(dataset, path, streaming=True),
    "select": lambda dataset, path: dataset.select([1, 2, 3]),
    "shuffle": lambda dataset, path: dataset.shuffle(seed=0),
    "map": lambda dataset, path: dataset.map(lambda row: {"new": 1}),
    "batched map": lambda dataset, path: dataset.map(lambda rows: {"new": rows[RECORD_COLUMN]}, batched=True),
    "filter": lambda dataset, path: dataset.filter(lambda row: True),
    "concatenate": lambda dataset, path: concatenate_datasets([dataset, dataset]),
    "split": lambda dataset, path: dataset.train_test_split(0.4, seed=0)["test"],
    "format": lambda dataset, path: dataset.with_format("torch"),
    "shuffled stream": lambda dataset, path: dataset.to_iterable_dataset().shuffle(seed=0).filter(lambda row: True),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_record_and_the_mels_survive(tmp_path, dataset, way):
    result = WAYS[way](dataset, tmp_path)
    assert read_record(result.features) == RECORD
    assert result.features["mel"] == Array3D((1, 2, 3), "float16")
    mels = {np.asarray(row["mel"], dtype=np.float16).tobytes() for row in result}
    assert mels <= {np.asarray(row["mel"], dtype=np.float16).tobytes() for row in dataset} and mels


def test_different_records_are_not_mixed_up(dataset):
    other = dataset.cast_column(RECORD_COLUMN, record_feature(RECORD | {"version": 2}))
    with pytest.raises(ValueError, match="features"):
        concatenate_datasets([dataset, other])


@pytest.mark.parametrize("features", [
    None, Features(mel=Value("float32")), Features(front_end=Value("int64")),
    Features(front_end=ClassLabel(names=["a", "b"])),
])  # fmt: skip
def test_a_dataset_without_a_record(features):
    with pytest.raises(
        UserError, match=r"^The dataset has no column 'front_end' .*: make it with audio_to_images.py.$"
    ):
        read_record(features)


@pytest.mark.parametrize("name", ["cats", json.dumps({}), json.dumps([1])])
def test_a_column_of_one_class_that_is_no_record(name):
    with pytest.raises(
        UserError, match=r"^The dataset has no column 'front_end' .*: make it with audio_to_images.py.$"
    ):
        read_record(Features(front_end=ClassLabel(names=[name])))


# ----- where a dataset comes from


def test_folders(tmp_path, dataset):
    DatasetDict(train=dataset, test=dataset.select([4])).save_to_disk(tmp_path / "both")
    dataset.select([0, 1]).save_to_disk(tmp_path / "one")
    assert len(load_split(str(tmp_path / "both"))) == 5 and len(load_split(str(tmp_path / "both"), "test")) == 1
    assert len(load_split(str(tmp_path / "one"))) == 2
    with pytest.raises(UserError, match=r"both has no split 'validation'; it has train, test.$"):
        load_split(str(tmp_path / "both"), "validation")


def test_what_cannot_be_loaded(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "a.wav", np.zeros(8000), 8000)
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no sound at all")
    assert len(load_split(str(tmp_path / "parquet"))) == 5
    for name, options, reason in [
        ("empty", {}, "doesn't contain any data files"),
        ("sounds", {}, "it consists of loose audio files, .* give --input_dir DIR instead of --dataset_name"),
        ("parquet", {"split": "trian"}, "Unknown split \"trian\". Should be one of .*'train'"),
        ("parquet", {"config": "small"}, "BuilderConfig 'small' not found"),
        ("broken", {}, "Parquet magic bytes not found"),
    ]:
        with pytest.raises(UserError, match=f"^The dataset .*/{name} cannot be loaded: .*{reason}") as caught:
            load_split(str(tmp_path / name), **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^The dataset nobody/nothing cannot be loaded: "):
        load_split("nobody/nothing")
