"""The gradients of batch_norm.py, where formulas, traffic and the shape of the launches are
described."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import Plan, launch_key
from .batch_norm_parts import add_parts, column_of, is_last, parameters
from .launch import launch
from .memory import load, store


def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    x_gradient: Tensor,
    residual_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    sums: Tensor | None,
    partials: Tensor | None,
    tickets: Tensor | None,
    chosen: Plan,
    *,
    groups: int,
    relu: bool,
) -> None:
    """Writes the gradients that are given. Does not allocate, synchronise or check anything.

    Args:
        gradient: of y; like x, x_gradient and residual_gradient G R C elements of one dtype,
            contiguous.
        y: what forward wrote, and residual_gradient: both for a ReLU with a residual, else None.
            Without a ReLU the residual's gradient is y's.
        weight, bias, statistics: as in forward.
        weight_gradient, bias_gradient: (C,), contiguous, or None.
        sums: (2, G, C) float32 of any content; like partials and tickets, which are as in forward,
            only if the plan is not for a single launch.
        chosen: of `plan`, with two tensors, three with y.
        groups, relu: as in forward.
    """
    channels = statistics.shape[2]
    rows = x.numel() // (groups * channels)
    by_parameters = (weight_gradient, bias_gradient)
    given = (gradient, x, y, weight, bias, statistics)
    tensors = (*given, x_gradient, residual_gradient, *by_parameters, sums, partials)
    key = launch_key(tensors, (groups, relu, chosen.reduce, chosen.apply))
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(x):
        if chosen.single:
            arguments: tuple[Any, ...] = (*tensors[:-2], rows)
            constants = chosen.reduce | {"RELU": relu}
            grid = (chosen.strips, 1, 1)
            launch(single_kernel, key and ("single gradient", *key), grid, arguments, constants)
            return
        arguments = (*given, residual_gradient, *by_parameters, sums, partials, tickets, rows)
        grid = (chosen.parts, chosen.strips, groups)
        launch(sums_kernel, key and ("sums", *key), grid, arguments, chosen.reduce | {"RELU": relu})
        # What the ReLU let through has been written for the residual.
        through = gradient if residual_gradient is None else residual_gradient
        arguments = (through, x, weight, bias, statistics, sums, x_gradient, rows)
        grid = (chosen.tiles, chosen.strips, groups)
        constants = chosen.apply | {"RELU": relu and residual_gradient is None}
        launch(gradient_kernel, key and ("gradient", *key), grid, arguments, constants)


@triton.jit(do_not_specialize=["ticket_ptr", "rows"])
def sums_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    residual_gradient_ptr: tl.tensor,
    weight_gradient_ptr: tl.tensor,
    bias_gradient_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    ticket_ptr: tl.tensor,
    rows: tl.int64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FULL: tl.constexpr,
    FINAL_STEPS: tl.constexpr,
    FINAL_R: tl.constexpr,
    RELU: tl.constexpr,
) -> None:
    """Tiles `program_id(0)`, + `num_programs(0)`, .. of strip `program_id(1)` of group
    `program_id(2)`.

    Leaves mean(g') and invstd^2 mean(g' (x - mean)) of every group and channel in sums_ptr.
    """
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2).to(tl.int64)
    mean, scale, bias = parameters(statistics_ptr, weight_ptr, bias_ptr, group, column, C, GROUPS)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    in_block = tl.arange(0, BLOCK_R)[:, None]
    start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_R)
    while start < rows:
        for step in tl.static_range(STEPS):
            row = start + (step * BLOCK_R + in_block)
            element = (group * rows + row) * C + column[None, :]
            used = (row < rows) & (column < C)[None, :]
            g = load(gradient_ptr + element, used, FULL).to(tl.float32)
            x = load(x_ptr + element, used, FULL).to(tl.float32) - mean[None, :]
            if y_ptr is not None:
                g = tl.where(load(y_ptr + element, used, FULL) <= 0.0, 0.0, g)
                store(residual_gradient_ptr + element, g, used, FULL)
            elif RELU:
                g = tl.where(x * scale[None, :] + bias[None, :] <= 0.0, 0.0, g)
            sums += g
            products += g * x
        start += tl.num_programs(0) * (STEPS * BLOCK_R)

    parts = tl.num_programs(0)
    mine = partials_ptr + (group * parts + tl.program_id(0)) * (2 * C) + column
    tl.store(mine, tl.sum(sums, axis=0), mask=column < C)
    tl.store(mine + C, tl.sum(products, axis=0), mask=column < C)
    if is_last(ticket_ptr):
        share = 1.0 / rows.to(tl.float32)
        by_weight = tl.zeros([BLOCK_C], tl.float32)
        by_bias = tl.zeros([BLOCK_C], tl.float32)
        for i in tl.static_range(GROUPS):
            invstd = tl.load(statistics_ptr + (GROUPS + i) * C + column, mask=column < C, other=0.0)
            total, product = add_parts(
                partials_ptr, i, parts, column, C, BLOCK_C, FINAL_STEPS, FINAL_R
            )
            by_bias += total
            by_weight += product * invstd
            tl.store(sums_ptr + i * C + column, total * share, mask=column < C)
            tl.store(
                sums_ptr + (GROUPS + i) * C + column,
                product * share * invstd * invstd,
                mask=column < C,
            )
        if weight_gradient_ptr is not None:
            tl.store(weight_gradient_ptr + column, by_weight, mask=column < C)
        if bias_gradient_ptr is not None:
            tl.store(bias_gradient_ptr + column, by_bias, mask=column < C)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    x_gradient_ptr: tl.tensor,
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
    g = load(gradient_ptr + element, used, FULL)
    x = load(x_ptr + element, used, FULL)
    mean, scale, bias = parameters(statistics_ptr, weight_ptr, bias_ptr, group, column, C, GROUPS)
    of_gradient = tl.load(sums_ptr + group * C + column, mask=column < C, other=0.0)
    of_product = tl.load(sums_ptr + (GROUPS + group) * C + column, mask=column < C, other=0.0)
    g = g.to(tl.float32)
    x = x.to(tl.float32) - mean[None, :]
    if RELU:
        g = tl.where(x * scale[None, :] + bias[None, :] <= 0.0, 0.0, g)
    by_x = scale[None, :] * (g - of_gradient[None, :] - x * of_product[None, :])
    store(x_gradient_ptr + element, by_x, used, FULL)


@triton.jit(do_not_specialize=["rows"])
def single_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    x_gradient_ptr: tl.tensor,
    residual_gradient_ptr: tl.tensor,
    weight_gradient_ptr: tl.tensor,
    bias_gradient_ptr: tl.tensor,
    rows: tl.int64,
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
    group = tl.arange(0, BLOCK_G)[:, None]
    row = tl.arange(0, BLOCK_R)[None, :, None].to(tl.int64)
    element = (group[:, :, None] * rows + row) * C + column[None, None, :]
    used = (group < GROUPS)[:, :, None] & (row < rows) & (column < C)[None, None, :]
    g = load(gradient_ptr + element, used, FULL).to(tl.float32)
    x = load(x_ptr + element, used, FULL).to(tl.float32)
    is_real = (group < GROUPS) & (column < C)[None, :]
    mean = tl.load(statistics_ptr + group * C + column[None, :], mask=is_real, other=0.0)
    invstd = tl.load(
        statistics_ptr + (GROUPS + group) * C + column[None, :], mask=is_real, other=0.0
    )
    scale = invstd * column_of(weight_ptr, column, C, 1.0)[None, :]
    x -= mean[:, None, :]
    if y_ptr is not None:
        g = tl.where(load(y_ptr + element, used, FULL) <= 0.0, 0.0, g)
        store(residual_gradient_ptr + element, g, used, FULL)
    elif RELU:
        bias = column_of(bias_ptr, column, C, 0.0)
        g = tl.where(x * scale[:, None, :] + bias[None, None, :] <= 0.0, 0.0, g)
    share = 1.0 / rows.to(tl.float32)
    total = tl.sum(g, axis=1)
    product = tl.sum(g * x, axis=1)
    of_gradient = total * share
    of_product = product * share * invstd * invstd
    by_x = scale[:, None, :] * (g - of_gradient[:, None, :] - x * of_product[:, None, :])
    store(x_gradient_ptr + element, by_x, used, FULL)
    if weight_gradient_ptr is not None:
        tl.store(weight_gradient_ptr + column, tl.sum(product * invstd, axis=0), mask=column < C)
    if bias_gradient_ptr is not None:
        tl.store(bias_gradient_ptr + column, tl.sum(total, axis=0), mask=column < C)
