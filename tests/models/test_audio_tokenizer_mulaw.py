"""The mu-law tokenizer against librosa's compression and the bound of its error."""

import math

import librosa
import numpy as np
import pytest
import torch

from tonefield.models import MuLawTokenizer


def peak(sound, rate):
    """The frequency in Hz of the strongest bin."""
    spectrum = np.abs(np.fft.rfft(np.hanning(len(sound)) * sound, 2**18))
    return spectrum.argmax() * rate / 2**18


@pytest.mark.parametrize("mu", [15, 255])
def test_codes_are_the_nearest_compressed_levels(mu):
    x = torch.linspace(-1, 1, 20_001)[None]
    codes = MuLawTokenizer(mu=mu).encode(x, 8000)[0, 0]
    compressed = librosa.mu_compress(x[0].double().numpy(), mu=mu, quantize=False)
    exact = (compressed + 1) / 2 * mu
    assert np.abs(codes.numpy() - exact).max() < 0.5001
    assert codes.unique().tolist() == list(range(mu + 1))


@pytest.mark.parametrize("mu", [15, 255])
def test_the_error_keeps_its_bound_and_reaches_it(mu):
    tokenizer = MuLawTokenizer(mu=mu)
    x = torch.linspace(-1, 1, 200_001)[None]
    error = (tokenizer.decode(tokenizer.encode(x, 8000)) - x).abs()
    bound = (x.abs() + 1 / mu) * ((1 + mu) ** (1 / mu) - 1)
    assert (error <= bound * (1 + 1e-4)).all()
    assert (error / bound).max() > 0.999
    loud = tokenizer.decode(tokenizer.encode(torch.tensor([[-7.0, 7.0]]), 8000))
    assert loud.tolist() == [[-1, 1]]


def test_every_code_survives():
    tokenizer = MuLawTokenizer(hop_length=4)
    codes = torch.arange(256).view(1, 64, 4).transpose(1, 2)
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes), 8000), codes)


@pytest.mark.parametrize("samples", [1, 3, 4, 5, 8])
def test_frames_are_parallel_codebooks(samples):
    tokenizer, plain = MuLawTokenizer(hop_length=4), MuLawTokenizer()
    x = torch.rand(2, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x, 8000)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 4, tokenizer.num_frames(samples)) == (2, 4, math.ceil(samples / 4))
    sound = tokenizer.decode(codes)
    assert sound.shape == (2, 4 * codes.shape[2])
    torch.testing.assert_close(sound[:, :samples], plain.decode(plain.encode(x, 8000)), rtol=0, atol=0)
    assert sound[:, samples:].abs().max() < 1e-4 if samples % 4 else True  # what completes the frame is silent


def test_a_tone_of_another_rate_keeps_its_pitch():
    tone = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)[None] * 0.5
    tokenizer = MuLawTokenizer(sampling_rate=24000)
    codes = tokenizer.encode(tone, 16000)
    assert codes.shape[2] == 24000
    assert peak(tokenizer.decode(codes)[0].numpy(), 24000) == pytest.approx(440, rel=0.01)
    assert peak(tokenizer.decode(tokenizer.encode(tone, 24000))[0].numpy(), 24000) == pytest.approx(660, rel=0.01)


@pytest.mark.parametrize(("rate", "samples"), [(44100, 1), (44100, 7), (11025, 1), (8001, 999), (16000, 1001)])
def test_the_number_of_frames_of_another_rate(rate, samples):
    tokenizer = MuLawTokenizer(hop_length=4)
    expected = tokenizer.num_frames(math.ceil(samples * 8000 / rate))
    assert tokenizer.encode(torch.zeros(2, samples), rate).shape == (2, 4, expected)


def test_rows_are_silent_after_their_lengths():
    tokenizer = MuLawTokenizer(hop_length=4)
    x = torch.rand(2, 2, 40) * 2 - 1
    codes = tokenizer.encode(x, 8000, lengths=[10, 40])
    alone = tokenizer.encode(x[:1, :, :10], 8000)
    assert torch.equal(codes[:1, :, :3], alone)
    assert torch.equal(codes[1:], tokenizer.encode(x[1:], 8000))
    assert (codes[0, :, 3:] == 128).all()


def test_half_precision_keeps_the_levels():
    tokenizer = MuLawTokenizer()
    x = torch.rand(1, 100) * 2 - 1
    assert torch.equal(tokenizer.half().encode(x, 8000), MuLawTokenizer().encode(x, 8000))
    assert torch.equal(tokenizer.levels, MuLawTokenizer().levels)


def test_saving(tmp_path):
    tokenizer = MuLawTokenizer(sampling_rate=4000, hop_length=3, mu=63)
    tokenizer.save_pretrained(tmp_path)
    loaded = MuLawTokenizer.from_pretrained(tmp_path)
    assert (loaded.sampling_rate, loaded.num_codebooks, loaded.codebook_size) == (4000, 3, 64)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    others = [MuLawTokenizer(8000, 3, 63), MuLawTokenizer(4000, 1, 63), MuLawTokenizer(4000, 3, 255)]
    assert len({tokenizer.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_bad_input():
    tokenizer = MuLawTokenizer(hop_length=2)
    x = torch.zeros(2, 8)

    def refused(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    x[1, 3] = math.nan
    refused("Sample 3 of waveform 1 is not a finite number", tokenizer.encode, x, 8000)
    refused("samples per second, not '8k'", tokenizer.encode, x, "8k")
    refused(r"samples per second, not 0\.5", tokenizer.encode, x, 0.5)
    refused(r"\(batch, samples\), not \(8,\)", tokenizer.encode, x[0], 8000)
    refused(r"\(batch, samples\), not \(2, 0\)", tokenizer.encode, x[:, :0], 8000)
    refused("2 numbers from 1 to 8, not .0, 8.", tokenizer.encode, x, 8000, lengths=[0, 8])
    refused("2 numbers from 1 to 8, not .8.", tokenizer.encode, x, 8000, lengths=[8])
    codes = torch.zeros(1, 2, 3, dtype=torch.long)
    codes[0, 1, 2] = 256
    refused(r"0\.\.255; 256 at \[0, 1, 2\]", tokenizer.decode, codes)
    refused(r"0\.\.255; -1 at \[0, 0, 0\]", tokenizer.decode, codes * 0 - 1)
    refused(r"\(batch, 2, frames\), not \(1, 1, 3\)", tokenizer.decode, codes[:, :1])
    refused("Codes are integers, not torch.float32", tokenizer.decode, codes.float())
    refused("hop_length is at least 1, not 0", MuLawTokenizer, 8000, 0)
