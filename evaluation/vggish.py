"""VGGish (Hershey et al. 2017) from the published weights of its PyTorch port, `vggish-10086976.pth`."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import relu

from tonefield.command_line import UserError
from tonefield.conversion.command import load_strictly, read_checkpoint
from tonefield.evaluation.embeddings import Embedding, fingerprint_of


RATE, WINDOW, HOP, N_FFT, BANDS, FRAMES = 16000, 400, 160, 512, 64, 96
CONVOLUTIONS = (0, 3, 6, 8, 11, 13)  # their places in the published list of layers; between them are ReLUs and pools


def mel_matrix() -> torch.Tensor:
    """Triangles from 125 to 7500 Hz that are linear in mel, not in hertz, and have no common area (bins, bands)."""

    def mel(hertz):
        return 1127 * np.log1p(np.asarray(hertz) / 700)

    edges = np.linspace(mel(125.0), mel(7500.0), BANDS + 2)
    bins = mel(np.arange(N_FFT // 2 + 1) * RATE / N_FFT)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


def log_mel(sounds: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(batch, samples) to (batch, frames, bands): windows of 400 samples without any padding, magnitudes, a log."""
    window = torch.hann_window(WINDOW, device=sounds.device)
    spectra = torch.fft.rfft(sounds.unfold(-1, WINDOW, HOP) * window, N_FFT)
    return (spectra.abs() @ matrix + 0.01).log()


class VGGish(nn.Module):
    """The network, as wide as the weights are."""

    def __init__(self, widths: list[int], hidden: list[int]):
        super().__init__()
        layers: dict[str, nn.Module] = {}
        for place, width, before in zip(CONVOLUTIONS, widths, [1, *widths], strict=False):
            layers[str(place)] = nn.Conv2d(before, width, 3, padding=1)
        self.features = nn.ModuleDict(layers)
        sizes = [widths[-1] * (FRAMES // 16) * (BANDS // 16), *hidden]
        self.embeddings = nn.ModuleDict(
            {str(2 * i): nn.Linear(a, b) for i, (a, b) in enumerate(zip(sizes, hidden, strict=False))}
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Log-mels (batch, 96, 64) to rows (batch, 128). The last ReLU is left out, as for the Fréchet distance."""
        x = patches[:, None]
        for place in CONVOLUTIONS:
            x = relu(self.features[str(place)](x))
            if place not in (6, 11):
                x = nn.functional.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as in the weights' first home
        x = relu(self.embeddings["0"](x))
        return self.embeddings["4"](relu(self.embeddings["2"](x)))


class VGGishEmbedding(Embedding):
    """128 numbers for each 0.96 s: patches of 96 frames that follow one another, without PCA."""

    sampling_rate = RATE
    window = least = (FRAMES - 1) * HOP + WINDOW
    hop = FRAMES * HOP

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "VGGishEmbedding":
        if weights is None:
            raise UserError("VGGish needs its weights: --embeddings vggish=vggish-10086976.pth, the published file.")
        return cls(weights, device)

    def __init__(self, file: str | Path, device: torch.device | str = "cpu"):
        weights = read_checkpoint(Path(file))
        names = [f"features.{place}.weight" for place in CONVOLUTIONS]
        names += [f"embeddings.{place}.weight" for place in (0, 2, 4)]
        if missing := [name for name in names if name not in weights]:
            raise UserError(f"{file} does not hold a VGGish: {missing[0]} is missing.")
        sizes = [len(weights[name]) for name in names]
        self.network = VGGish(sizes[:6], sizes[6:]).eval()
        load_strictly(self.network, weights, file)
        self.network.to(device)
        self.name, self.dim, self.device = f"vggish={Path(file).name}", sizes[-1], device
        self.matrix = mel_matrix().to(device)

    def fingerprint(self) -> str:
        return fingerprint_of(self.network, "vggish", 1)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(log_mel(pieces, self.matrix))[:, None])
