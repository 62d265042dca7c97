"""Published BigVGAN vocoders compute what they were published to compute."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from diffusers import MMAudioVocoder
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from published_vocoders import CONFIG, SECOND_GENERATION, write_bigvgan
from safetensors.torch import load_file

from tonefield import MelSpectrogram
from tonefield.command_line import UserError, parse
from tonefield.conversion import convert_bigvgan
from tonefield.conversion.bigvgan import convert, mel_of
from tonefield.conversion.command import importer_parser, write
from tonefield.models import load_vocoder
from tonefield.models.mel_spectrogram import PRESETS
from tonefield.pipelines.tonefield_mel_editing import check_vocoder, receptive_field, vocode


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")

KINDS = {True: MMAudioVocoder, False: LTX2Vocoder}


def sound(vocoder, mel):
    with torch.no_grad():
        return vocoder(mel[:, None], time_last=True) if isinstance(vocoder, LTX2Vocoder) else vocoder(mel).sample


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(made, expected):
    return ((made - expected).norm() / expected.norm()).item()


@needs_golden
@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_golden(generation):
    folder = Path(GOLDEN) / f"bigvgan_{generation}"
    vocoder, golden = convert_bigvgan(folder), load_file(folder / "io.safetensors")
    assert type(vocoder) is KINDS[generation == "v2"]
    for name in ("mel_random", "mel_from_audio"):
        expected = golden[f"waveform_{name}"]
        assert distance(sound(vocoder, golden[name]), expected) < 1e-5
        torch.testing.assert_close(sound(vocoder, golden[name]), expected, atol=2e-5, rtol=0)
    # The mel that belongs to it is the one that the file says.
    mel = MelSpectrogram.from_preset(vocoder.config._mel["preset"])
    check_vocoder(mel, vocoder)
    heard = (mel.encode(golden["audio_for_mel"])[:, 0] + 1) * ((mel.value_range[1] - mel.value_range[0]) / 2)
    expected = golden["mel_from_audio"].clamp(max=mel.value_range[1])
    torch.testing.assert_close(heard + mel.value_range[0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("second", "form"), [(True, "old"), (False, "old"), (False, "new"), (True, "folded")])
def test_a_converted_vocoder_makes_the_same_sound(tmp_path, second, form):
    mel = 2 * normal(2, 16, 11) - 3
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        published = write_bigvgan(tmp_path / str(dtype), second, form, dtype)
        vocoder = convert_bigvgan(tmp_path / str(dtype))
        assert type(vocoder) is KINDS[second] and vocoder.dtype == dtype and not vocoder.training
        expected = published(mel)
        assert 0.01 < expected.std() and distance(sound(vocoder, mel.to(dtype)), expected) < tolerance


@pytest.mark.parametrize(("tanh", "bias"), [(True, False), (False, True)])
def test_other_endings(tmp_path, tanh, bias):
    published = write_bigvgan(tmp_path, dtype=torch.float64, use_tanh_at_final=tanh, use_bias_at_final=bias)
    mel = normal(1, 16, 5)
    assert distance(sound(convert_bigvgan(tmp_path), mel), published(mel)) < 1e-10


@pytest.mark.parametrize("second", [True, False])
def test_command(tmp_path, second, capsys):
    """What it writes loads again, twice is once, and the card says where it comes from."""
    published = write_bigvgan(tmp_path / "published", second)
    mel = normal(1, 16, 7)
    for source in ("published", "published/bigvgan_generator.pt"):
        args = parse(importer_parser(""), [str(tmp_path / source), str(tmp_path / "out"), "--license", "mit"])
        write(convert(args), args)
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert sorted(files) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
        card = files["README.md"].decode()
        assert "license: mit" in card and KINDS[second].__name__ in card and Path(source).name in card
        vocoder = load_vocoder(tmp_path / "out")
        assert type(vocoder) is KINDS[second]
        assert distance(sound(vocoder, mel.float()), published(mel)) < 1e-5
        assert vocoder.config._mel == dict(
            sample_rate=8000, n_fft=64, hop_length=8, n_mels=16, f_min=0.0, f_max=4000.0
        )
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_what_nvidia_publishes_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, license in (("nvidia/bigvgan_small", "license: mit"), ("mine/bigvgan_small", None)):
        write_bigvgan(tmp_path / source)
        args = parse(importer_parser(""), [source, "out"])
        write(convert(args), args)
        card = (tmp_path / "out" / "README.md").read_text()
        assert license in card if license else "license" not in card


def test_by_name(tmp_path):
    """From a folder within another, and from the Hub's cache: as it is published, and converted."""
    name = "nvidia/bigvgan_small"
    published = write_bigvgan(tmp_path / "published", second=False)
    convert_bigvgan(tmp_path / "published").save_pretrained(tmp_path / "converted")
    mel = normal(1, 16, 7)
    for source in ("published", "converted"):
        vocoder = load_vocoder(tmp_path, subfolder=source)
        assert distance(sound(vocoder, mel.float()), published(mel)) < 1e-5
    for source in ("published", "converted"):
        repository = tmp_path / f"cache of {source}" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (tmp_path / source).rename(repository / "snapshots" / ("0" * 40))
        vocoder = load_vocoder(name, cache_dir=tmp_path / f"cache of {source}")
        assert distance(sound(vocoder, mel.float()), published(mel)) < 1e-5


def test_every_published_mel_is_a_preset():
    """And what a pipeline refuses names both values."""
    for name, preset in PRESETS.items():
        if not name.startswith("bigvgan"):
            continue
        mel = MelSpectrogram.from_preset(name)
        config = CONFIG | SECOND_GENERATION | dict(
            sampling_rate=preset["sample_rate"], n_fft=preset["n_fft"], hop_size=preset["hop_length"],
            num_mels=preset["n_mels"], fmax=preset["f_max"],
        )  # fmt: skip
        found = mel_of(config)
        assert MelSpectrogram.from_preset(found.pop("preset")).fingerprint() == mel.fingerprint()
        vocoder = MMAudioVocoder(
            preset["n_mels"], 4, [preset["hop_length"]], [2 * preset["hop_length"]], (3,), ((1,),)
        )
        check_vocoder(mel, vocoder)
        vocoder.register_to_config(_mel=mel_of(config))
        check_vocoder(mel, vocoder)
        other = MelSpectrogram.from_preset(name, f_max=7000)
        message = rf"f_max={preset['f_max'] or preset['sample_rate'] / 2:g}, but .*f_max=7000: .*\(preset bigvgan"
        with pytest.raises(ValueError, match=message):
            check_vocoder(other, vocoder)


@pytest.mark.parametrize(("changes", "value", "ours"), [
    (dict(sample_rate=16000), "sample_rate=8000", "sample_rate=16000"), (dict(n_fft=128), "n_fft=64", "n_fft=128"),
    (dict(hop_length=16), "hop_length=8", "hop_length=16"), (dict(n_mels=8), "n_mels=16", "n_mels=8"),
    (dict(f_min=20.0), "f_min=0", "f_min=20"), (dict(f_max=3000.0), "f_max=4000", "f_max=3000"),
])  # fmt: skip
def test_mismatch_names_both_values(tmp_path, changes, value, ours):
    write_bigvgan(tmp_path)
    mel = dict(sample_rate=8000, n_fft=64, hop_length=8, n_mels=16, num_frames=32, method="bigvgan")
    vocoder = convert_bigvgan(tmp_path)
    check_vocoder(MelSpectrogram(**mel), vocoder)
    with pytest.raises(ValueError, match=f"reads mels of {value}, but those of the pipeline have {ours}"):
        check_vocoder(MelSpectrogram(**mel | changes), vocoder)
    if changes.keys() & {"hop_length", "n_mels"}:  # can be seen on any vocoder
        vocoder.register_to_config(_mel=None)
        with pytest.raises(ValueError, match=f"reads mels of {value}, but those of the pipeline have {ours}"):
            check_vocoder(MelSpectrogram(**mel | changes), vocoder)


# Long mels


@pytest.mark.parametrize("second", [True, False])
def test_in_parts_as_in_one(tmp_path, monkeypatch, second):
    published = write_bigvgan(tmp_path, second)
    vocoder = convert_bigvgan(tmp_path)
    mel = 2 * normal(2, 16, 70) - 3
    expected = published(mel)[:, 0]
    for frames in (4096, 75, 31):
        monkeypatch.setattr("tonefield.pipelines.tonefield_mel_editing.FRAMES_AT_ONCE", frames)
        made = vocode(vocoder, mel.float())
        assert made.dtype == torch.float32 and (made - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("second", "rates", "kernels"), [
    (True, [4, 2], [8, 4]), (False, [4, 2], [8, 4]), (True, [2, 4], [6, 8]), (False, [8], [16]), (True, [2], [2]),
])  # fmt: skip
def test_receptive_field(tmp_path, second, rates, kernels):
    """What a frame's sound depends on by the chain rule lies within, and not much farther within."""
    write_bigvgan(tmp_path, second, upsample_rates=rates, upsample_kernel_sizes=kernels, dtype=torch.float64)
    vocoder, hop = convert_bigvgan(tmp_path), math.prod(rates)
    reach = receptive_field(vocoder)
    mel = normal(1, 16, 4 * reach).requires_grad_()
    made = vocoder(mel[:, None], time_last=True) if not second else vocoder(mel).sample
    (gradient,) = torch.autograd.grad(made[..., 2 * reach * hop : (2 * reach + 1) * hop].square().sum(), mel)
    seen = gradient[0].abs().amax(0).nonzero().flatten() - 2 * reach
    assert -reach <= seen[0] and seen[-1] <= reach and max(-seen[0], seen[-1]) >= reach - 5


@pytest.mark.parametrize("second", [True, False])
def test_in_single_precision_whatever_surrounds_it(tmp_path, second):
    published = write_bigvgan(tmp_path, second)
    vocoder, mel = convert_bigvgan(tmp_path), 2 * normal(1, 16, 6) - 3
    expected = published(mel)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        made = vocode(vocoder, mel.float())
        assert made.dtype == torch.float32 and distance(made, expected) < 1e-5
        assert (
            distance(sound(vocoder, mel.float())[:, 0].double(), expected) > 1e-3
        )  # so that there is something to see
    rounded = convert_bigvgan(tmp_path).bfloat16()
    assert 1e-5 < distance(vocode(rounded, mel.bfloat16().float()), expected) < 0.1 and rounded.dtype == torch.float32


# Bad input


def damage(folder, kind):
    weights = torch.load(folder / "bigvgan_generator.pt", weights_only=True)
    if kind == "truncated":
        data = (folder / "bigvgan_generator.pt").read_bytes()
        (folder / "bigvgan_generator.pt").write_bytes(data[: len(data) // 2])
        return
    if kind == "discriminator":
        weights = {"mpd": weights["generator"], "mrd": {}}
    elif kind == "missing":
        del weights["generator"]["conv_post.weight_v"]
    elif kind == "unexpected":
        weights["generator"]["extra.bias"] = torch.zeros(1)
    elif kind == "shape":
        weights["generator"]["conv_pre.bias"] = torch.zeros(9)
    torch.save(weights, folder / "bigvgan_generator.pt")


@pytest.mark.parametrize(("kind", "message"), [
    ("truncated", "is damaged or no checkpoint"),
    ("discriminator", "holds no generator: give a BigVGAN's bigvgan_generator.pt"),
    ("missing", "1 tensors are missing, the first is conv_post.weight"),
    ("unexpected", "the first is extra.bias"),
    ("shape", r"conv_pre.bias has the shape \(9,\), expected \(8,\)"),
])  # fmt: skip
def test_bad_weights(tmp_path, kind, message):
    write_bigvgan(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(UserError, match=message) as error:
        convert_bigvgan(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        load_vocoder(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(resblock="2"), "resblock='2', but only resblock='1'"),
    (dict(activation="snake"), "activation='snake', but only activation='snakebeta'"),
    (dict(snake_logscale=False), "snake_logscale=False, but only"),
    (dict(win_size=32), "win_size=32, but only win_size=64"),
    (dict(hop_size=16), "upsample_rates make 8 samples of a frame, but hop_size is 16"),
    (dict(upsample_initial_channel=16), r"conv_pre\.\w+ has the shape"),
    (dict(use_bias_at_final=True), "1 tensors are missing, the first is conv_out.bias"),
    (dict(num_mels=None), "does not say num_mels"),
])  # fmt: skip
def test_bad_configs(tmp_path, changes, message):
    write_bigvgan(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None or k == "fmax"})
    )
    with pytest.raises(UserError, match=message):
        convert_bigvgan(tmp_path)


def test_no_vocoder(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKL, which is no vocoder"):
        load_vocoder(tmp_path)
    with pytest.raises(UserError, match="is no BigVGAN's: it does not say upsample_initial_channel"):
        convert_bigvgan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        convert_bigvgan(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        convert_bigvgan(tmp_path)
    with pytest.raises(OSError, match="neither a folder nor a Hub id of a vocoder"):
        load_vocoder(tmp_path)
    with pytest.raises(OSError, match="neither a folder nor a Hub id of a vocoder"):
        load_vocoder("nvidia/bigvgan_that_is_not_there")
