"""How benchmarks time things: calls, and the steps of a trainer's loop with bare steps between them."""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _table import Row, show
from diffusers.training_utils import EMAModel

from tonefield.training.loop import train


UNCOUNTED = 3  # first steps, in which memory is found
OVERHEAD = 1.05  # the most that a step of the loop may take, against a bare one with clipping and average


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable[[], object], runs: int) -> float:
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = clock()
        function()
        times.append(clock() - start)
    return float(np.median(times[1:]))


def bare_step(
    model: torch.nn.Module, args: Any, loss_of: Callable[[torch.nn.Module, dict], torch.Tensor], averaged: bool
) -> Callable[[dict], None]:
    """Forward, backward and optimizer step of a copy of a network; if asked, clipping and the average as well."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    average = EMAModel(model.parameters(), foreach=True) if averaged else None

    def step(batch: dict) -> None:
        loss_of(model, batch).backward()
        if average:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.step(model.parameters())

    return step


def time_steps(
    args: Any,
    accelerator: Any,
    model: torch.nn.Module,
    data: Any,
    compute_loss: Callable[..., torch.Tensor],
    loss_of: Callable[[torch.nn.Module, dict], torch.Tensor],
    name: str = "unet",
) -> list[np.ndarray]:
    """
    Seconds of the steps of the loop, of bare ones, and of bare ones with clipping and average. They take turns, so
    that all meet the same machine. `args` are those of the trainer.
    """
    bare = [bare_step(model, args, loss_of, averaged) for averaged in (False, True)]
    seconds: list[list[float]] = [[], [], []]
    left = 0.0

    def between_steps(network, batch, generators):
        nonlocal left
        start = clock()
        if left:
            seconds[0].append(start - left)
        for step, times in zip(bare, seconds[1:], strict=True):
            start = clock()
            with accelerator.autocast():
                step(batch)
            times.append(clock() - start)
        left = clock()
        return compute_loss(network, batch, generators)

    train(args, accelerator, model, data, between_steps, name=name)
    return [np.array(times[UNCOUNTED : args.max_train_steps - 1]) for times in seconds]


def show_steps(script: str, with_average: list[np.ndarray], without: list[np.ndarray]) -> None:
    """Tables for a trainer of what `time_steps` gave, with and without the average."""
    print("| a step of | time | against the bare one |\n|---|---|---|")
    (loop, bare, averaged), (lean, lean_bare, _) = with_average, without
    rows = {
        "bare forward, backward, AdamW": (bare, bare),
        "bare with clipping and average": (averaged, bare),
        "the loop without average": (lean, lean_bare),
        "the loop": (loop, bare),
    }
    for name, (times, beside) in rows.items():
        print(f"| {name} | {1e3 * np.median(times):.1f} ms | {np.median(times / beside):.3f} |")
    usual, ours = (f"{1e3 * np.median(times):.1f} ms" for times in (averaged, loop))
    print()
    show([Row(f"a step of {script}, against bare", usual, ours, float(np.median(loop / averaged)), most=OVERHEAD)])
