"""The field of a batch of data against the explicit formula, which builds all differences: time, memory, error.

python benchmarks/poisson_field.py [--batch 32 --points 1024 --dim 4096]
"""

import argparse
import multiprocessing
import resource
import time

import numpy as np
import torch
from _table import Row, show

from tonefield.schedulers import poisson_field


GAMMA = 5.0


def explicit_field(x: torch.Tensor, data: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """PFGM's formula term by term (D = 1): a tensor of (batch, points, dim + 1) differences, and weights by ratios."""
    points = torch.cat([data, torch.zeros(len(data), 1)], 1)
    augmented = torch.cat([x, sigma[:, None]], 1)
    differences = augmented[:, None] - points[None]
    distances = differences.square().sum(2).sqrt()
    weights = (distances.amin(1, keepdim=True) / (distances + 1e-7)) ** points.shape[1]
    weights = weights / (weights.sum(1, keepdim=True) + 1e-7)
    field = (weights[:, :, None] * differences).sum(1)
    return -(x.shape[1] ** 0.5) * field / (field.norm(dim=1, keepdim=True) + GAMMA)


def exact_field(x: np.ndarray, data: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The same in float64 numpy, one row after the other and with logarithms."""
    rows = []
    for row, z in zip(x.astype(np.float64), sigma.astype(np.float64), strict=True):
        squares = ((row - data) ** 2).sum(1) + z**2
        logits = -0.5 * (len(row) + 1) * np.log(squares)
        weights = np.exp(logits - logits.max())
        field = np.append(row - weights @ data / weights.sum(), z)
        rows.append(-np.sqrt(len(row)) * field / (np.linalg.norm(field) + GAMMA))
    return np.stack(rows)


def problem(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points that lie close together seen from a distance, where many of them carry weight."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(args.dim, generator=generator)
    data = centre + 0.01 * torch.randn(args.points, args.dim, generator=generator)
    x = data[: args.batch] + 0.05 * torch.randn(args.batch, args.dim, generator=generator)
    return x, data, torch.full((args.batch,), 0.5)


def ours(x: torch.Tensor, data: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    along_x, along_z = poisson_field(x, data, sigma, aug_dim=1, gamma=GAMMA)
    return torch.cat([along_x, along_z[:, None]], 1)


def measure(name: str, args: argparse.Namespace, results) -> None:
    """In a process of its own, since only a process knows its peak memory."""
    torch.set_num_threads(args.threads)
    x, data, sigma = problem(args)
    function = {"explicit": explicit_field, "tonefield": ours}[name]
    function(x[:2], data[:2], sigma[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(args.runs):
        start = time.perf_counter()
        field = function(x, data, sigma)
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    exact = exact_field(x.numpy(), data.numpy().astype(np.float64), sigma.numpy())
    error = np.linalg.norm(field.numpy() - exact) / np.linalg.norm(exact)
    results.put((float(np.median(times)), memory / 1024, float(error)))


def main(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    rows = {}
    for name in ("explicit", "tonefield"):
        results = context.Queue()
        process = context.Process(target=measure, args=(name, args, results))
        process.start()
        rows[name] = results.get()
        process.join()
    print(f"batch {args.batch}, {args.points} points, {args.dim} dimensions, {args.threads} threads")
    print("| | time | peak memory | error |\n|---|---|---|---|")
    for name, (seconds, memory, error) in rows.items():
        print(f"| {name} | {seconds * 1e3:.0f} ms | {memory:.0f} MB | {error:.1e} |")
    (slow, large, _), (fast, small, _) = rows.values()
    print()
    show(
        [
            Row("field, time", f"{slow * 1e3:.0f} ms", f"{fast * 1e3:.0f} ms", slow / fast, least=5),
            Row("field, memory", f"{large:.0f} MB", f"{small:.0f} MB", large / max(small, 1), least=5),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=3, help="the median is shown")
    main(parser.parse_args())
