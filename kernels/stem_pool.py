"""BatchNorm of several groups of images, ReLU and a 3 x 3 max-pool of stride 2: how the stem of a
ResNet ends.

For images x (N, C, H, W), channels_last, in G groups of consecutive images, with the statistics of
batch_norm.py:

    z = (x - mean) invstd weight + bias                       of a group and channel
    y[i, j] = relu(max z[r, s])       over the existing r, s with |r - 2i| <= 1 and |s - 2j| <= 1
    dz[r, s] = sum of dy[i, j] over the windows, at most four, that took z[r, s] and where y[i, j] >
    0
    dbias = sum dz,   dweight = sum dz (x - mean) invstd      both added up over the groups
    dx = weight invstd (dz - mean(dz) - (x - mean) invstd^2 mean(dz (x - mean)))

z rises with x, or falls where the weight is negative: the maximum is taken of x or of -x, and only
what is left is normalised. Of equal values the first one is taken, as in PyTorch; where the weight
is 0, the largest x.

Kept for backward: of every window the x that it took, and a code of a byte, 3 (row in the window) +
column, or 255 where the ReLU let nothing through. Sums over dz need these values alone, a quarter
of x.

Traffic. A unit is N C H W elements of two bytes. Forward: x is read for the statistics and read
again; y, the values and codes are written: 2 + 1/4 + 1/4 + 1/8 units. Backward: dy and the values
are read for the sums; x, dy and codes are read and dx is written: 1/2 + 2 + 1/4 + 1/8 units. Rows
that two programs need are read twice, from L2.

Shape of the launches. A program has a strip of at most 64 channels and a stretch of a row of
windows, one vector of 16 bytes for each thread, and takes ROWS rows of windows one after the other.
Forward: the lowest row of x in a window is the highest of the next one; its maxima across three
columns stay in registers, and two rows of every window are new. Backward: windows that take from
the 2 x 2 elements [2i .. 2i + 1, 2j .. 2j + 1] are (i, j), (i, j + 1), (i + 1, j) and (i + 1, j +
1), nine comparisons of codes for four elements; those of row i + 1 are kept for the next one.
Images are taken from the last one of each group to the first: the statistics have just read the
last ones, and what the L2 cache holds of them is read from there. Sums are those of batch_norm.py
and batch_norm_backward.py, in a fixed order. On an H200 with (128, 64, 64, 64) in bfloat16 forward
takes 60 us and backward 67, 2.9 TB/s; PyTorch's three layers 920 in all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_norm
from .batch_norm import launch_key, statistics_kernel
from .batch_norm_parts import parameters
from .launch import launch
from .memory import load, store

COLUMNS = 64
"""Most channels of a program: 128 bytes of bfloat16 from each pixel, a whole cache line."""
POOL_WARPS, POOL_ROWS, POOL_BYTES, POOL_REGISTERS = 4, 4, 16, 128
"""Forward: a program's warps and rows of windows, a thread's bytes of a load and most registers."""
GRADIENT_WARPS, GRADIENT_ROWS, GRADIENT_BYTES, GRADIENT_REGISTERS = 4, 4, 16, 168
"""Backward. Up to 166 registers are used; of 128 some would be spilled."""
LAST_FIRST = True  # the images of a group


class Plan(NamedTuple):
    """Numbers of programs, and their compile-time arguments."""

    statistics: batch_norm.Plan
    sums: batch_norm.Plan
    strips: int
    pool_tiles: int  # programs of a strip
    gradient_tiles: int
    pool: dict[str, int | bool]  # compile-time arguments and compiler options
    gradient: dict[str, int | bool]


@lru_cache(maxsize=64)
def plan(
    images: int,
    channels: int,
    height: int,
    width: int,
    groups: int,
    itemsize: int,
    multiprocessors: int,
) -> Plan:
    """The launches for images of these sizes. Empty the cache after a change of the constants
    above."""
    across, down = pooled(width), pooled(height)
    per_group = images // groups
    sizes = channels, groups, itemsize
    statistics = _reduction(per_group * height * width, *sizes, 1, multiprocessors)
    sums = _reduction(per_group * down * across, *sizes, 2, multiprocessors)
    columns = min(triton.next_power_of_2(channels), COLUMNS)
    launches = []
    of_pool = POOL_WARPS, POOL_ROWS, POOL_BYTES, POOL_REGISTERS, True
    even_sides = height % 2 == width % 2 == 0
    of_gradient = GRADIENT_WARPS, GRADIENT_ROWS, GRADIENT_BYTES, GRADIENT_REGISTERS, even_sides
    for warps, rows, nbytes, registers, even in (of_pool, of_gradient):
        # One vector a thread: of more, codes and elements would be laid out differently.
        stretch = max(1, 32 * warps * nbytes // (itemsize * columns))
        while warps > 1 and stretch >= 2 * across:
            warps, stretch = warps // 2, stretch // 2
        full = even and across % stretch == down % rows == channels % columns == 0
        tiles = images * triton.cdiv(down, rows) * triton.cdiv(across, stretch)
        constants = {"C": channels, "BLOCK_C": columns, "GROUPS": groups}
        constants |= {"BLOCK_W": stretch, "ROWS": rows}
        options = {"LAST_FIRST": LAST_FIRST, "FULL": full, "num_warps": warps, "maxnreg": registers}
        launches.append((tiles, constants | options))
    (pool_tiles, pool), (gradient_tiles, gradient) = launches
    return Plan(
        statistics, sums, triton.cdiv(channels, columns), pool_tiles, gradient_tiles, pool, gradient
    )


def _reduction(rows: int, *sizes: int) -> batch_norm.Plan:
    """A launch that only sums; of few rows, which a BatchNorm takes in one launch, by one program a
    strip."""
    chosen = batch_norm.plan(rows, *sizes)
    if chosen.single:
        chosen = batch_norm.plan(1 << 24, *sizes)
        chosen = chosen._replace(parts=1, reduce=chosen.reduce | {"FULL": False})
    return chosen


def pooled(size: int) -> int:
    """Windows along a side."""
    return (size + 1) // 2


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    y: Tensor,
    taken: Tensor,
    codes: Tensor,
    statistics: Tensor,
    partials: Tensor,
    tickets: Tensor,
    chosen: Plan,
    *,
    groups: int,
    momentum: float,
    eps: float,
) -> None:
    """Writes y, what backward needs and the statistics; updates the running ones. Does not allocate
    or synchronise.

    Args:
        x: (N, C, H, W), contiguous in channels_last, N divisible by the groups.
        weight, bias, running_mean, running_var: (C,), contiguous, or None, the running ones both.
        y, taken, codes: (N, C, pooled(H), pooled(W)) in x's layout; the codes are uint8, y and
            taken of x's dtype.
        statistics: (3, G, C) float32: mean, invstd and the unbiased variance. Overwritten.
        partials, tickets: as in batch_norm.py, for `chosen.statistics`; `chosen` is of `plan`.
    """
    images, channels, height, width = x.shape
    rows = x.numel() // (groups * channels)
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(x):
        reduce = chosen.statistics.reduce
        tensors: tuple[Any, ...] = (x, running_mean, running_var, statistics, partials)
        key = launch_key(tensors, (groups, reduce))
        arguments: tuple[Any, ...] = (*tensors, tickets, rows, momentum, eps)
        grid = (chosen.statistics.parts, chosen.statistics.strips, groups)
        launch(statistics_kernel, key and ("statistics", *key), grid, arguments, reduce)
        tensors = (x, weight, bias, statistics, y, taken, codes)
        key = launch_key(tensors, (chosen.pool,))
        arguments = (*tensors, images // groups, height, width)
        grid = (chosen.pool_tiles, chosen.strips, 1)
        launch(pool_kernel, key and ("pool", *key), grid, arguments, chosen.pool)


@triton.jit(do_not_specialize=["per_group", "height", "width"])
def pool_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    y_ptr: tl.tensor,
    taken_ptr: tl.tensor,
    code_ptr: tl.tensor,
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
    """Rows ROWS * i .. of windows, BLOCK_W of each, in the channels of strip `program_id(1)`."""
    down, across = (height + 1) // 2, (width + 1) // 2
    image, group, first, j = tile_of_program(
        down, across, per_group, GROUPS, BLOCK_W, ROWS, LAST_FIRST
    )
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = parameters(statistics_ptr, weight_ptr, bias_ptr, group, column, C, GROUPS)
    sign = tl.where(scale < 0.0, -1.0, 1.0)[None, :]
    x_ptr += image * height * width * C + column[None, :]
    to_window = (image * down * across + j)[:, None] * C + column[None, :]
    is_window = (j < across)[:, None] & (column < C)[None, :]
    # Pixels beyond the border are replaced by their neighbours in the window: those on the right
    # and below come after them and change nothing; those on the left come before, but get their
    # codes.
    last = width - 1
    left = (tl.minimum(tl.maximum(2 * j - 1, 0), last) * C)[:, None]
    middle = (tl.minimum(2 * j, last) * C)[:, None]
    right = (tl.minimum(2 * j + 1, last) * C)[:, None]
    left_code = tl.where(j == 0, 1, 0)[:, None] + tl.zeros([BLOCK_W, BLOCK_C], tl.int32)
    is_channel = (column < C)[None, :]
    WHOLE: tl.constexpr = C % BLOCK_C == 0
    row = tl.maximum(2 * first - 1, 0).to(tl.int64) * width * C
    top, top_code = _across(x_ptr + row, left, middle, right, sign, left_code, is_channel, WHOLE)
    top = tl.where(first == 0, -float("inf"), top)
    for step in range(ROWS):
        i = first + step
        row = tl.minimum(2 * i, height - 1).to(tl.int64) * width * C
        best, code = _across(x_ptr + row, left, middle, right, sign, left_code, is_channel, WHOLE)
        row = tl.minimum(2 * i + 1, height - 1).to(tl.int64) * width * C
        bottom, bottom_code = _across(
            x_ptr + row, left, middle, right, sign, left_code, is_channel, WHOLE
        )
        code = tl.where(best > top, code + 3, top_code)
        best = tl.maximum(best, top)
        code = tl.where(bottom > best, bottom_code + 6, code)
        best = tl.maximum(bottom, best) * sign
        z = (best - mean[None, :]) * scale[None, :] + bias[None, :]
        code = tl.where(z <= 0.0, 255, code)
        z = tl.where(z <= 0.0, 0.0, z)  # lets NaN through, as torch does
        window = i.to(tl.int64) * across * C + to_window
        used = is_window & (i < down)
        store(y_ptr + window, z, used, FULL)
        store(taken_ptr + window, best, used, FULL)
        store(code_ptr + window, code, used, FULL)
        top, top_code = bottom, bottom_code


@triton.jit
def tile_of_program(
    down: tl.tensor,
    across: tl.tensor,
    per_group: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    LAST_FIRST: tl.constexpr,
) -> tl.tuple:
    """Image (int64), its group, the first row of windows and the places in it that this program
    takes."""
    tile = tl.program_id(0)
    stretches, blocks = tl.cdiv(across, BLOCK_W), tl.cdiv(down, ROWS)
    j = tile % stretches * BLOCK_W + tl.arange(0, BLOCK_W)
    tile //= stretches
    first = tile % blocks * ROWS
    image = tile // blocks
    if LAST_FIRST:
        group = image % GROUPS
        image = group * per_group + per_group - 1 - image // GROUPS
    else:
        group = image // per_group
    return image.to(tl.int64), group, first, j


@triton.jit
def _across(
    row: tl.tensor,
    left: tl.tensor,
    middle: tl.tensor,
    right: tl.tensor,
    sign: tl.tensor,
    left_code: tl.tensor,
    used: tl.tensor,
    FULL: tl.constexpr,
) -> tl.tuple:
    """The largest of three neighbours times the sign, and which of them it is, the first one of
    equals."""
    at_left = load(row + left, used, FULL)
    at_middle = load(row + middle, used, FULL)
    at_right = load(row + right, used, FULL)
    best = at_left.to(tl.float32) * sign
    other = at_middle.to(tl.float32) * sign
    code = tl.where(other > best, 1, left_code)
    best = tl.maximum(other, best)
    other = at_right.to(tl.float32) * sign
    code = tl.where(other > best, 2, code)
    return tl.maximum(other, best), code
