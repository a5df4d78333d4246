"""Worker processes: nested loaders, the function's own errors, and failures to start."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing_cases import pixels, stored_files
from test_loader import assert_same

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import MultiViewLoader, decoding, workers
from vi_simsiam.data.cache import pack
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.workers import Workers, results
from vi_simsiam.errors import InputError, TrainingError

SOURCE = ArraySource(np.arange(4800, dtype=np.uint8).reshape(16, 10, 10, 3))


class Peculiar(Exception):
    """Can be pickled and not be restored."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail(error: Exception | None) -> None:
    raise error or Peculiar("a", "b")


def test_leaving_an_inner_loader_early_leaves_the_outer_one_alone() -> None:
    batches = MultiViewLoader(SOURCE, AugmentConfig(size=8), 8, workers=1)
    for _ in batches.epoch(0):
        next(eval_loader(SOURCE, 8, 4, 1))
        with pytest.raises(InputError):
            list(results(fail, [InputError("no")], 1))
        assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("a"), OSError(errno.EIO, "broken", "a"), ValueError("a\nb")]
)
def test_errors_in_workers_keep_their_type_and_message(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    for count in (0, 1):
        with pytest.raises(type(error)) as caught:
            list(results(fail, [error], count))
        assert (caught.value.args, str(caught.value)) == (error.args, str(error))
    assert "in fail" in caught.value.__notes__[0], "the place in the worker"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches the worker")
def test_workers_ignore_interrupts_also_before_they_are_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = workers._serve

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        serve(*arguments)

    monkeypatch.setattr(workers, "_serve", interrupted)
    with contextlib.closing(Workers(len, 1)) as started:
        assert list(started.results(["a", "bc"])) == [1, 2]
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
        assert list(started.results(["abc"])) == [3]


def _ended(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_workers_end_with_their_parent_whatever_they_are_at(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from vi_simsiam.data.workers import Workers\n"
        "started = Workers(time.sleep, 2)\n"
        "print(*(process.pid for process in started._processes.values()), flush=True)\n"
        "next(started.results([60, 60]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    numbers = parent.stdout.readline().split()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    assert len(numbers) == 2
    while not all(map(_ended, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_results_of_closed_workers_are_an_error() -> None:
    started = Workers(len, 1)
    results = started.results(["a"] * 9)
    assert next(results) == 1
    started.close()
    with pytest.raises(RuntimeError, match="closed while their results were read"):
        list(results)


def test_an_error_that_cannot_be_sent_is_described() -> None:
    with pytest.raises(RuntimeError, match="^Peculiar: ab"):
        list(results(fail, [None], 1))


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = os.fork, []

    def second_fails() -> int:
        calls.append(0)
        if len(calls) > 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    message = (
        r"^workers: processes cannot be started here \(Resource temporarily unavailable\); "
        "--workers 0 works without them$"
    )
    with pytest.raises(TrainingError, match=message):
        list(results(str, range(8), 2))
    assert not multiprocessing.active_children()


KEPT: list[Workers] = []


def leave_workers() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    started = Workers(str, 2)
    next(started.results(range(8)))
    KEPT.append(started)


def test_a_program_that_handles_sigterm_ends_although_workers_run() -> None:
    program = multiprocessing.get_context("fork").Process(target=leave_workers)
    program.start()
    program.join(60)
    ended = program.exitcode
    program.kill()
    assert ended == 0


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
        assert_same(loader.epoch(0), iter(expected))
        loader.close()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert pixels(open_pack(tmp_path / "a.pack")) == pixels(files)
