"""What can be said of sounds without any network: length, level, loudness, spectrum, tempo; and of pairs of them."""

import math
from typing import Any

import librosa
import numpy as np
import torch
from scipy.stats import wasserstein_distance

from tonefield.data.loudness import integrated_loudness
from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.sets import AudioSet, in_parallel, read_sample
from tonefield.evaluation.statistics import mean_interval
from tonefield.models.mel_spectrogram import MelSpectrogram, stft
from tonefield.training.spectral import si_sdr, spectral_distances, window_sizes


ROLLOFF = 0.85  # the share of the energy below the roll-off frequency
QUIET_DB = -60.0  # of full scale: a frame below is silence
TEMPO_SECONDS = 3.0  # a shorter sound has no tempo that could be told

# What is measured of each sound, and in which unit.
QUANTITIES = {
    "seconds": "s",
    "peak_db": "dB of full scale",
    "rms_db": "dB of full scale",
    "loudness": "LUFS (ITU-R BS.1770-4)",
    "silence": "share of frames",
    "centroid": "Hz",
    "bandwidth": "Hz",
    "rolloff": f"Hz, {ROLLOFF:.0%} of the energy lies below",
    "flatness": "1 is white noise, 0 a tone",
    "tempo": f"beats a minute, of sounds of {TEMPO_SECONDS:g} s or more",
}


def spectrum_summary(sound: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """
    Centroid, bandwidth, roll-off and flatness of the frames that are not silent, each frame as heavy as its energy.

    So they tell of what is heard, not of the noise in pauses. All are NaN of a silent sound.
    """
    size = window_sizes(sampling_rate)[1]
    window = torch.hann_window(size, dtype=torch.float64)
    missing = max(0, size - len(sound))
    padded = torch.nn.functional.pad(torch.from_numpy(sound.astype(np.float64))[None], (0, missing))
    power = stft(padded, window, size // 2).abs().square()[0]  # (frames, bins)
    # The mean square of a frame, by Parseval's theorem: bins other than the first and last count twice.
    level = (2 * power.sum(1) - power[:, 0] - power[:, -1]) / (size * window.square().sum())
    loud = level > 10 ** (QUIET_DB / 10)
    result = {"silence": float((~loud).double().mean())}
    if not loud.any():
        return result | dict.fromkeys(("centroid", "bandwidth", "rolloff", "flatness"), math.nan)
    power = power[loud]
    hertz = torch.arange(power.shape[1], dtype=torch.float64) * sampling_rate / size
    energy = power.sum(1)
    weight = energy / energy.sum()
    centroid = (power * hertz).sum(1) / energy
    bandwidth = ((power * (hertz - centroid[:, None]).square()).sum(1) / energy).sqrt()
    rolloff = hertz[(power.cumsum(1) < ROLLOFF * energy[:, None]).sum(1).clamp(max=len(hertz) - 1)]
    flatness = power.clamp(min=torch.finfo(torch.float64).tiny).log().mean(1).exp() / power.mean(1)
    measured = dict(centroid=centroid, bandwidth=bandwidth, rolloff=rolloff, flatness=flatness)
    return result | {name: float((weight * values).sum()) for name, values in measured.items()}


def tempo(sound: np.ndarray, sampling_rate: int) -> float:
    """Beats a minute, from the autocorrelation of onsets; NaN of a short sound, or one without onsets."""
    if len(sound) < TEMPO_SECONDS * sampling_rate:
        return math.nan
    hop = 2 ** round(math.log2(sampling_rate * 0.012))
    onsets = librosa.onset.onset_strength(y=sound, sr=sampling_rate, hop_length=hop, n_fft=4 * hop, n_mels=40)
    if not onsets.max() > 0:
        return math.nan
    return float(librosa.feature.tempo(onset_envelope=onsets, sr=sampling_rate, hop_length=hop)[0])


def summarize(sound: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """All of `QUANTITIES` of one mono sound; NaN or minus infinity where there is nothing to measure."""
    with np.errstate(divide="ignore"):
        peak, rms = np.abs(sound).max(), np.sqrt(np.square(sound, dtype=np.float64).mean())
        levels = {"peak_db": float(20 * np.log10(peak)), "rms_db": float(20 * np.log10(rms))}
    return (
        {"seconds": len(sound) / sampling_rate}
        | levels
        | {"loudness": integrated_loudness([sound], sampling_rate), "tempo": tempo(sound, sampling_rate)}
        | spectrum_summary(sound, sampling_rate)
    )


def summarize_set(sounds: AudioSet) -> dict[str, np.ndarray]:
    """The quantities of all files of a set, each at its own sampling rate."""
    root = sounds.root
    if "summaries" not in root.memo:

        def measure(sample) -> dict[str, float]:
            rate = sample.sampling_rate or 48000
            return summarize(read_sample(sample, rate), rate)

        rows = list(in_parallel(measure, root.samples, root.num_workers))
        root.memo["summaries"] = {name: np.array([row[name] for row in rows]) for name in QUANTITIES}
    places = {sample.name: index for index, sample in enumerate(root.samples)}
    chosen = [places[sample.name] for sample in sounds.samples]
    return {name: values[chosen] for name, values in root.memo["summaries"].items()}


def compare_values(reference: np.ndarray, generated: np.ndarray) -> float | None:
    """The distance that values have to be moved on average to become the reference's, in units of its spread."""
    reference, generated = (values[np.isfinite(values)] for values in (reference, generated))
    if min(len(reference), len(generated)) == 0:
        return None
    distance = float(wasserstein_distance(reference, generated))
    return distance / spread if (spread := float(reference.std())) > 1e-9 * max(1, abs(reference).max()) else None


def _describe(values: np.ndarray) -> dict[str, Any] | None:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "files": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "median": float(middle),
        "range_90": [float(low), float(high)],
    }


def summaries(comparison: Comparison) -> list[dict[str, Any]]:
    """How each quantity is spread in both sets; the value is the Wasserstein distance in units of the reference's
    standard deviation."""
    assert comparison.reference is not None
    reference, generated = (summarize_set(one) for one in (comparison.reference, comparison.generated))
    return [
        {
            "metric": f"sounds/{name}",
            "value": compare_values(reference[name], generated[name]),
            "unit": unit,
            "reference_values": _describe(reference[name]),
            "generated_values": _describe(generated[name]),
            "clips": [len(reference[name]), len(generated[name])],
        }
        for name, unit in QUANTITIES.items()
    ]


# ----- pairs


def distances_of_pair(reference: np.ndarray, generated: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """How far a sound is from the one that it was made after; the longer one is cut."""
    length = min(len(reference), len(generated))
    target, estimate = (torch.from_numpy(sound[None, :length].copy()) for sound in (reference, generated))
    sizes = window_sizes(sampling_rate)
    convergence, logarithmic = spectral_distances(estimate, target, sizes)
    mel = MelSpectrogram(sampling_rate, sizes[2], sizes[2] // 4, min(64, sampling_rate // 60))
    low, high = mel.value_range
    return {
        "si_sdr_db": float(si_sdr(estimate, target)[0]),
        "spectral_convergence": float(convergence[0]),
        "spectral_distance_db": float(logarithmic[0]) * 20 / math.log(10),
        "mel_distance_db": float((mel.encode(estimate) - mel.encode(target)).abs().mean()) * (high - low) / 2,
    }


def pair_distances(comparison: Comparison) -> list[dict[str, Any]]:
    """The means of what `distances_of_pair` tells of the files of the same name, at the reference's sampling rate."""
    assert comparison.reference is not None
    theirs = {sample.name: sample for sample in comparison.reference.samples}
    pairs = [(theirs[sample.name], sample) for sample in comparison.generated.samples if sample.name in theirs]

    def measure(pair) -> dict[str, float]:
        rate = pair[0].sampling_rate or 48000
        return distances_of_pair(read_sample(pair[0], rate), read_sample(pair[1], rate), rate)

    rows = list(in_parallel(measure, pairs, comparison.generated.num_workers))
    left_out, warnings = len(comparison.generated) - len(pairs), []
    if left_out:
        warnings.append(f"{left_out} files have no counterpart of the same name and are left out")
    results = []
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        results.append({
            "metric": name,
            "value": float(values.mean()),
            "interval": mean_interval(values),
            "better": "higher" if name == "si_sdr_db" else "lower",
            "clips": [len(pairs)],
            "warnings": warnings if not results else [],
        })  # fmt: skip
    return results
