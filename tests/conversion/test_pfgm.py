"""PFGM checkpoints become pipelines that compute and sample what the published networks do."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from published_networks import Weights, ddpmpp, ncsnpp, transformer_unet
from safetensors.torch import load_file
from scipy import stats

import tonefield
from tonefield import PoissonFlowScheduler
from tonefield.command_line import UserError
from tonefield.conversion import convert_pfgm, pfgm


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")


@pytest.fixture
def narrow(monkeypatch):
    """The published configurations, with fewer channels at each level."""
    for settings in pfgm.PRESETS.values():
        monkeypatch.setitem(settings, "width", 32 if settings["kind"] == "transformer" else 8)
    return pfgm.PRESETS


def describe(settings):
    """The tensors of a network of the settings, by its description, and what it makes of some points."""
    size = max(8, 2 ** (len(settings["multipliers"]) - 1))
    weights, generator = Weights(), torch.Generator().manual_seed(1)
    x = torch.randn(2, settings["channels"], size, size, generator=generator, dtype=torch.float64)
    z = torch.tensor([0.3, 25.0], dtype=torch.float64)
    layout = [settings[name] for name in ("width", "multipliers", "blocks", "attention")]
    if settings["kind"] == "transformer":
        fields = transformer_unet(weights, x, z, *layout)
    elif settings["kind"] == "ncsnpp":
        fields = ncsnpp(weights, x, z, *layout)
    else:
        fields = ddpmpp(weights, x, z, *layout, settings["biggan"], settings["centered"])
    return weights, x, z, fields


def save(file, weights, **changes):
    """A checkpoint as training leaves it: weights in training, the average as a list, and the optimizer's moments."""
    average = [tensor.float() for name, tensor in weights.items() if name != "all_modules.0.W"]
    model = {f"module.{name}": tensor.float() + (name != "all_modules.0.W") * 0.5 for name, tensor in weights.items()}
    content = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": []},
        "model": {"module.sigmas": torch.ones(5)} | model,
        "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": average},
        "step": 5,
    } | changes
    torch.save(content, file)
    return file


def close(unet, x, z, fields):
    with torch.no_grad():
        output = unet(x, z.log() / 4).sample
    for ours, theirs in zip((output[:, :-1], output[:, -1].mean((1, 2))), fields, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", pfgm.PRESETS)
def test_published_configurations_are_recognised(name, narrow, tmp_path, capsys):
    settings = narrow[name]
    weights, x, z, fields = describe(settings)
    file = save(tmp_path / "checkpoint_1.pth", weights)
    pipe = convert_pfgm(file)
    assert pipe.config.card["network"] == name
    close(pipe.unet.double(), x, z, fields)
    assert pipe.unet.config.sample_size == settings["size"]
    c = pipe.scheduler.config
    assert (c.aug_dim, c.prediction_type, c.gamma) == (1, "field", 5)
    assert (c.sigma_max, c.sigma_min, c.z_exp) == (settings["z_max"], 1e-3, settings["z_exp"])
    assert (pipe.mel is not None) == (settings["channels"] == 1)
    if pipe.mel is not None:
        assert pipe.mel.config.n_mels == pipe.mel.config.num_frames == settings["size"]


def test_noise_stays_below_the_published_norm(narrow, tmp_path):
    weights, *_ = describe(narrow["cifar10_ddpmpp"])
    pipe = convert_pfgm(save(tmp_path / "a.pth", weights))
    noise = 40 * pipe.scheduler.sample_noise((400, 3, 32, 32), torch.Generator().manual_seed(0))
    norms = noise.flatten(1).norm(dim=1)
    assert norms.max() < 3000
    # (|x| / z)^2 / N has Fisher's law with N and 1 degrees of freedom.
    law = stats.f(3072, 1)
    below = law.cdf((3000 / 40) ** 2 / 3072)
    assert pipe.scheduler.config.prior_radius_quantile == pytest.approx(below, rel=1e-6)
    assert stats.kstest(law.cdf((norms.numpy() / 40) ** 2 / 3072) / below, "uniform").pvalue > 0.01


def test_weights_in_training(narrow, tmp_path):
    weights, x, z, fields = describe(narrow["cifar10_ncsnpp"])
    file = save(tmp_path / "a.pth", weights)
    average, live = convert_pfgm(file), convert_pfgm(file, weights="model")
    torch.testing.assert_close(live.unet.conv_in.weight, average.unet.conv_in.weight + 0.5)
    assert torch.equal(live.unet.frequencies, average.unet.frequencies)
    with pytest.raises(AssertionError):
        close(live.unet.double(), x, z, fields)


def test_sounds(narrow, tmp_path, capsys):
    """From a checkpoint through the command to sound: a mel in [0, 1], 80 dB of amplitude below the loudest bin."""
    weights, *_ = describe(narrow["sd_64"])
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "checkpoint_5.pth", weights)
    assert imported(tmp_path / "in", tmp_path / "out") == 0
    assert "the tensors are those of sd_64" in capsys.readouterr().out
    pipe = tonefield.load(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    sound = pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert sound.audios.shape == (1, 64 * 256 - 1) and sound.sampling_rate == 16000
    assert np.isfinite(sound.audios).all()
    time = torch.arange(pipe.mel.slice_samples) / 16000
    tones = torch.stack([torch.sin(2 * np.pi * f * time) * torch.exp(-3 * time) for f in (440, 2000)])
    mel = pipe.mel.encode(tones)
    assert mel.max().item() == pytest.approx(1) and mel.min() >= 0
    quiet = pipe.mel.encode(tones * torch.linspace(1, 1e-2, tones.shape[1]))
    # A frame that is 20 dB quieter lies 20 / 80 lower, for amplitudes are given as powers usually are.
    torch.testing.assert_close(
        (mel - quiet)[:, 0, :, 48].max(dim=1).values, torch.full((2,), -10 * np.log10(1 - 0.99 * 48 / 64) / 80),
        rtol=0.05, atol=0.005,
    )  # fmt: skip
    # On the scale of HTK the bands' centres are evenly spaced in 2595 log10(1 + f / 700).
    band = 65 * (np.log10(1 + np.array([440, 2000]) / 700) * 2595 - 31.75) / (2840.02 - 31.75) - 1
    np.testing.assert_allclose(mel[:, 0].mean(2).argmax(dim=1), band, atol=0.6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "checkpoint_5.pth" not in card and "| imported from | in |" in card and "| network | sd_64 |" in card
    assert "license" not in card.split("---")[1]


def imported(*arguments):
    with pytest.raises(SystemExit) as exit:
        pfgm.main([str(argument) for argument in arguments])
    return exit.value.code


def test_pictures(narrow, tmp_path, capsys):
    weights, *_ = describe(narrow["cifar10_ddpmpp"])
    file = save(tmp_path / "checkpoint.pth", weights)
    assert imported(file, tmp_path / "out", "--config_name=cifar10_ddpmpp") == 0
    assert "the tensors are those" not in capsys.readouterr().out
    pipe = tonefield.load(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(batch_size=2, num_inference_steps=1, output_type="pil").images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2 and pictures[0].mode == "RGB"
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert imported(file, tmp_path / "model", "--weights=model", "--license=mit") == 0
    assert "license: mit" in (tmp_path / "model" / "README.md").read_text()
    first, second = (tonefield.load(tmp_path / name).unet.conv_in.weight for name in ("out", "model"))
    torch.testing.assert_close(second, first + 0.5)


def test_what_is_refused(narrow, tmp_path):
    def refused(message, source, *arguments):
        with pytest.raises(UserError, match=message) as error:
            convert_pfgm(source, *arguments)
        assert len(str(error.value).splitlines()) == 1

    weights, *_ = describe(narrow["cifar10_ddpmpp"])
    file = save(tmp_path / "a.pth", weights)
    data = file.read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    refused("half.pth is damaged or no checkpoint", tmp_path / "half.pth")
    (tmp_path / "text.pth").write_bytes(b"hello")
    refused("text.pth is", tmp_path / "text.pth")
    refused("There is no file", tmp_path / "absent.pth")
    torch.save({"state_dict": dict(weights)}, tmp_path / "other.pth")
    refused("no checkpoint of PFGM: there is no 'model'", tmp_path / "other.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    refused("no checkpoint of PFGM: there is no 'model'", tmp_path / "numbers.pth")
    refused("no averaged weights .* --weights model", save(tmp_path / "b.pth", weights, ema=None))
    fewer = {"shadow_params": [tensor.float() for tensor in weights.values()][:-1]}
    count = len(weights)
    refused(f"the {count - 1} averaged weights are not those of the {count} parameters",
            save(tmp_path / "c.pth", weights, ema=fewer))  # fmt: skip
    refused("does not hold the network of celeba64_ddpmpp|does not hold a PFGMUNet2DModel of this", file,
            "celeba64_ddpmpp")  # fmt: skip
    refused("does not hold the network of sd_64: The weights are of", file, "sd_64")
    refused("does not hold the network of cifar10_ncsnpp: The weights are of", file, "cifar10_ncsnpp")
    refused("--config_name cifar is neither a file nor one of cifar10_ddpmpp, ", file, "cifar")
    (tmp_path / "a.json").write_text("{")
    refused("a.json is not JSON", file, str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"model": {}}')
    refused("a.json is no configuration of PFGM: KeyError 'data'", file, str(tmp_path / "a.json"))
    short = {name: tensor for name, tensor in weights.items() if name != "all_modules.2.bias"}
    refused("holds none of the published networks .* pass the configuration", save(tmp_path / "d.pth", short))
    refused("1 tensors are missing, the first is conv_in.bias", tmp_path / "d.pth", "cifar10_ddpmpp")
    more = dict(weights, **{"all_modules.2.extra": torch.ones(1)})
    refused(
        "1 are unknown, the first is conv_in.extra",
        save(tmp_path / "e.pth", more),
        "cifar10_ddpmpp",
    )


def configuration(**model):
    usual = dict(
        name="ncsnpp", embedding_type="positional", fir=False, progressive_input="none", nf=8, ch_mult=[1, 2],
        num_res_blocks=1, attn_resolutions=[16], resblock_type="biggan",
    )  # fmt: skip
    return {
        "training": {"gamma": 3}, "data": {"image_size": 32, "num_channels": 1, "centered": True},
        "sampling": {"z_min": 0.01, "z_max": 20, "upper_norm": 700, "z_exp": 2}, "model": usual | model,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["ddpmpp", "ncsnpp"])
def test_a_configuration_of_ones_own(form, tmp_path):
    model = {} if form == "ddpmpp" else dict(embedding_type="fourier", fir=True, progressive_input="residual")
    (tmp_path / "a.json").write_text(json.dumps(configuration(**model)))
    settings = dict(kind=form, channels=1, width=8, multipliers=(1, 2), blocks=1, attention=(1,), biggan=True,
                    centered=True)  # fmt: skip
    weights, x, z, fields = describe(settings)
    pipe = convert_pfgm(save(tmp_path / "a.pth", weights), str(tmp_path / "a.json"))
    close(pipe.unet.double(), x, z, fields)
    c = pipe.scheduler.config
    assert (c.gamma, c.sigma_min, c.sigma_max, c.z_exp) == (3, 0.01, 20, 2)
    assert pipe.mel is None  # of 32 bands none is known
    (tmp_path / "b.json").write_text(json.dumps(configuration(progressive_input="input_skip")))
    with pytest.raises(UserError, match=r"embedding_type, fir and progressive_input .* can be imported"):
        convert_pfgm(tmp_path / "a.pth", str(tmp_path / "b.json"))


# Published networks of reduced width, and what they computed.

NAMES = ["pfgm_ddpmpp", "mpfgm_128_deep", "mpfgm_128_tiny", "mpfgm_sd_128"]


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_published_networks(name):
    folder = Path(GOLDEN) / name
    io = load_file(folder / "io.safetensors")
    for weights, suffix in (("ema", ""), ("model", "_raw_weights")):
        pipe = convert_pfgm(folder / "checkpoint.pth", str(folder / "config.json"), weights)
        close(pipe.unet, io["x"], io["z"], (io[f"field_x{suffix}"], io[f"field_z{suffix}"]))


@needs_golden
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", NAMES)
def test_published_samplers(name, solver):
    """The states of the pipeline's run, which goes on to denoise what the published samplers return."""
    folder = Path(GOLDEN) / name
    io = load_file(folder / "io.safetensors")
    pipe = convert_pfgm(folder / "checkpoint.pth", str(folder / "config.json"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PoissonFlowScheduler.from_config(pipe.scheduler.config, solver_type=solver)
    states = []

    def remember(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return tensors

    pipe(num_inference_steps=11, latents=io["sampler_init"], output_type="pt", callback_on_step_end=remember)
    # PFGM's improved Euler method also leaves out the correction of the last step.
    expected = io["sampler_forward_euler" if solver == "euler" else "sampler_improved_euler"]
    torch.testing.assert_close(states[-1 - pipe.scheduler.order], expected, rtol=0, atol=1e-3)
