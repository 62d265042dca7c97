"""Hours of training and sampling in one process: what must not grow does not, and nothing gets slower.

Every round, each trainer goes on from its checkpoint for a few steps, and each pipeline is loaded and makes sounds.
The networks are tiny, so that there are many rounds. Every minute a line is written to a CSV: memory (RSS), open file
descriptors, threads, and the processor time of a training step and of a call of a pipeline. At the end there is a
verdict, and the exit status is 1 if it is bad. The first quarter of the lines is not judged: caches fill in it.

    python benchmarks/soak.py --hours 1 [--csv soak.csv]
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from _workloads import make_workloads
from scipy.stats import theilslopes
from torch.optim.optimizer import register_optimizer_step_post_hook


MEMORY_BOUND = 20.0  # MiB an hour
SLOWDOWN_BOUND = 1.25  # of processor time, which other work on the machine changes as well
COUNTS = ("file descriptors", "threads")


def verdict(rows: list[dict[str, float]], memory_bound: float = MEMORY_BOUND) -> dict[str, tuple[str, bool]]:
    """What is to be said of each thing that was watched, and whether it is as it should be."""
    judged = rows[len(rows) // 4 :]
    half = len(judged) // 2
    if half < 2:
        raise SystemExit(f"{len(rows)} lines are too few for a verdict: let it run longer, or lower --every.")
    hours = np.array([row["seconds"] for row in judged]) / 3600
    slope = theilslopes([row["memory MiB"] for row in judged], hours).slope
    said = {"memory": (f"{slope:+.1f} MiB an hour, at most {memory_bound:g}", bool(slope <= memory_bound))}
    for name in COUNTS:
        early, late = (max(row[name] for row in part) for part in (judged[:half], judged[half:]))
        said[name] = f"at most {early:g}, then {late:g}", late <= early
    for name in judged[0]:
        if name.startswith("ms "):
            early, late = (float(np.median([row[name] for row in part])) for part in (judged[:half], judged[half:]))
            said[name] = (
                f"{early:.1f}, then {late:.1f}: x {late / early:.2f}, at most {SLOWDOWN_BOUND:g}",
                late <= SLOWDOWN_BOUND * early,
            )
    return said


class StepClock:
    """The processor time between optimizer steps, in this process, of whichever trainer is at work."""

    def __init__(self):
        self.milliseconds: list[float] = []
        self.last: float | None = None
        self.hook = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, *_) -> None:
        now = time.process_time()
        if self.last is not None:
            self.milliseconds.append(1e3 * (now - self.last))
        self.last = now

    def read(self) -> list[float]:
        """Those since it was last read, without what lies between two runs."""
        taken, self.milliseconds, self.last = self.milliseconds, [], None
        return taken


def rounds(folder: Path, steps: int) -> list[tuple[str, Callable[[int], list[float]]]]:
    """What is done in each round, by name: given its number, the milliseconds that each repetition took."""
    clock = StepClock()
    work: list[tuple[str, Callable[[int], list[float]]]] = []
    for name, workload in make_workloads(folder, tiny=True).items():
        output = folder / f"run-{len(work)}"

        def train(number: int, workload=workload, output=output) -> list[float]:
            clock.read()
            most = steps * (number + 1)
            again = ["--resume_from_checkpoint=latest"] if number else []
            workload.train(output, f"--max_train_steps={most}", "--checkpoints_total_limit=1", "--use_ema", *again)
            return clock.read()

        def sample(number: int, workload=workload, output=output, call=workload.call or {}) -> list[float]:
            pipe, times = workload.load(output), []
            for seed in range(3):
                start = time.process_time()
                pipe(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(seed))
                times.append(1e3 * (time.process_time() - start))
            return times[1:]

        work.append((name, train))
        if workload.call is not None:
            work.append((f"sampling after {name}", sample))
    return work


def soak(hours: float, every: float, steps: int, file: Path, extra: Callable[[int], None] | None = None) -> list[dict]:
    """The lines of the CSV. `extra` is done once a round as well: a leak, where a test wants one."""
    process, start = psutil.Process(), time.monotonic()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, file.open("w", newline="") as handle:
        work = rounds(Path(folder), steps)
        start, number, due = time.monotonic(), 0, 0.0
        taken: dict[str, list[float]] = {name: [] for name, _ in work}
        while time.monotonic() - start < 3600 * hours or len(rows) < 8:
            for name, do in work:
                taken[name] += do(number)
            if extra:
                extra(number)
            number += 1
            passed = time.monotonic() - start
            if passed < due:
                continue
            due = max(due + every, passed)
            times = {f"ms {name}": float(np.median(values)) for name, values in taken.items()}
            taken = {name: [] for name in taken}
            row = {"seconds": passed, "rounds": number, "memory MiB": process.memory_info().rss / 2**20}
            row |= {"file descriptors": process.num_fds(), "threads": process.num_threads()} | times
            if not rows:
                writer = csv.DictWriter(handle, list(row))
                writer.writeheader()
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
            handle.flush()
            rows.append(row)
            print(f"{passed / 60:.1f} min: {number} rounds, {row['memory MiB']:.1f} MiB", file=sys.stderr, flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    rows = soak(args.hours, args.every, args.steps, Path(args.csv))
    said = verdict(rows, args.memory_bound)
    print(f"{rows[-1]['rounds']:g} rounds in {rows[-1]['seconds'] / 60:.1f} minutes, {len(rows)} lines in {args.csv}")
    print("| | | |\n|---|---|---|")
    for name, (what, good) in said.items():
        print(f"| {name} | {what} | {'good' if good else 'BAD'} |")
    sys.exit(not all(good for _, good in said.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two lines of the CSV")
    parser.add_argument("--steps", type=int, default=20, help="of each trainer in a round (default: %(default)s)")
    parser.add_argument("--csv", default="soak.csv", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument(
        "--memory_bound", type=float, default=MEMORY_BOUND, metavar="MIB", help="growth in an hour that is good"
    )
    main(parser.parse_args())
