"""Loss of several views and its gradient in one launch: Power Spherical and cosine.

For predictions p_v (V views), targets z_g (the first G views) and w = 2 / (G (V - 1)), per sample

    c_vg   = p_v.z_g / (|p_v| |z_g|)                 a vector with |x|^2 < 1e-24 has cosine 0 and gradient 0
    k_v    = scale softplus(r_v) + minimum           r_v: the column after the D columns of p_v
    loss   = -w sum_{v != g} F(k_v, c_vg)            cosine: F = c_vg
    dp_v   = -w sum_g dF/dc (z_g/|z_g| - c_vg p_v/|p_v|) / |p_v| = own_v p_v + sum_g other_vg z_g
             other_vg = -w dF/dc / (|p_v| |z_g|),    own_v = w sum_g dF/dc c_vg / |p_v|^2
    dr_v   = -w scale sigmoid(r_v) sum_g dF/dk

The scalar functions F, dF/dc, dF/dk are in power_spherical.py. Sums and scalars are fp32, or fp64 for fp64 inputs.

Traffic. A unit is V B D elements. With gradient the kernel must read p, read z (G/V of a unit) and write dp: 3 units
at G = V; without gradient 2. Nothing else is moved: no saved cosine, no second launch.

Shape of a launch. One program per sample. The targets stay in registers as one block (1, G, D), the views pass in
blocks (BLOCK_V, 1, D), all of them at once where they fit: every load of a block is issued before anything waits for
one, its products with the targets are reduced to all its cosines at once, and the scalar functions, about 400
instructions and as many as all the rest, are evaluated once per block with one pair per lane (`_one_per_lane`); view by
view they would be evaluated V times in every warp. The gradient is one multiply-add per pair and column on the same
registers.
Where not even one view fits beside the targets (D above 8192 for G = 2), both are streamed: one sweep over D in chunks
forms the sums, target by target; a second one reads the rows again, from L2 where they are still there, and writes
the gradient.

num_warps gives a thread at most 64 registers of data, 48 inside the loop over blocks, and a row no more threads than it
has 16-byte pieces (`launch_arguments`): for two views 1 warp up to D = 512, 4 at 2048, 16 at 8192. A thread then has
128 registers, and compiled for sm_80, 90, 100 and 120, fp32 and bf16, at D in {128, 512, 2048, 8192}, V in {2, 8, 16}
and G = 2 nothing spills. The choice rests on these compilations and on counting instructions against bytes; no time
was measured on a GPU.

Loads and stores are 16 bytes wide where addresses and strides are divisible by 16 (bytes and elements: what Triton
specialises on) and D is, too. Rows of D + 1 columns are not: pad them, 2049 columns to a stride of 2064.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .power_spherical import divide, log_density_ratio, softplus, square_root

TINY_SQUARE = tl.constexpr(1e-24)
_AT_ONCE, _IN_A_LOOP = 64, 48
"""Registers of data in a thread if all views are there at once, and if a loop over blocks of them needs some itself."""
_WARPS, _MOST_WARPS = 8, 16
"""Warps of a program: two of 8 share a multiprocessor, one of 16 is taken for long rows."""
_MOST_REGISTERS = 128
"""Of a thread, so that 16 warps share a multiprocessor. Left alone the assembler takes 157 for some loops."""
_BYTES_PER_WARP = 32 * 16
_MOST_PAIRS = 32
"""Sums that a thread carries beside its data, as many as a block of views has pairs with the targets."""


def multiview_loss(
    predictions: Tensor,
    targets: Tensor,
    loss: Tensor,
    grad: Tensor | None,
    *,
    distribution: Literal["power_spherical", "cosine"],
    scale: float,
    minimum: float,
) -> None:
    """Writes the loss of every sample and, if `grad` is given, its gradient with respect to the predictions.

    The launch goes to the current stream of the predictions' device; it neither synchronises nor allocates. Shapes,
    dtypes and devices are the caller's responsibility.

    Args:
        predictions: (V, B, D + 1) for power_spherical, the last column the raw concentration; (V, B, D) for cosine.
            float16, bfloat16, float32 or float64, any strides with the last one 1. V >= 2, D >= 2.
        targets: (G, B, D), 1 <= G <= V, likewise.
        loss: (B,) contiguous, float32, or float64 if an input is. Overwritten.
        grad: shaped as predictions, with strides (last one 1) and a dtype of its own, or None. Overwritten; what lies
            between its rows is not touched.
        distribution: the density that the predictions parametrise.
        scale, minimum: kappa = scale * softplus(raw) + minimum; without effect for cosine.
    """
    views, samples, width = predictions.shape
    if samples == 0:
        return
    spherical = distribution == "power_spherical"
    double = predictions.dtype == torch.float64 or targets.dtype == torch.float64
    arguments = launch_arguments(
        width - spherical, views, targets.shape[0], predictions.element_size(), spherical=spherical, double=double
    )
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(predictions):
        multiview_loss_kernel[(samples,)](
            predictions,
            targets,
            loss,
            grad,
            float(scale),
            float(minimum),
            predictions.stride(0),
            predictions.stride(1),
            targets.stride(0),
            targets.stride(1),
            0 if grad is None else grad.stride(0),
            0 if grad is None else grad.stride(1),
            **arguments,
        )


@lru_cache(maxsize=256)
def launch_arguments(
    dim: int, views: int, globals_: int, itemsize: int, *, spherical: bool, double: bool
) -> dict[str, int | bool]:
    """The compile-time arguments and compiler options of a launch.

    Args:
        dim, views, globals_: D, V and G.
        itemsize: bytes of an element of the predictions.
        spherical: Power Spherical, not cosine.
        double: the arithmetic is fp64, so that an element occupies two registers.
    """
    v, g = triton.next_power_of_2(views), triton.next_power_of_2(globals_)
    columns = triton.next_power_of_2(dim)
    size = 2 if double else 1
    row_warps = max(1, columns * itemsize // _BYTES_PER_WARP)
    fitting = (
        block
        for most, blocks in ((_WARPS, (16, 8, 4, 2)), (_MOST_WARPS, (16, 8, 4, 2, 1)))
        for block in blocks
        if block <= v
        and block * g <= _MOST_PAIRS
        and (block + g) * columns * size <= 32 * min(most, row_warps) * (_AT_ONCE if block == v else _IN_A_LOOP)
    )
    block = next(fitting, 0)
    resident = block > 0
    if resident:
        registers = (block + g) * columns * size
    else:
        block = v
        columns = min(columns, 32 * _WARPS * _AT_ONCE // (block * size))
        registers = block * columns * size
    warps = triton.next_power_of_2(triton.cdiv(registers, 32 * _AT_ONCE))
    options = {"num_warps": min(warps, row_warps)}
    if resident and not double:
        options["maxnreg"] = _MOST_REGISTERS
    return options | {
        "DIM": dim,
        "VIEWS": views,
        "GLOBALS": globals_,
        "BLOCK_V": block,
        "BLOCK_G": g,
        "BLOCK_D": columns,
        "RESIDENT": resident,
        "POWER_SPHERICAL": spherical,
        "DOUBLE": double,
    }


@triton.jit
def multiview_loss_kernel(
    p_ptr: tl.tensor,
    z_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    scale: tl.float64,  # a Python float would arrive as fp32
    minimum: tl.float64,
    p_stride_view: tl.tensor,
    p_stride_sample: tl.tensor,
    z_stride_view: tl.tensor,
    z_stride_sample: tl.tensor,
    grad_stride_view: tl.tensor,
    grad_stride_sample: tl.tensor,
    DIM: tl.constexpr,
    VIEWS: tl.constexpr,
    GLOBALS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    POWER_SPHERICAL: tl.constexpr,
    DOUBLE: tl.constexpr,
) -> None:
    """The formulas above for sample `program_id(0)`; grad_ptr None: the loss only."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    WEIGHT: tl.constexpr = 2 / (GLOBALS * (VIEWS - 1))
    FULL_D: tl.constexpr = DIM % BLOCK_D == 0
    FULL_V: tl.constexpr = FULL_D & (VIEWS % BLOCK_V == 0)
    FULL_G: tl.constexpr = FULL_D & (GLOBALS == BLOCK_G)
    # int64 before any address is formed: V B D can exceed 2^31.
    sample = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    z_first = z_ptr + sample * z_stride_sample
    z_stride = tl.full([], z_stride_view, tl.int64)
    if RESIDENT:
        z_rows = (z_first + g * z_stride)[None, :, None]
        z = _load_columns(z_rows, d, (g < GLOBALS)[None, :, None] & (d < DIM), FULL_G).to(ACC)
        zz = tl.sum(z * z, axis=2)

    gain = tl.full([], 0.0, ACC)
    for first_view in range(0, VIEWS, BLOCK_V):
        v = first_view + tl.arange(0, BLOCK_V)
        is_view = (v < VIEWS)[:, None]
        p_row = p_ptr + sample * p_stride_sample + v.to(tl.int64) * p_stride_view
        p_rows = p_row[:, None, None]
        if POWER_SPHERICAL:
            raw = tl.load(p_row[:, None] + DIM, mask=is_view, other=0.0).to(ACC)
        if RESIDENT:
            p = _load_columns(p_rows, d, is_view[:, :, None] & (d < DIM), FULL_V).to(ACC)
            pz = tl.sum(p * z, axis=2)
            pp = tl.sum(p * p, axis=2)
        else:
            pz = tl.zeros([BLOCK_V, BLOCK_G], ACC)
            pp = tl.zeros([BLOCK_V, 1], ACC)
            zz = tl.zeros([1, BLOCK_G], ACC)
            for start in range(0, DIM, BLOCK_D):
                column = start + d
                p = _load_columns(p_rows, column, is_view[:, :, None] & (column < DIM), FULL_V).to(ACC)
                pp += tl.sum(p * p, axis=2)
                for i in range(GLOBALS):
                    z = _load_columns(z_first + i * z_stride, column, column < DIM, FULL_D).to(ACC)
                    pz += tl.where(g[None, :] == i, _one_per_lane(tl.sum(p * z, axis=2)), 0.0)
                    zz += tl.where(g[None, :] == i, _one_per_lane(tl.sum(z * z, axis=2)), 0.0)

        p_square = _one_per_lane(pp)
        z_square = _one_per_lane(zz)
        norms = square_root(p_square) * square_root(z_square)
        is_zero = (p_square < TINY_SQUARE) | (z_square < TINY_SQUARE)
        # An infinite square must give NaN, where a finite product over an infinite norm would give 0.
        product = _one_per_lane(pz) + (p_square * 0.0 + z_square * 0.0)
        cos = tl.where(is_zero, 0.0, divide(product, norms))
        is_pair = is_view & (g < GLOBALS)[None, :] & (v[:, None] != g[None, :])
        if POWER_SPHERICAL:
            soft, sigmoid = softplus(raw)
            kappa = tl.full([], scale, ACC) * soft + tl.full([], minimum, ACC)
            value, by_kappa, by_cos = log_density_ratio(kappa, cos, DIM)
        else:
            value = cos
            by_cos = tl.full([BLOCK_V, BLOCK_G], 1.0, ACC)
        gain += tl.sum(tl.where(is_pair, value, 0.0))

        if grad_ptr is not None:
            grad_row = grad_ptr + sample * grad_stride_sample + v.to(tl.int64) * grad_stride_view
            grad_rows = grad_row[:, None, None]
            # Both factors are by_cos divided once, so that what they leave along p is the rounding of two divisions.
            by_cos = tl.where(is_pair & (is_zero == 0), by_cos, 0.0)
            other = -WEIGHT * tl.where(is_zero, 0.0, divide(by_cos, norms))
            own = tl.sum(by_cos * cos, axis=1, keep_dims=True)
            own = (WEIGHT * tl.where(p_square < TINY_SQUARE, 0.0, divide(own, p_square)))[:, :, None]
            if RESIDENT:
                p_grad = own * p + tl.sum(other[:, :, None] * z, axis=1, keep_dims=True)
                _store_columns(grad_rows, d, p_grad, is_view[:, :, None] & (d < DIM), FULL_V)
            else:
                for start in range(0, DIM, BLOCK_D):
                    column = start + d
                    p_used = is_view[:, :, None] & (column < DIM)
                    p_grad = own * _load_columns(p_rows, column, p_used, FULL_V).to(ACC)
                    for i in range(GLOBALS):
                        z = _load_columns(z_first + i * z_stride, column, column < DIM, FULL_D).to(ACC)
                        p_grad += tl.sum(tl.where(g[None, :] == i, other, 0.0), axis=1, keep_dims=True)[:, :, None] * z
                    _store_columns(grad_rows, column, p_grad, p_used, FULL_V)
            if POWER_SPHERICAL:
                by_kappa = tl.sum(tl.where(is_pair, by_kappa, 0.0), axis=1, keep_dims=True)
                by_raw = tl.full([], scale, ACC) * sigmoid * by_kappa
                tl.store(grad_row[:, None] + DIM, -WEIGHT * by_raw, mask=is_view)

    tl.store(loss_ptr + sample, -WEIGHT * gain)


@triton.jit
def _load_columns(rows: tl.tensor, columns: tl.tensor, used: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """Columns of the rows, 0 in those that exist only as padding. FULL says that there is none, and saves the mask."""
    if FULL:
        return tl.load(rows + columns)
    else:
        return tl.load(rows + columns, mask=used, other=0.0)


@triton.jit
def _store_columns(rows: tl.tensor, columns: tl.tensor, x: tl.tensor, used: tl.tensor, FULL: tl.constexpr) -> None:
    if FULL:
        tl.store(rows + columns, x)
    else:
        tl.store(rows + columns, x, mask=used)


@triton.jit
def _one_per_lane(x: tl.tensor) -> tl.tensor:
    """x (rows, columns) as it is, but one element per lane.

    A reduction leaves all of its results in every thread, which would then do all of the scalar work. A gather takes
    the layout of its indices instead, and the indices here leave every element where it is.
    """
    rows = tl.arange(0, x.shape[0])[:, None] + tl.zeros([x.shape[0], x.shape[1]], tl.int32)
    return tl.gather(x, rows, axis=0)
