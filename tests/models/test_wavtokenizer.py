"""WavTokenizer: what a code may depend on, windows and batches. That it is the original, its importer shows."""

import math

import numpy as np
import pytest
import torch

from tonefield.models import WavTokenizer, load_audio_tokenizer, wavtokenizer
from tonefield.pipelines.tonefield_repository import copy_source


# Frames of 40 samples, ten per second, so that a window of 20 seconds has 200 of them.
TINY = dict(
    sampling_rate=400, strides=(2, 4, 5), encoder_width=4, latent_dim=12, codebook_size=50, width=64, inner_width=48,
    num_layers=2, n_fft=160,
)  # fmt: skip


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = WavTokenizer(**TINY).eval()
    with torch.no_grad():  # codes that tell sounds apart without training
        vectors = codec.embed(noise(1, 2000), torch.tensor([2000]))[0]
        codec.codebook.weight.copy_(vectors[torch.randperm(50)])
    return codec


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(codec, sound):
    return codec.embed(sound[None], torch.tensor([len(sound)]))[0]


def random_codes(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


# Encoding


def test_what_follows_a_row_changes_nothing(codec):
    lengths = [1, 2, 3, 7, 39, 40, 41, 333, 399, 400]
    sounds = noise(len(lengths), 400)  # noise, not silence, after the ends
    together = codec.embed(sounds, torch.tensor(lengths))
    codes = codec.encode(sounds, 400, lengths)
    for row, length in enumerate(lengths):
        frames = codec.num_frames(length)
        assert frames == math.ceil(length / 40)
        alone = vectors(codec, sounds[row, :length])
        assert alone.shape == (frames, 12)
        torch.testing.assert_close(together[row, :frames], alone, rtol=0, atol=1e-6)
        assert torch.equal(codes[row, :, :frames], codec.encode(sounds[row : row + 1, :length], 400)[0])
        assert not codes[row, :, frames:].any()
    assert codes.shape == (len(lengths), 1, 10)


def test_windows_change_nothing(codec, monkeypatch):
    lengths = torch.tensor([4000, 3999, 1601, 1600, 1599, 1570, 1, 2400])
    sounds = noise(8, 4000, seed=1)
    codes = codec.encode(sounds, 400, lengths)
    windowed = codec.embed(sounds, lengths)
    shapes = []
    monkeypatch.setattr(codec.encoder_in, "forward", spy(codec.encoder_in.forward, shapes))
    for seconds, windows in ((4, 3), (1, 10), (1000, 1)):
        monkeypatch.setattr(wavtokenizer, "WINDOW_SECONDS", seconds)
        shapes.clear()
        other = codec.embed(sounds, lengths)
        assert len(shapes) == windows and max(shapes) <= 400 * seconds + 2 * 80
        for row, length in enumerate(lengths):
            frames = codec.num_frames(length.item())
            torch.testing.assert_close(other[row, :frames], windowed[row, :frames], rtol=0, atol=2e-6)
        assert torch.equal(codec.encode(sounds, 400, lengths), codes)


def spy(forward, lengths):
    def watched(x, *arguments):
        lengths.append(x.shape[-1])
        return forward(x, *arguments)

    return watched


def test_the_nearest_vector_is_chosen(codec):
    sound = noise(1, 4000, seed=3)
    found = vectors(codec, sound[0]).double()
    distances = (found[:, None] - codec.codebook.weight.double()).square().sum(-1)
    codes = codec.encode(sound, 400)[0, 0]
    assert torch.equal(codes, distances.argmin(1))
    assert len(codes.unique()) > 20


def test_a_code_depends_on_the_past_and_two_frames_of_the_future(codec):
    sound = noise(1, 2000)[0]
    sound.requires_grad_()
    with torch.enable_grad():
        embedding = WavTokenizer.embed.__wrapped__(codec, sound[None], torch.tensor([2000]))
        embedding[0, 20].sum().backward()
    (touched,) = sound.grad.nonzero(as_tuple=True)
    assert touched.min() == 0  # the recurrent layer
    assert touched.max() < 26 * 40  # three frames of the last convolution, and what the first ones reach


# Decoding


def test_windows_of_sound_are_joined(codec):
    codes = random_codes(2, 1, 50)
    starts = {0: 20, 16: 36, 32: 50}
    weights, expected = np.zeros(2000), np.zeros((2, 2000))
    for start, end in starts.items():
        weight = np.ones(40 * (end - start))
        rise = (np.arange(160) + 0.5) / 160
        weight[:160] *= rise if start else 1
        weight[-160:] *= rise[::-1] if end < 50 else 1
        expected[:, 40 * start : 40 * end] += weight * codec.decode(codes[..., start:end]).numpy()
        weights[40 * start : 40 * end] += weight
    np.testing.assert_allclose(weights, 1)
    sound = codec.decode(codes, chunk_frames=20, overlap_frames=4)
    np.testing.assert_allclose(sound, expected, atol=1e-6)
    torch.testing.assert_close(codec.decode(codes, chunk_frames=50), codec.decode(codes), rtol=0, atol=0)
    assert (codec.decode(codes, chunk_frames=20) - codec.decode(codes)).abs().max() > 1e-3  # all frames are seen
    longer = random_codes(1, 1, 201)
    expected = codec.decode(longer, chunk_frames=200, overlap_frames=25)
    torch.testing.assert_close(codec.decode(longer), expected, rtol=0, atol=0)
    assert (codec.decode(longer) - codec.decode(longer, chunk_frames=201)).abs().max() > 1e-3


def test_padded_codes(codec):
    codes, lengths = random_codes(4, 1, 30), [30, 1, 17, 17]
    sound = codec.decode(codes, lengths=lengths)
    windows = codec.decode(codes, 10, 2, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = codes[row : row + 1, :, :length]
        torch.testing.assert_close(sound[row, : 40 * length], codec.decode(alone)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(windows[row, : 40 * length], codec.decode(alone, 10, 2)[0], rtol=0, atol=1e-6)
        assert not sound[row, 40 * length :].any()
    for count in (1, 2, 5):
        assert codec.decode(random_codes(1, 1, count)).shape == (1, 40 * count)


def test_loud_spectra_are_limited(codec):
    loud = WavTokenizer(**TINY).eval()
    with torch.no_grad():
        loud.head.weight.zero_()
        loud.head.bias.zero_()
        loud.head.bias[:81] = 1000
    sound = loud.decode(random_codes(1, 1, 9))
    limit = np.fft.irfft(np.full(81, 100.0))  # an impulse in each window, at its edge, where the window is 0
    assert sound.isfinite().all() and sound.abs().max() <= np.abs(limit).max()


# The contract of audio tokenizers


def test_saving(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    loaded = load_audio_tokenizer(tmp_path / "codec")
    assert type(loaded) is WavTokenizer
    assert loaded.fingerprint() == codec.fingerprint()
    assert (loaded.sampling_rate, loaded.hop_length, loaded.num_codebooks, loaded.codebook_size) == (400, 40, 1, 50)
    codes = loaded.encode(noise(1, 800), 400)
    assert torch.equal(codes, codec.encode(noise(1, 800), 400))
    torch.testing.assert_close(loaded.decode(codes), codec.decode(codes), rtol=0, atol=0)
    with torch.no_grad():
        loaded.codebook.weight[7, 3] += 1e-3
    assert loaded.fingerprint() != codec.fingerprint()
    copy_source(WavTokenizer, tmp_path, siblings=False)
    assert (tmp_path / "wavtokenizer.py").exists()


def test_stereo_of_another_rate(codec):
    stereo = noise(2, 2, 1601)
    codes = codec.encode(stereo, 800, [1601, 1000])
    mono, lengths = wavtokenizer.prepare_waveform(stereo, 800, 400, [1601, 1000])
    assert (codes.shape, lengths.tolist()) == ((2, 1, 21), [801, 500])
    assert torch.equal(codes, codec.encode(mono, 400, lengths))


def test_half_precision():
    half = WavTokenizer(**TINY).to(torch.bfloat16).eval()
    codes = half.encode(noise(2, 800), 400)
    sound = half.decode(codes)
    assert sound.dtype == torch.float32 and sound.isfinite().all()


def test_sizes():
    with torch.device("meta"):
        codec = WavTokenizer()
    count = sum(parameter.numel() for parameter in codec.parameters())
    assert (count, codec.hop_length, codec.num_frames(24001)) == (73_784_690, 320, 76)
    with torch.device("meta"):
        assert WavTokenizer(strides=(4, 5, 5, 6), n_fft=2400).hop_length == 600


def test_bad_input(codec):
    def refused(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    refused("Sample 2 of waveform 0 is not a finite number", codec.encode, torch.tensor([[0, 0, math.nan]]), 400)
    refused(r"0\.\.49; 50 at \[0, 0, 1\]", codec.decode, torch.tensor([[[0, 50]]]))
    refused(r"\(batch, 1, frames\), not \(1, 2, 2\)", codec.decode, torch.zeros(1, 2, 2, dtype=torch.long))
    refused("not 9 and 5", codec.decode, random_codes(1, 1, 20), 9, 5)
    refused("not 0 and 0", codec.decode, random_codes(1, 1, 20), 0)
    refused(
        r"lengths are 2 numbers from 1 to 20, not \[20, 21\]", codec.decode, random_codes(2, 1, 20), lengths=[20, 21]
    )
    refused(
        "n_fft 60 must be even and at least two hops long, and the hop of 40", WavTokenizer, **TINY | dict(n_fft=60)
    )
    refused("width is a multiple of 32, not 40", WavTokenizer, **TINY | dict(width=40))
