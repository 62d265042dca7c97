import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import settings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # what scripts keep from one start to the next is not to outlast the tests
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tonefield-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
sys.path.append(str(Path(__file__).parent))  # for what stands beside the tests

# The same examples each time and whatever the speed of the machine; `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile("usual", deadline=None, derandomize=True, database=None, max_examples=20)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory) -> list[Path]:
    """Recordings of spoken digits when `TONEFIELD_FSDD` names their folder, otherwise vowel-like sounds at 8 kHz."""
    folder = os.environ.get("TONEFIELD_FSDD")
    if folder:
        return sorted(Path(folder).rglob("*.wav"))[::97]
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for index in range(16):
        time = np.arange(int(rng.uniform(0.3, 0.9) * 8000)) / 8000
        pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * 2 * time))
        formants = rng.uniform([300, 900], [800, 2500])
        harmonics = np.arange(1, 17)[:, None] * pitch
        loudness = sum(np.exp(-(((harmonics - f) / 200) ** 2)) for f in formants) + 0.01
        voice = (loudness * np.sin(2 * np.pi * np.cumsum(harmonics, 1) / 8000)).sum(0) * np.sin(
            np.pi * time / time[-1]
        )
        soundfile.write(folder / f"{index}.wav", 0.3 * voice / np.abs(voice).max(), 8000)
    return sorted(folder.glob("*.wav"))


# Not for the whole session: while Playwright runs, no other event loop can.
@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, headless; without it, or without Playwright, the tests are skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium, args=[*flags, "--disable-sync", "--disable-quic"])
        yield chromium
        chromium.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and this process told of it as the variables of the environment would tell a new one."""
    import datasets
    import huggingface_hub
    from fake_hub import TOKEN, FakeHub
    from huggingface_hub import constants

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between two attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


# For all tests of training. Its imports are heavy, and most tests do without.


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """A folder of sounds in two classes."""
    from training_runs import make_sounds

    return make_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="session")
def mels(sounds, tmp_path_factory) -> Path:
    """A dataset of their mels, 16 x 16."""
    from training_runs import make_dataset

    return make_dataset(sounds, tmp_path_factory.mktemp("mels") / "data")
