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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.config import IMAGENET_STD, DecodeConfig, TrainConfig
from vi_simsiam.data.channels import Pixels

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

_GRAINS = 32
"""Cells of noise along a side, at most one per pixel."""
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Tones:
    """Grey and white of the images of a run, as their pixels hold them."""

    grey: NDArray[np.float64]
    """(C,) the level that damage fades to."""
    white: NDArray[np.float64]
    """(C,) the distance from black to white."""

    @classmethod
    def of(cls, config: TrainConfig) -> Tones:
        """128 and 255 for 8-bit RGB.

        Other images may use a small part of what their bits hold. Their grey is the mean of each
        channel, and white is as far from black as it is in ImageNet, in standard deviations.
        """
        if config.decode.is_rgb:
            return RGB
        mean, std = (np.array(each) for each in config.augment.constants)
        most = 2**config.decode.bits - 1
        return cls(most * mean, most * std / np.mean(IMAGENET_STD))


RGB = Tones(np.full(3, 128.0), np.full(3, 255.0))


def kinds(decode: DecodeConfig) -> list[str]:
    """The kinds of damage that images have: without JPEG, which holds no other than 8-bit RGB."""
    return [kind for kind in MAGNITUDES if decode.is_rgb or kind != "jpeg"]


def brightness(channels: int) -> NDArray[np.float64]:
    """Weights of the channels in the brightness, (C,): equal ones, but for red, green and blue."""
    return np.array(_LUMA) if channels == 3 else np.full(channels, 1 / channels)


def corrupt(
    images: Pixels,
    kind: str,
    level: int,
    *,
    seed: int = 0,
    numbers: NDArray[np.int64] | None = None,
    tones: Tones = RGB,
) -> Pixels:
    """Damage images.

    The result is a function of the image's pixels, the kind, the level, the seed and the image's
    number; other images of the batch do not matter. The levels of one image share their randomness:
    the noise is the same field made stronger, and a square contains the smaller ones.

    Args:
        images: (N, side, side, C) uint8 or uint16.
        kind: one of `kinds`.
        level: 0 (a copy) to 5.
        seed: at least 0.
        numbers: (N,) a number of each image, to draw by; None for 0 to N - 1.
        tones: of C channels.

    Returns:
        Of the shape and type of `images`.
    """
    if level == 0:
        return images.copy()
    magnitude, side, channels = MAGNITUDES[kind][level - 1], images.shape[1], images.shape[3]
    seeds = [(seed, int(each)) for each in (range(len(images)) if numbers is None else numbers)]
    if kind == "blur":
        from scipy.ndimage import gaussian_filter

        sigma = (0, magnitude * side, magnitude * side, 0)
        blurred = gaussian_filter(images.astype(np.float32), sigma, mode="mirror")
        return _rounded(blurred, images.dtype)
    if kind == "noise":
        deviation = (magnitude * tones.white).astype(np.float32)
        return _rounded(images + deviation * _grain(side, channels, seeds), images.dtype)
    if kind == "occlusion":
        return _occlude(images, magnitude, seeds, tones)
    if kind == "contrast":
        # One brightness for the whole image, not one for each channel: colours fade, too.
        mean = (images @ brightness(channels)).mean((1, 2))[:, None, None, None]
        return _rounded(mean + magnitude * (images - mean), images.dtype)
    if kind == "jpeg":
        files = [io.BytesIO(jpeg_bytes(image, int(magnitude))) for image in images]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    faded = (1 - magnitude) * images.astype(np.float64) + magnitude * tones.grey
    return _rounded(faded, images.dtype)


def jpeg_bytes(image: Pixels, quality: int) -> bytes:
    """An RGB image (height, width, 3) uint8 as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _grain(side: int, channels: int, seeds: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Fields of standard normal noise, (N, side, side, channels)."""
    cells = min(side, _GRAINS)
    cell = np.arange(side) * cells // side
    draws = [np.random.default_rng((*each, 0)) for each in seeds]
    fields = [draw.standard_normal((cells, cells, channels), dtype=np.float32) for draw in draws]
    return np.stack(fields)[:, cell][:, :, cell]


def _occlude(images: Pixels, share: float, seeds: list[tuple[int, int]], tones: Tones) -> Pixels:
    side = images.shape[1]
    square = max(1, round(math.sqrt(share) * side))
    damaged, grey = images.copy(), _rounded(tones.grey, images.dtype)
    for image, each in zip(damaged, seeds, strict=True):
        # In proportion to the free space: every square contains the smaller ones.
        position = np.random.default_rng((*each, 1)).random(2) * (side - square + 1)
        top, left = np.floor(position).astype(int)
        image[top : top + square, left : left + square] = grey
    return damaged


def _rounded(values: NDArray[np.floating], dtype: np.dtype[Any]) -> Pixels:
    rounded: Pixels = np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)
    return rounded
