"""Frozen networks on views of images: the un-augmented view, and random ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import subset
from vi_simsiam.data.views import GLOBAL_VIEWS, add_offsets, draw_table
from vi_simsiam.engine.distributed import World
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import augment


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
) -> Tensor:
    """Outputs of a network for the un-augmented views of all images, in their order.

    Args:
        network: on `device`; maps images (B, 3, size, size) to features (B, F).
        source: N images.
        size: side of the view in pixels (shorter side resized to it, centre crop).
        device: where to compute.
        workers: processes that read images.
        batch_size: images at a time; it does not change the result beyond rounding.
        world: ranks that compute a part each and all get the whole; None for this process alone.
        output: called in place of `network`; may give any (B, ...).

    Returns:
        (N, F) or (N, ...) float32 on the CPU.

    Raises:
        InputError: an image cannot be read, there is none, or features are not finite.
    """
    if len(source) == 0:
        raise InputError(f"source: {source.name} holds no images")
    shared = world if world is not None and 1 < world.size <= len(source) else None
    mine = source if shared is None else subset(source, np.asarray(shared.share(len(source))))
    compute = output or network
    with evaluating(network, device):
        parts = [
            compute(images.to(device)).float().cpu()
            for images, _ in eval_loader(mine, size, batch_size, workers)
        ]
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
    images: Sequence[NDArray[np.uint8]],
    samples: NDArray[np.int64],
    policy: AugmentConfig,
    *,
    views: int,
    seed: int,
    device: torch.device,
    later_epochs: bool,
) -> Tensor:
    """Random global views of B images, (views, B, 3, size, size) float32 on `device`.

    A view is a function of the seed, the view's number, and the image's number and size.

    Args:
        images: pixels of each, uint8 (height, width, 3).
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
    tables = [
        draw_table(policy, seed=seed, epoch=epoch, samples=samples, heights=heights, widths=widths)
        for epoch in epochs
    ]
    table = np.concatenate(tables)[:views]
    lengths = 3 * heights * widths
    add_offsets(table, np.cumsum(lengths) - lengths)
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).to(device)
    return augment(pixels, torch.from_numpy(table).to(device), policy.size)
