"""EnCodec, DAC and Mimi in small, against what the classes of transformers themselves return."""

import math

import pytest
import torch
from transformers import (
    ClapConfig,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

from tonefield.models import TransformersCodec
from tonefield.models.codec_transformers import cross_fade


def make(kind):
    torch.manual_seed(0)
    if kind == "encodec":
        config = EncodecConfig(
            target_bandwidths=[7.2, 21.6], codebook_size=64, codebook_dim=16, hidden_size=16, num_filters=4,
            num_lstm_layers=1, upsampling_ratios=[5, 4],
        )  # fmt: skip
        model = EncodecModel(config).eval()
        with torch.no_grad():  # codebooks are all 0 before training: take what the encoder says of some noise
            vectors = model.encoder(torch.randn(1, 1, 64 * 20))[0].T
        for index, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.copy_((vectors - vectors.roll(index, 0) * (index > 0)) * 0.5**index)
        return model
    if kind == "dac":
        config = DacConfig(
            encoder_hidden_size=4, decoder_hidden_size=16, downsampling_ratios=[4, 5], upsampling_ratios=[5, 4],
            n_codebooks=3, codebook_size=64, codebook_dim=4, sampling_rate=24000, hop_length=20,
        )  # fmt: skip
        return DacModel(config).eval()
    config = MimiConfig(
        hidden_size=16, num_filters=4, codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16,
        num_quantizers=3, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, upsample_groups=16, sliding_window=20, upsampling_ratios=[5, 4], frame_rate=600,
    )  # fmt: skip
    model = MimiModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
        elif name.endswith("cluster_usage"):
            buffer.fill_(1)
    for layer in (layer for q in model.quantizer.children() for layer in q.layers):
        layer.codebook._embed = None
    return model


def direct(model, sound):
    """Codes of whole frames and their sound, by the words of each class."""
    x = sound[:, None]
    with torch.no_grad():
        if model.config.model_type == "encodec":
            codes = model.encode(x, bandwidth=21.6).audio_codes[0]
            return codes, model.decode(codes[None], [None]).audio_values[:, 0]
        if model.config.model_type == "dac":
            codes = model.encode(x).audio_codes
            return codes, model.decode(audio_codes=codes).audio_values
        codes = model.encode(x).audio_codes
        return codes, model.decode(codes).audio_values[:, 0]


KINDS = ("encodec", "dac", "mimi")


@pytest.fixture(scope="module")
def models():
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The models as transformers saves them, which is also how the Hub has them."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        models[kind].save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def codecs(folders):
    return {kind: TransformersCodec.from_transformers(str(folders[kind]), num_codebooks=3) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_frames_are_what_the_class_itself_says(kind, models, codecs):
    codec = codecs[kind]
    sound = 0.3 * torch.randn(2, 6 * codec.hop_length, generator=torch.Generator().manual_seed(1))
    codes, decoded = direct(models[kind], sound)
    ours = codec.encode(sound, codec.sampling_rate)
    assert torch.equal(ours, codes)
    assert ours.shape == (2, 3, 6)
    assert codes.unique().numel() > 5
    again = codec.decode(codes)
    assert again.shape == (2, 6 * codec.hop_length)
    torch.testing.assert_close(again[:, : decoded.shape[1]], decoded[:, : again.shape[1]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind, codecs):
    codec = codecs[kind]
    hop = codec.hop_length
    for samples in (1, hop - 1, hop, hop + 1, 3 * hop):
        codes = codec.encode(torch.randn(1, samples), codec.sampling_rate)
        assert codes.shape == (1, 3, codec.num_frames(samples)) == (1, 3, math.ceil(samples / hop))
        assert codec.decode(codes).shape == (1, codes.shape[2] * hop)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_has_the_same_codes_in_any_batch(kind, codecs):
    codec = codecs[kind]
    hop = codec.hop_length
    sound = 0.3 * torch.randn(4, 5 * hop, generator=torch.Generator().manual_seed(2))
    lengths = [5 * hop, 3 * hop - 7, 2 * hop + 1, hop]
    codes = codec.encode(sound, codec.sampling_rate, lengths)
    for row, length in enumerate(lengths):
        alone = codec.encode(sound[row : row + 1, :length], codec.sampling_rate)[0]
        assert torch.equal(codes[row, :, : alone.shape[1]], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tone_of_another_rate_has_the_codes_of_the_tone(kind, codecs):
    codec = codecs[kind]
    seconds = {rate: torch.arange(rate // 20) / rate for rate in (16000, 24000)}
    tone = {rate: 0.5 * torch.sin(2 * math.pi * 440 * time)[None] for rate, time in seconds.items()}
    own, other, wrong = (codec.encode(tone[a], b) for a, b in ((24000, 24000), (16000, 16000), (16000, 24000)))
    assert own.shape == other.shape
    agree = (own == other).float().mean().item()
    misread = (own[:, :, : wrong.shape[2]] == wrong).float().mean().item()
    assert agree > 0.9
    assert misread < agree - 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_codebooks_are_the_first_ones(kind, folders, codecs):
    codec = codecs[kind]
    sound = 0.3 * torch.randn(1, 4 * codec.hop_length, generator=torch.Generator().manual_seed(3))
    all_codes = codec.encode(sound, codec.sampling_rate)
    for count in (1, 2):
        fewer = TransformersCodec.from_transformers(str(folders[kind]), num_codebooks=count)
        codes = fewer.encode(sound, codec.sampling_rate)
        assert torch.equal(codes, all_codes[:, :count])
        assert fewer.decode(codes).shape == sound.shape
        assert fewer.fingerprint() != codec.fingerprint()
    usual = TransformersCodec.from_transformers(str(folders[kind]))
    assert usual.num_codebooks == (1 if kind == "encodec" else 3)  # EnCodec's own default is its lowest bandwidth


@pytest.mark.parametrize("kind", KINDS)
def test_saving_as_part_of_a_pipeline(kind, codecs, tmp_path):
    codec = codecs[kind]
    codec.save_pretrained(tmp_path)
    loaded = TransformersCodec.from_pretrained(tmp_path)
    assert loaded.fingerprint() == codec.fingerprint()
    assert (loaded.num_codebooks, loaded.codebook_size) == (3, 64)
    assert not loaded.training
    codes = torch.randint(0, 64, (1, 3, 4), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(loaded.decode(codes), codec.decode(codes), rtol=0, atol=0)
    with torch.no_grad():
        next(loaded.parameters()).mul_(1.01)
    assert loaded.fingerprint() != codec.fingerprint()


def test_cross_fade_of_a_cut_sound_is_the_sound():
    sound = torch.randn(2, 100)
    pieces = [sound[:, start : start + 40] for start in (0, 25, 50, 75)]
    torch.testing.assert_close(cross_fade(pieces, 15), sound)
    torch.testing.assert_close(cross_fade([sound[:, :60], sound[:, 60:]], 0), sound)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_chunks(kind, codecs):
    codec = codecs[kind]
    hop, frames = codec.hop_length, 70
    codes = torch.randint(0, 64, (2, 3, frames), generator=torch.Generator().manual_seed(5))
    whole, parts = codec.decode(codes), codec.decode(codes, chunk_frames=50, overlap_frames=20)
    assert parts.shape == whole.shape
    level = whole.square().mean().sqrt()
    error = (parts - whole).square().mean(0).sqrt() / level
    # The first chunk ends at frame 50, the second one begins at 30: before and after they stand alone.
    assert error[: 30 * hop].max() < 1e-3
    assert error[50 * hop :].mean() < 0.05
    assert error.mean() < 0.1
    torch.testing.assert_close(codec.decode(codes, chunk_frames=frames), whole, rtol=0, atol=0)
    assert codec.decode(codes, chunk_frames=9).shape == whole.shape


def test_bad_input(codecs, tmp_path):
    codec = codecs["dac"]

    def refused(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    refused(r"0\.\.63; 64 at \[0, 2, 1\]", codec.decode, torch.tensor([[[0, 1], [2, 3], [4, 64]]]))
    refused(r"\(batch, 3, frames\), not \(1, 2, 4\)", codec.decode, torch.zeros(1, 2, 4, dtype=torch.long))
    refused("overlap_frames is at most half of chunk_frames 4, not 3", codec.decode,
            torch.zeros(1, 3, 9, dtype=torch.long), 4, 3)  # fmt: skip
    refused("Sample 5 of waveform 0 is not a finite", codec.encode,
            torch.tensor([[0.0, 0, 0, 0, 0, math.inf]]), 24000)  # fmt: skip
    refused("not 44100.5", codec.encode, torch.zeros(1, 9), 44100.5)
    refused("num_codebooks is between 1 and 3 for this codec, not 4", TransformersCodec,
            codec.config.codec_config, 4)  # fmt: skip
    refused("'clap' is no codec that is known here: those are encodec, dac, mimi", TransformersCodec,
            ClapConfig().to_diff_dict())  # fmt: skip
    stereo = EncodecConfig(audio_channels=2, normalize=True, chunk_length_s=1.0, overlap=0.01, num_filters=4)
    refused("scales its input by numbers that are not in the codes: use a mono one", TransformersCodec,
            stereo.to_diff_dict())  # fmt: skip
