"""Rows of a streamed dataset in a random order, of which any place is found again without reading all before it."""

from collections.abc import Iterator

import datasets
import pyarrow as pa
import torch
from datasets.table import InMemoryTable

from tonefield.command_line import UserError
from tonefield.training.randomness import derive_seed


READ_ROWS = 100  # at a time

Place = tuple[int, int, int, int]  # epoch, shard and row where a block begins, and how many of its rows are done


class Lane:
    """
    Some shards of a stream, again and again, each epoch in another order.

    The rows are shuffled block by block: a block is read, and then given in an order that follows from where it
    begins. So a place in the lane is found again by reading one block, not an epoch.

    Args:
        rows: The stream.
        shards: The numbers of its shards that belong to the lane; `None` is all of it, taken as one.
        seed: Decides the order.
        size: How many rows make a block.
        place: Where to begin.
    """

    def __init__(
        self, rows: datasets.IterableDataset, shards: list[int] | None, seed: int, size: int, place: Place
    ):  # fmt: skip
        self.rows, self.shards, self.seed, self.size = rows.with_format("arrow"), shards, seed, size
        self.features = rows.features
        pictures = any(isinstance(feature, datasets.Image) for feature in (rows.features or {}).values())
        self.format = None if pictures else "numpy"
        *begin, self.done = place
        self.begin = (begin[0], begin[1], begin[2])
        self.blocks = self._blocks()
        self.block, self.order = self._next_block()

    @property
    def place(self) -> Place:
        return (*self.begin, self.done)

    def take(self, count: int) -> list[tuple[datasets.Dataset, list[int]]]:
        """The next rows: blocks, and which of their rows. They are decoded when they are asked for."""
        taken = []
        while count:
            if self.done == len(self.order):
                self.block, self.order = self._next_block()
                self.done = 0
            chosen = self.order[self.done : self.done + count]
            taken.append((self.block, chosen))
            self.done, count = self.done + len(chosen), count - len(chosen)
        return taken

    def _next_block(self) -> tuple[datasets.Dataset, list[int]]:
        self.begin, table = next(self.blocks)
        info = datasets.DatasetInfo(features=self.features)
        block = datasets.Dataset(InMemoryTable(table), info=info, fingerprint="block")
        block.set_format(self.format)
        return block, self._shuffled(len(block), "block", *self.begin)

    def _shuffled(self, count: int, *what: int | str) -> list[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(self.seed, *what))).tolist()

    def _blocks(self) -> Iterator[tuple[tuple[int, int, int], pa.Table]]:
        """Blocks without end, each with where it begins."""
        epoch, first, row = self.begin
        while True:
            parts, count, begin = [], 0, (epoch, -1, 0)
            for place, start, table in self._tables(epoch, first, row):
                while len(table):
                    begin = (epoch, place, start) if count == 0 else begin
                    part = table.slice(0, self.size - count)
                    parts.append(part)
                    count, start, table = count + len(part), start + len(part), table.slice(len(part))
                    if count == self.size:
                        yield begin, pa.concat_tables(parts)
                        parts, count = [], 0
            if count:
                yield begin, pa.concat_tables(parts)
            if begin[1] < 0 and (first, row) == (0, 0):
                raise UserError("The dataset has no rows, or a shard of it that a process needs has none.")
            epoch, first, row = epoch + 1, 0, 0

    def _tables(self, epoch: int, first: int, row: int) -> Iterator[tuple[int, int, pa.Table]]:
        """What an epoch has from a row of its shard number `first` on: shard, row, and rows from there."""
        shards = [None] if self.shards is None else self.shards
        order = self._shuffled(len(shards), "shards", epoch)
        for place in range(first, len(order)):
            shard, seen = shards[order[place]], 0
            rows = self.rows if shard is None else self.rows.shard(self.rows.num_shards, shard)
            for table in rows.iter(READ_ROWS):
                begin = max(0, row - seen) if place == first else 0
                if begin < len(table):
                    yield place, seen + begin, table.slice(begin)
                seen += len(table)


def columns_of(taken: list[tuple[datasets.Dataset, list[int]]]) -> dict:
    """The columns of rows that a lane has given."""
    read = [block[chosen] for block, chosen in taken]
    return read[0] if len(read) == 1 else {name: [row for part in read for row in part[name]] for name in read[0]}
