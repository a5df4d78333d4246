"""The batches of a run: which images, in which order, with which random views; and the fixed view
for evaluation.

A batch is a function of (seed, epoch, step) alone. Worker processes, the calling process and a GPU
all take it from here, so it does not depend on where it is prepared, by how many processes, or
where a run was resumed. Its views are a table of parameters.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from vi_simsiam.checks import require
from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, Constants, DecodeConfig
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import TABLE_COLUMNS, ColourOperation, Column, Layout
from vi_simsiam.text import brief_repr

GLOBAL_VIEWS = 2
IMAGENET: Constants = (IMAGENET_MEAN, IMAGENET_STD)

_LONGEST = 4
"""Aspect ratio to which a strip is cut before it is resized."""
_CROP_DRAWS = 10
# A view has blocks of four random words: three for switches, colours and blur, then one for each
# draw of a crop.
_CROP_BLOCK = 3

_ORDERS = tuple(itertools.permutations(ColourOperation))
"""The 24 orders of the colour operations."""

_Words = Callable[[int, NDArray[np.int32]], NDArray[np.uint32]]
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Batch:
    """Views of a batch of images, and the images' numbers in the source."""

    views: list[Tensor]
    """Per view (B, C, h, w) in channels_last, normalised: two global views, then the local ones."""
    index: Tensor
    """(B,) int64."""

    __repr__ = brief_repr


@functools.lru_cache(maxsize=4)  # an epoch's steps share it, and reach into the next epoch
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
        self.layout = layout_of(policy, images.decode)
        """Of the images' pixels."""
        self.batch_size = batch_size
        self.rows = batch_size // world_size
        """Images of a batch that are this rank's."""
        self.views = GLOBAL_VIEWS + policy.local_views
        self.steps_per_epoch = len(images) // batch_size
        """Batches in an epoch; the images left over come in other epochs."""
        self._first_row = rank * self.rows

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the images of steps [start, stop) of an epoch: (stop - start, rows) int64."""
        order = epoch_order(self.seed, epoch, len(self.images))
        used = order[: self.steps_per_epoch * self.batch_size]
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
            pixel_bytes=self.images.decode.pixel_bytes,
        )


def layout_of(policy: AugmentConfig, decode: DecodeConfig) -> Layout:
    """Return the layout of images decoded so, normalised by a policy's constants.

    Raises:
        InputError: the constants are of another number of channels.
    """
    mean, std = policy.constants
    accepted = f"{len(mean)}, as the constants by which views are normalised"
    require("channels", decode.channels, decode.channels == len(mean), accepted)
    return Layout(decode.bits, mean, std)


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

    Args:
        counter: (4, n) uint32.
        key: two words of 32 bits.

    Returns:
        (4, n) uint32: four random words for each counter.
    """
    x0, x1, x2, x3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x2 = (product1 >> _HALF) ^ x1 ^ np.uint64(k0), (product0 >> _HALF) ^ x3 ^ np.uint64(k1)
        x1, x3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def draw_table(
    policy: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    pixel_bytes: int = 3,
) -> NDArray[np.int32]:
    """Draw the parameters of all views of a batch.

    A view's row is a function of the policy, the seed, the epoch, the image's number and size, and
    the view's number alone.

    Args:
        policy: the random views.
        seed: at least 0, below 2**64.
        epoch: at least 0.
        samples: (B,) numbers of the images in their source, below 2**31.
        heights, widths: (B,) of the images, in pixels.
        pixel_bytes: bytes of a pixel.

    Returns:
        (V, B, 16) int32, see `ops.augment.Column`: the two global views, then the local ones. START
        counts from the image's first byte until `add_offsets`.

    Raises:
        InputError: a seed or epoch out of range.
    """
    tall, wide = heights.astype(np.int64), widths.astype(np.int64)
    for name, number, limit in (("seed", seed, 2**64), ("epoch", epoch, 2**32)):
        require(name, number, 0 <= number < limit, f"at least 0 and below {limit}")
    # The epoch comes first: it is one word, while a seed above 32 bits has two.
    low, high = (int(x) for x in np.random.SeedSequence((epoch, seed)).generate_state(2, np.uint32))
    views = GLOBAL_VIEWS + policy.local_views
    table = np.zeros((views, len(samples), TABLE_COLUMNS), dtype=np.int32)
    for number, rows in enumerate(table):
        scale = policy.crop_scale if number < GLOBAL_VIEWS else policy.local_scale
        rows[:, Column.SAMPLE] = samples
        words = functools.partial(_words, (low, high), number)
        _draw_colours(rows, words, policy)
        _draw_crops(rows, words, scale, policy.crop_ratio, tall, wide)
        rows[:, Column.STRIDE] = pixel_bytes * wide
        _starts(rows)[:] = (rows[:, Column.TOP] * wide + rows[:, Column.LEFT]) * pixel_bytes
    return table


def add_offsets(table: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Add each image's first byte (B,) to the START of its rows in a table (V, B, 16), in place."""
    for rows in table:
        _starts(rows)[:] += offsets


def eval_view(size: int, constants: Constants = IMAGENET) -> v2.Compose:
    """Return the view for evaluation: shorter side resized (bicubic), centre crop, normalised."""
    return v2.Compose([eval_square(size), _as_tensor, normalised(constants)])


def eval_square(size: int) -> Callable[[Image.Image | Pixels], Any]:
    """Return the part of `eval_view` before normalisation: to size x size pixels.

    A PIL image in mode RGB stays one; pixels (height, width, channels) become (size, size,
    channels) of the same type.
    """
    view = v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    return functools.partial(_square, view)


def normalised(constants: Constants = IMAGENET) -> v2.Compose:
    """Return the rest of it: from uint8 or uint16 (..., C, h, w) to float32."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*constants)])


def _as_tensor(image: Image.Image | Pixels) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _square(view: v2.Compose, image: Image.Image | Pixels) -> Any:
    if isinstance(image, Image.Image):
        left, top, right, bottom = _without_ends(image.width, image.height)
        whole = (right - left, bottom - top) == image.size
        return view(image if whole else image.crop((left, top, right, bottom)))
    left, top, right, bottom = _without_ends(image.shape[1], image.shape[0])
    values = torch.from_numpy(image[top:bottom, left:right].astype(np.float32)).permute(2, 0, 1)
    levels = view(values).round_().clamp_(0, int(np.iinfo(image.dtype).max))
    return levels.permute(1, 2, 0).numpy().astype(image.dtype)


def _without_ends(width: int, height: int) -> tuple[int, int, int, int]:
    """The middle of a strip: enlarged with it, ends outside the centre may take gigabytes."""
    shorter, longer = sorted((width, height))
    kept = _LONGEST * shorter + (longer - _LONGEST * shorter) % 2  # so that the centre is the same
    if longer <= kept:
        return 0, 0, width, height
    start = (longer - kept) // 2
    if width == longer:
        return start, 0, start + kept, shorter
    return 0, start, shorter, start + kept


def _words(
    key: tuple[int, int], view: int, block: int, samples: NDArray[np.int32]
) -> NDArray[np.uint32]:
    """A block of the random words of one view of each sample: (4, n) uint32."""
    counter = np.zeros((4, len(samples)), dtype=np.uint32)
    counter[0], counter[2], counter[3] = samples, view, block
    return philox(counter, key)


def _uniform(words: NDArray[np.uint32], low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
    """Uniform numbers in [low, high) from the 24 upper bits of the words."""
    return low + (words >> np.uint32(8)).astype(np.float64) * ((high - low) * 2.0**-24)


def _below(words: NDArray[np.uint32], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform integers in [0, limits): each comes from equally many words, up to one."""
    return (words.astype(np.uint64) * limits.astype(np.uint64) >> _HALF).astype(np.int64)


def _starts(rows: NDArray[np.int32]) -> NDArray[np.int64]:
    """The START columns of (n, 16) contiguous rows, as a view of them."""
    starts: NDArray[np.int64] = rows.view("<i8")[:, Column.START // 2]
    return starts


def _draw_colours(rows: NDArray[np.int32], words: _Words, policy: AugmentConfig) -> None:
    (jitter, order, gray, flip), factors, blur = (
        words(block, rows[:, Column.SAMPLE]) for block in range(_CROP_BLOCK)
    )
    rows[:, Column.FLIP] = _uniform(flip) < policy.flip_prob
    rows[:, Column.GRAY] = _uniform(gray) < policy.grayscale_prob
    floats = rows.view(np.float32)
    floats[:, Column.SIGMA] = np.where(
        _uniform(blur[0]) < policy.blur_prob, _uniform(blur[1], *policy.blur_sigma), 0
    )

    jittered = _uniform(jitter) < policy.jitter_prob
    for code, strength in enumerate(policy.jitter, 1):
        hue = Column.BRIGHTNESS + code - 1 == Column.HUE
        low, high = (-strength, strength) if hue else (max(0.0, 1 - strength), 1 + strength)
        neutral = 0.0 if hue else 1.0
        floats[:, Column.BRIGHTNESS + code - 1] = np.where(
            jittered, _uniform(factors[code - 1], low, high), neutral
        )
    # An operation without strength takes no place; the others keep their drawn order.
    packed = np.array([_packed(each, policy.jitter) for each in _ORDERS], dtype=np.int32)
    drawn = packed[_below(order, np.full(len(rows), len(packed)))]
    rows[:, Column.ORDER] = np.where(jittered, drawn, 0)


def _packed(permutation: tuple[int, ...], jitter: tuple[float, float, float, float]) -> int:
    """Operations of a permutation with a strength, 4 bits each, the first in the lowest bits."""
    codes = [code for code in permutation if jitter[code - 1] > 0]
    return sum(code << 4 * position for position, code in enumerate(codes))


def _draw_crops(
    rows: NDArray[np.int32],
    words: _Words,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> None:
    """Fill in the crops of torchvision's RandomResizedCrop: ten draws, then the central crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    left = np.arange(len(rows))
    for draw in range(_CROP_DRAWS):
        random = words(_CROP_BLOCK + draw, rows[left, Column.SAMPLE])
        area = heights[left] * widths[left] * _uniform(random[0], *scale)
        aspect = np.exp(_uniform(random[1], low, high))
        width, height = (
            np.rint(np.sqrt(x)).astype(np.int64) for x in (area * aspect, area / aspect)
        )
        fits = (width > 0) & (width <= widths[left]) & (height > 0) & (height <= heights[left])
        done, width, height = left[fits], width[fits], height[fits]
        rows[done, Column.HEIGHT], rows[done, Column.WIDTH] = height, width
        rows[done, Column.TOP] = _below(random[2, fits], heights[done] - height + 1)
        rows[done, Column.LEFT] = _below(random[3, fits], widths[done] - width + 1)
        left = left[~fits]
        if not len(left):
            return
    tall, wide = heights[left], widths[left]
    height = np.where(wide / tall < ratio[0], np.rint(wide / ratio[0]).astype(np.int64), tall)
    width = np.where(wide / tall > ratio[1], np.rint(tall * ratio[1]).astype(np.int64), wide)
    height, width = np.maximum(height, 1), np.maximum(width, 1)
    rows[left, Column.HEIGHT], rows[left, Column.WIDTH] = height, width
    rows[left, Column.TOP], rows[left, Column.LEFT] = (tall - height) // 2, (wide - width) // 2
