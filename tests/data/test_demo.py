import numpy as np
import pytest
from datasets import load_from_disk

from tonefield.data import demo
from tonefield.data.synthetic import KINDS, synthesize


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_sounds_differ_by_seed_and_repeat(kind):
    first, again, other = (synthesize(kind, 2.0, 22050, seed) for seed in (0, 0, 1))
    assert first.shape == (44100,) and first.dtype == np.float32
    np.testing.assert_allclose(np.abs(first).max(), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_demo_makes_a_dataset_with_pictures_and_sounds_and_can_be_repeated(tmp_path):
    for _ in range(2):
        demo.main(demo.parse_args(["--output_dir", str(tmp_path), "--num_sounds", "6"]))
    dataset = load_from_disk(tmp_path / "dataset")
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 15, "validation": 3}
    assert dataset["train"].features["label"].names == sorted(KINDS)
    assert len(list((tmp_path / "dataset" / "previews").glob("*.wav"))) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_short_pieces_are_not_silent(kind):
    assert all(np.abs(synthesize(kind, 0.3, 8000, seed)).max() > 0.49 for seed in range(40))
