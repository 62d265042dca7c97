import datasets
import numpy as np
import pytest
from PIL import Image
from training_runs import train


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A dataset of RGB pictures, 8 x 8, with an arrow of time: the left half is dark."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(128, 256, (20, 8, 8, 3), dtype=np.uint8)
    arrays[:, :, :4] -= 128
    rows = {"image": [Image.fromarray(array) for array in arrays], "kind": [index % 3 for index in range(20)]}
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    dataset = datasets.Dataset.from_dict(rows).cast_column("kind", classes)
    folder = tmp_path_factory.mktemp("pictures") / "data"
    datasets.DatasetDict({"train": dataset, "validation": dataset.select(range(4))}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(mels, tmp_path_factory):
    """8 steps of 2 x 4 samples over 38 rows, with shuffling, accumulation, dropout, EMA and a warm-up, in one go."""
    return train(tmp_path_factory.mktemp("uninterrupted"), mels)
