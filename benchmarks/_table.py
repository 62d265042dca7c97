"""What all benchmarks report alike: how much better than the usual, and whether that is what was aimed at."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


ROWS_FILE = "TONEFIELD_BENCHMARK_ROWS"  # the variable in which `all.py` says where rows are to be written


@dataclass(frozen=True)
class Row:
    """
    Args:
        name: What was measured.
        usual, ours: What was compared, with their units.
        ratio: Of the two, as the benchmark defines it.
        least, most: What the ratio should be at least or at most; neither where nothing is aimed at.
    """

    name: str
    usual: str
    ours: str
    ratio: float
    least: float | None = None
    most: float | None = None

    @property
    def target(self) -> str:
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        return " and ".join(bounds + ([f"at most {self.most:g}"] if self.most is not None else []))

    @property
    def met(self) -> bool:
        return (self.least is None or self.ratio >= self.least) and (self.most is None or self.ratio <= self.most)


def show(rows: Iterable[Row]) -> list[Row]:
    """Prints a table, and hands the rows to `all.py` if that has started this benchmark."""
    rows = list(rows)
    print("| | usual | ours | ratio | target | |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = ("met" if row.met else "MISSED") if row.target else ""
        print(f"| {row.name} | {row.usual} | {row.ours} | {row.ratio:.3g} | {row.target} | {verdict} |", flush=True)
    if file := os.environ.get(ROWS_FILE):
        with Path(file).open("a") as handle:
            handle.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    return rows
