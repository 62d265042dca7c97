"""Sets of recordings: what is read, what is listed, what is kept for the next time."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import soxr
import torch

from tonefield.command_line import UserError
from tonefield.evaluation import AudioSet
from tonefield.evaluation import sets as sets_module
from tonefield.evaluation.embeddings import Embedding
from tonefield.evaluation.sets import EmbeddedSet, in_parallel, portions


class Counting(Embedding):
    """Mean and peak of each half second, and how many pieces it was asked for."""

    name, sampling_rate, dim, window, least, mixed_lengths = "counting", 8000, 2, 4000, 100, True

    def __init__(self, version="1"):
        self.version, self.pieces = version, 0

    def fingerprint(self):
        return self.version

    def forward(self, pieces, lengths):
        self.pieces += len(pieces)
        return list(torch.stack([pieces.sum(1) / lengths, pieces.abs().amax(1)], 1)[:, None])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(["b.wav", "deep/a.flac", "c.wav", "a.wav"]):
        sound = rng.uniform(-0.5, 0.5, (3000 + 2000 * index, 1 + index % 2))
        soundfile.write(folder / name, sound, 8000 if index < 3 else 22050)
    soundfile.write(folder / "quiet.wav", np.full(1000, 5e-4), 8000)
    (folder / "broken.wav").write_bytes(b"RIFF" + bytes(100))
    (folder / "notes.txt").write_text("not audio")
    return folder


def test_a_folder(folder):
    one = AudioSet.open(folder)
    assert [sample.name for sample in one.samples] == ["a.wav", "b.wav", "c.wav", "deep/a.flac", "quiet.wav"]
    assert [file for file, _ in one.rejects] == ["broken.wav", "notes.txt"]
    assert "cannot be read as audio" in one.rejects[0][1]
    assert one.silent == ["quiet.wav"]
    about = one.about()
    assert about["files"] == 5 and about["sampling_rates"] == {"22050": 1, "8000": 4}
    assert about["seconds"] == pytest.approx(9000 / 22050 + (3000 + 7000 + 5000 + 1000) / 8000)
    assert about["rejects"][1] == {"file": "notes.txt", "reason": "is not audio by its name (.txt)"}
    assert about["silent"] == ["quiet.wav"] and json.dumps(about)
    waveforms = list(one.waveforms(8000))
    sound, rate = soundfile.read(folder / "a.wav", dtype="float32", always_2d=True)
    np.testing.assert_allclose(waveforms[0], soxr.resample(sound.mean(1), rate, 8000, quality="HQ"), atol=1e-6)
    np.testing.assert_array_equal(waveforms[1], soundfile.read(folder / "b.wav", dtype="float32")[0])


@pytest.mark.parametrize("workers", [1, 5])
def test_embeddings_are_those_of_the_files_in_order(folder, workers, monkeypatch):
    monkeypatch.setattr(sets_module, "CHUNK", (2, 10**9))  # files are dealt with in several chunks
    one = AudioSet.open(folder, num_workers=workers)
    embedded = one.embed(Counting(), batch_size=2)
    assert embedded.counts.tolist() == [1, 1, 2, 2, 1] and len(embedded) == 5
    rows = np.concatenate(
        [
            [[piece.mean(), np.abs(piece).max()] for piece in (w[:4000], w[4000:]) if len(piece)]
            for w in one.waveforms(8000)
        ]
    )
    np.testing.assert_allclose(embedded.rows, rows, atol=1e-6)
    np.testing.assert_allclose(embedded.stats.mean, rows.mean(0), atol=1e-7)
    np.testing.assert_allclose(embedded.stats.covariance, np.cov(rows.T), atol=1e-7)
    assert isinstance(embedded.rows, np.memmap)  # what is on disk does not grow with the memory
    assert embedded.clips.tolist() == [0, 1, 2, 2, 3, 3, 4]
    part = one.subset([3, 0, 3])
    assert [sample.name for sample in part.samples] == ["deep/a.flac", "a.wav", "deep/a.flac"]
    again = part.subset([1, 2]).embed(Counting())
    np.testing.assert_array_equal(again.rows, embedded.rows[[0, 4, 5]])
    assert part.embed(Counting()).counts.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(embedded.of_clip(3), embedded.rows[4:6])


def test_what_is_kept_and_when_it_is_computed_anew(folder, tmp_path):
    def pieces(**changes):
        one, embedding = AudioSet.open(folder, cache_dir=tmp_path / "cache"), Counting(changes.pop("version", "1"))
        for name, value in changes.items():
            setattr(embedding, name, value)
        rows = np.array(one.embed(embedding).rows)
        return embedding.pieces, rows

    first, rows = pieces()
    again, same = pieces()
    assert first == 7 and again == 0
    np.testing.assert_array_equal(rows, same)
    assert pieces(version="2")[0] == 7  # other weights
    assert pieces(sampling_rate=4000)[0] > 0
    assert pieces(window=1000)[0] > 7
    assert pieces(least=2000)[0] > 0
    assert pieces(sampling_rate=4000, window=2000, least=50)[0] > 0  # pieces of the same seconds, at another rate
    assert pieces()[0] == 0
    sound, rate = soundfile.read(folder / "b.wav")
    stat = (folder / "b.wav").stat()
    soundfile.write(folder / "b.wav", -sound, rate)  # of the same name, size and, as far as one can see, time
    os.utime(folder / "b.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    count, changed = pieces()
    assert count == 7
    np.testing.assert_allclose(changed[1], rows[1] * [-1, 1], atol=1e-7)
    # Files with the same contents in the same order are the same set, wherever they are.
    shutil.copytree(folder, tmp_path / "copy")
    embedding = Counting()
    AudioSet.open(tmp_path / "copy", cache_dir=tmp_path / "cache").embed(embedding)
    assert embedding.pieces == 0
    assert not list((tmp_path / "cache").glob(".partial*"))


def test_a_run_that_dies_leaves_nothing_half(folder, tmp_path):
    class Failing(Counting):
        def forward(self, pieces, lengths):
            raise KeyboardInterrupt

    one = AudioSet.open(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        one.embed(Failing())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]  # what the files are
    assert len(one.embed(Counting())) == 5

    class NoNumber(Counting):
        def forward(self, pieces, lengths):
            rows = super().forward(pieces, lengths)
            return [row + np.nan if n == 1000 else row for row, n in zip(rows, lengths, strict=True)]

    with pytest.raises(UserError, match=r"counting makes numbers that are not finite of deep/a\.flac"):
        one.embed(NoNumber("3"))


def test_sounds_in_memory():
    rng = np.random.default_rng(1)
    sounds = [rng.uniform(-1, 1, n).astype(np.float32) for n in (4000, 100)]
    one = AudioSet.of(sounds, 8000, "drawn", [{"caption": "a"}, {"caption": "b"}])
    assert [sample.columns["caption"] for sample in one.samples] == ["a", "b"]
    np.testing.assert_allclose(one.embed(Counting()).rows[:, 1], [np.abs(s).max() for s in sounds])
    assert one.fingerprint != AudioSet.of(sounds, 16000).fingerprint != AudioSet.of(sounds[::-1], 16000).fingerprint
    for bad in (np.zeros((2, 3)), np.zeros(0), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="Sound 1 is not a line of finite numbers"):
            AudioSet.of([sounds[0], bad], 8000)


def test_a_sound_of_one_sample_is_followed_by_silence(tmp_path):
    soundfile.write(tmp_path / "click.wav", np.array([0.5]), 44100)  # nothing is left of it at 8 kHz
    np.testing.assert_array_equal(AudioSet.open(tmp_path).embed(Counting()).rows, [[0, 0]])


def test_a_sound_below_zero_is_not_silent(tmp_path):
    soundfile.write(tmp_path / "low.wav", np.full(100, -0.5), 8000)
    one = AudioSet.open(tmp_path)
    assert one.silent == [] and one.samples[0].peak == 0.5


def test_what_can_be_read_is_known_of_each_kind_of_file(folder, tmp_path, monkeypatch):
    AudioSet.open(folder, cache_dir=tmp_path / "cache")
    (folder / "b.wav").rename(folder / "b.m4a")
    monkeypatch.setenv("PATH", "")  # without ffmpeg
    again = AudioSet.open(folder, cache_dir=tmp_path / "cache")
    assert ("b.m4a", ".m4a files need ffmpeg, which is not installed") in again.rejects


def test_few_rows_are_kept_without_their_scatter(tmp_path):
    """Two rows of two numbers: the statistics are those of the rows, now and when they are read again."""
    sounds = [np.full(4000, level, np.float32) for level in (0.25, 0.5)]
    one = AudioSet.of(sounds, 8000)
    one.cache_dir = tmp_path
    for _ in range(2):
        embedded = one.embed(Counting())
        np.testing.assert_allclose(embedded.stats.covariance, np.full((2, 2), 0.03125))
        one._embedded.clear()
    with np.load(next(tmp_path.rglob("stats.npz"))) as file:
        assert "scatter" not in file and int(file["dim"]) == 2


def test_folders_and_metadata_name_classes_and_captions(folder):
    rows = [{"file_name": "a.wav", "caption": "noise"}, {"file_name": "b.wav", "caption": "hiss"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = AudioSet.open(folder)
    assert [sample.columns.get("caption") for sample in one.samples] == ["noise", "hiss", None, None, None]
    assert one.warnings == ["4 files have no row of metadata, the first one broken.wav"]
    (folder / "manifest.jsonl").unlink()
    for name in ("x", "y"):
        (folder / name).mkdir()
    for file in list(folder.glob("*.wav")):
        file.rename(folder / "x" / file.name)
    (folder / "deep" / "a.flac").rename(folder / "y" / "a.flac")
    one = AudioSet.open(folder)
    assert list(one.class_names) == ["x", "y"] and one.labels == [0, 0, 0, 0, 1]


def test_what_is_no_set(tmp_path):
    with pytest.raises(UserError, match=r"--generated .*none does not exist"):
        AudioSet.open(tmp_path / "none", flag="--generated")
    with pytest.raises(UserError, match="There are no recordings in"):
        AudioSet.open(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"no")
    with pytest.raises(UserError, match=r"None of the 1 recordings in .* can be used; a.wav cannot be read as audio"):
        AudioSet.open(tmp_path)


def test_threads_keep_the_order_and_do_not_run_far_ahead():
    taken = []

    def items():
        for index in range(1000):
            taken.append(index)
            yield index

    results = in_parallel(lambda index: index * 2, items(), 3)
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(taken) < 20
    results.close()
    assert list(in_parallel(str, range(4), 2)) == ["0", "1", "2", "3"]


def test_portions_end_when_they_are_full():
    sizes = [1, 1, 1, 5, 9, 0, 2, 2]
    assert list(portions(sizes, float, (3, 4))) == [[1, 1, 1], [5], [9], [0, 2, 2]]
    assert list(portions([2, 2, 2], float, (3, 4))) == [[2, 2], [2]] and not list(portions([], float, (3, 4)))


def test_thinning_keeps_every_clip():
    rows = np.arange(20.0, dtype=np.float32)[:, None]
    embedded = EmbeddedSet(rows, np.array([10, 1, 4, 5]))
    thin = embedded.thinned(7)
    assert thin.rows[:, 0].tolist() == [0, 3, 6, 9, 10, 11, 14, 15, 18] and thin.counts.tolist() == [4, 1, 2, 2]
    assert embedded.thinned(20) is embedded and embedded.thinned(7) is thin


def test_a_second_look_reads_no_sound(folder, tmp_path, monkeypatch):
    first = AudioSet.open(folder, cache_dir=tmp_path / "cache")

    def fail(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(sets_module, "_scan", fail)
    again = AudioSet.open(folder, cache_dir=tmp_path / "cache")
    assert again.samples == first.samples and again.rejects == first.rejects
    assert [sound.tolist() for sound in again.waveforms(8000)] == [sound.tolist() for sound in first.waveforms(8000)]
    for note in (tmp_path / "cache").glob("*.json"):
        note.write_text("{")
    with pytest.raises(AssertionError, match="read again"):
        AudioSet.open(folder, cache_dir=tmp_path / "cache")
