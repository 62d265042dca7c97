"""Integrated loudness of a mono recording (ITU-R BS.1770-4), measured block by block."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from tonefield.data.audio_files import read_blocks


PEAK_AFTER_GAIN = 0.99


def k_weighting(sample_rate: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two filters of BS.1770 (annex 1, tables 1 and 2) as (numerator, denominator), for any sample rate.

    The standard gives coefficients at 48 kHz only; these are the analogue filters behind them, a high shelf for the
    head and a high pass, brought to `sample_rate` by the bilinear transform.
    """
    tangent = math.tan(math.pi * 1681.974450955533 / sample_rate)
    quality, gain = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    middle = gain**0.4996667741545416
    square = tangent**2
    shelf = np.array(
        [gain + middle * tangent / quality + square, 2 * (square - gain), gain - middle * tangent / quality + square]
    )
    shelf_poles = np.array([1 + tangent / quality + square, 2 * (square - 1), 1 - tangent / quality + square])

    tangent, quality = math.tan(math.pi * 38.13547087602444 / sample_rate), 0.5003270373238773
    square = tangent**2
    pass_poles = np.array([1 + tangent / quality + square, 2 * (square - 1), 1 - tangent / quality + square])
    return [
        (shelf / shelf_poles[0], shelf_poles / shelf_poles[0]),
        (np.array([1.0, -2.0, 1.0]), pass_poles / pass_poles[0]),
    ]


def integrated_loudness(blocks: Iterable[np.ndarray], sample_rate: int) -> float:
    """Loudness in LUFS of the samples that `blocks` yields in turn; `-inf` for silence.

    A recording shorter than the 400 ms over which the standard averages is measured as a whole.
    """
    filters = k_weighting(sample_rate)
    states = [np.zeros(2) for _ in filters]
    quarter = round(0.1 * sample_rate)  # windows of 400 ms, a new one every 100 ms: sums over quarters are enough
    sums, pending, total, count = [], np.zeros(0), 0.0, 0
    for block in blocks:
        weighted = block.astype(np.float64)
        for index, (numerator, denominator) in enumerate(filters):
            weighted, states[index] = lfilter(numerator, denominator, weighted, zi=states[index])
        squares = np.concatenate([pending, weighted**2])
        whole = len(squares) // quarter * quarter
        sums.append(squares[:whole].reshape(-1, quarter).sum(1))
        pending = squares[whole:]
        total, count = total + float((weighted**2).sum()), count + len(weighted)
    quarters = np.concatenate(sums) if sums else np.zeros(0)
    if len(quarters) < 4:
        power = np.array([total / max(count, 1)])
    else:
        power = np.convolve(quarters, np.ones(4), mode="valid") / (4 * quarter)

    def lufs(power):
        return -0.691 + 10 * np.log10(power)

    with np.errstate(divide="ignore"):
        power = power[lufs(power) > -70]  # eq. 5: the absolute gate
        if len(power) == 0:
            return -math.inf
        return float(lufs(power[lufs(power) > lufs(power.mean()) - 10].mean()))  # eq. 6 and 7: the relative gate


def gain_to(target: float, waveform: np.ndarray, sample_rate: int) -> float:
    """The factor that brings a waveform to a loudness in LUFS, or its peak to just below full scale."""
    loudness, peak = integrated_loudness([waveform], sample_rate), float(np.abs(waveform).max(initial=0.0))
    return 1.0 if math.isinf(loudness) else min(10 ** ((target - loudness) / 20), PEAK_AFTER_GAIN / peak)


def loudness_gain(audio: Path | bytes, sample_rate: int, target: float | None) -> float:
    """The factor that brings a recording to a loudness in LUFS, or its peak to just below full scale."""
    if target is None:
        return 1.0
    peak = 0.0

    def blocks():
        nonlocal peak
        for block in read_blocks(audio, sample_rate):
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            yield block

    loudness = integrated_loudness(blocks(), sample_rate)
    if math.isinf(loudness):
        return 1.0
    return min(10 ** ((target - loudness) / 20), PEAK_AFTER_GAIN / peak)
