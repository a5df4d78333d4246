"""The gradients of stem_pool.py, which describes formulas, traffic and launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import launch_key
from .batch_norm_backward import sums_kernel
from .batch_norm_parts import parameters
from .launch import launch
from .memory import load, store
from .stem_pool import Plan, tile_of_program


def backward(
    gradient: Tensor,
    x: Tensor,
    taken: Tensor,
    codes: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    x_gradient: Tensor,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    sums: Tensor,
    partials: Tensor,
    tickets: Tensor,
    chosen: Plan,
    *,
    groups: int,
) -> None:
    """Writes the gradients that are given. Does not allocate or synchronise.

    Args:
        gradient: of y, in y's dtype and layout.
        x, taken, codes, weight, bias, statistics: as in forward.
        x_gradient: as x. weight_gradient, bias_gradient: (C,), contiguous, or None.
        sums: (2, G, C) float32 of any content.
        partials, tickets: as in batch_norm.py, for `chosen.sums`.
    """
    images, channels, height, width = x.shape
    windows = taken.numel() // (groups * channels)
    by_parameters = weight_gradient, bias_gradient
    with torch.cuda.device_of(x):
        reduce = chosen.sums.reduce | {"RELU": True}
        given = (gradient, taken, None, weight, bias, statistics, None, *by_parameters)
        tensors: tuple[Any, ...] = (*given, sums, partials)
        key = launch_key(tensors, (groups, reduce))
        arguments: tuple[Any, ...] = (*tensors, tickets, windows)
        grid = (chosen.sums.parts, chosen.sums.strips, groups)
        launch(sums_kernel, key and ("pooled sums", *key), grid, arguments, reduce)
        tensors = (gradient, x, codes, weight, bias, statistics, sums, x_gradient)
        key = launch_key(tensors, (chosen.gradient,))
        # The sums were divided by the windows, not by the pixels.
        share = windows * groups * channels / x.numel()
        arguments = (*tensors, share, images // groups, height, width)
        grid = (chosen.gradient_tiles, chosen.strips, 1)
        launch(gradient_kernel, key and ("pool gradient", *key), grid, arguments, chosen.gradient)


@triton.jit(do_not_specialize=["per_group", "height", "width"])
def gradient_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    code_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    x_gradient_ptr: tl.tensor,
    share: tl.float32,
    per_group: tl.int32,
    height: tl.int32,
    width: tl.int32,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    LAST_FIRST: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """The pixels (2i .. 2i + 1, 2j .. 2j + 1) of windows (i, j) as in forward."""
    down, across = (height + 1) // 2, (width + 1) // 2
    image, group, first, j = tile_of_program(
        down, across, per_group, GROUPS, BLOCK_W, ROWS, LAST_FIRST
    )
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = (column < C)[None, :]
    mean, scale, _ = parameters(statistics_ptr, weight_ptr, bias_ptr, group, column, C, GROUPS)
    constant = -scale * share * tl.load(sums_ptr + group * C + column, mask=column < C, other=0.0)
    product = tl.load(sums_ptr + (GROUPS + group) * C + column, mask=column < C, other=0.0)
    by_x = -scale * share * product
    # In 8 or 11 bits of x deviations are left only while the mean is less than 2^8 or 2^11 of them:
    # it can be multiplied before it is subtracted, which saves eight registers.
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        constant -= by_x * mean
        mean = None
    pixels = image * height * width * C + (2 * j)[:, None] * C + column[None, :]
    windows = image * down * across * C + j[:, None] * C + column[None, :]
    in_row = (j < across)[:, None] & is_channel
    next_in_row = (j + 1 < across)[:, None] & is_channel
    at = windows + first.to(tl.int64) * across * C
    g, code = _window(gradient_ptr, code_ptr, at, in_row & (first < down))
    g_right, code_right = _window(gradient_ptr, code_ptr, at + C, next_in_row & (first < down))
    for step in range(ROWS):
        i = first + step
        at = windows + (i + 1).to(tl.int64) * across * C
        g_below, code_below = _window(gradient_ptr, code_ptr, at, in_row & (i + 1 < down))
        g_next, code_next = _window(gradient_ptr, code_ptr, at + C, next_in_row & (i + 1 < down))
        at = pixels + (2 * i).to(tl.int64) * width * C
        below = at + width.to(tl.int64) * C
        # Rows 2i of all windows exist, and columns 2j.
        used = in_row & (i < down)
        used_right = (2 * j + 1 < width)[:, None] & is_channel & (i < down)
        used_below, used_next = used & (2 * i + 1 < height), used_right & (2 * i + 1 < height)
        x = load(x_ptr + at, used, FULL)
        x_right = load(x_ptr + at + C, used_right, FULL)
        x_below = load(x_ptr + below, used_below, FULL)
        x_next = load(x_ptr + below + C, used_next, FULL)
        dz = _taken(g, code, 4)
        dx = _gradient(dz, x, mean, scale, by_x, constant)
        store(x_gradient_ptr + at, dx, used, FULL)
        dz = _taken(g, code, 5) + _taken(g_right, code_right, 3)
        dx = _gradient(dz, x_right, mean, scale, by_x, constant)
        store(x_gradient_ptr + at + C, dx, used_right, FULL)
        dz = _taken(g, code, 7) + _taken(g_below, code_below, 1)
        dx = _gradient(dz, x_below, mean, scale, by_x, constant)
        store(x_gradient_ptr + below, dx, used_below, FULL)
        dz = _taken(g, code, 8) + _taken(g_right, code_right, 6)
        dz += _taken(g_below, code_below, 2) + _taken(g_next, code_next, 0)
        dx = _gradient(dz, x_next, mean, scale, by_x, constant)
        store(x_gradient_ptr + below + C, dx, used_next, FULL)
        g, code, g_right, code_right = g_below, code_below, g_next, code_next


@triton.jit
def _window(
    gradient_ptr: tl.tensor, code_ptr: tl.tensor, at: tl.tensor, used: tl.tensor
) -> tl.tuple:
    """A window's gradient and code; windows that do not exist have taken nothing."""
    gradient = tl.load(gradient_ptr + at, mask=used, other=0.0)
    return gradient, tl.load(code_ptr + at, mask=used, other=255)


@triton.jit
def _taken(gradient: tl.tensor, code: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    return tl.where(code == CODE, gradient.to(tl.float32), 0.0)


@triton.jit
def _gradient(
    dz: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    by_x: tl.tensor,
    constant: tl.tensor,
) -> tl.tensor:
    x = x.to(tl.float32)
    if mean is not None:
        x -= mean[None, :]
    return scale[None, :] * dz + (by_x[None, :] * x + constant[None, :])
