"""PANNs' CNN14 (Kong et al. 2020) from the published weights, `Cnn14_mAP=0.431.pth` and those of 16 and 8 kHz."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tonefield.command_line import UserError
from tonefield.conversion.command import load_strictly, read_checkpoint
from tonefield.evaluation.embeddings import Embedding, fingerprint_of
from tonefield.models.mel_spectrogram import power, stft


# Samples of a window: sampling rate, and samples from one window to the next.
RATES = {1024: (32000, 320), 512: (16000, 160), 256: (8000, 80)}


class Block(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)


class CNN14(nn.Module):
    """The network, as wide as the weights are; its mel filterbank is one of the weights."""

    logmel_extractor: Any

    def __init__(self, bins: int, bands: int, widths: list[int], dim: int, classes: int):
        super().__init__()
        self.n_fft = 2 * (bins - 1)
        self.hop = RATES[self.n_fft][1]
        self.logmel_extractor = nn.Module()
        self.logmel_extractor.register_buffer("melW", torch.zeros(bins, bands))
        self.bn0 = nn.BatchNorm2d(bands)
        for index, (before, width) in enumerate(zip([1, *widths], widths, strict=False), 1):
            setattr(self, f"conv_block{index}", Block(before, width))
        self.fc1, self.fc_audioset = nn.Linear(widths[-1], dim), nn.Linear(dim, classes)

    def log_mel(self, sounds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Decibels (batch, frames, bands) of sounds that are reflected at either end, each at its own."""
        half, last = self.n_fft // 2, lengths[:, None] - 1
        steps = torch.arange(1, half + 1, device=sounds.device)
        padded = nn.functional.pad(sounds, (half, half))
        padded[:, :half] = sounds[:, 1 : half + 1].flip(1)
        padded.scatter_(1, half + last + steps, sounds.gather(1, last - steps))
        window = torch.hann_window(self.n_fft, device=sounds.device)
        # A processor computes pieces that fit into its cache faster than a large batch at once.
        rows = max(1, 2**17 // sounds.shape[1]) if sounds.device.type == "cpu" else len(sounds)
        bands = []
        for part in padded.split(rows):
            bands.append(power(stft(part, window, self.hop)) @ self.logmel_extractor.melW)
        return 10 * torch.cat(bands).clamp(min=1e-10).log10()

    def forward(self, sounds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        Sounds (batch, samples) to rows (batch, dim).

        Frames after the end of a sound are set to zero before each convolution, which is what a convolution sees
        beyond the end of a sound that is alone: rows do not depend on the batch.
        """
        x, frames = self.log_mel(sounds, lengths)[:, None], lengths // self.hop + 1
        mixed = bool((lengths != lengths[0]).any())

        def keep(x: torch.Tensor) -> torch.Tensor:
            if not mixed:
                return x
            return x * (torch.arange(x.shape[2], device=x.device) < frames[:, None])[:, None, :, None]

        x = keep(self.bn0(x.transpose(1, 3)).transpose(1, 3))
        for index in range(1, 7):
            block = getattr(self, f"conv_block{index}")
            x = keep(relu(block.bn1(block.conv1(x)), inplace=True))
            x = keep(relu(block.bn2(block.conv2(x)), inplace=True))
            if index < 6:
                frames = frames // 2
                x = keep(avg_pool2d(x, 2))
        x = x.mean(3)
        # Nothing is below zero, so that the maximum is not among the frames that were set to it.
        return relu(self.fc1(x.amax(2) + x.sum(2) / frames[:, None]))

    def fuse(self) -> None:
        """Makes each normalisation a part of the convolution before it: two passes over the memory less."""
        for index in range(1, 7):
            block = getattr(self, f"conv_block{index}")
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.bn2)
            block.bn1, block.bn2 = nn.Identity(), nn.Identity()


def load_cnn14(file: str | Path) -> CNN14:
    checkpoint = read_checkpoint(Path(file))
    weights = dict(checkpoint.get("model", checkpoint))
    try:
        bins, bands = weights["logmel_extractor.melW"].shape
        widths = [len(weights[f"conv_block{index}.conv1.weight"]) for index in range(1, 7)]
        dim, classes = len(weights["fc1.weight"]), len(weights["fc_audioset.weight"])
    except KeyError as error:
        raise UserError(f"{file} does not hold a CNN14: {error.args[0]} is missing.") from None
    if 2 * (bins - 1) not in RATES:
        raise UserError(f"{file} has windows of {2 * (bins - 1)} samples; known are those of 8, 16 and 32 kHz.")
    network = CNN14(bins, bands, widths, dim, classes).eval()
    for part in ("real", "imag"):  # the Fourier transform, which is the same everywhere
        weights.pop(f"spectrogram_extractor.stft.conv_{part}.weight", None)
    load_strictly(network, weights, file)
    network.fuse()
    return network


class CNN14Embedding(Embedding):
    """2048 numbers for each recording of up to 30 s, the activations before the classes."""

    mixed_lengths = True

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "CNN14Embedding":
        if weights is None:
            raise UserError("CNN14 needs its weights: --embeddings cnn14=FILE, such as Cnn14_16k_mAP=0.438.pth.")
        return cls(weights, device)

    def __init__(self, file: str | Path, device: torch.device | str = "cpu"):
        self.network = load_cnn14(file).to(device)
        self.name, self.dim, self.device = f"cnn14={Path(file).name}", self.network.fc1.out_features, device
        self.sampling_rate, hop = RATES[self.network.n_fft]
        self.window, self.least = 30 * self.sampling_rate, 31 * hop

    def fingerprint(self) -> str:
        return fingerprint_of(self.network, type(self).__name__, 2)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(pieces, lengths)[:, None])


class CNN14Classifier(CNN14Embedding):
    """The logits of AudioSet's 527 classes."""

    def __init__(self, file: str | Path, device: torch.device | str = "cpu"):
        super().__init__(file, device)
        self.dim = self.network.fc_audioset.out_features

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network.fc_audioset(self.network(pieces, lengths))[:, None])
