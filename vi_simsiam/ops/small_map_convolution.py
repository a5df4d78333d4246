"""Convolutions with a result of few positions, as matrix products, on CPUs.

On a map of 2x2 pixels most taps of a 3x3 kernel meet the padding, on one of 1x1 all but one do, and
a library's convolution multiplies all of them. Here every row of the kernel multiplies the pixels
that it meets. In channels_last both are rows of matrices in place: no weight is copied, and the
weight's gradient has the weight's layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vi_simsiam.ops.backends import check_storage

_MOST_POSITIONS = 4
_LAYOUT = torch.channels_last
_Pair = tuple[int, int]


def takes(x: Tensor, convolution: nn.Conv2d) -> bool:
    """True if `small_map_convolution` computes this convolution of x, and faster than torch."""
    rest = convolution.dilation, convolution.groups, convolution.bias, convolution.padding_mode
    padding = convolution.padding
    if rest != ((1, 1), 1, None, "zeros") or isinstance(padding, str) or x.device.type != "cpu":
        return False
    rows, columns = _windows(x.shape[2:], convolution.kernel_size, convolution.stride, padding)
    return (
        0 < len(rows) * len(columns) <= _MOST_POSITIONS
        and convolution.weight.is_contiguous(memory_format=_LAYOUT)
        and not torch.compiler.is_compiling()
    )


def small_map_convolution(x: Tensor, weight: Tensor, stride: _Pair, padding: _Pair) -> Tensor:
    """`conv2d(x, weight, stride=stride, padding=padding)`, once differentiable.

    Sums are taken in float32 or float64. Autocast rounds x, weight and result to its dtype.

    Args:
        x: (N, I, height, width), in channels_last to be fast.
        weight: (O, I, height, width) in channels_last.
        stride, padding: for height and width.

    Returns:
        (N, O, height, width) in channels_last.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    x, weight = (each.to(dtype).to(wide) for each in (x, weight))
    y: Tensor = _SmallMapConvolution.apply(x, weight, stride, padding)
    return y.to(dtype)


def _windows(
    sizes: torch.Size, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> list[list[tuple[int, int, int]]]:
    """For height and width, for every position of the result: the first pixel and the first tap
    that meet, and how many do."""
    windows = []
    for size, taps, step, pad in zip(sizes, kernel, stride, padding, strict=True):
        starts = range(-pad, size + pad - taps + 1, step)
        meeting = [(max(start, 0), min(start + taps, size), start) for start in starts]
        windows.append([(first, first - at, max(end - first, 0)) for first, end, at in meeting])
    return windows


def _products(
    x: Tensor, weight: Tensor, y: Tensor, stride: _Pair, padding: _Pair
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Matrices x (N, K), weight (O, K) and y (N, O) of every position and row of the kernel: the
    convolution adds x weight^T to y.

    Those of channels_last tensors are views.
    """
    rows, columns = _windows(x.shape[2:], tuple(weight.shape[2:]), stride, padding)
    x, weight, y = (each.permute(0, 2, 3, 1) for each in (x, weight, y))
    for (i, (top, tap, height)), (j, (left, first, width)) in product(
        enumerate(rows), enumerate(columns)
    ):
        pixels, taps = x[:, :, left : left + width], weight[:, :, first : first + width]
        for row in range(height):
            yield pixels[:, top + row].flatten(1), taps[:, tap + row].flatten(1), y[:, i, j]


class _SmallMapConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: _Pair, padding: _Pair) -> Tensor:
        check_storage("x", x)
        check_storage("weight", weight)
        ctx.save_for_backward(x, weight)
        ctx.numbers = stride, padding
        rows, columns = _windows(x.shape[2:], tuple(weight.shape[2:]), stride, padding)
        y = x.new_zeros((len(x), len(rows), len(columns), len(weight))).permute(0, 3, 1, 2)
        for pixels, taps, result in _products(x, weight, y, *ctx.numbers):
            result.addmm_(pixels, taps.t())
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = None, None
        if ctx.needs_input_grad[0]:
            by_x = torch.zeros_like(x, memory_format=_LAYOUT)
            for pixels, taps, result in _products(by_x, weight, gradient, *ctx.numbers):
                pixels.addmm_(result, taps)
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight, memory_format=_LAYOUT)
            for pixels, taps, result in _products(x, by_weight, gradient, *ctx.numbers):
                taps.addmm_(result.t(), pixels)
        return by_x, by_weight, None, None
