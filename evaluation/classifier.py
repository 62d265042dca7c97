"""A small classifier of sounds, and what evaluation uses of it: features and posteriors."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.embeddings import Embedding, fingerprint_of
from tonefield.models.mel_spectrogram import MelSpectrogram


@dataclass
class SoundClassifierOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): Calibrated: their softmax are probabilities.
        features (`torch.Tensor` of shape `(batch, 2 * widths[-1])`): What the last, linear layer sees.
    """

    logits: torch.Tensor
    features: torch.Tensor


class SoundClassifier(ModelMixin, ConfigMixin):
    r"""
    Tells the classes of sounds apart: a convolutional network on mels.

    Each block halves bands and frames. The mean and the maximum of what is left are the features. `evaluate.py
    train-classifier` trains it.

    Args:
        labels (`list[str]`): The names of the classes.
        mel (`dict`): The arguments of the front end, a [`MelSpectrogram`]; its `num_frames` are the length of a sound
            that the network sees, its `mean` and `std` the normalisation.
        widths (`tuple[int, ...]`, *optional*, defaults to `(24, 48, 96, 128)`): Channels of the blocks.
        temperature (`float`, *optional*, defaults to 1.0): What logits are divided by, so that they are calibrated.
        card (`dict`, *optional*): What is known of the training, such as the accuracy on held-out recordings.
    """

    @register_to_config
    def __init__(
        self,
        labels: list[str],
        mel: dict[str, Any],
        widths: tuple[int, ...] = (24, 48, 96, 128),
        temperature: float = 1.0,
        card: dict[str, Any] | None = None,
    ):
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels are two different names or more, not {list(labels)}.")
        self.front_end = MelSpectrogram(**mel)
        blocks, channels = [], 1
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels = width
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(2 * channels, len(labels))

    @property
    def labels(self) -> list[str]:
        return list(self.config.labels)

    @property
    def sampling_rate(self) -> int:
        return self.front_end.config.sample_rate

    def classify(self, mels: torch.Tensor) -> SoundClassifierOutput:
        """The same for mels (batch, 1, n_mels, frames) as `front_end.encode` returns them."""
        x = self.body(mels)
        features = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return SoundClassifierOutput(self.head(features) / self.config.temperature, features)

    def forward(self, waveform: torch.Tensor) -> SoundClassifierOutput:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)`):
                At `sampling_rate`, at most `front_end.slice_samples` samples; silence completes them.
        """
        missing = self.front_end.slice_samples - waveform.shape[-1]
        if missing < 0:
            raise ValueError(
                f"A waveform has {waveform.shape[-1]} samples, but the classifier sees {self.front_end.slice_samples}:"
                " cut it with `classifier.front_end.slices` and take the mean of the probabilities."
            )
        return self.classify(self.front_end.encode(nn.functional.pad(waveform, (0, missing))))


def is_sound_classifier(path: str) -> bool:
    """Whether a folder, or a repository on the Hub, holds a [`SoundClassifier`]."""
    try:
        return SoundClassifier.load_config(path).get("_class_name") == SoundClassifier.__name__
    except (OSError, ValueError):
        return False


def load_sound_classifier(path: str, device: torch.device | str = "cpu") -> SoundClassifier:
    """What `evaluate.py train-classifier` has written, for inference."""
    try:
        config = SoundClassifier.load_config(path)
        if config.get("_class_name") != SoundClassifier.__name__:
            kind = config.get("_class_name") or config.get("model_type") or "something else"
            raise ValueError(f"it holds a {kind}")
        model: Any = SoundClassifier.from_pretrained(path, use_safetensors=True)
        return model.eval().to(device)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a classifier that evaluate.py train-classifier has made: {first_line(error)}"
        ) from None


class _ClassifierRows(Embedding):
    """A row for each piece of a sound, as long as what the classifier was trained on."""

    mixed_lengths = True  # silence completes all pieces to one length

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        self.model = load_sound_classifier(weights, device)
        self.labels, self.card = self.model.labels, self.model.config.card or {}
        self.name, self.device, self.sampling_rate = f"classifier={weights}", device, self.model.sampling_rate
        self.window = self.model.front_end.slice_samples
        self.least = self.window // 4

    def fingerprint(self) -> str:
        c = self.model.config
        return fingerprint_of(self.model, type(self).__name__, 1, self.labels, c.mel, c.temperature)


class ClassifierFeatures(_ClassifierRows):
    """The features of a [`SoundClassifier`], for distances: with them FAD is the FID of class metrics."""

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "ClassifierFeatures":
        if weights is None:
            raise UserError("Name the folder of the classifier: classifier=DIR (evaluate.py train-classifier).")
        return cls(weights, device)

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        super().__init__(weights, device)
        self.dim = self.model.head.in_features

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        return list(self.model(pieces).features[:, None])


class ClassifierLogits(_ClassifierRows):
    """Its calibrated logits."""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        super().__init__(weights, device)
        self.dim = len(self.labels)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        return list(self.model(pieces).logits[:, None])
