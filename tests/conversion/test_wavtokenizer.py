"""Imported weights of WavTokenizer give its codes and its sound: the published ones, and others in plain terms.

The encoder is EnCodec's, which transformers has too; the decoder is written down here from its description.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from token_runs import tokenize
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

from tonefield import WavTokenizer
from tonefield.command_line import UserError
from tonefield.conversion import convert_wavtokenizer, wavtokenizer
from tonefield.data.audio_files import read_audio
from tonefield.data.loading import load_split
from tonefield.models import load_audio_tokenizer


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")

WIDTH, INNER, LAYERS, LATENT, CODES, ROWS = 64, 48, 2, 20, 32, 4


def encodec(downsampling):
    torch.manual_seed(0)
    config = EncodecConfig(
        upsampling_ratios=downsampling, num_filters=4, hidden_size=LATENT, codebook_size=CODES, codebook_dim=LATENT,
        use_causal_conv=False, norm_type="weight_norm", target_bandwidths=[1.5], num_lstm_layers=2,
    )  # fmt: skip
    return EncodecModel(config).eval()


def decoder_weights(n_fft, generator):
    """Random tensors with the decoder's published names."""
    shapes = {
        "backbone.embed": (WIDTH, LATENT, 7),
        "backbone.final_layer_norm": (WIDTH,),
        "head.out": (n_fft + 2, WIDTH),
    }
    for i in (0, 1, 3, 4):
        for part in ("norm1", "norm2"):
            shapes[f"backbone.pos_net.{i}.{part}"] = (WIDTH,)
        for part in ("conv1", "conv2"):
            shapes[f"backbone.pos_net.{i}.{part}"] = (WIDTH, WIDTH, 3)
    shapes["backbone.pos_net.2.norm"] = shapes["backbone.pos_net.5"] = (WIDTH,)
    for part in ("q", "k", "v", "proj_out"):
        shapes[f"backbone.pos_net.2.{part}"] = (WIDTH, WIDTH, 1)
    for i in range(LAYERS):
        shapes[f"backbone.convnext.{i}.dwconv"] = (WIDTH, 1, 7)
        shapes[f"backbone.convnext.{i}.pwconv1"] = (INNER, WIDTH)
        shapes[f"backbone.convnext.{i}.pwconv2"] = (WIDTH, INNER)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
        weight = torch.randn(shape, generator=generator) / fan_in**0.5
        # Small where a normalisation follows, so that the number that it adds to the variance is seen.
        scale = 0.02 if name.endswith(("embed", "conv2", "proj_out", "pos_net.5", "dwconv")) else 1
        tensors[f"{name}.weight"] = scale * (weight + (len(shape) == 1))
        tensors[f"{name}.bias"] = scale * 0.3 * torch.randn(shape[:1], generator=generator)
    for path in ("backbone.norm", *(f"backbone.convnext.{i}.norm" for i in range(LAYERS))):
        scale = 0.02 if path == "backbone.norm" else 1
        tensors[f"{path}.scale.weight"] = scale * (1 + 0.3 * torch.randn(ROWS, WIDTH, generator=generator))
        tensors[f"{path}.shift.weight"] = scale * 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
    for i in range(LAYERS):
        tensors[f"backbone.convnext.{i}.gamma"] = 0.02 * torch.randn(WIDTH, generator=generator)
    return tensors


def publish(folder, downsampling=(8, 5, 4, 2), name="model.ckpt"):
    """A folder as it is published, the weights by name, and the encoder of transformers that they are of."""
    model, hop = encodec(list(downsampling)), int(np.prod(downsampling))
    generator = torch.Generator().manual_seed(1)
    weights = decoder_weights(4 * hop, generator)
    for key, tensor in model.encoder.state_dict().items():
        key = key.replace("layers.", "feature_extractor.encodec.encoder.model.").replace(".conv.", ".conv.conv.")
        key = key.replace("parametrizations.weight.original0", "weight_g")
        weights[key.replace("parametrizations.weight.original1", "weight_v")] = tensor.clone()
    codebook = "feature_extractor.encodec.quantizer.vq.layers.0._codebook"
    with torch.no_grad():
        found = model.encoder(0.3 * torch.randn(1, 1, CODES * hop, generator=generator))[0].T
    weights[f"{codebook}.embed"] = found[torch.randperm(CODES, generator=generator)].clone()
    for part in ("inited", "cluster_size", "embed_avg"):
        weights[f"{codebook}.{part}"] = torch.full((CODES,), torch.nan)
    for part in ("feature_extractor.encodec.decoder.model.0.conv.conv.bias", "multiresddisc.discriminators.0.x",
                 "head.istft.window", "melspec_loss.mel_spec.spectrogram.window"):  # fmt: skip
        weights[part] = torch.full((3,), torch.nan)
    config = {
        "sample_rate": 24000,
        "feature_extractor": {"init_args": {"dowmsamples": list(downsampling), "vq_bins": CODES}},
        "backbone": {"init_args": {
            "input_channels": LATENT, "dim": WIDTH, "intermediate_dim": INNER, "num_layers": LAYERS,
        }},
        "head": {"init_args": {"dim": WIDTH, "n_fft": 4 * hop, "hop_length": hop, "padding": "same"}},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": config}}))
    torch.save({"epoch": 3, "state_dict": weights, "optimizer_states": []}, folder / name)
    return weights, model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return (folder, *publish(folder))


def decoded(weights, codes, hop, row):
    """The sound of codes (frames,) in float64, in plain terms."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def conv(name, x, **options):
        return F.conv1d(x[None], w[f"{name}.weight"], w[f"{name}.bias"], **options)[0]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def group_norm(name, x):
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return groups.reshape(x.shape) * w[f"{name}.weight"][:, None] + w[f"{name}.bias"][:, None]

    def layer_norm(x, weight, bias):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * weight + bias

    def swish(x):
        return x * torch.sigmoid(x)

    x = w["feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"][codes].T
    x = conv("backbone.embed", x, padding=3)
    for i in (0, 1, 2, 3, 4):
        p = f"backbone.pos_net.{i}"
        if i == 2:
            h = group_norm(f"{p}.norm", x)
            q, k, v = (conv(f"{p}.{part}", h) for part in "qkv")
            x = x + conv(f"{p}.proj_out", v @ torch.softmax(q.T @ k / WIDTH**0.5, dim=1).T)
        else:
            h = conv(f"{p}.conv1", swish(group_norm(f"{p}.norm1", x)), padding=1)
            x = x + conv(f"{p}.conv2", swish(group_norm(f"{p}.norm2", h)), padding=1)
    x = group_norm("backbone.pos_net.5", x).T
    x = layer_norm(x, w["backbone.norm.scale.weight"][row], w["backbone.norm.shift.weight"][row])
    for i in range(LAYERS):
        p = f"backbone.convnext.{i}"
        h = conv(f"{p}.dwconv", x.T, padding=3, groups=WIDTH).T
        h = layer_norm(h, w[f"{p}.norm.scale.weight"][row], w[f"{p}.norm.shift.weight"][row])
        h = linear(f"{p}.pwconv1", h)
        h = linear(f"{p}.pwconv2", h * (1 + torch.erf(h / 2**0.5)) / 2)
        x = x + w[f"{p}.gamma"] * h
    x = linear("head.out", layer_norm(x, w["backbone.final_layer_norm.weight"], w["backbone.final_layer_norm.bias"]))
    magnitude, phase = np.split(x.numpy(), 2, axis=1)
    pieces = np.fft.irfft(np.minimum(np.exp(magnitude), 100) * np.exp(1j * phase))
    size = 4 * hop
    window = np.sin(np.pi * np.arange(size) / size) ** 2
    sound, norm = np.zeros((len(codes) + 3) * hop), np.zeros((len(codes) + 3) * hop)
    for i, piece in enumerate(pieces):
        sound[i * hop : i * hop + size] += piece * window
        norm[i * hop : i * hop + size] += window**2
    inside = slice(3 * hop // 2, 3 * hop // 2 + len(codes) * hop)
    return sound[inside] / norm[inside]


# The published computation


@needs_golden
def test_equal_to_the_original():
    golden = load_file(Path(GOLDEN) / "wavtokenizer" / "io.safetensors")
    first, third = (convert_wavtokenizer(Path(GOLDEN) / "wavtokenizer", bandwidth_id=row) for row in (0, 2))
    for case in (0, 1):
        waveform, codes = golden[f"waveform_{case}"], golden[f"codes_{case}"].transpose(0, 1)
        embedding = first.embed(waveform, torch.full((2,), waveform.shape[1])).transpose(1, 2)
        torch.testing.assert_close(embedding, golden[f"encoder_embedding_{case}"], rtol=0, atol=1e-5)
        assert torch.equal(first.encode(waveform, 24000), codes)
        features = first.codebook(codes[:, 0]).transpose(1, 2)
        torch.testing.assert_close(features, golden[f"features_{case}"], rtol=0, atol=0)
        for model, key in ((first, "decoded"), (third, "decoded_bandwidth_id2")):
            torch.testing.assert_close(model.decode(codes), golden[f"{key}_{case}"], rtol=0, atol=5e-6)
    codes = golden["random_codes"].transpose(0, 1)
    torch.testing.assert_close(first.decode(codes), golden["random_codes_decoded"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("downsampling", [(8, 5, 4, 2), (6, 5, 5, 4)])
def test_equal_to_plain_terms(downsampling, tmp_path):
    weights, theirs = publish(tmp_path, downsampling)
    codec, hop = convert_wavtokenizer(tmp_path), int(np.prod(downsampling))
    assert (codec.hop_length, codec.config.strides, codec.sampling_rate) == (hop, downsampling[::-1], 24000)
    sounds = 0.3 * torch.randn(2, 7 * hop, generator=torch.Generator().manual_seed(2))
    for samples in (1, 2, 5, 100, hop - 1, hop, hop + 1, 3 * hop + 7, 7 * hop):
        with torch.no_grad():
            expected = theirs.encoder(sounds[:, None, :samples]).transpose(1, 2)
        ours = codec.embed(sounds[:, :samples], torch.tensor([samples] * 2))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    codes = torch.randint(CODES, (2, 1, 9), generator=torch.Generator().manual_seed(3))
    for row in (0, 3):
        sound = convert_wavtokenizer(tmp_path, bandwidth_id=row).decode(codes)
        for i in (0, 1):
            expected = decoded(weights, codes[i, 0], hop, row)
            np.testing.assert_allclose(sound[i], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# From end to end


def test_the_command_and_its_use_on_recordings(published, tmp_path, digit_files):
    folder = published[0]
    states = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            wavtokenizer.main([str(folder / "model.ckpt"), str(tmp_path / "codec"), "--license=mit"])
        assert end.value.code == 0
        states.append([path.read_bytes() for path in sorted((tmp_path / "codec").iterdir())])
    assert states[0] == states[1]
    card = (tmp_path / "codec" / "README.md").read_text()
    assert "license: mit" in card and "| imported from | model.ckpt |" in card
    codec = load_audio_tokenizer(tmp_path / "codec")
    assert type(codec) is WavTokenizer
    (tmp_path / "sounds").mkdir()
    for file in digit_files[:3]:
        (tmp_path / "sounds" / file.name).write_bytes(file.read_bytes())
    dataset = load_split(tokenize(tmp_path / "sounds", tmp_path / "codec", tmp_path / "tokens"))
    assert len(dataset) == 2  # and one for validation
    for row in dataset:
        sound = torch.from_numpy(read_audio(tmp_path / "sounds" / row["audio_path"], 24000))[None]
        assert torch.equal(torch.tensor(row["codes"])[None].long(), codec.encode(sound, 24000))
        assert row["num_samples"] == sound.shape[1]


# What cannot be imported


ENCODER = "feature_extractor.encodec.encoder.model"


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("backbone.pos_net.2.proj_out.bias"), "1 tensors are missing, the first is backbone.pos_net.2.pr"),
    (lambda w: w.update({"backbone.more": torch.ones(1)}), "1 are unknown, the first is backbone.more"),
    (lambda w: w.update({f"{ENCODER}.15.conv.conv.bias": torch.ones(1)}),
     rf"{ENCODER}.15.conv.conv.bias has the shape \(1,\), expected \(20,\)"),
    (lambda w: [w.pop(name) for name in list(w) if ".lstm." in name], f"there is no recurrent layer in {ENCODER}"),
    (lambda w: w.pop(f"{ENCODER}.3.conv.conv.weight_g"), f"there is no {ENCODER}.3.conv.conv.weight in it"),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith("backbone.convnext")],
     "there is no backbone.convnext.0.pwconv1.weight in it"),
    (lambda w: w.update({f"{ENCODER}.3.conv.conv.weight_v": torch.ones(8, 4, 5)}),
     r"conv.weight has the shape \(8, 4, 5\), expected \(8, 4, 4\)"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit(change, message, published, tmp_path):
    weights = dict(published[1])
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=message):
        convert_wavtokenizer(tmp_path)


def test_files_that_do_not_fit(published, tmp_path):
    folder = published[0]
    ckpt = folder / "model.ckpt"

    def refused(message, source, **options):
        with pytest.raises(UserError, match=message) as error:
            convert_wavtokenizer(source, **options)
        assert "\n" not in str(error.value)

    def written(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    assert convert_wavtokenizer(ckpt).sampling_rate == 24000
    right = (folder / "config.yaml").read_text()
    faster = written("faster.yaml", right.replace("sample_rate: 24000", "sample_rate: 16000"))
    assert convert_wavtokenizer(ckpt, model_config=faster).sampling_rate == 16000
    other = written("other.yaml", right.replace("num_layers: 2", "num_layers: 12"))
    told = "other.yaml is the configuration of another checkpoint: its num_layers is 12, that of the weights is 2"
    refused(told, ckpt, model_config=other)
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "model.ckpt").symlink_to(ckpt)
    (beside / "other.yaml").write_text(other.read_text())
    refused(told, beside)
    refused("bad.yaml is not YAML", ckpt, model_config=written("bad.yaml", "a: [b"))
    refused(
        "no.yaml is no configuration of WavTokenizer: 'model' is missing",
        ckpt,
        model_config=written("no.yaml", "a: 1"),
    )
    refused("There is no file nowhere.yaml, which --model_config names", ckpt, model_config="nowhere.yaml")
    refused("--bandwidth_id is between 0 and 3, not 4", ckpt, bandwidth_id=4)
    refused(r"must hold one checkpoint \(\*\.ckpt\), but has none", tmp_path)
    torch.save({"model": {}}, tmp_path / "a.ckpt")
    refused("a.ckpt does not hold a WavTokenizer: there is no state_dict in it", tmp_path)
    (tmp_path / "b.ckpt").write_bytes(ckpt.read_bytes())
    refused("but has a.ckpt, b.ckpt: choose by --checkpoint", tmp_path)
    assert convert_wavtokenizer(tmp_path, "b.ckpt").codebook_size == CODES
    refused("There is no file .*c.ckpt", tmp_path, checkpoint="c.ckpt")
    (tmp_path / "b.ckpt").write_bytes(ckpt.read_bytes()[:5000])
    refused("b.ckpt is damaged or no checkpoint", tmp_path, checkpoint="b.ckpt")
