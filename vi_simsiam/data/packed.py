"""Decoded images one after the other in one block of bytes, in memory or in a pack file."""

from __future__ import annotations

import dataclasses
import json
import mmap
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.channels import MOST_BYTES, Pixels, picture
from vi_simsiam.data.pack_file import (
    ALIGNMENT,
    CHECKED_BYTES,
    DTYPES,
    FORMAT_VERSION,
    MAGIC,
    PROLOGUE,
    Checksums,
    Header,
    read_header,
    verify_bytes,
)
from vi_simsiam.data.sources import ImageSource, Unreadable, left_out
from vi_simsiam.errors import InputError
from vi_simsiam.files import open_regular
from vi_simsiam.text import brief_repr, counted

_MOST_IMAGES = 2**31 - 1
_PATH_ENCODING = ("utf-8", "surrogateescape")


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
    """N decoded images of any sizes, one after the other.

    Images in a memory-mapped file are pickled as its path, which makes sending them to worker
    processes cheap.

    Args:
        pixels: (bytes,) uint8, image after image, each (height, width, channels); 16 bits are
            little-endian.
        contents: the rest.

    Raises:
        InputError: sizes or labels do not fit the pixels.
    """

    def __init__(self, pixels: NDArray[np.uint8], contents: Contents) -> None:
        bounds = _bounds(contents)
        if len(pixels) != bounds[-1]:
            problem = f"{counted(len(pixels), 'byte')} do not fit heights and widths"
            raise InputError(f"pixels: {problem}")
        self._pixels = _read_only(pixels)
        self._mapped: mmap.mmap | None = None
        self.offsets = _read_only(bounds[:-1])
        """(N,) int64: first byte of each image."""
        # Copies, as a mapped file may be truncated later.
        self.heights = _read_only(np.array(contents.heights, np.int32))
        self.widths = _read_only(np.array(contents.widths, np.int32))
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

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(bytes,) uint8, read-only.

        Raises:
            InputError: the mapped file was truncated, or is longer than when it was opened.
        """
        self._check_mapping()
        return self._pixels

    def _check_mapping(self) -> None:
        """Called before every use of a mapped file: reading behind its end ends the process.

        A file that is truncated between this check and that use, microseconds for a batch, still
        does.
        """
        if self._mapped is None or (size := self._mapped.size()) == (whole := len(self._mapped)):
            return
        how = "truncated" if size < whole else "written to"
        found = f"{counted(size, 'byte')}, expected {whole:,}"
        raise InputError(f"pack: {self.path} was {how} while in use: {found}")

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
        pixels = self.array(index)
        return Image.fromarray(pixels) if self.decode.is_rgb else picture(pixels)

    def array(self, index: int) -> Pixels:
        """Return the pixels of image `index`, (height, width, channels)."""
        index = range(len(self))[index]
        shape = (*self.dimensions(index), self.decode.channels)
        return self._bytes(index).view("u1" if self.decode.bits == 8 else "<u2").reshape(shape)

    def _bytes(self, index: int) -> NDArray[np.uint8]:
        start, (height, width) = int(self.offsets[index]), self.dimensions(index)
        return self.pixels[start : start + self.decode.pixel_bytes * height * width]

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index` in pixels."""
        return int(self.heights[index]), int(self.widths[index])

    def pixel_checksums(self) -> list[int]:
        """Return CRC-32 of every 64 MiB of all pixels in a row, wherever they are kept.

        Most of a file's are read from its header, others are computed from the pixels.
        """
        checksums = Checksums(self._whole_checksums if self._indices is None else ())
        if self._indices is None:
            checksums.append(self.pixels[len(self._whole_checksums) * CHECKED_BYTES :].data)
        else:
            for index in range(len(self)):
                checksums.append(self._bytes(index).data)
        return checksums.values

    def describe(self, index: int) -> str:
        """Return where image `index` came from: a path, or NAME/INDEX."""
        # Read on first use: a hundred megabytes for a million files.
        if isinstance(self._places, np.ndarray):
            self._check_mapping()
            content = self._places.tobytes()
            self._places = content.decode(*_PATH_ENCODING).split("\0") if content else ()
        index = index if self._indices is None else int(self._indices[index])
        return self._places[index] if self._places else f"{self._whole_name}/{index}"


def _bounds(contents: Contents) -> NDArray[np.int64]:
    """First byte of each image, and the end of the last.

    Raises:
        InputError: images without a pixel, or with more than 2 GiB: all sums fit in 64 bits.
    """
    heights, widths, size = contents.heights, contents.widths, contents.decode.pixel_bytes
    if len(heights) != len(widths) or len(heights) > _MOST_IMAGES:
        images = f"{len(heights):,} and {len(widths):,} images"
        raise InputError(f"heights and widths: of {images}, must be of equally many")
    if len(heights) and min(heights.min(), widths.min()) < 1:
        raise InputError("heights and widths: images must have at least 1 x 1 pixels")
    areas = heights.astype(np.int64) * widths  # below 2^62
    if len(areas) and areas.max() > MOST_BYTES // size:
        raise InputError(f"heights and widths: images must have at most {MOST_BYTES:,} bytes")
    return np.concatenate([[0], np.cumsum(size * areas)])


class PackWriter:
    """Writes an empty file front to back: all pixels with `append`, then the rest with `finish`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sections: dict[str, list[int]] = {}
        self._checksums = Checksums()
        self.size = file.write(bytes(PROLOGUE.size))
        """Bytes written so far."""

    def append(self, data: bytes) -> None:
        """Write bytes of the present section."""
        self._file.write(data)
        self.size += len(data)
        self._checksums.append(memoryview(data))

    def finish(self, contents: Contents, fingerprint: str) -> None:
        """Write all but the pixels. `fingerprint` is "" if the source has none."""
        self._sections["pixels"] = [PROLOGUE.size, self.size - PROLOGUE.size]
        places = "\0".join(contents.places).encode(*_PATH_ENCODING)
        sections = {
            "offsets": _bounds(contents)[:-1],
            "heights": contents.heights,
            "widths": contents.widths,
            "places": np.frombuffer(places, np.uint8),
            "labels": contents.labels,
        }
        for name, values in sections.items():
            if values is not None:
                self._pad()
                content = np.ascontiguousarray(values, dtype=DTYPES[name])
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
            "checked_bytes": CHECKED_BYTES,
            "checksums": self._checksums.values,
        }
        encoded = json.dumps(header).encode()
        self._file.write(encoded)
        prologue = PROLOGUE.pack(
            MAGIC, FORMAT_VERSION, self.size, len(encoded), zlib.crc32(encoded), 0
        )[:-4]
        self.size += len(encoded)
        self._file.seek(0)
        self._file.write(prologue + struct.pack("<I", zlib.crc32(prologue)))

    def _pad(self) -> None:
        self.append(bytes(-self.size % ALIGNMENT))


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
        with open_regular(path) as file:
            header, stop, checksum = read_header(file)
            if fingerprint is not None and header["fingerprint"] != fingerprint:
                raise InputError("holds other images")
            if verify:
                verify_bytes(file, header, stop)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) < stop:
            raise InputError("was truncated while it was opened")
    except InputError as error:
        raise InputError(f"pack: {path} {error}") from None
    except (OSError, ValueError) as error:  # a file that is empty by now cannot be mapped
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"pack: {path} cannot be read ({reason})") from error
    try:
        images = _from_sections(mapped, header)
    except (InputError, TypeError) as error:
        raise InputError(f"pack: {path} contradicts itself ({error})") from error
    images.path, images.checksum = path, checksum
    return images


def _from_sections(mapped: mmap.mmap, header: Header) -> PackedImages:
    content = np.frombuffer(mapped, np.uint8)
    places: dict[str, list[int]] = {**header["sections"]}  # type: ignore[dict-item]
    sections: dict[str, NDArray[Any]] = {
        name: content[start : start + length].view(DTYPES[name])
        for name, (start, length) in places.items()
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
    images._mapped, images._places = mapped, sections["places"]
    if not np.array_equal(images.offsets, sections["offsets"]):
        raise InputError("offsets: must be those that follow from heights and widths")
    if len(images._places) and np.count_nonzero(images._places == 0) != len(images) - 1:
        raise InputError(f"places: must be {len(images):,}, one for each image")
    images._whole_checksums = header["checksums"][: len(images.pixels) // CHECKED_BYTES]
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
