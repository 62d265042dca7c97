"""Network calls and wall time of the event sampler against plain step-by-step sampling, with the same network.

The plain sampler calls the network once per step, with logits for all positions, and draws every position from all
codes and the mask by a race of exponential variates; one more call fills what is left. `"event"` calls it once per
step that reveals something, with logits where it does. A call costs the same at any time of a run, so the times per
call are measured side by side on a few calls, and multiplied by the exact number of calls.

    python benchmarks/token_sampling.py --batches 1 16 64 --calls 8 4 2
"""

import argparse
import statistics
import time

import torch
from _table import Row, show

from tonefield.models.transformer_sedd import SEDDTransformer1DModel
from tonefield.schedulers import ScoreEntropyScheduler


def plain_step(network, tokens: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """One step of the analytic sampler for the log-linear schedule: a mask is revealed with (t - t') / t."""
    mask, reveal = network.config.vocab_size, (t - t_next) / t
    law = network(tokens).sample.softmax(-1) * reveal
    law = torch.cat([law, torch.full_like(law[..., :1], 1 - reveal)], -1)
    drawn = (law / torch.empty_like(law).exponential_()).argmax(-1)
    return torch.where(tokens == mask, drawn, tokens)


@torch.no_grad()
def measure(network, batch_size: int, length: int, steps: int, calls: int) -> tuple[int, float, float]:
    """Calls of the event sampler, and the median seconds per call of the plain one and of it."""
    scheduler = ScoreEntropyScheduler(vocab_size=network.config.vocab_size)
    scheduler.set_timesteps(steps)
    planned = time.perf_counter()
    tokens = scheduler.start((batch_size, length), [torch.Generator().manual_seed(i) for i in range(batch_size)])
    planned = time.perf_counter() - planned
    total = len(scheduler.timesteps)
    plain = scheduler.sample_limit((batch_size, length))
    plain_seconds, event_seconds = [], []
    for index in range(calls + 1):
        begin = time.perf_counter()
        plain = plain_step(network, plain, 1 - index / steps, 1 - (index + 1) / steps)
        middle = time.perf_counter()
        logits = network(tokens, positions=scheduler.positions).sample
        tokens = scheduler.step(logits, scheduler.timesteps[index], tokens).prev_sample
        end = time.perf_counter()
        if index:  # the first is to warm up
            plain_seconds.append(middle - begin)
            event_seconds.append(end - middle)
    return total, statistics.median(plain_seconds), statistics.median(event_seconds) + planned / total


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    network = SEDDTransformer1DModel.from_preset(args.preset, vocab_size=args.vocab_size).eval()
    torch.nn.init.normal_(network.head.weight, std=0.02)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {args.length} tokens, {args.steps} steps")
    print(
        "| batch | calls, plain | calls, event | s per call, plain | s per call, event | s, plain | s, event | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for batch_size, calls in zip(args.batches, args.calls, strict=True):
        total, plain, event = measure(network, batch_size, args.length, args.steps, calls)
        whole, ours = plain * (args.steps + 1), event * total
        print(
            f"| {batch_size} | {args.steps + 1} | {total} | {plain:.3f} | {event:.3f} | {whole:.0f} | {ours:.0f} | "
            f"{whole / ours:.2f} |",
            flush=True,
        )
        name = f"{args.length} tokens in {args.steps} steps, {batch_size} at a time"
        rows.append(Row(name, f"{whole:.1f} s", f"{ours:.1f} s", whole / ours, least=3))
    print()
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 4, 2], help="measured calls for each batch size")
    main(parser.parse_args())
