"""Copies are found; precision, recall, density and coverage of toy sets by hand."""

import numpy as np
import pytest
import soundfile

from tonefield.command_line import UserError
from tonefield.evaluation import AudioSet, evaluate, load_embedding
from tonefield.evaluation.memorisation import (
    Normalized,
    clip_rows,
    correlation,
    count_within,
    density_coverage,
    nearest,
    nearness_interval,
    normalize,
    precision_recall,
)
from tonefield.evaluation.sets import EmbeddedSet


RATE = 8000


def line(*points):
    return np.array(points, float)[:, None]


def test_nearest_is_brute_force(monkeypatch):
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(30, 4)), rng.normal(size=(50, 4))
    brute = np.linalg.norm(rows[:, None] - others, axis=-1)
    monkeypatch.setattr("tonefield.evaluation.memorisation.BLOCK", 350)  # several blocks
    distances, places = nearest(rows, others, 3)
    assert np.allclose(distances, np.sort(brute)[:, :3], rtol=1e-12)
    assert np.array_equal(places, np.argsort(brute)[:, :3])
    itself, places = nearest(others, others, 1, itself=True)
    brute = np.linalg.norm(others[:, None] - others, axis=-1) + np.diag(np.full(50, np.inf))
    assert np.allclose(itself[:, 0], brute.min(1)) and np.array_equal(places[:, 0], brute.argmin(1))
    radii = np.full(50, 2.0)
    expected = (np.linalg.norm(rows[:, None] - others, axis=-1) <= 2).sum(1)
    assert np.array_equal(count_within(rows, others, radii), expected)
    with pytest.raises(ValueError, match="50 neighbours cannot be found among 49 recordings"):
        nearest(others, others, 50, itself=True)


def test_small_distances_survive_large_offsets():
    rows = line(1e6, 2e6)
    assert nearest(rows + 1e-3, rows)[0][:, 0] == pytest.approx([1e-3, 1e-3], rel=1e-5)


def test_toy_sets_by_hand():
    # k = 1: radii of the reference are 1, 1, 2; balls [-1, 1], [0, 2], [1, 5]
    reference = line(0, 1, 3)
    generated = line(0.5, 1.5, 4, 9, 9.5)
    # 0.5 lies in 2 balls, 1.5 in 2, 4 in 1, the others in none
    precise, recalled = precision_recall(reference, generated, k=1)
    assert precise.tolist() == [True, True, True, False, False]
    # radii of the generated are 1, 1, 2.5, 0.5, 0.5; balls [-0.5, 1.5], [0.5, 2.5], [1.5, 6.5], ...
    assert recalled.tolist() == [True, True, True]
    density, coverage = density_coverage(reference, generated, k=1)
    assert density.tolist() == [2, 2, 1, 0, 0]
    # nearest generated to 0: 0.5 <= 1; to 1: 0.5 <= 1; to 3: 1 <= 2
    assert coverage.tolist() == [True, True, True]
    assert density_coverage(reference, line(-0.9, -0.8), k=1)[1].tolist() == [True, False, False]
    assert density_coverage(reference, line(2), k=1)[1].tolist() == [False, True, True]  # the edge belongs to a ball
    assert density_coverage(reference, line(0.5), k=2)[0].tolist() == [1.5]  # radii 3, 2, 3: in all three, over 2
    assert precision_recall(reference, line(20, 21), k=1)[1].tolist() == [False] * 3


def test_lost_variety_costs_recall_and_coverage_only():
    rng = np.random.default_rng(1)
    real, alike, narrow = rng.normal(size=(300, 2)), rng.normal(size=(300, 2)), 0.1 * rng.normal(size=(300, 2))

    def means(generated):
        return [of.mean() for function in (precision_recall, density_coverage) for of in function(real, generated)]

    precision, recall, density, coverage = means(alike)
    assert min(precision, recall, coverage) > 0.9 and density == pytest.approx(1, abs=0.15)
    precision, recall, density, coverage = means(narrow)
    assert precision > 0.95 and density > 0.9 and recall < 0.3 and coverage < 0.3


def test_normalized_sounds():
    rng = np.random.default_rng(0)
    sound = (rng.normal(size=4000) * np.hanning(4000)).astype(np.float32)
    same = normalize(np.pad(0.3 * sound, (777, 123)))
    assert np.allclose(same, normalize(sound), atol=1e-6)
    assert np.sqrt(np.mean(same**2)) == pytest.approx(0.1, rel=1e-5)
    assert np.array_equal(normalize(np.zeros(10, np.float32)), np.zeros(10))
    kept = normalize(np.array([0, 0.009, 1, 0, -0.5, 0.009, 0]))  # what is 40 dB below the peak is silence at the ends
    np.testing.assert_allclose(kept / kept[0], [1, 0, -0.5])


def test_correlation_of_copies_and_others():
    rng = np.random.default_rng(0)
    sound, other = rng.normal(size=5000), rng.normal(size=4000)
    assert correlation(sound, np.pad(-0.2 * sound, (333, 10))) == pytest.approx(1, abs=1e-12)
    assert correlation(sound, sound + rng.normal(size=5000)) == pytest.approx(1 / np.sqrt(2), abs=0.02)
    assert correlation(sound, other) < 0.1
    ring = rng.normal(size=4096)
    assert correlation(ring, np.roll(ring, 2048)) == pytest.approx(0.5, abs=0.03)  # time is no ring
    assert correlation(sound, np.zeros(5)) == 0
    brute = np.abs(np.correlate(sound, other, "full")).max() / np.linalg.norm(sound) / np.linalg.norm(other)
    assert correlation(sound, other) == pytest.approx(brute, rel=1e-10)


def test_rows_of_clips_are_means():
    rows = np.arange(12.0).reshape(6, 2)
    expected = [rows[:3].mean(0), rows[3], rows[4:].mean(0)]
    assert np.allclose(clip_rows(EmbeddedSet(rows.astype(np.float32), np.array([3, 1, 2]))), expected)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), []
    for seed in range(60):  # of few held-out recordings it is the threshold that is uncertain
        low, high = nearness_interval(rng.gamma(9, size=40), rng.gamma(9, size=400), seed)
        hits.append(low <= 0.05 <= high)
    assert np.mean(hits) > 0.85
    low, high = nearness_interval(np.arange(1.0, 101), np.full(50, 0.5))
    assert low == high == 1


def voice(rng):
    time = np.arange(RATE // 2) / RATE
    pitch, formants = rng.uniform(90, 220), rng.uniform([300, 900], [800, 2500])
    harmonics = np.arange(1, 17)[:, None] * pitch * (1 + rng.uniform(-0.1, 0.1) * time)
    loudness = sum(np.exp(-(((harmonics - f) / 200) ** 2)) for f in formants)
    sound = (loudness * np.sin(2 * np.pi * np.cumsum(harmonics, 1) / RATE)).sum(0) * np.sin(np.pi * time / time[-1])
    return 0.3 * sound / np.abs(sound).max() + 1e-4 * rng.normal(size=len(time))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("memory"), np.random.default_rng(0)
    for name, count in (("training", 40), ("held_out", 40), ("honest", 30), ("copies", 30)):
        (root / name).mkdir()
        for index in range(count):
            sound = voice(rng)
            if name == "copies" and index < 6:  # louder or quieter, later, and cut
                sound, _ = soundfile.read(root / "training" / f"{index:02d}.wav")
                sound = np.pad(sound * (0.5, 0.9, 1.5)[index % 3], ((0, 200, 400)[index % 3], 50))[:-100]
            soundfile.write(root / name / f"{index:02d}.wav", sound, RATE, subtype="FLOAT")
    return root


def test_copies_are_found(folders):
    (result,) = evaluate(
        folders / "held_out",
        folders / "copies",
        ["memorisation"],
        training_set=str(folders / "training"),
        device="cpu",
    )["results"]
    found = {pair["file"]: pair for pair in result["pairs"][:6]}
    assert sorted(found) == [f"{index:02d}.wav" for index in range(6)]  # the nearest of all
    for name, pair in found.items():
        assert pair["nearest"] == name and pair["correlation"] > 0.95 and pair["held_out_share"] == 0
    assert result["copies"] == 6 and max(pair["correlation"] for pair in result["pairs"][6:]) < 0.9
    assert result["value"] >= 6 / 30 and result["interval"][0] > 0.05
    assert any("are copies, the first one" in warning for warning in result["warnings"])
    assert any("are nearer to training sounds" in warning for warning in result["warnings"])
    distances = [pair["distance"] for pair in result["pairs"]]
    assert distances == sorted(distances) and len(distances) == 20
    assert result["clips"] == [40, 40, 30]


def test_honest_sounds_are_as_near_as_held_out_ones(folders):
    (result,) = evaluate(
        folders / "held_out",
        folders / "honest",
        ["memorisation"],
        training_set=str(folders / "training"),
        device="cpu",
    )["results"]
    assert result["interval"][0] <= 0.05 <= result["interval"][1]
    assert result["copies"] == 0 and result["warnings"] == []
    # The distances are those of rows in units of the training set's spread
    embedding = Normalized(load_embedding("mel"))
    train, real, fake = (
        clip_rows(AudioSet.open(folders / name).embed(embedding)) for name in ("training", "held_out", "honest")
    )
    spread = np.maximum(train.std(0), train.std(0).max() / 10)
    brute = np.linalg.norm((fake[:, None] - train) / spread, axis=-1).min(1)
    theirs = np.linalg.norm((real[:, None] - train) / spread, axis=-1).min(1)
    assert result["median_distance"] == pytest.approx(np.median(brute))
    assert result["threshold"] == pytest.approx(np.quantile(theirs, 0.05))
    assert result["value"] == np.mean(brute < np.quantile(theirs, 0.05))


def test_shares_in_reports(folders):
    results = evaluate(
        folders / "training", folders / "honest", ["precision_recall", "density_coverage"], device="cpu"
    )["results"]
    assert [result["metric"] for result in results] == ["precision", "recall", "density", "coverage"]
    assert all(0.5 < result["value"] < 1.5 and result["k"] == 5 for result in results)


def test_the_training_set_has_to_be_named(folders):
    with pytest.raises(UserError, match="memorisation needs --training_set"):
        evaluate(folders / "held_out", folders / "honest", ["memorisation"])
    with pytest.raises(UserError, match=r"--training_set .* does not exist"):
        evaluate(folders / "held_out", folders / "honest", ["memorisation"], training_set=str(folders / "nothing"))
