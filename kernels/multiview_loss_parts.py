"""Pieces of the multi-view loss kernel: the mean, addresses of views, and scalar work per lane."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import load
from .power_spherical import divide


@triton.jit
def store_mean(
    mean_ptr: tl.tensor,
    ticket_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    samples: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """The mean of the losses, by the last program to arrive and in a fixed order."""
    # Stores of a program are visible before its ticket; loads after the last ticket are fresh.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        # A thread has all of its 16 loads under way before it adds them.
        i = tl.arange(0, 16)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        total = tl.zeros([WIDTH], loss_ptr.dtype.element_ty)
        start = samples * 0
        while start + 16 * WIDTH <= samples:
            total += tl.sum(tl.load(loss_ptr + start + i, cache_modifier=".cg"), axis=0)
            start += 16 * WIDTH
        i = tl.arange(0, 8)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        while start < samples:
            rest = tl.load(
                loss_ptr + start + i, mask=i < samples - start, other=0.0, cache_modifier=".cg"
            )
            total += tl.sum(rest, axis=0)
            start += 8 * WIDTH
        tl.store(mean_ptr, divide(tl.sum(total), samples.to(total.dtype)))
        tl.store(ticket_ptr, 0)


@triton.jit
def pick(pointers: tl.tuple, i: tl.tensor, FIRST: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    """pointers[FIRST + i], where i is one of 0, STEP, 2 STEP, ..; any of them if there is none of
    that number."""
    COUNT: tl.constexpr = len(pointers)
    pointer = pointers[FIRST % COUNT]
    for k in tl.static_range(STEP, COUNT, STEP):
        pointer = tl.where(i == k, pointers[(FIRST + k) % COUNT], pointer)
    return pointer


@triton.jit
def elements(
    pointers: tl.tuple, first: tl.tensor, block: tl.tensor, offset: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """pointers[first + block] + offset; `block` is 0 .. BLOCK - 1 along one axis, `first` a
    multiple of BLOCK.

    Chosen after the columns in `offset` have been added: a choice between rows makes Triton forget
    their alignment.
    """
    offset += tl.zeros_like(block)
    chosen = pick(pointers, first, 0, BLOCK) + offset
    for k in tl.static_range(1, BLOCK):
        chosen = tl.where(block == k, pick(pointers, first, k, BLOCK) + offset, chosen)
    return chosen


@triton.jit
def load_views(
    pointers: tl.tuple,
    first: tl.tensor,
    offset: tl.tensor,
    used: tl.tensor,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tensor:
    """A block of views (BLOCK, 1, columns), beginning with view `first`."""
    block = tl.arange(0, BLOCK)[:, None, None]
    return load(elements(pointers, first, block, offset, BLOCK), used, FULL)


@triton.jit
def load_target(
    pointers: tl.tuple,
    i: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    DIM: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tensor:
    """Columns of target i."""
    return load(pick(pointers, i, 0, 1) + row + column, column < DIM, FULL)


@triton.jit
def one_per_lane(x: tl.tensor) -> tl.tensor:
    """x (rows, columns) as it is, but one element per lane.

    A reduction leaves all of its results in every thread, which would then do all of the scalar
    work. A gather takes the layout of its indices instead, and the indices here leave every element
    where it is.
    """
    rows = tl.arange(0, x.shape[0])[:, None] + tl.zeros([x.shape[0], x.shape[1]], tl.int32)
    return tl.gather(x, rows, axis=0)
