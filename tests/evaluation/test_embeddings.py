"""Embeddings against independent computations, on small random networks in the published formats."""

import json

import numpy as np
import pytest
import soxr
import torch
from safetensors.torch import save_file
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)
from transformers.audio_utils import mel_filter_bank

from tonefield.command_line import UserError
from tonefield.evaluation import load_embedding
from tonefield.evaluation.cnn14 import CNN14Classifier
from tonefield.evaluation.vggish import mel_matrix


def sounds_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-0.5, 0.5, length).astype(np.float32) for length in lengths]


def check_batches(embedding, sounds, rel=2e-5):
    """The rows of a sound are the same in any company and order."""
    alone = [embedding.embed([sound])[0] for sound in sounds]
    together = embedding.embed(sounds, batch_size=3)
    reversed_order = embedding.embed(sounds[::-1], batch_size=64)[::-1]
    for one, *others in zip(alone, together, reversed_order, strict=True):
        assert one.shape[1] == embedding.dim and one.dtype == np.float32 and np.isfinite(one).all()
        for other in others:
            np.testing.assert_allclose(other, one, rtol=rel, atol=rel * np.abs(one).max())
    assert not np.allclose(alone[0][:1], alone[1][:1], rtol=1e-3)
    return alone


# ----- numpy, in float64


def convolve(x, weight, bias=None):
    """(channels, height, width) by 3 x 3, with zeros around."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    _, height, width = x.shape
    result = sum(
        np.einsum("oi,ihw->ohw", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    )
    return result if bias is None else result + bias[:, None, None]


def pool(x, how):
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return how(x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2), axis=(2, 4))


def random_weights(shapes, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


# ----- mel


def test_mel_statistics_by_hand():
    embedding = load_embedding("mel")
    sound = sounds_of(40000)[0]
    rows = embedding.embed([sound])[0]
    assert rows.shape == (3, 96)  # of the last half second too
    levels = (embedding.mel.encode(torch.from_numpy(sound[None, :16000]))[0, 0].double().numpy() - 1) * 4
    assert levels.max() <= 0 and levels.min() >= -8
    levels = levels + 8
    steps = levels.reshape(16, 2, -1).mean(1)
    steps = steps[:, 8:] - steps[:, :-8]
    rises, falls = np.where(steps > 0, steps, 0), np.where(steps < 0, steps, 0)
    truth = [levels.mean(1), levels.std(1), np.sqrt((rises**2).mean(1)), np.sqrt((falls**2).mean(1))]
    np.testing.assert_allclose(rows[0], np.concatenate(truth), rtol=1e-4, atol=1e-5)


def test_mel_statistics_in_batches_and_at_the_ends():
    embedding = load_embedding("mel")
    alone = check_batches(embedding, sounds_of(16000, 9000, 16001, 35000, 4000, 100))
    assert [len(rows) for rows in alone] == [1, 1, 1, 2, 1, 1]
    assert embedding.embed([np.zeros(16000, np.float32)])[0].any() == False  # noqa: E712
    assert embedding.windowing == "1 s, every 1 s, at least 0.25 s"


def test_reversing_a_sound_exchanges_rises_and_falls():
    embedding = load_embedding("mel")
    time = np.arange(16384 - 257) / 16000  # whole frames: reversed, they lie where they lay
    sound = (np.exp(-4 * time) * np.sin(2 * np.pi * 500 * time)).astype(np.float32)[:15872]
    forth, back = embedding.embed([sound])[0][0], embedding.embed([sound[::-1].copy()])[0][0]
    np.testing.assert_allclose(forth[64:80], back[80:], rtol=0.1, atol=0.02)
    assert forth[80:].sum() > 3 * forth[64:80].sum()


# ----- VGGish


def vggish_file(path, **changes):
    widths, hidden = [2, 3, 4, 4, 3, 2], [5, 6, 4]
    shapes = {}
    for place, width, before in zip((0, 3, 6, 8, 11, 13), widths, [1, *widths], strict=False):
        shapes |= {f"features.{place}.weight": (width, before, 3, 3), f"features.{place}.bias": (width,)}
    for place, width, before in zip((0, 2, 4), hidden, [2 * 6 * 4, *hidden], strict=False):
        shapes |= {f"embeddings.{place}.weight": (width, before), f"embeddings.{place}.bias": (width,)}
    weights = random_weights(shapes) | changes
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    return {name: tensor.double().numpy() for name, tensor in weights.items() if tensor is not None}


def vggish_by_hand(patch, w):
    """One patch of 15600 samples."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    spectra = np.stack([np.abs(np.fft.rfft(patch[160 * i : 160 * i + 400] * window, 512)) for i in range(96)])
    bands = mel_filter_bank(257, 64, 125, 7500, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    x = np.log(spectra @ bands + 0.01)[None]
    for place in (0, 3, 6, 8, 11, 13):
        x = np.maximum(convolve(x, w[f"features.{place}.weight"], w[f"features.{place}.bias"]), 0)
        x = pool(x, np.max) if place in (0, 3, 8, 13) else x
    x = x.transpose(1, 2, 0).ravel()
    for place in (0, 2, 4):
        x = w[f"embeddings.{place}.weight"] @ x + w[f"embeddings.{place}.bias"]
        x = np.maximum(x, 0) if place < 4 else x
    return x


def test_vggish_against_numpy(tmp_path):
    weights = vggish_file(tmp_path / "vggish.pth")
    embedding = load_embedding(f"vggish={tmp_path / 'vggish.pth'}")
    sounds = sounds_of(40000, 15600, 30959, 5000)
    found = check_batches(embedding, sounds)
    assert [len(rows) for rows in found] == [2, 1, 1, 1]  # the next patch would begin at 15360
    for sound, rows in zip(sounds, found, strict=True):
        for index, row in enumerate(rows):
            patch = sound[15360 * index :][:15600].astype(np.float64)
            truth = vggish_by_hand(np.pad(patch, (0, 15600 - len(patch))), weights)
            np.testing.assert_allclose(row, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
    assert any((rows < 0).any() for rows in found)  # there is no last ReLU
    np.testing.assert_allclose(
        mel_matrix(), mel_filter_bank(257, 64, 125, 7500, 16000, None, "kaldi", True), atol=1e-6
    )


def test_vggish_that_is_none(tmp_path):
    file = tmp_path / "v.pth"
    vggish_file(file, **{"embeddings.2.bias": None})
    with pytest.raises(UserError, match=r"1 tensors are missing, the first is embeddings.2.bias"):
        load_embedding(f"vggish={file}")
    vggish_file(file, **{"features.6.weight": None})
    with pytest.raises(UserError, match=r"does not hold a VGGish: features.6.weight is missing"):
        load_embedding(f"vggish={file}")
    vggish_file(file, **{"embeddings.0.weight": torch.zeros(5, 47)})
    with pytest.raises(UserError, match=r"embeddings.0.weight has the shape \(5, 47\), expected \(5, 48\)"):
        load_embedding(f"vggish={file}")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"damaged"):
        load_embedding(f"vggish={file}")
    with pytest.raises(UserError, match=r"needs its weights"):
        load_embedding("vggish")


# ----- CNN14


def cnn14_file(path, bins=129, **changes):
    widths, bands, dim, classes = [2, 3, 2, 3, 2, 4], 64, 7, 5

    def norm(name, width):
        return {f"{name}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")}

    shapes = norm("bn0", bands)
    for index, (before, width) in enumerate(zip([1, *widths], widths, strict=False), 1):
        for i, b in (1, before), (2, width):
            shapes[f"conv_block{index}.conv{i}.weight"] = (width, b, 3, 3)
            shapes |= norm(f"conv_block{index}.bn{i}", width)
    shapes |= {"fc1.weight": (dim, widths[-1]), "fc1.bias": (dim,), "fc_audioset.weight": (classes, dim)}
    shapes |= {"fc_audioset.bias": (classes,), "logmel_extractor.melW": (bins, bands)}
    weights = random_weights(shapes)
    for name in weights:
        if "running_var" in name or "melW" in name:
            weights[name] = weights[name].abs() + 0.1
        elif "bn" in name and name.endswith("weight"):
            weights[name] = weights[name].abs() + 0.5
    n_fft = 2 * (bins - 1)
    weights |= {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(3) for name in weights if "var" in name
    }
    weights |= {f"spectrogram_extractor.stft.conv_{p}.weight": torch.zeros(bins, 1, n_fft) for p in ("real", "imag")}
    weights |= changes
    torch.save({"model": {name: tensor for name, tensor in weights.items() if tensor is not None}}, path)
    return {name: tensor.double().numpy() for name, tensor in weights.items() if tensor is not None}


def cnn14_by_hand(sound, w, n_fft, hop):
    def norm(x, name):
        scale = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
        return (x - w[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]

    padded = np.pad(sound.astype(np.float64), n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = np.stack([padded[i : i + n_fft] for i in range(0, len(sound) + 1, hop)])
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    x = 10 * np.log10(np.maximum(power @ w["logmel_extractor.melW"], 1e-10))
    x = norm(x.T[:, :, None], "bn0").transpose(2, 1, 0)
    for index in range(1, 7):
        for i in (1, 2):
            x = convolve(x, w[f"conv_block{index}.conv{i}.weight"])
            x = np.maximum(norm(x, f"conv_block{index}.bn{i}"), 0)
        x = pool(x, np.mean) if index < 6 else x
    x = x.mean(2)
    row = np.maximum(w["fc1.weight"] @ (x.max(1) + x.mean(1)) + w["fc1.bias"], 0)
    return row, w["fc_audioset.weight"] @ row + w["fc_audioset.bias"]


def test_cnn14_against_numpy(tmp_path):
    weights = cnn14_file(tmp_path / "cnn.pth")
    embedding = load_embedding(f"cnn14={tmp_path / 'cnn.pth'}")
    assert (embedding.sampling_rate, embedding.dim) == (8000, 7)
    sounds = sounds_of(8000, 5555, 8079, 4000, 1000)
    found = check_batches(embedding, sounds)
    logits = CNN14Classifier(tmp_path / "cnn.pth").embed(sounds)
    for sound, rows, of_classes in zip(sounds, found, logits, strict=True):
        truth, classes = cnn14_by_hand(np.pad(sound, (0, max(0, 2480 - len(sound)))), weights, 256, 80)
        np.testing.assert_allclose(rows, truth[None], rtol=1e-4, atol=1e-5 * truth.max())
        np.testing.assert_allclose(of_classes, classes[None], rtol=1e-4, atol=1e-4 * np.abs(classes).max())
    assert max(map(np.max, found)) > 0


@pytest.mark.parametrize("bins, rate", [(513, 32000), (257, 16000)])
def test_cnn14_at_other_rates(tmp_path, bins, rate):
    weights = cnn14_file(tmp_path / "cnn.pth", bins)
    embedding = load_embedding(f"cnn14={tmp_path / 'cnn.pth'}")
    assert embedding.sampling_rate == rate
    sound = sounds_of(rate)[0]
    truth, _ = cnn14_by_hand(sound, weights, 2 * (bins - 1), rate // 100)
    np.testing.assert_allclose(embedding.embed([sound])[0], truth[None], rtol=1e-4, atol=1e-5 * truth.max())


def test_cnn14_that_is_none(tmp_path):
    file = tmp_path / "c.pth"
    cnn14_file(file, **{"conv_block4.conv1.weight": None})
    with pytest.raises(UserError, match=r"does not hold a CNN14: conv_block4.conv1.weight is missing"):
        load_embedding(f"cnn14={file}")
    cnn14_file(file, bins=100)
    with pytest.raises(UserError, match=r"windows of 198 samples; known are"):
        load_embedding(f"cnn14={file}")
    cnn14_file(file, extra=torch.zeros(1))
    with pytest.raises(UserError, match=r"1 are unknown, the first is extra"):
        load_embedding(f"cnn14={file}")


# ----- CLAP


@pytest.fixture(scope="module")
def clap_model():
    torch.manual_seed(0)
    config = ClapConfig(
        audio_config=dict(
            patch_embeds_hidden_size=8, hidden_size=16, depths=[2, 1], num_attention_heads=[2, 4], projection_dim=6
        ),
        text_config=dict(
            vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
            max_position_embeddings=40, projection_dim=6, type_vocab_size=1,
        ),
        projection_dim=6,
    )  # fmt: skip
    model = ClapModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.audio_model.audio_encoder.batch_norm.running_mean.fill_(-30)
        model.audio_model.audio_encoder.batch_norm.running_var.fill_(400)
    return model


@pytest.mark.parametrize("truncation, padding", [("rand_trunc", "repeatpad"), ("fusion", "repeat")])
def test_clap_is_that_of_transformers(tmp_path, clap_model, truncation, padding):
    if truncation == "fusion":
        torch.manual_seed(1)
        settings = clap_model.config.to_dict()
        settings["audio_config"] |= {"enable_fusion": True}
        clap_model = ClapModel(ClapConfig(**settings)).eval()
    extractor = ClapFeatureExtractor(truncation=truncation, padding=padding, frequency_min=50)
    clap_model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    embedding = load_embedding(f"clap={tmp_path}")
    sounds = sounds_of(1_000_000, 144_000, 70_001)
    found = check_batches(embedding, sounds, rel=1e-4)
    assert [len(rows) for rows in found] == [3, 1, 1]
    windows = [sounds[0][:480_000], sounds[0][480_000:960_000], sounds[0][960_000:], *sounds[1:]]
    for row, window in zip(np.concatenate(found), windows, strict=True):
        features = extractor(window, sampling_rate=48000, return_tensors="pt")
        with torch.inference_mode():
            longer = torch.zeros(1, 1, dtype=torch.bool)  # the extractor declares one sound of a batch to be longer
            truth = clap_model.get_audio_features(features["input_features"], is_longer=longer).pooler_output[0]
        np.testing.assert_allclose(row, truth, atol=2e-4)
        assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


def test_clap_in_the_format_of_laion(tmp_path, clap_model):
    """The published names, written down here once more, from the module tree of that code."""
    published = {"module.logit_scale_a": clap_model.logit_scale_a, "module.logit_scale_t": clap_model.logit_scale_t}
    for name, tensor in clap_model.audio_model.audio_encoder.state_dict().items():
        if ".query." in name:
            block = [
                clap_model.audio_model.audio_encoder.state_dict()[name.replace("query", p)]
                for p in ("query", "key", "value")
            ]
            published["module.audio_branch." + name.replace("attention.self.query", "attn.qkv")] = torch.cat(block)
        elif ".key." not in name and ".value." not in name:
            for ours, theirs in {
                "attention.self": "attn", "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2",
                "batch_norm": "bn0",
            }.items():  # fmt: skip
                name = name.replace(ours, theirs)
            published["module.audio_branch." + name] = tensor
    published |= {"module.text_branch." + name: t for name, t in clap_model.text_model.state_dict().items()}
    for side in ("audio", "text"):
        for ours, theirs in ("linear1", "0"), ("linear2", "2"):
            for part in ("weight", "bias"):
                tensor = getattr(getattr(clap_model, f"{side}_projection"), ours).state_dict()[part]
                published[f"module.{side}_projection.{theirs}.{part}"] = tensor
        published[f"module.{side}_transform.sequential.0.weight"] = torch.zeros(6, 6)
    published["module.audio_branch.logmel_extractor.melW"] = torch.zeros(513, 64)
    published["module.audio_branch.tscam_conv.weight"] = torch.zeros(527, 16, 2, 3)
    published["module.audio_branch.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    published["module.text_branch.embeddings.position_ids"] = torch.zeros(1, 40)
    torch.save({"epoch": 15, "state_dict": published}, tmp_path / "music.pt")
    embedding = load_embedding(f"clap={tmp_path / 'music.pt'}")
    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
    clap_model.save_pretrained(tmp_path / "hf")
    extractor.save_pretrained(tmp_path / "hf")
    sounds = sounds_of(100_000, 60_000)
    theirs = load_embedding(f"clap={tmp_path / 'hf'}")
    assert embedding.fingerprint() == theirs.fingerprint()
    np.testing.assert_allclose(embedding.embed(sounds)[1], theirs.embed(sounds)[1], atol=1e-6)
    tokens = torch.tensor([[0, 5, 6, 2]])
    with torch.inference_mode():
        ours, truth = (
            m.get_text_features(tokens, torch.ones_like(tokens)).pooler_output for m in (embedding.model, clap_model)
        )
    torch.testing.assert_close(ours, truth)
    del published["module.text_projection.2.bias"]
    torch.save({"state_dict": published}, tmp_path / "music.pt")
    with pytest.raises(UserError, match=r"the first is text_projection.linear2.bias"):
        load_embedding(f"clap={tmp_path / 'music.pt'}")


# ----- EnCodec, wav2vec 2.0 and relatives


@pytest.mark.parametrize("stereo", [False, True])
def test_encodec_before_its_codes(tmp_path, stereo):
    torch.manual_seed(0)
    more = dict(audio_channels=2, normalize=True, chunk_length_s=1.0, overlap=0.0) if stereo else {}
    config = EncodecConfig(
        num_filters=4, hidden_size=6, upsampling_ratios=[5, 4], codebook_size=16, codebook_dim=6, num_lstm_layers=1,
        sampling_rate=4000, target_bandwidths=[1.6], **more,
    )  # fmt: skip
    model = EncodecModel(config).eval()
    model.quantizer.layers[0].codebook.embed.normal_()
    model.save_pretrained(tmp_path)
    embedding = load_embedding(f"encodec={tmp_path}")
    found = check_batches(embedding, sounds_of(3000, 2000, 3000))
    assert [len(rows) for rows in found] == [150, 100, 150] and embedding.dim == 6
    sound = torch.from_numpy(sounds_of(3000)[0])[None, None].expand(-1, config.audio_channels, -1)
    with torch.inference_mode():  # the codes that the whole model finds are those nearest to the rows
        codes = model.encode(sound, bandwidth=1.6).audio_codes.reshape(-1, 150)[0]
    centres = model.quantizer.layers[0].codebook.embed
    nearest = torch.cdist(torch.from_numpy(found[0]), centres).argmin(1)
    assert (nearest == codes).float().mean() > 0.98


@pytest.fixture(scope="module")
def speech_config():
    return dict(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8],
        conv_kernel=[10, 8], conv_stride=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["", "@1", "@0"])
def test_a_layer_of_wav2vec(tmp_path, speech_config, layer):
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(**speech_config)).eval()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=layer != "@1")
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    embedding = load_embedding(f"encoder={tmp_path}{layer}")
    sounds = sounds_of(4000, 2500, 4000, 4000)
    found = check_batches(embedding, sounds, rel=1e-4)
    for sound, rows in zip(sounds, found, strict=True):
        inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            states = model(inputs["input_values"], output_hidden_states=True).hidden_states
        np.testing.assert_allclose(rows, states[int(layer[1:] or 3)][0], atol=1e-4)
    assert embedding.fingerprint() != load_embedding(f"encoder={tmp_path}@2").fingerprint()
    with pytest.raises(UserError, match=r"has layers 0 to 3, not 4"):
        load_embedding(f"encoder={tmp_path}@4")


def test_mert_is_read_without_running_its_code(tmp_path, speech_config):
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**speech_config)).eval()
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=24000, do_normalize=True).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "mert_model", "auto_map": {"AutoModel": "modeling_MERT.MERTModel"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    embedding = load_embedding(f"encoder={tmp_path}@2")
    assert embedding.sampling_rate == 24000
    sound = sounds_of(6000)[0]
    normal = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    with torch.inference_mode():
        truth = model(torch.from_numpy(normal)[None], output_hidden_states=True).hidden_states[2][0]
    np.testing.assert_allclose(embedding.embed([sound])[0], truth, atol=1e-4)


def test_weights_that_are_not_there_are_not_made_up(tmp_path, speech_config):
    model = Wav2Vec2Model(Wav2Vec2Config(**speech_config))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no settings of its input"):
        load_embedding(f"encoder={tmp_path}")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    weights = model.state_dict()
    weights.pop("encoder.layers.1.attention.k_proj.bias")
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"encoder.layers.1.attention.k_proj.bias is not in it"):
        load_embedding(f"encoder={tmp_path}")
    with pytest.raises(UserError, match=r"cannot be loaded|no settings"):
        load_embedding("encoder=nobody/nothing")
    for name, message in [("encoder", "needs a model"), ("melody", "no embedding 'melody'; there are mel, clap"),
                          ("mel=file", "has no weights"), ("cnn14", "needs its weights")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_embedding(name)


def test_resampling_keeps_what_both_rates_can_hold():
    """soxr at high quality: a tone below 0.8 of the lower limit comes back, one above it is gone."""
    from tonefield.evaluation import AudioSet

    time = np.arange(48000) / 48000
    tones = [np.sin(2 * np.pi * f * time).astype(np.float32) for f in (3000.0, 9000.0)]
    kept, gone = AudioSet.of(tones, 48000).waveforms(16000)
    truth = np.sin(2 * np.pi * 3000 * np.arange(16000) / 16000)
    inner = slice(1000, -1000)
    assert 20 * np.log10(np.abs(kept - truth)[inner].max()) < -90
    assert 20 * np.log10(np.abs(gone)[inner].max()) < -90
    np.testing.assert_array_equal(kept, soxr.resample(tones[0], 48000, 16000, quality="HQ"))
