"""Views from packed images: crop, antialiased resize, flip, colour, blur and normalisation, one
table row per view.

Resizing is separable. With scale s = in / out, support h = max(s, 1) and centre c_i = s (i + 1/2),
output pixel i is

    sum_y w_iy x_y / sum_y w_iy,    w_iy = max(0, 1 - |y - c_i + 1/2| / h),
                                    int(c_i - h + 1/2) <= y < int(c_i + h + 1/2)

vertically and horizontally, y inside the crop: ATen's antialiased bilinear filter. s and c_i are
rounded to float32 as ATen rounds them, because at c = 500 an ulp of the centre is worth 3e-5 of a
weight. The colour operations are in colour.py. Gaussian blur has 13 taps exp(-d^2 / (2 sigma^2)),
normalised, on the view reflected at its edges.

Four launches, whatever the table holds; the programs of views that have no use for one leave after
reading it.

    resize          crop -> resized, flipped, the operations before contrast -> scratch,
                    and per tile the sum of grey
    colour          scratch -> contrast and what follows, grayscale -> normalised output,
                    or scratch again before blur
    blur_rows       scratch -> scratch, views with blur only
    blur_columns    scratch -> normalised output, views with blur only

Contrast needs the mean over the view, and blur its neighbours, hence the passes; all else is done
where the pixel is in registers. The sums of grey are added in one order, so that equal tables give
equal bits.

Traffic of a view of S x S pixels from a crop of H x W: 3 H W bytes read, 12 S^2 (float32) or 6 S^2
(bfloat16) written, and 12 S^2 of scratch written by `resize` and read by `colour`. With blur three
passes more, of 12 S^2 each: `blur_rows` reads and writes the scratch and `blur_columns` reads it,
and a fourth where `colour` has to change it before. At S = 128 the scratch of 128 views is 25 MB,
half the L2 cache of an H200. Eight output rows need about 8 s + 2 h rows of the crop, of which the
tile below reads 2 h once more.

`resize` is bound by instructions, not bytes. A program is one warp with 8 x 32 output pixels. It
passes over the rows it needs four at a time, every lane resizing them horizontally for its own
column, and adds them to its eight output rows with their vertical weights: each row is resized
horizontally once per tile, not once for every output row that it reaches. A lane reads four pixels
as three words where byte loads would be twelve. Triton 3.8 compiles this for sm_90 to 308
instructions for every four pixels of four rows and 354 for every four rows, all in registers; 3.6
passes addresses and rows through shared memory and needs 537 for the pixels. Words are aligned to
their addresses: up to 3 bytes beside the image are read with it, but never a word without a byte of
it.

`blur_rows` works in place: a program owns whole rows, and a barrier parts its loads from its
stores. The outputs, three interleaved channels, are put in order in shared memory and stored
contiguously, in pieces of 16 bytes where 4 divides the size. On an H200 a batch of 64 images takes
120 us, in two views of 128 pixels each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_table import (
    BRIGHTNESS,
    COLUMNS,
    FLIP,
    GRAY,
    HEIGHT,
    ORDER,
    SIGMA,
    START,
    STRIDE,
    WIDTH,
)
from .blur import blur_columns_kernel, blur_rows_kernel, write
from .colour import adjust, before_contrast, grey_of, unit_clamp
from .launch import aligned, launch

_TWO_23_BITS = tl.constexpr(0x4B000000)
_TILE_ROWS, _TILE_COLUMNS, _ROWS_AT_ONCE = 8, 32, 4
"""A program of `resize`: output rows, output columns (one a lane) and source rows."""
_MOST_REGISTERS = 128
"""Registers of a thread of `resize`, so that 16 of its warps share a multiprocessor."""
_PIXELS = 512
"""Pixels of a program of the other kernels, four a thread."""


def workspace_bytes(rows: int, size: int) -> int:
    """Bytes of the workspace for `rows` views of size x size pixels: their scratch and the sums of
    their tiles."""
    return 4 * rows * (3 * size * size + _tiles(size))


def augment(pixels: Tensor, table: Tensor, out: Tensor, workspace: Tensor) -> None:
    """Writes the view that each row of the table describes to `out`.

    The launches go to the current stream of the tensors' device; they neither synchronise nor
    allocate, and the host does not read the table. Shapes, dtypes, devices and the table's values
    are the caller's responsibility.

    Args:
        pixels: uint8, 1-D, contiguous: RGB pixels, image after image and row after row.
        table: int32 (N, 16), contiguous. Its columns are those of `vi_simsiam.ops.augment`.
        out: (N, S, S, 3), contiguous, float32 or bfloat16, S >= 8. Overwritten.
        workspace: uint8, `workspace_bytes(N, S)` bytes or more, at an address divisible by 4.
            Overwritten.
    """
    views, size = out.shape[:2]
    if views == 0:
        return
    floats = workspace[: workspace_bytes(views, size)].view(torch.float32)
    scratch, sums = floats.split((views * 3 * size * size, views * _tiles(size)))
    tensors = (
        (pixels, table, scratch, sums),
        (table, scratch, sums, out),
        (table, scratch),
        (table, scratch, out),
    )
    keyed = aligned((table, scratch, out))
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(pixels):
        for (kernel, programs, constants), arguments in zip(launches(size), tensors, strict=True):
            key = (kernel, pixels.device, size, out.dtype) if keyed else None
            launch(kernel, key, (views * programs, 1, 1), arguments, constants)


def _tiles(size: int) -> int:
    tiles: int = triton.cdiv(size, _TILE_ROWS) * triton.cdiv(size, _TILE_COLUMNS)
    return tiles


@lru_cache(maxsize=64)
def launches(size: int) -> tuple[tuple[Any, int, dict[str, int]], ...]:
    """The kernels in their order, each with its programs for a view, its compile-time arguments and
    its options."""
    blocks = triton.cdiv(size * size, _PIXELS)
    rows = max(1, 2 * _PIXELS // triton.next_power_of_2(size))
    tile = {"TILE_ROWS": _TILE_ROWS, "TILE_COLUMNS": _TILE_COLUMNS, "AT_ONCE": _ROWS_AT_ONCE}
    one_warp = {"num_warps": 1, "maxnreg": _MOST_REGISTERS}
    four_warps = {"num_warps": 4}
    return (
        (resize_kernel, _tiles(size), {"SIZE": size, **tile, **one_warp}),
        (
            colour_kernel,
            blocks,
            {"SIZE": size, "TILES": _tiles(size), "PIXELS": _PIXELS, **four_warps},
        ),
        (blur_rows_kernel, triton.cdiv(size, rows), {"SIZE": size, "ROWS": rows, **four_warps}),
        (blur_columns_kernel, blocks, {"SIZE": size, "PIXELS": _PIXELS, **four_warps}),
    )


@triton.jit
def crop_start(row_ptr: tl.tensor) -> tl.tensor:
    """The 64 bits of START, which need not lie at an address divisible by 8."""
    low = tl.load(row_ptr + START).to(tl.uint32, bitcast=True).to(tl.int64)
    return (tl.load(row_ptr + START + 1).to(tl.int64) << 32) | low


@triton.jit
def _centre(i: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """scale (i + 1/2), rounded: a product alone would be fused with the sum that follows it."""
    return tl.fma(i.to(tl.float32) + 0.5, scale, 0.0)


@triton.jit
def _first(centre: tl.tensor, support: tl.tensor) -> tl.tensor:
    return tl.maximum((centre - support + 0.5).to(tl.int32), 0)


@triton.jit
def _end(centre: tl.tensor, support: tl.tensor, size: tl.tensor) -> tl.tensor:
    return tl.minimum((centre + support + 0.5).to(tl.int32), size)


@triton.jit
def _weight(
    pixel: tl.tensor, centre: tl.tensor, inverse_support: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """Weight of a pixel in the resize; 0 outside the crop, whose pixels are closer than 1e9."""
    place = tl.where(pixel < size, pixel.to(tl.float32) + 0.5, 1e9)
    return unit_clamp(1.0 - tl.abs((place - centre) * inverse_support))


@triton.jit
def _four_bytes(low: tl.tensor, high: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """The 32 bits from bit `shift` of two words on."""
    return (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> shift).to(tl.uint32)


@triton.jit
def _byte(word: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """Byte `PLACE` of a word as a float, set into the bits of 2^23, which is then subtracted:
    conversions have a fraction of that rate."""
    return (((word >> (8 * PLACE)) & 255) | _TWO_23_BITS).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _add_rows(sums: tl.tensor, weights: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """sums (R, C) + weights (R, K) rows (K, C), in registers of the lanes that own the columns."""
    return sums + tl.sum(weights[:, :, None] * rows[None, :, :], 1)


@triton.jit(do_not_specialize=["pixels_ptr", "sums_ptr"])
def resize_kernel(
    pixels_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Tile `program_id(0)`, counted over the tiles of a view, row after row of them, and then the
    views."""
    ACROSS: tl.constexpr = triton.cdiv(SIZE, TILE_COLUMNS)
    TILES: tl.constexpr = triton.cdiv(SIZE, TILE_ROWS) * ACROSS
    view = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    row_ptr = table_ptr + view.to(tl.int64) * COLUMNS
    stride = tl.load(row_ptr + STRIDE)
    height = tl.load(row_ptr + HEIGHT)
    width = tl.load(row_ptr + WIDTH)
    order = tl.load(row_ptr + ORDER)
    address = (pixels_ptr + crop_start(row_ptr)).to(tl.int64)
    phase = (address & 3).to(tl.int32)
    words_ptr = (address - phase).to(tl.pointer_type(tl.uint32))
    last_word = (phase + (height - 1) * stride + 3 * width - 1) >> 2

    scale_y = tl.div_rn(height.to(tl.float32), SIZE * 1.0)
    scale_x = tl.div_rn(width.to(tl.float32), SIZE * 1.0)
    support_y = tl.maximum(scale_y, 1.0)
    support_x = tl.maximum(scale_x, 1.0)
    inverse_y = tl.div_rn(1.0, support_y)
    inverse_x = tl.div_rn(1.0, support_x)

    top = tile // ACROSS * TILE_ROWS
    i = top + tl.arange(0, TILE_ROWS)
    x = tile % ACROSS * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    centre_y = _centre(i, scale_y)
    centre_x = _centre(x, scale_x)
    left = _first(centre_x, support_x)
    taps = tl.max(tl.where(x < SIZE, _end(centre_x, support_x, width) - left, 0))
    first = _first(_centre(top, scale_y), support_y)
    end = _end(_centre(tl.minimum(top + TILE_ROWS, SIZE) - 1, scale_y), support_y, height)

    red = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    green = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    blue = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    total_y = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    total_x = tl.zeros([TILE_COLUMNS], tl.float32)
    while first < end:
        y = first + tl.arange(0, AT_ONCE)
        byte = phase + tl.minimum(y, height - 1)[:, None] * stride + 3 * left[None, :]
        shift = (byte & 3) * 8
        word = byte >> 2
        carried = tl.load(words_ptr + word, mask=word <= last_word)
        r = tl.zeros([AT_ONCE, TILE_COLUMNS], tl.float32)
        g = tl.zeros([AT_ONCE, TILE_COLUMNS], tl.float32)
        b = tl.zeros([AT_ONCE, TILE_COLUMNS], tl.float32)
        total_x = tl.zeros([TILE_COLUMNS], tl.float32)
        tap = 0
        while tap < taps:
            word1 = tl.load(words_ptr + word + 1, mask=word + 1 <= last_word)
            word2 = tl.load(words_ptr + word + 2, mask=word + 2 <= last_word)
            word3 = tl.load(words_ptr + word + 3, mask=word + 3 <= last_word)
            # r0 g0 b0 r1 | g1 b1 r2 g2 | b2 r3 g3 b3
            bytes0 = _four_bytes(carried, word1, shift)
            bytes1 = _four_bytes(word1, word2, shift)
            bytes2 = _four_bytes(word2, word3, shift)
            pixel = left + tap
            w0 = _weight(pixel, centre_x, inverse_x, width)
            w1 = _weight(pixel + 1, centre_x, inverse_x, width)
            w2 = _weight(pixel + 2, centre_x, inverse_x, width)
            w3 = _weight(pixel + 3, centre_x, inverse_x, width)
            total_x += (w0 + w1) + (w2 + w3)
            w0, w1, w2, w3 = w0[None, :], w1[None, :], w2[None, :], w3[None, :]
            r += (
                w0 * _byte(bytes0, 0)
                + w1 * _byte(bytes0, 3)
                + w2 * _byte(bytes1, 2)
                + w3 * _byte(bytes2, 1)
            )
            g += (
                w0 * _byte(bytes0, 1)
                + w1 * _byte(bytes1, 0)
                + w2 * _byte(bytes1, 3)
                + w3 * _byte(bytes2, 2)
            )
            b += (
                w0 * _byte(bytes0, 2)
                + w1 * _byte(bytes1, 1)
                + w2 * _byte(bytes2, 0)
                + w3 * _byte(bytes2, 3)
            )
            carried = word3
            word += 3
            tap += 4
        weights = _weight(y[None, :], centre_y[:, None], inverse_y, height)
        total_y = _add_rows(total_y, weights, tl.full([AT_ONCE, TILE_COLUMNS], 1.0, tl.float32))
        red = _add_rows(red, weights, r)
        green = _add_rows(green, weights, g)
        blue = _add_rows(blue, weights, b)
        first += AT_ONCE

    inverse_total = 1.0 / (255.0 * total_y * total_x[None, :])
    before = before_contrast(order)
    red, green, blue = adjust(
        red * inverse_total,
        green * inverse_total,
        blue * inverse_total,
        before,
        row_ptr + BRIGHTNESS,
        0.0,
    )
    cells = (i < SIZE)[:, None] & (x < SIZE)[None, :]
    if before != order:
        grey = tl.where(cells, grey_of(red, green, blue), 0.0)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(grey, 0), 0))
    column = tl.where(tl.load(row_ptr + FLIP) != 0, SIZE - 1 - x, x)
    cell_ptrs = (
        scratch_ptr + view.to(tl.int64) * (3 * SIZE * SIZE) + (i[:, None] * SIZE + column[None, :])
    )
    tl.store(cell_ptrs, red, mask=cells)
    tl.store(cell_ptrs + SIZE * SIZE, green, mask=cells)
    tl.store(cell_ptrs + 2 * SIZE * SIZE, blue, mask=cells)


@triton.jit(do_not_specialize=["sums_ptr"])
def colour_kernel(
    table_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    """Pixels of a view, counted like the tiles of `resize_kernel`."""
    BLOCKS: tl.constexpr = triton.cdiv(SIZE * SIZE, PIXELS)
    view = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * PIXELS
    row_ptr = table_ptr + view * COLUMNS
    order = tl.load(row_ptr + ORDER)
    after = order ^ before_contrast(order)
    gray = tl.load(row_ptr + GRAY)
    blurred = tl.load(row_ptr + SIGMA).to(tl.float32, bitcast=True) > 0.0
    if (after != 0) | (gray != 0) | (not blurred):
        pixel = first + tl.arange(0, PIXELS)
        used = pixel < SIZE * SIZE
        cell_ptrs = scratch_ptr + view * (3 * SIZE * SIZE) + pixel
        r = tl.load(cell_ptrs, mask=used)
        g = tl.load(cell_ptrs + SIZE * SIZE, mask=used)
        b = tl.load(cell_ptrs + 2 * SIZE * SIZE, mask=used)
        if after != 0:
            tile = tl.arange(0, triton.next_power_of_2(TILES))
            sums = tl.load(sums_ptr + view * TILES + tile, mask=tile < TILES, other=0.0)
            mean = tl.sum(sums, 0) * (1.0 / (SIZE * SIZE))
            r, g, b = adjust(r, g, b, after, row_ptr + BRIGHTNESS, mean)
        if gray != 0:
            grey = grey_of(r, g, b)
            r, g, b = grey, grey, grey
        if blurred:
            tl.store(cell_ptrs, r, mask=used)
            tl.store(cell_ptrs + SIZE * SIZE, g, mask=used)
            tl.store(cell_ptrs + 2 * SIZE * SIZE, b, mask=used)
        else:
            write(out_ptr + view * (3 * SIZE * SIZE), first, r, g, b, SIZE)
