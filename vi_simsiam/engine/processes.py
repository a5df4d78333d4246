"""Child processes and signals: start, watch, stop and end other processes, and end on request."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.table import Table

INTERRUPTED = 130
"""Exit code of a process that was asked to end and can go on later."""
_POLL_SECONDS = 0.2
_SAVING_SECONDS = 60.0
_Process = TypeVar("_Process", bound="Process")


class Process:
    """A process of its own process group whose output goes to a file.

    Attributes:
        log: where its output goes.
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
        """Whether it was started and has not ended."""
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
        """Seconds since its start; all that it took once it has ended."""
        return time.monotonic() - self._started if self.running else self.seconds

    def start(self, command: Sequence[str], *, threads: int, append: bool) -> None:
        """Start it with so many threads for PyTorch's operations; `append` to an earlier session's log."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab" if append else "wb") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A terminal's Ctrl-C would reach the process beside our signal, and the second one ends it at once.
                start_new_session=True,
            )
        self._started = time.monotonic()

    def poll(self) -> bool:
        """Whether it has ended; notes how."""
        if self.exit is None and self._process is not None and self._process.poll() is not None:
            self.seconds = time.monotonic() - self._started
            code = self._process.returncode
            # Before the trainer handles signals they end the process.
            self.exit = INTERRUPTED if code in (-signal.SIGINT, -signal.SIGTERM) else code
        return self.exit is not None

    def stop(self) -> None:
        """Ask it to save what it has and to end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once, with the processes that it started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        """Wait at most so long for its end."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, seconds))


def watch(
    processes: Sequence[_Process],
    received: Sequence[int],
    *,
    console: Console,
    table: Callable[[], Table],
    ended: Callable[[_Process], object],
    start_more: Callable[[], object] | None = None,
) -> None:
    """Wait until all processes that were started have ended; pass signals on.

    The first signal asks every process to save and end, and nothing is started any more; the second one kills.

    Args:
        processes: those that are or will be started.
        received: what `signals` receives.
        console: where `table` is shown while they run, if it is a terminal.
        table: the state of all.
        ended: called once for each process that has ended.
        start_more: called after every look at the processes, to start what waits.
    """
    passed = 0
    with Live(table(), console=console, transient=True, auto_refresh=False) as live:
        while True:
            # All of them are noted first: what is written about one end must not miss another.
            for process in [
                process for process in processes if process.exit is None and process.poll()
            ]:
                ended(process)
            if len(received) > passed:
                passed = len(received)
                for process in processes:
                    if passed == 1:
                        process.stop()
                    else:
                        process.kill()
            if start_more is not None and not received:
                start_more()
            if not any(process.running for process in processes):
                return
            if console.is_terminal:
                live.update(table(), refresh=True)
            time.sleep(_POLL_SECONDS)


def end(processes: Iterable[Process]) -> None:
    """Leave no process behind: where something went wrong here, they still get the time to save."""
    processes = list(processes)
    deadline = time.monotonic() + _SAVING_SECONDS
    for process in processes:
        process.stop()
    for process in processes:
        process.wait(deadline - time.monotonic())
        process.kill()


@contextlib.contextmanager
def stop_signals(*, patient: bool = False, notice: str = "") -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; a second one has its usual effect.

    From the first signal on the end of a child process is no error. The end of a job ends the data
    loader's workers, too, and torch's handler of SIGCHLD would then raise anywhere in the program,
    for example in the middle of a checkpoint.

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
        if not patient:
            restore()
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in previous:
            previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


def signals() -> contextlib.AbstractContextManager[list[int]]:
    """A list that receives every SIGINT and SIGTERM, for a command that runs other processes."""
    notice = "stopping all runs after their step; once more ends them at once"
    return stop_signals(patient=True, notice=notice)


def last_line(path: Path) -> str:
    """The last line of a file that says something; empty without any."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
        return lines[-1] if lines else ""
    return ""
