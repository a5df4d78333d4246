"""The form of a pack file, and the checks of one that anybody may have written.

A pack file, little-endian, every section at a multiple of 64 bytes:

    prologue   64 bytes: magic, format version, place and checksum of the header, own checksum
    sections   pixels, offsets, heights, widths, places (where images came from), perhaps labels
    header     JSON: number of images, name, classes, fingerprint, sections and their checksums,
               files left out

The header comes last because the checksums are known only then. Together the checksums cover every
byte. They are CRC-32, which finds damage but not forgery: one x86-64 core was measured at 2.1 GB/s,
with blake2b at 0.47 GB/s. So what they cover is checked as well, in Python's integers: nothing that
a file holds is used as a size or place before it was compared with the file's size.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NotRequired, TypedDict

import numpy as np

from vi_simsiam.errors import InputError
from vi_simsiam.files import parse_json
from vi_simsiam.text import counted

FORMAT_VERSION = 2
"""Raised whenever the layout, or the pixels that images are decoded to, change."""
MAGIC = b"VISIMPCK"
ALIGNMENT = 64
PROLOGUE = struct.Struct("<8sIQQI28xI")
"""Magic, version, offset, length and checksum of the header, zeros, checksum of all before."""
CHECKED_BYTES = 1 << 26
"""Bytes that one checksum covers."""
DTYPES = dict(pixels="u1", offsets="<i8", heights="<i4", widths="<i4", places="u1", labels="<i8")
"""Type of each section's values."""
_READ_BYTES = 1 << 22
_MOST_HEADER_BYTES = 1 << 26


class Sections(TypedDict):
    """First byte and number of bytes of each section."""

    pixels: list[int]
    offsets: list[int]
    heights: list[int]
    widths: list[int]
    places: list[int]
    labels: NotRequired[list[int]]


class Header(TypedDict):
    """The JSON at the end of the file."""

    count: int
    name: str
    classes: list[str] | None
    fingerprint: str
    unreadable: list[list[str]]
    decode: dict[str, str | int | list[float]]
    notes: list[str]
    sections: Sections
    checked_bytes: int
    checksums: list[int]


class Checksums:
    """CRC-32 of every 64 MiB of the bytes appended, and of the rest; `whole` are known already."""

    def __init__(self, whole: Sequence[int] = ()) -> None:
        self._whole = list(whole)
        self._last = self._filled = 0

    @property
    def values(self) -> list[int]:
        """The checksums of all bytes so far."""
        return [*self._whole, self._last] if self._filled else list(self._whole)

    def append(self, view: memoryview) -> None:
        """Take in further bytes."""
        while len(view):
            part = view[: CHECKED_BYTES - self._filled]
            self._last = zlib.crc32(part, self._last)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHECKED_BYTES:
                self._whole.append(self._last)
                self._last = self._filled = 0


def read_header(file: IO[bytes]) -> tuple[Header, int, int]:
    """Read and check the header.

    Args:
        file: opened at its start.

    Returns:
        The header, its first byte's place, and its checksum.

    Raises:
        InputError: no pack file, truncated, damaged or of another format version; the message
            continues the file's name.
    """
    size = os.fstat(file.fileno()).st_size
    prologue = file.read(PROLOGUE.size)
    if size == 0:
        raise InputError("is an empty file")
    if not prologue.startswith(MAGIC):
        raise InputError("is no pack file (vi-simsiam pack writes them)")
    if len(prologue) < PROLOGUE.size:
        raise InputError(f"is truncated: {counted(size, 'byte')} of at least {PROLOGUE.size}")
    _, version, start, length, checksum, own_checksum = PROLOGUE.unpack(prologue)
    # Before anything else, which another version may have elsewhere.
    if version != FORMAT_VERSION:
        raise InputError(
            f"has format version {version}, this release reads {FORMAT_VERSION}: "
            "pack the images again"
        )
    if zlib.crc32(prologue[:-4]) != own_checksum:
        raise InputError("is damaged: the checksum of its first 64 bytes is wrong")
    if size != start + length:
        kind = "truncated" if size < start + length else "damaged"
        raise InputError(f"is {kind}: {counted(size, 'byte')}, expected {start + length:,}")
    if start < PROLOGUE.size or length > _MOST_HEADER_BYTES:
        most = f"at most {_MOST_HEADER_BYTES:,} from byte {PROLOGUE.size} on"
        raise InputError(f"is damaged: a header of {length:,} bytes from {start:,} on, {most}")
    file.seek(start)
    encoded = file.read(length)
    if zlib.crc32(encoded) != checksum:
        raise InputError("is damaged: the checksum of its header is wrong")
    try:
        header = parse_json(encoded, Header)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"is damaged: its header cannot be used ({reason})") from None
    _check(header, start)
    return header, start, checksum


def _check(header: Header, stop: int) -> None:
    """Raise InputError unless sections and checksums lie before `stop`, none in another."""
    count, end = header["count"], PROLOGUE.size
    sizes = {name: count * np.dtype(kind).itemsize for name, kind in DTYPES.items()}
    sections: dict[str, list[int]] = {**header["sections"]}  # type: ignore[dict-item]
    if unknown := sections.keys() - sizes.keys():
        raise InputError(f"contradicts itself (section {min(unknown)!r} is unknown)")
    for name, place in sorted(sections.items(), key=lambda section: section[1]):
        first, length = place if len(place) == 2 else (-1, -1)
        expected = length if DTYPES[name] == "u1" else sizes[name]
        fits = end <= first and first % ALIGNMENT == 0 and first + length <= stop
        if not fits or length < 0 or length != expected or (name == "pixels" and first != end):
            raise InputError(f"contradicts itself (section {name} at {place} of {stop:,} bytes)")
        end = first + length
    if any(len(entry) != 2 for entry in header["unreadable"]):
        raise InputError("contradicts itself (unreadable: must be pairs of a path and a reason)")
    step, given = header["checked_bytes"], len(header["checksums"])
    expected = -(-(stop - PROLOGUE.size) // CHECKED_BYTES)
    if step != CHECKED_BYTES or given != expected:
        found = f"{counted(given, 'checksum')}, one for {step:,} bytes"
        raise InputError(f"contradicts itself ({found}, expected {expected:,})")


def verify_bytes(file: IO[bytes], header: Header, stop: int) -> None:
    """Compare the checksums of the bytes between prologue and header, which begins at `stop`.

    Raises:
        InputError: as for `read_header`.
    """

    def checksum(start: int) -> int:
        # Read, not mapped: where a disk fails, that is an error and not the end of the process.
        total, end = 0, min(start + CHECKED_BYTES, stop)
        while part := os.pread(file.fileno(), min(_READ_BYTES, end - start), start):
            total, start = zlib.crc32(part, total), start + len(part)
        return total

    starts = range(PROLOGUE.size, stop, CHECKED_BYTES)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(checksum, starts)
        for start, actual, expected in zip(starts, found, header["checksums"], strict=True):
            if actual != expected:
                raise InputError(
                    f"is damaged: the checksum of the bytes from {start:,} on is wrong"
                )
