"""How likely a pipeline holds recordings that it has not seen to be: bits per dimension, or bits per token.

    python evaluate.py likelihood --model pipelines/digits --input_dir held_out
    python evaluate.py likelihood --model pipelines/digits --dataset_name digits-mels --split validation --out nll.json

Of a pipeline on mels (Poisson flow, score SDE) it is the exact density of the mels as the model sees them, by the
change of density along the sampling equation: bits for each number of the mel, often negative, for it is a density.
Of a pipeline on tokens it is an upper bound of -ln p: nats and bits for each token. Both compare models that see the
same mels or tokens, and no others. Recordings are cut into what the model sees at a time; of a mel the last piece ends
with the recording, and silence completes a recording that is shorter.

--dataset_name is a dataset of recordings, of mels (audio_to_images.py) or of tokens (audio_to_tokens.py).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.recordings import (
    add_source_arguments,
    check_positive,
    check_source,
    open_source,
    read_recordings,
)
from tonefield.files import write_text


if TYPE_CHECKING:
    import numpy as np
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = add_source_arguments(parser, "a folder of recordings, to any depth", "validation")
    data.add_argument(
        "--label_column",
        default="label",
        metavar="NAME",
        help="their classes, for a model that knows classes; '' for none (default: %(default)s)",
    )
    data.add_argument("--max_samples", type=int, metavar="N", help="so many recordings (rows) at most")
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="NAME", help="a pipeline: its folder or its id on the Hub")
    model.add_argument(
        "--divergence",
        choices=("hutchinson", "exact"),
        default="hutchinson",
        help="of mels: an unbiased estimate, or the exact value at as many times the cost as a mel has numbers"
        " (default: %(default)s)",
    )
    model.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="E",
        help="of mels: of the adaptive solver, relative and absolute (default: %(default)s)",
    )
    model.add_argument(
        "--num_draws", type=int, default=16, metavar="N", help="of tokens: network calls each (default: %(default)s)"
    )
    model.add_argument("--batch_size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    model.add_argument("--device", help="where networks compute (default: the GPU if there is one)")
    model.add_argument("--seed", type=int, default=0, help="of whatever is drawn by chance (default: %(default)s)")
    model.add_argument(
        "--out", metavar="FILE.json", help="where all numbers are written, with those of each recording"
    )


# ----- what a model sees of recordings


def kind_of(pipe: Any) -> str:
    """`"mels"` or `"tokens"`; pipelines without a likelihood are refused."""
    if hasattr(pipe, "log_likelihood") and getattr(pipe, "mel", None) is not None:
        return "mels"
    if hasattr(pipe, "audio_tokenizer"):
        return "tokens"
    raise ValueError(
        f"A {type(pipe).__name__}{' without a mel' * hasattr(pipe, 'log_likelihood')} has no likelihood of sounds:"
        " MelPFGMPipeline and SEDDTokenPipeline have."
    )


def pieces_of_sounds(pipe: Any, sounds: "Sequence[np.ndarray]") -> "tuple[list[torch.Tensor], list[int]]":
    """What the model sees of sounds at its own rate, mels or codes, and the number of the sound that each is of."""
    import torch

    pieces, owners = [], []
    for index, sound in enumerate(sounds):
        waveform = torch.from_numpy(sound)
        if kind_of(pipe) == "mels":
            found = list(pipe.mel.encode(pipe.mel.slices(waveform, "overlap").to(pipe.mel.device)))
        else:
            codec = pipe.audio_tokenizer
            codes = codec.encode(waveform[None].to(codec.device), codec.sampling_rate)[0]
            found = list(codes.split(pipe.transformer.config.max_length or codes.shape[1], dim=1))
        pieces += found
        owners += [index] * len(found)
    return pieces, owners


def pieces_of_rows(pipe: Any, rows: Any, record: dict, name: str) -> "tuple[list[torch.Tensor], list[int]]":
    """The same of the rows of a dataset of mels or tokens that was made for the model."""
    import numpy as np
    import torch

    kind = kind_of(pipe)
    theirs = {"tonefield-mel": "mels", "tonefield-tokens": "tokens"}.get(record["format"], record["format"])
    if theirs != kind:
        raise UserError(f"{name} holds {theirs}, but the model was made for {kind}.")
    ours = (pipe.mel if kind == "mels" else pipe.audio_tokenizer).fingerprint()
    other = (record if kind == "mels" else record["codec"])["fingerprint"]
    if ours != other:
        raise UserError(
            f"{name} was made by a front end {other}, but the model sees sounds through {ours}: make it again with the"
            " settings of the model."
        )
    pieces, owners = [], []
    for index, row in enumerate(rows):
        if kind == "mels":
            found = [pipe.mel.standardize(torch.from_numpy(np.asarray(row["mel"], np.float32)))]
        else:
            codes = torch.from_numpy(np.asarray(row["codes"], np.int64))
            found = list(codes.split(pipe.transformer.config.max_length or codes.shape[1], dim=1))
        pieces += found
        owners += [index] * len(found)
    return pieces, owners


# ----- likelihood


def negative_log_likelihoods(
    pipe: Any,
    pieces: "Sequence[torch.Tensor]",
    labels: Sequence[Any] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    divergence: str = "hutchinson",
    tolerance: float = 1e-4,
    num_draws: int = 16,
) -> "tuple[np.ndarray, np.ndarray]":
    """
    -ln p of mels in nats and how many numbers each has, or an upper bound of it for codes and how many tokens.

    Pieces of equal length are computed together. What is drawn by chance belongs to the place of a piece alone.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from tonefield.training.randomness import make_generators

    device = pipe._execution_device
    nats, sizes = np.zeros(len(pieces)), np.array([piece.numel() for piece in pieces])
    by_length: dict[int, list[int]] = {}
    for place, piece in enumerate(pieces):
        by_length.setdefault(piece.shape[-1], []).append(place)
    batches = [
        places[start : start + batch_size]
        for places in by_length.values()
        for start in range(0, len(places), batch_size)
    ]
    with tqdm(total=len(pieces), desc="likelihood", unit="piece", disable=None) as bar:
        for places in batches:
            batch = torch.stack([pieces[place] for place in places]).to(device)
            theirs = None if labels is None else [labels[place] for place in places]
            generators = make_generators(seed, "likelihood", places, device)
            if kind_of(pipe) == "mels":
                found = -pipe.log_likelihood(
                    batch, theirs, divergence=divergence, generator=generators, rtol=tolerance, atol=tolerance
                ).log_likelihood
            else:
                found = token_bound(pipe, batch, theirs, num_draws, generators)
            nats[places] = found.double().cpu().numpy()
            bar.update(len(places))
    return nats, sizes


def token_bound(pipe: Any, codes: "torch.Tensor", labels: Any, num_draws: int, generators: Any) -> "torch.Tensor":
    """An upper bound of -ln p of codes (batch, codebooks, frames), per sound in nats."""
    from tonefield.pipelines.tonefield_classes import read_labels

    names = read_labels(labels, pipe.num_classes, pipe.config.label2id, codes.device)
    conditions = pipe._conditions(len(codes), names, None, None)

    def network(tokens, sigma):
        return pipe.transformer(tokens, sigma, **conditions).sample

    return pipe.scheduler.nll_bound(network, pipe._to_tokens(codes), num_draws, generators)


def per_unit(
    nats: "np.ndarray", sizes: "np.ndarray", owners: Sequence[int]
) -> "tuple[float, tuple[float, float] | None, np.ndarray]":
    """
    Nats for each dimension (token): of all pieces, its 95 % interval, and of each recording.

    It is a ratio of sums, whose interval follows from how recordings scatter about it; of one there is none.
    """
    import numpy as np

    totals = np.bincount(owners, nats)
    counts = np.bincount(owners, sizes)
    there = counts > 0
    totals, counts = totals[there], counts[there]
    ratio, n = totals.sum() / counts.sum(), len(counts)
    if n < 2:
        return float(ratio), None, totals / counts
    scatter = np.square(totals - ratio * counts).sum() / (n - 1)
    half = 1.96 * math.sqrt(scatter / n) / counts.mean()
    return float(ratio), (float(ratio - half), float(ratio + half)), totals / counts


def measure(pipe: Any, pieces: Any, owners: Sequence[int], labels: Sequence[Any] | None, **options: Any) -> dict:
    """What is reported: nats and bits for each dimension or token, with intervals."""
    import numpy as np

    of_pieces = None if labels is None else [labels[owner] for owner in owners]
    nats, sizes = negative_log_likelihoods(pipe, pieces, of_pieces, **options)
    if not np.isfinite(nats).all():
        raise UserError(f"The likelihood of recording {owners[int(np.isfinite(nats).argmin())]} is not a number.")
    ratio, interval, each = per_unit(nats, sizes, owners)

    def in_bits(value):
        return value / math.log(2)

    tokens = kind_of(pipe) == "tokens"
    unit = "token" if tokens else "dimension"
    result = {
        "kind": "an upper bound of -ln p" if tokens else "-ln p",
        f"nats_per_{unit}": ratio,
        f"bits_per_{unit}": in_bits(ratio),
        "interval_bits": interval and [in_bits(bound) for bound in interval],
        "pieces": len(pieces),
        "recordings": len(each),
        f"{unit}s": int(sizes.sum()),
        f"bits_per_{unit}_of_each": [in_bits(value) for value in each.tolist()],
    }
    if tokens:
        codec = pipe.audio_tokenizer
        rate = codec.num_codebooks * codec.sampling_rate / codec.hop_length
        result |= {"perplexity": math.exp(ratio), "bits_per_second": in_bits(ratio) * rate}
    return result


# ----- the command


def open_pipeline(name: str, device: str | None) -> Any:
    import torch

    import tonefield

    try:
        pipe = tonefield.load(name).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(f"--model {name} cannot be used: {first_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_names(features: Any, column: str, values: Sequence[Any], pipe: Any) -> tuple[list[Any] | None, str]:
    """Labels for the pipeline, and what is to be said about them."""
    if not pipe.num_classes:
        return None, ""
    if not column or column not in features:
        return None, "; without classes, as the recordings have none"
    feature = features[column]
    names = [feature.names[value] if hasattr(feature, "names") and value is not None else value for value in values]
    known = pipe.config.label2id or {}
    for name in names:
        if name not in known and not (isinstance(name, int) and 0 <= name < pipe.num_classes):
            raise UserError(
                f"The class {name!r} of --label_column {column} is not one of the model's"
                f" ({', '.join(known) or f'0 to {pipe.num_classes - 1}'}); --label_column '' does without classes."
            )
    return names, f"; given their classes ({column})"


def main(args: argparse.Namespace) -> None:
    check_source(args)
    check_positive(args, "batch_size", "num_draws", "tolerance", "max_samples", "num_workers")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file.")
    pipe = open_pipeline(args.model, args.device)
    try:
        kind = kind_of(pipe)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None

    from tonefield.data.loading import RECORD_COLUMN, load_split, read_record

    rows: Any = None
    if args.dataset_name:
        rows = load_split(args.dataset_name, args.split, False, args.dataset_config_name)
    if rows is not None and RECORD_COLUMN in rows.features:
        record, features = read_record(rows.features), rows.features
        rows = rows.select(range(min(args.max_samples or len(rows), len(rows)))).with_format("numpy")
        pieces, owners = pieces_of_rows(pipe, rows, record, args.dataset_name)
        names = [str(index) for index in range(len(rows))]
        values = [int(v) for v in rows[args.label_column]] if args.label_column in features else []
        heard = f"{len(rows)} rows of {args.dataset_name}"
    else:
        source = open_source(args)
        features = source.features
        rate = pipe.mel.config.sample_rate if kind == "mels" else pipe.audio_tokenizer.sampling_rate
        recordings = list(source)[: args.max_samples]
        kept, sounds = read_recordings(recordings, rate, args.num_workers, source.rejects)
        pieces, owners = pieces_of_sounds(pipe, sounds)
        names = [recording.name for recording in kept]
        values = [recording.columns.get(args.label_column) for recording in kept]
        heard = f"{len(kept)} recordings, resampled to {rate} Hz where they differ"
    labels, about = class_names(features, args.label_column, values, pipe)
    options = dict(batch_size=args.batch_size, seed=args.seed)
    if kind == "mels":
        options |= dict(divergence=args.divergence, tolerance=args.tolerance)
    else:
        options |= dict(num_draws=args.num_draws)
    print(f"{heard}{about}")
    try:
        result = measure(pipe, pieces, owners, labels, **options)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {first_line(error)}") from None
    print(describe(result))
    if args.out:
        flags = {name: value for name, value in vars(args).items() if not callable(value)}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": flags} | result | {"names": names}, indent=1)
        write_text(Path(args.out), text)
        print(f"all numbers are in {args.out}")


def describe(result: dict) -> str:
    unit = "token" if "nats_per_token" in result else "dimension"
    low, high = result["interval_bits"] or (math.nan, math.nan)
    interval = "" if math.isnan(low) else f" (95 % interval {low:.4f} to {high:.4f})"
    at_most = "at most " if unit == "token" else ""
    line = (
        f"{at_most}{result[f'bits_per_{unit}']:.4f} bits per {unit}{interval}, {result[f'nats_per_{unit}']:.4f} nats"
    )
    if unit == "token":
        line += f"; perplexity {result['perplexity']:.4g}, {result['bits_per_second']:.4g} bits a second"
    return f"{line}; {result['pieces']} pieces, {result[f'{unit}s']} {unit}s"
