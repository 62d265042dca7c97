"""The script that trains autoencoders: what comes of it, what every flag does, and what it refuses."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from fake_hub import check_players
from safetensors.torch import load_file
from training_runs import ROOT, differences, make_dataset, make_sounds, start, train

from tonefield import train_unet, train_vae
from tonefield.command_line import UserError
from tonefield.data.loading import RECORD_COLUMN, read_record
from tonefield.models import MelSpectrogram
from tonefield.training import latents
from tonefield.training.autoencoder import spectral_loss
from tonefield.training.data import open_data
from tonefield.training.latents import fingerprint, measure_latents
from tonefield.training.publishing import publish_folder


RECIPE = ROOT / "recipes" / "test-tiny-vae.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BOTH = {"vae", "discriminator"}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return make_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def mels(sounds, tmp_path_factory):
    """38 mels to train on and 10 held out, of 16 x 32."""
    return make_dataset(sounds, tmp_path_factory.mktemp("mels") / "data", "--resolution=32,16", "--hop_length=128")


def train_here(output, dataset, *flags):
    return train(output, dataset, *flags, config=RECIPE, script=train_vae)


def parsed(*flags):
    return train_vae.parse_args([f"--config={RECIPE}", "--dataset_name=x", *flags])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / WEIGHTS).items())])


@pytest.fixture(scope="module")
def trained(mels, tmp_path_factory):
    """A tiny autoencoder that has learned something, with a discriminator in the last third, and its latents."""
    folder = tmp_path_factory.mktemp("trained")
    flags = (
        "--max_train_steps=100", "--train_batch_size=8", "--gradient_accumulation_steps=1", "--learning_rate=0.004",
        "--discriminator_start=75", "--validation_steps=25", "--checkpointing_steps=5", "--logging_steps=25",
        "--lr_warmup_steps=10", f"--cache_latents={folder / 'latents'}",
    )  # fmt: skip
    return train_here(folder / "out", mels, *flags)


def encode_all(folder, mels, split="train"):
    """The autoencoder and the posteriors of a split, by diffusers alone."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    mel = MelSpectrogram.from_pretrained(folder, subfolder="mel")
    rows = datasets.load_from_disk(str(mels))[split]
    seen = mel.standardize(torch.from_numpy(np.asarray(rows["mel"][:], dtype=np.float32)))
    with torch.no_grad():
        return vae, vae.encode(seen).latent_dist, seen


# What comes of it.


def test_scaled_latents_have_mean_0_and_deviation_1(trained, mels):
    vae, posterior, _ = encode_all(trained, mels)
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert vae.config.scaling_factor != 0.18215
    scaled = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean().item()) < 0.02
    assert scaled.std().item() == pytest.approx(1, abs=0.02)
    measured = json.loads((trained / "training.json").read_text())["latents"]
    assert measured["rows"] == len(drawn) == 38
    for channel in range(4):
        assert measured["channel_means"][channel] == pytest.approx(drawn[:, channel].mean().item(), abs=0.05)
        assert measured["channel_stds"][channel] == pytest.approx(drawn[:, channel].std().item(), rel=0.05)


def test_the_spread_of_the_posteriors_counts(mels, monkeypatch):
    """Before any training the posteriors are almost as wide as the latents. The rows come from all over the data."""
    args = parsed(f"--dataset_name={mels}")
    data = open_data(args)
    vae = train_vae.make_vae(args, data)
    mels = data.train.read(data.train.rows[:], [])["clean"]
    found = measure_latents(vae, Accelerator(), data, 5)
    with torch.no_grad():
        posterior = vae.encode(mels).latent_dist
    draws = torch.cat([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(30)])
    assert posterior.mean.std() < 0.8 * draws.std()
    assert found["mean"] == pytest.approx(draws.mean().item(), abs=0.01)
    assert found["std"] == pytest.approx(draws.std().item(), rel=0.01)
    monkeypatch.setattr(latents, "MEASURED_ROWS", 3)
    read = torch.cat(list(latents.training_mels(data, 2)))
    torch.testing.assert_close(read, mels[[0, 18, 37]])


def test_it_learns_and_says_how_well(trained, mels):
    rows = [row for row in logged(trained) if "validation_loss" in row]
    assert rows[-1]["validation_error_db"] < 0.65 * rows[0]["validation_error_db"]
    assert rows[-1]["validation_snr_db"] > rows[0]["validation_snr_db"] + 4
    vae, posterior, seen = encode_all(trained, mels, "validation")
    with torch.no_grad():
        made = vae.decode(posterior.mean).sample
    mel = MelSpectrogram.from_pretrained(trained, subfolder="mel")
    error = (mel.unstandardize(made) - mel.unstandardize(seen)).numpy() * 40  # 80 dB are 2
    error_db = np.sqrt(np.square(error).mean(axis=(1, 2, 3)))[:8].mean()
    held_out = json.loads((trained / "training.json").read_text())["held_out"]
    assert held_out["error_db"] == pytest.approx(error_db, rel=1e-4)
    best = json.loads((trained / "best" / "best.json").read_text())
    (validated,) = [row for row in rows if row["step"] == best["step"]]
    assert validated["validation_error_db"] == pytest.approx(error_db, rel=1e-3)
    assert validated["validation_snr_db"] == pytest.approx(held_out["snr_db"], rel=1e-3)


def test_the_best_since_the_discriminator_is_published(mels, tmp_path):
    """With a discriminator that outweighs all else, reconstructions only get worse from step 3 on."""
    train_here(
        tmp_path, mels, "--discriminator_start=3", "--discriminator_weight=10000", "--no-use_ema",
        "--lr_scheduler=constant", "--validation_steps=1", "--checkpointing_steps=1", "--num_validation_samples=0",
    )  # fmt: skip
    losses = {row["step"]: row["validation_loss"] for row in logged(tmp_path) if "validation_loss" in row}
    best = min((4, 5, 6), key=losses.__getitem__)
    assert losses[3] < losses[best] < losses[6]
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == best
    assert torch.equal(weights(tmp_path / "vae"), weights(tmp_path / f"checkpoint-{best}" / "vae"))
    assert not torch.equal(weights(tmp_path / "vae"), weights(tmp_path / "checkpoint-6" / "vae"))


def test_reconstructions_can_be_seen_and_heard(trained):
    names = {path.name for path in (trained / "samples").glob("step-0000025*")}
    assert names == {"step-0000025.png", *(f"step-0000025-{index}.wav" for index in range(4))}
    card = (trained / "README.md").read_text()
    assert 'subfolder="vae"' in card and "held out: error" in card and "library_name: diffusers" in card


def test_eight_slices_are_learned_by_heart(mels, tmp_path):
    train_here(
        tmp_path, mels, "--max_train_samples=8", "--train_batch_size=8", "--gradient_accumulation_steps=1",
        "--max_train_steps=90", "--learning_rate=0.006", "--discriminator_weight=0", "--logging_steps=10",
        "--latent_dims=8,16",
    )  # fmt: skip
    assert logged(tmp_path)[-1]["l1"] < 0.05 < 0.2 < logged(tmp_path)[0]["l1"]
    vae, posterior, seen = encode_all(tmp_path, mels)
    with torch.no_grad():
        errors = (vae.decode(posterior.mean).sample - seen).abs().mean(dim=(1, 2, 3))
    assert errors[:8].mean() < 0.05


# The discriminator.


@pytest.fixture(scope="module")
def usual(mels, tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("usual"), mels, "--checkpointing_steps=1")


def test_the_discriminator_starts_at_the_step_that_is_given(usual, mels, tmp_path):
    """Optimizer steps, of two micro-batches each: two without it, four with it."""
    optimizer = torch.load(usual / "checkpoint-6" / "optimizer.bin", weights_only=True)
    of_vae, of_judge = (group["params"] for group in optimizer["param_groups"])
    assert {int(optimizer["state"][index]["step"]) for index in of_vae} == {6}
    assert {int(optimizer["state"][index]["step"]) for index in of_judge} == {4}
    judges = [weights(usual / f"checkpoint-{step}" / "discriminator") for step in range(1, 7)]
    assert torch.equal(judges[0], judges[1])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(judges[1:]))
    assert [row["step"] for row in logged(usual) if "discriminator_loss" in row] == [3, 4, 5, 6]

    alone = train_here(tmp_path, mels, "--checkpointing_steps=1", "--discriminator_weight=0")
    assert not (alone / "checkpoint-6" / "discriminator").exists()
    for step in range(1, 7):
        same = torch.equal(*(weights(path / f"checkpoint-{step}" / "vae") for path in (usual, alone)))
        assert same == (step <= 2), step


def test_each_network_learns_from_its_own_loss(mels):
    """The gradients of the loop's one backward pass are those of the two losses, each for its network alone."""
    args = parsed(f"--dataset_name={mels}")
    data = open_data(args)
    vae, opponent = train_vae.make_vae(args, data), train_vae.make_discriminator(args, data)
    judge = opponent.network
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, reduce=lambda gradient, how: gradient)
    loss = train_vae.make_loss(args, data.mel, accelerator)(vae.train(), data.train.get([0, 1, 2, 3]), None, judge)
    (loss.total + loss.opponent).backward()

    seen = data.train.get([0, 1, 2, 3])["clean"]
    with torch.no_grad():
        made = vae(seen)[0]
    hinge = ((1 - judge(seen)).relu().mean() + (1 + judge(made)).relu().mean()) / 2
    for weight, expected in zip(judge.parameters(), torch.autograd.grad(hinge, list(judge.parameters())), strict=True):
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)
    last, made = vae.decoder.conv_out.weight, vae(seen)[0]
    losses = (made - seen).abs().mean() + spectral_loss(made, seen), -judge(made).mean()
    pulls = [torch.autograd.grad(value, last, retain_graph=True)[0] for value in losses]
    expected = pulls[0] + 0.5 * pulls[0].norm() / (pulls[1].norm() + 1e-4) * pulls[1]
    torch.testing.assert_close(last.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_discriminator_learns(trained):
    """It is better than one that says 0 of everything, whose loss is 1."""
    assert logged(trained)[-2]["discriminator_loss"] < 0.95


def test_kill_and_resume_is_exact(usual, mels, tmp_path):
    """Before the discriminator takes part, and while it does."""
    for step in (1, 4):
        folder = tmp_path / str(step)
        shutil.copytree(usual / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        train_here(folder, mels, "--resume_from_checkpoint=latest")
        assert differences(folder / "checkpoint-6", usual / "checkpoint-6") == []
        assert torch.equal(weights(folder / "vae"), weights(usual / "vae"))
    assert len(differences(usual / "checkpoint-4", usual / "checkpoint-6")) > 100


def test_watching_changes_nothing(usual, mels, tmp_path):
    train_here(tmp_path, mels, "--validation_steps=2", "--logging_steps=3", "--dataloader_num_workers=1")
    assert differences(tmp_path / "checkpoint-6", usual / "checkpoint-6") == []
    each, together = logged(usual), [row for row in logged(tmp_path) if "loss" in row]
    assert [row["step"] for row in together] == [2, 3, 4, 6]
    for name in ("loss", "l1", "spectral", "kl", "adversarial", "adversarial_weight", "discriminator_loss"):
        assert together[3][name] == pytest.approx((each[4][name] + each[5][name]) / 2, rel=1e-5)


def test_the_loss_is_the_sum_of_its_parts(mels, tmp_path):
    flags = ("--max_train_steps=2", "--discriminator_start=1", "--kl_weight=2", "--spectral_weight=0.5")
    train_here(tmp_path, mels, *flags, "--gradient_accumulation_steps=1")
    for row in logged(tmp_path):
        expected = row["l1"] + 0.5 * row["spectral"] + 2 * row["kl"] / (16 * 32)
        expected += row.get("adversarial_weight", 0) * row.get("adversarial", 0)
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert "adversarial" in row


def test_gradients_of_both_networks_are_limited(usual, mels, tmp_path):
    flags = ("--max_grad_norm=1e-6", "--adam_epsilon=0.001", "--lr_scheduler=constant", "--max_train_steps=4")
    train_here(tmp_path, mels, *flags, "--checkpointing_steps=1")
    for network in BOTH:
        moved = weights(tmp_path / "checkpoint-4" / network) - weights(tmp_path / "checkpoint-1" / network)
        assert 0 < moved.abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("start_at", [0, 2])
def test_two_processes_equal_one(mels, tmp_path, start_at):
    """Adam divides by the gradient, so a large epsilon keeps rounding from becoming a step."""
    flags = ("--gradient_accumulation_steps=1", f"--discriminator_start={start_at}", "--max_train_steps=4",
             "--adam_epsilon=0.01", "--learning_rate=0.05", "--validation_steps=4")  # fmt: skip
    train_here(tmp_path / "one", mels, *flags, "--train_batch_size=8", "--checkpointing_steps=1")
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    process = start(tmp_path / "two", mels, *flags, launcher=launcher, config=RECIPE, script=train_vae)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for network in ("vae", "discriminator"):
        first, ours, theirs = (
            weights(tmp_path / path / network) for path in ("one/checkpoint-1", "one/checkpoint-4", "two/checkpoint-4")
        )
        assert (first - ours).abs().max() > 0.01
        torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-5)
    rows = [logged(tmp_path / name)[-1] for name in ("one", "two")]
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[1][name] == pytest.approx(value, rel=1e-3) for name, value in rows[0].items())


# Flags.


CHANGES = {
    "--spectral_weight=0": BOTH,
    "--kl_weight=1": BOTH,
    "--discriminator_weight=5": {"vae"},  # what the discriminator learns from is only changed with the next step
    "--discriminator_start=0": BOTH,
    "--discriminator_learning_rate=0.1": {"discriminator"},
    "--seed=1": BOTH,
    "--gradient_checkpointing": set(),
}


@pytest.mark.parametrize(("flag", "changed"), CHANGES.items())
def test_every_flag_changes_what_it_should(usual, mels, tmp_path, flag, changed):
    folder = train_here(tmp_path, mels, "--max_train_steps=3", "--checkpointing_steps=3", flag)
    found = set()
    for network in BOTH:
        first, second = (weights(path / "checkpoint-3" / network) for path in (usual, folder))
        found |= set() if torch.allclose(first, second, rtol=0, atol=1e-7) else {network}
    assert found == changed


def shaped(height, width, *flags):
    """The autoencoder and the discriminator for mels of a size."""
    args, data = parsed(*flags), SimpleNamespace(sample_shape=(1, height, width))
    with torch.device("meta"):
        return train_vae.make_vae(args, data), train_vae.make_discriminator(args, data)


def test_sizes_differ():
    """And have as many parameters as `--help` says."""
    counts = [shaped(64, 64, f"--model_size={size}", "--latent_channels=8")[0].num_parameters()
              for size in ("tiny", "small", "medium", "large")]  # fmt: skip
    assert [round(count / 1e6, 1) for count in counts] == [0.2, 2.6, 13.4, 53.3]
    deeper = shaped(64, 64, "--model_size=large", "--latent_dims=8,8")[0].num_parameters()
    assert deeper > 1.3 * counts[-1]


@pytest.mark.parametrize(
    ("size", "dims", "expected"),
    [
        ((64, 64), None, (16, 16)),
        ((64, 64), "8,8", (8, 8)),
        ((64, 64), "16", (16, 16)),
        ((80, 256), "20,64", (20, 64)),
        ((128, 1024), "4,32", (4, 32)),
        ((16, 32), "8,16", (8, 16)),
    ],
)
def test_latent_dims_are_honoured_on_both_axes(size, dims, expected):
    vae, discriminator = shaped(*size, *([f"--latent_dims={dims}"] if dims else []))
    mels = torch.zeros(2, 1, *size, device="meta")
    made, parameters = vae(mels)
    assert parameters.shape == (2, 8, *expected) and made.shape == mels.shape
    assert min(discriminator.network(mels).shape[2:]) >= 2


@pytest.mark.parametrize(
    ("size", "dims", "message"),
    [
        (
            (128, 512),
            "16,128",
            "--latent_dims 16,128 cannot be had of 128 x 512 mels .*both. Possible: 64,256; 32,128;",
        ),
        ((128, 512), "32,64", "--latent_dims 32,64 cannot be had"),
        ((64, 64), "20,20", "--latent_dims 20,20 cannot be had of 64 x 64 mels"),
        ((64, 64), "64,64", "Possible: 32,32; 16,16; 8,8"),
        ((63, 64), None, "63 x 64 mels .* cannot be halved .* multiples of 4"),
        ((66, 64), None, "The default of --latent_dims, a quarter, cannot be had of 66 x 64 mels.*Possible: 33,32.$"),
        ((4, 4), None, "cannot be halved or are smaller than 8"),
    ],
)
def test_impossible_sizes_are_refused(size, dims, message):
    with pytest.raises(UserError, match=message) as caught:
        shaped(*size, *([f"--latent_dims={dims}"] if dims else []))
    assert "\n" not in str(caught.value)


def test_test_switch(mels, tmp_path, capsys):
    flags = [f"--dataset_name={mels}", f"--output_dir={tmp_path}", "--model_size=tiny", "--test"]
    train_vae.main(train_vae.parse_args(flags))
    output = capsys.readouterr().out
    assert all(f"step {step}: loss" in output for step in (1, 2, 3, 4))
    assert output.count("discriminator_loss") == 2
    assert "held out: error" in output


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*vae*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe):
    args = train_vae.parse_args([f"--config={recipe}", "--dataset_name=x"])
    assert 0 < args.discriminator_start < args.max_train_steps


# Latents.


def test_cached_latents_are_those_of_the_autoencoder(trained, mels):
    folder = trained.parent / "latents"
    cached, rows = datasets.load_from_disk(str(folder)), datasets.load_from_disk(str(mels))
    assert {name: len(split) for name, split in cached.items()} == {"train": 38, "validation": 10}
    assert sorted(path.name for path in trained.parent.iterdir()) == ["latents", "out"]  # nothing is left over
    for split in rows:
        vae, posterior, _ = encode_all(trained, mels, split)
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        mean, std = (np.asarray(cached[split][name][:]) for name in ("latents", "latents_std"))
        np.testing.assert_allclose(mean, (posterior.mean - shift) * scale, atol=5e-3)
        np.testing.assert_allclose(std, posterior.std * scale, rtol=5e-3, atol=1e-5)
        others = [name for name in rows[split].column_names if name not in ("mel", RECORD_COLUMN)]
        assert "label" in others and set(others) < set(cached[split].column_names)
        assert cached[split].features["label"] == rows[split].features["label"]
        assert all(cached[split][name][:] == rows[split][name][:] for name in others)
    record = read_record(cached["train"].features)
    assert record["format"] == "tonefield-latents"
    assert record["mel"] == read_record(rows["train"].features)
    assert record["vae"]["fingerprint"] == fingerprint(vae)
    assert record["vae"]["config"]["scaling_factor"] == scale
    again = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert torch.equal(again.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    assert MelSpectrogram.from_pretrained(folder, subfolder="mel").fingerprint() == record["mel"]["fingerprint"]


def test_trainers_read_cached_latents_without_the_autoencoder(trained):
    args = train_unet.parse_args([f"--dataset_name={trained.parent / 'latents'}", "--validation_steps=1"])
    assert open_data(args).class_names == []  # what makes sound of latents is told texts
    args.class_conditional = True
    data = open_data(args)
    assert data.sample_shape == (4, 4, 8) and data.sigma_data == 1 and data.class_names == ["high", "low"]
    batch = data.train.get(list(range(38)))
    assert abs(batch["clean"].mean().item()) < 0.02
    assert batch["clean"].std().item() == pytest.approx(1, abs=0.03)
    assert sorted(batch["class_labels"].tolist()) == sorted(data.train.rows["label"])
    again, later = data.train.get([3, 4])["clean"], data.train.get([38 + 3])["clean"]
    assert torch.equal(again, batch["clean"][3:5])
    assert later.shape == (1, 4, 4, 8)
    # The noise is that of the posterior: what is left after the mean has its deviation.
    rows = data.train.rows[[data.train.row_of(position) for position in range(38)]]
    noise = (batch["clean"] - torch.tensor(rows["latents"])) / torch.tensor(rows["latents_std"])
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    assert data.describe()["autoencoder"] == data.vae["fingerprint"]
    assert len(next(data.validation_batches(3))["clean"]) == 3
    with pytest.raises(UserError, match="trained on the mels"):
        train_here(trained.parent / "out2", trained.parent / "latents")


def test_a_fingerprint_stands_for_weights_and_scale(trained):
    vae = AutoencoderKL.from_pretrained(trained, subfolder="vae")
    first = fingerprint(vae)
    assert first == fingerprint(AutoencoderKL.from_pretrained(trained, subfolder="vae"))
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1e-6
    assert fingerprint(vae) != first
    vae = AutoencoderKL.from_pretrained(trained, subfolder="vae", scaling_factor=2.0)
    assert fingerprint(vae) != first


# What is refused.


def test_bad_flags(capsys):
    for flag, message in {
        "--latent_dims=4x4": "'4x4' is neither H,W nor one number",
        "--latent_dims=0,4": "'0,4' is neither",
        "--latent_channels=0": "--latent_channels is at least 1, not 0",
        "--discriminator_start=-1": "at least 0",
        "--kl_weight=-1": "--kl_weight is at least 0, not -1",
        "--spectral_weight=nan": "--spectral_weight is at least 0, not nan",
        "--discriminator_learning_rate=0": "must be positive",
        "--model_size=huge": "invalid choice: 'huge'",
    }.items():
        with pytest.raises(SystemExit) as exit:
            train_vae.parse_args(["--dataset_name=x", flag])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_vae.parse_args(["--dataset_name=x", "--streaming", "--cache_latents=y"])
    assert "wants the whole dataset" in capsys.readouterr().err


def test_bad_datasets_and_runs(usual, mels, tmp_path):
    def refused(message, dataset, *flags, output=tmp_path / "out"):
        with pytest.raises(UserError, match=message) as caught:
            train_here(output, dataset, *flags)
        assert "\n" not in str(caught.value)

    datasets.Dataset.from_dict({"mel": [[1.0]]}).save_to_disk(tmp_path / "alien")
    refused("no column 'front_end'", tmp_path / "alien")
    refused("Possible: 8,16", mels, "--latent_dims=4,16")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    refused("used is in use: delete it", mels, f"--cache_latents={tmp_path / 'used'}")
    refused("cannot be written", mels, f"--cache_latents={tmp_path / 'used' / 'file' / 'x'}")
    assert os.listdir(tmp_path / "out") == [".lock"]
    resume = f"--resume_from_checkpoint={usual / 'checkpoint-4'}"
    refused("trained with model size tiny, this run has small", mels, resume, "--model_size=small")
    refused("latent shape 4 x 4 x 8, this run has 4 x 8 x 16", mels, resume, "--latent_dims=8,16")
    refused("discriminator .*, this run has None", mels, resume, "--discriminator_weight=0")
    refused("has checkpoints of an earlier run", mels, output=usual)


def test_latents_that_were_written_by_a_run_that_was_killed(usual, mels, tmp_path, capsys):
    """In its last instant: they are there, and the next start must end well. Those of others are not touched."""
    out, flags = shutil.copytree(usual, tmp_path / "out"), ["--resume_from_checkpoint=latest"]
    cache = f"--cache_latents={tmp_path / 'latents'}"

    def written():
        return {(path.name, path.stat().st_ino) for path in (tmp_path / "latents").rglob("*")}

    train_here(out, mels, *flags, cache)
    first = written()
    (tmp_path / ".latents.old").mkdir()
    train_here(out, mels, *flags, cache)
    assert written() == first and f"the latents are in {tmp_path / 'latents'} already\n" in capsys.readouterr().out
    assert not (tmp_path / ".latents.old").exists()
    for folder, given in ((usual, [*flags, cache]), (tmp_path / "new", [cache])):
        with pytest.raises(UserError, match=r"latents is in use: delete it or choose another one.$"):
            train_here(folder, mels, *given)
    assert written() == first
    train_here(out, mels, *flags, cache, "--max_train_steps=8")  # the latents are those of what it has become
    assert not {file for file in written() & first if file[0].endswith(".arrow")}
    vae, posterior, _ = encode_all(out, mels)
    rows = datasets.load_from_disk(str(tmp_path / "latents"))["train"].with_format("torch")
    scaled = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(rows["latents"][:].float(), scaled, rtol=1e-3, atol=1e-3)


def test_one_row_is_enough(mels, tmp_path):
    rows = datasets.load_from_disk(str(mels))["train"].select([0])
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    train_here(tmp_path / "out", tmp_path / "one", f"--cache_latents={tmp_path / 'latents'}")
    encode_all(tmp_path / "out", tmp_path / "one")
    assert len(datasets.load_from_disk(str(tmp_path / "latents"))["train"]) == 1
    with pytest.raises(UserError, match=r"has no split 'validation'.*--validation_steps 0"):
        train_here(tmp_path / "more", tmp_path / "one", "--validation_steps=2")


def test_a_stream_is_enough(mels, tmp_path, capsys):
    flags = ("--streaming", "--shuffle_buffer=8", "--max_train_steps=2")
    train_here(tmp_path, mels, *flags)
    assert json.loads((tmp_path / "training.json").read_text())["latents"]["rows"] == 38
    assert "takes no part: it would after 2 steps" in capsys.readouterr().out


def test_half_precision(usual, mels, tmp_path):
    """Mixed with full precision where it matters: the same training, but for rounding."""
    flags = ("--mixed_precision=bf16", "--max_train_steps=3", "--validation_steps=3")
    train_here(tmp_path / "out", mels, *flags, f"--cache_latents={tmp_path / 'latents'}")
    exact, rounded = (logged(folder)[2] for folder in (usual, tmp_path / "out"))
    for name in ("l1", "spectral", "kl", "discriminator_loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.05)
        assert rounded[name] != exact[name]


def test_push(hub, mels, tmp_path, monkeypatch):
    """The autoencoder is uploaded without the checkpoints, plays what it makes of sounds, and loads from there."""
    flags = ("--push_to_hub", "--hub_model_id=someone/vae", "--hub_private_repo", "--max_train_steps=2")
    folder = train_here(tmp_path / "out", mels, *flags, "--validation_steps=2", "--num_validation_samples=2")
    files = hub.files["models", "someone/vae"]
    tops = {name.split("/")[0] for name in files} - {".gitattributes"}
    assert tops == {"vae", "mel", "samples", "README.md", "metrics.jsonl"}
    assert ("models", "someone/vae") in hub.private
    card = check_players(hub, "models", "someone/vae", at_least=4)
    players = re.findall(r"^\| (\w+) \| <audio.*-(\d)\.wav", card, re.MULTILINE)
    assert players == [("original", "0"), ("reconstruction", "1"), ("original", "2"), ("reconstruction", "3")]
    assert "| held out: error |" in card and "python train_vae.py" in card and str(tmp_path) not in card
    loaded = AutoencoderKL.from_pretrained("someone/vae", subfolder="vae")
    local = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    assert math.isclose(loaded.config.scaling_factor, local.config.scaling_factor)
    MelSpectrogram.from_pretrained("someone/vae", subfolder="mel")

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--push_to_hub cannot write to"):  # known before anything is trained
        train_here(tmp_path / "new", mels, "--max_train_steps=1", *flags[:2])
    assert not list((tmp_path / "new").glob("checkpoint-*"))


def test_a_push_that_breaks_off_can_be_repeated(hub, mels, tmp_path):
    """By the command that the message gives; but not over a card that a person has written on the Hub."""
    hub.fault = lambda request: 503 if "/large/" in request else None
    flags = ("--push_to_hub", "--hub_model_id=someone/vae", "--max_train_steps=1")
    with pytest.raises(UserError, match=r"^The model is whole in .*out, but was not pushed: .*Try again") as error:
        train_here(tmp_path / "out", mels, *flags)
    assert "\n" not in str(error.value)
    hub.fault = lambda request: None
    words = shlex.split(str(error.value).rpartition("Try again with ")[2])
    done = subprocess.run(
        [Path(sys.executable).with_name("hf"), *words[1:]],
        env=os.environ | hub.environment(tmp_path / "cache"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files["models", "someone/vae"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert files[weights] == (tmp_path / "out" / weights).read_bytes() and "README.md" in files
    assert not [name for name in files if "checkpoint" in name or name == "training.json"]

    files["README.md"] = b"My words."
    publish_folder(tmp_path / "out", "someone/vae")
    assert files["README.md"] == b"My words."
