"""A pack file is read back exactly, any damage to it is found, and pickling it costs nothing."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packing_cases import noise, pixels, stored_files
from rich.console import Console

from vi_simsiam.data import packed
from vi_simsiam.data.cache import cached, in_memory, pack
from vi_simsiam.data.packed import Contents, PackedImages, open_pack
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    return stored_files(tmp_path / "set" / "train")


def flip(place: int) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        return bytes(content)

    return damage


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "is no pack file"),
    "foreign": (lambda whole: b"\x89PNG" + whole[4:], "is no pack file"),
    "start": (lambda whole: whole[:40], "is truncated: 40 bytes"),
    "cut": (lambda whole: whole[:-1], "is truncated: .* bytes of"),
    "longer": (lambda whole: whole + b"\0", "is damaged: .* bytes of"),
    "version": (lambda whole: whole[:8] + b"\1" + whole[9:], "has format version 1, .* reads 2"),
    "prologue": (flip(20), "is damaged: the checksum of its first 64 bytes"),
    "pixels": (flip(100), "is damaged: the checksum of the bytes from 64 on"),
    "header": (flip(-3), "is damaged: the checksum of its header"),
}


@pytest.mark.parametrize(("change", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_refused_or_repaired(
    files: FileSource, tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    images, _ = cached(files, cache_dir=tmp_path, workers=0)
    path = images.path
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with pytest.raises(InputError, match=rf"^pack: {path} {reason}"):
        open_pack(path)
    console = Console(file=io.StringIO())
    images, _ = cached(files, cache_dir=tmp_path, workers=0, console=console)
    assert pixels(images) == pixels(files)
    assert path.read_bytes() == whole
    assert isinstance(console.file, io.StringIO)
    first = console.file.getvalue().splitlines()[0]
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
    monkeypatch.setattr(packed, "_CHECKED_BYTES", 100)
    monkeypatch.setattr(packed, "_READ_BYTES", 7)
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
    big = FileSource(files.paths * 20, name="set")
    pack(big, tmp_path / "a.pack", workers=0)
    images = open_pack(tmp_path / "a.pack")
    message = pickle.dumps(images)
    assert len(message) < 1000
    in_memory_twin = pickle.loads(pickle.dumps(in_memory(files, workers=0)))
    assert pixels(in_memory_twin) == pixels(files)
    assert in_memory_twin.describe(6) == files.paths[6]
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


def test_sizes_that_do_not_fit_are_refused() -> None:
    one = np.ones(1, np.int32)
    with pytest.raises(InputError, match="pixels: 4 bytes do not fit"):
        PackedImages(np.zeros(4, np.uint8), Contents("a", one, one))
    with pytest.raises(InputError, match="at least 1 x 1"):
        PackedImages(np.zeros(0, np.uint8), Contents("a", one, 0 * one))
    with pytest.raises(InputError, match=r"\(1,\) and \(2,\)"):
        PackedImages(np.zeros(3, np.uint8), Contents("a", one, np.ones(2, np.int32)))
