"""The first convolution of a ResNet over blocks of 2x2 pixels, see
`vi_simsiam.kernels.stem_convolution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.ops.backends import check_storage, why_unavailable


def takes(images: Tensor, convolution: nn.Conv2d) -> bool:
    """True if `stem_convolution` computes this convolution of the images on their device."""
    numbers = (
        convolution.in_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
    )
    rest = convolution.dilation, convolution.groups, convolution.bias, convolution.padding_mode
    return (
        numbers == (3, (7, 7), (2, 2), (3, 3))
        and rest == ((1, 1), 1, None, "zeros")
        and not images.requires_grad
        and why_unavailable("triton", images.device.type) is None
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

    if not torch.compiler.is_compiling():
        check_storage("images", images)
    number, _, height, width = images.shape
    blocks = images.new_empty(
        (number, -(-height // 2) + BORDER, -(-width // 2) + BORDER, BLOCK_CHANNELS)
    )
    blocks_of_pixels(images, blocks)
    y = F.conv2d(blocks.permute(0, 3, 1, 2), _OverBlocks.apply(weight.to(images.dtype)))
    return y.contiguous(
        memory_format=torch.channels_last
    )  # float64 comes in another layout from a GPU


class _OverBlocks(torch.autograd.Function):
    """The weight of the convolution over pixels (C, 3, 7, 7) as one over blocks, (C, 16, 4, 4),
    channels last."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        rows = len(weight)
        taps = F.pad(weight.permute(0, 2, 3, 1), (0, 0, 1, 0, 1, 0)).view(rows, 4, 2, 4, 2, 3)
        out = weight.new_zeros((rows, 4, 4, 16))
        out[..., :12].view(rows, 4, 4, 2, 2, 3).copy_(taps.transpose(2, 3))
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        rows = len(gradient)
        taps = gradient.permute(0, 2, 3, 1)[..., :12].reshape(rows, 4, 4, 2, 2, 3).transpose(2, 3)
        by_weight = taps.reshape(rows, 8, 8, 3)[:, 1:, 1:].permute(0, 3, 1, 2)
        return by_weight.contiguous(memory_format=torch.channels_last)
