"""The first convolution of a ResNet over blocks of 2x2 pixels, see `vi_simsiam.kernels.stem_convolution`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.ops.backends import why_unavailable


def takes(images: Tensor, weight: Tensor) -> bool:
    """Whether `stem_convolution` computes this convolution of stride 2 and padding 3, and faster than `conv2d`."""
    return (
        why_unavailable("triton", images.device.type) is None
        and not images.requires_grad
        and weight.shape[1:] == (3, 7, 7)
        and images.shape[1] == 3
    )


def stem_convolution(images: Tensor, weight: Tensor) -> Tensor:
    """`conv2d(images, weight, stride=2, padding=3)`, with a gradient for the weight.

    Args:
        images: (N, 3, H, W), any strides.
        weight: (C, 3, 7, 7), converted to the images' dtype.

    Returns:
        (N, C, ceil(H/2), ceil(W/2)), channels last.
    """
    from vi_simsiam.kernels.stem_convolution import BLOCK_CHANNELS, BORDER, blocks_of_pixels

    number, _, height, width = images.shape
    blocks = images.new_empty((number, -(-height // 2) + BORDER, -(-width // 2) + BORDER, BLOCK_CHANNELS))
    blocks_of_pixels(images, blocks)
    y = F.conv2d(blocks.permute(0, 3, 1, 2), _OverBlocks.apply(weight.to(images.dtype)))
    return y.contiguous(memory_format=torch.channels_last)  # float64 comes in another layout from a GPU


class _OverBlocks(torch.autograd.Function):
    """The weight of the convolution over pixels (C, 3, 7, 7) as one over blocks, (C, 16, 4, 4), channels last."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        rows = len(weight)
        out = weight.new_zeros((rows, 256))
        out.index_copy_(1, _places(weight.device), weight.permute(0, 2, 3, 1).reshape(rows, 147))
        return out.view(rows, 4, 4, 16).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        rows = len(gradient)
        taken = gradient.permute(0, 2, 3, 1).reshape(rows, 256).index_select(1, _places(gradient.device))
        return taken.view(rows, 7, 7, 3).permute(0, 3, 1, 2)


@functools.cache
def _places(device: torch.device) -> Tensor:
    """Where the weight of row y, column x and colour c lies among the 256 over blocks, for y, x, c in turn."""
    y, x, colour = torch.meshgrid(torch.arange(1, 8), torch.arange(1, 8), torch.arange(3), indexing="ij")
    place = ((y // 2 * 4 + x // 2) * 4 + y % 2 * 2 + x % 2) * 3 + colour
    block, channel = place // 12, place % 12
    return (block * 16 + channel).flatten().to(device)
