"""The cache gives Pillow's pixels, decodes them once, and leaves no half-written file behind.

A pack file is read back exactly, any damage to it is found, and pickling it costs nothing.
"""

from __future__ import annotations

import errno
import fcntl
import io
import multiprocessing
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from packing_cases import Items, noise, pixels, stored_files
from PIL import Image
from rich.console import Console

from vi_simsiam.data import cache, decoding, pack_file, packed
from vi_simsiam.data.cache import cached, in_memory, pack
from vi_simsiam.data.decoding import bytes_per_image
from vi_simsiam.data.items import DatasetSource
from vi_simsiam.data.packed import Contents, PackedImages, open_pack
from vi_simsiam.data.sources import ArraySource, FileSource, Unreadable
from vi_simsiam.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    return stored_files(tmp_path / "set" / "train")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=40)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one image, so that a few images keep several processes busy."""
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_chunks")
def test_a_cached_folder_is_what_pillow_decodes(
    files: FileSource, tmp_path: Path, workers: int
) -> None:
    images, unreadable = cached(files, cache_dir=tmp_path / "cache", workers=workers)
    assert unreadable == []
    assert pixels(images) == pixels(files)
    np.testing.assert_array_equal(images.labels, files.labels)
    assert (images.classes, images.name) == (files.classes, files.name)
    assert [images.describe(index) for index in range(7)] == list(files.paths)
    assert [images.dimensions(index) for index in range(7)] == list(map(files.dimensions, range(7)))
    assert images.path is not None
    assert images.path.parent == tmp_path / "cache"
    assert images.path.name.startswith("set-train-")
    parts = (images.pixels, images.offsets, images.heights, images.widths)
    assert [part.dtype for part in parts] == [np.uint8, np.int64, np.int32, np.int32]
    assert not any(part.flags.writeable for part in parts)
    assert images.pixels.ctypes.data % 64 == 0
    with pytest.raises(IndexError):
        images.image(7)


def test_nothing_is_decoded_twice(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad\udcff.png"
    bad.write_bytes(b"no image")
    labels = np.arange(100, dtype=np.int64) % 3
    paths = [files.paths[0], bad, *([files.paths[1]] * 98)]
    source = FileSource(paths, labels, ("a", "b", "c"), "set")
    first, unreadable = cached(source, cache_dir=tmp_path, workers=0)
    assert unreadable == [Unreadable(str(bad), unreadable[0].reason)]
    monkeypatch.setattr(cache, "decode", None)
    second, again = cached(source, cache_dir=tmp_path)
    assert again == unreadable
    for images in (first, second):
        np.testing.assert_array_equal(images.labels, [0, *labels[2:]])
        assert images.describe(1) == files.paths[1]
        assert pixels(images) == [pixels(files)[0], *[pixels(files)[1]] * 98]


def test_changed_images_get_another_file(
    files: FileSource, tmp_path: Path, console: Console
) -> None:
    """And what another program wrote under the name of a file is replaced."""
    first, _ = cached(files, cache_dir=tmp_path / "cache", workers=0)
    Image.fromarray(noise(3, 3)).save(files.paths[0])
    second, _ = cached(files, cache_dir=tmp_path / "cache", workers=0)
    assert pixels(second) == pixels(files)
    assert second.path is not None
    assert set((tmp_path / "cache").iterdir()) == {first.path, second.path}
    pack(files, second.path, workers=0, shorter_side=4)
    third, _ = cached(files, cache_dir=tmp_path / "cache", workers=0, console=console)
    assert pixels(third) == pixels(files)
    assert "holds other images; decoding the images again" in printed(console)


class Interrupted(FileSource):
    def image(self, index: int) -> Image.Image:
        if index == 2:
            raise KeyboardInterrupt
        return super().image(index)


def test_an_interrupted_build_leaves_what_was_there(files: FileSource, tmp_path: Path) -> None:
    out = tmp_path / "packs" / "a.pack"
    pack(files, out, workers=0)
    before, source = out.read_bytes(), Interrupted(files.paths)
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, workers=0)
    with pytest.raises(KeyboardInterrupt):
        cached(source, cache_dir=out.parent, workers=0)
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == before


def test_only_what_killed_processes_left_is_removed(files: FileSource, tmp_path: Path) -> None:
    left = [f"a.pack.{1:016x}", f"b.pack.{1:016x}", f"c.d.pack.{1:016x}"]
    kept = [f"a.pack.{2:016x}", "a.pack.swp", f"model.pt.{1:016x}"]
    for name in left + kept:
        (tmp_path / f".{name}").write_bytes(b"half")
    used, *others = [tmp_path / f".{name}" for name in kept]
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pack(files, tmp_path / "c", workers=0)
    assert set(tmp_path.iterdir()) == {tmp_path / "set", tmp_path / "c", used, *others}


def test_a_file_system_without_locks(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = mock.Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / f".a.pack.{1:016x}"  # perhaps being written
    left.write_bytes(b"half")
    pack(files, tmp_path / "a.pack", workers=0)
    assert left.exists()
    assert pixels(open_pack(tmp_path / "a.pack")) == pixels(files)


def test_a_full_disk_is_reported_before_decoding(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(3 * np.prod(files.dimensions(index)) for index in range(7))
    usage = shutil.disk_usage(tmp_path)
    usage = usage._replace(free=int(needed) - 1)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(cache, "decode", None)
    with pytest.raises(InputError, match=rf"cache_dir: .* about {needed} bytes, .* --cache-dir"):
        cached(files, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=rf"out: .* need about {needed} bytes, .* --out"):
        pack(files, tmp_path / "cache" / "a.pack")


def test_a_disk_that_cannot_be_written(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"cache_dir: .* cannot be written \(Not a directory\); .* --cache-dir"
    with pytest.raises(InputError, match=message):
        cached(files, cache_dir=Path(files.paths[0]) / "cache")
    for number, words in (
        (errno.ENOSPC, "is full, .* 924 bytes"),
        (errno.EIO, "cannot be written"),
    ):
        failing = mock.Mock(side_effect=OSError(number, os.strerror(number)))
        monkeypatch.setattr(packed.PackWriter, "append", failing)
        with pytest.raises(InputError, match=rf"cache_dir: {tmp_path}.* {words}.*--cache-dir"):
            cached(files, cache_dir=tmp_path / "cache", workers=0)
        assert list((tmp_path / "cache").iterdir()) == []


def fill(files: FileSource, folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(pixels(cached(files, cache_dir=folder, workers=0)[0]))


def test_two_processes_fill_the_same_cache_at_once(files: FileSource, tmp_path: Path) -> None:
    context, folder = multiprocessing.get_context("fork"), tmp_path / "cache"
    given = (files, folder, context.Barrier(2), context.Queue())
    both = [context.Process(target=fill, args=given) for _ in range(2)]
    for process in both:
        process.start()
    assert [given[3].get(timeout=30) for _ in both] == [pixels(files)] * 2
    for process in both:
        process.join(30)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(("size", "expected"), [((20, 41), (8, 16)), ((9, 6), (9, 6))])
def test_shorter_side(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.fromarray(noise(size[1], size[0]))
    image.save(tmp_path / "a.png")
    source = FileSource([tmp_path / "a.png"])
    assert pack(source, tmp_path / "a.pack", shorter_side=8) == []
    wanted = image if size == expected else image.resize(expected, Image.Resampling.BICUBIC)
    assert np.array_equal(open_pack(tmp_path / "a.pack").image(0), wanted)
    assert bytes_per_image(source, 8) == 3 * expected[0] * expected[1]
    with pytest.raises(InputError, match="shorter_side: 0 must be at least 1"):
        pack(source, tmp_path / "a.pack", shorter_side=0)


def test_arrays_are_packed_without_a_copy() -> None:
    pair = np.stack([noise(3, 4, seed) for seed in range(2)])
    colour = ArraySource(pair, np.array([1, 0]), ("a", "b"), "set")
    images, unreadable = cached(colour)
    assert unreadable == []
    assert np.shares_memory(images.pixels, colour.images)
    assert colour.images.flags.writeable
    assert not images.pixels.flags.writeable
    assert pixels(images) == pixels(colour)
    assert (images.path, images.describe(1)) == (None, "set/1")
    np.testing.assert_array_equal(images.labels, [1, 0])
    gray = ArraySource(colour.images[..., 0])
    assert pixels(in_memory(gray)) == pixels(gray)
    assert cached(images) == (images, [])
    assert in_memory(images) is images


@pytest.mark.usefixtures("small_chunks")
def test_a_dataset_is_packed_in_memory(console: Console) -> None:
    source = DatasetSource(Items(120, lost=7), "mine")  # type: ignore[arg-type]
    images, unreadable = cached(source, workers=2, console=console)
    assert (images.path, images.labels) == (None, None)
    kept = [index for index in range(120) if index != 7]
    assert pixels(images) == [noise(2 + index % 3, 3, index).tolist() for index in kept]
    assert unreadable == [Unreadable("mine/7", "FileNotFoundError: it is gone")]
    assert images.describe(7) == "mine/8"
    assert re.fullmatch(r"decoding mine: 120 images, about .* kB, into memory\n", printed(console))
    empty, _ = cached(DatasetSource([]))  # type: ignore[arg-type]
    assert (len(empty), empty.pixels.size, empty.offsets.shape) == (0, 0, (0,))


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(
    files: FileSource, console: Console
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    for target in (console, terminal):
        in_memory(files, workers=0, console=target)
    line = f"decoding {files.name}: 7 images, about 924 bytes, into memory\n"
    assert printed(console) == line
    assert re.match(rf"{line}.*7/7.* 924 bytes", printed(terminal), re.DOTALL)


def flip(place: int) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        return bytes(content)

    return damage


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "is an empty file"),
    "foreign": (lambda whole: b"\x89PNG" + whole[4:], "is no pack file"),
    "start": (lambda whole: whole[:40], "is truncated: 40 bytes"),
    "cut": (lambda whole: whole[:-1], "is truncated: .* bytes, expected"),
    "longer": (lambda whole: whole + b"\0", "is damaged: .* bytes, expected"),
    "version": (lambda whole: whole[:8] + b"\1" + whole[9:], "has format version 1, .* reads 2"),
    "prologue": (flip(20), "is damaged: the checksum of its first 64 bytes"),
    "pixels": (flip(100), "is damaged: the checksum of the bytes from 64 on"),
    "header": (flip(-3), "is damaged: the checksum of its header"),
}


@pytest.mark.parametrize(("change", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_refused_or_repaired(
    files: FileSource,
    tmp_path: Path,
    console: Console,
    change: Callable[[bytes], bytes],
    reason: str,
) -> None:
    path = cached(files, cache_dir=tmp_path, workers=0)[0].path
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with pytest.raises(InputError, match=rf"^pack: {path} {reason}"):
        open_pack(path)
    images, _ = cached(files, cache_dir=tmp_path, workers=0, console=console)
    assert pixels(images) == pixels(files)
    assert path.read_bytes() == whole
    first = printed(console).splitlines()[0]
    assert re.fullmatch(rf"cache: {path} {reason}.*; decoding the images again", first)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    pack(ArraySource(noise(2, 3)[None], np.array([0]), ("one",)), path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(flip(place)(whole))
        with pytest.raises(InputError, match="is damaged|is truncated|is no pack|format version"):
            open_pack(path)


def test_checksums_cover_files_of_many_parts(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pack_file, packed):
        monkeypatch.setattr(module, "CHECKED_BYTES", 100)
    monkeypatch.setattr(pack_file, "_READ_BYTES", 7)
    path = tmp_path / "a.pack"
    pack(files, path, workers=0)
    assert pixels(open_pack(path)) == pixels(files)
    path.write_bytes(flip(64 + 250)(path.read_bytes()))
    with pytest.raises(InputError, match="the checksum of the bytes from 264 on is wrong"):
        open_pack(path)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pack cannot be read \(No such file or direct"):
        open_pack(tmp_path / "none.pack")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        open_pack(tmp_path)
    with pytest.raises(InputError, match=r"out: .* is a folder"):
        pack(ArraySource(noise(2, 2)[None]), tmp_path)


def test_pickled_as_a_path(files: FileSource, tmp_path: Path) -> None:
    pack(FileSource(files.paths * 20, name="set"), tmp_path / "a.pack", workers=0)
    images = open_pack(tmp_path / "a.pack")
    message = pickle.dumps(images)
    assert len(message) < 1000
    twin = pickle.loads(message)
    assert pixels(twin)[-7:] == pixels(files)
    assert twin.describe(139) == files.paths[6]
    pack(files, tmp_path / "a.pack", workers=0)
    assert pixels(images)[:7] == pixels(files)  # what is mapped stays
    with pytest.raises(InputError, match=r"a\.pack was replaced by another file while in use"):
        pickle.loads(message)


def test_offsets_pass_two_gibibytes(tmp_path: Path) -> None:
    heights, widths = np.array([[20_000, 20_000, 2], [20_000, 20_000, 1]], np.int32)
    total = 2 * 3 * 20_000**2 + 6
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(total)
        file.seek(total - 6)
        file.write(bytes(range(6)))
    content = np.memmap(tmp_path / "sparse", np.uint8, "r")
    images = PackedImages(content, Contents("sparse", heights, widths))
    assert images.offsets.tolist() == [0, 1_200_000_000, 2_400_000_000]
    assert np.asarray(images.image(2)).ravel().tolist() == list(range(6))
    with pytest.raises(InputError, match="pixels: 2,400,000,005 bytes do not fit"):
        PackedImages(content[:-1], Contents("sparse", heights, widths))
