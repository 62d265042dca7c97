"""Sets of pictures, the networks that turn them into features, and the inception score."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from tqdm.auto import tqdm

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.class_metrics import bootstrap_interval, log_inception_score
from tonefield.evaluation.embeddings import Embedding, fingerprint_of
from tonefield.evaluation.images import EXTENSIONS
from tonefield.evaluation.inception import SIZE, load_inception, resize_like_tensorflow_1
from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.sets import Sample, SampleSet, in_parallel


SPLITS = 10  # of the inception score as it is published


class ImageSet(SampleSet):
    """Pictures: `ImageSet.open` reads a folder."""

    @classmethod
    def open(
        cls, folder: str | Path, num_workers: int = 2, cache_dir: str | Path | None = None, flag: str = ""
    ) -> "ImageSet":
        """The pictures below a folder. Each is read once; those that cannot be come into `rejects`."""
        root = Path(folder)
        if not root.is_dir():
            raise UserError(f"{flag} {folder} {'is not a folder' if root.exists() else 'does not exist'}.".strip())
        paths = sorted(
            path for path in root.rglob("*")
            if path.suffix.lower() in EXTENSIONS and not any(p.startswith(".") for p in path.relative_to(root).parts)
        )  # fmt: skip
        if not paths:
            raise UserError(f"There are no pictures in {folder} (looked for {' '.join(sorted(EXTENSIONS))}).")

        def scan(path: Path) -> Sample | tuple[str, str]:
            name = path.relative_to(root).as_posix()
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                read_picture(path)
            except Exception as error:  # what a damaged picture raises is up to its format
                return name, f"cannot be read as a picture ({first_line(error)})"
            return Sample(name, path, digest)

        scanned = in_parallel(scan, paths, num_workers)
        bar = tqdm(scanned, f"reading {folder}", len(paths), unit="file", disable=None, leave=False)
        samples, rejects = [], []
        for one in bar:
            (samples if isinstance(one, Sample) else rejects).append(one)
        if not samples:
            raise UserError(
                f"None of the {len(paths)} pictures in {folder} can be used; {rejects[0][0]} {rejects[0][1]}."
            )
        return cls(str(folder), samples, rejects, num_workers, cache_dir)

    def load(self, samples: Sequence[Sample], embedding: Embedding) -> list[np.ndarray]:
        return [read_picture(sample.source) for sample in samples]


def read_picture(path: Path) -> np.ndarray:
    """A picture as uint8 of shape (height, width, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


class ImageEncoder(Embedding):
    """
    What turns a picture into one row of features. A subclass prepares pictures one by one, to one size, and encodes
    batches of them; if it is a classifier, the last, linear layer makes logits of the features.
    """

    sampling_rate = 0
    head: tuple[np.ndarray, np.ndarray] | None = None  # weight (classes, dim) and bias, float64

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def embed(self, sounds: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
        """A row for each picture, of shape (1, dim)."""
        rows = []
        for start in range(0, len(sounds), batch_size):
            batch = torch.stack([self.prepare(picture) for picture in sounds[start : start + batch_size]])
            rows += list(self.encode(batch.to(self.device)).float().cpu().numpy()[:, None])
        return rows

    def log_posteriors(self, rows: np.ndarray) -> np.ndarray:
        if self.head is None:
            raise ValueError(f"{self.name} knows no classes: name a classifier, or inception=FILE, with --encoder.")
        weight, bias = self.head
        return log_softmax(np.asarray(rows, np.float64) @ weight.T + bias, axis=1)


class InceptionEncoder(ImageEncoder):
    """2048 features of the standard network. As published, its logits have no bias."""

    dim = 2048

    def __init__(self, file: str, device: torch.device | str = "cpu"):
        self.model = load_inception(file).to(device)
        self.name, self.device = f"inception={file}", device
        weight = self.model.fc.weight.detach().double().cpu().numpy()
        self.head = weight, np.zeros(len(weight))

    def fingerprint(self) -> str:
        return fingerprint_of(self.model, "inception", 1)

    @property
    def windowing(self) -> str:
        return f"resized to {SIZE} x {SIZE} as TensorFlow 1 does, (x - 128) / 128"

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
        return (resize_like_tensorflow_1(pixels, SIZE)[0] - 128) / 128

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)


class TransformersEncoder(ImageEncoder):
    """
    An image model of transformers. Of a classifier, the features are what its last linear layer sees; otherwise they
    are what the model calls pooled, or projected where it knows texts as well, or else the mean of its last states.
    """

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        from tonefield.evaluation.encoders import load_pretrained

        try:
            architectures = AutoConfig.from_pretrained(weights, trust_remote_code=False).architectures or []
            self.processor = AutoImageProcessor.from_pretrained(weights, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"--encoder {weights} is neither inception=FILE nor an image model of transformers that can be"
                f" loaded: {first_line(error)}"
            ) from None
        self.name, self.device, self.last = f"encoder={weights}", device, None
        if any(name.endswith("ForImageClassification") for name in architectures):
            self.model = load_pretrained(AutoModelForImageClassification, weights).to(device)
            classes = self.model.config.num_labels
            layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == classes]
            if not layers:
                raise UserError(
                    f"--encoder {weights}: its classes are not made by a linear layer, as they have to be."
                )
            self.last = layers[-1]
            bias = torch.zeros(classes) if self.last.bias is None else self.last.bias
            self.head = tuple(t.detach().double().cpu().numpy() for t in (self.last.weight, bias))  # pyright: ignore
            self.last.register_forward_pre_hook(lambda _, inputs: setattr(self, "seen", inputs[0]))
        else:
            self.model = load_pretrained(AutoModel, weights).to(device)
        blank = self.prepare(np.zeros((8, 8, 3), np.uint8))[None].to(device)
        with torch.inference_mode():
            self.dim = self.encode(blank).shape[1]

    def fingerprint(self) -> str:
        settings = {key: str(value) for key, value in self.processor.to_dict().items()}
        return fingerprint_of(self.model, "image encoder", 1, settings)

    @property
    def windowing(self) -> str:
        digest = hashlib.sha256(json.dumps(self.processor.to_dict(), default=str, sort_keys=True).encode())
        return f"prepared by {type(self.processor).__name__} {digest.hexdigest()[:8]}"

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        return self.processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        if self.last is not None:
            self.model(batch)
            return self.seen.flatten(1)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(batch)
        else:
            output = self.model(batch)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def load_encoder(name: str, device: torch.device | str = "cpu") -> ImageEncoder:
    """`inception=FILE`, or a folder or Hub id of transformers."""
    kind, _, file = name.partition("=")
    if kind == "inception":
        if not file:
            raise UserError("--encoder inception needs its weights: inception=pt_inception-2015-12-05-6726825d.pth.")
        return InceptionEncoder(file, device)
    return TransformersEncoder(name, device)


def inception_score(comparison: Comparison) -> dict[str, Any]:
    """Of all pictures, and, as it is published, the mean and spread over ten parts of them."""
    encoder: Any = comparison.embedding
    rows = comparison.generated.embed(encoder, comparison.options.batch_size).rows
    log_p = encoder.log_posteriors(rows)

    def score(part: np.ndarray) -> float:
        return float(np.exp(log_inception_score(part)))

    result: dict[str, Any] = {"value": score(log_p), "clips": [len(log_p)], "classes": log_p.shape[1]}
    if len(log_p) >= 2 * SPLITS:
        parts = [score(part) for part in np.array_split(log_p, SPLITS)]
        result |= {"splits": SPLITS, "splits_mean": float(np.mean(parts)), "splits_std": float(np.std(parts))}
    if comparison.options.bootstrap:
        result["interval"] = bootstrap_interval(score, log_p, comparison.options.seed, comparison.options.bootstrap)
    return result
