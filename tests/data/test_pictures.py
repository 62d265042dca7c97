"""Pictures of mels: what a person reads off the axes is what was played."""

import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tonefield import MelSpectrogram
from tonefield.data.pictures import draw_mels


def tone(mel: MelSpectrogram, frequency: float) -> torch.Tensor:
    time = torch.arange(mel.slice_samples) / mel.config.sample_rate
    return mel.encode(0.5 * torch.sin(2 * math.pi * frequency * time)[None])


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved, drawn to their end."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (save(self, *args, **options), saved.append(self))
    )
    return saved


@pytest.mark.parametrize("preset", ["image-22k", "fsdd-64", "bigvgan_v2_24khz_100band_256x"])
@pytest.mark.parametrize("frequency", [500, 1000, 2000])
def test_a_tone_is_bright_at_its_tick(tmp_path, figure, preset, frequency):
    mel = MelSpectrogram.from_preset(preset)
    draw_mels(tone(mel, frequency), mel, tmp_path / "tone.png", ["tone"])
    axis = figure[0].axes[0]
    ticks = dict(zip([label.get_text() for label in axis.get_yticklabels()], axis.get_yticks(), strict=True))
    image = axis.get_images()[0]
    brightest = np.asarray(image.get_array())[:, 8:-8].mean(1).argmax()
    assert abs(brightest - ticks[str(frequency)]) <= 1
    assert axis.get_title() == "tone" and axis.get_xlabel() == "s" and axis.get_ylabel() == "Hz"
    left, right, *_ = image.get_extent()
    seconds = mel.config.num_frames * mel.config.hop_length / mel.config.sample_rate
    assert left == 0 and right == pytest.approx(seconds)

    # The same in the picture itself: the row of the tick is the brightest, and low frequencies are below.
    picture = np.array(Image.open(tmp_path / "tone.png").convert("RGB"), dtype=float).sum(2)
    box = axis.get_window_extent()
    rows = picture[
        picture.shape[0] - int(box.y1) + 2 : picture.shape[0] - int(box.y0) - 2, int(box.x0) + 20 : int(box.x1) - 20
    ]
    y = axis.transData.transform((0, ticks[str(frequency)]))[1]
    height_of_a_band = (box.y1 - box.y0) / mel.config.n_mels
    assert abs(box.y1 - 2 - rows.mean(1).argmax() - y) <= 2 * height_of_a_band + 2


def test_decibels_of_the_picture(tmp_path, figure):
    """The loudest bin of a tone at half of full scale lies at -6 dB, in every scale of mels."""
    plain = MelSpectrogram.from_preset("fsdd-64")
    standard = MelSpectrogram.from_preset("fsdd-64", mean=-0.5, std=0.3)
    for mel in plain, standard:
        draw_mels(tone(mel, 1000), mel, tmp_path / "tone.png")
        image = figure[-1].axes[0].get_images()[0]
        assert -9 < image.get_array().max() < -6
        assert image.get_clim()[0] == -80
    np.testing.assert_allclose(*[f.axes[0].get_images()[0].get_array() for f in figure], atol=1e-3)


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2), (16, 4, 4)])
def test_many_side_by_side(tmp_path, figure, count, columns, rows):
    mel = MelSpectrogram.from_preset("fsdd-64")
    titles = [f"number {i}" for i in range(count)]
    draw_mels(tone(mel, 500).expand(count, -1, -1, -1), mel, tmp_path / "all.png", titles)
    axes = [axis for axis in figure[0].axes if axis.get_images()]
    assert [axis.get_title() for axis in axes] == titles
    assert len({round(axis.get_position().x0, 3) for axis in axes}) == columns
    assert len({round(axis.get_position().y0, 3) for axis in axes}) == rows
    picture = Image.open(tmp_path / "all.png")
    assert picture.format == "PNG"
    assert 300 * columns < picture.width < 600 * columns + 150 and 200 * rows < picture.height < 300 * rows + 100


@pytest.mark.parametrize("preset", ["fsdd-64", "bigvgan_v2_24khz_100band_256x"])
def test_silence_can_be_drawn(tmp_path, preset):
    mel = MelSpectrogram.from_preset(preset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_mels(mel.encode(torch.zeros(2, mel.slice_samples)), mel, tmp_path / "silence.png")
    assert (tmp_path / "silence.png").stat().st_size > 1000
