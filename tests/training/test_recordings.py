"""Recordings as crops: the right samples, of the right recordings, whoever asks."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch

from tonefield.command_line import UserError
from tonefield.data.audio_folder import AudioFolder, Recording
from tonefield.training.data import EndlessRows, Shares
from tonefield.training.recordings import Crops, ReadCrops, find_sources, gather, hold_out, open_recordings


RATE = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four usable sounds, of which each sample tells where it is from, and three that are of no use."""
    folder = tmp_path_factory.mktemp("sounds")
    for index, samples in enumerate((1000, 300, 2500)):
        ramp = (index + np.arange(samples) / 5000) / 4
        soundfile.write(folder / f"{index}.wav", ramp, RATE, subtype="FLOAT")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(folder / "3.wav", np.stack([tone, tone], 1), 8000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(500), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "void.wav", np.zeros(0), RATE)
    return folder


@pytest.fixture(scope="module")
def recordings(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gathered") / "train.f32"
    gather(AudioFolder(folder), RATE, path)
    return open_recordings(path)


def test_all_that_can_be_used_is_gathered_and_the_rest_is_told(folder, tmp_path, capsys):
    gather(AudioFolder(folder), RATE, tmp_path / "x.f32")
    output = capsys.readouterr().out
    assert "3 recordings are left out, the first one broken.wav:" in output
    assert "recordings are resampled to 4000 Hz: 3 of 4000 Hz, 1 of 8000 Hz" in output
    gathered = open_recordings(tmp_path / "x.f32")
    assert gathered.names == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert [gathered.length(i) for i in range(4)] == [1000, 300, 2500, 4000]
    np.testing.assert_allclose(gathered.crop(2, 0, 2500), (2 + np.arange(2500) / 5000) / 4, atol=1e-6)
    spectrum = np.abs(np.fft.rfft(gathered.crop(3, 0, 4000)))
    assert spectrum.argmax() == 440
    gather(AudioFolder(folder), RATE, tmp_path / "y.f32", limit=2)
    assert open_recordings(tmp_path / "y.f32").names == ["0.wav", "1.wav"]


def test_nothing_of_use(folder, tmp_path):
    silent = [Recording("silent.wav", folder / "silent.wav")]
    with pytest.raises(UserError, match=r"None of 1 recordings can be used; silent.wav is silent"):
        gather(silent, RATE, tmp_path / "x.f32")
    with pytest.raises(UserError, match="There are no recordings"):
        gather([], RATE, tmp_path / "x.f32")


def test_crops_lie_within_their_recording(recordings):
    for index, (length, place) in enumerate(((1000, 0.3), (300, 0.9), (2500, 0.0), (4000, 0.999))):
        crop = recordings.crop(index, place, 400)
        assert crop.shape == (400,)
        if index == 3:
            continue
        start = (crop[0] * 4 - index) * 5000
        expected = place * max(0, length - 400)
        assert start == pytest.approx(expected, abs=0.6)
        kept = min(400, length)
        np.testing.assert_allclose(np.diff(crop[:kept]), 1 / 20000, atol=1e-6)
        assert (crop[kept:] == 0).all()


def test_long_recordings_come_as_often_as_they_are_long(recordings):
    crops = Crops(recordings, 400)
    assert np.bincount(crops.recording).tolist() == [2, 1, 6, 10]
    assert Crops(recordings, 10**6).recording.tolist() == [0, 1, 2, 3]


def test_a_position_is_a_crop(recordings):
    """Whatever the batches, the process and the workers; and all places of a recording are met."""

    def rows(seed=0):
        return EndlessRows(Crops(recordings, 400), ReadCrops(recordings, 400, seed), seed)

    whole = next(iter(rows().batches(Shares(12), 5)))["clean"]
    for shares, step, part in ((Shares(6, 2), 5, slice(0, 6)), (Shares(4, 1, 3, 2), 5, slice(8, 12))):
        assert torch.equal(next(iter(rows().batches(shares, step)))["clean"], whole[part])
    assert torch.equal(next(iter(rows().batches(Shares(12), 5, num_workers=1)))["clean"], whole)
    assert not torch.equal(next(iter(rows(1).batches(Shares(12), 5)))["clean"], whole)
    firsts = torch.cat([rows().get(list(range(start, start + 19)))["clean"][:, 0] for start in range(0, 380, 19)])
    starts = (firsts[(firsts >= 0.5) & (firsts < 0.75)] * 4 - 2) * 5000  # those of the third recording
    assert len(starts) > 100
    assert starts.min() < 100
    assert starts.max() > 2000
    middle = ReadCrops(recordings, 400, None)({"recording": [2]}, [0])["clean"]
    assert (middle[0, 0].item() * 4 - 2) * 5000 == pytest.approx(1050, abs=0.6)


def test_held_out_recordings_follow_from_their_names():
    some = [Recording(f"{index}.wav", None) for index in range(100)]
    train, held = hold_out(some, 0.1)
    assert (len(train), len(held)) == (90, 10)
    assert {r.name for r in train} | {r.name for r in held} == {r.name for r in some}
    assert {r.name for r in hold_out(some[::-1], 0.1)[1]} == {r.name for r in held}
    assert len(hold_out(some[:3], 0.01)[1]) == 1
    assert [len(part) for part in hold_out(some[:2], 0.99)] == [1, 1]  # something is left to train on


def test_a_dataset_with_an_audio_column(folder, tmp_path):
    sounds = [{"audio": {"bytes": (folder / f"{i}.wav").read_bytes(), "path": None}} for i in range(4)]
    parts = {name: datasets.Dataset.from_list(rows)
             for name, rows in (("train", sounds[:3]), ("validation", sounds[3:]))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    args = SimpleNamespace(
        input_dir=None, dataset_name=str(tmp_path / "data"), dataset_config_name=None, audio_column="audio",
        train_split="train", validation_split="validation", validation_steps=1, streaming=False, seed=0,
        shuffle_buffer=9,
    )  # fmt: skip
    train, held_out = find_sources(args)
    gather(train, RATE, tmp_path / "t.f32")
    gather(held_out, RATE, tmp_path / "v.f32")
    assert [open_recordings(tmp_path / "t.f32").length(i) for i in range(3)] == [1000, 300, 2500]
    assert len(open_recordings(tmp_path / "v.f32")) == 1
    args.streaming = True
    orders = set()
    for args.seed in range(6):
        gather(find_sources(args)[0], RATE, tmp_path / "s.f32")
        streamed = open_recordings(tmp_path / "s.f32")
        orders.add(tuple(streamed.length(i) for i in range(3)))
    assert {tuple(sorted(order)) for order in orders} == {(300, 1000, 2500)}
    assert len(orders) > 1
    args.validation_split = "test"
    with pytest.raises(UserError, match=r"no split 'test'.*--validation_steps 0 does without"):
        find_sources(args)
