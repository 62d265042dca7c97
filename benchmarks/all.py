"""Runs every benchmark, each as a process of its own, and ends with one table of what they found.

    python benchmarks/all.py [NAME ...] [--quick] [-- FLAG ...]

`--quick` takes toy sizes, to see that everything works; its figures mean nothing. What stands after `--` is handed on.
Each benchmark has as many threads as it asks for with `THREADS` below: whole.py measures one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _table import ROWS_FILE, Row, show


FOLDER = Path(__file__).resolve().parent
LEFT_OUT = ("all", "soak")  # an hour and more: soak.py is started by itself
THREADS = {"whole": 1}

# Sizes for --quick; what is not here has no smaller size.
QUICK = {
    "dataset": ["--runs=1", "--files=12", "--parts=2"],
    "evaluation": ["--clips=20"],
    "latent": ["--model_size=tiny", "--batch=2", "--steps=2", "--train_steps=2"],
    "mel": ["--runs=1"],
    "poisson_field": ["--points=64", "--dim=256", "--runs=1"],
    "solvers": ["--charges=8", "--batch=2"],
    "token_sampling": ["--steps=16", "--length=16", "--batches", "1", "--calls", "2"],
    "token_training": ["--frames=16", "--batch=2", "--steps=3"],
    "train_step": ["--batch=2", "--steps=3"],
    "vocoder": ["--seconds=0.2", "--runs=1"],
    "whole": ["--tiny", "--steps=2", "--batch=2"],
}


def names() -> list[str]:
    found = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
    return [name for name in found if name not in LEFT_OUT]


def run(name: str, flags: list[str]) -> tuple[list[Row], int]:
    """What a benchmark found, and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        environment = os.environ | {ROWS_FILE: str(rows)}
        if name in THREADS:
            environment["OMP_NUM_THREADS"] = str(THREADS[name])
        status = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *flags], env=environment).returncode
        lines = rows.read_text().splitlines() if rows.exists() else []
        return [Row(**json.loads(line)) for line in lines], status


def main(args: argparse.Namespace) -> int:
    unknown = sorted(set(args.names) - set(names()))
    if unknown:
        raise SystemExit(f"error: there is no benchmark {', '.join(unknown)}; there are {', '.join(names())}.")
    rows: list[Row] = []
    failed = []
    for name in args.names or names():
        print(f"== {name}", flush=True)
        found, status = run(name, (QUICK.get(name, []) if args.quick else []) + args.flags)
        rows += found
        failed += [name] if status else []
    print("\n== all")
    show(rows)
    missed = sum(not row.met for row in rows)
    print(f"{len(rows)} rows, {missed} missed{', of toy sizes: they mean nothing' if args.quick else ''}")
    if failed:
        print(f"error: {', '.join(failed)} failed; what it said is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: every one)")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:cut])
    parsed.flags = given[cut + 1 :]
    sys.exit(main(parsed))
