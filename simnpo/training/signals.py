"""Signals that end a run early: Ctrl-C, and those that Slurm, Kubernetes and a closing terminal send.

While steps are taken a signal only asks to stop: the step is finished and a checkpoint written first. At any other time
there is nothing to save, and it stops the run where it is.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

# Windows has only the first two
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
# a launcher passes on the Ctrl-C that the terminal has sent to its processes already: that is no second one
SECOND_AFTER = 1.0  # seconds


class Stopped(KeyboardInterrupt):
    """A run that a signal has ended; what it had done is in its folder.

    signum: the signal.   together: all ranks have stopped after the same step.
    """

    def __init__(self, signum: int, *, together: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.together = signum, together

    @property
    def exit_status(self) -> int:
        """128 and the signal's number, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopSignals:
    """Catches the signals in a `with` block; what handled them before does again after it.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored, and one that the program handles itself stays
    with the program, but for Ctrl-C. Outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.signum = 0  # that asked to stop; 0: none has
        self._asked_at = 0.0
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler is signal.SIG_DFL or (number == signal.SIGINT and handler is not signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block a signal only sets `signum`; a second Ctrl-C stops at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agreed(self, device: torch.device) -> int:
        """The signal after which all ranks stop, 0 to go on. Collective: every rank must call it, after every step."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self.signum
        signum = torch.tensor(self.signum, device=device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        second = signum == self.signum == signal.SIGINT and now - self._asked_at > SECOND_AFTER
        if not self._deferred or second:
            raise Stopped(signum)
        if not self.signum:
            self.signum, self._asked_at = signum, now
