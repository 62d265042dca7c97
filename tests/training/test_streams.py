"""Streams that processes and workers divide: every row once an epoch, whoever reads it, and from any place on."""

import itertools
import json
import shutil

import datasets
import pytest
import torch
from training_runs import train

from tonefield.command_line import UserError
from tonefield.training.checkpoints import list_checkpoints
from tonefield.training.data import EndlessStream, Shares


def read(columns, positions):
    return {"positions": positions, "clean": torch.tensor([int(x) for x in columns["x"]])}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Makes streams of shards of 10 rows each, that count through."""

    def make(shards, rows=10):
        folder = tmp_path_factory.mktemp("shards")
        for shard in range(shards):
            numbers = list(range(shard * rows, (shard + 1) * rows))
            datasets.Dataset.from_dict({"x": numbers}).to_parquet(folder / f"{shard:02d}.parquet")
        return datasets.load_dataset(
            "parquet", data_files=sorted(map(str, folder.glob("*"))), split="train", streaming=True
        )

    return make


def stream(rows, shares, count, step=0, resume_at=None, workers=0, buffer=7, divide=True):
    """The rows of some batches of a process, and the last batch."""
    source = EndlessStream(rows, read, 0, buffer, divide)
    found = list(itertools.islice(source.batches(shares, step, workers, resume_at), count))
    return [batch["clean"].tolist() for batch in found], found


def flat(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_shards_of_their_own(parquet, processes):
    """8 shards: no row twice in an epoch, none missing, no two processes the same; the next epoch in another order."""
    rows = parquet(8)
    seen = []
    for process in range(processes):
        taken = flat(stream(rows, Shares(5, 1, processes, process), 2 * 16 // processes, buffer=80)[0])
        first, second = taken[: 80 // processes], taken[80 // processes :]
        assert sorted(first) == sorted(second) == sorted(set(first))
        assert first != second and first != sorted(first)
        seen += first
    assert sorted(seen) == list(range(80))


def test_where_shards_cannot_be_dealt_out_evenly_processes_divide_the_rows(parquet):
    """3 processes, 8 shards: together they see what one would that takes the shards as one sequence."""
    rows = parquet(8)
    parts = [stream(rows, Shares(5, 2, 3, process), 8)[0] for process in range(3)]
    together = [flat(batches) for batches in zip(*parts, strict=True)]
    assert sorted(flat(together)[:80]) == list(range(80))
    whole, _ = stream(rows, Shares(15, 1, 1, 0), 8, divide=False)
    assert together != whole  # the seed of the order is another one where all is one shard
    assert sorted(flat(whole)[:80]) == list(range(80))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 9])
def test_workers_change_nothing(parquet, workers):
    rows = parquet(12)
    shares = Shares(5, 2, 2, 1)  # 6 shards, hence 6 lanes
    assert stream(rows, shares, 30, workers=workers)[0] == stream(rows, shares, 30)[0]


@pytest.mark.parametrize("processes, divide", [(1, True), (2, True), (3, True), (2, False)])
def test_any_place_is_found_again(parquet, processes, divide):
    """After every step of two epochs, with what a checkpoint keeps of it."""
    rows = parquet(4)
    shares = Shares(3, 2, processes, processes - 1)
    steps = 2 * 40 // shares.per_step + 2
    whole, batches = stream(rows, shares, 2 * steps, divide=divide)
    for step in range(1, steps):
        resume_at = json.loads(json.dumps(batches[2 * step - 1]["resume_at"]))
        rest, _ = stream(rows, shares, 2 * (steps - step), step, resume_at, divide=divide)
        assert rest == whole[2 * step :]


def test_a_place_is_found_without_reading_what_lies_before_its_block():
    opened = []

    def generate(shards):
        for shard in shards:
            opened.append(shard)
            yield from ({"x": shard * 100 + row} for row in range(100))

    rows = datasets.IterableDataset.from_generator(
        generate, gen_kwargs={"shards": list(range(11))}, features=datasets.Features({"x": datasets.Value("int64")})
    )
    shares = Shares(10)
    whole, batches = stream(rows, shares, 100, buffer=50)  # 11 is prime and more than 8: one lane
    opened.clear()
    rest, _ = stream(rows, shares, 5, 95, batches[94]["resume_at"], buffer=50)
    assert rest == whole[95:]
    assert len(opened) <= 2


def test_a_divided_stream_goes_on_with_as_many_processes(parquet):
    rows = parquet(4)
    _, batches = stream(rows, Shares(4, 1, 2, 0), 2)
    with pytest.raises(UserError, match=r"of 4 shards, divided among 2 processes, this one has 4 among 4: use the"):
        stream(rows, Shares(2, 1, 4, 0), 1, 1, batches[-1]["resume_at"])


def test_rows_of_a_buffer_are_mixed(parquet):
    """And no row gets further than its buffer."""
    rows = parquet(1, rows=200)
    for buffer, distance in ((1, 0), (20, 20), (200, 200)):
        taken = flat(stream(rows, Shares(10), 20, buffer=buffer)[0])
        moved = max(abs(row - place) for place, row in enumerate(taken))
        assert moved <= distance and moved >= distance // 2


def test_a_stream_without_rows():
    features = datasets.Features({"x": datasets.Value("int64")})
    with pytest.raises(UserError, match="has no rows"):
        stream(datasets.IterableDataset.from_generator(lambda: iter(()), features=features), Shares(2), 1)


def test_missing_labels_of_a_stream():
    """They are -1, as those of rows with numbers."""
    from tonefield.training.data import labels_of

    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"]), "x": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"label": [0, None, 1], "x": [0, 1, 2]}, features=features)
    source = EndlessStream(rows.to_iterable_dataset(), lambda columns, _: labels_of(columns, "label")
                           | {"x": columns["x"]}, 0, 3)  # fmt: skip
    batch = next(source.batches(Shares(3), 0))
    assert {int(x): label for x, label in zip(batch["x"], batch["class_labels"].tolist(), strict=True)} == {
        0: 0, 1: -1, 2: 1
    }  # fmt: skip


@pytest.mark.parametrize("place", [[[0, 4]], [0, 4], [1, 0]])  # of each process, and from before there was one of each
def test_a_checkpoint_from_before_there_were_lanes(mels, tmp_path, place):
    """Its place in the stream, epoch and row, is not found: it is refused, and goes on without --streaming."""
    flags = ["--max_train_steps=2", "--checkpointing_steps=1", "--num_validation_samples=0", "--validation_steps=0"]
    train(tmp_path, mels, *flags, "--streaming")
    file = tmp_path / "checkpoint-1" / "state.json"
    state = json.loads(file.read_text()) | {"resume_at": place}
    del state["checksum"]  # which they did not have either
    file.write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "checkpoint-2")
    resume = "--resume_from_checkpoint=latest"
    with pytest.raises(UserError, match=r"^An earlier version .*: go on without --streaming, or begin anew in .*$"):
        train(tmp_path, mels, *flags, resume, "--streaming")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    train(tmp_path, mels, *flags, resume)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(UserError, match=r"of a run without --streaming, .*: go on without it"):
        train(tmp_path, mels, *flags, "--max_train_steps=3", resume, "--streaming")
