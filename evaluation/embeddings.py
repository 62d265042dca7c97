"""Embeddings by name: what turns sounds into rows of numbers that distances are taken of."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tonefield.command_line import UserError
from tonefield.evaluation.metrics import EMBEDDINGS


class Embedding:
    """
    What turns sounds into rows of numbers. A subclass has these attributes, and `forward`.

    Args:
        name: What reports call it.
        sampling_rate: Of the sounds that it is given.
        dim: Numbers of a row.
        window: Samples of the pieces that a sound is cut into; `None`: it is one piece.
        hop: From one piece to the next.
        least: Pieces shorter than this are left out, unless a sound has no other: then silence completes it.
    """

    name: str
    sampling_rate: int
    dim: int
    window: int | None = None
    hop: int | None = None
    least: int = 1
    mixed_lengths = False  # whether `forward` takes pieces of several lengths at a time
    device: torch.device | str = "cpu"

    def fingerprint(self) -> str:
        """Tells embeddings apart: equal when the same sound gives the same rows."""
        raise NotImplementedError

    @property
    def windowing(self) -> str:
        """How a sound is cut, in words."""
        rate = self.sampling_rate
        if self.window is None:
            return f"whole recordings, completed by silence to {self.least / rate:g} s"
        return (
            f"{self.window / rate:g} s, every {(self.hop or self.window) / rate:g} s, at least {self.least / rate:g} s"
        )

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Rows (n, dim) of each of the pieces (batch, samples); zeros follow after their lengths."""
        raise NotImplementedError

    def cut(self, sound: np.ndarray) -> list[np.ndarray]:
        """The pieces of a sound, in order."""
        hop = self.hop or self.window or 1
        starts = range(0, len(sound) or 1, hop) if self.window else [0]
        pieces = [sound[start : start + self.window] if self.window else sound for start in starts]
        long_enough = [piece for piece in pieces if len(piece) >= self.least]
        return long_enough or [np.pad(pieces[0], (0, self.least - len(pieces[0])))]

    @torch.inference_mode()
    def embed(self, sounds: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
        """
        The rows of each sound, float32 of shape (n, dim).

        Pieces of equal length, or of similar length where the network allows for it, are computed together; the rows
        of a sound do not depend on the others.
        """
        pieces = [(index, piece) for index, sound in enumerate(sounds) for piece in self.cut(sound)]
        order = sorted(range(len(pieces)), key=lambda place: len(pieces[place][1]))
        rows: list[Any] = [None] * len(pieces)
        batch: list[int] = []
        for place, following in zip(order, [*order[1:], None], strict=True):
            batch.append(place)
            same = following is not None and len(pieces[following][1]) == len(pieces[place][1])
            if len(batch) < batch_size and following is not None and (same or self.mixed_lengths):
                continue
            lengths = torch.tensor([len(pieces[index][1]) for index in batch])
            padded = torch.zeros(len(batch), int(lengths.max()))
            for row, index in zip(padded, batch, strict=True):
                row[: len(pieces[index][1])] = torch.from_numpy(pieces[index][1])
            outputs = self.forward(padded.to(self.device), lengths.to(self.device))
            joined = torch.cat(outputs).float().cpu().numpy()  # one copy from the device for all
            ends = np.cumsum([len(output) for output in outputs])
            for index, output in zip(batch, np.split(joined, ends[:-1]), strict=True):
                rows[index] = output
            batch = []
        result: list[list[np.ndarray]] = [[] for _ in sounds]
        for (index, _), piece_rows in zip(pieces, rows, strict=True):
            result[index].append(piece_rows)
        return [np.concatenate(of_sound) for of_sound in result]


class MelStatistics(Embedding):
    """
    Statistics of log-mels, an embedding that has no weights and so needs nothing to be downloaded.

    Of each piece of a second, in units of 10 dB: mean and standard deviation of each mel band over time, and of
    groups of bands how much they rise and how much they fall within an eighth of a second, which tells sounds from
    reversed ones. It hears levels, timbre, noise and attacks, not words or melodies.
    """

    name, sampling_rate, mixed_lengths = "mel", 16000, True
    bands, groups, lag = 32, 16, 8
    dim = 2 * bands + 2 * groups
    window, least = 16000, 4000

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "MelStatistics":
        if weights:
            raise UserError(f"The embedding mel has no weights: leave out ={weights}.")
        return cls(device)

    def __init__(self, device: torch.device | str = "cpu"):
        from tonefield.models import MelSpectrogram

        self.device = device
        self.mel = MelSpectrogram(16000, 1024, 256, self.bands, 64, f_min=20.0)
        self.mel.to(torch.device(device))  # pyright: ignore

    def fingerprint(self) -> str:
        return f"mel-statistics-1-{self.mel.fingerprint()}"

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        low, high = self.mel.value_range
        mels = (self.mel.encode(pieces)[:, 0].double() + 1) * ((high - low) / 20)  # (batch, bands, frames)
        frames = 1 + lengths // self.mel.config.hop_length
        there = (torch.arange(mels.shape[-1], device=mels.device) < frames[:, None])[:, None]
        mean = (mels * there).sum(-1) / frames[:, None]
        spread = (((mels - mean[..., None]) * there).square().sum(-1) / frames[:, None]).sqrt()
        grouped = mels.unflatten(1, (self.groups, -1)).mean(2)
        steps = (grouped[..., self.lag :] - grouped[..., : -self.lag]) * there[..., self.lag :]
        counts = (frames - self.lag)[:, None]
        rises = (steps.clamp(min=0).square().sum(-1) / counts).sqrt()
        falls = (steps.clamp(max=0).square().sum(-1) / counts).sqrt()
        return list(torch.cat([mean, spread, rises, falls], 1)[:, None])


def fingerprint_of(network: torch.nn.Module, *settings: Any) -> str:
    """Tells networks apart: equal when weights and settings are."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_embedding(name: str, device: str | torch.device = "cpu") -> Embedding:
    """An embedding by name, `NAME` or `NAME=WEIGHTS`; `evaluate.py --help` lists them."""
    kind, _, weights = name.partition("=")
    if kind not in EMBEDDINGS:
        raise UserError(f"There is no embedding {kind!r}; there are {', '.join(EMBEDDINGS)}.")
    _, module, attribute = EMBEDDINGS[kind]
    embedding = getattr(importlib.import_module(f"tonefield.evaluation.{module}"), attribute)
    return embedding.from_name(weights or None, device)
