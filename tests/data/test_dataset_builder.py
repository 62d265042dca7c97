"""Parts and splits, and what is left behind when a run stops half-way."""

import io
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, Features, load_from_disk

from tonefield import MelSpectrogram
from tonefield.command_line import UserError
from tonefield.data import dataset_builder
from tonefield.data.audio_folder import AudioColumn, AudioFolder, Recording
from tonefield.data.dataset_builder import DatasetBuilder, order, plan_parts
from tonefield.data.mel_converter import MelConverter


def folder_of(path: Path, names: list[str]) -> AudioFolder:
    for name in names:
        (path / name).touch()
    return AudioFolder(path)


def deal(source, seed=0, **held_out) -> dict[str, list[str]]:
    """The names of each split."""
    names: dict[str, list[str]] = {"train": [], **{split: [] for split in held_out}}
    for part in plan_parts(source, held_out, seed):
        names[part.split] += [recording.name for recording in part.recordings]
    return names


# ----- splits


@pytest.mark.parametrize("count, fractions, sizes", [
    (40, (0.05, 0.0), (2, 0)), (40, (0.25, 0.1), (10, 4)), (41, (0.05, 0.05), (2, 2)), (10, (0.01, 0), (1, 0)),
    (40, (0.0, 0.0), (0, 0)), (1, (0.05, 0.0), (0, 0)), (2, (0.05, 0.05), (1, 0)), (3, (0.4, 0.4), (1, 1)),
])  # fmt: skip
def test_fractions_of_the_files(tmp_path, count, fractions, sizes):
    source = folder_of(tmp_path, [f"{i}.wav" for i in range(count)])
    splits = deal(source, validation=fractions[0], test=fractions[1])
    assert (len(splits["validation"]), len(splits["test"])) == sizes
    each_once = sorted(name for split in splits.values() for name in split)
    assert each_once == [recording.name for recording in source]


def test_a_new_file_moves_one_file_at_most(tmp_path):
    names = [f"{i}.wav" for i in range(60)]
    before = deal(folder_of(tmp_path, names), validation=0.2)
    for i in range(20):
        (tmp_path / "new.wav").unlink(missing_ok=True)
        (tmp_path / f"new{i - 1}.wav").unlink(missing_ok=True)
        after = deal(folder_of(tmp_path, [f"new{i}.wav"]), validation=0.2)
        moved = set(before["validation"]) ^ set(after["validation"])
        assert len(moved - {f"new{i}.wav"}) <= 1
        train = [name for name in after["train"] if name in before["train"]]
        assert train == [name for name in before["train"] if name in train]  # the order stays too


def test_the_seed_decides_and_the_order_is_shuffled():
    recordings = [Recording(f"{i:03d}.wav", None) for i in range(200)]
    orders = [[recording.name for recording in order(recordings, seed)] for seed in (0, 1)]
    assert orders[0] == [recording.name for recording in order(recordings[::-1], 0)]
    for names in orders:
        ranks = np.argsort(np.argsort(names))
        assert abs(np.corrcoef(ranks, np.arange(200))[0, 1]) < 0.25
    assert orders[0] != orders[1]


def wav(seconds: float, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, 0.1 * np.random.default_rng(seed).standard_normal(round(8000 * seconds)), 8000, format="wav"
    )
    return buffer.getvalue()


def column_of(sounds: list[bytes]) -> AudioColumn:
    rows = {"audio": [{"bytes": sound, "path": "same.wav"} for sound in sounds]}
    return AudioColumn(Dataset.from_dict(rows).cast_column("audio", Audio(decode=False)), "audio")


def test_splits_of_a_stream():
    splits = deal(column_of([bytes([i % 256]) for i in range(2000)]), validation=0.2, test=0.1)
    counts = {split: len(names) for split, names in splits.items()}
    assert sum(counts.values()) == 2000
    assert abs(counts["validation"] - 400) < 4 * 18 and abs(counts["test"] - 200) < 4 * 14  # 4 standard deviations
    again = column_of([bytes([i % 256]) for i in range(2000)])
    for a, b in zip(plan_parts(again, {"validation": 0.2}, 0), plan_parts(again, {"validation": 0.2}, 0), strict=True):
        assert (a.split, a.recordings) == (b.split, b.recordings)
    other = [len(part.recordings) for part in plan_parts(again, {"validation": 0.2}, 1)]
    assert other != [len(part.recordings) for part in plan_parts(again, {"validation": 0.2}, 0)]


def test_parts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_builder, "PART_RECORDINGS", 10)
    monkeypatch.setattr(dataset_builder, "PART_BYTES", (100, 500))
    for i in range(100):
        (tmp_path / f"{i}.wav").write_bytes(bytes(10 if i % 10 else 400))
    for source in AudioFolder(tmp_path), column_of([bytes(10 if i % 10 else 500) for i in range(100)]):
        parts = list(plan_parts(source, {"validation": 0.3}, 0))
        assert [part.index for part in parts] == list(range(len(parts)))
        for part in parts:
            assert len(part.recordings) <= 10
            assert sum(recording.size for recording in part.recordings[:-1]) < 500
        assert sum(len(part.recordings) for part in parts) == 100


# ----- a run


@pytest.fixture
def sounds(tmp_path, monkeypatch) -> AudioFolder:
    """Twelve recordings of 2 to 4 slices, three to a part."""
    monkeypatch.setattr(dataset_builder, "PART_RECORDINGS", 3)
    (tmp_path / "sounds").mkdir()
    for i in range(12):
        (tmp_path / "sounds" / f"{i}.wav").write_bytes(wav(1.5 + i % 3, seed=i))
    return AudioFolder(tmp_path / "sounds")


def converter() -> MelConverter:
    return MelConverter(MelSpectrogram.from_preset("fsdd-64"), Features(), "overlap", -60, None, False)


def build(source, output_dir, num_proc=1, max_rows=None, stop_after=None, settings=None, resume=False) -> Path:
    """Builds a dataset, or stops it after some of its parts."""
    builder = DatasetBuilder(output_dir, settings or {"a": 1}, resume)
    held_out = {"validation": 0.25}
    parts = list(plan_parts(source, held_out, 0))
    if builder.complete:
        builder.confirm(parts)
        return builder.work
    finished = builder.run(parts[:stop_after], converter(), num_proc, max_rows, held_out)
    if stop_after is None:
        builder.finish(finished, builder.result(finished, []), converter().features)
    return builder.work


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_number_of_threads_changes_no_byte(tmp_path, sounds):
    for num_proc in 1, 2, 5:
        build(sounds, tmp_path / str(num_proc), num_proc)
    one = contents(tmp_path / "1")
    assert len([name for name in one if name.endswith(".arrow")]) == 4
    assert contents(tmp_path / "2") == one and contents(tmp_path / "5") == one


def test_no_file_is_in_two_splits_and_every_slice_is_there(tmp_path, sounds):
    build(sounds, tmp_path / "out")
    splits = {name: set(split["audio_file"]) for name, split in load_from_disk(tmp_path / "out").items()}
    assert len(splits["validation"]) == 3 and not splits["train"] & splits["validation"]
    rows = [(row["audio_file"], row["slice"]) for split in load_from_disk(tmp_path / "out").values() for row in split]
    expected = [(f"{i}.wav", number) for i in range(12) for number in range(2 + i % 3)]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("max_rows, validation", [(1, 0), (5, 1), (16, 4), (20, 5)])
def test_max_rows(tmp_path, sounds, max_rows, validation):
    build(sounds, tmp_path / "all")
    build(sounds, tmp_path / "few", num_proc=2, max_rows=max_rows)
    all_rows, few = load_from_disk(tmp_path / "all"), load_from_disk(tmp_path / "few")
    assert {name: len(split) for name, split in few.items()} == {
        name: count for name, count in (("train", max_rows - validation), ("validation", validation)) if count
    }
    for name, split in few.items():
        assert split[:] == all_rows[name][: len(split)]


def test_recordings_of_a_stream_are_let_go(tmp_path, monkeypatch):
    """At no time are more of them alive than the parts that are worked on, the queues of the splits and the next."""
    monkeypatch.setattr(dataset_builder, "PART_RECORDINGS", 2)
    source, seen, most = column_of([wav(1.1)] * 100), [], 0

    class Counted:
        def __iter__(self):
            nonlocal most
            for recording in source:
                seen.append(weakref.ref(recording))
                most = max(most, sum(reference() is not None for reference in seen))
                yield recording

    builder = DatasetBuilder(tmp_path / "out", {})
    parts = builder.run(plan_parts(Counted(), {"validation": 0.5}, 0), converter(), 2)
    assert sum(part.rows for part in parts) == 200 and sum(len(part.recordings) for part in parts) == 100
    assert most <= (2 * 2 + 2) * 2 + 4
    assert not any(recording.audio for part in parts for recording in part.recordings)


def test_the_fingerprint_tells_splits_and_recordings_apart(tmp_path, sounds):
    build(sounds, tmp_path / "a")
    build(sounds, tmp_path / "b")
    (sounds.folder / "5.wav").write_bytes(wav(9))
    build(AudioFolder(sounds.folder), tmp_path / "c")
    a, b, c = (load_from_disk(tmp_path / name) for name in "abc")
    assert [split._fingerprint for split in a.values()] == [split._fingerprint for split in b.values()]
    assert a["train"]._fingerprint != a["validation"]._fingerprint
    assert [split._fingerprint for split in a.values()] != [split._fingerprint for split in c.values()]


# ----- several runs side by side


def build_shard(source, output_dir, index, count=3, settings=None) -> DatasetBuilder:
    builder = DatasetBuilder(output_dir, settings or {"a": 1}, shard=(index, count))
    builder.run(plan_parts(source, {"validation": 0.25}, 0), converter(), 1)
    builder._lock.close()
    return builder


def merge(source, output_dir, settings=None) -> None:
    builder = DatasetBuilder(output_dir, settings or {"a": 1}, merge=True)
    if builder.complete:
        return builder.confirm(plan_parts(source, {"validation": 0.25}, 0))
    finished = builder.gather(plan_parts(source, {"validation": 0.25}, 0))
    builder.finish(finished, builder.result(finished, []), converter().features)


@pytest.mark.parametrize("count", [1, 3, 7])  # of four parts
def test_shards_merge_to_what_one_run_makes_byte_for_byte(tmp_path, sounds, count):
    build(sounds, tmp_path / "whole")
    made = set()
    for index in reversed(range(count)):
        work = build_shard(sounds, tmp_path / "out", index, count).work
        fresh = {path.name for path in work.glob("*.arrow")} - made
        assert len(fresh) == len(range(index, 4, count))
        made |= fresh
    merge(sounds, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not work.exists()


def test_shards_that_are_missing_are_named(tmp_path, sounds):
    with pytest.raises(UserError, match=r"^There are no shards in .*out.partial: run --num_shards N with"):
        merge(sounds, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    build_shard(sounds, tmp_path / "out", 0)
    with pytest.raises(UserError, match=r"^2 of 4 parts are missing .* --num_shards 3 with --shard_index 1, 2 first"):
        merge(sounds, tmp_path / "out")
    work = build_shard(sounds, tmp_path / "out", 1).work
    build_shard(sounds, tmp_path / "out", 2)
    (note,) = work.glob("*-000001.json")
    note.unlink()  # as a job that was killed leaves its part
    with pytest.raises(UserError, match=r"^1 of 4 parts are missing .* --shard_index 1 first"):
        merge(sounds, tmp_path / "out")
    kept = {path.name: path.stat().st_ino for path in work.glob("*.arrow")}
    build_shard(sounds, tmp_path / "out", 1)  # and takes it up when it is started again
    build_shard(sounds, tmp_path / "out", 2)
    remade = {path.name for path in work.glob("*.arrow") if path.stat().st_ino != kept[path.name]}
    assert remade == {note.with_suffix(".arrow").name}
    merge(sounds, tmp_path / "out")


def test_shards_of_other_settings_or_files_are_refused(tmp_path, sounds):
    for index in range(3):
        build_shard(sounds, tmp_path / "out", index)
    with pytest.raises(UserError, match=r"out.partial had num_shards = 3, this one has 4: use the same"):
        build_shard(sounds, tmp_path / "out", 3, 4)
    for refused in (lambda **how: build_shard(sounds, tmp_path / "out", 0, **how),
                    lambda **how: merge(sounds, tmp_path / "out", **how)):  # fmt: skip
        with pytest.raises(UserError, match=r"out.partial had a = 1, this one has 2: use the same"):
            refused(settings={"a": 2})
    with pytest.raises(UserError, match=r"holds an unfinished run: add --resume"):
        DatasetBuilder(tmp_path / "out", {"a": 1})
    with pytest.raises(UserError, match=r"had num_shards = 3, this one has None"):
        DatasetBuilder(tmp_path / "out", {"a": 1}, resume=True)

    last = list(plan_parts(sounds, {"validation": 0.25}, 0))[-1].recordings
    kept = {recording.name: recording.audio.read_bytes() for recording in last}
    for recording in last:
        recording.audio.unlink()
    with pytest.raises(UserError, match=r"^The recordings have changed since"):
        merge(AudioFolder(sounds.folder), tmp_path / "out")
    for name, data in kept.items():
        (sounds.folder / name).write_bytes(data)
    (sounds.folder / last[0].name).write_bytes(wav(9))
    with pytest.raises(UserError, match=rf"^The recordings have changed since .*near {last[0].name}"):
        merge(AudioFolder(sounds.folder), tmp_path / "out")
    with pytest.raises(UserError, match=r"^The recordings have changed since"):
        for index in range(3):
            build_shard(AudioFolder(sounds.folder), tmp_path / "out", index)


def test_parts_of_recordings_that_are_gone_are_noticed(tmp_path, sounds):
    """Also if those that are left make the same parts as before."""
    parts = list(plan_parts(sounds, {}, 0))
    builder = DatasetBuilder(tmp_path / "out", {"a": 1}, shard=(0, 1))
    builder.run(parts, converter(), 1)
    builder._lock.close()
    for recording in parts[-1].recordings:
        (sounds.folder / recording.name).unlink()
    left = list(plan_parts(AudioFolder(sounds.folder), {}, 0))
    assert len(left) == len(parts) - 1
    with pytest.raises(UserError, match=r"has parts of more of them"):
        DatasetBuilder(tmp_path / "out", {"a": 1}, merge=True).gather(left)


def test_shards_that_begin_together_agree_on_one_plan(tmp_path, sounds):
    """Before the first part is finished, too."""
    first = DatasetBuilder(tmp_path / "out", {"a": 1}, shard=(0, 2))
    second = DatasetBuilder(tmp_path / "out", {"a": 1}, shard=(1, 2))
    assert first._lock.name != second._lock.name
    with pytest.raises(UserError, match=r"had a = 1, this one has 2"):
        DatasetBuilder(tmp_path / "out", {"a": 2}, shard=(0, 2))


def test_a_merge_that_was_killed_after_it_was_done_is_taken_up(tmp_path, sounds, monkeypatch):
    work = build_shard(sounds, tmp_path / "out", 0, 1).work
    with monkeypatch.context() as patched:
        patched.setattr(DatasetBuilder, "discard", lambda self: None)
        merge(sounds, tmp_path / "out")
    done = contents(tmp_path / "out")
    for arrow in work.glob("*.arrow"):  # as far as the removal had come
        arrow.unlink()
    merge(sounds, tmp_path / "out")
    assert contents(tmp_path / "out") == done and not work.exists()


def test_a_run_without_shards_is_not_merged(tmp_path, sounds):
    build(sounds, tmp_path / "out", stop_after=1)
    with pytest.raises(UserError, match=r"holds an unfinished run without shards: finish it with --resume"):
        merge(sounds, tmp_path / "out")


# ----- a run that stops


def test_an_unfinished_run_is_taken_up_and_its_parts_are_kept(tmp_path, sounds):
    build(sounds, tmp_path / "whole")
    work = build(sounds, tmp_path / "out", stop_after=2)
    kept = {path.name: path.stat().st_ino for path in work.glob("*.arrow")}
    assert len(kept) == 2
    assert not (tmp_path / "out").exists()
    for folder in tmp_path / "out", work:
        with pytest.raises(FileNotFoundError):
            load_from_disk(folder)
    build(sounds, tmp_path / "out", resume=True, num_proc=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert set(kept.values()) <= {path.stat().st_ino for path in (tmp_path / "out").rglob("*.arrow")}
    assert not work.exists()


def test_half_a_part_counts_for_nothing(tmp_path, sounds):
    """A part without its note, and what is left of one that was being written."""
    build(sounds, tmp_path / "whole")
    work = build(sounds, tmp_path / "out", stop_after=3)
    _, second, third = sorted(work.glob("*.arrow"))
    second.write_bytes(second.read_bytes()[:1000])
    second.with_suffix(".json").unlink()
    third.rename(third.with_suffix(".tmp"))
    third.with_suffix(".json").unlink()
    build(sounds, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"garbage", None])
@pytest.mark.parametrize("name", ["*.arrow", "*-*.json"])
def test_a_damaged_part_is_made_again(tmp_path, sounds, name, damage):
    build(sounds, tmp_path / "whole")
    work = build(sounds, tmp_path / "out", stop_after=3)
    kept = min(work.glob("*.arrow")).stat().st_ino
    victim = sorted(work.glob(name))[1]
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage(victim.read_bytes()))
    build(sounds, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert kept in {path.stat().st_ino for path in (tmp_path / "out").rglob("*.arrow")}


def test_a_damaged_plan_is_told(tmp_path, sounds):
    work = build(sounds, tmp_path / "out", stop_after=2)
    for text in ("", "{", "5", "null"):
        (work / "plan.json").write_text(text)
        with pytest.raises(UserError, match=rf"^{work}/plan.json is damaged: delete {work} and start again.$"):
            build(sounds, tmp_path / "out", resume=True)


def test_a_run_that_was_killed_at_its_very_end(tmp_path, sounds):
    """The dataset has taken its place; what it was made of is there, or partly there."""
    build(sounds, tmp_path / "whole")
    for kept in ("*.arrow", "*.json", "plan.json", ".lock", None):
        out = tmp_path / f"out{kept}"
        work = build(sounds, out, stop_after=100)
        for file in work.iterdir() if kept else ():
            if not file.match(kept):
                file.unlink()
        if kept is None:
            shutil.rmtree(work)
        shutil.copytree(tmp_path / "whole", out)
        before = {path: path.stat().st_ino for path in out.rglob("*")}
        with pytest.raises(UserError, match="is in use"):
            build(sounds, out)
        build(sounds, out, resume=True)
        assert {path: path.stat().st_ino for path in out.rglob("*")} == before
        assert not work.exists()


def test_a_finished_dataset_of_something_else_is_not_taken_for_this_one(tmp_path, sounds):
    out = tmp_path / "out"
    work = build(sounds, out)
    before = contents(out)
    work.mkdir()
    (work / "mine").touch()
    with pytest.raises(UserError, match=r"out is in use: the dataset there is complete, and was made of other rec"):
        build(sounds, out, settings={"a": 2}, resume=True)
    (sounds.folder / "more.wav").write_bytes(wav(2))
    with pytest.raises(UserError, match=r"is in use: .* or with other settings. Delete it or choose another one.$"):
        build(AudioFolder(sounds.folder), out, resume=True)
    (sounds.folder / "more.wav").unlink()
    (sounds.folder / "5.wav").write_bytes(wav(9))
    with pytest.raises(UserError, match=r"is in use: the dataset there"):
        merge(AudioFolder(sounds.folder), out)
    assert contents(out) == before and (work / "mine").exists()
    for note in ("{}", "[]", "{", '{"splits": ["train"]}'):  # one that earlier versions made, or that is no dataset
        (out / "dataset_dict.json").write_text(note)
        with pytest.raises(UserError, match=r"out is in use: delete it or choose another one.$"):
            build(sounds, out, resume=True)


def test_a_recording_that_goes_away_is_rejected(tmp_path, sounds):
    """Between the listing of the folder and the reading."""
    (sounds.folder / "5.wav").unlink()
    (sounds.folder / "7.wav").rename(tmp_path / "7.wav")
    (sounds.folder / "7.wav").mkdir()
    builder = DatasetBuilder(tmp_path / "out", {})
    parts = builder.run(plan_parts(sounds, {}, 0), converter(), 1)
    rejects = builder.result(parts, []).rejects
    assert rejects == [
        ("5.wav", "cannot be opened (No such file or directory)"), ("7.wav", "cannot be opened (Is a directory)"),
    ]  # fmt: skip
    assert sum(part.rows for part in parts) == 36 - 4 - 3


def test_a_limited_run_is_taken_up(tmp_path, sounds):
    build(sounds, tmp_path / "whole", max_rows=20)
    build(sounds, tmp_path / "out", stop_after=2, max_rows=20)
    build(sounds, tmp_path / "out", resume=True, max_rows=20)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_refused(tmp_path, sounds):
    work = build(sounds, tmp_path / "out", stop_after=2, settings={"pad": "drop", "seed": 0})
    with pytest.raises(
        UserError, match=r"^.*out.partial holds an unfinished run: add --resume to finish it, or delete"
    ):
        DatasetBuilder(tmp_path / "out", {"pad": "drop", "seed": 0})
    with pytest.raises(UserError, match=r"out.partial had pad = drop, this one has pad: use the same, or delete that"):
        DatasetBuilder(tmp_path / "out", {"pad": "pad", "seed": 0}, resume=True)
    first = next(plan_parts(sounds, {"validation": 0.25}, 0)).recordings[0]
    (sounds.folder / first.name).write_bytes(wav(9))
    with pytest.raises(
        UserError, match=rf"^The recordings have changed since the unfinished run .*near .*{first.name}"
    ):
        build(AudioFolder(sounds.folder), tmp_path / "out", settings={"pad": "drop", "seed": 0}, resume=True)
    assert work.exists()


def test_two_runs_at_once(tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    hold = f"from pathlib import Path; from tonefield.files import claim; lock = claim(Path({str(work)!r}))"
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"^Another run is writing to .*out.partial right now: wait for its end,"):
            DatasetBuilder(tmp_path / "out", {}, resume=True)
        other.communicate("\n")
    DatasetBuilder(tmp_path / "out", {})


def test_an_output_folder_in_use(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    (tmp_path / "file").touch()
    for name in "full", "file":
        with pytest.raises(UserError, match=f"^--output_dir .*{name} is in use: delete it or choose another one.$"):
            DatasetBuilder(tmp_path / name, {})
        assert not (tmp_path / f"{name}.partial").exists()


def test_an_empty_folder_and_the_present_one_can_be_written(tmp_path, sounds, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    build(sounds, ".")
    assert sum(load_from_disk(tmp_path / "empty").num_rows.values()) == 36


def test_a_run_that_finished_no_part_leaves_nothing_to_resume(tmp_path):
    DatasetBuilder(tmp_path / "out", {"seed": 1})._lock.close()
    again = DatasetBuilder(tmp_path / "out", {"seed": 2})
    assert json.loads((again.work / "plan.json").read_text()) == {"seed": 2}
