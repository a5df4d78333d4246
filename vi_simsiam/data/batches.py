"""What every training batch holds: which images, in which order, seen through which views.

A batch is a function of (seed, epoch, step) alone. Whoever prepares it (worker processes, the calling process, a GPU)
asks here, so where and by how many it is prepared, and where a run was resumed, change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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
    """Views of a batch of images and the images' places in the source."""

    views: list[Tensor]
    """Per view (B, 3, h, w) in channels_last, normalised: the two global views, then the local ones."""
    index: Tensor
    """(B,) int64."""

    __repr__ = brief_repr


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the permutation of range(count) that an epoch goes through, (count,) int64, keyed by (seed, epoch)."""
    # Sorting raw generator output: numpy promises that to be the same in every release, unlike `permutation`.
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

    The batch of a step is the same for every `world_size`; rank r has rows [r * B / N, (r + 1) * B / N) of it.

    Args:
        images: what is trained on.
        policy: the views.
        batch_size: images in the batch of all ranks together.
        seed: key of the order and of every view.
        rank: this process among `world_size`.
        world_size: processes that share a batch.

    Raises:
        InputError: a batch larger than the source or that the ranks cannot share equally, or numbers out of range.
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
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} must be at least 1")
        check_batch(batch_size, images)
        if seed < 0:
            raise InputError(f"seed: {seed} must be at least 0")
        if world_size < 1:
            raise InputError(f"world_size: {world_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise InputError(
                f"rank: {rank} must lie between 0 and {world_size - 1}, for world_size {world_size}"
            )
        if batch_size % world_size:
            raise InputError(
                f"batch_size: {batch_size} must be a multiple of {world_size}, the processes that share it"
            )
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
        """The images of steps [start, stop) of an epoch: (stop - start, rows) int64, a row for each step."""
        batches = self._order(epoch)[: self.steps_per_epoch * self.batch_size].reshape(
            -1, self.batch_size
        )
        return batches[start:stop, self._first_row : self._first_row + self.rows]

    def table(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int32]:
        """The table rows of images in an epoch: (views, n, 16) int32 for samples (n,), START relative to each image."""
        heights, widths = self.images.heights[samples], self.images.widths[samples]
        return draw_table(
            self.policy,
            seed=self.seed,
            epoch=epoch,
            samples=samples,
            heights=heights,
            widths=widths,
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.seed, epoch, len(self.images))
            # Threads share this: a new dictionary takes the old one's place, so none sees one half changed.
            kept = dict(list(self._orders.items())[1 - _KEPT_ORDERS :])
            self._orders = {**kept, epoch: order}
        return order
