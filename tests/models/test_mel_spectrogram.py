"""The mel front end against librosa, diffusers' BigVGAN mel, BigVGAN's own mel, and arithmetic."""

import math
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMelSpectrogram
from safetensors.torch import load_file

from tonefield import MelSpectrogram
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.models import mel_spectrogram
from tonefield.models.mel_spectrogram import PRESETS


ASSETS = Path(__file__).parents[1] / "assets"
BIGVGAN = [name for name in PRESETS if name.startswith("bigvgan")]


def music(mel: MelSpectrogram, slices: int = 1) -> torch.Tensor:
    seconds = slices * mel.slice_samples / mel.config.sample_rate
    return torch.stack([torch.from_numpy(synthesize(kind, seconds, mel.config.sample_rate)) for kind in KINDS])


def decibels(mel: MelSpectrogram, encoded: torch.Tensor) -> torch.Tensor:
    low, high = mel.value_range
    return (encoded[:, 0] + 1) * (high - low) / 2 + low


def librosa_power(mel: MelSpectrogram, waveform: torch.Tensor) -> np.ndarray:
    c = mel.config
    return librosa.feature.melspectrogram(
        y=waveform.double().numpy(), sr=c.sample_rate, n_fft=c.n_fft, hop_length=c.hop_length, n_mels=c.n_mels,
        fmin=c.f_min, fmax=c.f_max, pad_mode="constant", dtype=np.float64,
    )  # fmt: skip


# ----- against independent implementations


@pytest.mark.parametrize("sample_rate, n_fft, n_mels, f_min, f_max", [
    (22050, 1024, 80, 0, 11025), (44100, 2048, 128, 0, 22050), (22050, 1024, 80, 0, 8000), (8000, 512, 64, 20, 3900),
])  # fmt: skip
def test_filterbank_is_librosas(sample_rate, n_fft, n_mels, f_min, f_max):
    ours = mel_spectrogram.mel_filterbank(sample_rate, n_fft, n_mels, f_min, f_max).numpy()
    theirs = librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max, dtype=np.float64)
    np.testing.assert_allclose(ours, theirs, atol=1e-14)


def test_bands_on_the_scale_of_htk():
    options = dict(n_fft=1024, n_mels=64, f_min=20, f_max=8000)
    htk = MelSpectrogram(16000, **options, mel_scale="htk")
    theirs = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=20, fmax=8000, htk=True)
    np.testing.assert_allclose(htk.filterbank.numpy(), theirs, atol=1e-8)
    assert not torch.equal(htk.half().filterbank, MelSpectrogram(16000, **options).filterbank)
    np.testing.assert_allclose(htk.half().filterbank.numpy(), theirs, atol=1e-8)
    assert htk.fingerprint() != MelSpectrogram(16000, **options).fingerprint()
    with pytest.raises(ValueError, match="mel_scale is 'slaney' or 'htk', not 'bark'"):
        MelSpectrogram(16000, **options, mel_scale="bark")


@pytest.mark.parametrize("name", ["fsdd-64", "sc09-64", "sc09-128", "image-22k"])
def test_image_method_is_librosas_decibels(name):
    mel = MelSpectrogram.from_preset(name)
    waveform = music(mel)
    theirs = librosa.power_to_db(librosa_power(mel, waveform), ref=mel.full_scale_power, amin=1e-20, top_db=None)
    assert (theirs > -80).mean() > 0.4 and theirs.max() < 0
    assert np.abs(decibels(mel, mel.encode(waveform)).numpy() - theirs.clip(-80, 0)).max() < 1e-3


def test_reference_of_a_slice_is_librosas_maximum_and_keeps_the_level():
    mel = MelSpectrogram.from_preset("fsdd-64", ref="slice")
    waveform = music(mel) * torch.tensor([[1.0], [0.1], [0.003]])
    encoded, reference = mel.encode(waveform, return_reference=True)
    power = librosa_power(mel, waveform)
    for row in range(3):
        theirs = librosa.power_to_db(power[row], ref=np.max, top_db=80)
        assert np.abs(decibels(mel, encoded)[row].numpy() - theirs).max() < 1e-3
    expected = 10 * np.log10(power.max((1, 2)) / mel.full_scale_power)
    np.testing.assert_allclose(reference.numpy(), expected, atol=1e-3)

    decoded = mel.decode(encoded, reference=reference, generator=torch.Generator().manual_seed(0))
    level = 10 * torch.log10(decoded.square().mean(1) / waveform.square().mean(1))
    assert level.abs().max() < 0.5
    torch.testing.assert_close(mel.decode(encoded).abs().amax(1), torch.full((3,), 0.95))  # level unknown


@pytest.mark.parametrize("name", [name for name in BIGVGAN if PRESETS[name]["f_max"] is None])
def test_bigvgan_method_is_diffusers_front_end(name):
    mel = MelSpectrogram.from_preset(name)
    c = mel.config
    # Noise as in a poor recording: without it, bins that hold little but rounding errors are compared.
    waveform = music(mel) + 1e-2 * torch.randn(3, mel.slice_samples, generator=torch.Generator().manual_seed(0))
    theirs = MMAudioMelSpectrogram(c.sample_rate, c.n_fft, c.n_mels, c.hop_length)(waveform)
    assert theirs.min() < -6 and theirs.max() > -1
    torch.testing.assert_close(decibels(mel, mel.encode(waveform)), theirs.clamp(max=2.1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe, name", [
    ("22khz_80band_fmax8000", "bigvgan_v2_22khz_80band_fmax8k_256x"),
    ("22khz_80band_fmax8000", "bigvgan_22khz_80band"),
    ("44khz_128band_512x", "bigvgan_v2_44khz_128band_512x"),
])  # fmt: skip
def test_bigvgan_method_is_bigvgans_own(recipe, name):
    golden = load_file(ASSETS / "bigvgan_mel.safetensors")
    mel = MelSpectrogram.from_preset(name)
    ours = decibels(mel, mel.encode(golden[f"{recipe}.waveform"]))
    theirs = golden[f"{recipe}.log_mel_float64"]
    torch.testing.assert_close(ours, theirs.clamp(max=2.1), atol=5e-5, rtol=0)


# ----- lengths


@pytest.mark.parametrize("num_samples, frames", [(1, 1), (127, 1), (128, 2), (64 * 128 - 1, 64), (64 * 128, 65)])
def test_image_frames(num_samples, frames):
    mel = MelSpectrogram.from_preset("fsdd-64")
    assert mel.encode(torch.randn(2, num_samples)).shape == (2, 1, 64, frames)


@pytest.mark.parametrize("num_samples, frames", [(25600, 100), (25700, 100), (1024, 4), (100, 4)])
def test_bigvgan_frames(num_samples, frames):
    mel = MelSpectrogram.from_preset("bigvgan_24khz_100band")
    assert mel.encode(torch.randn(2, num_samples)).shape == (2, 1, 100, frames)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_full_bands_and_slices_of_num_frames(name):
    mel = MelSpectrogram.from_preset(name)
    assert (mel.filterbank.sum(1) > 0).all()
    encoded = mel.encode(torch.randn(1, mel.slice_samples))
    assert encoded.shape == (1, 1, mel.config.n_mels, mel.config.num_frames)
    assert mel.decode(encoded, n_iter=1).shape == (1, mel.slice_samples)
    seconds = mel.slice_samples / mel.config.sample_rate
    assert mel.frames_for(seconds) == mel.config.num_frames


@pytest.mark.parametrize("name", ["fsdd-64", "bigvgan_v2_24khz_100band_256x"])
@pytest.mark.parametrize("length", [0.3, 1.0, 1.01, 3.0, 3.7])
def test_slices_put_together_are_the_waveform(name, length):
    mel = MelSpectrogram.from_preset(name)
    size = mel.slice_samples
    waveform = torch.arange(1, round(length * size) + 1, dtype=torch.float32)
    padded = mel.slices(waveform, "pad").flatten()
    assert torch.equal(padded[: len(waveform)], waveform) and not padded[len(waveform) :].any()
    assert len(padded) == size * math.ceil(len(waveform) / size)
    dropped = mel.slices(waveform, "drop")
    assert torch.equal(dropped.flatten(), waveform[: len(waveform) // size * size])
    overlapping = mel.slices(waveform, "overlap")
    assert len(overlapping) == math.ceil(len(waveform) / size)
    if len(waveform) >= size:
        assert torch.equal(overlapping[-1], waveform[-size:])
        assert overlapping.unique().numel() == len(waveform)  # every sample, and no silence


# ----- pitch and level


def band_of(mel: MelSpectrogram, frequency: float) -> int:
    c = mel.config
    centres = librosa.mel_frequencies(c.n_mels + 2, fmin=c.f_min, fmax=c.f_max or c.sample_rate / 2)[1:-1]
    return int(np.abs(centres - frequency).argmin())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fsdd-64"])
@pytest.mark.parametrize("frequency", [440, 5000])
def test_a_sine_lands_in_its_band_before_and_after_a_round_trip(name, frequency):
    mel = MelSpectrogram.from_preset(name, num_frames=64)
    time = torch.arange(mel.slice_samples) / mel.config.sample_rate
    sine = 0.5 * torch.sin(2 * math.pi * frequency * time)[None]
    encoded = mel.encode(sine)
    decoded = mel.decode(encoded, generator=torch.Generator().manual_seed(0))
    for heard in encoded, mel.encode(decoded):
        assert heard[0, 0, :, 8:-8].mean(1).argmax() == band_of(mel, frequency)
    if mel.config.method == "image":  # a band of magnitudes does not tell a tone from noise of another level
        assert abs(10 * math.log10(decoded.square().mean() / sine.square().mean())) < 0.5


@pytest.mark.parametrize("name", ["fsdd-64", "image-22k"])
def test_zero_decibels_is_the_loudest_band_of_a_full_scale_sine(name):
    mel = MelSpectrogram.from_preset(name)
    c = mel.config
    time = np.arange(8 * c.n_fft) / c.sample_rate
    sines = np.sin(2 * np.pi * np.arange(2, 130)[:, None] * c.sample_rate / c.n_fft * time)
    loudest = librosa_power(mel, torch.from_numpy(sines))[:, :, 8:-8].max()
    assert abs(10 * math.log10(loudest / mel.full_scale_power)) < 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_decode_restores_length_and_level(name):
    mel = MelSpectrogram.from_preset(name)
    waveform = music(mel)
    decoded = mel.decode(mel.encode(waveform), generator=torch.Generator().manual_seed(0))
    assert decoded.shape == waveform.shape
    assert (10 * torch.log10(decoded.square().mean(1) / waveform.square().mean(1))).abs().max() < 0.5


def mel_error(mel: MelSpectrogram, encoded: torch.Tensor, decoded: torch.Tensor) -> float:
    """Root of the mean squared error in dB of the mel of a decoded waveform."""
    return (decibels(mel, encoded) - decibels(mel, mel.encode(decoded))).square().mean().sqrt().item()


@pytest.mark.parametrize("source", ["music", "digits"])
def test_decode_is_no_worse_than_librosa(source, digit_files):
    if source == "music":
        mel = MelSpectrogram.from_preset("image-22k", n_fft=1024, n_mels=80, num_frames=128)
        waveform = music(mel)
    else:
        mel = MelSpectrogram.from_preset("fsdd-64")
        clips = [librosa.load(file, sr=8000)[0] for file in digit_files[:8]]
        waveform = torch.from_numpy(
            np.stack([librosa.util.fix_length(clip, size=mel.slice_samples) for clip in clips])
        )
    c = mel.config
    encoded = mel.encode(waveform)
    power = mel.full_scale_power * 10 ** (decibels(mel, encoded).numpy() / 10)
    theirs = [
        librosa.feature.inverse.mel_to_audio(
            p, sr=c.sample_rate, n_fft=c.n_fft, hop_length=c.hop_length, pad_mode="constant", n_iter=32
        )
        for p in power
    ]
    theirs = torch.from_numpy(np.stack([librosa.util.fix_length(y, size=mel.slice_samples) for y in theirs]))
    ours = mel.decode(encoded, n_iter=32, generator=torch.Generator().manual_seed(0))
    assert mel_error(mel, encoded, ours) < mel_error(mel, encoded, theirs)
    assert mel_error(mel, encoded, ours) < 2.5
    # More iterations come nearer, and none at all are clearly worse.
    few = mel.decode(encoded, n_iter=4, generator=torch.Generator().manual_seed(0))
    assert mel_error(mel, encoded, ours) < mel_error(mel, encoded, few)


# ----- the pieces of the inverse


def test_istft_is_the_inverse_of_stft():
    for n_fft, hop in (512, 128), (400, 160), (1024, 512):
        window = torch.hann_window(n_fft, dtype=torch.float64)
        signal = torch.randn(2, n_fft + 20 * hop, dtype=torch.float64)
        again = mel_spectrogram.istft(mel_spectrogram.stft(signal, window, hop), window, hop)
        inner = slice(n_fft, -n_fft)  # at the very ends the window is zero
        torch.testing.assert_close(again[:, inner], signal[:, inner], atol=1e-12, rtol=0)


def test_istft_is_the_least_squares_signal():
    """For spectra that no signal has, no other signal comes nearer: the gradient of the distance is zero."""
    window = torch.hann_window(64, dtype=torch.float64)
    frames = torch.randn(1, 12, 33, dtype=torch.complex128)
    frames[..., [0, -1]] = frames[..., [0, -1]].real.to(frames.dtype)
    signal = mel_spectrogram.istft(frames, window, 16).requires_grad_()
    distance = torch.fft.irfft(frames, n=64) - signal.unfold(-1, 64, 16) * window
    distance.square().sum().backward()
    assert signal.grad[:, 1:-1].abs().max() < 1e-10


def test_griffin_lim_converges_on_true_magnitudes():
    mel = MelSpectrogram.from_preset("fsdd-64")
    window = torch.hann_window(512)
    magnitude = mel_spectrogram.stft(music(mel), window, 128).abs()
    phases = torch.sgn(torch.randn(magnitude.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))

    def convergence(n_iter, momentum):
        signal = mel_spectrogram.griffin_lim(magnitude, window, 128, n_iter, phases, momentum)
        error = (mel_spectrogram.stft(signal, window, 128).abs() - magnitude).norm() / magnitude.norm()
        return 20 * math.log10(error)

    plain = [convergence(n, 0.0) for n in (0, 1, 2, 4, 8, 16, 32)]
    assert plain == sorted(plain, reverse=True)  # Griffin-Lim never increases the error
    assert convergence(32, 0.99) < plain[-1] - 2  # and the fast one is faster
    assert convergence(32, 0.99) < -20


def test_invert_filterbank():
    bank = mel_spectrogram.mel_filterbank(22050, 1024, 80, 0, 8000)
    spectrum = torch.rand(50, 513, dtype=torch.float64).pow(4)
    mel = spectrum @ bank.T

    def divergence(n_iter):
        found = mel_spectrogram.invert_filterbank(mel, bank, n_iter) @ bank.T
        return (mel * (mel / found).log() - mel + found).sum().item()

    found = mel_spectrogram.invert_filterbank(mel, bank)
    assert (found >= 0).all()
    assert not found[:, bank.sum(0) == 0].any()
    divergences = [divergence(n) for n in range(12)]
    assert divergences == sorted(divergences, reverse=True)
    assert 20 * math.log10((found @ bank.T - mel).norm() / mel.norm()) < -35
    assert not mel_spectrogram.invert_filterbank(torch.zeros_like(mel), bank).any()
    # A bank with an inverse gives the spectrum itself.
    square = torch.eye(6, dtype=torch.float64) + 0.1 * torch.rand(6, 6, dtype=torch.float64)
    spectrum = torch.rand(5, 6, dtype=torch.float64)
    torch.testing.assert_close(mel_spectrogram.invert_filterbank(spectrum @ square.T, square, 2000), spectrum)


# ----- unusual input


@pytest.mark.parametrize("name", ["fsdd-64", "bigvgan_v2_24khz_100band_256x"])
def test_silence_is_the_floor_and_comes_back_as_silence(name):
    mel = MelSpectrogram.from_preset(name)
    silence = mel.encode(torch.zeros(1, mel.slice_samples))
    assert (silence == -1).all()
    assert not mel.decode(silence).any()
    if mel.config.method == "bigvgan":
        torch.testing.assert_close(decibels(mel, silence), torch.full_like(silence[0], -11.512925))


def test_silence_relative_to_itself_is_white():
    mel = MelSpectrogram.from_preset("fsdd-64", ref="slice")
    encoded, reference = mel.encode(torch.zeros(1, mel.slice_samples), return_reference=True)
    assert np.array(mel.to_image(encoded)[0]).min() == 255
    assert mel.decode(encoded, reference=reference).abs().max() < 1e-4


def test_channels_are_averaged_and_loud_samples_saturate():
    mel = MelSpectrogram.from_preset("fsdd-64")
    stereo = torch.stack([music(mel), music(mel).flip(0)], dim=1)
    assert torch.equal(mel.encode(stereo), mel.encode(stereo.mean(1)))
    assert mel.encode(1000 * music(mel)).max() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_no_numbers_are_refused(value):
    waveform = torch.zeros(3, 1000)
    waveform[1, 700] = value
    with pytest.raises(ValueError, match="Sample 700 of waveform 1 is not a finite number"):
        MelSpectrogram.from_preset("fsdd-64").encode(waveform)


@pytest.mark.parametrize("arguments, message", [
    (dict(n_fft=512, n_mels=256, sample_rate=22050), "39 of 256 mel bands .* n_fft=1024"),
    (dict(n_fft=256, hop_length=64, n_mels=128, sample_rate=22050), "20 of 128 mel bands"),
    (dict(method="wavelet"), "method is 'image' or 'bigvgan', not 'wavelet'"),
    (dict(ref="slice", method="bigvgan"), "ref is 'fixed'"),
    (dict(hop_length=0), "hop_length must be positive, not 0"),
    (dict(hop_length=800), "hop_length 800 must be at most"),
    (dict(f_max=20000), "not f_min=0.0, f_max=20000"),
    (dict(value_range=(0, -80)), "value_range must rise"),
])  # fmt: skip
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MelSpectrogram(**arguments)


def test_wrong_shapes_and_names_are_refused():
    mel = MelSpectrogram.from_preset("fsdd-64")
    with pytest.raises(ValueError, match=r"shape \(batch, samples\), not \(5,\)"):
        mel.encode(torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(batch, 1, 64, frames\), not \(1, 1, 80, 64\)"):
        mel.decode(torch.zeros(1, 1, 80, 64))
    with pytest.raises(ValueError, match="pad is 'pad', 'overlap' or 'drop'"):
        mel.slices(torch.zeros(5), "mirror")
    with pytest.raises(ValueError, match="no mel preset 'fsdd'; the presets are image-22k"):
        MelSpectrogram.from_preset("fsdd")


# ----- pictures


def test_pictures_come_back_to_within_half_a_grey_level():
    mel = MelSpectrogram.from_preset("fsdd-64", mean=-0.4, std=0.5)
    encoded = mel.encode(music(mel))
    pictures = mel.to_image(encoded)
    assert [picture.size for picture in pictures] == [(64, 64)] * 3 and pictures[0].mode == "L"
    error = decibels(mel, mel.unstandardize(mel.from_image(pictures))) - decibels(mel, mel.unstandardize(encoded))
    assert error.abs().max() <= 40 / 255 + 1e-4
    assert 0.05 < error[:, encoded[0, 0] > -1].square().mean().sqrt() < 0.1  # 80 / 255 / sqrt(12) dB
    lowest_band = np.array(pictures[0])[0]
    expected = np.floor((decibels(mel, mel.unstandardize(encoded))[0, 0].numpy() + 80) * 255 / 80 + 0.5)
    np.testing.assert_array_equal(lowest_band, expected)


# ----- a component of a pipeline


def test_standardisation_is_applied_by_encode_and_undone_by_decode():
    plain = MelSpectrogram.from_preset("fsdd-64")
    standard = MelSpectrogram.from_preset("fsdd-64", mean=-0.5, std=0.25)
    waveform = music(plain)
    torch.testing.assert_close(standard.encode(waveform), (plain.encode(waveform) + 0.5) / 0.25)
    decoded = [m.decode(m.encode(waveform), generator=torch.Generator().manual_seed(0)) for m in (plain, standard)]
    torch.testing.assert_close(*decoded, atol=1e-3, rtol=0)


def test_each_generator_belongs_to_its_mel():
    mel = MelSpectrogram.from_preset("fsdd-64")
    encoded = mel.encode(music(mel))
    together = mel.decode(encoded, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])
    for row in range(3):
        alone = mel.decode(encoded[row : row + 1], generator=torch.Generator().manual_seed(row))
        assert torch.equal(alone[0], together[row])
    other = mel.decode(encoded[:1], generator=torch.Generator().manual_seed(9))
    assert not torch.allclose(other[0], together[0], atol=1e-2)


def test_save_load_and_half_precision(tmp_path):
    mel = MelSpectrogram.from_preset("sc09-64", mean=0.1, std=0.7)
    waveform = music(mel)
    mel.save_pretrained(tmp_path)
    loaded = MelSpectrogram.from_pretrained(tmp_path)
    for name, value in mel.config.items():
        assert name.startswith("_") or loaded.config[name] == value
    assert torch.equal(loaded.encode(waveform), mel.encode(waveform))
    for half in (
        loaded.half(),
        loaded.to(torch.bfloat16),
        MelSpectrogram.from_pretrained(tmp_path, dtype=torch.float16),
        MelSpectrogram.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        assert half.filterbank.dtype == torch.float32
        assert torch.equal(half.encode(waveform.half()), mel.encode(waveform.half().float()))


@pytest.mark.parametrize("method", ["image", "bigvgan"])
def test_encode_can_be_differentiated(method):
    mel = MelSpectrogram.from_preset("fsdd-64", method=method)
    waveform = (0.1 * torch.randn(1, mel.slice_samples, generator=torch.Generator().manual_seed(0))).requires_grad_()
    mel.encode(waveform).mean().backward()
    assert waveform.grad.any()
    step = 1e-4 * waveform.grad / waveform.grad.abs().max()
    with torch.no_grad():  # against the central difference
        ahead, behind = (mel.encode(waveform + sign * step).double().mean() for sign in (1, -1))
    assert (waveform.grad * step).sum().item() == pytest.approx((ahead - behind).item() / 2, rel=0.01)


@pytest.mark.parametrize("method", ["image", "bigvgan"])
@pytest.mark.parametrize("rows, seconds", [(2, 0.21), (40, 1.3), (3, 20.3), (1, 33.0)])
def test_a_batch_computed_in_pieces_is_the_batch(method, rows, seconds, monkeypatch):
    """Several sounds at once, or parts of a long one, against all of them at once."""
    mel = MelSpectrogram.from_preset("fsdd-64", method=method)
    waveform = 0.1 * torch.randn(rows, int(8000 * seconds), generator=torch.Generator().manual_seed(0))
    found = mel.encode(waveform)
    monkeypatch.setattr(mel_spectrogram, "AT_ONCE", 2**40)
    torch.testing.assert_close(found, mel.encode(waveform), rtol=0, atol=1e-5)
    if method == "image":
        power = np.stack([librosa_power(mel, sound) for sound in waveform])
        expected = 10 * np.log10(power / mel.full_scale_power)
        np.testing.assert_allclose(decibels(mel, found).numpy(), np.clip(expected, -80, 0), atol=1e-3)


def test_fingerprint():
    mel = MelSpectrogram.from_preset("fsdd-64")
    same_meaning = dict(num_frames=128, mean=0.3, std=2.0, f_max=4000)
    other_meaning = dict(
        sample_rate=11025, n_fft=1024, hop_length=64, n_mels=32, top_db=100, f_min=20, f_max=3000, ref="slice",
        value_range=(-80, 10), method="bigvgan",
    )  # fmt: skip
    for name, value in same_meaning.items():
        assert MelSpectrogram.from_preset("fsdd-64", **{name: value}).fingerprint() == mel.fingerprint()
    others = {MelSpectrogram.from_preset("fsdd-64", **{k: v}).fingerprint() for k, v in other_meaning.items()}
    assert len(others | {mel.fingerprint()}) == len(other_meaning) + 1
    code = "from tonefield import MelSpectrogram; print(MelSpectrogram.from_preset('fsdd-64').fingerprint())"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin"},
    ).stdout
    assert printed.strip() == mel.fingerprint()
