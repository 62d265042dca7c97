"""Summaries of sounds whose spectrum, level and tempo are known; distances of sets and pairs."""

import math

import numpy as np
import pytest
import soundfile
from scipy import signal

from tonefield.evaluation import AudioSet, evaluate
from tonefield.evaluation.sounds import (
    QUANTITIES,
    compare_values,
    distances_of_pair,
    summarize,
    summarize_set,
    tempo,
)


RATE = 16000


def sine(frequency, seconds=1.0, amplitude=0.5, rate=RATE):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_a_tone():
    measured = summarize(sine(1000), RATE)
    assert measured.keys() == QUANTITIES.keys()
    assert measured["seconds"] == 1
    assert measured["peak_db"] == pytest.approx(20 * math.log10(0.5), abs=1e-3)
    assert measured["rms_db"] == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1e-3)
    assert measured["centroid"] == pytest.approx(1000, abs=2)
    assert measured["rolloff"] == pytest.approx(1000, abs=RATE / 512)
    assert measured["bandwidth"] < 40 and measured["flatness"] < 1e-3 and measured["silence"] == 0
    assert math.isnan(measured["tempo"])  # too short to have one


def test_a_sine_of_997_hz_has_the_loudness_of_the_standard():
    # ITU-R BS.1770: full scale in one channel is -3.01 LUFS
    assert summarize(sine(997, 2, 1.0, 48000), 48000)["loudness"] == pytest.approx(-3.01, abs=0.02)
    assert summarize(sine(997, 2, 0.1, 48000), 48000)["loudness"] == pytest.approx(-23.01, abs=0.02)


def test_white_noise():
    noise = 0.1 * np.random.default_rng(0).normal(size=4 * RATE).astype(np.float32)
    measured = summarize(noise, RATE)
    nyquist = RATE / 2
    assert measured["centroid"] == pytest.approx(nyquist / 2, rel=0.01)
    assert measured["bandwidth"] == pytest.approx(nyquist / math.sqrt(12), rel=0.01)
    assert measured["rolloff"] == pytest.approx(0.85 * nyquist, rel=0.01)
    # Powers are exponentially distributed: the geometric mean is e^-gamma times the arithmetic one
    assert measured["flatness"] == pytest.approx(math.exp(-np.euler_gamma), rel=0.02)


def test_pauses_count_as_silence_and_nothing_else():
    tone = sine(2000)
    measured = summarize(np.concatenate([tone, np.zeros(3 * RATE, np.float32)]), RATE)
    assert measured["silence"] == pytest.approx(0.75, abs=0.01)
    assert measured["centroid"] == pytest.approx(summarize(tone, RATE)["centroid"], abs=1)
    both = summarize(np.concatenate([tone, sine(4000, amplitude=0.05)]), RATE)  # 20 dB quieter
    assert both["centroid"] == pytest.approx((2000 + 0.01 * 4000) / 1.01, abs=5)
    silent = summarize(np.zeros(RATE, np.float32), RATE)
    assert silent["silence"] == 1 and silent["loudness"] == -math.inf and silent["peak_db"] == -math.inf
    assert math.isnan(silent["centroid"])
    assert math.isnan(tempo(np.zeros(5 * RATE, np.float32), RATE))
    assert summarize(tone[:5], RATE)["seconds"] == 5 / RATE  # shorter than a window


@pytest.mark.parametrize("beats", [90, 120, 150])
def test_clicks_have_their_tempo(beats):
    sound = np.zeros(10 * RATE, np.float32)
    click = np.random.default_rng(0).normal(size=400) * np.exp(-np.arange(400) / 80)
    for start in np.arange(0, len(sound) - 400, 60 / beats * RATE).astype(int):
        sound[start : start + 400] += 0.3 * click
    assert tempo(sound, RATE) == pytest.approx(beats, rel=0.03)


def test_distances_of_values():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, size=1000)
    assert compare_values(values, values[::-1]) == 0
    assert compare_values(values, values + 3) == pytest.approx(3 / values.std())
    assert compare_values(values, np.array([np.nan, -np.inf])) is None
    assert compare_values(np.full(5, 2.0), values) is None  # there is no unit


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, shift in (("real", 0), ("higher", 500)):
        (tmp_path / name).mkdir()
        for index in range(12):
            frequency = 1000 + shift + 100 * (index % 4)
            soundfile.write(
                tmp_path / name / f"{index}.wav", sine(frequency, 0.5) + 1e-4 * rng.normal(size=RATE // 2), RATE
            )
    return tmp_path


def test_sets_in_reports(folders):
    results = evaluate(folders / "real", folders / "higher", ["sounds"], device="cpu")["results"]
    by_name = {result["metric"]: result for result in results}
    assert list(by_name) == [f"sounds/{name}" for name in QUANTITIES]
    centroid = by_name["sounds/centroid"]
    assert centroid["value"] == pytest.approx(500 / np.std([0, 100, 200, 300]), rel=0.02)
    assert centroid["reference_values"]["mean"] == pytest.approx(1150, rel=0.02)
    assert centroid["generated_values"]["files"] == 12
    assert by_name["sounds/tempo"]["value"] is None and by_name["sounds/tempo"]["generated_values"] is None
    part = summarize_set(AudioSet.open(folders / "real").subset([5, 2]))["centroid"]
    assert part == pytest.approx([1300, 1200], abs=15)  # 3.wav and 10.wav


def test_pairs_by_hand():
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.normal(size=RATE).astype(np.float32)
    same = distances_of_pair(sound, sound, RATE)
    assert same["si_sdr_db"] > 100 and same["spectral_distance_db"] == 0 and same["mel_distance_db"] == 0
    assert same["spectral_convergence"] < 1e-4
    # Half as loud: 6.02 dB everywhere, and the same sound but for its scale
    half = distances_of_pair(sound, 0.5 * sound, RATE)
    assert half["si_sdr_db"] > 100
    assert half["spectral_distance_db"] == pytest.approx(6.02, abs=0.02)
    assert half["mel_distance_db"] == pytest.approx(6.02, abs=0.02)
    assert half["spectral_convergence"] == pytest.approx(0.5, abs=0.01)
    # Independent noise at 10 dB
    noise = rng.normal(size=RATE)
    noise -= sound * (noise @ sound) / (sound @ sound)
    noise *= np.linalg.norm(sound) / np.linalg.norm(noise) / np.sqrt(10)
    noisy = distances_of_pair(sound, (sound + noise).astype(np.float32)[:-7], RATE)
    assert noisy["si_sdr_db"] == pytest.approx(10, abs=0.05)


def test_pairs_in_reports(folders, tmp_path):
    (tmp_path / "filtered").mkdir()
    for index in range(5):
        sound, _ = soundfile.read(folders / "real" / f"{index}.wav")
        soundfile.write(tmp_path / "filtered" / f"{index}.wav", signal.lfilter([0.5], [1], sound), RATE)
    soundfile.write(tmp_path / "filtered" / "other.wav", sine(500), RATE)
    results = evaluate(folders / "real", tmp_path / "filtered", ["pair_distances"], device="cpu")["results"]
    values = {result["metric"]: result for result in results}
    assert values["si_sdr_db"]["value"] > 50 and values["si_sdr_db"]["better"] == "higher"
    assert values["si_sdr_db"]["clips"] == [5] and values["mel_distance_db"]["better"] == "lower"
    assert "1 files have no counterpart" in values["si_sdr_db"]["warnings"][0]
