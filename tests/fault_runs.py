"""Runs scripts that are killed, or find the disk full, at a moment that the test chooses.

A process that has imported everything once, and has no threads, forks for every run: so a run costs what it computes.
The faults themselves are in `faults/faults.c`, which is preloaded and counts what changes files.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ended:
    """What became of a run; `operations` and `writes` changed files, as far as it came to its end."""

    status: int
    output: str
    operations: int = 0
    writes: int = 0

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


def compile_faults(folder: Path) -> Path:
    """The library that makes faults."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are made by a library that is compiled here, and there is no compiler")
    source, library = Path(__file__).parent / "faults" / "faults.c", folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class Runs:
    """Starts scripts in processes that fork from one which is warm."""

    def __init__(self):
        self.work = tempfile.TemporaryDirectory(prefix="tonefield-faults-")
        self.library = compile_faults(Path(self.work.name))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_runs_warm"])
        settings = {"LD_PRELOAD": str(self.library), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true", "MPLBACKEND": "agg"}  # fmt: skip
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            assert self.run("inference", ["--help"]).status == 0  # starts the warm process, whose environment stays
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def start(self, script: str, argv, below: Path | str = "", kill_at: int = 0, full_at: int = 0):
        log = Path(self.work.name, "log")
        told = (script, list(map(str, argv)), str(log), str(self.library), str(below), kill_at, full_at)
        process = self.context.Process(target=run_script, args=told)
        process.start()
        return process

    def run(self, script: str, argv, below="", kill_at: int = 0, full_at: int = 0, seconds: float | None = None):
        """Waits for the end; after so many seconds the run is killed, whatever it does then."""
        process = self.start(script, argv, below, kill_at, full_at)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        return self.ended(process)

    def ended(self, process) -> Ended:
        log = Path(self.work.name, "log")
        text, _, counts = log.read_text(errors="replace").partition("\noperations and writes: ")
        return Ended(process.exitcode, text, *map(int, counts.split()))


def run_script(script: str, argv: list[str], log: str, library: str, below: str, kill_at: int, full_at: int) -> None:
    """What a forked process does."""
    import importlib

    from tonefield.command_line import run

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module = importlib.import_module(f"tonefield.{script}")
    faults = ctypes.CDLL(library)
    faults.arm_faults(below.encode(), kill_at, full_at)
    status = 0
    try:
        run(module.main, module.parse_args(argv))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    with contextlib.suppress(OSError):
        print(f"\noperations and writes: {faults.count_operations()} {faults.count_writes()}", flush=True)
    sys.stderr.flush()
    os._exit(status or 0)
