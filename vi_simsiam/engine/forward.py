"""Frozen networks on views of images, random views, and nearest neighbours by cosine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.config import AugmentConfig, Constants, DecodeConfig
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import subset
from vi_simsiam.data.views import GLOBAL_VIEWS, IMAGENET, add_offsets, draw_table, layout_of
from vi_simsiam.engine.distributed import World
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import augment

_KEYS = 16384
"""Keys in a block of `nearest`."""

Rows = Tensor | NDArray[np.float32]


@contextlib.contextmanager
def evaluating(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a network in eval mode, without gradients and autocast; its training mode is restored.

    Outputs in bfloat16 would make results depend on the device.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        network.train(was_training)


def extract(
    network: nn.Module,
    source: ImageSource,
    *,
    size: int,
    device: torch.device,
    workers: int,
    batch_size: int = 256,
    world: World | None = None,
    output: Callable[[Tensor], Tensor] | None = None,
    change: Callable[[Tensor, range], Tensor] | None = None,
    constants: Constants = IMAGENET,
) -> Tensor:
    """Outputs of a network for the un-augmented views of all images, in their order.

    Args:
        network: on `device`; maps images (B, C, size, size) to features (B, F).
        source: N images.
        size: side of the view in pixels (shorter side resized to it, centre crop).
        device: where to compute.
        workers: processes that read images.
        batch_size: images at a time; it does not change the result beyond rounding.
        world: ranks that compute a part each and all get the whole; None for this process alone.
        output: called in place of `network`; may give any (B, ...).
        change: replaces views (B, C, size, size), given with the numbers of their images.
        constants: mean and standard deviation of the C channels, the run's.

    Returns:
        (N, F) or (N, ...) float32 on the CPU.

    Raises:
        InputError: an image cannot be read, there is none, or features are not finite.
    """
    if len(source) == 0:
        raise InputError(f"source: {source.name} holds no images")
    shared = world if world is not None and 1 < world.size <= len(source) else None
    numbers = range(len(source)) if shared is None else shared.share(len(source))
    mine = source if shared is None else subset(source, np.asarray(numbers))
    compute, parts = output or network, []
    with evaluating(network, device):
        for images, _ in eval_loader(mine, size, batch_size, workers, constants):
            here, numbers = numbers[: len(images)], numbers[len(images) :]
            views = images if change is None else change(images, here)
            parts.append(compute(views.to(device)).float().cpu())
    features = torch.cat(parts)
    return finite(features if shared is None else shared.gather_rows(features), source)


def finite(features: Tensor, source: ImageSource) -> Tensor:
    """Return the features of `source`; InputError unless all are finite."""
    if not torch.isfinite(features).all():
        raise InputError(
            f"features: those of {source.name} are not finite; the model's weights are damaged"
        )
    return features


def random_views(
    images: Sequence[Pixels],
    samples: NDArray[np.int64],
    policy: AugmentConfig,
    *,
    views: int,
    seed: int,
    device: torch.device,
    later_epochs: bool,
) -> Tensor:
    """Random global views of B images, (views, B, C, size, size) float32 on `device`.

    A view is a function of the seed, the view's number, and the image's number and size.

    Args:
        images: pixels of each, uint8 or uint16 (height, width, C).
        samples: (B,) numbers of the images in their source.
        policy: the random views; its local ones are not drawn.
        views: how many of each image, at least 1.
        seed: key of the views.
        device: where they are made.
        later_epochs: make views beyond the two of an epoch those of training's later epochs, view v
            that of epoch v // 2. Otherwise they are further views of epoch 0, at most 16 in all.
    """
    epochs, further = range(-(-views // GLOBAL_VIEWS)), 0
    if not later_epochs:
        # Further global views are local ones in the table, drawn like global ones.
        epochs, further = range(1), max(0, views - GLOBAL_VIEWS)
    policy = dataclasses.replace(
        policy, local_views=further, local_size=policy.size, local_scale=policy.crop_scale
    )
    heights, widths = np.array([image.shape[:2] for image in images]).T
    _, _, channels = images[0].shape
    decode = DecodeConfig(channels=channels, bits=8 * images[0].dtype.itemsize)
    layout = layout_of(policy, decode)
    tables = [
        draw_table(
            policy,
            seed=seed,
            epoch=epoch,
            samples=samples,
            heights=heights,
            widths=widths,
            pixel_bytes=decode.pixel_bytes,
        )
        for epoch in epochs
    ]
    table = np.concatenate(tables)[:views]
    lengths = decode.pixel_bytes * heights * widths
    add_offsets(table, np.cumsum(lengths) - lengths)
    values = np.concatenate([image.reshape(-1) for image in images])
    pixels = torch.from_numpy(values.view(np.uint8)).to(device)
    return augment(pixels, torch.from_numpy(table).to(device), policy.size, layout=layout)


def nearest(
    queries: Rows, keys: Rows | None, count: int, *, device: torch.device, block: int = 4096
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the keys of largest cosine to every query, in N x K x F operations.

    Args:
        queries: (N, F), in memory or mapped from a file; a row of zeros has cosine 0 to everything.
        keys: (K, F); None for the queries themselves, of which none is its own neighbour.
        count: of neighbours; there are fewer where there are fewer keys.
        device: where to compute.
        block: queries at a time.

    Yields:
        For each block of queries (the last may be smaller): numbers of the keys, (B, count) int64,
        and their cosines, (B, count) float32, falling; equal ones in the order of the keys. Both on
        `device`.
    """
    own = keys is None
    keys = queries if keys is None else keys
    count = min(count, len(keys) - own)
    for start in range(0, len(queries), block):
        rows = _unit(queries[start : start + block], device)
        best = rows.new_empty((len(rows), 0))
        which = torch.empty((len(rows), 0), dtype=torch.int64, device=device)
        for first in range(0, len(keys), _KEYS):
            cosine = rows @ _unit(keys[first : first + _KEYS], device).mT
            if own:
                # Entry (i, j) is an image's cosine to itself where start + i = first + j.
                cosine.diagonal(start - first)[:] = -torch.inf
            values, columns = cosine.topk(min(count, cosine.shape[1]), dim=1)
            # Ordered by column first: the stable sort by cosine keeps that order among equal ones.
            columns, by_column = columns.sort(dim=1)
            which = torch.cat([which, columns + first], dim=1)
            best, order = torch.cat([best, values.gather(1, by_column)], dim=1).sort(
                dim=1, descending=True, stable=True
            )
            which, best = which.gather(1, order)[:, :count], best[:, :count]
        yield which, best


def _unit(rows: Rows, device: torch.device) -> Tensor:
    # A mapped array is read into memory, which also makes it writable, as torch requires.
    tensor = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
    return F.normalize(tensor.to(device), dim=1)
