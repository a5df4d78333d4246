"""Ending a run on request: a signal is noted, and answered between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


def announce(line: str) -> None:
    """Write a line to standard error from a signal handler, which may have interrupted a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


@contextlib.contextmanager
def stop_signals(*, patient: bool = False, notice: str = "") -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; a second one takes its ordinary course.

    With `patient` all of them are received: torchrun repeats to its ranks what the terminal has told them already.
    `notice` is printed to standard error at once, since a step may take long.

    The end of a job reaches the loader's workers, too. From the first signal on their end is no error: torch's
    handler of SIGCHLD would raise one wherever the program happens to be, in the middle of a checkpoint, say.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if notice and not received:
            announce(notice)
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
