"""How a run is asked to end before its end: by a cluster, by a person, or by the clock."""

import math
import os
import signal
import time

from tonefield.command_line import TRY_AGAIN, Interrupted


# What a run may stop for, from the weakest to the strongest; processes tell each other the number.
REASONS = ("", "--max_hours", "SIGINT", "SIGUSR1", "SIGTERM")


class Interruption:
    """
    Notices SIGTERM and SIGUSR1, which clusters send before they end a job, Ctrl-C, and the end of the allotted time.
    A second Ctrl-C does not wait for the checkpoint. `tell` is whether this process says so.
    """

    def __init__(self, max_hours: float | None, tell: bool = True):
        self.reason, self.tell = 0, tell
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self._notice) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and REASONS[self.reason] == "SIGINT":
            raise KeyboardInterrupt
        self.reason = max(self.reason, REASONS.index(name))
        if name == "SIGINT" and self.tell:  # not with print: the signal may have come in the middle of one
            os.write(2, b"\nstopping: a checkpoint is saved after this step. Ctrl-C again stops at once.\n")

    def due(self) -> int:
        """The number of the reason to stop, 0 if there is none."""
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = REASONS.index("--max_hours")
        return self.reason


def interrupted(reason: str) -> Interrupted:
    """What ends a run that a signal has stopped: after Ctrl-C nobody wants it to be started again."""
    return Interrupted(130 if reason == "SIGINT" else TRY_AGAIN)


def leave_signals_to_the_trainer(_worker: int) -> None:
    """For processes that read data: a signal to the whole group must not take the batches from the last steps."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
