"""Measures of an image's pixels that need no network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.channels import Pixels, picture
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.data.subsets import subset
from vi_simsiam.inference.images import read

SIDE = 48
"""Side of the gray thumbnails in pixels."""
_SHARP_SIDE = 64  # the contrast and roughness of larger images are those of this size
_CHUNK = 256

FACTS = np.dtype(
    [
        ("digest", "V16"),
        ("contrast", np.float32),
        ("roughness", np.float32),
        ("thumbnail", np.uint8, (SIDE, SIDE)),
    ]
)
"""Facts of an image: BLAKE2b of its decoded pixels and their shape; standard deviation of its
brightness in 0..1; mean squared difference of neighbouring pixels over twice their variance, about
1 for white noise and near 0 for a blurred image (0 for a flat one); brightness as a thumbnail, each
side stretched to 48 pixels."""


def facts_of(image: Image.Image | Pixels) -> NDArray[np.uint8]:
    """Facts of an image in mode RGB, or of its pixels: the bytes of one `FACTS`."""
    pixels = np.ascontiguousarray(image)
    digest = hashlib.blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=16)
    digest.update(pixels.data)
    shown = image if isinstance(image, Image.Image) else picture(image)
    gray = shown.convert("L")
    found = np.zeros(1, FACTS)
    found["digest"] = digest.digest()
    found["thumbnail"] = gray.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    gray.thumbnail((_SHARP_SIDE, _SHARP_SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(gray, np.float32) / 255
    variance = float(values.var())
    steps = [np.diff(values, axis=axis).ravel() for axis in (0, 1)]
    squares = np.square(np.concatenate(steps))
    found["contrast"] = variance**0.5
    if variance > 0 and len(squares):
        found["roughness"] = float(squares.mean()) / (2 * variance)
    return found.view(np.uint8)


def collect_facts(
    source: ImageSource,
    indices: NDArray[np.int64],
    *,
    threads: int,
    skipped: Callable[[Unreadable], object],
) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """Read images, 2,336 bytes kept of each.

    Args:
        source: the images.
        indices: (N,) numbers of those to read.
        threads: number of reading threads.
        skipped: called with every image that cannot be read.

    Returns:
        (M,) rows of `indices` that were read, ascending, and their facts, (M,) of `FACTS`.
    """
    rows: list[int] = []
    parts = [np.zeros(0, FACTS)]
    for chunk in read(subset(source, indices), facts_of, chunk=_CHUNK, threads=threads):
        rows += chunk.indices
        parts += [each.view(FACTS) for each in chunk.pixels]
        for entry in chunk.unreadable:
            skipped(entry)
    return np.array(rows, np.int64), np.concatenate(parts)
