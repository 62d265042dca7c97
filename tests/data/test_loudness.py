"""Loudness against the numbers of ITU-R BS.1770-4 and EBU Tech 3341, and the gates computed in one piece."""

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from tonefield.data.loudness import integrated_loudness, k_weighting
from tonefield.data.synthetic import synthesize


# Tables 1 and 2 of annex 1, for 48 kHz.
SHELF = [1.53512485958697, -2.69169618940638, 1.19839281085285], [1, -1.69065929318241, 0.73248077421585]
HIGH_PASS = [1, -2, 1], [1, -1.99004745483398, 0.99007225036621]


def tone(frequency: float, level: float, seconds: float, sample_rate: int = 48000) -> np.ndarray:
    """A sine whose peak is at `level` in dB of full scale."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return 10 ** (level / 20) * np.sin(2 * np.pi * frequency * time)


def loudness_of_the_standard(samples: np.ndarray) -> float:
    """Equations 2 to 7 at 48 kHz as they stand, with the coefficients of the tables."""
    weighted = lfilter(*HIGH_PASS, lfilter(*SHELF, samples))
    size, step = 19200, 4800
    z = np.array([np.mean(weighted[i : i + size] ** 2) for i in range(0, len(samples) - size + 1, step)])
    loudness = -0.691 + 10 * np.log10(z)
    gate = -0.691 + 10 * np.log10(z[loudness > -70].mean()) - 10
    return -0.691 + 10 * np.log10(z[(loudness > -70) & (loudness > gate)].mean())


def test_filters_are_those_of_the_tables():
    for (numerator, denominator), (b, a) in zip(k_weighting(48000), (SHELF, HIGH_PASS), strict=True):
        np.testing.assert_allclose(numerator, b, atol=1e-13)
        np.testing.assert_allclose(denominator, a, atol=1e-13)


@pytest.mark.parametrize("sample_rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_a_full_scale_sine_of_997_hz(sample_rate):
    # The bilinear transform bends the shelf a little differently at other rates than the standard's.
    tolerance = 0.01 if sample_rate == 48000 else 0.1
    assert abs(integrated_loudness([tone(997, 0, 5, sample_rate)], sample_rate) - -3.01) < tolerance


def test_a_gain_adds():
    sound = synthesize("drums", 10, 44100).astype(np.float64)
    loudness = integrated_loudness([sound], 44100)
    for gain in -20, -6, 13.7:
        assert abs(integrated_loudness([sound * 10 ** (gain / 20)], 44100) - loudness - gain) < 1e-9


@pytest.mark.parametrize("levels, lengths", [
    ((-36, -23, -36), (10, 60, 10)),
    ((-72, -36, -23, -36, -72), (10, 10, 60, 10, 10)),
    ((-26, -20, -26), (20, 20, 20)),
])  # fmt: skip
def test_gates(levels, lengths):
    sound = np.concatenate([tone(1000, level, seconds) for level, seconds in zip(levels, lengths, strict=True)])
    loudness = integrated_loudness([sound], 48000)
    assert abs(loudness - loudness_of_the_standard(sound)) < 1e-9
    if -23 in levels:  # what is 10 LU and more below counts nothing: a mono sine is 3.01 LU below its peak
        assert abs(loudness - (-23 - 3.01)) < 0.1


def test_music_is_measured_as_the_standard_says():
    sound = synthesize("drums", 9.27, 48000).astype(np.float64)
    sound[3 * 48000 : 5 * 48000] *= 1e-3
    assert abs(integrated_loudness([sound], 48000) - loudness_of_the_standard(sound)) < 1e-9


@pytest.mark.parametrize("block", [1, 777, 4800, 10**6])
def test_blocks_make_no_difference(block):
    sound = synthesize("plucks", 1.5 if block == 1 else 10, 22050)
    blocks = [sound[i : i + block] for i in range(0, len(sound), block)]
    assert abs(integrated_loudness(blocks, 22050) - integrated_loudness([sound], 22050)) < 1e-9


def test_silence():
    assert integrated_loudness([np.zeros(48000)], 48000) == -math.inf
    assert integrated_loudness([np.zeros(10)], 48000) == -math.inf
    assert integrated_loudness([], 48000) == -math.inf
    assert integrated_loudness([tone(1000, -75, 5)], 48000) == -math.inf  # below the absolute gate
    assert integrated_loudness([tone(1000, -60, 5)], 48000) > -70


def test_a_clip_shorter_than_a_window_is_measured_as_a_whole():
    clip = tone(1000, -6, 0.3)
    power = np.mean(lfilter(*HIGH_PASS, lfilter(*SHELF, clip)) ** 2)
    assert abs(integrated_loudness([clip], 48000) - (-0.691 + 10 * np.log10(power))) < 1e-9
    assert abs(integrated_loudness([clip[:7000], clip[7000:]], 48000) - integrated_loudness([clip], 48000)) < 1e-9
