"""BatchNorm of several groups of rows, an addition and a ReLU: statistics and result in two
launches, or in one.

For rows x_r (R of them in each of G groups, C channels), a residual s and in each group and channel

    mean = sum x / R,   var = sum (x - mean)^2 / R,   invstd = 1 / sqrt(var + eps)
    y    = relu((x - mean) invstd weight + bias + s)

and for a gradient g of y, where h is what the ReLU takes and g' = g where h > 0, else 0,

    ds    = g',    dbias = sum g',    dweight = sum g' (x - mean) invstd    added up over the groups
    dx    = weight invstd (g' - mean(g') - (x - mean) invstd^2 mean(g' (x - mean)))

Sums, statistics and arithmetic are fp32; every result is rounded once. A group is a view: its rows
are those of one pass, and running statistics take the groups in turn as they would the passes.
Images in channels_last are rows of channels.

Traffic. A unit is G R C elements. Forward: x is read for the statistics, and read again to write y:
3 units, 4 with a residual. Backward: g and x are read for the sums, and again to write dx: 5 units;
whether the ReLU passed follows from x, with the arithmetic of forward. With a residual it does not:
y is read as well, and g' is written with the sums, since it is what the residual receives, and read
in the place of g: 7 units. What fits in the L2 cache is read again from there.

Shape of the launches. The statistics' programs take strips of at most 64 channels, each a share of
a group's rows in turn. A tile is STEPS blocks (BLOCK_R, BLOCK_C), each of them one 16-byte load of
every thread, and all under way before they are added: a thread has sums of its own, and only the
last ones of a program cross threads. Sums of squares are those of x minus the group's first row,
which all programs subtract: where the mean is large nothing cancels, as long as that row is no
outlier of tens of deviations. The program of a strip that comes last (a ticket that is left at 0)
adds up what the others have stored, in a fixed order, and updates the running statistics group by
group. The second launch has no sums and takes a tile per program.

Where all groups' rows of a narrow strip fit into the registers of one program, as in heads, a
single launch reads them once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_parts import add_parts, column_of, is_last, parameters
from .launch import aligned, launch
from .memory import load, store

COLUMNS = 64
"""Most channels of a strip: 128 bytes of bfloat16 from each row, whole cache lines."""
REDUCE_WARPS, REDUCE_LOADS, REDUCE_PROGRAMS = 8, 8, 2
"""A reduction program's warps, the 16-byte loads a thread has under way, and programs per
multiprocessor."""
APPLY_WARPS, APPLY_LOADS = 4, 4
"""An elementwise program's warps, and the 16-byte loads of a thread from each tensor."""
SINGLE_BYTES, SINGLE_ELEMENTS, SINGLE_PER_THREAD = 32, 1 << 14, 16
"""A single launch's bytes of a row in a strip, a whole sector (half of one where more would be too
much for a program); most elements of a program; elements of a thread.

On an H200 none of 12 other settings of these constants was more than 1 % faster over ResNet-18's
shapes for two views of 64 images of 128 pixels in bfloat16. At the largest, 262,144 rows of 64
channels a view, forward takes 63 us and backward 94 us: 3.2 and 3.6 TB/s, where a copy moves 4.3.
Small ones cost their latency: 8 us each way at 1,024 rows of 512 channels."""
_MOST_WARPS = 16
_FINAL_LOADS = 8


class Plan(NamedTuple):
    """Numbers of programs, and their compile-time arguments."""

    single: bool
    strips: int
    parts: int
    """Programs of a strip and group that sum; each leaves two numbers per channel for the last one.
    """
    tiles: int
    """Programs of a strip and group that do not sum."""
    reduce: dict[str, int | bool]
    """Compile-time arguments and compiler options of the launch that sums, the only one if it is
    single."""
    apply: dict[str, int | bool]


@lru_cache(maxsize=512)
def plan(
    rows: int, channels: int, groups: int, itemsize: int, tensors: int, multiprocessors: int
) -> Plan:
    """The launches for `groups` times `rows` rows; `tensors` is how many of that size are read for
    the sums."""
    block_g, block_r = triton.next_power_of_2(groups), triton.next_power_of_2(rows)
    narrow = min(triton.next_power_of_2(channels), max(1, SINGLE_BYTES // itemsize))
    if block_g * block_r * narrow > SINGLE_ELEMENTS:
        narrow = min(narrow, 16 // itemsize)
    elements = block_g * block_r * narrow
    if elements <= SINGLE_ELEMENTS:
        warps = max(1, min(_MOST_WARPS, elements // (32 * SINGLE_PER_THREAD)))
        full = rows == block_r and groups == block_g and channels % narrow == 0
        single = {"C": channels, "GROUPS": groups, "BLOCK_G": block_g, "BLOCK_R": block_r}
        single |= {"BLOCK_C": narrow, "FULL": full, "num_warps": warps}
        return Plan(True, triton.cdiv(channels, narrow), 1, 1, single, {})
    columns = min(triton.next_power_of_2(channels), COLUMNS)
    strips = triton.cdiv(channels, columns)
    per_load = max(1, REDUCE_WARPS * 32 * 16 // (itemsize * columns))
    loads = triton.next_power_of_2(max(1, REDUCE_LOADS // tensors))
    steps = loads
    if tensors == 3:  # with a store in every step, which no load passes: one step of larger blocks
        per_load, steps = per_load * loads, 1
    tiles = triton.cdiv(rows, steps * per_load)
    # As many turns for every program as for the one that has most.
    turns = triton.cdiv(tiles, max(1, multiprocessors * REDUCE_PROGRAMS // (strips * groups)))
    parts = triton.cdiv(tiles, turns)
    whole = channels % columns == 0
    common = {"C": channels, "BLOCK_C": columns}
    reduce = common | {
        "GROUPS": groups,
        "STEPS": steps,
        "BLOCK_R": per_load,
        "FULL": whole and rows % (steps * per_load) == 0,
        "FINAL_STEPS": _FINAL_LOADS,
        "FINAL_R": max(1, REDUCE_WARPS * 32 * 4 // columns),
        "num_warps": REDUCE_WARPS,
    }
    tile = max(1, APPLY_WARPS * 32 * 16 // (itemsize * columns)) * APPLY_LOADS
    apply = common | {
        "GROUPS": groups,
        "BLOCK_R": tile,
        "FULL": whole and rows % tile == 0,
        "num_warps": APPLY_WARPS,
    }
    return Plan(False, strips, parts, triton.cdiv(rows, tile), reduce, apply)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    partials: Tensor | None,
    tickets: Tensor | None,
    chosen: Plan,
    *,
    groups: int,
    relu: bool,
    momentum: float,
    eps: float,
) -> None:
    """Writes y and the statistics, and updates the running ones. Does not allocate, synchronise or
    check anything.

    Args:
        x, residual, y: G R C elements of one dtype, contiguous as rows of channels.
        weight, bias, running_mean, running_var: (C,), contiguous, or None, the running ones both.
        statistics: (3, G, C) float32: mean, invstd and the unbiased variance. Overwritten.
        partials: float32, (G, parts, 2, C) elements of any content, and tickets: int32, an element
            per strip, 0 and left 0, which no other launch may use at the same time. Both only if
            the plan is not for a single launch.
        chosen: of `plan`, with one tensor.
        groups, relu, momentum, eps: as in the formulas.
    """
    channels = statistics.shape[2]
    rows = x.numel() // (groups * channels)
    tensors = (x, residual, weight, bias, running_mean, running_var, y, statistics, partials)
    key = launch_key(tensors, (groups, relu, chosen.reduce, chosen.apply))
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(x):
        if chosen.single:
            arguments: tuple[Any, ...] = (*tensors[:-1], rows, momentum, eps)
            constants = chosen.reduce | {"RELU": relu}
            grid = (chosen.strips, 1, 1)
            launch(single_kernel, key and ("single", *key), grid, arguments, constants)
            return
        running = (running_mean, running_var)
        arguments = (x, *running, statistics, partials, tickets, rows, momentum, eps)
        grid = (chosen.parts, chosen.strips, groups)
        launch(statistics_kernel, key and ("statistics", *key), grid, arguments, chosen.reduce)
        arguments = (x, residual, weight, bias, statistics, y, rows)
        grid = (chosen.tiles, chosen.strips, groups)
        constants = chosen.apply | {"RELU": relu}
        launch(normalise_kernel, key and ("normalise", *key), grid, arguments, constants)


def launch_key(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Key of the machine code for launches with these tensors; None where Triton must look at
    addresses."""
    if not aligned(tensors):
        return None
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
    parts = (tuple(x.items()) if isinstance(x, dict) else x for x in rest)
    return (tensors[0].device, dtypes, *parts)  # type: ignore[union-attr]


@triton.jit(do_not_specialize=["ticket_ptr", "rows"])
def statistics_kernel(
    x_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    ticket_ptr: tl.tensor,
    rows: tl.int64,
    momentum: tl.float32,
    eps: tl.float32,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FULL: tl.constexpr,
    FINAL_STEPS: tl.constexpr,
    FINAL_R: tl.constexpr,
) -> None:
    """Tiles `program_id(0)`, + `num_programs(0)`, .. of strip `program_id(1)` of group
    `program_id(2)`."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2).to(tl.int64)
    x_ptr += group * rows * C
    shift = tl.load(x_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    in_block = tl.arange(0, BLOCK_R)[:, None]
    start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_R)
    while start < rows:
        for step in tl.static_range(STEPS):
            row = start + (step * BLOCK_R + in_block)
            used = (row < rows) & (column < C)[None, :]
            x = load(x_ptr + row * C + column[None, :], used, FULL).to(tl.float32) - shift
            if not FULL:
                x = tl.where(used, x, 0.0)
            sums += x
            squares += x * x
        start += tl.num_programs(0) * (STEPS * BLOCK_R)

    parts = tl.num_programs(0)
    mine = partials_ptr + (group * parts + tl.program_id(0)) * (2 * C) + column
    tl.store(mine, tl.sum(sums, axis=0), mask=column < C)
    tl.store(mine + C, tl.sum(squares, axis=0), mask=column < C)
    if is_last(ticket_ptr):
        share, unbiased_share = 1.0 / rows.to(tl.float32), 1.0 / (rows - 1).to(tl.float32)
        if running_mean_ptr is not None:
            running_mean = column_of(running_mean_ptr, column, C, 0.0)
            running_var = column_of(running_var_ptr, column, C, 0.0)
        for g in tl.static_range(GROUPS):
            first = x_ptr + (g - group) * rows * C + column
            first_row = tl.load(first, mask=column < C, other=0.0).to(tl.float32)
            total, square = add_parts(
                partials_ptr, g, parts, column, C, BLOCK_C, FINAL_STEPS, FINAL_R
            )
            offset = total * share
            mean = first_row + offset
            # Rounding may leave less than nothing of a constant channel's.
            scatter = square - total * offset
            scatter = tl.where(scatter < 0.0, 0.0, scatter)
            unbiased = scatter * unbiased_share
            to = statistics_ptr + g * C + column
            tl.store(to, mean, mask=column < C)
            tl.store(to + GROUPS * C, tl.rsqrt(scatter * share + eps), mask=column < C)
            tl.store(to + 2 * GROUPS * C, unbiased, mask=column < C)
            if running_mean_ptr is not None:
                running_mean = (1.0 - momentum) * running_mean + momentum * mean
                running_var = (1.0 - momentum) * running_var + momentum * unbiased
        if running_mean_ptr is not None:
            tl.store(running_mean_ptr + column, running_mean, mask=column < C)
            tl.store(running_var_ptr + column, running_var, mask=column < C)


@triton.jit(do_not_specialize=["rows"])
def normalise_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.int64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FULL: tl.constexpr,
    RELU: tl.constexpr,
) -> None:
    """Tile `program_id(0)` of strip `program_id(1)` of group `program_id(2)`."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    element = (group * rows + row) * C + column[None, :]
    used = (row < rows) & (column < C)[None, :]
    x = load(x_ptr + element, used, FULL)
    if residual_ptr is not None:
        residual = load(residual_ptr + element, used, FULL)
    mean, scale, bias = parameters(statistics_ptr, weight_ptr, bias_ptr, group, column, C, GROUPS)
    h = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        h += residual.to(tl.float32)
    if RELU:
        h = tl.where(h <= 0.0, 0.0, h)  # propagates NaN, as torch does
    store(y_ptr + element, h, used, FULL)


@triton.jit(do_not_specialize=["rows"])
def single_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    y_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    rows: tl.int64,
    momentum: tl.float32,
    eps: tl.float32,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    RELU: tl.constexpr,
) -> None:
    """Strip `program_id(0)` of all groups."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)[:, None]
    row = tl.arange(0, BLOCK_R)[None, :, None].to(tl.int64)
    element = (g[:, :, None] * rows + row) * C + column[None, None, :]
    used = (g < GROUPS)[:, :, None] & (row < rows) & (column < C)[None, None, :]
    x = load(x_ptr + element, used, FULL).to(tl.float32)
    if residual_ptr is not None:
        residual = load(residual_ptr + element, used, FULL)
    weight = column_of(weight_ptr, column, C, 1.0)
    bias = column_of(bias_ptr, column, C, 0.0)
    share, unbiased_share = 1.0 / rows.to(tl.float32), 1.0 / (rows - 1).to(tl.float32)
    # A sum of what the first row differs by loses nothing where the mean is large.
    is_real = (g < GROUPS) & (column < C)[None, :]
    shift = tl.load(x_ptr + g * rows * C + column[None, :], mask=is_real, other=0.0).to(tl.float32)
    differences = x - shift[:, None, :]
    if not FULL:
        differences = tl.where(used, differences, 0.0)
    mean = shift + tl.sum(differences, axis=1) * share
    x -= mean[:, None, :]
    squares = x * x
    if not FULL:
        squares = tl.where(used, squares, 0.0)
    scatter = tl.sum(squares, axis=1)
    unbiased = scatter * unbiased_share
    invstd = tl.rsqrt(scatter * share + eps)
    h = x * (invstd * weight[None, :])[:, None, :] + bias[None, None, :]
    if residual_ptr is not None:
        h += residual.to(tl.float32)
    if RELU:
        h = tl.where(h <= 0.0, 0.0, h)
    store(y_ptr + element, h, used, FULL)
    to = statistics_ptr + g * C + column[None, :]
    tl.store(to, mean, mask=is_real)
    tl.store(to + GROUPS * C, invstd, mask=is_real)
    tl.store(to + 2 * GROUPS * C, unbiased, mask=is_real)
    if running_mean_ptr is not None:
        running_mean = column_of(running_mean_ptr, column, C, 0.0)
        running_var = column_of(running_var_ptr, column, C, 0.0)
        for i in tl.static_range(GROUPS):
            group_mean = tl.sum(tl.where(g == i, mean, 0.0), axis=0)
            group_var = tl.sum(tl.where(g == i, unbiased, 0.0), axis=0)
            running_mean = (1.0 - momentum) * running_mean + momentum * group_mean
            running_var = (1.0 - momentum) * running_var + momentum * group_var
        tl.store(running_mean_ptr + column, running_mean, mask=column < C)
        tl.store(running_var_ptr + column, running_var, mask=column < C)
