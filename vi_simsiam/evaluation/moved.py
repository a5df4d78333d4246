"""Validation images that are shifted and turned a little: a test of features on images that are not
aligned as the labelled ones are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 1 / 7
"""Largest shift in each direction, as a share of the side: 4 of 28 pixels."""
TURN = 10.0
"""Largest turn to either side, in degrees."""


def move(images: Tensor, numbers: range) -> Tensor:
    """Shift and turn each image, bilinearly and with the pixels of its border repeated outside.

    Shifts and turns are uniform, and a function of the image's number alone.

    Args:
        images: (B, C, side, side) floating point.
        numbers: of the B images in their source.

    Returns:
        Of the shape, dtype and device of `images`.
    """
    drawn = np.stack([np.random.default_rng(number).uniform(-1, 1, 3) for number in numbers])
    angle, across, down = torch.from_numpy(drawn.T)
    angle = angle * math.radians(TURN)
    shift = 2 * SHIFT * torch.stack([across, down], 1)  # the side of the grid has length 2
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    placed = torch.cat([turn, turn @ shift.unsqueeze(2)], 2).to(images)
    grid = F.affine_grid(placed, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
