"""A picture of images and the random views that a policy makes of them, to judge a policy by eye."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from vi_simsiam import config
from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.views import GLOBAL_VIEWS, draw_table
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import IMAGENET_MEAN, IMAGENET_STD, eager_augment

_GAP = 4
_BACKGROUND = (255, 255, 255)


def contact_sheet(
    source: ImageSource, policy: AugmentConfig | str, *, images: int = 8, seed: int = 0, epoch: int = 0
) -> Image.Image:
    """Draw one row for each image: the original fitted into a global view's square, then all its views.

    Args:
        source: where the images come from; those shown are spread evenly over it.
        policy: the random views, or the name of a policy.
        images: number of rows, at least 1; no more than the source has images.
        seed: of the views; with `epoch` and the image's number it gives the views that training would see.
        epoch: of the views.

    Raises:
        InputError: numbers out of range, an unknown policy, or an image that cannot be read.
    """
    if isinstance(policy, str):
        policy = config.policy(policy)
    if images < 1:
        raise InputError(f"images: {images} must be at least 1")
    if not len(source):
        raise InputError(f"source: {source.name} has no images")
    count = min(images, len(source))
    indices = np.arange(count, dtype=np.int64) * len(source) // count
    sizes = [policy.size] * GLOBAL_VIEWS + [policy.local_size] * policy.local_views
    cell = policy.size
    width = cell + sum(size + _GAP for size in sizes)
    height = max(sizes)
    sheet = Image.new("RGB", (width, count * (height + _GAP) - _GAP), _BACKGROUND)
    for row, index in enumerate(indices.tolist()):
        top, left = row * (height + _GAP), cell + _GAP
        image = source.image(index)
        fitted = ImageOps.contain(image, (cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(fitted, ((cell - fitted.width) // 2, top + (cell - fitted.height) // 2))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(-1))
        table = draw_table(
            policy,
            seed=seed,
            epoch=epoch,
            samples=np.array([index]),
            heights=np.array([image.height]),
            widths=np.array([image.width]),
        )
        for size, parameters in zip(sizes, table, strict=True):
            view = eager_augment(pixels, torch.from_numpy(parameters[None]), size)[0, 0]
            sheet.paste(Image.fromarray(_bytes(view)), (left, top))
            left += size + _GAP
    return sheet


def _bytes(view: Tensor) -> NDArray[np.uint8]:
    """A normalised view (3, s, s) as (s, s, 3) uint8."""
    colours = view.permute(1, 2, 0) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    array: NDArray[np.uint8] = colours.mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
    return array
