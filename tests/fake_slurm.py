"""A SLURM of one machine: runs job scripts with bash, and ends and requeues them with the signals that SLURM sends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]

SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    places = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
    environment = os.environ | {name: str(value) for name, value in places.items()}
    tasks.append(subprocess.Popen(words, env=environment, start_new_session=True))
for number in (signal.SIGUSR1, signal.SIGTERM):  # srun hands on what it gets to the tasks, not to their children
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
elif sys.argv[1] == "requeue":
    open(os.environ["FAKE_REQUEUED"], "a").write(sys.argv[2] + "\\n")
else:
    sys.exit(1)
"""


class FakeSlurm:
    """Job scripts are run in `folder`, where the root of the repository is to be seen."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.requeued = folder, 1000 + os.getpid() % 9000, folder / "requeued"
        tools = folder / "bin"
        tools.mkdir()
        for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(f"#!{sys.executable}\n{code}")
            (tools / name).chmod(0o755)
        (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (tools / "python").chmod(0o755)

    def sbatch(self, script: str, *words: str, options: dict | None = None, task: int | None = None) -> "Job":
        """Submits a script; `options` stand before it on the command line, and win over its own."""
        found = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (ROOT / script).read_text(), re.MULTILINE))
        self.jobs += 1
        return Job(self, [str(ROOT / script), *map(str, words)], found | (options or {}), self.jobs, task)


class Job:
    def __init__(self, slurm: FakeSlurm, words: list[str], options: dict, number: int, task: int | None):
        self.slurm, self.words, self.options, self.number = slurm, words, options, number
        nodes, per_node = int(options.get("nodes", 1)), int(options.get("ntasks-per-node", 1))
        about = {
            "JOB_ID": number, "JOB_NODELIST": ",".join(["127.0.0.1", "localhost"][:nodes]), "NNODES": nodes,
            "NTASKS": nodes * per_node, "NTASKS_PER_NODE": per_node, "CPUS_PER_TASK": 1, "SUBMIT_DIR": ROOT,
        }  # fmt: skip
        about |= {} if task is None else {"ARRAY_TASK_ID": task}
        tools = {"PATH": f"{slurm.folder / 'bin'}:{os.environ['PATH']}", "FAKE_REQUEUED": str(slurm.requeued)}
        self.environment = os.environ | tools | {f"SLURM_{name}": str(value) for name, value in about.items()}
        self.environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start(self) -> "Job":
        self.process = subprocess.Popen(
            ["bash", *self.words], cwd=ROOT, env=self.environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self

    def wait_for(self, path: Path, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.005)

    def preempt(self, grace: float = 120) -> tuple[int, str]:
        """What `--signal=B:USR1@120` asks for: USR1 to the batch shell alone, and the end when the time is over."""
        assert self.options["signal"].startswith("B:USR1@")
        self.process.send_signal(signal.SIGUSR1)
        try:
            return self.end(grace)
        except subprocess.TimeoutExpired:
            return self.cancel()

    def cancel(self, kill_wait: float = 30) -> tuple[int, str]:
        """As scancel: TERM and CONT to the whole session of the job, KILL after 30 seconds."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(self.process.pid, number)
        try:
            return self.end(kill_wait)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.end()

    def end(self, seconds: float | None = 600) -> tuple[int, str]:
        output = self.process.communicate(timeout=seconds)[0]
        return self.process.returncode, output

    @property
    def requeued(self) -> bool:
        """Whether the script has asked for another start."""
        return self.slurm.requeued.exists() and str(self.number) in self.slurm.requeued.read_text().split()
