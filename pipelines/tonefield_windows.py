"""Sounds longer than a network has seen, in overlapping windows of the length that it knows.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

from collections.abc import Callable

import torch


def window_starts(length: int, size: int, unit: int = 1, ring: bool = False) -> torch.Tensor:
    """
    Where windows of `size` begin, half a window or less apart, on multiples of `unit`.

    `length` and `size` are multiples of `unit`. The last window ends with the sound; on a ring it overlaps the first.
    """
    length, size = length // unit, size // unit
    if not ring and length <= size:
        return torch.zeros(1, dtype=torch.long)
    last = length if ring else length - size
    count = -(-last // max(1, size // 2))
    steps = torch.arange(count if ring else count + 1)
    return unit * (steps * last // count)


def in_windows(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    size: int,
    unit: int = 1,
    ring: bool = False,
    batch_size: int = 16,
) -> torch.Tensor:
    """
    `compute` on overlapping windows of the last axis, and the mean of what it returns where they overlap.

    The weights of the mean fall to the edges of a window, so that nothing jumps where one begins. (For the outputs of
    a denoiser this is MultiDiffusion, https://huggingface.co/papers/2302.08113.) What fits into one window is computed
    at once, a ring too.

    Args:
        compute (`Callable`):
            Maps windows `(n, ..., size)`, and the row of `x` that each comes from, to `(n, ..., other_size)`.
        x (`torch.Tensor` of shape `(rows, ..., length)`): What is cut into windows.
        size (`int`): Length of a window.
        unit (`int`, *optional*, defaults to 1): Windows begin on multiples of this.
        ring (`bool`, *optional*, defaults to `False`): Whether the beginning follows the end.
        batch_size (`int`, *optional*, defaults to 16): Windows that are computed together.
    """
    row = torch.arange(len(x), device=x.device)
    length = x.shape[-1]
    if length <= size:
        return compute(x, row)
    starts = window_starts(length, size, unit, ring).to(x.device, non_blocking=True)
    place = (starts[:, None] + torch.arange(size, device=x.device)) % length
    windows = x[..., place].movedim(-2, 0).flatten(0, 1)
    row = row.repeat(len(starts))
    made = [compute(*part) for part in zip(windows.split(batch_size), row.split(batch_size), strict=True)]
    made = torch.cat(made).unflatten(0, (len(starts), len(x)))
    made_size = made.shape[-1]
    made_length = length * made_size // size
    weight = 1 - (2 * torch.arange(made_size, device=x.device) + 1 - made_size).abs() / (made_size + 1)
    place = (starts[:, None] * made_size // size + torch.arange(made_size, device=x.device)) % made_length
    total = made.new_zeros(*made.shape[1:-1], made_length)
    total.index_add_(-1, place.flatten(), (made * weight).movedim(0, -2).flatten(-2))
    return total / weight.new_zeros(made_length).index_add_(0, place.flatten(), weight.repeat(len(starts)))


def mirrored(length: int, known: int) -> torch.Tensor:
    """Places that continue a sequence of `known` entries to `length` by going back and forth, without a jump."""
    place = torch.arange(length) % (2 * known)
    return torch.minimum(place, 2 * known - 1 - place)


def continuations(new: torch.Tensor, size: int) -> list[int]:
    """
    Where windows begin that are made one after the other until nothing new is left: each half a window before the
    first place that is still new, so that it continues what is there.

    `new` is bool, of shape (rows, length), with length >= size.
    """
    starts, open_places = [], new.any(0).nonzero().flatten().tolist()
    end = 0
    for place in open_places:
        if place >= end:
            starts.append(min(max(place - size // 2, 0), new.shape[1] - size))
            end = starts[-1] + size
    return starts
