"""The script as a whole: what it reads from a dataset, what every flag does, and what it refuses."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from training_runs import RECIPE, ROOT, make_dataset, reset_accelerate, train

import tonefield
from tonefield import PFGMTransformerUNet2DModel, PFGMUNet2DModel, SongUNet2DModel, train_unet
from tonefield.command_line import UserError
from tonefield.data.loading import read_record
from tonefield.models import MelSpectrogram
from tonefield.schedulers import PoissonFlowScheduler, ScoreSDEScheduler, pfgm_hyperparameters
from tonefield.training.data import open_data, standardized_front_end
from tonefield.training.loop import make_accelerator, validation_losses


def parsed(dataset, *flags):
    return train_unet.parse_args([f"--config={RECIPE}", f"--dataset_name={dataset}", *flags])


def built(dataset, *flags):
    """The data, the network and the scheduler of some flags."""
    args = parsed(dataset, *flags)
    data = open_data(args)
    return data, train_unet.make_unet(args, data), train_unet.make_scheduler(args, data)


def refuse(capsys, message, *argv):
    """A flag that is refused when it is read: status 2 and one line."""
    with pytest.raises(SystemExit) as exit:
        train_unet.parse_args(list(argv))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_network_sees_standardised_mels(mels):
    data, unet, scheduler = built(mels)
    rows = datasets.load_from_disk(str(mels))["train"]
    record = read_record(rows.features)
    seen = data.train.read(rows.with_format("numpy")[:], list(range(len(rows))))["clean"].double()
    assert seen.mean().item() == pytest.approx(0, abs=1e-4)
    assert seen.std().item() == pytest.approx(0.5, rel=1e-3)
    assert scheduler.config.sigma_data == 0.5
    assert data.mel.fingerprint() == record["fingerprint"]
    stored = torch.tensor(rows.with_format("numpy")[0]["mel"]).float()
    torch.testing.assert_close(data.mel.unstandardize(seen[:1].float()), stored[None], rtol=0, atol=1e-5)
    assert data.class_names == ["high", "low"]
    assert unet.config.num_class_embeds == 3
    assert tuple(unet.config.sample_size) == data.sample_shape[1:] == (16, 16)


def test_hyperparameters_of_the_field_come_from_the_data(mels):
    _, unet, scheduler = built(mels, "--objective=field")
    _, z_max, _ = pfgm_hyperparameters(0.5 * 16, 256)
    c = scheduler.config
    assert (c.sigma_max, c.aug_dim, c.prediction_type) == (pytest.approx(z_max), 1, "field")
    assert (unet.config.in_channels, unet.config.out_channels) == (1, 2)
    draws = scheduler.sample_sigmas(100_000, torch.Generator().manual_seed(0)).log()
    uniform = torch.distributions.Uniform(math.log(c.sigma_min), math.log(c.sigma_max))
    assert draws.mean().item() == pytest.approx(uniform.mean.item(), abs=0.05)
    assert draws.std().item() == pytest.approx(uniform.stddev.item(), rel=0.02)


@pytest.mark.parametrize(
    ("charges", "processes", "more", "total"),
    [(12, 1, 8, 12), (12, 2, 2, 12), (4, 1, 0, 4), (None, 2, 0, 8), (13, 2, 3, 14)],
)
def test_the_field_has_as_many_charges_as_are_wanted(charges, processes, more, total):
    """The batches of all processes and what each reads besides; an odd one more where they do not divide."""
    args = SimpleNamespace(objective="field", train_batch_size=4, field_batch_size=charges)
    data = SimpleNamespace(train=SimpleNamespace())
    assert train_unet.prepare_charges(args, data, processes) == total
    assert data.train.extra == more


@pytest.mark.parametrize("charges", [[], ["--field_batch_size=20"]])
@pytest.mark.parametrize("objective", train_unet.WITH_CHARGES)
def test_validation_has_the_same_charges_whatever_the_batches(mels, tmp_path, objective, charges):
    flags = [f"--objective={objective}", "--validation_steps=1", *charges]
    args = train_unet.parse_args([f"--config={RECIPE}", f"--dataset_name={mels}", f"--output_dir={tmp_path}", *flags])
    reset_accelerate()
    data = open_data(args)
    unet, scheduler = train_unet.make_unet(args, data), train_unet.make_scheduler(args, data)
    found = []
    for args.train_batch_size in (1, 3, 8):
        train_unet.prepare_charges(args, data, 1) if charges else None
        accelerator = make_accelerator(args)
        compute_loss = train_unet.make_loss(args, scheduler, data, accelerator)
        found.append(validation_losses(args, accelerator, unet, data, compute_loss)["validation_loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("objective", train_unet.OBJECTIVES)
def test_every_objective_trains_and_is_saved(mels, tmp_path, monkeypatch, objective):
    flags = ("--max_train_steps=2", "--validation_steps=2", "--num_inference_steps=25", "--num_validation_samples=1")
    extra = ("--field_batch_size=12",) if objective in train_unet.WITH_CHARGES else ()
    train(tmp_path, mels, f"--objective={objective}", *flags, *extra)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert (tmp_path / "samples" / "step-0000002.png").stat().st_size > 1000
    unet = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    average = UNet2DModel.from_pretrained(tmp_path / "checkpoint-2", subfolder="unet_ema")
    for ours, theirs in zip(unet.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    mel = MelSpectrogram.from_pretrained(tmp_path, subfolder="mel")
    assert mel.config.std != 1
    if objective in train_unet.POISSON:
        assert PoissonFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.sigma_data == 0.5
    elif objective == "vp":  # whose default is not enough steps for the 18 of the pipeline
        monkeypatch.chdir(tmp_path.parent)
        snippet = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[1]
        exec(snippet, {})
        assert Path("sound.wav").stat().st_size > 1000
    if objective in ("ve", "vp", "subvp"):
        assert ScoreSDEScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.sde == objective


CHANGES = {
    "--learning_rate=0.002": "weights",
    "--lr_scheduler=constant": "weights",
    "--lr_warmup_steps=2": "weights",
    "--adam_beta1=0.5": "weights",
    "--adam_beta2=0.9": "weights",
    "--adam_weight_decay=0.5": "weights",
    "--adam_epsilon=0.1": "weights",
    "--max_grad_norm=0.01": "weights",
    "--dropout=0.5": "weights",
    "--label_dropout=0.9": "weights",
    "--train_batch_size=2": "weights",
    "--gradient_accumulation_steps=1": "weights",
    "--max_train_samples=6": "weights",
    "--mixed_precision=bf16": "weights",
    "--aug_dim=2": "weights",
    "--aug_dim=inf": "weights",
    "--p_mean=0.5": "weights",
    "--p_std=0.1": "weights",
    "--streaming": "weights",
    "--ema_max_decay=0.1": "average",
    "--ema_inv_gamma=9": "average",
    "--ema_power=0.1": "average",
    "--no-use_ema": "average",
    "--gradient_checkpointing": "nothing",
}


def pipeline_weights(folder):
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


@pytest.fixture(scope="module")
def usual(mels, tmp_path_factory):
    return train(tmp_path_factory.mktemp("usual"), mels, "--max_train_steps=3")


@pytest.mark.parametrize(("flag", "changed"), CHANGES.items())
def test_every_training_flag_changes_what_it_should(usual, mels, tmp_path, flag, changed):
    folder = train(tmp_path, mels, "--max_train_steps=3", flag)
    live = [pipeline_weights(path / "checkpoint-3") for path in (usual, folder)]
    published = [pipeline_weights(path) for path in (usual, folder)]
    torch.testing.assert_close(live[0], live[1], rtol=0.1, atol=0.1)  # and nothing breaks
    same = torch.allclose(*live, rtol=0, atol=1e-7)
    assert same == (changed != "weights")
    assert torch.allclose(*published, rtol=0, atol=1e-7) == (changed == "nothing")


def test_flags_of_network_and_scheduler(mels, tmp_path):
    _, tiny, scheduler = built(mels, "--sigma_min=0.01", "--sigma_max=20", "--no-class_conditional")
    assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (0.01, 20)
    assert tiny.config.num_class_embeds is None
    _, small, _ = built(mels, "--model_size=small", "--gradient_checkpointing")
    assert small.is_gradient_checkpointing and not tiny.is_gradient_checkpointing
    assert small.num_parameters() > 10 * tiny.num_parameters()
    (tmp_path / "net.yaml").write_text("block_out_channels: [4, 8]\nnorm_num_groups: 2\nlayers_per_block: 1\n"
                                       "norm_eps: 1e-6\n"
                                       "down_block_types: [DownBlock2D, DownBlock2D]\nattention_head_dim: 4\n"
                                       "up_block_types: [UpBlock2D, UpBlock2D]\n")  # fmt: skip
    _, own, _ = built(mels, f"--model_config={tmp_path / 'net.yaml'}")
    assert own.config.block_out_channels == [4, 8]
    assert own.config.num_class_embeds == 3
    assert own.config.norm_eps == 1e-6


def test_pictures(tmp_path):
    from PIL import Image

    rows = {"image": [Image.new("L", (8, 8), 10 * index) for index in range(20)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    flags = ("--image_column=image", "--max_train_steps=2", "--random_flip", "--dequantize", "--train_split=train")
    train(tmp_path / "out", tmp_path / "data", *flags, "--validation_steps=2", "--validation_split=train")
    assert UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").config.in_channels == 1
    assert (tmp_path / "out" / "samples" / "step-0000002.png").exists()
    saved = PoissonFlowScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler").config
    shades = (torch.arange(20) * 10 + 0.5) * 255 / 256 / 127.5
    assert saved.sigma_data == pytest.approx(shades.std(correction=0).item(), rel=0.02)


def test_test_switch(mels, tmp_path, capsys):
    reset_accelerate()
    train_unet.main(
        train_unet.parse_args([f"--dataset_name={mels}", f"--output_dir={tmp_path}", "--model_size=tiny", "--test"])
    )
    output = capsys.readouterr().out
    assert all(f"step {step}: loss" in output for step in (1, 2, 3, 4))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


RECIPES = {  # the samples that a recipe speaks of, its network, and for published ones the published size
    "128_deep": (128, PFGMUNet2DModel, 190_650_114),
    "128_tiny": (128, PFGMUNet2DModel, 91_771_010),
    "64_deep": (64, PFGMUNet2DModel, 259_592_450),
    "fsdd-64-cpu": (64, UNet2DModel, None),
    "fsdd-64-gpu": (64, UNet2DModel, None),
    "fsdd-song": (64, SongUNet2DModel, None),
    "mel-256-24gb": (256, UNet2DModel, None),
    "mel-256-8gpu": (256, UNet2DModel, None),
    "sd_128": (128, PFGMTransformerUNet2DModel, 42_843_778),
    "sd_64": (64, PFGMTransformerUNet2DModel, 42_843_778),
    "test-tiny": (16, UNet2DModel, None),
}


def test_every_recipe_is_known():
    of_other_scripts = ("vae", "codec", "tokens", "sedd", "text")  # and of text, which has tests of its own
    recipes = [path.stem for path in (ROOT / "recipes").glob("*.yaml")]
    assert sorted(RECIPES) == sorted(name for name in recipes if not any(word in name for word in of_other_scripts))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    size, network, parameters = RECIPES[name]
    args = train_unet.parse_args([f"--config={ROOT / 'recipes' / name}.yaml", "--dataset_name=x"])
    data = SimpleNamespace(sample_shape=(1, size, size), class_names=None, sigma_data=0.5)
    with torch.device("meta"):
        unet = train_unet.make_unet(args, data)
    scheduler = train_unet.make_scheduler(args, data)
    assert type(unet) is network
    if parameters is None:
        assert (scheduler.config.prediction_type, unet.config.out_channels) == ("edm", 1)
    else:
        assert unet.num_parameters() == parameters
        # What the number of parameters does not tell: attention is at 16 x 16 positions, if at any level.
        modules = list(unet.modules())
        levels = [level for level, kind in enumerate(unet.config.down_block_types) if "Attn" in kind]
        assert [size >> level for level in levels] == ([] if name == "128_tiny" else [16])
        heads = 256 if network is PFGMTransformerUNet2DModel else 1
        assert {module.heads for module in modules if isinstance(module, Attention)} == {heads}
        assert {module.num_groups for module in modules if isinstance(module, torch.nn.GroupNorm)} == {32}
        # The field of one augmented dimension, without classes, for half a million batches.
        assert (scheduler.config.prediction_type, scheduler.config.aug_dim) == ("field", 1)
        assert scheduler.config.z_exp == 1
        assert args.class_conditional is False
        assert args.max_train_steps * args.gradient_accumulation_steps == pytest.approx(500_000, rel=1e-3)
        assert args.field_batch_size is None or args.field_batch_size >= args.train_batch_size


def published(**arguments):
    """The layout of a published network at a width for tests, as a recipe holds it."""
    return dict(
        _class_name="PFGMUNet2DModel", block_out_channels=[8, 16], layers_per_block=1,
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        downsample_type="resnet", upsample_type="resnet",
    ) | arguments  # fmt: skip


TRANSFORMER = dict(
    _class_name="PFGMTransformerUNet2DModel", block_out_channels=[32, 32], layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip


SONG = dict(
    _class_name="SongUNet2DModel", form="ncsnpp", model_channels=8, block_out_channels=[8, 16], layers_per_block=1,
    attention_levels=[1], dropout=0.13,
)  # fmt: skip


@pytest.mark.parametrize("network", [published(), TRANSFORMER, SONG], ids=lambda network: network["_class_name"])
def test_a_recipe_holds_its_network(mels, tmp_path, network):
    """From the recipe to the loaded pipeline: another class than diffusers', with classes, resumed half way."""
    recipe = tmp_path / "recipe.yaml"
    objective = "pfgmpp" if network is SONG else "field"
    lines = yaml.safe_load(RECIPE.read_text()) | {"model_config": network, "objective": objective}
    lines["max_train_steps"] = 2
    recipe.write_text(yaml.safe_dump(lines))
    folder = train(tmp_path / "out", mels, "--validation_steps=2", config=recipe)
    train(tmp_path / "more", mels, f"--resume_from_checkpoint={folder / 'checkpoint-2'}", "--max_train_steps=3",
          config=recipe)  # fmt: skip
    pipe = tonefield.load(tmp_path / "more")
    assert type(pipe.unet).__name__ == network["_class_name"]
    assert pipe.unet.config.num_class_embeds == 3
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sounds = pipe(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=4, generator=generators)
    alone = pipe(class_labels=[1], guidance_scale=2.0, num_inference_steps=4, generator=generators[1].manual_seed(1))
    assert np.isfinite(sounds.audios).all() and sounds.audios.std() > 0
    np.testing.assert_allclose(sounds.mels[1], alone.mels[0], rtol=0, atol=1e-4 * np.abs(alone.mels).max())
    # What was saved is a recipe's network as well.
    saved = tmp_path / "more" / "unet" / "config.json"
    _, again, _ = built(mels, f"--model_config={saved}", f"--objective={objective}")
    assert type(again) is type(pipe.unet)
    again.load_state_dict(pipe.unet.state_dict())


def test_the_network_of_pfgmpp_learns(mels, tmp_path):
    network = SONG | dict(form="ddpmpp", model_channels=16, block_out_channels=[16, 16], dropout=0.0)
    train(tmp_path, mels, f"--model_config={json.dumps(network)}", "--max_train_steps=60", "--learning_rate=0.003",
          "--lr_scheduler=constant", "--train_batch_size=8", "--gradient_accumulation_steps=1",
          "--num_validation_samples=0")  # fmt: skip
    losses = [json.loads(line).get("loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(1, abs=0.35)  # the network returns 0, and its target has unit variance
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_dropout_is_the_flags_or_the_networks(mels):
    def dropout(network, *flags):
        _, unet, _ = built(mels, f"--model_config={json.dumps(network)}", *flags)
        return unet.config.dropout

    args = train_unet.parse_args(["--dataset_name=x", f"--model_config={json.dumps(published(dropout=0.2))}"])
    unet = train_unet.make_unet(args, SimpleNamespace(sample_shape=(1, 16, 16), class_names=None))
    assert unet.config.dropout == 0.2
    assert dropout(published(dropout=0.2), "--dropout=0.3") == 0.3


# What is refused.


def test_records_of_other_data():
    with pytest.raises(UserError, match=r"holds no mels: .* is tonefield-tokens\. Make mels with audio_to_images"):
        standardized_front_end({"format": "tonefield-tokens"})
    with pytest.raises(UserError, match="mels are all the same"):
        standardized_front_end({"format": "tonefield-mel", "statistics": {"mean": -1.0, "std": 0.0}})


def test_bad_flags(capsys):
    need = "--dataset_name=x"
    for value in ("0", "-1", "nan", "many"):
        refuse(capsys, f"{value} is neither a number above 0 nor inf", need, f"--aug_dim={value}")
    refuse(capsys, "--dataset_name is needed")
    for flag, message in {
        "--train_batch_size=0": "--train_batch_size is at least 1, not 0",
        "--gradient_accumulation_steps=0": "at least 1",
        "--learning_rate=0": "--learning_rate must be positive, not 0",
        "--max_hours=-1": "must be positive",
        "--ema_max_decay=1": "--ema_max_decay lies between 0 and 1",
        "--label_dropout=1": "lies between 0 and 1",
        "--field_batch_size=8": "no meaning with --objective pfgmpp",
        "--validation_steps=-1": "at least 0",
    }.items():
        refuse(capsys, message, need, flag)
    refuse(capsys, "no meaning with --objective epsilon", need, "--objective=epsilon", "--aug_dim=2")
    refuse(capsys, "needs a finite --aug_dim", need, "--objective=field", "--aug_dim=inf")
    refuse(capsys, "fp16 cannot hold the noise", need, "--objective=field", "--mixed_precision=fp16")
    refuse(capsys, "fp16 cannot hold the noise", need, "--aug_dim=1", "--mixed_precision=fp16")
    assert train_unet.parse_args([need, "--aug_dim=2", "--mixed_precision=fp16"]).aug_dim == 2
    refuse(capsys, "wants rows by number", need, "--objective=field", "--field_batch_size=8", "--streaming")


def test_bad_datasets(mels, tmp_path):
    def refused(message, dataset, *flags):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "out", dataset, *flags)
        assert not list((tmp_path / "out").glob("[!.]*"))

    rows = datasets.load_from_disk(str(mels))
    datasets.Dataset.from_dict({"mel": [[1.0]]}).save_to_disk(tmp_path / "alien")
    refused("no column 'front_end'", tmp_path / "alien")
    refused("nowhere cannot be loaded", tmp_path / "nowhere")
    datasets.DatasetDict({"train": rows["train"]}).save_to_disk(tmp_path / "train-only")
    refused("has no split 'validation'; it has train.*--validation_steps 0", tmp_path / "train-only",
            "--validation_steps=2")  # fmt: skip
    refused("has no split 'trian'; it has", mels, "--train_split=trian")
    datasets.DatasetDict({"train": rows["train"].select([])}).save_to_disk(tmp_path / "empty")
    refused("'train' of .*empty has no rows", tmp_path / "empty")
    refused("has no column 'genre' of classes", mels, "--class_conditional", "--class_column=genre")
    refused("has no column 'picture'; it has .*mel", mels, "--image_column=picture")
    refused("'mel' does not hold pictures", mels, "--image_column=mel")


def test_bad_networks(mels, tmp_path):
    def refused(message, config=None, *flags):
        (tmp_path / "net.json").write_text(json.dumps(config))
        own = [f"--model_config={tmp_path / 'net.json'}"] if config is not None else []
        with pytest.raises(UserError, match=message):
            built(mels, *own, *flags)

    refused("num_class_embeds 11, the dataset wants 3", {"num_class_embeds": 11})
    refused("in_channels 3, the dataset wants 1", {"in_channels": 3})
    refused("must consist of the arguments", [1])
    refused("net.json names the network UNet3000; there are UNet2DModel, UNet2D", {"_class_name": "UNet3000"})
    refused("PFGMUNet2DModel cannot be built: .*depth", published(depth=3))
    refused("PFGMUNet2DModel cannot be built: NoBlock does not exist", published(down_block_types=["NoBlock"] * 2))
    refused("PFGMTransformerUNet2DModel cannot be built: .*depth", TRANSFORMER | {"depth": 3})
    refused("PFGMUNet2DModel sees noise levels, which --objective vp does not have: use pfgmpp, stable_target, field",
            published(), "--objective=vp")  # fmt: skip
    refused("SongUNet2DModel sees noise levels, which --objective epsilon", SONG, "--objective=epsilon")
    refused("SongUNet2DModel cannot be built: .form. is 'adm'", SONG | {"form": "adm"})
    refused("^model_config names the network X", None, '--model_config={"_class_name": "X"}')
    refused("UNet2DModel cannot be built: .*depth", {"depth": 3, "block_out_channels": [8, 16]})
    refused("6 levels halve the input 5 times, which 16 x 16 does not allow.*multiples of 32",
            {"block_out_channels": [8] * 6})  # fmt: skip
    refused("cannot be read", None, f"--model_config={tmp_path / 'absent.yaml'}")
    refused("sigma_min is 5.0, sigma_max 2.0", None, "--sigma_min=5", "--sigma_max=2")


def test_bad_runs(mels, sounds, usual, tmp_path):
    def refused(message, output, dataset, *flags):
        with pytest.raises(UserError, match=message):
            train(output, dataset, *flags)

    resume = f"--resume_from_checkpoint={usual / 'checkpoint-3'}"
    refused("has checkpoints of an earlier run", usual, mels)
    (tmp_path / "folder").mkdir()
    refused("folder is not a checkpoint of a training run: it has no", tmp_path / "out", mels,
            f"--resume_from_checkpoint={tmp_path / 'folder'}")  # fmt: skip
    (tmp_path / "folder" / "state.json").write_text('{"files": {}}')
    refused("its state.json does not say so", tmp_path / "out", mels,
            f"--resume_from_checkpoint={tmp_path / 'folder'}")  # fmt: skip
    refused("network .* they must be equal", tmp_path / "out", mels, resume, "--model_size=small")
    refused(
        "objective pfgmpp, this run has vp",
        tmp_path / "out",
        mels,
        resume,
        "--objective=vp",
        "--num_inference_steps=30",
    )
    refused("samples per step 8, this run has 4", tmp_path / "out", mels, resume, "--train_batch_size=2")
    other = make_dataset(sounds, tmp_path / "other", "--top_db=60")
    refused("mel configuration .* this run has .* must be equal", tmp_path / "out", other, resume)
    shutil.copytree(sounds, tmp_path / "more")
    (tmp_path / "more" / "low").rename(tmp_path / "more" / "deep")
    renamed = make_dataset(tmp_path / "more", tmp_path / "renamed")
    refused("classes .'high', 'low'., this run has .'deep', 'high'.", tmp_path / "out", renamed, resume)
    (tmp_path / "file").touch()
    refused("output folder .* cannot be written to", tmp_path / "file", mels)
    refused("field of 1 charges: --field_batch_size must be at least 2", tmp_path / "out", mels,
            "--objective=field", "--train_batch_size=1")  # fmt: skip
    assert os.listdir(tmp_path / "out") == [".lock"]
    assert Path(usual, "checkpoint-3").is_dir()


@pytest.mark.parametrize("size, levels", [(64, [1]), (256, [])])
def test_attention_is_left_out_where_it_would_cost_too_much(size, levels):
    args = train_unet.parse_args(["--dataset_name", "x", "--output_dir", "y", "--model_size", "tiny"])
    unet = train_unet.make_unet(args, SimpleNamespace(sample_shape=(1, size, size), class_names=None))
    assert [level for level, block in enumerate(unet.config.down_block_types) if "Attn" in block] == levels
    assert (unet.mid_block.attentions[0] is not None) == bool(levels)
