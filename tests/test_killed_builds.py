"""A cache that was killed, found no room or may not be written while it was built loses nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packing_cases import pixels, stored_files
from test_full_disk import room

from vi_simsiam.data import cache, decoding
from vi_simsiam.data.cache import cached, pack
from vi_simsiam.data.packed import PackWriter
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    return stored_files(tmp_path / "set")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the file": (cache.shutil, "disk_usage", 1, False),
    "the file is new": (PackWriter, "__init__", 1, False),
    "the first images": (PackWriter, "append", 1, False),
    "later images": (PackWriter, "append", 4, True),
    "all images": (PackWriter, "finish", 1, False),
    "within a section": (PackWriter, "append", 10, False),
    "written": (PackWriter, "finish", 1, True),
    "not on the disk": (cache.os, "fsync", 1, False),
    "not in its place": (cache.os, "replace", 1, False),
    "in its place": (cache.os, "replace", 1, True),
}


def killed(function: Callable[..., Any], call: int, *, after: bool) -> Callable[..., Any]:
    """The function, which kills its process before or after a certain call."""
    calls = 0

    def replacement(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return replacement


def build(source: FileSource, folder: Path, holder: Any, name: str, call: int, after: bool) -> None:
    decoding._CHUNK_BYTES = 1  # type: ignore[assignment]
    setattr(holder, name, killed(getattr(holder, name), call, after=after))
    cached(source, cache_dir=folder, workers=0)


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=list(MOMENTS))
@pytest.mark.parametrize("again", ["the same images", "other images", "a file elsewhere"])
def test_what_a_killed_build_left(
    files: FileSource, folder: Path, moment: tuple[Any, str, int, bool], again: str
) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=build, args=(files, folder, *moment))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    left = set(folder.iterdir())
    assert len(left) == (moment[0] is not cache.shutil)
    if again == "the same images":
        images, _ = cached(files, cache_dir=folder, workers=0)
        assert pixels(images) == pixels(files)
        assert [images.path] == list(folder.iterdir())
        return
    part = FileSource(files.paths[:3], name="part")
    if again == "other images":
        images, _ = cached(part, cache_dir=folder, workers=0)
        new = images.path
    else:
        new = folder / "part"
        pack(part, new, workers=0)
    assert new is not None
    whole = {path for path in left if not path.name.startswith(".")}
    assert set(folder.iterdir()) == {new, *whole}


@pytest.mark.parametrize("size", [0, 1, 64, 500, 1500, 2000])
def test_a_disk_that_fills_up(files: FileSource, folder: Path, size: int) -> None:
    message = rf"^cache_dir: {folder} is full, .* need about .*; name another place"
    with room(size), pytest.raises(InputError, match=message):
        cached(files, cache_dir=folder, workers=0)
    assert list(folder.iterdir()) == []
    images, _ = cached(files, cache_dir=folder, workers=0)
    assert pixels(images) == pixels(files)


def test_a_folder_that_may_only_be_read(
    files: FileSource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packs are used; a new one is refused in one line."""
    first, _ = cached(files, cache_dir=folder, workers=0)

    def refuse(path: Path, mode: str, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(cache, "open", refuse, raising=False)
    again, _ = cached(files, cache_dir=folder, workers=0)
    assert pixels(again) == pixels(first)
    part = FileSource(files.paths[:3], name="part")
    message = r"^cache_dir: .* cannot be written \(Read-only file system\); name another place"
    with pytest.raises(InputError, match=message):
        cached(part, cache_dir=folder, workers=0)
    assert list(folder.iterdir()) == [first.path]
