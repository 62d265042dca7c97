"""train_unet.py --from_pretrained, with --lora_rank and without: what is trained, what is written, what is refused."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from captured_logs import said_by
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from fake_hub import check_players
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_train_unet_latent import CAPTIONS, make_text_encoder, make_vae, write_captions
from training_runs import RECIPE, make_dataset, make_sounds, train

import tonefield
from tonefield import train_unet
from tonefield.command_line import UserError
from tonefield.pipelines.tonefield_lora import logger
from tonefield.training.lora import WEIGHTS, add_lora
from tonefield.training.publishing import settings_of


RUN = ("--gradient_accumulation_steps=1", "--num_validation_samples=0", "--learning_rate=0.01", "--lr_warmup_steps=0")
LORA = (*RUN, "--lora_rank=2", "--max_train_steps=2")
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of the tests without what a pipeline knows."""
    values = yaml.safe_load(RECIPE.read_text())
    values = {name: value for name, value in values.items() if name not in train_unet.KNOWN_TO_A_PIPELINE}
    path = tmp_path_factory.mktemp("recipe") / "lora.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def mels(folder):
    sounds = make_sounds(folder / "sounds")
    write_captions(sounds, lambda file: CAPTIONS[file.parent.name == "high"])
    return make_dataset(sounds, folder / "data")


@pytest.fixture(scope="module")
def base(mels, folder):
    """A pipeline from text, with an autoencoder."""
    words, vae = make_text_encoder(folder / "t5"), make_vae(mels, folder / "vae", "--latent_dims=8,8")
    flags = (f"--vae={vae}", f"--text_encoder={words}", "--objective=epsilon", "--max_train_steps=2", *RUN)
    return train(folder / "base", mels, *flags)


@pytest.fixture(scope="module")
def adapter(base, mels, recipe, folder):
    flags = ("--validation_steps=2", "--num_validation_samples=2", "--checkpointing_steps=2")
    return train(folder / "adapter", mels, f"--from_pretrained={base}", *LORA, *flags, config=recipe)


def opened(folder):
    pipe = tonefield.load(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def heard(pipe, prompt=CAPTIONS[0]):
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent").latents)


# ----- what is trained


def test_an_adapter_has_the_parameters_that_theory_gives(adapter):
    """Rank r adds r (inputs + outputs) to each projection of attention, and nothing elsewhere."""
    weights = load_file(adapter / WEIGHTS)
    unet = opened(adapter.parent / "base").unet
    expected = 0
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            expected += 2 * (layer.in_features + layer.out_features)
    assert sum(value.numel() for value in weights.values()) == expected > 0
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(name.startswith("unet.") for name in weights)
    assert "8 of them trained" not in (adapter / "training.json").read_text()


def test_only_the_adapter_is_trained(base, mels, recipe, tmp_path, capsys):
    folder = train(tmp_path, mels, f"--from_pretrained={base}", *LORA, "--no-use_ema", config=recipe)
    pipe, untouched = opened(base), opened(base)
    pipe.load_lora_weights(folder)
    state = {name.replace(".base_layer", ""): value for name, value in pipe.unet.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in untouched.unet.state_dict().items())
    checkpoint = folder / "checkpoint-2"
    assert {path.name for path in (checkpoint / "unet").iterdir()} == {WEIGHTS}  # the network itself lies elsewhere
    trained = sum(value.numel() for value in load_file(folder / WEIGHTS).values())
    assert f"({trained:,} of them trained)" in capsys.readouterr().out
    groups = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert sum(moments["exp_avg"].numel() for moments in groups.values()) == trained
    last = load_file(checkpoint / "unet" / WEIGHTS)
    assert all(torch.equal(value, last[name]) for name, value in load_file(folder / WEIGHTS).items())


def test_an_untrained_adapter_changes_nothing(base):
    args = train_unet.parse_args(["--dataset_name=x", f"--from_pretrained={base}", "--lora_rank=3"])
    pipe = opened(base)
    before = heard(pipe)
    add_lora(args, pipe.unet)
    assert torch.equal(heard(pipe), before)
    pipe.unet.get_submodule(PATH).lora_B.default.weight.data.fill_(0.1)
    assert (heard(pipe) - before).abs().max() > 1e-3


def test_the_average_is_the_average_of_the_adapter(base, mels, recipe, tmp_path):
    """The average of one step: d a0 + (1 - d) a1, with a0 the untrained adapter."""
    flags = (*LORA, "--max_train_steps=1", "--ema_max_decay=0.5")
    folder = train(tmp_path, mels, f"--from_pretrained={base}", *flags, config=recipe)
    live, average = (load_file(folder / "checkpoint-1" / name / WEIGHTS) for name in ("unet", "unet_ema"))
    moved = [name for name in live if "lora_B" in name]
    assert moved and all(live[name].abs().max() > 0 for name in moved)
    # EMAModel's first decay is 0: the average is the network itself
    assert all(torch.equal(live[name], average[name]) for name in live)
    flags = (*LORA, "--max_train_steps=3", "--ema_max_decay=0.5", "--ema_inv_gamma=0.001", "--checkpointing_steps=1")
    folder = train(tmp_path / "more", mels, f"--from_pretrained={base}", *flags, config=recipe)
    (before, _), (live, average) = (
        [load_file(folder / f"checkpoint-{step}" / name / WEIGHTS) for name in ("unet", "unet_ema")] for step in (2, 3)
    )
    previous = load_file(folder / "checkpoint-2" / "unet_ema" / WEIGHTS)
    for name in live:
        torch.testing.assert_close(average[name], 0.5 * (previous[name] + live[name]))
    assert any((average[name] - live[name]).abs().max() > 1e-4 for name in live) and before.keys() == live.keys()


@pytest.mark.parametrize("rank", [2, None])
def test_resumed_equals_uninterrupted(base, mels, recipe, tmp_path, rank):
    flags = (f"--from_pretrained={base}", *RUN, "--max_train_steps=4", "--checkpointing_steps=2")
    flags += () if rank is None else (f"--lora_rank={rank}",)
    whole = train(tmp_path / "whole", mels, *flags, config=recipe)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    again = ("--resume_from_checkpoint=latest", "--gradient_checkpointing")
    parts = train(tmp_path / "parts", mels, *flags, *again, config=recipe)
    weights = WEIGHTS if rank else "diffusion_pytorch_model.safetensors"
    for name in (f"unet/{weights}", f"unet_ema/{weights}"):
        first, second = (load_file(folder / "checkpoint-4" / name) for folder in (whole, parts))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        earlier = load_file(whole / "checkpoint-2" / name)
        assert any(not torch.equal(first[key], earlier[key]) for key in first)
    first, second = (torch.load(folder / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
                     for folder in (whole, parts))  # fmt: skip
    assert all(torch.equal(first[i][key], second[i][key]) for i in first for key in first[i])
    if rank is None:
        return
    with pytest.raises(UserError, match="LoRA rank 2, this run has 3"):
        train(tmp_path / "parts", mels, *flags, "--lora_rank=3", *again, config=recipe)
    other = shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="network beneath the LoRA"):
        train(tmp_path / "parts", mels, *flags, f"--from_pretrained={other}", *again, config=recipe)


# ----- what is written


def test_a_loaded_adapter_is_the_trained_network(base, mels, adapter, recipe):
    """By hand: W + B A in the weights of a plain network."""
    pipe, plain = opened(base), opened(base)
    with said_by(logger) as said:
        pipe.load_lora_weights(str(adapter))
    assert said.getvalue() == ""
    average = load_file(adapter / "checkpoint-2" / "unet_ema" / WEIGHTS)
    weights = load_file(adapter / WEIGHTS)
    assert all(torch.equal(value, average[name]) for name, value in weights.items())
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name=pipe.get_active_adapters()[0])
    assert all(torch.equal(value, weights[f"unet.{name}"]) for name, value in loaded.items())
    for network in (pipe.unet, plain.unet):
        network.double()  # the order of sums is of no consequence then
    without = heard(plain)
    for name in weights:
        if "lora_A" in name:
            layer = plain.unet.get_submodule(name.removeprefix("unet.").removesuffix(".lora_A.weight"))
            layer.weight.data += weights[name.replace("lora_A", "lora_B")].double() @ weights[name].double()
    expected = heard(plain)
    torch.testing.assert_close(heard(pipe), expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-3
    # What the training shows of itself is what it makes.
    names = sorted(path.name for path in (adapter / "samples").iterdir())
    assert names == ["step-0000002-0.wav", "step-0000002-1.wav", "step-0000002.png"]


def test_adapters_are_scaled_fused_taken_off_and_saved(base, adapter, tmp_path):
    pipe = opened(base)
    pipe.unet.double()
    without = heard(pipe)
    pipe.unet.float()
    pipe.load_lora_weights(adapter, adapter_name="mine")
    pipe.unet.double()
    with_it = heard(pipe)
    assert pipe.get_list_adapters() == {"unet": ["mine"]}
    pipe.set_adapters("mine", 0.0)
    torch.testing.assert_close(heard(pipe), without, rtol=1e-5, atol=1e-5)
    pipe.set_adapters("mine", 0.5)
    half = heard(pipe)
    assert min((half - other).abs().max() for other in (without, with_it)) > 1e-4
    pipe.set_adapters("mine", 1.0)
    assert torch.equal(heard(pipe), with_it)
    pipe.disable_lora()
    assert torch.equal(heard(pipe), without)
    pipe.enable_lora()
    pipe.fuse_lora()
    torch.testing.assert_close(heard(pipe), with_it, rtol=1e-5, atol=1e-5)
    pipe.unfuse_lora()
    torch.testing.assert_close(heard(pipe), with_it, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="A LoRA is loaded, which is not saved"):
        pipe.save_pretrained(tmp_path / "with")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(heard(opened(tmp_path / "fused")), with_it, rtol=1e-4, atol=1e-4)
    pipe = opened(base)
    pipe.load_lora_weights(adapter)
    pipe.unload_lora_weights()
    pipe.unet.double()
    assert torch.equal(heard(pipe), without)
    pipe.save_pretrained(tmp_path / "without")


def test_an_adapter_says_what_it_is(base, adapter):
    card = (adapter / "README.md").read_text()
    for words in ("`base`", "lora", "| rank | 2 |", "load_lora_weights", "| optimizer steps | 2 |"):
        assert words in card
    record = json.loads((adapter / "training.json").read_text())
    assert record["LoRA rank"] == 2 and record["objective"] == "epsilon"
    assert not (adapter / "model_index.json").exists()


def test_an_adapter_is_pushed_and_fetched(hub, base, mels, recipe, tmp_path):
    flags = ("--validation_steps=1", "--num_validation_samples=2", "--push_to_hub", "--hub_model_id=someone/lora")
    folder = train(tmp_path / "out", mels, f"--from_pretrained={base}", *LORA, *flags, config=recipe)
    card = check_players(hub, "models", "someone/lora", at_least=2)
    assert set(re.findall(r"^\| (.*) \| <audio", card, re.MULTILINE)) <= set(CAPTIONS)
    assert 'load_lora_weights("someone/lora"' in card and str(tmp_path) not in card
    here, there = opened(base), opened(base)
    here.load_lora_weights(folder)
    there.load_lora_weights("someone/lora")
    assert torch.equal(heard(here), heard(there)) and not torch.equal(heard(here), heard(opened(base)))


def test_an_adapter_for_another_network_is_one_line(base, adapter, tmp_path):
    def refused(message, unet, weights=adapter):
        pipe = opened(base)
        pipe.unet = unet(pipe.unet)
        with pytest.raises(ValueError, match=message) as found:
            pipe.load_lora_weights(weights)
        assert "\n" not in str(found.value)
        assert not getattr(pipe.unet, "peft_config", None)

    def remade(**changes):
        return lambda unet: UNet2DConditionModel.from_config({**unet.config, **changes})

    refused(r"to_k takes 16 numbers, here 24", remade(cross_attention_dim=24))
    refused("to_k takes 16 numbers, here 32", remade(block_out_channels=[8, 32]))
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    refused("this one has no down_blocks.1", remade(**plain))
    refused("UNet2DModel takes no LoRA", lambda _: UNet2DModel(8, 4, 4, block_out_channels=[8] * 4, norm_num_groups=4))
    refused("are no LoRA of a U-Net", lambda unet: unet, {"vae.x.lora_A.weight": torch.zeros(1, 1)})
    for place in (tmp_path / "nowhere", tmp_path, base):
        with pytest.raises(OSError, match="is no LoRA that can be read, here or on the Hub") as found:
            opened(base).load_lora_weights(place)
        assert "\n" not in str(found.value)
    # Weights of the same layout that were trained anew.
    pipe = opened(base)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    with said_by(logger) as said:
        pipe.load_lora_weights(adapter)
    assert said.getvalue().count("\n") == 1 and "was trained on the network" in said.getvalue()


# ----- fine-tuning without an adapter


def test_fine_tuning_goes_on_from_a_pipeline(base, mels, recipe, tmp_path):
    """No step moves nothing; what is written is the pipeline again, with what belongs to it."""
    flags = (f"--from_pretrained={base}", *RUN, "--max_train_steps=1")
    same = train(tmp_path / "same", mels, *flags, "--learning_rate=1e-30", config=recipe)
    other = train(tmp_path / "other", mels, *flags, config=recipe)
    before, still, after = (opened(folder) for folder in (base, same, other))
    for name, value in before.unet.state_dict().items():
        torch.testing.assert_close(still.unet.state_dict()[name], value, rtol=0, atol=1e-20)
    assert any(not torch.equal(after.unet.state_dict()[n], v) for n, v in before.unet.state_dict().items())
    for pipe in (still, after):
        for part in ("scheduler", "mel", "vae"):
            assert settings_of(getattr(pipe, part)) == settings_of(getattr(before, part))
        for part in ("vae", "text_encoder"):
            ours, theirs = (getattr(each, part).state_dict() for each in (pipe, before))
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    np.testing.assert_allclose(heard(still), heard(before), atol=1e-6)


def test_the_scale_of_mels_is_that_of_the_pipeline(mels, recipe, tmp_path):
    """The network has seen mels of the mean and the spread of its own data."""
    pipe = opened(train(tmp_path / "base", mels, "--max_train_steps=1", *RUN))
    settings = {name: value for name, value in pipe.mel.config.items() if name[0] != "_"}
    pipe.mel = type(pipe.mel)(**settings | {"mean": -0.4, "std": 0.9})
    pipe.save_pretrained(tmp_path / "moved")
    flags = (f"--from_pretrained={tmp_path / 'moved'}", *RUN, "--max_train_steps=1")
    tuned = opened(train(tmp_path / "tuned", mels, *flags, config=recipe))
    assert (tuned.mel.config.mean, tuned.mel.config.std) == (-0.4, 0.9)
    assert tuned.config.label2id == pipe.config.label2id == {"high": 0, "low": 1}
    args = train_unet.parse_args([f"--config={recipe}", f"--dataset_name={mels}", *flags])
    from tonefield.training.data import open_data
    from tonefield.training.pretrained import fit_data, open_pretrained

    pretrained, data = open_pretrained(args), open_data(args)
    raw = np.asarray(data.train.rows[data.train.row_of(0)]["mel"])
    fit_data(args, data, pretrained)
    np.testing.assert_allclose(data.train.get([0])["clean"][0], (raw + 0.4) / 0.9, rtol=1e-5, atol=1e-6)
    assert args.objective == "pfgmpp" and args.aug_dim == 128


# ----- what is refused


def test_bad_flags(capsys):
    for flags, message in {
        ("--lora_rank=4",): "name the pipeline that holds it with --from_pretrained",
        ("--from_pretrained=x", "--lora_rank=0"): "--lora_rank is at least 1, not 0",
        ("--from_pretrained=x", "--model_size=large"): "--model_size is what --from_pretrained knows",
        ("--from_pretrained=x", "--objective=epsilon"): "--objective is what --from_pretrained knows",
        ("--from_pretrained=x", "--text_encoder=y"): "--text_encoder is what --from_pretrained knows",
    }.items():
        with pytest.raises(SystemExit):
            train_unet.parse_args(["--dataset_name=x", *flags])
        assert message in capsys.readouterr().err


def test_bad_pipelines_and_data(base, mels, recipe, folder, tmp_path):
    def refused(message, pipeline, dataset, *flags):
        with pytest.raises(UserError, match=message) as found:
            train(tmp_path / "refused", dataset, f"--from_pretrained={pipeline}", *RUN, *flags, config=recipe)
        assert "\n" not in str(found.value)

    refused("nowhere cannot be loaded", tmp_path / "nowhere", mels)
    refused("has no column 'story'", base, mels, "--caption_column=story")
    finer = make_dataset(folder / "sounds", tmp_path / "finer", "--n_fft=1024")
    refused("trained on other mels than those of .*: n_fft 512, not 1024$", base, finer)
    longer = make_dataset(folder / "sounds", tmp_path / "longer", "--resolution=32,16")
    refused("makes sounds of 16 frames, those of .* have 32", base, longer)
    pictures = datasets.Dataset.from_dict({"image": []})
    assert not len(pictures)
    vae = make_vae(mels, tmp_path / "vae", "--latent_dims=8,8", "--seed=1")
    refused("The autoencoder in .*base is .*, the latents of .* were made by", base, tmp_path / "vae-latents")
    plain = train(tmp_path / "plain", mels, f"--vae={vae}", "--max_train_steps=1", *RUN)
    refused("the UNet2DModel of .* takes no adapter", plain, mels, "--lora_rank=2")
    classes = train(tmp_path / "classes", mels, "--max_train_steps=1", *RUN)
    refused("knows high, low, .* has no classes", classes, mels, "--class_column=caption")
    refused("works on mels without an autoencoder", classes, tmp_path / "vae-latents")
    pipe = opened(base)
    pipe.scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    pipe.save_pretrained(tmp_path / "sample")
    refused(r"cannot be trained with DDIMScheduler \(sample\)", tmp_path / "sample", mels)
