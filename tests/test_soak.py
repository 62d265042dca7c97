"""benchmarks/soak.py: what its verdict is of lines that are known, and of a run that leaks."""

import csv
import subprocess
import sys

import pytest
from training_runs import ROOT


sys.path.append(str(ROOT / "benchmarks"))
from soak import soak, verdict


def lines(**changes):
    """An hour of lines of a healthy process; each change is what is to be added to a column by the minute."""
    made = []
    for minute in range(60):
        wobble = (-1) ** minute
        row = {"seconds": 60.0 * minute, "memory MiB": 700 + 3 * wobble, "file descriptors": 9 - minute % 2}
        row |= {"threads": 8, "ms train": 20 + wobble, "ms sample": 5 + 0.1 * wobble}
        made.append({name: value + changes.get(name, lambda _: 0)(minute) for name, value in row.items()})
    return made


def bad(rows):
    return [name for name, (_, good) in verdict(rows).items() if not good]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"memory MiB": lambda minute: minute * 15 / 60}, []),
        ({"memory MiB": lambda minute: minute * 25 / 60}, ["memory"]),
        ({"memory MiB": lambda minute: 300 * min(minute, 10) / 10}, []),  # what fills at first is no leak
        ({"file descriptors": lambda minute: minute // 20}, ["file descriptors"]),
        ({"threads": lambda minute: minute > 50}, ["threads"]),
        ({"ms train": lambda minute: minute * 0.1}, []),
        ({"ms train": lambda minute: 0.4 * minute}, ["ms train"]),
        ({"ms sample": lambda minute: -minute / 30}, []),
    ],
)
def test_the_verdict(change, found):
    assert bad(lines(**change)) == found


def test_a_slope_is_told_in_mebibytes_an_hour():
    said, _ = verdict(lines(**{"memory MiB": lambda minute: 2 * minute}))["memory"]
    assert said.startswith("+120.0 MiB an hour")


def test_too_few_lines_have_no_verdict():
    with pytest.raises(SystemExit, match="3 lines are too few"):
        verdict(lines()[:3])


@pytest.mark.slow
def test_a_leak_is_found(tmp_path):
    """Of memory and of files, in a run of a minute; what is said of time is left to quiet machines."""
    leaked = []

    def leak(number):
        leaked.append((bytearray(8 * 2**20), (tmp_path / "open").open("a")))

    rows = soak(1 / 60, 4, 2, tmp_path / "soak.csv", leak)
    with (tmp_path / "soak.csv").open() as file:
        assert [float(row["rounds"]) for row in csv.DictReader(file)] == [row["rounds"] for row in rows]
    assert {"memory", "file descriptors"} <= set(bad(rows))
    assert rows[-1]["memory MiB"] - rows[0]["memory MiB"] > 7 * (len(leaked) - 1)
    for _, file in leaked:
        file.close()


@pytest.mark.slow
def test_a_minute(tmp_path):
    """A whole run as it is started by hand; a minute is too short to hold memory to an hour's bound."""
    argv = ["--hours=0.0166", "--every=4", "--steps=2", f"--csv={tmp_path / 'soak.csv'}", "--memory_bound=2000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/soak.py"), *argv], capture_output=True, text=True, timeout=900
    )
    assert "| memory |" in done.stdout, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(("| memory", "| file descriptors", "| threads")):
            assert line.endswith("| good |"), done.stdout
