"""Worker processes: nested loaders, the function's own errors, deaths and failures to start."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_cases import pixels, stored_files

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import MultiViewLoader, decoding, workers
from vi_simsiam.data.cache import pack
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.workers import results, worker_loader
from vi_simsiam.errors import InputError, TrainingError

SOURCE = ArraySource(np.arange(4800, dtype=np.uint8).reshape(16, 10, 10, 3))


class Peculiar(Exception):
    """Can be pickled and not be restored."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail(error: Exception) -> None:
    raise error


def fail_peculiarly(key: int) -> None:
    raise Peculiar("a", "b")


def deadly(number: int) -> int:
    """Key 2 and those after it end their process a little later."""
    if number > 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(number: int) -> int:
    time.sleep(0.5)
    return number


def test_leaving_an_inner_loader_early_leaves_the_outer_one_alone() -> None:
    for _ in range(2):
        batches = MultiViewLoader(SOURCE, AugmentConfig(size=8), 8, workers=1)
        steps = 0
        for _ in batches.epoch(0):
            steps += 1
            next(eval_loader(SOURCE, 8, 4, 1))
            with pytest.raises(InputError):
                list(results(worker_loader(fail, [InputError("no")], 1)))
        assert steps == 2
        batches.close()


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("a"), OSError(errno.EIO, "broken", "a"), ValueError("a\nb")]
)
def test_errors_in_workers_keep_their_type_and_message(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    for count in (0, 1):
        with pytest.raises(type(error)) as caught:
            list(results(worker_loader(fail, [error], count)))
        assert (caught.value.args, str(caught.value)) == (error.args, str(error))
    assert "in fail" in caught.value.__notes__[0], "the place in the worker"
    assert capfd.readouterr() == ("", "")


def test_an_error_that_cannot_be_sent_is_described() -> None:
    with pytest.raises(RuntimeError, match="^Peculiar: ab"):
        list(results(worker_loader(fail_peculiarly, [0], 1)))


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_death_ends_the_wait_for_a_batch(
    in_main_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the main thread no signal tells of it."""
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_CHECKS", 0.5)
    caught: list[Any] = []

    def read() -> None:
        try:
            list(results(worker_loader(deadly, range(8), 2)))
        except TrainingError as error:
            caught.append(str(error))

    start = time.monotonic()
    if in_main_thread:
        read()
    else:
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(60)
    assert time.monotonic() - start < 60  # of 600 s
    assert [text.split(" (")[0] for text in caught] == [
        "workers: a process that prepares images has ended"
    ]
    assert not multiprocessing.active_children()


def print_the_error_of_a_second_process() -> None:
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    fork, calls = os.fork, []

    def second_fails() -> int:
        calls.append(0)
        if len(calls) > 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    os.fork = second_fails
    try:
        list(results(worker_loader(str, range(8), 2)))
    except TrainingError as error:
        print(error)
    gc.collect()


def test_a_process_that_cannot_be_started_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()  # or the new process prints what it finds wrong with the garbage of other tests
    capfd.readouterr()
    program = multiprocessing.get_context("fork").Process(
        target=print_the_error_of_a_second_process
    )
    program.start()
    program.join(60)
    assert program.exitcode == 0
    printed, errors = capfd.readouterr()
    assert printed.startswith("workers: processes cannot be started here (Resource temporarily")
    assert errors == ""


def test_processes_that_inherit_nothing_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS and Windows, where functions and images are pickled."""
    files = stored_files(tmp_path / "set")
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)
    expected = list(MultiViewLoader(SOURCE, AugmentConfig(size=8), 4, workers=0).epoch(0))
    before = multiprocessing.get_start_method()
    multiprocessing.set_forkserver_preload(["vi_simsiam.data"])
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        pack(files, tmp_path / "a.pack", workers=2)
        loader = MultiViewLoader(SOURCE, AugmentConfig(size=8), 4, workers=1)
        for made, each in zip(loader.epoch(0), expected, strict=True):
            assert torch.equal(made.index, each.index)
            assert all(torch.equal(a, b) for a, b in zip(made.views, each.views, strict=True))
        loader.close()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert pixels(open_pack(tmp_path / "a.pack")) == pixels(files)


def test_another_epoch_waits_for_workers_that_are_still_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_CHECKS", 0.2)
    loader = worker_loader(slow, range(4), 1, keep=True)
    for _ in range(2):
        part = results(loader)
        assert next(part) == 0
        part.close()
