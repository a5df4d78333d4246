"""Tar archives in WebDataset's layout.

A sample is a run of files with the same name up to the first dot: an image, NAME.jpg or with
another suffix of images, and its label in NAME.cls (a number or a name). NAME.mask.png, the part
"mask.png" of a sample, is no image of it. Only headers are read; nothing is unpacked, and no name
in an archive is ever a path on the disk.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vi_simsiam.data.files import ARRAY, has_image_suffix
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
        """The part of the sample that it is."""
        return os.path.basename(self.name).partition(".")[2].lower()


class _Skipped(NamedTuple):
    """Images of an archive that are not the image of a sample."""

    further: list[_File]
    """Those after the first of their samples."""
    dotted: list[_File]
    """Those with another dot before the suffix."""

    def notes(self) -> Iterator[str]:
        if self.further:
            yield f"{counted(len(self.further), 'further image')} of the same samples left out"
        if self.dotted:
            name = cut(os.path.basename(self.dotted[0].name))
            yield (
                f"{counted(len(self.dotted), 'image')} such as {name} left out: as in WebDataset a "
                f"sample's name ends at the first dot, and {cut(self.dotted[0].suffix)!r} is no "
                "suffix of images"
            )


def read_tar(place: str, *, arrays: bool = False) -> Listed:
    """List the images in tar archives; with `arrays`, .npy files are images, too.

    Raises:
        InputError: no such file, or one that is compressed, damaged or holds no images.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    for path in matching(place, ".tar"):
        try:
            with open_regular(Path(path)) as opened:
                found, skipped = _read(path, opened, arrays)
        except InputError as error:
            raise InputError(f"data: {path} {error}") from None
        except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = cut(" ".join(str(error).split())) or type(error).__name__
            raise InputError(f"data: {path} is no tar archive, or damaged ({reason})") from error
        if not found:
            raise InputError("; ".join([f"data: {path} holds no images", *skipped.notes()]))
        entries += found
        notes += (f"{path}: {note}" for note in skipped.notes())
    return Listed(entries, (), notes)


def _read(path: str, opened: BinaryIO, arrays: bool) -> tuple[list[Entry], _Skipped]:
    """The images of an archive, and those that are left out."""
    part, entries, skipped = part_of(path), list[Entry](), _Skipped([], [])
    for _, run in itertools.groupby(_files(opened), key=lambda file: file.key):
        sample = list(run)
        images = [file for file in sample if _is_image(file, arrays)]
        skipped.dotted.extend(file for file in images if "." in file.suffix)
        images = [file for file in images if "." not in file.suffix]
        if images:
            label = next((_label(opened, file) for file in sample if file.suffix == "cls"), None)
            name, start, size = images[0]
            entries.append(Entry(Member(path, name, start, size), label, part))
            skipped.further.extend(images[1:])
    return entries, skipped


def _is_image(file: _File, arrays: bool) -> bool:
    name = f"image.{file.suffix}"
    return has_image_suffix(name) or (arrays and name.endswith(ARRAY))


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
            # Python before 3.13.6 takes a size below 0, and goes back by it without end.
            if member.size < 0 or member.offset_data + member.size > end:
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
