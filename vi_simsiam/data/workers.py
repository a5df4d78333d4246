"""Results of worker processes: in order, with errors as one line and a clean Ctrl-C.

Keys and results go through pipes. They are bytes and numpy arrays: tensors would need shared
memory, of which containers have little.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch

from vi_simsiam.errors import InputError, TrainingError

PATIENCE = 600.0
"""Seconds to wait for the next images of a process or thread, however slow the disk."""
_AHEAD = 2
"""Results that each process prepares before they are requested."""
_SECONDS_TO_END = 5.0
_SHARED_SIGNALS = {
    getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
}


class Workers:
    """Processes that call a function; where there are none, the calling process does.

    Args:
        function: can be pickled where processes are not forked.
        count: processes. Each prepares two results ahead.
        name: what messages begin with.
        verb: the workers' task, for messages.

    Raises:
        TrainingError: processes cannot be started.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        count: int,
        name: str = "workers",
        verb: str = "prepares",
    ) -> None:
        self._function, self._name, self._verb = function, name, verb
        self._processes: dict[Connection, BaseProcess] = {}
        # Also called when this object goes and at the end of the program, but in no forked process.
        self.close = Finalize(self, _end, (self._processes,), exitpriority=0)
        """End the processes at once, whatever they are at."""
        self._given = 0
        try:
            for _ in range(count):
                self._start()
        except OSError as error:
            self.close()
            reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            raise TrainingError(
                f"workers: processes cannot be started here ({reason}); "
                "--workers 0 works without them"
            ) from error

    def results(self, keys: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield `function(key)` for every key, in order. Another call ends the one before.

        Raises:
            Exception: the function's own, of the same type in a process as without one.
            TrainingError: a process has died, or none answers.
        """
        if not self._processes:
            yield from map(self._function, keys)
            return
        left = iter(keys)
        done: dict[int, tuple[Any, Exception | None]] = {}
        number = self._given
        self._give(itertools.islice(left, _AHEAD * len(self._processes)))
        while number < self._given:
            while number not in done:
                # Numbers below this one belong to a call that was left early.
                done |= {n: answer for n, answer in self._answers() if n >= number}
            result, error = done.pop(number)
            if error is not None:
                raise error
            number += 1
            self._give(itertools.islice(left, 1))
            yield result

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        arguments = self._function, theirs, ours
        process = multiprocessing.Process(target=_serve, args=arguments, daemon=True)
        with _interrupts_blocked():
            process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self._processes[ours] = process

    def _give(self, keys: Iterable[Any]) -> None:
        connections = list(self._processes)
        for key in keys:
            with contextlib.suppress(OSError):  # a dead process is noticed when it is read from
                connections[self._given % len(connections)].send((self._given, key))
            self._given += 1

    def _answers(self) -> Iterator[tuple[int, tuple[Any, Exception | None]]]:
        if not self._processes:
            raise RuntimeError("the workers were closed while their results were read")
        ready = wait(list(self._processes), PATIENCE)
        if not ready:
            raise no_answer(self._name)
        for connection, process in self._processes.items():
            if connection not in ready:
                continue
            try:
                yield connection.recv()
            except (EOFError, OSError) as error:
                process.join(_SECONDS_TO_END)
                code = process.exitcode or 0
                how = f"killed by signal: {signal.strsignal(-code)}" if code < 0 else f"exit {code}"
                hint = "it may have run out of memory, and fewer workers need less"
                if code == -getattr(signal, "SIGBUS", 0):
                    hint = "a file that it read may have been truncated, or its disk have failed"
                raise TrainingError(
                    f"{self._name}: a process that {self._verb} images has ended ({how}); {hint}"
                ) from error


def results(
    function: Callable[[Any], Any],
    keys: Iterable[Any],
    workers: int,
    name: str = "workers",
    verb: str = "prepares",
) -> Generator[Any, None, None]:
    """Yield the results of `Workers` that end with the generator."""
    with contextlib.closing(Workers(function, workers, name, verb)) as started:
        yield from started.results(keys)


def no_answer(name: str, *, threads: bool = False) -> TrainingError:
    """Return the error for processes (or threads) that run but deliver nothing."""
    who = "threads" if threads else "workers"
    hint = "" if threads else ", or a process be stopped; --workers 0 works without them"
    return TrainingError(
        f"{name}: no images have come from the {who} for {PATIENCE:.0f} s; "
        f"a disk may not answer{hint}"
    )


def _end(processes: dict[Connection, BaseProcess]) -> None:
    for process in processes.values():
        process.kill()
    for process in processes.values():
        process.join(_SECONDS_TO_END)
    processes.clear()


def _serve(function: Callable[[Any], Any], connection: Connection, other_end: Connection) -> None:
    """Answer the keys that come through a pipe until its other end is closed."""
    other_end.close()
    # These reach every process of a terminal or job; the main process decides what follows.
    for number in _SHARED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_SHARED_SIGNALS, signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as sender:  # the next result is computed while one is sent
        while True:
            try:
                number, key = connection.recv()
            except (EOFError, OSError):
                return
            result, failure = None, None
            try:
                result = function(key)
            except Exception as error:
                failure = error if isinstance(error, InputError) else _portable(error)
            sender.submit(_send, connection, (number, (result, failure)))


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keep signals from workers until they handle them: they inherit this thread's mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # it would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_SHARED_SIGNALS, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    # A worker that waits for a disk does not see that the other end of its pipe is closed.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _send(connection: Connection, answer: object) -> None:
    try:
        connection.send(answer)
    except BaseException:  # no memory for it, or nobody to receive it
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an exception that can be sent, of the same type if possible, with its traceback."""
    place = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the class's own code
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error
