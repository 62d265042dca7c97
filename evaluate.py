"""Compares generated sounds with recordings: how far apart the two sets are, and how sure that is.

    python evaluate.py --reference held_out --generated samples
    python evaluate.py --reference held_out songs --generated samples --metrics fad fad_inf kad --embeddings mel \\
        vggish=vggish-10086976.pth clap=laion/clap-htsat-unfused --out report.json

Folders are searched to any depth. A table is printed; --out receives all numbers with the settings that they depend
on, the files that could not be used, and warnings. Without further flags nothing is downloaded. Embeddings are kept,
so that a second run is quick; a file that has changed is noticed by its contents.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, make_parser, parse, printable, run
from tonefield.evaluation.arguments import add_num_workers
from tonefield.evaluation.metrics import EMBEDDINGS, METRICS, Options, run_metrics
from tonefield.files import write_text


# Sub-commands: the module of tonefield.evaluation that has `add_arguments(parser)` and `main(args)`, and what it does.
COMMANDS = {
    "train-classifier": ("train_classifier", "train a classifier of labelled recordings, for the class metrics"),
    "sampling": ("sampling", "time, network calls and quality of a pipeline for several solvers and steps"),
    "likelihood": ("likelihood", "how likely a pipeline holds recordings to be: bits per dimension or token"),
    "images": ("images", "FID, KID and inception score of folders of pictures"),
    "listening-test": ("listening_test", "write a page on which people listen and judge"),
    "listening-results": ("listening_results", "what they judged: means and intervals"),
}


def parse_args(argv=None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        module = importlib.import_module(f"tonefield.evaluation.{COMMANDS[argv[0]][0]}")
        parser = make_parser(module.__doc__)
        parser.prog += f" {argv[0]}"
        module.add_arguments(parser)
        args = parse(parser, argv[1:])
        args.command = module.main
        return args

    def lines(of: dict[str, str]) -> str:
        return "".join(f"    {name:18} {line}\n" for name, line in of.items())

    metrics = lines({name: metric.help for name, metric in METRICS.items()})
    embeddings = lines({name: line for name, (line, *_) in EMBEDDINGS.items()})
    commands = lines({name: line for name, (_, line) in COMMANDS.items()})
    parser = make_parser(
        f"{__doc__}\nmetrics:\n{metrics}\nembeddings:\n{embeddings}\nother commands (evaluate.py COMMAND --help):\n"
        f"{commands}"
    )
    sets = parser.add_argument_group("sets")
    sets.add_argument("--generated", metavar="DIR", required=True, help="the sounds that are judged")
    sets.add_argument(
        "--reference", metavar="DIR", nargs="+", default=[], help="recordings to compare with; one set each"
    )
    what = parser.add_argument_group("what is computed")
    what.add_argument("--metrics", nargs="+", metavar="NAME", default=["fad", "kad"], help="(default: fad kad)")
    what.add_argument(
        "--embeddings",
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        default=["mel"],
        help="what distances are taken of; name several, for none is right for everything (default: mel)",
    )
    what.add_argument("--classifier", metavar="DIR", help="the classifier of metrics that need one")
    what.add_argument(
        "--training_set", metavar="DIR", help="for memorisation: the recordings that the model was trained on"
    )
    what.add_argument("--clap", metavar="MODEL", help="the CLAP model of clap_score: a folder or Hub id")
    what.add_argument(
        "--caption_column", default="caption", metavar="NAME", help="the captions in metadata (default: %(default)s)"
    )
    what.add_argument(
        "--bootstrap",
        type=int,
        default=100,
        metavar="N",
        help="resamples for the interval of a Fréchet distance; 0: none (default: %(default)s)",
    )
    what.add_argument(
        "--curve", action="store_true", help="compute metrics of fewer clips too: how many does it take?"
    )
    what.add_argument(
        "--precision",
        type=float,
        default=0.1,
        metavar="F",
        help="with --curve, when an interval is narrow enough: its half, as a fraction of the value"
        " (default: %(default)s)",
    )
    out = parser.add_argument_group("report and running")
    out.add_argument("--out", metavar="FILE.json", help="where the report is written: numbers, and FILE.html to read")
    out.add_argument(
        "--samples", type=int, default=4, metavar="N", help="sounds of each set on the page (default: %(default)s)"
    )
    out.add_argument("--device", help="where networks compute (default: the GPU if there is one)")
    out.add_argument("--batch_size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add_num_workers(out)
    out.add_argument("--seed", type=int, default=0, help="of whatever is drawn by chance (default: %(default)s)")
    out.add_argument(
        "--cache_dir", metavar="DIR", help="where embeddings are kept (default: ~/.cache/tonefield/evaluation)"
    )
    out.add_argument("--no_cache", action="store_true", help="keep no embeddings")
    args = parse(parser, argv)

    for name, least in {"batch_size": 1, "num_workers": 1, "bootstrap": 0, "samples": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is at least {least}, not {getattr(args, name)}")
    if not args.precision > 0:
        parser.error(f"--precision must be positive, not {args.precision:g}")
    if args.no_cache and args.cache_dir:
        parser.error("--cache_dir and --no_cache contradict each other: give one of them")
    args.command = compare
    return args


def options_from(args: argparse.Namespace) -> Options:
    from tonefield.evaluation.sets import default_cache_dir

    flags: dict[str, Any] = {name: value for name, value in vars(args).items() if name in vars(Options())}
    flags["cache_dir"] = None if args.no_cache else args.cache_dir or str(default_cache_dir())
    return Options(**flags)


def check_out(out: str) -> None:
    """Whether the report can be written, before what goes into it is computed."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, such as {path / 'report.json'}.")
    if path.suffix == ".html":
        raise UserError(f"--out {out} would be both the numbers and the page: name {path.with_suffix('.json')}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    if path.stat().st_size == 0:
        path.unlink()


def table(report: dict[str, Any]) -> str:
    """The results as a table for a terminal."""
    header = ["metric", "embedding", "reference", "value", "95 % interval", "clips", "better"]
    rows = [header]
    for result in report["results"]:
        value, interval = result.get("value"), result.get("interval")
        rows.append(
            [
                result["metric"],
                result["embedding"] or "",
                result["reference"] or "",
                "" if value is None else f"{value:.4g}",
                f"{interval[0]:.4g} .. {interval[1]:.4g}" if interval else "",
                " / ".join(map(str, result.get("clips", ()))),
                result["better"],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = [index for index in range(len(header)) if any(row[index] for row in rows[1:])]
    return "\n".join("  ".join(row[index].ljust(widths[index]) for index in used).rstrip() for row in rows)


def compare(args: argparse.Namespace) -> None:
    """What is done without a sub-command."""
    if args.out:
        check_out(args.out)
    report, generated, references = run_metrics(
        args.reference, args.generated, args.metrics, args.embeddings, options_from(args)
    )
    for one in (report["generated"], *report["references"]):
        rates = ", ".join(f"{count} at {rate} Hz" for rate, count in one["sampling_rates"].items())
        print(f"{one['name']}: {one['files']} files, {one['seconds']:.0f} s ({rates})")
    for one in report["embeddings"]:
        print(f"{one['name']}: resampled to {one['sampling_rate']} Hz by {one['resampler']}; {one['windowing']}")
    print(f"\n{table(report)}")
    for curve in report["curves"]:
        enough = f"{curve['smallest_n']} clips" if curve["smallest_n"] else "more clips than there are"
        print(f"{curve['metric']}: {enough} for an interval of ±{curve['precision']:.0%}")
    for warning in report["warnings"]:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if args.out:
        from tonefield.evaluation.report import write_report

        # Not a number has no place in JSON.
        write_text(Path(args.out), json.dumps(report, indent=1, allow_nan=False))
        page = Path(args.out).with_suffix(".html")
        write_report(report, generated, references, page, args.samples)
        print(f"the report is in {args.out}, with plots and sounds in {page}")


def main(args: argparse.Namespace) -> None:
    args.command(args)


if __name__ == "__main__":
    run(main, parse_args())
