"""Contents of every training batch: which images, in which order, with which views.

A batch is a function of (seed, epoch, step) alone. Worker processes, the calling process and a GPU
all take it from here, so it does not depend on where it is prepared, by how many processes, or
where a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.checks import require
from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.views import GLOBAL_VIEWS, draw_table
from vi_simsiam.errors import InputError
from vi_simsiam.text import brief_repr

_KEPT_ORDERS = 2
"""Steps that are prepared ahead reach into the next epoch."""


@dataclass(frozen=True)
class Batch:
    """Views of a batch of images, and the images' numbers in the source."""

    views: list[Tensor]
    """Per view (B, 3, h, w) in channels_last, normalised: two global views, then the local ones."""
    index: Tensor
    """(B,) int64."""

    __repr__ = brief_repr


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of the images in an epoch: a permutation (count,) keyed by (seed, epoch)."""
    # Sorted raw output of the generator, which numpy keeps in every release, unlike `permutation`.
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def check_batch(batch_size: int, images: ImageSource) -> None:
    """Raise InputError if a batch would hold more images than there are."""
    if batch_size > len(images):
        raise InputError(
            f"batch_size: {batch_size} must be at most {len(images)}, the images in {images.name}"
        )


class Schedule:
    """The batches of a run, or one rank's share of them.

    The batch of a step is the same for every `world_size`; rank r has its rows
    [r * B / N, (r + 1) * B / N).

    Args:
        images: the training images.
        policy: the views.
        batch_size: images in the batch of all ranks together.
        seed: key of the order and of every view.
        rank: this process among `world_size`.
        world_size: processes that share a batch.

    Raises:
        InputError: numbers out of range, or a batch that is larger than the source or that the
            ranks cannot share equally.
    """

    def __init__(
        self,
        images: PackedImages,
        policy: AugmentConfig,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require("batch_size", batch_size, batch_size >= 1, "at least 1")
        check_batch(batch_size, images)
        require("seed", seed, seed >= 0, "at least 0")
        require("world_size", world_size, world_size >= 1, "at least 1")
        ranks = f"between 0 and {world_size - 1}, for world_size {world_size}"
        require("rank", rank, 0 <= rank < world_size, ranks)
        shared = f"a multiple of {world_size}, the processes that share it"
        require("batch_size", batch_size, batch_size % world_size == 0, shared)
        self.images, self.policy, self.seed = images, policy, seed
        self.batch_size = batch_size
        self.rows = batch_size // world_size
        """Images of a batch that are this rank's."""
        self.views = GLOBAL_VIEWS + policy.local_views
        self.steps_per_epoch = len(images) // batch_size
        """Batches in an epoch; the images left over come in other epochs."""
        self._first_row = rank * self.rows
        self._orders: dict[int, NDArray[np.int64]] = {}

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the images of steps [start, stop) of an epoch: (stop - start, rows) int64."""
        used = self._order(epoch)[: self.steps_per_epoch * self.batch_size]
        batches = used.reshape(-1, self.batch_size)
        return batches[start:stop, self._first_row : self._first_row + self.rows]

    def table(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the table rows of images (n,) in an epoch: (views, n, 16), see `draw_table`."""
        return draw_table(
            self.policy,
            seed=self.seed,
            epoch=epoch,
            samples=samples,
            heights=self.images.heights[samples],
            widths=self.images.widths[samples],
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        orders = self._orders
        if epoch not in orders:
            order = epoch_order(self.seed, epoch, len(self.images))
            # Threads share the dictionary, so it is replaced, never changed.
            orders = dict([*orders.items(), (epoch, order)][-_KEPT_ORDERS:])
            self._orders = orders
        return orders[epoch]
