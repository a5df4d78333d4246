"""Gaussian blur and the normalised output: the last launches of augment.py, described there."""

from __future__ import annotations

import triton
import triton.language as tl

from .augment_table import COLUMNS, SIGMA

BLUR_TAPS = tl.constexpr(13)
# ImageNet's mean and standard deviation of red, green and blue.
RED_MEAN, RED_DEVIATION = tl.constexpr(0.485), tl.constexpr(0.229)
GREEN_MEAN, GREEN_DEVIATION = tl.constexpr(0.456), tl.constexpr(0.224)
BLUE_MEAN, BLUE_DEVIATION = tl.constexpr(0.406), tl.constexpr(0.225)


@triton.jit
def write(
    out_ptr: tl.tensor,
    first: tl.tensor,
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Normalises the pixels from `first` on, those of a view that starts at `out_ptr`, and stores
    them interleaved."""
    PIXELS: tl.constexpr = r.shape[0]
    r = (r - RED_MEAN) * (1.0 / RED_DEVIATION)
    g = (g - GREEN_MEAN) * (1.0 / GREEN_DEVIATION)
    b = (b - BLUE_MEAN) * (1.0 / BLUE_DEVIATION)
    # r g b b of each pixel; blue's copy makes four of them, the number of elements has to be a
    # power of two.
    four = tl.reshape(tl.join(tl.join(r, b), tl.join(g, b)), [4 * PIXELS])
    element = tl.arange(0, 4 * PIXELS)
    three = tl.gather(four, tl.minimum(element // 3 * 4 + element % 3, 4 * PIXELS - 1), 0)
    # Blocks begin at multiples of PIXELS: with 4 | SIZE the comparisons hold for groups of 4
    # elements alike.
    used = (element < 3 * PIXELS) & (first * 3 + element < 3 * SIZE * SIZE)
    tl.store(out_ptr + first * 3 + element, three.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _tap(distance: int, sigma: tl.tensor) -> tl.tensor:
    scaled = distance / sigma
    return tl.exp(-0.5 * scaled * scaled)


@triton.jit
def _reflected(i: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """i within a view, mirrored at the centres of its first and last pixel; 0 for what lies a view
    beyond it."""
    i = tl.abs(i)
    return tl.maximum(tl.where(i < SIZE, i, 2 * SIZE - 2 - i), 0)


@triton.jit
def _blurred(
    view_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    sigma: tl.tensor,
    SHAPE: tl.constexpr,
    SIZE: tl.constexpr,
    VERTICAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Three channels at rows and columns that broadcast to SHAPE, blurred along one direction.

    Every address lies in the view, whatever the row and column: without masks, threads with
    neighbouring pixels load once what several taps use.
    """
    RADIUS: tl.constexpr = BLUR_TAPS // 2
    r = tl.zeros(SHAPE, tl.float32)
    g = tl.zeros(SHAPE, tl.float32)
    b = tl.zeros(SHAPE, tl.float32)
    total = 0.0
    for tap in tl.static_range(BLUR_TAPS):
        weight = _tap(tap - RADIUS, sigma)
        total += weight
        if VERTICAL:
            cell_ptrs = view_ptr + (_reflected(row + (tap - RADIUS), SIZE) * SIZE + column)
        else:
            cell_ptrs = view_ptr + (
                tl.minimum(row, SIZE - 1) * SIZE + _reflected(column + (tap - RADIUS), SIZE)
            )
        r += weight * tl.load(cell_ptrs)
        g += weight * tl.load(cell_ptrs + SIZE * SIZE)
        b += weight * tl.load(cell_ptrs + 2 * SIZE * SIZE)
    inverse = 1.0 / total
    return r * inverse, g * inverse, b * inverse


@triton.jit
def blur_rows_kernel(
    table_ptr: tl.tensor, scratch_ptr: tl.tensor, SIZE: tl.constexpr, ROWS: tl.constexpr
) -> None:
    """Whole rows of a view, counted like the tiles of `resize_kernel`, in place."""
    BLOCKS: tl.constexpr = triton.cdiv(SIZE, ROWS)
    view = (tl.program_id(0) // BLOCKS).to(tl.int64)
    sigma = tl.load(table_ptr + view * COLUMNS + SIGMA).to(tl.float32, bitcast=True)
    if sigma > 0.0:
        row = (tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
        used = (row < SIZE) & (column < SIZE)
        view_ptr = scratch_ptr + view * (3 * SIZE * SIZE)
        r, g, b = _blurred(view_ptr, row, column, sigma, used.shape, SIZE, False)
        tl.debug_barrier()  # every thread has read what its neighbours now overwrite
        cell_ptrs = view_ptr + (row * SIZE + column)
        tl.store(cell_ptrs, r, mask=used)
        tl.store(cell_ptrs + SIZE * SIZE, g, mask=used)
        tl.store(cell_ptrs + 2 * SIZE * SIZE, b, mask=used)


@triton.jit
def blur_columns_kernel(
    table_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    out_ptr: tl.tensor,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    """Pixels of a view, counted like the tiles of `resize_kernel`."""
    BLOCKS: tl.constexpr = triton.cdiv(SIZE * SIZE, PIXELS)
    view = (tl.program_id(0) // BLOCKS).to(tl.int64)
    sigma = tl.load(table_ptr + view * COLUMNS + SIGMA).to(tl.float32, bitcast=True)
    if sigma > 0.0:
        first = tl.program_id(0) % BLOCKS * PIXELS
        pixel = first + tl.arange(0, PIXELS)
        view_ptr = scratch_ptr + view * (3 * SIZE * SIZE)
        r, g, b = _blurred(view_ptr, pixel // SIZE, pixel % SIZE, sigma, pixel.shape, SIZE, True)
        write(out_ptr + view * (3 * SIZE * SIZE), first, r, g, b, SIZE)
