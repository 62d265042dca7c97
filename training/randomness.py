"""Random numbers that depend on what they are for, and on nothing that happened before.

A generator with a state would have to be saved with every checkpoint, for every process, and kept apart from all
else that draws numbers. Instead each sample of a run has a position, counted from 0, and whatever is random about it
follows from the seed of the run and from that position. Resuming, saving, validating, the number of processes, workers
and micro-batches then cannot change a training run.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed from the seed of a run, a purpose and a position: `derive_seed(0, "noise", 17)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


def make_generators(
    seed: int, purpose: str, positions: list[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator per sample, for functions that draw sample by sample."""
    return [torch.Generator(device).manual_seed(derive_seed(seed, purpose, position)) for position in positions]


def uniform(
    count: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`count` numbers in [0, 1), from one generator or from one each."""
    if isinstance(generator, list):
        return torch.cat([torch.rand(1, generator=source, device=source.device) for source in generator]).to(device)
    source = "cpu" if generator is None else generator.device
    return torch.rand(count, generator=generator, device=source).to(device)
