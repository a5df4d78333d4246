"""Child processes and signals: start, watch and stop other processes, and end on request."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from vi_simsiam.errors import InputError, RunWarning

INTERRUPTED = 130
"""Exit code of a process that was interrupted and can go on later."""
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
"""Ctrl-C, the end of a job, a batch system's notice before it (Slurm's --signal=USR1), and the end
of the terminal: a training saves and ends."""
_END_WITH_PARENT: Callable[[], int] | None = None
"""Lets a new process receive SIGTERM when its parent has ended, in whatever way (on Linux)."""
with contextlib.suppress(AttributeError, TypeError):  # looked up now: no lock may be held in a fork
    _SET_DEATH_SIGNAL = 1
    _END_WITH_PARENT = functools.partial(
        ctypes.CDLL(None).prctl, _SET_DEATH_SIGNAL, int(signal.SIGTERM)
    )
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_POLL_SECONDS = 0.2
_SAVING_SECONDS = 60.0


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Process:
    """A process in its own process group, with its output in a file.

    Attributes:
        log: the file of its output.
        exit: its exit code, None until it has ended.
        seconds: from its start to its end.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.exit: int | None = None
        self.seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def running(self) -> bool:
        """True from its start to its end."""
        return self._process is not None and self.exit is None

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        return self._process.pid if self._process is not None and self.exit is None else None

    @property
    def state(self) -> str:
        """One word: waiting, running, done, interrupted or failed."""
        if self.exit is None:
            return "running" if self._process else "waiting"
        return {0: "done", INTERRUPTED: "interrupted"}.get(self.exit, "failed")

    @property
    def elapsed(self) -> float:
        """Seconds since its start, or from its start to its end."""
        return time.monotonic() - self._started if self.running else self.seconds

    def start(
        self, command: Sequence[str], *, threads: int, append: bool, **variables: str
    ) -> None:
        """Start `command` with a number of threads for PyTorch; `append` keeps an earlier log.

        `variables` are added to the environment.
        """
        own = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **variables}
        environment = {**os.environ, **own}
        # A link in a folder of somebody else's may lead anywhere.
        with open(self.log, "ab" if append else "wb", opener=_without_links) as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A terminal's Ctrl-C would reach the process in addition to that of
                # `supervise`, and a second signal ends it at once.
                start_new_session=True,
                preexec_fn=_END_WITH_PARENT,
            )
        self._started = time.monotonic()

    def poll(self) -> bool:
        """True if it has ended; sets `exit` and `seconds`."""
        if self.exit is None and self._process is not None and self._process.poll() is not None:
            self.seconds = time.monotonic() - self._started
            code = self._process.returncode
            # A signal ends a process whose trainer does not handle it yet.
            self.exit = INTERRUPTED if -code in STOP_SIGNALS else code
        return self.exit is not None

    def stop(self) -> None:
        """Send the signal to save and end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it and its own child processes at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        """Wait for its end, for at most `seconds`."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, seconds))


def supervise(
    processes: Sequence[Process],
    console: Console,
    *,
    table: Callable[[], Table],
    ended: Callable[[Any], object],
    start_more: Callable[[], object],
) -> bool:
    """Run processes until all have ended, and leave none behind on an error.

    After the first of STOP_SIGNALS every process saves and ends, and no more are started; a second
    Ctrl-C kills.

    Args:
        processes: those that are or will be started.
        console: shows `table` while they run, if it is a terminal.
        table: the state of all.
        ended: called once for each process that has ended.
        start_more: called in every round, to start waiting processes.

    Returns:
        True if a signal arrived.
    """
    stopping = False
    notice = "stopping all runs after their step; a second Ctrl-C ends them at once"
    with stop_signals(patient=True, notice=notice) as received:
        try:
            with Live(table(), console=console, transient=True, auto_refresh=False) as live:
                while True:
                    # All are polled first, so that `ended` sees the state of all of them.
                    for process in [run for run in processes if run.exit is None and run.poll()]:
                        ended(process)
                    if received and not stopping:
                        stopping = True
                        for process in processes:
                            process.stop()
                    if received.count(signal.SIGINT) > 1:
                        for process in processes:
                            process.kill()
                    if not received:
                        start_more()
                    if not any(process.running for process in processes):
                        return bool(received)
                    if console.is_terminal:
                        live.update(table(), refresh=True)
                    time.sleep(_POLL_SECONDS)
        finally:
            deadline = time.monotonic() + _SAVING_SECONDS
            for process in processes:
                process.stop()
            for process in processes:
                process.wait(deadline - time.monotonic())
                process.kill()


@contextlib.contextmanager
def stop_signals(*, patient: bool = False, notice: str = "") -> Iterator[list[int]]:
    """A list that receives STOP_SIGNALS; after the first Ctrl-C they have their usual effect.

    Batch systems repeat the others, and would interrupt the saving that the first one began.

    Args:
        patient: receive all signals: torchrun repeats to its ranks the one of the terminal.
        notice: printed to standard error at once, since a step can take long.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if notice and not received:
            # The handler may have interrupted a print, which is not reentrant.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{notice}\n".encode())
        received.append(number)
        if not patient and number == signal.SIGINT:
            restore()

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in STOP_SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def locked(path: Path, busy: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Lock the file `path`, which stays; a RunWarning where the file system has no locks.

    Raises:
        InputError: `busy`; another process still holds it after `seconds`.
    """
    # A file that stands for a lock would stay after a kill, and on another computer keep all out.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise InputError(busy) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = f"{path.parent} is on a file system without locks; start one command at a time there"
        warnings.warn(text, RunWarning, stacklevel=3)
    try:
        yield
    finally:
        lock.release()


def last_line(path: Path) -> str:
    """The last line of a file that is not blank; empty without one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""
