"""`audio_to_images.py` against the usual serial path: librosa.load, one mel a slice, PNGs in a list, pandas.

python benchmarks/dataset.py [--digits DIR]     # DIR: many short recordings; made up when not given
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import datasets
import librosa
import numpy as np
import pandas as pd
import soundfile
from _table import Row, show
from PIL import Image

import tonefield.data.dataset_builder
import tonefield.data.mel_converter  # noqa: F401  (imported here so that neither side's time holds imports)
from tonefield import MelSpectrogram, audio_to_images
from tonefield.data.synthetic import KINDS, synthesize


def serial(folder: Path, mel: MelSpectrogram, output: Path) -> int:
    """What one writes first: everything one after the other, and the dataset in memory."""
    c, rows = mel.config, []
    for file in sorted(folder.rglob("*.wav")):
        samples, _ = librosa.load(file, sr=c.sample_rate, mono=True)
        samples = librosa.util.fix_length(samples, size=max(len(samples), mel.slice_samples))
        for number in range(len(samples) // mel.slice_samples):
            piece = samples[number * mel.slice_samples :][: mel.slice_samples]
            power = librosa.feature.melspectrogram(
                y=piece, sr=c.sample_rate, n_fft=c.n_fft, hop_length=c.hop_length, n_mels=c.n_mels
            )
            decibels = librosa.power_to_db(power, ref=np.max, top_db=80)
            picture = Image.fromarray(((decibels + 80) * 255 / 80 + 0.5).astype(np.uint8))
            with io.BytesIO() as buffer:
                picture.save(buffer, format="PNG")
                rows.append({"image": {"bytes": buffer.getvalue()}, "audio_file": str(file), "slice": number})
    features = datasets.Features(
        image=datasets.Image(), audio_file=datasets.Value("string"), slice=datasets.Value("int16")
    )
    datasets.Dataset.from_pandas(pd.DataFrame(rows), features=features).save_to_disk(output)
    return len(rows)


def ours(folder: Path, preset: str, output: Path) -> None:
    args = audio_to_images.parse_args(
        [
            "--input_dir",
            str(folder),
            "--output_dir",
            str(output),
            "--preset",
            preset,
            "--pad",
            "pad",
            "--silence_db=-999",
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        audio_to_images.main(args)


def make_up_digits(folder: Path, count: int) -> Path:
    for index in range(count):
        kind = KINDS[index % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / kind / f"{index}.wav", synthesize(kind, 0.3 + index % 7 * 0.1, 8000, index), 8000)
    return folder


def make_up_tracks(folder: Path, parts: int) -> Path:
    folder.mkdir()
    for index in range(5):
        sounds = [synthesize(KINDS[index % 3], 10, 44100, seed=12 * index + part) for part in range(parts)]
        soundfile.write(folder / f"{index}.wav", np.concatenate(sounds), 44100)
    return folder


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        work = [
            (
                "many short files",
                Path(args.digits) if args.digits else make_up_digits(root / "digits", args.files),
                "fsdd-64",
            ),
            ("long tracks in 5 files", make_up_tracks(root / "tracks", args.parts), "image-22k"),
        ]
        rows = []
        for name, folder, preset in work:
            rates = []
            for run in range(args.runs + 1):  # in turn, so that both meet the same machine; the first is not counted
                start = time.perf_counter()
                slices = serial(folder, MelSpectrogram.from_preset(preset), root / f"serial-{preset}-{run}")
                middle = time.perf_counter()
                ours(folder, preset, root / f"ours-{preset}-{run}")
                rates.append((slices / (middle - start), slices / (time.perf_counter() - middle)))
            baseline, fast = np.median(rates[1:], axis=0)
            ratio = np.median([b / a for a, b in rates[1:]])
            rows.append(Row(name, f"{baseline:.0f} slices/s", f"{fast:.0f} slices/s", float(ratio), least=3))
        show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="DIR", help="a folder of many short recordings")
    parser.add_argument("--files", type=int, default=2700, help="made up in their place")
    parser.add_argument("--parts", type=int, default=12, help="of ten seconds in each of five long files")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each; the median is shown")
    main(parser.parse_args())
