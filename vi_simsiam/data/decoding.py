"""Decoding all images of a source in order, in processes, a bounded number of bytes at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import pickle
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from PIL import Image

from vi_simsiam.data.channels import MOST_BYTES, resized
from vi_simsiam.data.pixels import Loss, losses
from vi_simsiam.data.sources import FileSource, ImageSource, Unreadable, UnreadableError
from vi_simsiam.data.workers import results
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

_SAMPLED = 64
_LOOKED_AT = 8
_OF_8_BITS = 257
"""Factor by which `channels.as_stored` brings values of 8 bits to 16."""
_FEW = 32
_CHUNK_BYTES = 8 << 20
_CHUNK_IMAGES = 256


class Chunk(NamedTuple):
    """Consecutive images of a source, decoded."""

    pixels: bytes
    """Bytes of image after image, (height, width, channels)."""
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    kept: list[int]
    """Numbers of these images in the source; the others are `unreadable`."""
    unreadable: list[Unreadable]
    losses: list[Loss]


def bytes_per_image(source: ImageSource, shorter_side: int | None = None) -> float:
    """Return the mean decoded size of up to 64 images across the source, from their headers."""
    size = source.decode.pixel_bytes
    sizes = [fitted(height, width, shorter_side) for height, width in _sampled(source)]
    return (
        float(np.mean([float(size * height * width) for height, width in sizes])) if sizes else 0.0
    )


def median_side(source: ImageSource) -> int | None:
    """Return the median shorter side of the same images in pixels; None if none can be read."""
    sides = [min(size) for size in _sampled(source)]
    return int(np.median(sides)) if sides else None


def _sampled(source: ImageSource) -> list[tuple[int, int]]:
    """Height and width of up to 64 readable images across the source."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
        with contextlib.suppress(UnreadableError):
            sizes.append(source.dimensions(index))
    return sizes


def few_levels(source: ImageSource) -> list[str]:
    """Return a line if values of 16 bits become few levels of 8, seen in some of the images."""
    decode, seen = source.decode, list[int]()
    if decode.is_rgb or decode.bits == 16:
        return []
    deep = copy.copy(source)
    deep.decode = dataclasses.replace(decode, bits=16)
    for index in np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(int).tolist():
        with contextlib.suppress(InputError):
            values = deep.array(index)
            if values.dtype == np.uint16 and (values % _OF_8_BITS).any():
                seen += int(values.min()), int(values.max())
    levels = (max(seen) >> 8) - (min(seen) >> 8) + 1 if seen else _FEW
    if levels >= _FEW:
        return []
    return [
        f"{source.name}: values of 16 bits from {min(seen)} to {max(seen)} become "
        f"{counted(levels, 'level')} of 8 bits; --bits 16 keeps them apart"
    ]


def fitted(height: int, width: int, shorter_side: int | None) -> tuple[int, int]:
    """Return a size scaled down to a shorter side of `shorter_side` pixels, if it has more."""
    shorter = min(height, width)
    if shorter_side is None or shorter <= shorter_side:
        return height, width
    return round(height * shorter_side / shorter), round(width * shorter_side / shorter)


def decode(
    source: ImageSource,
    *,
    workers: int | None = None,
    shorter_side: int | None = None,
    mean_bytes: float = 0.0,
) -> Generator[Chunk, None, None]:
    """Decode all images in order; about 16 MiB for each worker are held at once.

    Args:
        source: the images. A source that cannot be pickled is decoded in this process.
        workers: processes; None for one per available CPU core. 0 and 1 decode in this process.
        shorter_side: see `fitted`.
        mean_bytes: about the bytes of one image, from `bytes_per_image`.

    Raises:
        InputError: `workers` is negative, or an item of a Dataset is no image.
        TrainingError: processes cannot be started, or one was killed or does not answer.
    """
    if workers is not None and workers < 0:
        raise InputError(f"workers: {workers} must be at least 0")
    step = int(np.clip(_CHUNK_BYTES / max(mean_bytes, 1.0), 1, _CHUNK_IMAGES))
    chunks = [range(start, min(start + step, len(source))) for start in range(0, len(source), step)]
    workers = min(cores() if workers is None else workers, len(chunks))
    if workers == 1 or not (workers and _can_be_pickled(source)):
        workers = 0
    read = functools.partial(_decode, source, shorter_side)
    return results(read, chunks, workers, source.name, "decodes")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(source: ImageSource, shorter_side: int | None, chunk: range) -> Chunk:
    parts, sizes, kept, unreadable, lost = [], [], [], [], list[Loss]()
    for index in chunk:
        try:
            image = source.content(index)
            whole = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
            height, width = fitted(whole[0], whole[1], shorter_side)
            if not 0 < source.decode.pixel_bytes * height * width <= MOST_BYTES:
                raise UnreadableError(source.describe(index), f"{width} x {height} pixels")
        except UnreadableError as error:
            unreadable.append(error.entry)
            continue
        if isinstance(image, np.ndarray):
            array = image if (height, width) == whole else resized(image, height, width)
            parts.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
        else:
            lost += losses(image)
            if (height, width) != whole:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            parts.append(image.tobytes())
        sizes.append((height, width))
        kept.append(index)
    return Chunk(b"".join(parts), sizes, kept, unreadable, lost)


def _can_be_pickled(source: ImageSource) -> bool:
    if isinstance(source, FileSource):
        return True
    try:
        with open(os.devnull, "wb") as nowhere:
            pickle.dump(source, nowhere)
    except Exception:  # pickling runs the source's own code
        return False
    return True
