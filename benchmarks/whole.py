"""Where the time of a whole training step and of a whole sampling loop goes, with the networks of the recipes.

Every trainer runs as from its command line, on made-up sounds; its pipeline then samples. Inside the network is what
modules compute and what autograd does; outside are data, noise, the loss, the optimizer, the moving average of the
weights, the steps of the scheduler. The floor is the time in which this processor would do the multiplications of the
network at the rate of a large matrix product. All is processor time of one thread, so that other work on the machine
changes little.

    python benchmarks/whole.py [--steps 6] [--batch 4] [--only train_sedd]
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _table import Row, show
from _workloads import Workload, make_workloads
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from tonefield.training.loop import Average


TRAINING, SAMPLING = 0.9, 0.95  # the least share inside the network
UNCOUNTED = 2  # first steps, in which memory is found


class Stopwatch:
    """The processor time spent in what is watched, by kind; of what is nested only the outermost counts."""

    def __init__(self):
        self.seconds = {"network": 0.0, "optimizer": 0.0, "average": 0.0}
        self.running, self.began = False, 0.0
        self.undo: list[Callable[[], Any]] = []

    def start(self, *_) -> None:
        self.running, self.began = True, time.process_time()

    def stop(self, kind: str) -> None:
        self.seconds[kind] += time.process_time() - self.began
        self.running = False

    def wrap(self, owner: Any, name: str, kind: str) -> None:
        """Watches a function."""
        before = getattr(owner, name)

        def watched(*args, **kwargs):
            if self.running:
                return before(*args, **kwargs)
            self.start()
            try:
                return before(*args, **kwargs)
            finally:
                self.stop(kind)

        setattr(owner, name, watched)
        self.undo.append(lambda: setattr(owner, name, before))

    def __enter__(self) -> "Stopwatch":
        hooks = [
            register_optimizer_step_pre_hook(self.start),
            register_optimizer_step_post_hook(lambda *_: self.stop("optimizer")),
        ]
        self.undo += [hook.remove for hook in hooks]
        # Not by hooks, which all modules within modules would call: some hundredths of the time of a small network.
        self.wrap(torch.nn.Module, "__call__", "network")
        self.wrap(torch.autograd, "backward", "network")
        self.wrap(torch.autograd, "grad", "network")
        self.wrap(Average, "step", "average")
        return self

    def __exit__(self, *_) -> None:
        for undo in self.undo:
            undo()


def medians(marks: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the differences between successive readings, the first ones left out."""
    between = [{name: b[name] - a[name] for name in a} for a, b in itertools.pairwise(marks)][UNCOUNTED:]
    return {name: float(np.median([step[name] for step in between])) for name in between[0]}


def train(workload: Workload, folder: Path, steps: int, flags: list[str]) -> tuple[dict[str, float], float]:
    """Seconds of a training step, by kind, and the multiplications and additions that its networks do."""
    most = [f"--max_train_steps={steps + UNCOUNTED + 1}", f"--logging_steps={steps + UNCOUNTED + 1}", *flags]
    marks: list[dict[str, float]] = []
    with Stopwatch() as watch:
        mark = register_optimizer_step_post_hook(lambda *_: marks.append({"all": time.process_time()} | watch.seconds))
        workload.train(folder, *most)
        mark.remove()
    operations: list[int] = []
    counter = FlopCounterMode(display=False)
    mark = register_optimizer_step_post_hook(lambda *_: operations.append(counter.get_total_flops()))
    with counter:
        workload.train(folder / "counted", *flags, "--max_train_steps=2", "--num_validation_samples=0")
    mark.remove()
    return medians(marks), operations[1] - operations[0]


def sample(pipe: Any, call: dict[str, Any], batch: int, steps: int) -> tuple[dict[str, float], float, float]:
    """Seconds of a step of the loop, by kind, the operations of its network, and seconds of all that is not loop."""
    call = dict(call)
    if "prompt" in call:
        call["num_waveforms_per_prompt"] = batch
    else:
        call["batch_size"] = batch
    call["generator"] = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    marks: list[dict[str, float]] = []
    counter = FlopCounterMode(display=False)
    operations: list[int] = []

    def mark(_pipe, _step, _time, values):
        marks.append({"all": time.process_time()} | watch.seconds)
        return values

    def count(_pipe, _step, _time, values):
        operations.append(counter.get_total_flops())
        return values

    with Stopwatch() as watch:
        start = time.process_time()
        pipe(**call, num_inference_steps=steps + UNCOUNTED + 1, callback_on_step_end=mark)
        whole = time.process_time() - start
    with counter:
        pipe(**call, num_inference_steps=3, callback_on_step_end=count)
    step = medians(marks)
    return step, operations[-1] - operations[-2], whole - step["all"] * len(marks)


def matmul_rate(size: int = 1024, runs: int = 5) -> float:
    """Operations a second of a large product of matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        _ = a @ b
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rate, rows = matmul_rate(), []
    print(f"one thread, {rate / 1e9:.0f} GFLOP/s in a product of matrices, batches of {args.batch or 'the recipe'}")
    print("| | one step | network | optimizer | average | the rest | inside | times the floor |")
    print("|---|---|---|---|---|---|---|---|")

    def line(name: str, seconds: dict[str, float], operations: float, least: float) -> None:
        share = seconds["network"] / seconds["all"]
        rest = seconds["all"] - sum(value for kind, value in seconds.items() if kind != "all")
        parts = [seconds["all"], seconds["network"], seconds["optimizer"], seconds["average"], rest]
        cells = [name, *(f"{1e3 * part:.1f} ms" for part in parts), f"{share:.1%}"]
        print(f"| {' | '.join(cells)} | {seconds['network'] * rate / operations:.2f} |", flush=True)
        rows.append(Row(name, f"{1e3 * parts[0]:.1f} ms", f"{1e3 * parts[1]:.1f} ms", share, least=least))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (name, workload) in enumerate(make_workloads(folder, args.tiny).items()):
            if args.only and args.only not in name:
                continue
            flags = [f"--train_batch_size={args.batch}"] if args.batch else []
            line(name, *train(workload, folder / f"run-{number}", args.steps, flags), TRAINING)
            if workload.call is not None:
                pipe = workload.load(folder / f"run-{number}")
                seconds, operations, others = sample(pipe, workload.call, args.samples, args.steps)
                line(f"{type(pipe).__name__}, {args.samples} sounds", seconds, operations, SAMPLING)
                print(f"| before and after its loop | {1e3 * others:.1f} ms | | | | | | |", flush=True)
    print("\nInside the network:")
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="counted ones of each; medians are shown")
    parser.add_argument("--batch", type=int, help="of training (default: that of the recipe)")
    parser.add_argument("--samples", type=int, default=4, help="made at a time (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME", help="only the trainer whose name has this in it")
    parser.add_argument("--tiny", action="store_true", help="the smallest networks, to see that it works")
    main(parser.parse_args())
