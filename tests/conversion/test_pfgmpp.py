"""PFGM++ and EDM checkpoints become pipelines that compute what the published networks do."""

import functools
import json
import os
from pathlib import Path

import published_pickles
import pytest
import torch
from published_networks import Weights, song_unet
from safetensors.torch import load_file

import tonefield
from tonefield import PoissonFlowScheduler, SongUNet2DModel
from tonefield.command_line import UserError
from tonefield.conversion import convert_pfgmpp
from tonefield.conversion.pfgmpp import convert_song_unet, main, read_network


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")

EXACTLY = dict(rtol=0, atol=1e-8)  # but for the frequencies of the sinusoids, which are float32 as published

# nf, multipliers, blocks, levels with attention.
LAYOUTS = {
    "two levels": (8, (1, 2), 1, (1,)),
    "wider than the first convolution": (8, (2, 2), 2, (0, 1)),
    "three levels": (12, (1, 3, 2), 1, ()),
    "one level": (8, (1,), 1, (0,)),
    "many groups": (64, (1, 3), 1, (0,)),
}
FORMS = {
    "ddpmpp": dict(embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                   resample_filter=[1, 1]),
    "ncsnpp": dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual",
                   resample_filter=[1, 3, 3, 1]),
}  # fmt: skip


def point(channels, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([-1.6, 0.1, 1.1], dtype=torch.float64)


def empty(form, channels, nf, multipliers, blocks, attention, out, classes=None, augment_dim=0):
    return SongUNet2DModel(
        sample_size=16, in_channels=channels, out_channels=out, form=form, model_channels=nf,
        block_out_channels=[nf * multiplier for multiplier in multipliers], layers_per_block=blocks,
        attention_levels=attention, num_class_embeds=classes, augment_dim=augment_dim,
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_network_of_the_description(form, layout):
    weights, (x, noise) = Weights(), point(2)
    expected = song_unet(weights, x, noise, form, *layout, out=3)
    unet = empty(form, 2, *layout, out=3)
    unet.load_state_dict(convert_song_unet(unet, dict(sorted(weights.items()))))
    with torch.no_grad():
        ours = unet(x, noise).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, **EXACTLY)
    assert {name for name, parameter in unet.named_parameters() if not parameter.any()} == set()


@pytest.mark.parametrize("form", FORMS)
def test_classes_and_augmentations(form):
    weights, (x, noise) = Weights(), point(1)
    layout = LAYOUTS["two levels"]
    vectors = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    augmentation = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)
    expected = song_unet(weights, x, noise, form, *layout, 1, vectors, augmentation)
    unchanged = song_unet(weights, x, noise, form, *layout, 1, vectors)
    nothing = song_unet(weights, x, noise, form, *layout, 1, torch.zeros_like(vectors))
    unet = empty(form, 1, *layout, 1, 5, 5)
    unet.load_state_dict(convert_song_unet(unet, weights))
    with torch.no_grad():
        for labels in (vectors, torch.tensor([2, 0, 4])):
            torch.testing.assert_close(unet(x, noise, labels, augmentation).sample, expected, **EXACTLY)
        torch.testing.assert_close(unet(x, noise, torch.tensor([2, 0, 4])).sample, unchanged, **EXACTLY)
        for labels in (None, torch.tensor(4)):
            torch.testing.assert_close(unet(x, noise, labels).sample, nothing, **EXACTLY)
    assert not torch.allclose(expected[0], unchanged[0], atol=1e-3)
    assert not torch.allclose(nothing[0], unchanged[0], atol=1e-3)
    torch.testing.assert_close(nothing[2], unchanged[2])


# From files.

INSIDE = dict(
    img_resolution=16, in_channels=1, out_channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[8], dropout=0.13,
)  # fmt: skip


@functools.cache
def described(form, labels):
    weights, (x, noise) = Weights(), point(1)
    song_unet(weights, x, noise, form, 8, (1, 2), 1, (1,), 1, torch.eye(3).double()[:, :labels] if labels else None)
    return {key: tensor.float() for key, tensor in weights.items()}


def checkpoint(folder, name="training-state-000200.pt", form="ddpmpp", labels=3, outside=None, change=None, names=()):
    """A checkpoint of a small network, with the tensors of its average."""
    weights = dict(described(form, labels))
    other = {key: tensor if "filter" in key else tensor + 1 for key, tensor in weights.items()}
    if change is not None:
        change(weights)
    inside = INSIDE | FORMS[form] | {"label_dim": labels}
    outside = dict(img_resolution=16, sigma_data=0.4, pfgmpp=True, D=64) if outside is None else outside
    networks = [published_pickles.network(kind, inside, outside, *names) for kind in (weights, other)]
    return published_pickles.write(folder / name, *networks), weights


@pytest.mark.parametrize("name", ["training-state-000200.pt", "network-snapshot.pkl"])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_becomes_a_pipeline(tmp_path, name, form):
    file, weights = checkpoint(tmp_path, name, form)
    pipe = convert_pfgmpp(file)
    c = pipe.scheduler.config
    assert (c.aug_dim, c.sigma_data, c.prediction_type, c.solver_type) == (64, 0.4, "edm", "heun")
    assert (c.sigma_min, c.sigma_max, c.rho) == (0.002, 80, 7)
    assert (pipe.unet.config.form, pipe.unet.config.dropout, pipe.num_classes) == (form, 0.13, 3)
    converted = pipe.unet.state_dict()
    for key, tensor in convert_song_unet(pipe.unet, weights).items():
        assert torch.equal(converted[key], tensor), key
    # The preconditioned denoiser of EDM (table 1), with the description's network inside.
    (x, noise), labels = point(1), torch.tensor([1, 0, 2])
    sigma, s = torch.exp(4 * noise), 0.4
    at = [value[:, None, None, None] for value in (1 / (sigma**2 + s**2).sqrt(), sigma)]
    double = Weights()
    double.update({key: tensor.double() for key, tensor in weights.items()})
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    inner = song_unet(double, at[0] * x, sigma.log() / 4, form, 8, (1, 2), 1, (1,), 1, one_hot)
    expected = s**2 * at[0] ** 2 * x + at[1] * s * at[0] * inner
    x, timestep = x.float(), noise.float()
    with torch.no_grad():
        output = pipe.unet(pipe.scheduler.scale_model_input(x, timestep), timestep, labels).sample
    ours = pipe.scheduler.precondition_outputs(x, output, sigma.float())
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_weights_in_training(tmp_path):
    file, weights = checkpoint(tmp_path)
    raw = read_network(file, "net")[2]
    assert raw.keys() == weights.keys()
    torch.testing.assert_close(raw["map_layer0.weight"], weights["map_layer0.weight"] + 1)
    file, _ = checkpoint(tmp_path, "network.pkl")
    with pytest.raises(UserError, match="holds no 'net': only a training-state file"):
        convert_pfgmpp(file, "net")


def test_edm_is_the_limit(tmp_path):
    # EDM's own checkpoints know no D; those of its successor's baselines have one that is not used.
    for outside in (dict(img_resolution=16), dict(img_resolution=16, pfgmpp=False, D=128)):
        file, _ = checkpoint(tmp_path, outside=outside, labels=0)
        pipe = convert_pfgmpp(file)
        assert pipe.scheduler.config.aug_dim is None
    assert pipe.scheduler.config.sigma_data == 0.5
    assert pipe.num_classes == 0
    told = "was always told a class"
    assert told not in pipe.config.card["description"]
    assert told in convert_pfgmpp(checkpoint(tmp_path)[0]).config.card["description"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INSIDE, "label_dropout", 0.1)
        assert told not in convert_pfgmpp(checkpoint(tmp_path)[0]).config.card["description"]


def imported(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def test_the_command(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    file, _ = checkpoint(tmp_path / "in", labels=3)
    assert imported(file, tmp_path / "out") == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert imported(tmp_path / "in", tmp_path / "out") == 0  # and again, over it
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name for name in first if first[name] != again.get(name)} <= {"README.md", "model_index.json"}
    assert imported(file, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("license: cc-by-nc-sa-4.0", "| imported from | training-state-000200.pt |", "PFGM++ with D = 64"):
        assert fact in card
    pipe = tonefield.load(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    options = dict(class_labels=[0, 2], num_inference_steps=4, output_type="pt")
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pictures = pipe(generator=seeds, **options).images
    assert pictures.shape == (2, 1, 16, 16) and pictures.isfinite().all() and pictures.std() > 0
    assert type(pipe.scheduler) is PoissonFlowScheduler
    capsys.readouterr()
    assert imported(file, tmp_path / "net", "--weights=net", "--license=other") == 0
    assert not torch.equal(tonefield.load(tmp_path / "net").unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert "license: other" in (tmp_path / "net" / "README.md").read_text()


def test_what_is_refused(tmp_path):
    def refused(message, source, **options):
        with pytest.raises(UserError, match=message) as error:
            convert_pfgmpp(source, **options)
        assert len(str(error.value).splitlines()) == 1

    file, _ = checkpoint(tmp_path)
    data = file.read_bytes()
    refused("There is no file", tmp_path / "absent.pt")
    refused("is a folder", tmp_path)
    for name, content in {"half.pt": data[: len(data) // 2], "text.pkl": b"hello", "empty.pkl": b""}.items():
        (tmp_path / name).write_bytes(content)
        cut_short = "cut short" if name == "half.pt" else ""
        refused(f"is damaged or no checkpoint of PFGM.*{cut_short}", tmp_path / name)
    middle = data.find(b"FloatStorage")
    (tmp_path / "flipped.pt").write_bytes(data[:middle] + b"X" + data[middle + 1 :])
    refused("damaged", tmp_path / "flipped.pt")
    pickled, _ = checkpoint(tmp_path, "network.pkl")
    (tmp_path / "half.pkl").write_bytes(pickled.read_bytes()[:-500])
    refused("is damaged or no checkpoint", tmp_path / "half.pkl")
    torch.save({"model": {"x": torch.zeros(2)}}, tmp_path / "other.pt")
    refused("no 'ema' in it", tmp_path / "other.pt")
    refused("a DhariwalUNet in a EDMPrecond; only a SongUNet",
            checkpoint(tmp_path, "adm.pkl", names=[("EDMPrecond", "DhariwalUNet")])[0])  # fmt: skip
    refused("a SongUNet in a VEPrecond", checkpoint(tmp_path, "ve.pkl", names=[("VEPrecond", "SongUNet")])[0])
    refused("1 tensors are missing, the first is embedding_2.bias",
            checkpoint(tmp_path, "less.pkl", change=lambda weights: weights.pop("map_layer1.bias"))[0])  # fmt: skip
    refused("1 are unknown, the first is enc.4x4_block7.weight",
            checkpoint(tmp_path, "more.pkl", change=lambda w: w.update({"enc.4x4_block7.weight": torch.ones(1)}))[0],
            )  # fmt: skip
    refused(r"conv_in.weight has the shape \(8, 1, 1, 1\), expected \(8, 1, 3, 3\)",
            checkpoint(tmp_path, "shape.pkl",
                       change=lambda w: w.update({"enc.16x16_conv.weight": torch.ones(8, 1, 1, 1)}))[0])  # fmt: skip

    def other_filter(weights):
        weights["enc.8x8_down.skip.resample_filter"] = torch.ones(1, 1, 2, 2)

    refused("enc.8x8_down.skip.resample_filter is not the filter of ddpmpp",
            checkpoint(tmp_path, "filter.pkl", change=other_filter)[0])  # fmt: skip
    ring = published_pickles.network({"enc.a.weight": torch.ones(1)}, INSIDE, {})
    ring.model.again = ring.model._modules["enc"]
    refused("the module again is a part of it twice", published_pickles.write(tmp_path / "ring.pkl", ring))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INSIDE, "decoder_type", "skip")
        refused("neither DDPM.. nor NCSN.., but has .*decoder_type skip", checkpoint(tmp_path, "form.pkl")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INSIDE, "channel_mult", "wide")
        refused("SongUNet of impossible arguments", checkpoint(tmp_path, "arguments.pkl")[0])
    refused("preconditioning of impossible arguments",
            checkpoint(tmp_path, "D.pkl", outside=dict(pfgmpp=True, D=-3))[0])  # fmt: skip


def test_one_line_for_a_user_error(tmp_path, capsys):
    (tmp_path / "wrong.pt").write_bytes(b"hello")
    assert "wrong.pt is damaged" in imported(tmp_path / "wrong.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint(tmp_path, "a.pt")
    assert "must hold one checkpoint (*.pt or *.pkl) to choose from, but has a.pt, wrong.pt" in imported(
        tmp_path, tmp_path / "out"
    )


# Published networks of reduced width, and what they computed.

NAMES = ["pfgmpp_song_ddpmpp", "pfgmpp_song_ncsnpp"]


def close(ours, theirs, atol):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_published_networks(name):
    folder = Path(GOLDEN) / name
    io, settings = load_file(folder / "io.safetensors"), json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "state_dict.safetensors")
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pkl")]):
        arguments, _, tensors = read_network(file)
        assert {f"model.{key}" for key in tensors} == set(stored)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, stored[f"model.{key}"])
        assert arguments["D"] == settings["init_kwargs"]["D"] == 128
        pipe = convert_pfgmpp(file)
    raw = convert_pfgmpp(next(folder.glob("*.pt")), "net")
    labels = io.get("class_labels")

    def denoised(pipe, labels, augmentation=None):
        timestep, scheduler = pipe.scheduler.precondition_noise(io["sigma"]), pipe.scheduler
        output = pipe.unet(scheduler.scale_model_input(io["x"], timestep), timestep, labels, augmentation).sample
        return scheduler.precondition_outputs(io["x"], output, io["sigma"])

    with torch.no_grad():
        close(pipe.unet(0.3 * io["x"], io["backbone_noise_labels"], labels).sample, io["backbone_out"], 2e-5)
        close(denoised(pipe, labels), io["denoised"], 2e-5)
        close(denoised(raw, labels), io["denoised_raw_weights"], 2e-5)
        if labels is not None:
            close(denoised(pipe, labels.argmax(dim=1)), io["denoised"], 2e-5)
            close(denoised(pipe, None), io["denoised_no_label"], 2e-5)
            close(denoised(pipe, labels, io["augment_labels"]), io["denoised_augment"], 2e-5)


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_published_samplers(name):
    """The pipeline's samples, and the sampler's state after each step."""
    folder = Path(GOLDEN) / name
    io = load_file(folder / "io.safetensors")
    pipe = convert_pfgmpp(next(folder.glob("*.pt")))
    pipe.set_progress_bar_config(disable=True)
    labels = io["class_labels"].argmax(dim=1) if "class_labels" in io else None
    states = []

    def remember(pipe, step, timestep, tensors):
        if step % 2 or step == 34:
            states.append(tensors["latents"])
        return tensors

    def sample(steps):
        options = dict(class_labels=labels, latents=io["latents"], output_type="pt", callback_on_step_end=remember)
        return pipe(num_inference_steps=steps, **options).images

    pictures = sample(18)
    torch.testing.assert_close(pipe.scheduler.sigmas, io["heun18_sigmas"], rtol=1e-12, atol=0)
    close(torch.stack(states).double(), io["heun18_trajectory"], 2e-4)
    close(states[-1].double(), io["heun18"], 2e-4)
    torch.testing.assert_close(pictures, (io["heun18"].float() / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-4)
    pipe.scheduler = PoissonFlowScheduler.from_config(pipe.scheduler.config, sigma_min=0.01, sigma_max=40, rho=5)
    # The latents were drawn for 80, and stay as they are.
    result = sample(7)
    torch.testing.assert_close(
        result, (io["heun7_sigma0.01_40_rho5"].float() / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-4
    )
