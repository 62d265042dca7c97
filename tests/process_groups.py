"""Several processes that train together, over gloo on the CPU. They are started once and do one run after another."""

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import socket
import traceback
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What `accelerate launch` tells processes that are to divide the weights among them.
DIVIDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def _work(rank: int, count: int, settings: dict[str, str], connection) -> None:
    """One of the processes: runs each script that it is sent, and answers with its output and what went wrong."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    import torch
    from training_runs import reset_accelerate

    torch.set_num_threads(1)
    while job := connection.recv():
        name, argv, port = job
        os.environ |= settings | {"MASTER_PORT": port}
        reset_accelerate()
        output, error = io.StringIO(), None
        try:
            script = importlib.import_module(name)
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                script.main(script.parse_args(argv))
        except BaseException:
            error = traceback.format_exc()
        gc.collect()  # an accelerator keeps its output folder from other runs until it is gone
        connection.send((output.getvalue(), error))


class ProcessGroup:
    """`count` processes. A run in which one of them fails is an error, and ends them all."""

    def __init__(self, count: int, settings: dict[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self.count, self.connections, self.processes, self.said = count, [], [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_work, args=(rank, count, settings or {}, theirs)))
            self.processes[-1].start()
            theirs.close()
            self.connections.append(ours)

    def train(self, output, dataset, *flags, config=None, script) -> Path:
        """Like `training_runs.train`, in all processes. What they said is in `self.said`."""
        argv = [f"--dataset_name={dataset}", f"--output_dir={output}", *flags]
        self.run(script, [f"--config={config}"] * (config is not None) + argv)
        return Path(output)

    def run(self, script, argv: list[str], of_last: tuple[str, ...] = (), seconds: float = 600) -> None:
        """A script with the same flags in each process, but for those `of_last`, of the last one alone."""
        gc.collect()
        port = str(free_port())
        for rank, connection in enumerate(self.connections):
            connection.send((script.__name__, argv + list(of_last) * (rank == self.count - 1), port))
        self.said = []
        for rank, connection in enumerate(self.connections):
            try:
                output, error = connection.recv() if connection.poll(seconds) else ("", "it does not end")
            except EOFError:
                output, error = "", "it died"
            self.said.append(output)
            if error:
                self.close()
                raise AssertionError(f"process {rank} of {self.count}: {error}\n{output}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
