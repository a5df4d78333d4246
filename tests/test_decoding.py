"""Processes that decode give the images in order, hold few of them, and end when they should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packing_cases import Items, pixels, stored_files
from PIL import Image

from vi_simsiam.data import decoding
from vi_simsiam.data.cache import in_memory, pack
from vi_simsiam.data.decoding import decode
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import DatasetSource, FileSource, Unreadable
from vi_simsiam.errors import InputError, TrainingError


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    return stored_files(tmp_path / "set" / "train")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one image, so that a few images keep several processes busy."""
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_both_ways_of_starting_processes(
    files: FileSource, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process that imports torch takes long enough.
    monkeypatch.setattr(
        decoding,
        "ProcessPoolExecutor",
        lambda workers, **options: ProcessPoolExecutor(1, **options),
    )
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        pack(files, tmp_path / "a.pack", workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert pixels(open_pack(tmp_path / "a.pack")) == pixels(files)


class Unpicklable(Items):
    def __reduce__(self) -> str:
        raise TypeError("holds an open file")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        assert multiprocessing.parent_process() is None
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [Items, Unpicklable])
def test_datasets_are_decoded_in_order(kind: type[Items]) -> None:
    chunks = list(decode(DatasetSource(kind(9), "mine"), workers=2))  # type: ignore[arg-type]
    assert [chunk.kept for chunk in chunks] == [[index] for index in range(9)]
    assert [chunk.sizes for chunk in chunks] == [[(2 + index % 3, 3)] for index in range(9)]
    assert [chunk.pixels for chunk in chunks] == [kind(9)[index][0].tobytes() for index in range(9)]


def test_an_image_too_large_for_the_format_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_BYTES", 3 * 3 * 3)
    (chunk,) = decode(DatasetSource(Items(3), "mine"), workers=0)  # type: ignore[arg-type]
    assert chunk.kept == [0, 1]
    assert chunk.unreadable == [Unreadable("mine/2", "3 x 4 pixels")]


@pytest.mark.usefixtures("small_chunks")
def test_few_chunks_are_held_at_once(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []

    class Executor:
        def __init__(self, workers: int, initializer: Any, initargs: Any) -> None:
            self.source = initargs[0]

        def submit(self, function: Any, chunk: range) -> Future[decoding.Chunk]:
            submitted.append(chunk)
            future: Future[decoding.Chunk] = Future()
            future.set_result(decoding._decode(self.source, chunk, None))
            return future

        _processes = None

        def shutdown(self, cancel_futures: bool) -> None:
            submitted.append("down")

    monkeypatch.setattr(decoding, "ProcessPoolExecutor", Executor)
    chunks: Iterator[decoding.Chunk] = decode(FileSource(files.paths * 3), workers=2)
    for taken in range(1, 4):
        assert next(chunks).kept == [taken - 1]
        assert len(submitted) <= taken + 4
    chunks.close()  # type: ignore[attr-defined]
    assert submitted[-1] == "down"


class Deadly(Items):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_process_is_reported() -> None:
    with pytest.raises(TrainingError, match="mine: a process that decodes images was killed"):
        in_memory(DatasetSource(Deadly(4), "mine"), workers=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workers: -1 must be at least 0"):
        in_memory(DatasetSource(Items(4)), workers=-1)  # type: ignore[arg-type]


_BUILD = """
import sys, time
from pathlib import Path
from vi_simsiam.data import decoding
from vi_simsiam.data.cache import cached
from vi_simsiam.data.sources import FileSource
class Slow(FileSource):
    def image(self, index):
        time.sleep(0.2)
        return super().image(index)
decoding._CHUNK_BYTES = 1
print("ready", flush=True)
cached(Slow(sys.argv[2:] * 100), cache_dir=Path(sys.argv[1]), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_build_ends_all_processes(
    files: FileSource, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(folder), *files.paths],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    while not (folder.is_dir() and any(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # workers are decoding
    (unfinished,) = folder.iterdir()
    # Ctrl-C reaches all processes of a terminal; a process is killed alone.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    while _group_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_exists(process.pid)
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1
        assert errors.endswith("KeyboardInterrupt\n")
        assert list(folder.iterdir()) == []
    else:
        assert list(folder.iterdir()) == [unfinished]


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
