"""What each solver and number of steps costs, and how good it sounds: network calls, time, memory, quality.

    python evaluate.py sampling --model pipelines/digits --solvers heun dpmsolver++ --steps 4 9 18 36 \\
        --reference held_out --metrics fad kad --num_samples 64 --output_dir reports/sampling

A solver is what the pipeline's scheduler calls `solver_type` (Poisson flow: dpmsolver++, heun, euler, rk45; score
SDE: pc, euler, heun, rk45) or `predictor` (tokens: event, analytic, euler, remdm, confidence), or for the schedulers
of diffusers what inference.py --solver calls it (ddim, dpmsolver++, ...) or the name of its class.

All cells of the grid start from the same noise. --output_dir receives sampling.json, which grows with each cell, and
sampling.png. Times are those of the call, from noise to sound, after one call that is not counted. What is reported:
    calls        of the network for a batch
    s / sound    seconds for each sound, in batches of --batch_size
    real-time    seconds of computing for a second of sound: below 1 is faster than listening
    MB           most memory: of the GPU what tensors take, otherwise what the process takes
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.arguments import add_num_workers
from tonefield.evaluation.metrics import METRICS, Options, check_metrics
from tonefield.evaluation.recordings import check_positive
from tonefield.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    grid = parser.add_argument_group("grid")
    grid.add_argument("--model", required=True, metavar="NAME", help="a pipeline: its folder or its id on the Hub")
    grid.add_argument("--solvers", nargs="+", metavar="NAME", help="see above (default: the pipeline's own)")
    grid.add_argument(
        "--steps", nargs="+", type=int, default=[9, 18, 36], metavar="N", help="num_inference_steps (default: 9 18 36)"
    )
    what = parser.add_argument_group("sounds")
    what.add_argument(
        "--num_samples", type=int, default=32, metavar="N", help="sounds for each cell (default: %(default)s)"
    )
    what.add_argument("--batch_size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    what.add_argument("--guidance_scale", type=float, metavar="W", help="(default: the pipeline's)")
    what.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="for a pipeline that reads text: in turn, one for each sound"
    )
    what.add_argument("--audio_length_in_s", type=float, metavar="S", help="for a pipeline that takes it")
    what.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--reference", metavar="DIR", help="recordings to compare with; without them only costs count"
    )
    quality.add_argument("--metrics", nargs="+", metavar="NAME", help="as evaluate.py (default: fad)")
    quality.add_argument(
        "--embeddings", nargs="+", metavar="NAME[=WEIGHTS]", default=["mel"], help="as evaluate.py (default: mel)"
    )
    quality.add_argument("--classifier", metavar="DIR", help="the classifier of metrics that need one")
    quality.add_argument("--clap", metavar="MODEL", help="the CLAP model of clap_score")
    out = parser.add_argument_group("report and running")
    out.add_argument("--output_dir", required=True, metavar="DIR", help="where the report is written")
    out.add_argument("--device", help="where networks compute (default: the GPU if there is one)")
    add_num_workers(out)


# ----- solvers


def with_solver(scheduler: Any, name: str | None) -> Any:
    """A scheduler like `scheduler`, for the same network, with another solver; `None`: its own."""
    import diffusers

    from tonefield.pipelines.from_flags import SOLVERS
    from tonefield.schedulers import PoissonFlowScheduler, ScoreEntropyScheduler, ScoreSDEScheduler

    if name is None:
        return type(scheduler).from_config(scheduler.config)
    if isinstance(scheduler, (PoissonFlowScheduler, ScoreEntropyScheduler, ScoreSDEScheduler)):
        field = "predictor" if isinstance(scheduler, ScoreEntropyScheduler) else "solver_type"
        changed: dict[str, Any] = {field: name}
        return type(scheduler).from_config(scheduler.config, **changed)
    name = SOLVERS.get(name, name)
    compatible = {cls.__name__: cls for cls in [type(scheduler), *scheduler.compatibles]}
    if name not in compatible:
        kind = "is not one" if hasattr(diffusers, name) else "does not exist"
        raise ValueError(
            f"{name} {kind}: a network of {type(scheduler).__name__} can be sampled with"
            f" {', '.join(sorted(compatible))}."
        )
    return compatible[name].from_config(scheduler.config)


def own_solver(scheduler: Any) -> str:
    config = scheduler.config
    ours = type(scheduler).__module__.startswith("tonefield")
    return str((ours and (config.get("solver_type") or config.get("predictor"))) or type(scheduler).__name__)


# ----- sounds


def call_options(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the flags tell the pipeline, besides steps, seeds and what differs from sound to sound."""
    import inspect

    known = inspect.signature(pipe.__call__).parameters
    options = {}
    for name in ("guidance_scale", "audio_length_in_s"):
        value = getattr(args, name)
        if value is not None and name not in known:
            raise UserError(f"--{name}: a {type(pipe).__name__} does not take it.")
        if value is not None:
            options[name] = value
    if args.prompts and getattr(pipe, "text_encoder", None) is None:
        raise UserError(f"--prompts: the {type(pipe).__name__} in {args.model} reads no text.")
    if getattr(pipe, "mel", None) is None and not hasattr(pipe, "audio_tokenizer"):
        raise UserError(f"--model {args.model} makes pictures, not sounds: there is no mel in it.")
    return options


def spread(pipe: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs from sound to sound: the class, all of them in turn, or the prompt."""
    if args.prompts:
        return [{"prompt": args.prompts[index % len(args.prompts)]} for index in range(args.num_samples)]
    if count := getattr(pipe, "num_classes", 0):
        return [{"class_labels": index % count} for index in range(args.num_samples)]
    return [{} for _ in range(args.num_samples)]


def columns_of(pipe: Any, conditions: Sequence[dict]) -> list[dict[str, Any]]:
    """The same in the words of metrics: the name of the class, the caption."""
    names = {label: name for name, label in ((getattr(pipe.config, "label2id", None) or {}).items())}
    return [
        {"label": names.get(one["class_labels"], one["class_labels"])}
        if "class_labels" in one
        else {"caption": one["prompt"]}
        if "prompt" in one
        else {}
        for one in conditions
    ]


def generate(pipe: Any, steps: int, conditions: Sequence[dict], places: Sequence[int], seed: int, **options) -> Any:
    """The sounds at some places of the set. Each depends on its own seed alone."""
    import inspect

    from tonefield.training.randomness import make_generators

    together: dict[str, Any] = {name: [one[name] for one in conditions] for name in conditions[0]}
    parameters = inspect.signature(pipe.__call__).parameters
    if "batch_size" in parameters:
        together["batch_size"] = len(places)
    elif "prompt" not in together:
        together["num_waveforms_per_prompt"] = len(places)
    generators = make_generators(seed, "sampling", list(places), pipe._execution_device)
    return pipe(num_inference_steps=steps, generator=generators, **together, **options)


# ----- costs


class Calls:
    """Counts the calls of a network while it is entered."""

    def __init__(self, network: Any):
        self.network, self.count = network, 0

    def __enter__(self) -> "Calls":
        def tick(*_) -> None:
            self.count += 1

        self._handle = self.network.register_forward_pre_hook(tick)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()


@contextmanager
def peak_memory(device: Any) -> Iterator[list[float]]:
    """The most megabytes in use while it is entered: a list with one number, once it is left."""
    import psutil
    import torch

    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    process, done = psutil.Process(), threading.Event()
    most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(most, process.memory_info().rss) / 2**20)


def finish(device: Any) -> None:
    """Waits for what a GPU has still to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_cell(pipe: Any, steps: int, conditions: Sequence[dict], args: argparse.Namespace, options: dict, bar: Any):
    """The sounds of one cell of the grid, and what they cost."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    device, sounds, seconds, rate = pipe._execution_device, [], 0.0, 0
    calls = []
    with peak_memory(device) as memory:
        for start in range(0, args.num_samples, args.batch_size):
            places = range(start, min(start + args.batch_size, args.num_samples))
            with Calls(network) as counted:
                begin = time.perf_counter()
                result = generate(pipe, steps, [conditions[i] for i in places], places, args.seed, **options)
                finish(device)
                seconds += time.perf_counter() - begin
            calls.append(counted.count)
            sounds += list(result.audios)
            rate = result.sampling_rate
            bar.update(len(places))
    length = sum(len(sound) for sound in sounds) / rate
    return sounds, rate, {
        "calls": max(calls),
        "seconds": seconds,
        "seconds_per_sound": seconds / len(sounds),
        "real_time_factor": seconds / length,
        "memory_mb": memory[0],
    }  # fmt: skip


# ----- the command


def check(args: argparse.Namespace) -> None:
    check_positive(args, "num_samples", "batch_size", "num_workers", "audio_length_in_s")
    for steps in args.steps:
        if steps < 1:
            raise UserError(f"--steps are at least 1, not {steps}.")
    if args.metrics is None:
        args.metrics = ["fad"] if args.reference else []
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file: name a folder.")


def quality_of(
    sounds: Any, rate: int, columns: Any, references: Any, embeddings: Any, args: Any, options: Any
) -> dict:
    """The metrics of one cell: by `metric`, or `metric embedding` where there are several embeddings."""
    from tonefield.evaluation.metrics import run_metrics
    from tonefield.evaluation.sets import AudioSet

    generated = AudioSet.of(sounds, rate, "sounds", columns)
    report, _, _ = run_metrics(references, generated, args.metrics, embeddings, options)
    several = len(embeddings) > 1
    return {
        " ".join([result["metric"], *([result["embedding"]] if several and result["embedding"] else [])]): {
            "value": result["value"],
            "interval": result.get("interval"),
        }
        for result in report["results"]
    }


def benchmark(pipe: Any, args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Runs the grid of the flags. What has been measured is on disk after each cell."""
    from tqdm.auto import tqdm

    from tonefield.evaluation.embeddings import load_embedding
    from tonefield.evaluation.sets import AudioSet

    call = call_options(pipe, args)
    conditions = spread(pipe, args)
    columns = columns_of(pipe, conditions)
    schedulers = {}
    for name in args.solvers or [None]:
        try:
            schedulers[name or own_solver(pipe.scheduler)] = with_solver(pipe.scheduler, name)
        except ValueError as error:
            raise UserError(f"--solvers {name}: {first_line(error)}") from None
    references = [AudioSet.open(args.reference, args.num_workers, None, "--reference")] if args.reference else []
    wanted = any("embedding" in METRICS[name].needs for name in args.metrics)
    embeddings = [load_embedding(name, options.device or "cpu") for name in args.embeddings if wanted]

    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if not callable(value)},
        "device": device_name(pipe._execution_device),
        "pipeline": type(pipe).__name__,
        "better": {name: METRICS[name].better for name in args.metrics},
        "cells": [],
        "left_out": [],
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.num_samples * len(schedulers) * len(args.steps), unit="sound", disable=None) as bar:
        for solver, scheduler in schedulers.items():
            pipe.scheduler = scheduler
            for steps in args.steps:
                bar.set_description(f"{solver}, {steps} steps")
                try:
                    if not report["cells"]:  # what is allocated and compiled once
                        first = range(min(args.batch_size, args.num_samples))
                        generate(pipe, steps, [conditions[i] for i in first], first, args.seed, **call)
                    sounds, rate, costs = run_cell(pipe, steps, conditions, args, call, bar)
                except ValueError as error:  # too few steps for a solver, say: the others may do
                    report["left_out"].append(f"{solver}, {steps} steps: {first_line(error)}")
                    continue
                cell: dict[str, Any] = {"solver": solver, "steps": steps} | costs
                if args.metrics:
                    cell["metrics"] = quality_of(sounds, rate, columns, references, embeddings, args, options)
                report["cells"].append(cell)
                write_text(folder / "sampling.json", json.dumps(report, indent=1))
    for reason in report["left_out"]:
        print(f"left out: {reason}", file=sys.stderr)
    if not report["cells"]:
        raise UserError(f"Nothing of the grid can be computed; {report['left_out'][0]}")
    return report


def main(args: argparse.Namespace) -> None:
    check(args)
    options = Options(
        device=args.device, num_workers=args.num_workers, seed=args.seed, classifier=args.classifier, clap=args.clap
    )
    check_metrics(args.metrics, options)
    for name in args.metrics:
        if METRICS[name].reference and not args.reference:
            raise UserError(f"The metric {name} compares with recordings: name them with --reference.")

    from tonefield.evaluation.likelihood import open_pipeline

    pipe = open_pipeline(args.model, args.device)
    options.device = str(pipe._execution_device)
    report, folder = benchmark(pipe, args, options), Path(args.output_dir)
    print(table(report["cells"]))
    draw(report, folder / "sampling.png")
    print(f"the report is in {folder / 'sampling.json'}, the plot in {folder / 'sampling.png'}")


def device_name(device: Any) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def table(cells: Sequence[dict[str, Any]]) -> str:
    metrics = list(cells[0].get("metrics", {}))
    rows = [["solver", "steps", "calls", "s / sound", "real-time", "MB", *metrics]]
    for cell in cells:
        costs = [f"{cell[name]:.3g}" for name in ("seconds_per_sound", "real_time_factor")]
        values = [cell["metrics"][name]["value"] for name in metrics]
        rows.append([
            cell["solver"], str(cell["steps"]), str(cell["calls"]), *costs, f"{cell['memory_mb']:.0f}",
            *("" if value is None else f"{value:.4g}" for value in values),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Quality and time against network calls, a line for each solver."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = report["cells"]
    panels = [*cells[0].get("metrics", {}), None]  # None: time
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for solver in dict.fromkeys(cell["solver"] for cell in cells):
            mine = sorted((cell for cell in cells if cell["solver"] == solver), key=lambda cell: cell["calls"])
            calls = [cell["calls"] for cell in mine]
            if name is None:
                axes.plot(calls, [cell["seconds_per_sound"] for cell in mine], "o-", label=solver)
                continue
            found = [cell["metrics"][name] for cell in mine]
            values = [one["value"] if one["value"] is not None else float("nan") for one in found]
            (line,) = axes.plot(calls, values, "o-", label=solver)
            if all(one["interval"] for one in found):
                low, high = zip(*(one["interval"] for one in found), strict=True)
                axes.fill_between(calls, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({cell["calls"] for cell in cells})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("network calls")
        better = report["better"].get((name or "").partition(" ")[0], "")
        axes.set_title("seconds for a sound" if name is None else f"{name}{f' ({better} is better)' * bool(better)}")
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
