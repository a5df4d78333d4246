"""Tar archives in WebDataset's layout.

A sample is a run of files with the same name up to the first dot: an image, and its label in
NAME.cls (a number or a name). Only headers are read; nothing is unpacked, and no name in an archive
is ever a path on the disk.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vi_simsiam.data.files import has_image_suffix
from vi_simsiam.data.inside import Member
from vi_simsiam.data.listing import Entry, Listed, matching, part_of
from vi_simsiam.errors import InputError, cut
from vi_simsiam.files import open_regular
from vi_simsiam.text import counted

_MOST_LABEL_BYTES = 1024
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class _File(NamedTuple):
    name: str
    start: int
    size: int

    @property
    def key(self) -> str:
        folder, name = os.path.split(self.name)
        return f"{folder}/{name.partition('.')[0]}"

    @property
    def suffix(self) -> str:
        return os.path.basename(self.name).partition(".")[2]


def read_tar(place: str) -> Listed:
    """List the images in tar archives.

    Raises:
        InputError: no such file, or one that is compressed, damaged or holds no images.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    for path in matching(place, ".tar"):
        try:
            with open_regular(Path(path)) as opened:
                found, further = _read(path, opened)
        except InputError as error:
            raise InputError(f"data: {path} {error}") from None
        except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = cut(" ".join(str(error).split())) or type(error).__name__
            raise InputError(f"data: {path} is no tar archive, or damaged ({reason})") from error
        if not found:
            raise InputError(f"data: {path} holds no images")
        entries += found
        if further:
            notes.append(
                f"{path}: {counted(further, 'further image')} of the same samples left out"
            )
    return Listed(entries, (), notes)


def _read(path: str, opened: BinaryIO) -> tuple[list[Entry], int]:
    """The images of an archive, and the number of those after the first of a sample."""
    part, entries, further = part_of(path), [], 0
    for _, run in itertools.groupby(_files(opened), key=lambda file: file.key):
        sample = list(run)
        images = [file for file in sample if has_image_suffix(f"image.{file.suffix}")]
        if images:
            label = next((_label(opened, file) for file in sample if file.suffix == "cls"), None)
            name, start, size = images[0]
            entries.append(Entry(Member(path, name, start, size), label, part))
            further += len(images) - 1
    return entries, further


def _files(opened: BinaryIO) -> Iterator[_File]:
    """The regular files in an archive, without hidden ones."""
    start = opened.read(2)
    if start in _COMPRESSED:
        raise InputError(
            f"is compressed ({_COMPRESSED[start]}), so that its images cannot be read one by one; "
            "unpack it to a .tar file"
        )
    opened.seek(0)
    end = os.fstat(opened.fileno()).st_size
    with tarfile.open(fileobj=opened, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep all headers
            if member.offset_data + member.size > end:
                raise ValueError("it ends within a file")
            if member.isreg() and not member.issparse():
                file = _File(member.name, member.offset_data, member.size)
                if not os.path.basename(file.name).startswith("."):
                    yield file
        opened.seek(archive.offset)  # tarfile takes a damaged header for the end
        if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"no header at byte {archive.offset:,}")


def _label(opened: BinaryIO, file: _File) -> str | None:
    if file.size > _MOST_LABEL_BYTES:
        raise InputError(f"has a label of {file.size:,} bytes: {cut(file.name)}")
    before = opened.tell()
    opened.seek(file.start)
    text = opened.read(file.size).decode("utf-8", "surrogateescape").strip()
    opened.seek(before)
    return text or None
