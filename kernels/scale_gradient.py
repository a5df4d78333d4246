"""Scales a precomputed gradient by the upstream gradient, read on the device without a host sync.

The factor of a mean is one number, in training 1 unless a loss scaler is at work. In place and with
a factor of 1 every program returns after reading it, so that a backward costs a launch and no
traffic. Otherwise the gradient is read and written once, multiplied in the factor's precision and
rounded once. With a factor for every sample, rows whose factor is 1 are neither read nor written.

Shape of a launch. Tiles of TILE elements, up to 256 columns wide, divided among at most 1024
programs: enough to fill any GPU, few enough that an early return does not grow with the batch. The
views are the grid's second axis, which saves the division of a row number into view and sample. A
program of 4 warps reads 32 elements a thread before the first wait. Not timed on a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, kind, launch

_TILE = 4096
_WARPS = 4
_MOST_PROGRAMS = 1024


def scale_gradient(
    gradient: Tensor, factor: Tensor, out: Tensor, concentration_gradient: Tensor | None
) -> None:
    """Writes the gradient times the factor to `out`, and scales the concentration's gradient in
    place.

    Args:
        gradient: (V, B, W), the last stride 1.
        factor: no dimensions or (B,) with any stride, in the compute dtype.
        out: `gradient` itself, or a tensor of its shape, any strides with the last one 1, any
            floating dtype.
        concentration_gradient: (V, B), contiguous, in the compute dtype.
    """
    views, samples, width = gradient.shape
    if samples == 0:
        return
    factor_stride = factor.stride(0) if factor.dim() else 0
    programs, constants = _launch_arguments(
        views, samples, width, in_place=out is gradient, per_sample=factor_stride != 0
    )
    tensors = (gradient, factor, out, concentration_gradient)
    strides = (*gradient.stride()[:2], *out.stride()[:2])
    key = None
    if aligned(tensors):
        key = (
            scale_gradient,
            gradient.device,
            (width, out is gradient, factor_stride != 0, concentration_gradient is None),
            (gradient.dtype, factor.dtype, out.dtype),
            tuple(map(kind, strides)),
        )
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(gradient):
        launch(
            scale_gradient_kernel,
            key,
            (programs, views, 1),
            (*tensors, samples, factor_stride, *strides),
            constants,
        )


@lru_cache(maxsize=256)
def _launch_arguments(
    views: int, samples: int, width: int, *, in_place: bool, per_sample: bool
) -> tuple[int, dict[str, int | bool]]:
    """Programs for each view, and the compile-time arguments."""
    columns = min(triton.next_power_of_2(width), 256)
    rows = _TILE // columns
    tiles = triton.cdiv(samples, rows) * triton.cdiv(width, columns)
    programs = min(tiles, max(1, _MOST_PROGRAMS // views))
    constants = {
        "WIDTH": width,
        "BLOCK_B": rows,
        "BLOCK_W": columns,
        "IN_PLACE": in_place,
        "PER_SAMPLE": per_sample,
    }
    return programs, constants | {"num_warps": _WARPS}


@triton.jit(do_not_specialize=["samples", "factor_stride"])
def scale_gradient_kernel(
    grad_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    out_ptr: tl.tensor,
    kappa_grad_ptr: tl.tensor,
    samples: tl.int64,
    factor_stride: tl.int64,
    grad_stride_view: tl.int64,
    grad_stride: tl.int64,
    out_stride_view: tl.int64,
    out_stride: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
) -> None:
    """Tiles `program_id(0)`, `program_id(0) + num_programs(0)`, .. of view `program_id(1)`."""
    ACROSS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_W)
    view = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(samples, BLOCK_B) * ACROSS
    if not PER_SAMPLE:
        factor = tl.load(factor_ptr)
        if IN_PLACE:
            tiles = tl.where(factor == 1.0, 0, tiles)
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:  # Triton 3.6 cannot interpret a range that ends at a number from the device
        b = tile // ACROSS * BLOCK_B + tl.arange(0, BLOCK_B)
        column = tile % ACROSS * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        used = b < samples
        if PER_SAMPLE:
            factor = tl.load(factor_ptr + b * factor_stride, mask=used, other=1.0)
            if IN_PLACE:
                used &= factor != 1.0
        rows = b[:, None]
        cells = used[:, None] & (column < WIDTH)
        x = tl.load(
            grad_ptr + view * grad_stride_view + rows * grad_stride + column, mask=cells, other=0.0
        )
        y = x.to(factor.dtype) * (factor[:, None] if PER_SAMPLE else factor)
        tl.store(
            out_ptr + view * out_stride_view + rows * out_stride + column,
            y.to(out_ptr.dtype.element_ty),
            mask=cells,
        )
        if kappa_grad_ptr is not None:
            kappa_grads = kappa_grad_ptr + view * samples + b
            first = used & (tile % ACROSS == 0)
            tl.store(kappa_grads, tl.load(kappa_grads, mask=first, other=0.0) * factor, mask=first)
        tile += tl.num_programs(0)
