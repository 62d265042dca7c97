"""The trainable codec: its quantiser in closed form, its transform against numpy, and what a code may depend on."""

import itertools
import math

import numpy as np
import pytest
import torch

from tonefield.models import FSQCodec
from tonefield.models.codec_fsq import (
    PRESETS,
    codes_to_digits,
    digits_to_codes,
    istft,
    prepare_waveform,
    quantize,
    stft,
)
from tonefield.pipelines.tonefield_repository import copy_source


TINY = dict(
    sampling_rate=8000, hop_length=80, n_fft=320, levels=(8, 5, 5), width=24, encoder_layers=2, decoder_layers=2
)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = FSQCodec(**TINY).eval()
    with torch.no_grad():  # latents of mean 0 and variance 1 over some noise: codes tell sounds apart without training
        latents = codec._latents(noise(4, 2000)).flatten(0, 2)
        codec.to_latents[1].bias.sub_(latents.mean(0)).div_(latents.std(0))
        codec.to_latents[1].weight.div_(latents.std(0)[:, None])
    return codec


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The quantiser.


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (3, 7)])
def test_digits_and_codes_are_the_same_numbers(levels):
    size = math.prod(levels)
    codes = torch.arange(size)
    digits = codes_to_digits(codes, torch.tensor(levels, dtype=torch.float32))
    expected = [ds[::-1] for ds in itertools.product(*(range(L) for L in reversed(levels)))]
    assert digits.tolist() == [list(ds) for ds in expected]
    assert torch.equal(digits_to_codes(digits, torch.tensor(levels, dtype=torch.float32)), codes)


@pytest.mark.parametrize("L", [2, 3, 5, 8, 16])
def test_all_levels_are_reached_in_order_and_about_equally(L):
    levels = torch.tensor([float(L)])
    _, digits = quantize(torch.linspace(-100, 100, 20_001)[:, None], levels)
    assert digits.unique().tolist() == list(range(L))
    assert (digits.diff(dim=0) >= 0).all()
    latents = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    shares = quantize(latents, levels)[1].flatten().bincount(minlength=L) / 200_000
    assert (shares - 1 / L).abs().max() < 0.02


def test_values_are_even_and_gradients_those_of_the_squashing():
    levels = torch.tensor([8.0, 5.0])
    latents = torch.randn(500, 2, dtype=torch.float64, requires_grad=True)
    values, digits = quantize(latents, levels.double())
    torch.testing.assert_close(values, 2 * digits.double() / (levels - 1) - 1)
    values.sum().backward()
    s = torch.sigmoid(1.7 * latents.detach())
    torch.testing.assert_close(latents.grad, 2 / (levels.double() - 1) * levels * 1.7 * s * (1 - s))


# The transform.


@pytest.mark.parametrize(("n_fft", "hop"), [(320, 80), (32, 16), (30, 8)])
def test_frames_are_centred_on_their_hops_and_come_back(n_fft, hop):
    x = noise(2, 6 * hop).double()
    spectra = stft(x, n_fft, hop)
    assert spectra.shape == (2, 6, n_fft // 2 + 1)
    window = np.hanning(n_fft + 1)[:-1]
    window /= np.sqrt((window**2).sum())
    margin = (n_fft - hop) // 2
    padded = np.pad(x[1].numpy(), margin)
    expected = np.fft.rfft(padded[3 * hop : 3 * hop + n_fft] * window)
    np.testing.assert_allclose(spectra[1, 3].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(istft(spectra, n_fft, hop), x, atol=1e-5, rtol=1e-5)


# The codec.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_small_and_fine(name):
    codec = FSQCodec.from_preset(name)
    assert 1e6 < codec.num_parameters() < 5e6
    assert codec.codebook_size in (1000, 4096)
    codes = codec.encode(noise(1, 1000), codec.sampling_rate)
    assert codes.shape == (1, 1, math.ceil(1000 / codec.hop_length))


@pytest.mark.parametrize("samples", [1, 79, 80, 81, 400])
@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_lengths(samples, num_codebooks):
    torch.manual_seed(0)
    codec = FSQCodec(**TINY, num_codebooks=num_codebooks)
    codes = codec.encode(noise(2, samples), 8000)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, num_codebooks, codec.num_frames(samples)) == (2, num_codebooks, math.ceil(samples / 80))
    assert codec.decode(codes).shape == (2, codes.shape[2] * 80)
    output = codec(noise(2, samples))
    assert output.sample.shape == (2, samples)
    torch.testing.assert_close(output.sample, codec.decode(codes)[:, :samples])
    assert torch.equal(output.codes, codes)


def test_every_code_can_be_decoded_and_sounds_different(codec):
    codes = torch.arange(200)[:, None, None].expand(-1, 1, 2)
    sounds = codec.decode(codes)
    assert torch.cdist(sounds, sounds).add(torch.eye(200)).min() > 1e-6


def test_a_sound_has_the_same_codes_in_any_batch(codec):
    sound, lengths = noise(4, 2000), [2000, 1234, 80, 1]
    garbage = sound.clone()
    for row, length in enumerate(lengths):
        garbage[row, length:] = 10.0
    codes = codec.encode(garbage, 8000, lengths)
    assert codes.unique().numel() > 20
    for row, length in enumerate(lengths):
        alone = codec.encode(sound[row : row + 1, :length], 8000)[0]
        assert torch.equal(codes[row, :, : alone.shape[1]], alone)


def test_gradients_reach_every_parameter(codec):
    codec.zero_grad()
    codec(noise(2, 800)).sample.square().mean().backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_decoding_in_chunks_changes_nothing(codec):
    codes = torch.randint(0, 200, (2, 1, 100), generator=torch.Generator().manual_seed(0))
    whole = codec.decode(codes)
    for chunk in (7, 50, 99, 1000):
        torch.testing.assert_close(codec.decode(codes, chunk_frames=chunk), whole, rtol=0, atol=1e-6)


def test_another_rate_is_resampled(codec):
    tone = {rate: 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(rate) / rate)[None] for rate in (8000, 16000)}
    resampled, _ = prepare_waveform(tone[16000], 16000, 8000)
    torch.testing.assert_close(resampled[:, 100:-100], tone[8000][:, 100:-100], rtol=0, atol=1e-3)
    sound = noise(1, 3000)
    resampled, lengths = prepare_waveform(sound, 16000, 8000, [2001])
    assert lengths.tolist() == [1001]
    codes = codec.encode(sound, 16000, [2001])[:, :, :13]
    assert torch.equal(codes, codec.encode(resampled[:, :1001], 8000))
    assert torch.equal(codes, codec.encode(sound[:, :2001], 16000))
    assert not torch.equal(codes, codec.encode(sound[:, :1001], 8000))


def test_half_precision(codec, tmp_path):
    half = FSQCodec(**TINY).to(torch.bfloat16)
    codes = half.encode(noise(1, 800), 8000)
    sound = half.decode(codes)
    assert sound.dtype == torch.float32
    assert sound.isfinite().all()


def test_saving(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = FSQCodec.from_pretrained(tmp_path)
    assert loaded.fingerprint() == codec.fingerprint()
    codes = loaded.encode(noise(1, 800), 8000)
    assert torch.equal(codes, codec.encode(noise(1, 800), 8000))
    torch.testing.assert_close(loaded.decode(codes), codec.decode(codes), rtol=0, atol=0)
    with torch.no_grad():
        loaded.head[1].bias[0] += 1e-3
    assert loaded.fingerprint() != codec.fingerprint()


@pytest.mark.parametrize("name", ["FSQCodec", "MuLawTokenizer", "TransformersCodec"])
def test_the_file_can_travel_with_a_repository(name, tmp_path):
    import tonefield

    module = copy_source(getattr(tonefield, name), tmp_path, siblings=False)
    assert [path.stem for path in tmp_path.iterdir()] == [module]


def test_bad_input(codec):
    def refused(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    refused("Sample 2 of waveform 0 is not a finite number", codec.encode, torch.tensor([[0, 0, math.nan]]), 8000)
    refused("not None", codec.encode, torch.zeros(1, 9), None)
    refused(r"0\.\.199; 200 at \[0, 0, 1\]", codec.decode, torch.tensor([[[0, 200]]]))
    refused(r"\(batch, 1, frames\), not \(1, 2, 2\)", codec.decode, torch.zeros(1, 2, 2, dtype=torch.long))
    refused("no codec preset 'music'; the presets are digits-8k, music-24k", FSQCodec.from_preset, "music")
    refused("n_fft=100 with hop_length=80", FSQCodec, 8000, 80, 100)
    refused("n_fft=321 with hop_length=80", FSQCodec, 8000, 80, 321)
    refused(r"levels are numbers from 2 on, not \(8, 1\)", FSQCodec, 8000, 80, 320, (8, 1))
    refused("kernel_size is odd, not 4", FSQCodec, kernel_size=4)
