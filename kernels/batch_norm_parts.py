"""Pieces that the BatchNorm kernels share: a channel's numbers, and sums over programs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parameters(
    statistics_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    group: tl.tensor,
    column: tl.tensor,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tuple:
    """A group's mean, invstd times weight, and the bias."""
    mean = tl.load(statistics_ptr + group * C + column, mask=column < C, other=0.0)
    invstd = tl.load(statistics_ptr + (GROUPS + group) * C + column, mask=column < C, other=0.0)
    return mean, invstd * column_of(weight_ptr, column, C, 1.0), column_of(bias_ptr, column, C, 0.0)


@triton.jit
def column_of(
    pointer: tl.tensor, column: tl.tensor, C: tl.constexpr, ABSENT: tl.constexpr
) -> tl.tensor:
    """Numbers of channels, ABSENT without a tensor."""
    if pointer is None:
        return tl.full(column.shape, ABSENT, tl.float32)
    else:
        return tl.load(pointer + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def is_last(ticket_ptr: tl.tensor) -> tl.tensor:
    """True in the last program of a strip, once its stores have arrived; it resets the ticket."""
    tl.debug_barrier()
    ticket = ticket_ptr + tl.program_id(1)
    last = tl.num_programs(0) * tl.num_programs(2) - 1
    # Stores of a program are visible before its ticket; loads after the last ticket are fresh.
    taken = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if taken == last:
        tl.store(ticket, 0)
    return taken == last


@triton.jit
def add_parts(
    partials_ptr: tl.tensor,
    group: tl.tensor,
    parts: tl.tensor,
    column: tl.tensor,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tuple:
    """Both sums of a group over its parts, in an order that depends on nothing else."""
    first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    in_block = tl.arange(0, BLOCK_R)[:, None]
    start = parts * 0
    while start < parts:
        for step in tl.static_range(STEPS):
            part = start + (step * BLOCK_R + in_block)
            used = (part < parts) & (column < C)[None, :]
            elements = (
                partials_ptr + (group * parts + part).to(tl.int64) * (2 * C) + column[None, :]
            )
            first += tl.load(elements, mask=used, other=0.0, cache_modifier=".cg")
            second += tl.load(elements + C, mask=used, other=0.0, cache_modifier=".cg")
        start += STEPS * BLOCK_R
    return tl.sum(first, axis=0), tl.sum(second, axis=0)
