"""Our own views, as the benchmarks make them, and torchvision's functions that these are held to.

The oracle applies a row of the parameter table to one image with `torchvision.transforms.v2.functional`, on float32 in
[0, 1]: crop, resize with antialias, flip, colour operations in the row's order, grayscale, blur.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.device import byte_tensor
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.ops.augment import (
    BLUR_TAPS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColourOperation,
    Column,
    augment,
)

from .peers import seconds_a_batch
from .timers import Timer

ALLOWED = {"without hue": 1e-5, "with hue": 1e-4}
"""Largest error of a view against torchvision's functions, in pixel values from 0 to 1."""
_CHECKED = 8
"""Samples of a batch that are compared."""
_SEED = 0
_SETS = 8
"""Batches that the augmentation alone is timed on, in turn."""


@runtime_checkable
class Checked(Protocol):
    """A provider whose parameters are known, so that its views can be computed otherwise."""

    def errors(self, views: Sequence[Tensor]) -> dict[str, float]:
        """Largest error of the sampled views of some images, without hue shifts and with them."""


class LoaderViews:
    """Batches from `MultiViewLoader`, an epoch after the other.

    Args:
        images: decoded.
        policy: the views.
        batch: images of a batch.
        device: where the views are made.
        workers: processes, on a CPU.
    """

    def __init__(
        self,
        images: PackedImages,
        policy: AugmentConfig,
        batch: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.images, self.policy, self.device = images, policy, device
        self.loader = MultiViewLoader(images, policy, batch, device, seed=_SEED, workers=workers)
        self._index = np.empty(0, np.int64)

    def sample(self) -> Sequence[Tensor]:
        """The first batch of the first epoch; the rest of the epoch warms up."""
        batches = self.loader.epoch(0)
        first = next(batches)
        self._index = first.index.cpu().numpy()
        for _ in batches:
            pass
        return first.views

    def errors(self, views: Sequence[Tensor]) -> dict[str, float]:
        """See `Checked`."""
        return errors(views, self.images, self.policy, self._index, epoch=0)

    def measure(self) -> float:
        """Microseconds a batch, over an epoch."""
        return seconds_a_batch((batch.views for batch in self.loader), self.device) * 1e6

    def close(self) -> None:
        """End the workers."""
        self.loader.close()


class AugmentedBytes:
    """The augmentation alone: bytes and table rows lie on the device. On a CPU it has one thread, as in a loader's worker.

    Args:
        images: decoded.
        policy: the views.
        batch: images of a batch.
        device: where the views are made.
        timer: how calls are timed.
    """

    def __init__(
        self,
        images: PackedImages,
        policy: AugmentConfig,
        batch: int,
        device: torch.device,
        timer: Timer,
    ) -> None:
        self.images, self.policy = images, policy
        self._pixels = byte_tensor(images.pixels).to(device)
        self._samples = [(np.arange(batch) + i * batch) % len(images) for i in range(_SETS)]
        self._tables = [
            torch.from_numpy(placed_table(images, policy, s)).to(device) for s in self._samples
        ]
        out_bytes = batch * 12 * (2 * policy.size**2 + policy.local_views * policy.local_size**2)
        with _one_thread(device):
            self._measure = timer.prepare(self._views, self._tables, out_bytes)["time"]

    def sample(self) -> Sequence[Tensor]:
        """The views of the first set."""
        return self._views(self._tables[0])

    def errors(self, views: Sequence[Tensor]) -> dict[str, float]:
        """See `Checked`."""
        return errors(views, self.images, self.policy, self._samples[0], epoch=0)

    def measure(self) -> float:
        """Microseconds a batch."""
        with _one_thread(self._pixels.device):
            return self._measure()

    def close(self) -> None:
        """Give back the bytes."""
        self._tables.clear()
        del self._pixels, self._measure

    def _views(self, table: Tensor) -> list[Tensor]:
        views = list(augment(self._pixels, table[:2], self.policy.size))
        if self.policy.local_views:
            views += augment(self._pixels, table[2:], self.policy.local_size)
        return views


def placed_table(
    images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> NDArray[np.int32]:
    """The table rows (V, B, 16) of images in epoch 0, for their bytes as they lie in `images`."""
    table = _table(images, policy, samples, epoch=0)
    add_offsets(table, images.offsets[samples])
    return table


def errors(
    views: Sequence[Tensor],
    images: PackedImages,
    policy: AugmentConfig,
    samples: NDArray[np.int64],
    *,
    epoch: int,
) -> dict[str, float]:
    """Largest error of the first views of a batch against torchvision's functions, without hue shifts and with them."""
    samples = samples[:_CHECKED]
    table = _table(images, policy, samples, epoch=epoch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    worst = dict.fromkeys(ALLOWED, 0.0)
    for rows, batch in zip(table, views, strict=True):
        for row, sample, view in zip(rows, samples, batch.float().cpu(), strict=False):
            exact = torchvision_view(images, int(sample), row, view.shape[-1])
            error = (view * std + mean - exact).abs().max().item()
            kind = "with hue" if ColourOperation.HUE in _order(row) else "without hue"
            worst[kind] = max(worst[kind], error) if error == error else error
    return worst


def torchvision_view(
    images: PackedImages, sample: int, row: NDArray[np.int32], size: int
) -> Tensor:
    """The view of an image that a table row describes, by torchvision: (3, size, size) float32, not normalised."""
    image = TF.to_dtype(TF.pil_to_tensor(images.image(sample)), torch.float32, scale=True)
    floats = row.view(np.float32)
    top, left, height, width = (
        int(row[c]) for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH)
    )
    view: Tensor = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if row[Column.FLIP]:
        view = TF.horizontal_flip(view)
    for operation in _order(row):
        if operation == ColourOperation.BRIGHTNESS:
            view = TF.adjust_brightness(view, float(floats[Column.BRIGHTNESS]))
        elif operation == ColourOperation.CONTRAST:
            view = TF.adjust_contrast(view, float(floats[Column.CONTRAST]))
        elif operation == ColourOperation.SATURATION:
            view = TF.adjust_saturation(view, float(floats[Column.SATURATION]))
        elif operation == ColourOperation.HUE:
            view = TF.adjust_hue(view, float(floats[Column.HUE]))
    if row[Column.GRAY]:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if (sigma := float(floats[Column.SIGMA])) > 0:
        view = TF.gaussian_blur(view, [BLUR_TAPS, BLUR_TAPS], [sigma, sigma])
    return view


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU torch computes with one thread meanwhile."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(
    images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64], *, epoch: int
) -> NDArray[np.int32]:
    heights, widths = images.heights[samples], images.widths[samples]
    return draw_table(
        policy, seed=_SEED, epoch=epoch, samples=samples, heights=heights, widths=widths
    )


def _order(row: NDArray[np.int32]) -> Iterator[int]:
    """The colour operations of a row, first to last."""
    packed = int(row[Column.ORDER])
    while packed & 15:
        yield packed & 15
        packed >>= 4
