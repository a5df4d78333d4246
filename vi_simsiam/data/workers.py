"""Results of worker processes: torch's DataLoader with one-line errors and a clean Ctrl-C.

Functions that run in workers return bytes and numpy arrays, which go through a pipe. Tensors would
need shared memory, of which containers have little, and sockets in the temporary folder, whose path
may be too long; a worker that lacks either blocks forever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vi_simsiam.errors import InputError, TrainingError

PATIENCE = 600.0
"""Seconds to wait for the next images of a process or thread, however slow the disk."""
MANY_WORKERS = "This DataLoader will create"
"""Start of torch's warning of more workers than cores."""
_SECONDS_TO_END = 5.0
_SECONDS_BETWEEN_CHECKS = 5.0
"""A dead worker is noticed this late where no signal tells of it, as outside the main thread."""


def worker_loader(
    function: Callable[[Any], Any], keys: Iterable[Any], workers: int, *, keep: bool = False
) -> DataLoader[Any]:
    """Return a loader of `function(key)` for every key, for `results`.

    Args:
        function: returns anything but None, and can be pickled if `workers` > 0.
        keys: iterated once for every `results`.
        workers: processes; 0 calls the function in this process. Each prepares two results ahead.
        keep: keep the processes from one `results` to the next.
    """
    # A generator of its own keeps DataLoader from drawing its seed from torch's global one.
    return DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
        timeout=PATIENCE if workers else 0,
        persistent_workers=keep and workers > 0,
    )


def results(
    loader: DataLoader[Any], name: str = "workers", verb: str = "prepares", *, quiet: bool = False
) -> Generator[Any, None, None]:
    """Yield the results of a `worker_loader`, in order.

    Args:
        loader: the loader.
        name: what messages begin with.
        verb: the workers' task, for messages.
        quiet: suppress torch's warning of more workers than cores.

    Raises:
        Exception: the function's own, of the same type in a process as without one.
        TrainingError: processes cannot be started, or one died or does not answer.
    """
    if not loader.num_workers:
        yield from loader
        return
    watch = WorkerWatch(name, verb)
    try:
        multiprocessing.Lock()  # torch prints a traceback of its own if it fails half-way
        with _interrupts_blocked(), warnings.catch_warnings():
            if quiet:
                warnings.filterwarnings("ignore", MANY_WORKERS)
            batches = watch.call(iter, loader)
    except OSError as error:
        _let_started_ones_end(error)
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise TrainingError(
            f"workers: processes cannot be started here ({reason}; they need /dev/shm); "
            "--workers 0 works without them"
        ) from error
    try:
        with watch:
            try:
                while (batch := watch.call(_next, batches)) is not None:
                    if isinstance(batch, _Failure):
                        raise batch.error
                    yield batch
            except BaseException as error:
                if not (loader.persistent_workers and isinstance(error, GeneratorExit)):
                    _kill(batches)
                raise
    finally:
        # A traceback keeps this frame. Workers end at once when the last reference goes. If that
        # happens in a garbage collection, their queues are closed first, and each takes 5 seconds.
        del batches, loader


class WorkerWatch:
    """Delays the error for a worker that died until the next result is requested.

    torch's handler of SIGCHLD raises an exception wherever the program happens to be: in the
    caller's optimiser, or in the middle of a checkpoint.
    """

    def __init__(self, name: str, verb: str) -> None:
        self._name, self._verb = name, verb
        self._hold = False
        self._death: RuntimeError | None = None
        self._former: Any = None

    def __enter__(self) -> None:
        former = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if callable(former) and threading.current_thread() is threading.main_thread():
            self._former = former
            signal.signal(signal.SIGCHLD, self._handle)

    def __exit__(self, *exception: object) -> None:
        self._hold = False  # another handler may call this one from now on
        if self._former is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._former)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; raise TrainingError if a worker dies or has died since the last call."""
        self._hold = False
        try:
            if self._death is not None:
                raise self._death
            result = function(*arguments)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            if "timed out" in str(error):
                raise no_answer(self._name) from error
            reason = " ".join(str(error).split())
        else:
            self._hold = True
            return result
        finally:
            del arguments  # for the reason given in `results`
        # Raised here because torch's exception holds on to the other workers' queues, too.
        raise TrainingError(
            f"{self._name}: a process that {self._verb} images has ended ({reason}); "
            "it may have run out of memory, and fewer workers need less"
        )

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        try:
            self._former(number, frame)
        except RuntimeError as error:
            if not self._hold:
                raise
            self._death = error


def _let_started_ones_end(error: OSError) -> None:
    """Give torch's iterator, which failed half-way, what it needs to end without a traceback."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(begun := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
            begun._workers_status = [True] * len(begun._workers)


def _next(batches: Any) -> Any:
    """Return the next result, or None after the last. torch looks for deaths at its time-outs."""
    deadline = time.monotonic() + PATIENCE
    batches._timeout = min(PATIENCE, _SECONDS_BETWEEN_CHECKS)
    try:
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if "timed out" not in str(error) or time.monotonic() >= deadline:
                    raise
    finally:
        batches._timeout = PATIENCE  # kept workers first finish what they are at in the next epoch


def _kill(batches: Any) -> None:
    """End the workers at once; torch alone waits 5 seconds for each that does not answer."""
    if batches._worker_pids_set:  # else torch would report these deaths, also to an outer loop
        _remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    for process in batches._workers:
        process.kill()
    for process in batches._workers:
        process.join(_SECONDS_TO_END)
    batches._workers_done_event = threading.Event()  # a dead worker may hold the shared lock


def no_answer(name: str, *, threads: bool = False) -> TrainingError:
    """Return the error for processes (or threads) that run but deliver nothing."""
    who = "threads" if threads else "workers"
    hint = "" if threads else ", or a process be stopped; --workers 0 works without them"
    return TrainingError(
        f"{name}: no images have come from the {who} for {PATIENCE:.0f} s; "
        f"a disk may not answer{hint}"
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keep SIGINT from workers until they ignore it: they inherit this thread's signal mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Failure(NamedTuple):
    """An exception as a result: raised in a worker, it would lose its type and message."""

    error: Exception


class _Calls(Dataset[Any]):
    """Maps a key to a result; in a worker, to a `_Failure` if the function fails."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.function(key)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return _Failure(error if isinstance(error, InputError) else _portable(error))


def _portable(error: Exception) -> Exception:
    """Return an exception that can be sent, of the same type if possible, with its traceback."""
    place = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the class's own code
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the main process decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A main process that is killed cannot end its workers, which would wait for it forever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
