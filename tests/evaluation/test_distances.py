"""What reports say of distances: values, intervals, floors, warnings and ranks, of rows that are chosen."""

import numpy as np
import pytest

from tonefield.evaluation import AudioSet, distances
from tonefield.evaluation.embeddings import Embedding
from tonefield.evaluation.metrics import Comparison, Options
from tonefield.evaluation.statistics import gaussian_kernel, kernel_distance, null_floor, polynomial_kernel


class Samples(Embedding):
    """Each three samples of a sound are a row, so that a sound is what rows one likes."""

    name, sampling_rate, dim, window, least = "samples", 1000, 3, 3, 3

    def fingerprint(self):
        return "samples"

    def forward(self, pieces, lengths):
        return list(pieces[:, None])


def comparison(reference, generated, rows_of_clip=1, **options):
    sets = [
        AudioSet.of(list(rows.reshape(len(rows) // rows_of_clip, -1)), 1000, name)
        for rows, name in ((reference, "real"), (generated, "made"))
    ]
    return Comparison(sets[1], sets[0], Options(device="cpu", **options), Samples())


def drawn(n, seed, spread=(1.0, 0.5, 2.0)):
    return (np.random.default_rng(seed).normal(size=(n, 3)) * spread).astype(np.float32)


def test_what_is_not_distinguishable_from_noise():
    rows = drawn(200, 0)
    floor = 2 * null_floor(np.linalg.eigvalsh(np.cov(rows.T)), 200)
    for times, warned in ((2.8, True), (3.2, False)):  # the distance of a set to itself elsewhere is the way squared
        moved = rows + np.float32((times * floor / 3) ** 0.5)
        result = distances.fad(comparison(rows, moved, bootstrap=5))
        assert result["value"] == pytest.approx(times * floor, rel=1e-4) and result["floor"] == pytest.approx(floor)
        assert any("not distinguishable" in warning for warning in result["warnings"]) == warned
    assert result["ranks"] == [3, 3] and result["rows"] == [200, 200]


def test_rows_that_repeat_lower_no_floor():
    rows = drawn(200, 1)
    once = distances.fad(comparison(rows, rows + 1, bootstrap=5))["floor"]
    repeated = np.repeat(rows, 4, 0)
    assert distances.fad(comparison(repeated, repeated + 1, 4, bootstrap=5))["floor"] == pytest.approx(once, rel=0.01)


@pytest.mark.parametrize("n, said", [(3, "span only a part"), (4, "fewer than ten"), (29, "fewer than ten"), (30, "")])
def test_few_rows_are_told_of(n, said):
    result = distances.fad(comparison(drawn(60, 0), drawn(n, 1), bootstrap=2))
    warnings = [warning for warning in result["warnings"] if warning.startswith("the generated set")]
    assert len(warnings) == bool(said) and all(said in warning for warning in warnings)


def test_kernel_distances_after_one_another():
    real, made = drawn(50, 2), drawn(40, 3, (1.0, 1.0, 1.0))
    pairs = np.linalg.norm(real[:, None].astype(np.float64) - real, axis=-1)[np.triu_indices(50, 1)]
    both = comparison(real, made, bootstrap=0)
    for metric, kernel, scale in [
        (distances.kad, gaussian_kernel(float(np.median(pairs))), 100), (distances.kid, polynomial_kernel, 1),
    ]:  # fmt: skip
        value, error = (scale * number for number in kernel_distance(real, made, kernel))
        result = metric(both)
        assert result["value"] == pytest.approx(value)
        assert result["interval"] == pytest.approx((value - 1.96 * error, value + 1.96 * error))
    assert distances.kad(both)["bandwidth"] == pytest.approx(np.median(pairs))


def test_the_worst_clip_is_the_first():
    rng = np.random.default_rng(4)
    clips = rng.normal(size=(6, 20, 3)).astype(np.float32)
    clips[[2, 5]] += np.array([[[3.0]], [[9.0]]], np.float32)
    result = distances.fad_per_clip(comparison(drawn(400, 5, (1, 1, 1)), clips.reshape(-1, 3), 20))
    assert [clip["file"] for clip in result["worst"][:2]] == ["00005", "00002"]
    assert result["best"] == result["worst"][::-1]
    assert result["value"] == pytest.approx(np.median([clip["value"] for clip in result["worst"]]))
