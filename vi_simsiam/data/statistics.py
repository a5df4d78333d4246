"""Mean and standard deviation of the training images, by which their views are normalised."""

from __future__ import annotations

import dataclasses

import numpy as np
from rich.console import Console

from vi_simsiam.config import AugmentConfig, Constants, TrainConfig
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import layout_of
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import RGB
from vi_simsiam.text import counted, print_line

SAMPLED = 10_000
"""Most images that are measured; they lie evenly across the set."""
_PIXELS = 1 << 20
_DIGITS = 6


def with_statistics(policy: AugmentConfig, images: PackedImages) -> AugmentConfig:
    """Return the policy with the constants that fit the images, and colour only where it fits.

    8-bit RGB keeps ImageNet's mean and standard deviation. Those of other images are measured,
    unless the policy has its own, and saturation, hue and grayscale are off where the channels are
    not three.

    Raises:
        InputError: the policy's constants are of another number of channels.
    """
    channels = images.decode.channels
    if policy.mean is None:
        return policy if images.decode.is_rgb else policy.normalised_by(measured(images))
    if len(policy.mean) != channels:
        raise InputError(
            f"mean: {counted(len(policy.mean), 'number')} given, the images of {images.name} have "
            f"{counted(channels, 'channel')}"
        )
    return policy.normalised_by(policy.constants)


def with_statistics_of(saved: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Return `config` with the constants that were measured for a saved run, if it has none."""
    if saved.augment.mean is None or config.augment.mean is not None:
        return config
    augment = config.augment.normalised_by(saved.augment.constants)
    return dataclasses.replace(config, augment=augment)


def print_views(config: TrainConfig, on_gpu: bool, console: Console | None) -> None:
    """Print a line on views that are not those of most runs; None prints nothing.

    These are views of other images than 8-bit RGB, or normalised otherwise.
    """
    decode = config.decode
    if console is None or layout_of(config.augment, decode) == RGB:
        return
    line = f"views: {counted(decode.channels, 'channel')} of {decode.bits} bits, normalised by the "
    line += "mean and deviation in config.json"
    if decode.channels != 3:
        line += "; saturation, hue and grayscale are off, which need three channels"
    if on_gpu:
        line += (
            "; made by torch's operations: the fused kernel takes 8-bit RGB with ImageNet's mean "
            "and deviation only"
        )
    print_line(console, line)


def measured(images: PackedImages) -> Constants:
    """Mean and standard deviation of every channel, for values in [0, 1].

    Over the pixels of at most 10,000 images, of each at most about a million; six digits. A channel
    of one value has the standard deviation 1.
    """
    chosen = np.linspace(0, len(images) - 1, min(len(images), SAMPLED)).astype(np.int64)
    count, sums = 0, np.zeros((2, images.decode.channels))
    for index in chosen.tolist():
        rows = images.array(index).reshape(-1, images.decode.channels)
        values = rows[:: max(1, len(rows) // _PIXELS)] / (2.0**images.decode.bits - 1)
        count += len(values)
        sums += values.sum(0), np.square(values).sum(0)
    mean, square = sums / max(1, count)
    deviation = np.sqrt(np.maximum(square - np.square(mean), 0))
    deviation[deviation < 1e-6] = 1
    return _rounded(mean), _rounded(deviation)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)
