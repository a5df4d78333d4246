"""Images damaged by degrees: six kinds, five levels each, reproducible for every image.

Lengths are shares of the image's side, and the grain of the noise is at least a 32nd of it, so that
images of 28 and of 224 pixels lose about as much content. Only the blocks of JPEG are 8 pixels at
every size.

The kinds are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) that need no files,
with occlusion and a fade to uniform grey added, at whose end nothing is left to be certain of.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVELS = (0, 1, 2, 3, 4, 5)
"""0 is the image as it is."""
MAGNITUDES: dict[str, tuple[float, float, float, float, float]] = {
    "blur": (0.02, 0.03, 0.045, 0.065, 0.1),
    "noise": (0.04, 0.08, 0.15, 0.3, 0.5),
    "occlusion": (0.05, 0.15, 0.3, 0.5, 0.75),
    "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),
    "jpeg": (40, 20, 10, 5, 1),
    "blank": (0.2, 0.4, 0.6, 0.8, 1.0),
}
"""Strengths at levels 1 to 5: the Gaussian blur's standard deviation as a share of the side; the
Gaussian noise's standard deviation as a share of white; the share of the area under a grey square;
the factor on the distance from the mean brightness; the JPEG quality; the share of grey in every
pixel."""

_GREY = 128
_GRAINS = 32
"""Cells of noise along a side, at most one per pixel."""
_LUMA = (0.299, 0.587, 0.114)


def corrupt(
    images: NDArray[np.uint8],
    kind: str,
    level: int,
    *,
    seed: int = 0,
    numbers: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Damage images.

    The result is a function of the image's pixels, the kind, the level, the seed and the image's
    number; other images of the batch do not matter. The levels of one image share their randomness:
    the noise is the same field made stronger, and a square contains the smaller ones.

    Args:
        images: (N, side, side, 3) uint8.
        kind: one of `MAGNITUDES`.
        level: 0 (a copy) to 5.
        seed: at least 0.
        numbers: (N,) a number of each image, to draw by; None for 0 to N - 1.

    Returns:
        (N, side, side, 3) uint8.
    """
    if level == 0:
        return images.copy()
    magnitude, side = MAGNITUDES[kind][level - 1], images.shape[1]
    seeds = [(seed, int(each)) for each in (range(len(images)) if numbers is None else numbers)]
    if kind == "blur":
        from scipy.ndimage import gaussian_filter

        sigma = (0, magnitude * side, magnitude * side, 0)
        return _rounded(gaussian_filter(images.astype(np.float32), sigma, mode="mirror"))
    if kind == "noise":
        return _rounded(images + 255 * magnitude * _grain(side, seeds))
    if kind == "occlusion":
        return _occlude(images, magnitude, seeds)
    if kind == "contrast":
        # One brightness for the whole image, not one for each channel: colours fade, too.
        mean = (images @ np.array(_LUMA)).mean((1, 2))[:, None, None, None]
        return _rounded(mean + magnitude * (images - mean))
    if kind == "jpeg":
        files = [io.BytesIO(jpeg_bytes(image, int(magnitude))) for image in images]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return _rounded((1 - magnitude) * images.astype(np.float64) + magnitude * _GREY)


def jpeg_bytes(image: NDArray[np.uint8], quality: int) -> bytes:
    """An RGB image (height, width, 3) uint8 as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _grain(side: int, seeds: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Fields of standard normal noise, (N, side, side, 3)."""
    cells = min(side, _GRAINS)
    cell = np.arange(side) * cells // side
    draws = [np.random.default_rng((*each, 0)) for each in seeds]
    fields = [draw.standard_normal((cells, cells, 3), dtype=np.float32) for draw in draws]
    return np.stack(fields)[:, cell][:, :, cell]


def _occlude(
    images: NDArray[np.uint8], share: float, seeds: list[tuple[int, int]]
) -> NDArray[np.uint8]:
    side = images.shape[1]
    square = max(1, round(math.sqrt(share) * side))
    damaged = images.copy()
    for image, each in zip(damaged, seeds, strict=True):
        # In proportion to the free space: every square contains the smaller ones.
        position = np.random.default_rng((*each, 1)).random(2) * (side - square + 1)
        top, left = np.floor(position).astype(int)
        image[top : top + square, left : left + square] = _GREY
    return damaged


def _rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
