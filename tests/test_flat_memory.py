"""What is held in memory does not grow with the data. Sounds are made up; each command is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from training_runs import RECIPE, ROOT


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell of its memory"),
]

SMALL, LARGE = 300, 6000
# The allocator and the threads move the peak by some MiB. 5,700 more rows of tokens are 40 MB, of mels 49 MB, and of
# sound 78 MB; the index of the files may take 1 kB a file.
TOLERANCE = 30 * 2**20 + 1000 * LARGE

# Pages of files that are mapped are the system's to drop: they are no memory that the process needs.
PEAK = """
import runpy, sys, threading, time
most = 0
def watch():
    global most
    while True:
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        most = max(most, 1024 * int(status["RssAnon"].split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    assert not left.code, left.code
print(most)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folders of 300 and of 6,000 clips of 0.43 s."""
    noise = 0.3 * np.random.default_rng(0).standard_normal((50, 3440))
    folders = {}
    for count in (SMALL, LARGE):
        folder = tmp_path_factory.mktemp(f"clips-{count}")
        for index in range(count):
            soundfile.write(folder / f"{index:05d}.wav", noise[index % 50] * (0.2 + 0.8 * index / count), 8000)
        folders[count] = folder
    return folders


def peak(*words) -> int:
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def peaks(clips, tmp_path_factory):
    """The peak of each command, for few clips and for many."""
    found: dict = {}
    for count, folder in clips.items():
        out = tmp_path_factory.mktemp(f"out-{count}")
        make = ["--input_dir", folder, "--num_proc", 2]
        found["tokens", count] = peak("audio_to_tokens.py", *make, "--codec", "mulaw", "--output_dir", out / "tokens")
        found["mels", count] = peak("audio_to_images.py", *make, "--preset", "fsdd-64", "--output_dir", out / "mels")
        for stream in ([], ["--streaming"]):
            train = ["train_unet.py", "--config", RECIPE, "--dataset_name", out / "mels", "--lr_scheduler", "constant"]
            # Few rows are read either way: that is the same work, of a small and of a large dataset.
            found["streamed" if stream else "trained", count] = peak(
                *train, "--output_dir", out / f"trained{len(stream)}", "--shuffle_buffer", 200, *stream
            )
    return found


@pytest.mark.parametrize("what", ["tokens", "mels", "trained", "streamed"])
def test_twenty_times_the_data_takes_the_same_memory(peaks, what):
    assert peaks[what, LARGE] - peaks[what, SMALL] < TOLERANCE, {
        count: f"{peaks[what, count] / 2**20:.0f} MiB" for count in (SMALL, LARGE)
    }
