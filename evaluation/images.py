"""Compares folders of pictures: FID, KID, inception score, precision and recall.

    python evaluate.py images --reference photos --generated samples --metrics fid kid is \\
        --encoder inception=pt_inception-2015-12-05-6726825d.pth
    python evaluate.py images --reference photos --generated samples --encoder facebook/dinov2-base --out report.json

The encoder is the standard Inception network (its weights are given by path; with them the numbers are those of
others' FID), or any image encoder or classifier of transformers: a folder or an id on the Hub. The inception score
needs a classifier. Spectrograms are no photographs: for sounds, evaluate.py without a sub-command tells more.

Pictures of any size are taken; grey ones become three equal channels. The statistics are those of evaluate.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, printable
from tonefield.evaluation.arguments import add_num_workers
from tonefield.files import write_text


EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

# Name: module, function, help, better, whether it compares with a reference.
METRICS: dict[str, tuple[str, str, str, str, bool]] = {
    "fid": ("distances", "fad", "Fréchet inception distance", "lower", True),
    "kid": ("distances", "kid", "kernel inception distance, unbiased for any number of pictures", "lower", True),
    "is": ("image_sets", "inception_score", "inception score: clear pictures of all classes", "higher", False),
    "precision_recall": (
        "memorisation", "precision_and_recall", "share of pictures among the reference's neighbours, and conversely",
        "higher", True,
    ),
    "density_coverage": (
        "memorisation", "density_and_coverage", "the same, less swayed by outliers", "higher", True,
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "".join(f"\n    {name:18} {line}" for name, (_, _, line, _, _) in METRICS.items())
    parser.description = f"{parser.description}\nmetrics:{names}"
    parser.add_argument("--generated", required=True, metavar="DIR", help="the pictures that are judged")
    parser.add_argument("--reference", nargs="+", default=[], metavar="DIR", help="pictures to compare with")
    parser.add_argument("--metrics", nargs="+", default=["fid", "kid"], metavar="NAME", help="(default: fid kid)")
    parser.add_argument(
        "--encoder", required=True, metavar="NAME", help="inception=FILE, or a model of transformers for pictures"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=100, metavar="N",
        help="resamples for the intervals; 0: none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE.json", help="where the report is written")
    parser.add_argument("--device", help="where networks compute (default: the GPU if there is one)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add_num_workers(parser)
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn by chance (default: %(default)s)")
    parser.add_argument(
        "--cache_dir", metavar="DIR", help="where features are kept for the next time (default: nowhere)"
    )


def check(args: argparse.Namespace) -> None:
    for name in args.metrics:
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r} of pictures; there are {', '.join(METRICS)}.")
        if METRICS[name][4] and not args.reference:
            raise UserError(f"The metric {name} compares with pictures: name them with --reference.")
    for name, least in {"batch_size": 1, "num_workers": 1, "bootstrap": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is at least {least}, not {getattr(args, name)}.")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file.")


def main(args: argparse.Namespace) -> None:
    check(args)

    import importlib

    import torch

    import tonefield
    from tonefield.evaluate import table
    from tonefield.evaluation.image_sets import ImageSet, load_encoder
    from tonefield.evaluation.metrics import Comparison, Options

    options = Options(
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=args.batch_size, num_workers=args.num_workers, cache_dir=args.cache_dir, seed=args.seed,
        bootstrap=args.bootstrap,
    )  # fmt: skip
    generated = ImageSet.open(args.generated, args.num_workers, args.cache_dir, "--generated")
    references = [ImageSet.open(one, args.num_workers, args.cache_dir, "--reference") for one in args.reference]
    encoder = load_encoder(args.encoder, options.device or "cpu")
    results, warnings = [], []
    for one in (generated, *references):
        print(f"{one.name}: {len(one)} pictures")
        if one.rejects:
            file, reason = one.rejects[0]
            warnings.append(f"{one.name}: {len(one.rejects)} files are left out, the first one {file}: {reason}")
    print(f"{encoder.name}: {encoder.windowing}")
    for name in args.metrics:
        module, function, _, better, compares = METRICS[name]
        compute = getattr(importlib.import_module(f"tonefield.evaluation.{module}"), function)
        for other in references if compares else [None]:
            comparison: Any = Comparison(generated, other, options, encoder)  # pyright: ignore
            try:
                found = compute(comparison)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            about = {"metric": name, "reference": other and other.name, "better": better, "embedding": encoder.name}
            for result in found if isinstance(found, list) else [found]:
                results.append(about | result)
                warnings += [f"{name}: {sentence}" for sentence in result.get("warnings", ())]
    print(f"\n{table({'results': results})}")
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if args.out:
        report = {
            "tonefield": tonefield.__version__,
            "settings": {name: value for name, value in vars(args).items() if not callable(value)},
            "generated": generated.about(),
            "references": [one.about() for one in references],
            "encoder": {
                "name": encoder.name,
                "input": encoder.windowing,
                "dim": encoder.dim,
                "fingerprint": encoder.fingerprint(),
            },
            "results": results,
            "warnings": warnings,
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(args.out), json.dumps(report, indent=1, allow_nan=False))
        print(f"the report is in {args.out}")
