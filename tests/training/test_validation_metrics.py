"""Distances during training: what is compared, in each of the trainers, and which network is kept for them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from token_runs import TINY, make_codec, tokenize
from token_runs import train as train_tokens
from training_runs import ROOT, make_sounds, reset_accelerate, train

from tonefield import train_codec, train_unet, train_vae
from tonefield.data.loading import load_split
from tonefield.evaluation import AudioSet, evaluate
from tonefield.models import FSQCodec, MelSpectrogram
from tonefield.training.checkpoints import WEIGHTS, Best


METRICS = ("--validation_metrics", "fad", "kad")
SOME = (*METRICS, "--validation_steps=2", "--max_train_steps=4", "--num_validation_samples=4")


def logged(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def check(folder: Path, held_out: list[np.ndarray], rate: int, every: int = 1, steps=(2, 4)) -> None:
    """The numbers in the log are those of the sounds in the folder."""
    real = AudioSet.of(held_out, rate)
    for step in steps:
        files = [folder / "samples" / f"step-{step:07d}-{index}.wav" for index in range(every - 1, 4 * every, every)]
        made = AudioSet.of([soundfile.read(file, dtype="float32")[0] for file in files], rate)
        report = evaluate(real, made, ["fad", "kad"], bootstrap=0)
        for result in report["results"]:
            found = logged(folder, f"validation_{result['metric']}")
            assert list(found) == list(steps)
            assert found[step] == pytest.approx(result["value"], rel=1e-4)


def audible(dataset: Path) -> tuple[list[np.ndarray], int]:
    rows, mel = load_split(str(dataset), "validation"), MelSpectrogram(4000, 512, 256, 16, 16)
    mels = torch.tensor(np.array(rows["mel"][:8]), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    parts = [mel.decode(some, generator=generator) for some in mels.split(4)]
    return list(torch.cat(parts).clamp(-1, 1).numpy()), 4000


def test_mels(mels, tmp_path):
    folder = train(tmp_path / "out", mels, *SOME, "--best_metric=fad", "--seed=1")
    check(folder, *audible(mels))
    distances = logged(folder, "validation_fad")
    note = json.loads((folder / "best" / "best.json").read_text())
    assert note["step"] == min(distances, key=lambda step: distances[step])
    assert note["validation_fad"] == pytest.approx(min(distances.values()))
    published, best = load_file(folder / "unet" / WEIGHTS), load_file(folder / "best" / "unet" / WEIGHTS)
    assert all(torch.equal(published[name], best[name]) for name in best)


def test_the_best_by_a_metric_is_kept(tmp_path):
    network = torch.nn.Linear(2, 2)
    network.save_pretrained = lambda folder, **_: folder.mkdir(parents=True)
    best = Best(tmp_path, "unet", True, "validation_kad")
    for step, value in enumerate([3.0, -1.0, 0.5, float("nan")]):
        best.offer(network, value, step)
    note = {"step": 1, "validation_kad": -1.0, "stage": 0}
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == note
    assert Best(tmp_path, "unet", False, "validation_kad").rank == (0, 1.0)
    assert Best(tmp_path, "unet", False, "validation_fad").rank == (-1, -float("inf"))  # another is not compared


def test_reconstructions_of_an_autoencoder(mels, tmp_path):
    recipe = ROOT / "recipes" / "test-tiny-vae.yaml"
    folder = train(tmp_path, mels, *SOME, "--train_batch_size=4", config=recipe, script=train_vae)
    check(folder, *audible(mels), every=2)
    assert "validation_loss" in json.loads((folder / "best" / "best.json").read_text())


def test_a_codec(tmp_path):
    reset_accelerate()
    sounds = make_sounds(tmp_path / "sounds", per_class=10, seconds=0.5)
    (tmp_path / "c.yaml").write_text(
        "sampling_rate: 4000\nhop_length: 40\nn_fft: 160\nlevels: [5, 5]\nwidth: 16\nencoder_layers: 1\n"
        "decoder_layers: 1\n"
    )
    argv = [f"--input_dir={sounds}", f"--codec_config={tmp_path / 'c.yaml'}", f"--output_dir={tmp_path / 'out'}"]
    argv += ["--train_batch_size=2", "--crop_seconds=0.25", "--validation_fraction=0.25", "--logging_steps=1", *SOME]
    train_codec.main(train_codec.parse_args([*argv, "--best_metric=kad"]))
    files = sorted((tmp_path / "out" / "samples").glob("original-*.wav"))
    assert len(files) == 4  # of the five that are held out
    found = logged(tmp_path / "out", "validation_kad")
    assert json.loads((tmp_path / "out" / "best" / "best.json").read_text())["validation_kad"] == min(found.values())
    assert (
        len(logged(tmp_path / "out", "validation_fad")) == 2 and len(logged(tmp_path / "out", "mel_distance_db")) == 2
    )
    assert isinstance(FSQCodec.from_pretrained(tmp_path / "out"), FSQCodec)


def test_tokens(tmp_path):
    rng, rate = np.random.default_rng(0), 8000
    (tmp_path / "sounds").mkdir()
    for index in range(20):
        sound = np.sin(np.arange(1200) * rng.uniform(0.1, 1.5)) * 0.5
        soundfile.write(tmp_path / "sounds" / f"{index}.wav", sound, rate, subtype="FLOAT")
    codec = make_codec(tmp_path / "codec", 8)
    dataset = tokenize(tmp_path / "sounds", codec, tmp_path / "data", "--validation_fraction=0.4")
    (tmp_path / "net.yaml").write_text(TINY)
    folder = train_tokens(tmp_path / "out", dataset, tmp_path / "net.yaml", *SOME)
    import tonefield

    tokenizer = tonefield.models.load_audio_tokenizer(str(codec))
    rows = load_split(str(dataset), "validation")["codes"]
    held_out = [tokenizer.decode(torch.tensor(np.array(codes))[None].long())[0].numpy() for codes in rows]
    assert len(held_out) == 8
    check(folder, held_out, rate)


@pytest.mark.parametrize("flags, message", [
    (["--validation_metrics", "fad", "--validation_steps=0"], "--validation_metrics needs validation"),
    (["--best_metric=loss", "--validation_steps=0"], "--best_metric needs validation"),
    (["--best_metric=kad", "--validation_metrics", "fad"], "--best_metric kad needs --validation_metrics kad"),
    (["--validation_metrics", "kad", "--num_validation_samples=1"], "of 2 at least, not 1"),
    (["--validation_metrics", "accuracy"], "invalid choice: 'accuracy'"),
])  # fmt: skip
def test_what_no_validation_can_find(capsys, flags, message):
    with pytest.raises(SystemExit):
        train_unet.parse_args(["--dataset_name=x", *flags])
    assert message in capsys.readouterr().err
