"""Decoded images one after the other in one block of bytes, and the file that holds such a block.

A pack file, little-endian, every section at a multiple of 64 bytes:

    prologue   64 bytes: magic, format version, place and checksum of the header, own checksum
    sections   pixels, offsets, heights, widths, places (where images came from), perhaps labels
    header     JSON: number of images, name, classes, fingerprint, sections and their checksums,
               files left out

The header comes last because the checksums are known only then. Together the checksums cover every
byte. They are CRC-32, which finds damage but not forgery: one x86-64 core was measured at 2.1 GB/s,
with blake2b at 0.47 GB/s.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.sources import ImageSource, Unreadable, left_out
from vi_simsiam.errors import InputError
from vi_simsiam.text import brief_repr, counted

FORMAT_VERSION = 2
"""Raised whenever the layout, or the pixels that images are decoded to, change."""

_MAGIC = b"VISIMPCK"
_ALIGNMENT = 64
# Magic, version, offset, length and checksum of the header, zeros, checksum of all before.
_PROLOGUE = struct.Struct("<8sIQQI28xI")
_PATH_ENCODING = ("utf-8", "surrogateescape")
_CHECKED_BYTES = 1 << 26
_READ_BYTES = 1 << 22
_DTYPES = dict(pixels="u1", offsets="<i8", heights="<i4", widths="<i4", places="u1", labels="<i8")


class _Checksums:
    """CRC-32 of every 64 MiB of the bytes appended, and of the rest; `whole` are known already."""

    def __init__(self, whole: Sequence[int] = ()) -> None:
        self._whole = list(whole)
        self._last = self._filled = 0

    @property
    def values(self) -> list[int]:
        return [*self._whole, self._last] if self._filled else list(self._whole)

    def append(self, view: memoryview) -> None:
        while len(view):
            part = view[: _CHECKED_BYTES - self._filled]
            self._last = zlib.crc32(part, self._last)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == _CHECKED_BYTES:
                self._whole.append(self._last)
                self._last = self._filled = 0


@dataclass(frozen=True)
class Contents:
    """Everything about N packed images except their pixels."""

    name: str
    """Short name, such as "fashion-mini/train"."""
    heights: NDArray[np.int32]
    """(N,) in pixels, at least 1."""
    widths: NDArray[np.int32]
    """(N,) in pixels, at least 1."""
    labels: NDArray[np.int64] | None = None
    """(N,), values in [0, len(classes)); None without labels."""
    classes: Sequence[str] | None = None
    """Class names; None without labels."""
    places: Sequence[str] = ()
    """Origin of each image; empty for NAME/INDEX."""
    unreadable: Sequence[Unreadable] = ()
    """Images of the original source that were left out, and why."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Settings by which files became pixels."""
    notes: Sequence[str] = ()
    """Losses in decoding, see `data.pixels.loss_lines`."""

    __repr__ = brief_repr


class PackedImages(ImageSource):
    """N decoded images: 8-bit RGB, of any sizes, one after the other.

    Images in a memory-mapped file are pickled as its path, which makes sending them to worker
    processes cheap.

    Args:
        pixels: (bytes,) uint8, image after image, each (height, width, 3).
        contents: the rest.

    Raises:
        InputError: sizes or labels do not fit the pixels.
    """

    def __init__(self, pixels: NDArray[np.uint8], contents: Contents) -> None:
        bounds = _bounds(contents.heights, contents.widths)
        if len(pixels) != bounds[-1]:
            problem = f"{counted(len(pixels), 'byte')} do not fit heights and widths"
            raise InputError(f"pixels: {problem}")
        self.pixels = _read_only(pixels)
        """(bytes,) uint8, read-only."""
        self.offsets = _read_only(bounds[:-1])
        """(N,) int64: first byte of each image."""
        self.heights = _read_only(np.ascontiguousarray(contents.heights, np.int32))
        self.widths = _read_only(np.ascontiguousarray(contents.widths, np.int32))
        self.name, self.decode = contents.name, contents.decode
        self.unreadable, self.notes = tuple(contents.unreadable), tuple(contents.notes)
        self.path: Path | None = None
        """The file that holds the pixels; None in memory."""
        self.checksum = 0
        """Checksum of the file's header, which holds the others; 0 in memory."""
        self._whole_checksums: Sequence[int] = ()
        self._places: Sequence[str] | NDArray[np.uint8] = contents.places
        self._whole_name = contents.name
        self._indices: NDArray[np.int64] | None = None
        self._label(contents.labels, contents.classes, len(self))

    def __len__(self) -> int:
        return len(self.heights)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        if self.path is None:
            return super().__reduce_ex__(protocol)
        return _reopen, (self.path, self.checksum, self._indices, self.name)

    def take(self, indices: NDArray[np.int64], name: str) -> PackedImages:
        """Return the images at `indices` (K,), in that order, with the same block of pixels."""
        part = object.__new__(PackedImages)  # a copy would be made by pickling
        part.__dict__.update(self.__dict__)
        part.name = name
        part.offsets = _read_only(self.offsets[indices])
        part.heights = _read_only(self.heights[indices])
        part.widths = _read_only(self.widths[indices])
        part.labels = None if self.labels is None else self.labels[indices]
        part._indices = indices if self._indices is None else self._indices[indices]
        return part

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user that name the images left out and other losses."""
        return [*([left_out(self.unreadable)] if self.unreadable else []), *self.notes]

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB."""
        index = range(len(self))[index]
        start, (height, width) = int(self.offsets[index]), self.dimensions(index)
        pixels = self.pixels[start : start + 3 * height * width].reshape(height, width, 3)
        return Image.fromarray(pixels)

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index` in pixels."""
        return int(self.heights[index]), int(self.widths[index])

    def pixel_checksums(self) -> list[int]:
        """Return CRC-32 of every 64 MiB of all pixels in a row, wherever they are kept.

        Most of a file's are read from its header, others are computed from the pixels.
        """
        checksums = _Checksums(self._whole_checksums if self._indices is None else ())
        if self._indices is None:
            checksums.append(self.pixels[len(self._whole_checksums) * _CHECKED_BYTES :].data)
        else:
            for index, start in enumerate(self.offsets.tolist()):
                height, width = self.dimensions(index)
                checksums.append(self.pixels[start : start + 3 * height * width].data)
        return checksums.values

    def describe(self, index: int) -> str:
        """Return where image `index` came from: a path, or NAME/INDEX."""
        # Read on first use: a hundred megabytes for a million files.
        if isinstance(self._places, np.ndarray):
            content = self._places.tobytes()
            self._places = content.decode(*_PATH_ENCODING).split("\0") if content else ()
        index = index if self._indices is None else int(self._indices[index])
        return self._places[index] if self._places else f"{self._whole_name}/{index}"


def _bounds(heights: NDArray[np.int32], widths: NDArray[np.int32]) -> NDArray[np.int64]:
    """First byte of each image, and the end of the last."""
    return np.concatenate([[0], np.cumsum(3 * heights.astype(np.int64) * widths)])


class PackWriter:
    """Writes an empty file front to back: all pixels with `append`, then the rest with `finish`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sections: dict[str, list[int]] = {}
        self._checksums = _Checksums()
        self.size = file.write(bytes(_PROLOGUE.size))
        """Bytes written so far."""

    def append(self, data: bytes) -> None:
        """Write bytes of the present section."""
        self._file.write(data)
        self.size += len(data)
        self._checksums.append(memoryview(data))

    def finish(self, contents: Contents, fingerprint: str) -> None:
        """Write all but the pixels. `fingerprint` is "" if the source has none."""
        self._sections["pixels"] = [_PROLOGUE.size, self.size - _PROLOGUE.size]
        places = "\0".join(contents.places).encode(*_PATH_ENCODING)
        sections = {
            "offsets": _bounds(contents.heights, contents.widths)[:-1],
            "heights": contents.heights,
            "widths": contents.widths,
            "places": np.frombuffer(places, np.uint8),
            "labels": contents.labels,
        }
        for name, values in sections.items():
            if values is not None:
                self._pad()
                content = np.ascontiguousarray(values, dtype=_DTYPES[name])
                self._sections[name] = [self.size, content.nbytes]
                self.append(content.tobytes())
        self._pad()
        header = {
            "count": len(contents.heights),
            "name": contents.name,
            "classes": contents.classes,
            "fingerprint": fingerprint,
            "unreadable": contents.unreadable,
            "decode": dataclasses.asdict(contents.decode),
            "notes": contents.notes,
            "sections": self._sections,
            "checked_bytes": _CHECKED_BYTES,
            "checksums": self._checksums.values,
        }
        encoded = json.dumps(header).encode()
        self._file.write(encoded)
        prologue = _PROLOGUE.pack(
            _MAGIC, FORMAT_VERSION, self.size, len(encoded), zlib.crc32(encoded), 0
        )[:-4]
        self.size += len(encoded)
        self._file.seek(0)
        self._file.write(prologue + struct.pack("<I", zlib.crc32(prologue)))

    def _pad(self) -> None:
        self.append(bytes(-self.size % _ALIGNMENT))


def open_pack(path: Path, *, fingerprint: str | None = None, verify: bool = True) -> PackedImages:
    """Open a pack file, memory-mapped.

    Args:
        path: the file.
        fingerprint: the expected fingerprint; None for any.
        verify: compare the checksums of all bytes; the header's are always compared.

    Raises:
        InputError: the file is missing, no pack file, truncated, damaged, of another format version
            or of other images.
    """
    try:
        with open(path, "rb") as file:
            header, checksum = _read_header(file)
            if fingerprint is not None and header["fingerprint"] != fingerprint:
                raise InputError("holds other images")
            if verify:
                _verify(file, header)
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        images = _from_sections(content, header)
    except InputError as error:
        raise InputError(f"pack: {path} {error}") from None
    except OSError as error:
        raise InputError(f"pack: {path} cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"pack: {path} contradicts itself") from error
    images.path, images.checksum = path, checksum
    return images


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    size = os.fstat(file.fileno()).st_size
    prologue = file.read(_PROLOGUE.size)
    if size == 0:
        raise InputError("is an empty file")
    if not prologue.startswith(_MAGIC):
        raise InputError("is no pack file (vi-simsiam pack writes them)")
    if size < _PROLOGUE.size:
        raise InputError(f"is truncated: {counted(size, 'byte')} of at least {_PROLOGUE.size}")
    _, version, start, length, checksum, own_checksum = _PROLOGUE.unpack(prologue)
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
    file.seek(start)
    encoded = file.read(length)
    if zlib.crc32(encoded) != checksum:
        raise InputError("is damaged: the checksum of its header is wrong")
    return json.loads(encoded) | {"start": start}, checksum


def _verify(file: IO[bytes], header: dict[str, Any]) -> None:
    step, stop = int(header["checked_bytes"]), int(header["start"])
    starts = range(_PROLOGUE.size, stop, step)

    def checksum(start: int) -> int:
        # Read, not mapped: where a disk fails, that is an error and not the end of the process.
        total, end = 0, min(start + step, stop)
        while part := os.pread(file.fileno(), min(_READ_BYTES, end - start), start):
            total, start = zlib.crc32(part, total), start + len(part)
        return total

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(checksum, starts)
        for start, actual, expected in zip(starts, found, header["checksums"], strict=True):
            if actual != expected:
                raise InputError(
                    f"is damaged: the checksum of the bytes from {start:,} on is wrong"
                )


def _from_sections(content: NDArray[np.uint8], header: dict[str, Any]) -> PackedImages:
    sections: dict[str, NDArray[Any]] = {
        name: content[start : start + length].view(_DTYPES[name])
        for name, (start, length) in header["sections"].items()
    }
    contents = Contents(
        name=header["name"],
        heights=sections["heights"],
        widths=sections["widths"],
        labels=sections.get("labels"),
        classes=header["classes"],
        unreadable=[Unreadable(*entry) for entry in header["unreadable"]],
        decode=DecodeConfig.from_dict(header["decode"]),
        notes=header["notes"],
    )
    images = PackedImages(sections["pixels"], contents)
    images._places = sections["places"]
    if header["checked_bytes"] == _CHECKED_BYTES:  # the first begins where the pixels do
        images._whole_checksums = header["checksums"][: len(images.pixels) // _CHECKED_BYTES]
    if len(images) != header["count"] or not np.array_equal(images.offsets, sections["offsets"]):
        raise ValueError
    return images


def _reopen(
    path: Path, checksum: int, indices: NDArray[np.int64] | None, name: str
) -> PackedImages:
    """Map the file of a pickled PackedImages, whose bytes were verified when it was opened."""
    images = open_pack(path, verify=False)
    if images.checksum != checksum:
        raise InputError(f"pack: {path} was replaced by another file while in use")
    return images if indices is None else images.take(indices, name)


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view
