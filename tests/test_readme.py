"""Everything the README tells its readers to type is typed here, in the order in which it stands there."""

import pytest
from typed_pages import ROOT, blocks_of, make_recordings, type_in


BLOCKS = blocks_of(ROOT / "README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recordings that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    metadata = next(block.code for block in BLOCKS if block.language == "csv")
    make_recordings(folder / "my_sounds", metadata, 7.0, 22050)
    for name in ("pretrained", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def known():
    """What is known in Python, for each section."""
    return {block.section: {} for block in BLOCKS}


@pytest.mark.parametrize("index", [i for i, block in enumerate(BLOCKS) if block.language in ("python", "bash")])
def test_block(index, folder, known, monkeypatch):
    monkeypatch.chdir(folder)
    type_in(BLOCKS[index], known[BLOCKS[index].section])


def test_the_dataset_holds_what_the_readme_says(folder):
    dataset = folder / "mels" / "my_sounds"
    assert (dataset / "previews" / "overview.png").stat().st_size > 10_000
    assert (dataset / "previews" / "000.wav").exists()
    assert (dataset / "rejects.jsonl").read_text() == ""
