"""Images as blocks of 2x2 pixels, for the first convolution of a ResNet: 7x7, stride 2, padding 3,
three channels.

Tensor cores take channels in eights, so that libraries pad three channels to eight and multiply
mostly by zeros. A convolution of stride 2 over pixels is one of stride 1 over blocks of 2x2 pixels:
with one more zero before the seven taps, tap k = 2a + b of an axis reads pixel b of block a. The
kernel becomes 4x4 over 12 channels (2 rows, 2 columns, 3 colours), padded here to 16, and the same
products are summed:

    out[i] = sum_k w[k] x[2i + k - 3] = sum_a sum_b w'[2a + b] x[2(i + a - 2) + b],  w' = (0, w)

Bytes: the images are read once; the blocks, 16 channels for 12, are written with the border of
zeros that the convolution needs (two blocks before, one behind).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CHANNELS = 16
"""Two rows, two columns and three colours, and zeros."""
BORDER = 3
"""Blocks of zeros along each axis."""
_PIXELS = 128
_WARPS = 4


def blocks_of_pixels(images: Tensor, out: Tensor) -> None:
    """Write the blocks of images and the zeros around them.

    Args:
        images: (N, 3, H, W), any strides.
        out: (N, ceil(H/2) + 3, ceil(W/2) + 3, 16), contiguous.
    """
    pixels = out.shape[0] * out.shape[1] * out.shape[2]
    if pixels == 0:
        return
    with torch.cuda.device_of(images):  # does nothing for CPU tensors, which the interpreter takes
        blocks_of_pixels_kernel[(triton.cdiv(pixels, _PIXELS),)](
            images,
            out,
            pixels,
            images.shape[2],
            images.shape[3],
            *images.stride(),
            out.shape[1],
            out.shape[2],
            PIXELS=_PIXELS,
            num_warps=_WARPS,
        )


@triton.jit
def blocks_of_pixels_kernel(
    images_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pixels: tl.int64,
    height: tl.int32,
    width: tl.int32,
    image_stride: tl.int64,
    channel_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
    PIXELS: tl.constexpr,
) -> None:
    """Output pixels `program_id(0) * PIXELS` and the next ones, all 16 channels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    image = pixel // (rows * columns)
    within = (pixel % (rows * columns)).to(tl.int32)
    channel = tl.arange(0, 16)[None, :]
    part = channel // 3
    y = (2 * (within // columns) - 4)[:, None] + part // 2
    x = (2 * (within % columns) - 4)[:, None] + part % 2
    inside = (
        (pixel < pixels)[:, None]
        & (channel < 12)
        & (y >= 0)
        & (y < height)
        & (x >= 0)
        & (x < width)
    )
    source = (
        image[:, None] * image_stride
        + channel % 3 * channel_stride
        + y * row_stride
        + x * column_stride
    )
    value = tl.load(images_ptr + source, mask=inside, other=0.0)
    tl.store(out_ptr + pixel[:, None] * 16 + channel, value, mask=(pixel < pixels)[:, None])
