"""Processes that decode give the images in order, hold few of them, and end when they should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing_cases import Items, stored_files
from PIL import Image

from vi_simsiam.data import decoding
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.decoding import decode
from vi_simsiam.data.sources import DatasetSource, FileSource, Unreadable
from vi_simsiam.errors import InputError, TrainingError


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    return stored_files(tmp_path / "set" / "train")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one image, so that a few images keep several processes busy."""
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)


class Unpicklable(Items):
    def __reduce__(self) -> str:
        raise TypeError("holds an open file")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        assert multiprocessing.parent_process() is None
        return super().__getitem__(index)


@pytest.mark.filterwarnings("error:This DataLoader")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [Items, Unpicklable])
def test_datasets_are_decoded_in_order(kind: type[Items]) -> None:
    chunks = list(decode(DatasetSource(kind(9), "mine"), workers=3))
    assert [chunk.kept for chunk in chunks] == [[index] for index in range(9)]
    assert [chunk.sizes for chunk in chunks] == [[(2 + index % 3, 3)] for index in range(9)]
    assert [chunk.pixels for chunk in chunks] == [kind(9)[index][0].tobytes() for index in range(9)]


def test_an_image_too_large_for_the_format_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_BYTES", 3 * 3 * 3)
    (chunk,) = decode(DatasetSource(Items(3), "mine"), workers=0)
    assert chunk.kept == [0, 1]
    assert chunk.unreadable == [Unreadable("mine/2", "3 x 4 pixels")]


class Counted(Items):
    """Counts the images read in any process."""

    read = multiprocessing.Value("i")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.read.get_lock():
            self.read.value += 1
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
def test_few_chunks_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_can_be_pickled", lambda source: True)
    chunks = decode(DatasetSource(Counted(30)), workers=2)
    for taken in range(1, 4):
        assert next(chunks).kept == [taken - 1]
        time.sleep(0.1)
        assert Counted.read.value <= taken + 2 * 2
    chunks.close()
    assert not multiprocessing.active_children()


class Deadly(Items):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
def test_failures_of_workers_are_one_line() -> None:
    with pytest.raises(TrainingError, match=r"^mine: a process that decodes images has ended.*$"):
        in_memory(DatasetSource(Deadly(4), "mine"), workers=2)
    with pytest.raises(InputError, match=r"^list/1: str must be a PIL image.*$"):
        in_memory(DatasetSource([Items(1)[0], "text"]), workers=2)
    with pytest.raises(InputError, match="workers: -1 must be at least 0"):
        in_memory(DatasetSource(Items(4)), workers=-1)


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
    unfinished = set(folder.iterdir())
    assert unfinished
    # Ctrl-C reaches all processes of a terminal; a process is killed alone.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    while _group_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_exists(process.pid)
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1
        assert errors.endswith("KeyboardInterrupt\n")
    assert set(folder.iterdir()) == (set() if number == signal.SIGINT else unfinished)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
