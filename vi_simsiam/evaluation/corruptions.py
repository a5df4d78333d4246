"""Images damaged step by step: six kinds, five levels each, the same for an image whenever it is asked for.

Lengths are shares of the image's side, so that images of 28 and of 224 pixels lose about as much of what they show:
the blur's deviation and the occluding square grow with the side, and the grain of the noise is at least a 32nd of it
(noise of single pixels would average out over a large object). Only the blocks of JPEG are 8 pixels at every size:
the same quality damages a small image more.

The kinds are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) that need no files, with occlusion and a
fade to uniform grey added, after which there is nothing left to be certain of.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.errors import InputError

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
"""Of levels 1 to 5: the Gaussian blur's standard deviation as a share of the side; the Gaussian noise's standard deviation
as a share of white; the share of the area under a grey square; the factor on the distance from the mean brightness; the
JPEG quality; and how far every pixel has gone to grey."""

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

    What happens to an image is a function of its pixels, the kind, the level, the seed and the image's number, whatever
    other images are given with it. The levels of one image share their randomness: the noise is the same field made
    stronger, and a square contains the smaller ones.

    Args:
        images: (N, side, side, 3) uint8.
        kind: one of `MAGNITUDES`.
        level: 0 (a copy) to 5.
        seed: at least 0.
        numbers: (N,) what tells the images apart; None for 0 to N - 1.

    Returns:
        (N, side, side, 3) uint8.

    Raises:
        InputError: an unknown kind or level, a negative seed, or arrays of other shapes or dtypes.
    """
    if kind not in MAGNITUDES:
        raise InputError(f"kind: {kind!r} is none of {', '.join(MAGNITUDES)}")
    if level not in LEVELS:
        raise InputError(f"level: {level} must be between 0 and {LEVELS[-1]}")
    if seed < 0:
        raise InputError(f"seed: {seed} must be at least 0")
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or images.shape[1] != images.shape[2]
    ):
        raise InputError(
            f"images: {images.dtype} of shape {images.shape} must be uint8 of shape (N, side, side, 3)"
        )
    numbers = np.arange(len(images)) if numbers is None else numbers
    if numbers.shape != (len(images),):
        raise InputError(
            f"numbers: shape {numbers.shape} must be ({len(images)},), one for each image"
        )
    if level == 0 or len(images) == 0:
        return images.copy()
    magnitude = MAGNITUDES[kind][level - 1]
    if kind == "blur":
        return _blur(images, magnitude)
    if kind == "noise":
        return _noise(images, magnitude, seed, numbers)
    if kind == "occlusion":
        return _occlude(images, magnitude, seed, numbers)
    if kind == "contrast":
        # One brightness for the whole image, not one for each channel: colours fade, too.
        mean = (images @ np.array(_LUMA)).mean((1, 2))[:, None, None, None]
        return _rounded(mean + magnitude * (images - mean))
    if kind == "jpeg":
        return np.stack([_jpeg(image, int(magnitude)) for image in images])
    return _rounded((1 - magnitude) * images.astype(np.float64) + magnitude * _GREY)


def jpeg_bytes(image: NDArray[np.uint8], quality: int) -> bytes:
    """An RGB image (height, width, 3) uint8 as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _blur(images: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    from scipy.ndimage import gaussian_filter

    sigma = share * images.shape[1]
    return _rounded(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="mirror"))


def _noise(
    images: NDArray[np.uint8], share: float, seed: int, numbers: NDArray[np.int64]
) -> NDArray[np.uint8]:
    side = images.shape[1]
    cells = min(side, _GRAINS)
    cell = np.arange(side) * cells // side
    fields = np.stack(
        [
            _generator(seed, number, 0).standard_normal((cells, cells, 3), dtype=np.float32)
            for number in numbers
        ]
    )
    return _rounded(images + 255 * share * fields[:, cell][:, :, cell])


def _occlude(
    images: NDArray[np.uint8], share: float, seed: int, numbers: NDArray[np.int64]
) -> NDArray[np.uint8]:
    side = images.shape[1]
    square = max(1, round(math.sqrt(share) * side))
    damaged = images.copy()
    for image, number in zip(damaged, numbers, strict=True):
        # The same place relative to what room there is, which makes every square contain the smaller ones.
        top, left = np.floor(_generator(seed, number, 1).random(2) * (side - square + 1)).astype(
            int
        )
        image[top : top + square, left : left + square] = _GREY
    return damaged


def _jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg_bytes(image, quality))) as decoded:
        return np.asarray(decoded.convert("RGB"))


def _generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(number), purpose))


def _rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
