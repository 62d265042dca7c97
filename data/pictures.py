"""Spectrograms that a person would want to look at."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from tonefield.command_line import printable
from tonefield.models.mel_spectrogram import MelSpectrogram, mel_frequencies


def draw_mels(
    mels: torch.Tensor, front_end: MelSpectrogram, path: str | Path, titles: Sequence[str] = (), columns: int = 4
) -> None:
    """Draws mels of shape (count, 1, n_mels, frames) side by side into one PNG, with axes in seconds and hertz."""
    c = front_end.config
    count = len(mels)
    columns = min(columns, count)
    rows = -(-count // columns)
    seconds = mels.shape[-1] * c.hop_length / c.sample_rate
    low, high = front_end.value_range
    values = ((front_end.unstandardize(mels.float().cpu())[:, 0] + 1) * ((high - low) / 2) + low).numpy()
    if c.method == "bigvgan":
        values = values * 20 / np.log(10)  # from nepers to decibels

    # A figure of its own, without pyplot: nothing global is touched, so this may run in any thread.
    width = min(8.0, max(3.2, 1.6 * seconds))
    figure = Figure(figsize=(0.9 + width * columns, 0.4 + 2.6 * rows), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    corners = mel_frequencies(c.n_mels, c.f_min, c.f_max or c.sample_rate / 2)[1:-1].numpy()
    rounds = [f for f in (20000, 10000, 5000, 2000, 1000, 500, 200, 100) if corners[0] <= f <= corners[-1]]
    labels: dict[float, str] = {}
    for frequency in rounds:  # from the top, for the low ones lie too close together to be written out
        place = float(np.interp(frequency, corners, np.arange(c.n_mels)))
        if not labels or min(labels) - place > 0.06 * c.n_mels:
            labels[place] = f"{frequency:g}"
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for index, axis in enumerate(axes.flat[:count]):
        axis.imshow(
            values[index], origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, -0.5, c.n_mels - 0.5),
            vmin=values.min(), vmax=values.max(), interpolation="nearest",
        )  # fmt: skip
        axis.set_yticks(list(labels), list(labels.values()))
        if index % columns == 0:
            axis.set_ylabel("Hz")
        if index >= count - columns:
            axis.set_xlabel("s")
        if index < len(titles):
            axis.set_title(shorten(titles[index]), fontsize=9, parse_math=False)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label="dB", shrink=min(1.0, 1.5 / rows), pad=0.01)
    figure.savefig(path)


def shorten(title: str) -> str:
    """What stands above a picture: a line that fits, whatever somebody has called a file or a class."""
    title = printable(title)
    return title if len(title) < 40 else title[:37] + "..."


def look_of(samples: int, sampling_rate: int) -> MelSpectrogram:
    """A front end that shows a sound of so many samples."""
    n_fft = 2 ** math.ceil(math.log2(0.06 * max(sampling_rate, 8000)))  # long enough to tell the lowest bands apart
    return MelSpectrogram(sampling_rate, n_fft, n_fft // 4, n_mels=64, num_frames=samples * 4 // n_fft + 1)


def draw_sounds(waveforms: torch.Tensor, sampling_rate: int, path: str | Path, titles: Sequence[str] = ()) -> None:
    """Draws the spectrograms of sounds (count, samples) in [-1, 1] side by side into one PNG."""
    mel = look_of(waveforms.shape[1], sampling_rate)
    padded = torch.nn.functional.pad(waveforms.float().cpu(), (0, mel.slice_samples - waveforms.shape[1]))
    draw_mels(mel.encode(padded), mel, path, titles)


def draw_spectrogram(waveform: np.ndarray, sampling_rate: int) -> Image.Image:
    """The spectrogram of one sound as a plain picture, the bass at the bottom."""
    mel = look_of(len(waveform), sampling_rate)
    padded = np.pad(waveform, (0, mel.slice_samples - len(waveform)))
    grey = mel.to_image(mel.encode(torch.from_numpy(padded)[None]))[0]
    colours = (colormaps["magma"](np.asarray(grey)[::-1])[..., :3] * 255).round().astype(np.uint8)
    picture = Image.fromarray(colours)
    return picture.resize((max(256, 4 * picture.width), 256), Image.Resampling.NEAREST)


def save_spectrogram(waveform: np.ndarray, sampling_rate: int, path: str | Path) -> None:
    draw_spectrogram(waveform, sampling_rate).save(path)


def contact_sheet(pictures: Sequence[Path], titles: Sequence[str], path: str | Path, columns: int = 5) -> None:
    """Pictures side by side in one, each with its title. A sheet shows the first 100."""
    width, height, line = 256, 160, 22
    pictures = pictures[:100]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + line + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (file, title) in enumerate(zip(pictures, titles, strict=False)):
        left, top = 8 + index % columns * (width + 8), 8 + index // columns * (height + line + 8)
        with Image.open(file) as picture:
            sheet.paste(picture.resize((width, height)), (left, top + line))
        draw.text((left, top + 4), shorten(title), fill="black")
    sheet.save(path)
