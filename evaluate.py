"""Compares generated sounds with recordings: how far apart the two sets are, and how sure that is.

    python evaluate.py --reference held_out --generated samples
    python evaluate.py --reference held_out songs --generated samples --metrics fad kad --embeddings mel

Folders are searched to any depth. Without further flags everything is computed offline. A table is printed; --out
receives the report with all numbers, settings and warnings. Files that cannot be used are listed there.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from tonefield.command_line import make_parser, parse, run
from tonefield.evaluation.metrics import METRICS, Options, run_metrics


# Sub-commands: the module of tonefield.evaluation that has `add_arguments(parser)` and `main(args)`, and a line of help.
COMMANDS = {
    "train-classifier": ("classifier", "train a classifier of labelled recordings, for the class metrics"),
    "sampling": ("sampling", "time, network calls and quality of a pipeline for several solvers and steps"),
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

    commands = "".join(f"    {name:18} {line}\n" for name, (_, line) in COMMANDS.items())
    parser = make_parser(f"{__doc__}\nother commands (evaluate.py COMMAND --help):\n{commands}")
    sets = parser.add_argument_group("sets")
    sets.add_argument("--generated", metavar="DIR", required=True, help="the sounds that are judged")
    sets.add_argument(
        "--reference", metavar="DIR", nargs="+", default=[], help="recordings to compare with, set by set"
    )
    what = parser.add_argument_group("metrics")
    lines = "; ".join(f"{name}: {metric.help}" for name, metric in METRICS.items())
    what.add_argument(
        "--metrics", nargs="+", metavar="NAME", default=["fad", "kad"], help=f"{lines} (default: fad kad)"
    )
    what.add_argument("--embeddings", nargs="+", metavar="NAME", default=["mel"], help="(default: mel)")
    out = parser.add_argument_group("report and running")
    out.add_argument("--out", metavar="FILE.json", help="where the report is written")
    out.add_argument("--device", help="where networks compute (default: the GPU if there is one)")
    out.add_argument("--batch_size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    out.add_argument("--num_workers", type=int, default=os.cpu_count(), metavar="N", help="threads that read files")
    out.add_argument("--seed", type=int, default=0, help="of whatever is drawn by chance (default: %(default)s)")
    args = parse(parser, argv)
    args.command = compare
    return args


def compare(args: argparse.Namespace) -> None:
    """What is done without a sub-command."""
    options = Options(**{name: getattr(args, name) for name in vars(Options()) if hasattr(args, name)})
    report, generated, references = run_metrics(args.reference, args.generated, args.metrics, args.embeddings, options)
    for result in report["results"]:
        print(
            f"{result['metric']:12} {result['embedding'] or '':12} {result['reference'] or '':20} {result['value']:.4g}"
        )
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1), encoding="utf-8")
        # report.html is written here, from `report`, `generated` and `references`.


def main(args: argparse.Namespace) -> None:
    args.command(args)


if __name__ == "__main__":
    run(main, parse_args())
