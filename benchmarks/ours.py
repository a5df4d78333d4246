"""Our own views, and their error against torchvision's functions with the same parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.device import byte_tensor
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.ops.augment import IMAGENET_MEAN, IMAGENET_STD, ColourOperation, augment

from .baselines import colour_operations, torchvision_view
from .peers import Provider, seconds_a_batch
from .timers import Timer

ALLOWED = {"without hue": 1e-5, "with hue": 1e-4}
"""Largest allowed error of a view, in pixel values from 0 to 1."""
_CHECKED = 8
"""Samples of a batch that are compared."""
_SEED = 0
_SETS = 8
"""Number of batches that the augmentation alone is timed on, in turn."""


def loader_views(
    images: PackedImages, policy: AugmentConfig, batch: int, device: torch.device, workers: int
) -> Provider:
    """Batches from `MultiViewLoader`, one epoch after another; `workers` processes on a CPU."""
    loader = MultiViewLoader(images, policy, batch, device, seed=_SEED, workers=workers)

    def sample() -> tuple[Sequence[Tensor], dict[str, float]]:
        batches = loader.epoch(0)
        first = next(batches)
        error = errors(first.views, images, policy, first.index.cpu().numpy())
        for _ in batches:  # the rest of the epoch warms up
            pass
        return first.views, error

    def measure() -> float:
        return seconds_a_batch((batch.views for batch in loader), device) * 1e6

    return Provider(sample, measure, loader.close)


def augmented_bytes(
    images: PackedImages, policy: AugmentConfig, batch: int, device: torch.device, timer: Timer
) -> Provider:
    """The augmentation alone, on bytes and table rows that are on the device.

    On a CPU it has one thread, as in a worker of a loader.
    """
    pixels = byte_tensor(images.pixels).to(device)
    samples = [(np.arange(batch) + i * batch) % len(images) for i in range(_SETS)]
    tables = [torch.from_numpy(placed_table(images, policy, each)).to(device) for each in samples]
    out_bytes = batch * 12 * (2 * policy.size**2 + policy.local_views * policy.local_size**2)

    def views(table: Tensor) -> list[Tensor]:
        made = list(augment(pixels, table[:2], policy.size))
        if policy.local_views:
            made += augment(pixels, table[2:], policy.local_size)
        return made

    with _one_thread(device):
        timed = timer.prepare(views, tables, out_bytes)["time"]

    def sample() -> tuple[Sequence[Tensor], dict[str, float]]:
        made = views(tables[0])
        return made, errors(made, images, policy, samples[0])

    def measure() -> float:
        with _one_thread(device):
            return timed()

    return Provider(sample, measure)


def placed_table(
    images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Table rows (V, B, 16) of images in epoch 0, with their offsets in `images`."""
    table = _table(images, policy, samples)
    add_offsets(table, images.offsets[samples])
    return table


def errors(
    views: Sequence[Tensor], images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> dict[str, float]:
    """Largest error of the first views of a batch of epoch 0 against torchvision's functions.

    Returns:
        The errors of the views without and with hue shifts, in pixel values from 0 to 1.
    """
    samples = samples[:_CHECKED]
    table = _table(images, policy, samples)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    worst = dict.fromkeys(ALLOWED, 0.0)
    for rows, batch in zip(table, views, strict=True):
        for row, sample, view in zip(rows, samples, batch.float().cpu(), strict=False):
            exact = torchvision_view(images.image(int(sample)), row, view.shape[-1])
            error = (view * std + mean - exact).abs().max().item()
            kind = "with hue" if ColourOperation.HUE in colour_operations(row) else "without hue"
            worst[kind] = max(worst[kind], error) if error == error else error
    return worst


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Limit torch to one thread on a CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(
    images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> NDArray[np.int32]:
    heights, widths = images.heights[samples], images.widths[samples]
    return draw_table(policy, seed=_SEED, epoch=0, samples=samples, heights=heights, widths=widths)
