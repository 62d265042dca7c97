"""Trains a classifier of labelled recordings, which the class metrics of evaluate.py then ask.

    python evaluate.py train-classifier --input_dir digits --output_dir digits-classifier
    python evaluate.py train-classifier --dataset_name someone/drums --label_column kind --output_dir drum-classifier
    python evaluate.py --reference held_out --generated samples --classifier digits-classifier \\
        --metrics accuracy is log_mis am fad ndb --embeddings classifier=digits-classifier

The classes are the sub-folders of --input_dir, or a column of its metadata.csv (file_name,label,speaker), or of a
dataset. Some recordings of each class are held out: on them the accuracy is measured and probabilities are calibrated.
Where speakers (sources, sessions) are known, a second network is trained without the recordings of some of them, for
the accuracy on voices that it has never heard; the one that is saved knows all of them.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.recordings import (
    add_source_arguments,
    check_positive,
    check_source,
    open_source,
    read_recordings,
    usual_rate,
)
from tonefield.files import write_text


if TYPE_CHECKING:
    import numpy as np
    import torch

    from tonefield.evaluation.classifier import SoundClassifier


MOST_SECONDS = 4.0  # of a sound that the network sees at a time, unless the flags say otherwise
USUAL_RATE = 16000  # the highest sampling rate, likewise: above 8 kHz little tells classes apart
GAIN_DB = 6.0  # how far levels are changed at random


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = add_source_arguments(parser, "a folder of recordings, with a sub-folder for each class", "train")
    data.add_argument("--label_column", default="label", metavar="NAME", help="the classes (default: %(default)s)")
    data.add_argument(
        "--speaker_column",
        default="speaker",
        metavar="NAME",
        help="who or what is heard, where it is known (default: %(default)s)",
    )
    data.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        metavar="P",
        help="how many recordings of each class are held out (default: %(default)s)",
    )
    model = parser.add_argument_group("classifier")
    model.add_argument("--output_dir", required=True, metavar="DIR", help="where the classifier is written")
    model.add_argument(
        "--sampling_rate",
        type=int,
        metavar="HZ",
        help=f"what the network hears (default: the most frequent rate, at most {USUAL_RATE})",
    )
    model.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="length of the pieces that it hears; longer recordings are cut (default: what 99 %% of the recordings"
        f" fit into, at most {MOST_SECONDS:g})",
    )
    model.add_argument("--num_epochs", type=int, default=10, metavar="N", help="(default: %(default)s)")
    model.add_argument("--batch_size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    model.add_argument("--learning_rate", type=float, default=4e-3, metavar="LR", help="(default: %(default)s)")
    model.add_argument(
        "--frequency_warp",
        type=float,
        default=0.1,
        metavar="P",
        help="how far spectra are stretched at random, as other voices are; 0 where pitch makes the class"
        " (default: %(default)s)",
    )
    model.add_argument(
        "--min_accuracy", type=float, default=0.9, metavar="P", help="warn below it (default: %(default)s)"
    )
    model.add_argument("--device", help="where the network computes (default: the GPU if there is one)")
    model.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    check_source(args)
    check_positive(args, "sampling_rate", "seconds", "num_epochs", "batch_size", "learning_rate", "num_workers")
    if not 0 < args.validation_fraction < 1:
        raise UserError(f"--validation_fraction lies between 0 and 1, not at {args.validation_fraction:g}.")
    if not 0 <= args.frequency_warp < 0.5:
        raise UserError(f"--frequency_warp lies between 0 and 0.5, not at {args.frequency_warp:g}.")
    folder = Path(args.output_dir)
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file: name a folder.")


# ----- recordings


@dataclass
class Labelled:
    """Sounds with their classes, as places in `names`, and their speakers, if these are known."""

    sounds: "list[np.ndarray]"
    labels: "np.ndarray"
    names: list[str]
    speakers: list[str] | None
    sampling_rate: int


def read_labelled(args: argparse.Namespace) -> Labelled:
    """All recordings that can be read and have a class; what is left out is said."""
    import numpy as np

    source = open_source(args)
    where, column = args.input_dir or args.dataset_name, args.label_column
    if column not in source.features:
        known = f"it has {', '.join(source.features)}." if source.features else "it has no columns."
        hint = " Make a sub-folder for each class, or a metadata.csv (file_name,label)." if args.input_dir else ""
        raise UserError(f"--label_column: {where} has no column {column!r} of classes; {known}{hint}")
    recordings, rejects = [], list(source.rejects)
    for recording in source:
        if recording.columns.get(column) is None:
            rejects.append((recording.name, "has no class"))
        else:
            recordings.append(recording)
    rate = args.sampling_rate or min(usual_rate(recordings) or USUAL_RATE, USUAL_RATE)
    kept, sounds = read_recordings(recordings, rate, args.num_workers, rejects)

    feature = source.features[column]
    values = [one.columns[column] for one in kept]
    texts = [feature.names[value] if hasattr(feature, "names") else str(value) for value in values]
    names = sorted(set(texts))
    counts = Counter(texts)
    if len(names) < 2:
        raise UserError(f"A classifier needs two classes or more, and these recordings have {len(names)}.")
    if len(names) > 0.5 * len(texts):
        raise UserError(
            f"{len(texts)} recordings have {len(names)} classes, such as {names[0]!r}: --label_column names a column"
            " of classes that several recordings share."
        )
    if few := [name for name in names if counts[name] < 2]:
        raise UserError(f"The class {few[0]!r} has one recording, of which none can be held out: add some.")
    speakers = [one.columns.get(args.speaker_column) for one in kept]
    known = args.speaker_column in source.features and None not in speakers and len(set(speakers)) > 1
    return Labelled(
        sounds,
        np.array([names.index(text) for text in texts]),
        names,
        [str(speaker) for speaker in speakers] if known else None,
        rate,
    )


def hold_out_of_classes(labels: "np.ndarray", fraction: float, seed: int) -> "np.ndarray":
    """Which recordings are held out: of each class the same share, one at least."""
    import numpy as np

    rng, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        held[of_class[: min(max(1, round(fraction * len(of_class))), len(of_class) - 1)]] = True
    return held


def hold_out_speakers(speakers: Sequence[str], fraction: float, seed: int) -> "np.ndarray":
    """The same by whole speakers: as many as it takes to hold out that share, but never all."""
    import numpy as np

    counts, held = Counter(speakers), set()
    order = np.random.default_rng(seed).permutation(sorted(counts))
    for speaker in order[:-1]:
        held.add(speaker)
        if sum(counts[name] for name in held) >= fraction * len(speakers):
            break
    return np.array([speaker in held for speaker in speakers])


# ----- training


def choose_mel(data: Labelled, seconds: float | None) -> dict[str, Any]:
    """The front end: up to 64 bands, windows of about 64 ms every 16 ms, as long as nearly all recordings."""
    import numpy as np

    from tonefield.training.spectral import window_sizes

    n_fft, rate = window_sizes(data.sampling_rate)[2], data.sampling_rate
    if seconds is None:
        seconds = min(MOST_SECONDS, float(np.quantile([len(sound) for sound in data.sounds], 0.99)) / rate)
    frames = max(16, math.ceil(seconds * rate / (n_fft // 4)) + 1)
    # From the loudest bin of a sound to 60 dB below: what a microphone adds tells speakers apart, and not classes.
    return dict(
        sample_rate=rate, n_fft=n_fft, hop_length=n_fft // 4, n_mels=min(64, rate // 60), num_frames=frames,
        ref="slice", top_db=60.0,
    )  # fmt: skip


def make_mels(data: Labelled, mel, batch_size: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The mels of all pieces of all recordings in [-1, 1], and the number of the recording that each is of."""
    import torch

    size, pieces, owners = mel.slice_samples, [], []
    for index, sound in enumerate(data.sounds):
        starts = [start for start in range(0, len(sound), size) if len(sound) - start >= size // 4] or [0]
        pieces += [torch.from_numpy(sound[start : start + size]) for start in starts]
        owners += [index] * len(starts)
    mels = []
    for start in range(0, len(pieces), batch_size):
        batch = torch.zeros(len(pieces[start : start + batch_size]), size)
        for row, piece in zip(batch, pieces[start : start + batch_size], strict=True):
            row[: len(piece)] = piece
        mels.append(mel.encode(batch.to(mel.device)))
    return torch.cat(mels), torch.tensor(owners, device=mel.device)


def augment(mels: "torch.Tensor", frequency_warp: float, decibel: float, generator: "torch.Generator"):
    """
    Mels in [-1, 1] as other takes of the same sound might look: stretched in frequency (other voices), in time
    (tempo), moved in time, louder or quieter, with some bands and some frames wiped out.

    Args:
        decibel: What 1 dB is in the range of the mels.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    count, device = len(mels), mels.device

    def uniform(low: float, high: float) -> "torch.Tensor":
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 2] = uniform(0.85, 1.15), uniform(-0.15, 0.15)
    stretch = uniform(1 - frequency_warp, 1 + frequency_warp)
    theta[:, 1, 1], theta[:, 1, 2] = stretch, stretch - 1  # band 0 stays where it is
    warped = grid_sample(mels + 1, affine_grid(theta, list(mels.shape), align_corners=False), align_corners=False) - 1
    louder = uniform(-GAIN_DB, GAIN_DB)[:, None, None, None] * decibel
    warped = torch.where(warped > -1, warped + louder, warped).clamp(-1, 1)
    for size, dim in ((mels.shape[2], 2), (mels.shape[3], 3)):
        start, width = uniform(0, 1) * size, uniform(0, 0.2) * size
        place = torch.arange(size, device=device)
        wiped = (place >= start[:, None]) & (place < (start + width)[:, None])
        warped = warped.masked_fill(wiped[:, None, :, None] if dim == 2 else wiped[:, None, None, :], -1)
    return warped


def fit(model: Any, mels: "torch.Tensor", labels: "torch.Tensor", args: argparse.Namespace, title: str) -> None:
    """Trains on mels in [-1, 1] and leaves the model in evaluation mode."""
    import torch
    from tqdm.auto import tqdm

    generator = torch.Generator(mels.device).manual_seed(args.seed)
    low, high = model.front_end.value_range
    decibel = 2 / (high - low)
    steps = math.ceil(len(mels) / args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=steps * args.num_epochs, pct_start=0.25
    )
    # A processor is a third quicker with the channels of a pixel side by side.
    model.train().to(memory_format=torch.channels_last)
    with tqdm(total=steps * args.num_epochs, desc=title, unit="step", disable=None) as bar:
        for _ in range(args.num_epochs):
            order = torch.randperm(len(mels), generator=generator, device=mels.device)
            for rows in order.chunk(steps):  # of nearly equal size: no last batch of one
                batch = augment(mels[rows], args.frequency_warp, decibel, generator)
                batch = model.front_end.standardize(batch).contiguous(memory_format=torch.channels_last)
                logits = model.classify(batch).logits
                loss = torch.nn.functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval().to(memory_format=torch.contiguous_format)


def predict(model: "SoundClassifier", mels: "torch.Tensor", batch_size: int = 256) -> "np.ndarray":
    """Logits of mels in [-1, 1], float64."""
    import torch

    with torch.inference_mode():
        rows = [model.classify(model.front_end.standardize(part)).logits for part in mels.split(batch_size)]
    return torch.cat(rows).double().cpu().numpy()


def of_recordings(logits: "np.ndarray", owners: "np.ndarray", temperature: float) -> "np.ndarray":
    """Log-probabilities of recordings: the logarithm of the mean probabilities of their pieces."""
    import numpy as np
    from scipy.special import log_softmax

    log_p = log_softmax(logits / temperature, axis=1)
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    counts = np.diff(np.append(starts, len(owners)))
    return np.logaddexp.reduceat(log_p, starts, axis=0) - np.log(counts)[:, None]


def calibrate(logits: "np.ndarray", owners: "np.ndarray", labels: "np.ndarray") -> float:
    """
    The temperature with the highest likelihood of recordings whose classes are known (Guo et al. 2017).

    To n recordings comes one that might be of any class, with the probabilities of any of them: few recordings, all
    of them recognised, are no reason for certainty.
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    n = len(labels)

    def loss(log_temperature: float) -> float:
        log_p = of_recordings(logits, owners, math.exp(log_temperature))
        return -float((n * log_p[np.arange(n), labels] + log_p.mean(1)).mean()) / (n + 1)

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.1), math.log(10)), method="bounded").x)


def train_and_measure(data: Labelled, held: "np.ndarray", mels, owners, settings, args, title: str):
    """A network trained on what is not held out; the accuracy and the log-probabilities of what is."""
    import numpy as np
    import torch

    from tonefield.evaluation.classifier import SoundClassifier

    labels = torch.from_numpy(data.labels).to(mels.device)
    out = torch.from_numpy(held).to(mels.device)[owners]
    some = mels[~out]
    torch.manual_seed(args.seed)
    standard = settings | dict(mean=float(some.mean()), std=max(float(some.std()), 1e-3))
    model = SoundClassifier(data.names, standard).to(mels.device)
    fit(model, some, labels[owners[~out]], args, title)
    logits, whose, truth = predict(model, mels[out]), owners[out].cpu().numpy(), data.labels[held]
    temperature = calibrate(logits, whose, truth)
    log_p = of_recordings(logits, whose, temperature)
    model.register_to_config(temperature=temperature)
    return model, float(np.mean(log_p.argmax(1) == truth)), log_p


def main(args: argparse.Namespace) -> None:
    check(args)

    import torch

    from tonefield.evaluation.class_metrics import class_scores
    from tonefield.models.mel_spectrogram import MelSpectrogram

    data = read_labelled(args)
    counts = Counter(data.labels.tolist())
    print(
        f"{len(data.sounds)} recordings of {len(data.names)} classes ({min(counts.values())} to"
        f" {max(counts.values())} each), resampled to {data.sampling_rate} Hz where they differ"
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = choose_mel(data, args.seconds)
    try:
        mel: Any = MelSpectrogram(**settings)
        mel = mel.to(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"The classifier cannot be built: {first_line(error)}") from None
    mels, owners = make_mels(data, mel, 256)
    held = hold_out_of_classes(data.labels, args.validation_fraction, args.seed)
    card: dict[str, Any] = {"recordings": int((~held).sum()), "held_out_recordings": int(held.sum())}
    if data.speakers is not None:
        unheard = hold_out_speakers(data.speakers, args.validation_fraction, args.seed)
        who = sorted({speaker for speaker, out in zip(data.speakers, unheard, strict=True) if out})
        _, accuracy, _ = train_and_measure(data, unheard, mels, owners, settings, args, "without some speakers")
        card |= {"accuracy_unheard_speakers": accuracy, "unheard_speakers": who}
        print(f"accuracy on speakers never heard ({', '.join(who)}): {accuracy:.1%} of {int(unheard.sum())}")
    model, accuracy, log_p = train_and_measure(data, held, mels, owners, settings, args, "training")
    card |= {"accuracy": accuracy, "held_out": class_scores(log_p)}
    print(
        f"accuracy on held-out recordings: {accuracy:.1%} of {int(held.sum())} (temperature"
        f" {model.config.temperature:.3g})"
    )
    if accuracy < args.min_accuracy:
        print(
            f"warning: this is below {args.min_accuracy:.0%}: what such a classifier says of generated sounds means"
            " little. More recordings, more epochs, or classes that differ more would help.",
            file=sys.stderr,
        )
    model.register_to_config(card=card)
    model.save_pretrained(args.output_dir)
    about = {"flags": {name: value for name, value in vars(args).items() if not callable(value)}} | card
    write_text(Path(args.output_dir, "training.json"), json.dumps(about, indent=1))
    print(f"the classifier is in {args.output_dir}")
