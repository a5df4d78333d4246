"""Loss of several views, its mean and its gradient in one launch: Power Spherical and cosine.

For predictions p_v (V views), targets z_g (the first G views) and weights w (of the loss) and w'
(of the gradient),

    c_vg   = p_v.z_g / (|p_v| |z_g|)      a vector with |x|^2 < 1e-24 has cosine 0 and gradient 0
    k_v    = scale link(gain r_v) + minimum     r_v: the column after the D of p_v; or k_v is given
    loss   = -w sum_{v != g} F(k_v, c_vg)       plus cosine c_vg in F; distribution cosine: F = c_vg
    dp_v   = -w' sum_g dF/dc (z_g/|z_g| - c_vg p_v/|p_v|) / |p_v| = own_v p_v + sum_g other_vg z_g
             other_vg = -w' dF/dc / (|p_v| |z_g|),   own_v = w' sum_g dF/dc c_vg / |p_v|^2
    dk_v   = -w' sum_g dF/dk
    dr_v   = scale gain link'(gain r_v) dk_v    quadratic: 0 where gain r_v < 0.02 and dk_v > 0

The scalar functions F, dF/dc, dF/dk are in power_spherical.py. Sums and scalars are fp32, or fp64
for fp64 inputs.

Traffic. A unit is V B D elements. With gradient the kernel must read p, read z (G/V of a unit) and
write dp: 3 units at G = V; without gradient 2. Nothing else is moved: no saved cosine, no second
launch, and no stacking, since every view has an address of its own.

Shape of a launch. A program takes one sample at a time. The targets stay in registers as one block
(1, G, D), the views pass in blocks (BLOCK_V, 1, D), all at once where they fit. Every load of a
block is issued before the first wait; its products with the targets are reduced to all its cosines
at once, and the scalar functions, about 400 instructions and half of the total, are evaluated once
per block with one pair per lane (`one_per_lane`); view by view they would be evaluated V times in
every warp. The gradient is one multiply-add per pair and column on the same registers. Where not
even one view fits beside the targets (D above 8192 for G = 2), both are streamed: one sweep over D
in chunks forms the sums, target by target; a second one reads the rows again, from L2 where they
are still there, and writes the gradient.

num_warps gives a thread at most 64 registers of data, 48 inside the loop over blocks, and a row no
more threads than it has 16-byte pieces (`launch_arguments`): for two views 1 warp up to D = 512, 4
at 2048, 16 at 8192. A thread then has 128 registers, and nothing spills when compiled for sm_80,
90, 100 and 120, fp32 and bf16, at D in {128, 512, 2048, 8192}, V in {2, 8, 16} and G = 2. The
choice rests on these compilations and on instructions counted against bytes, not on times.

The mean. Every program adds to a ticket when its losses are stored, and the last one adds up all B
of them, with 16 loads of 16 bytes in flight in each thread. Before the ticket a program must wait
until its stores have arrived, which nothing hides. Large batches therefore have 2^14 warps in all,
each with several samples and a single wait; that is still several times what a GPU holds at once,
so that its multiprocessors finish together. Only programs of 16 warps with all views at once, which
the loop would make spill on sm_120, take one sample.

Loads and stores are 16 bytes wide where addresses, strides and D are divisible by 16 (bytes and
elements: what Triton specialises on). Rows of D + 1 columns are not: pad them, 2049 columns to a
stride of 2064. The columns after the last one used are written with it, as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, kind, launch
from .memory import load, store
from .multiview_loss_parts import elements, load_target, load_views, one_per_lane, store_mean
from .power_spherical import LEAST_ROOT, divide, log_density_ratio, quadratic, softplus, square_root
from .scale_gradient import scale_gradient

__all__ = ["multiview_loss", "scale_gradient"]

TINY_SQUARE = tl.constexpr(1e-24)
_AT_ONCE, _IN_A_LOOP, _STREAMED = 64, 48, 32
"""Registers of data in a thread: with all views at once, in a loop over blocks of them, which needs
some itself, and of the views alone where the targets are streamed."""
_WARPS, _MOST_WARPS = 8, 16
"""Warps of a program: two of 8 share a multiprocessor, one of 16 is taken for long rows."""
_MOST_REGISTERS = 128
"""Registers of a thread, so that 16 warps share a multiprocessor; unlimited it takes up to 157."""
_MOST_WARPS_IN_ALL = 1 << 14
"""Warps of all programs together: eight times the 16 of each of 128 multiprocessors."""
_BYTES_PER_WARP = 32 * 16
_MOST_PAIRS = 32
"""Sums that a thread carries beside its data: pairs of a block of views with the targets."""


def multiview_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    loss: Tensor,
    mean: Tensor | None,
    ticket: Tensor | None,
    gradient: Tensor | None,
    concentration_gradient: Tensor | None,
    *,
    distribution: Literal["power_spherical", "cosine"],
    link: Literal["softplus", "quadratic"],
    scale: float,
    minimum: float,
    gain: float,
    cosine: float,
    weight: float,
    gradient_weight: float,
) -> None:
    """Writes the loss of every sample and, where they are given, its mean and its gradients.

    The launch goes to the current stream of the tensors' device; it neither synchronises nor
    allocates. Shapes, dtypes and devices are the caller's responsibility.

    Args:
        predictions: V tensors (B, W) of one dtype and one row stride, their last stride 1, at any
            addresses; float16, bfloat16, float32 or float64; 2 <= V <= 16. Unused columns are not
            read.
        targets: G tensors (B, D), 1 <= G <= V and D >= 2, likewise with a dtype and a row stride of
            their own.
        concentration: (V, B), contiguous, in the compute dtype; None where the raw concentration is
            in column D of the predictions. A negative one makes the loss of its sample NaN.
        loss: (B,), contiguous, float32, or float64 if an input is: the compute dtype. Overwritten.
        mean: (), the mean of `loss`, summed in a fixed order. Overwritten, unless B is 0.
        ticket: int32, one element, 0 and left 0; no other launch may use it at the same time.
            Needed with mean.
        gradient: (V, B, W) with strides and a dtype of its own, the last stride 1. Overwritten, by
            0 in columns that the distribution does not use; memory between the rows is not touched.
        concentration_gradient: as concentration. Overwritten. Only with concentration and gradient.
        distribution: the density that the predictions parametrise.
        link, scale, minimum, gain: kappa = scale * link(gain * raw) + minimum; without effect where
            no raw concentration is read.
        cosine: weight of the cosine, which is added to the log-density.
        weight: of a pair in the loss.
        gradient_weight: of a pair in the gradients: `weight` for those of the losses, weight / B
            for those of the mean.
    """
    first, target = predictions[0], targets[0]
    samples, dim = target.shape
    if samples == 0:
        return
    width, view_stride, row_stride = dim, 0, 0
    if gradient is not None:
        width, (view_stride, row_stride, _) = gradient.shape[2], gradient.stride()
    strides = first.stride(0), target.stride(0), view_stride, row_stride
    spherical, double = distribution == "power_spherical", loss.dtype == torch.float64
    constants = launch_arguments(
        *(dim, len(predictions), len(targets), first.element_size()),
        width=width,
        spherical=spherical,
        quadratic=link == "quadratic",
        double=double,
    )
    rows = (*predictions, *targets, concentration, loss, gradient, concentration_gradient)
    key = None
    if aligned(rows):
        key = (
            multiview_loss,
            first.device,
            (dim, width, len(predictions), len(targets), spherical, link),
            (first.dtype, target.dtype, loss.dtype, gradient is not None and gradient.dtype),
            (concentration is None, mean is None, concentration_gradient is None),
            tuple(map(kind, strides)),
        )
    programs = samples
    if constants["SEVERAL"]:
        programs = min(samples, _MOST_WARPS_IN_ALL // constants["num_warps"])
    arguments = (
        *(tuple(predictions), tuple(targets)),
        *(concentration, loss, mean, ticket, gradient, concentration_gradient),
        *(scale, minimum, gain, cosine, weight, gradient_weight),
        *strides,
        samples,
    )
    # Does nothing for CPU tensors, which the interpreter takes.
    with torch.cuda.device_of(first):
        launch(multiview_loss_kernel, key, (programs, 1, 1), arguments, constants)


@lru_cache(maxsize=256)
def launch_arguments(
    dim: int,
    views: int,
    globals_: int,
    itemsize: int,
    *,
    width: int,
    spherical: bool,
    double: bool,
    quadratic: bool = False,
) -> dict[str, int | bool]:
    """The compile-time arguments and compiler options of a launch.

    Args:
        dim, views, globals_: D, V and G.
        itemsize: bytes of an element of the predictions.
        width: columns of the gradient, D if there is none.
        spherical: Power Spherical, not cosine.
        double: the arithmetic is fp64, so that an element occupies two registers.
        quadratic: the link; False for softplus.
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
        and (block + g) * columns * size
        <= 32 * min(most, row_warps) * (_AT_ONCE if block == v else _IN_A_LOOP)
    )
    block = next(fitting, 0)
    resident = block > 0
    if resident:
        registers = (block + g) * columns * size
    else:
        block = v
        columns = min(columns, 32 * _WARPS * _STREAMED // (block * size))
        registers = 2 * block * columns * size
    warps = triton.next_power_of_2(triton.cdiv(registers, 32 * _AT_ONCE))
    warps = min(warps, row_warps)
    # With 16 warps 64 registers of data leave too few for a loop over the samples.
    crowded = resident and warps == _MOST_WARPS and block == v
    options = {"num_warps": warps}
    if resident and not double:
        options["maxnreg"] = _MOST_REGISTERS
    return options | {
        "DIM": dim,
        "WIDTH": width,
        "VIEWS": views,
        "GLOBALS": globals_,
        "BLOCK_V": block,
        "BLOCK_G": g,
        "BLOCK_D": columns,
        "MEAN_WIDTH": warps * _BYTES_PER_WARP // (4 * size),
        "RESIDENT": resident,
        "SEVERAL": not crowded,
        "POWER_SPHERICAL": spherical,
        "QUADRATIC": quadratic,
        "DOUBLE": double,
    }


@triton.jit(do_not_specialize=["mean_ptr", "ticket_ptr", "samples"])
def multiview_loss_kernel(
    p_ptrs: tl.tuple,
    z_ptrs: tl.tuple,
    kappa_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    ticket_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    kappa_grad_ptr: tl.tensor,
    scale: tl.float64,  # a Python float would arrive as fp32
    minimum: tl.float64,
    gain: tl.float64,
    cosine: tl.float64,
    weight: tl.float64,
    grad_weight: tl.float64,
    p_stride: tl.int64,
    z_stride: tl.int64,
    grad_stride_view: tl.int64,
    grad_stride: tl.int64,
    samples: tl.int64,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VIEWS: tl.constexpr,
    GLOBALS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN_WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    SEVERAL: tl.constexpr,
    POWER_SPHERICAL: tl.constexpr,
    QUADRATIC: tl.constexpr,
    DOUBLE: tl.constexpr,
) -> None:
    """The formulas above for sample `program_id(0)`. kappa_ptr None: the raw concentration is
    column DIM of p."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    RAW: tl.constexpr = POWER_SPHERICAL and kappa_ptr is None
    FULL_D: tl.constexpr = DIM % BLOCK_D == 0
    FULL_V: tl.constexpr = FULL_D & (VIEWS % BLOCK_V == 0)
    FULL_G: tl.constexpr = FULL_D & (GLOBALS == BLOCK_G)
    TAIL: tl.constexpr = triton.next_power_of_2(WIDTH - DIM)
    # int64 before any address is formed: B W can exceed 2^31.
    sample = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    end = samples if SEVERAL else sample + 1
    while sample < end:
        if RESIDENT:
            z_elements = elements(z_ptrs, 0, g[None, :, None], sample * z_stride + d, BLOCK_G)
            z = load(z_elements, (g < GLOBALS)[None, :, None] & (d < DIM), FULL_G).to(ACC)
            if VIEWS > BLOCK_V:
                zz = tl.sum(z * z, axis=2)

        total = tl.full([], 0.0, ACC)
        for first_view in range(0, VIEWS, BLOCK_V):
            block = tl.arange(0, BLOCK_V)
            v = first_view + block
            is_view = (v < VIEWS)[:, None]
            scalar = v.to(tl.int64)[:, None] * samples + sample
            if RAW:
                at = sample * p_stride + DIM
                raws = elements(p_ptrs, first_view, block[:, None], at, BLOCK_V)
                raw = tl.load(raws, mask=is_view, other=0.0).to(ACC)
            elif POWER_SPHERICAL:
                kappa = tl.load(kappa_ptr + scalar, mask=is_view, other=0.0)
            p_row = sample * p_stride
            z_row = sample * z_stride
            if RESIDENT:
                p_used = is_view[:, :, None] & (d < DIM)
                p = load_views(p_ptrs, first_view, p_row + d, p_used, BLOCK_V, FULL_V).to(ACC)
                pz = tl.sum(p * z, axis=2)
                pp = tl.sum(p * p, axis=2)
                if VIEWS <= BLOCK_V:  # after p's loads: none passes the barrier that ends a sum
                    zz = tl.sum(z * z, axis=2)
            else:
                pz = tl.zeros([BLOCK_V, BLOCK_G], ACC)
                pp = tl.zeros([BLOCK_V, 1], ACC)
                zz = tl.zeros([1, BLOCK_G], ACC)
                for start in range(0, DIM, BLOCK_D):
                    column = start + d
                    p_used = is_view[:, :, None] & (column < DIM)
                    p = load_views(p_ptrs, first_view, p_row + column, p_used, BLOCK_V, FULL_V)
                    p = p.to(ACC)
                    pp += tl.sum(p * p, axis=2)
                    for i in range(GLOBALS):
                        z = load_target(z_ptrs, i, z_row, column, DIM, FULL_D).to(ACC)
                        pz += tl.where(g[None, :] == i, one_per_lane(tl.sum(p * z, axis=2)), 0.0)
                        zz += tl.where(g[None, :] == i, one_per_lane(tl.sum(z * z, axis=2)), 0.0)

            p_square = one_per_lane(pp)
            z_square = one_per_lane(zz)
            norms = square_root(p_square) * square_root(z_square)
            is_zero = (p_square < TINY_SQUARE) | (z_square < TINY_SQUARE)
            # An infinite square must give NaN, where a finite product over an infinite norm would
            # give 0.
            product = one_per_lane(pz) + (p_square * 0.0 + z_square * 0.0)
            cos = tl.where(is_zero, 0.0, divide(product, norms))
            is_pair = is_view & (g < GLOBALS)[None, :] & (v[:, None] != g[None, :])
            if POWER_SPHERICAL:
                if RAW:
                    x = tl.full([], gain, ACC) * raw
                    if QUADRATIC:
                        linked, slope = quadratic(x)
                    else:
                        linked, slope = softplus(x)
                    kappa = tl.full([], scale, ACC) * linked + tl.full([], minimum, ACC)
                else:
                    kappa = tl.where(kappa < 0.0, float("nan"), kappa)
                value, by_kappa, by_cos = log_density_ratio(kappa, cos, DIM)
                value += tl.full([], cosine, ACC) * cos
                by_cos += tl.full([], cosine, ACC)
            else:
                value = cos
                by_cos = tl.full([BLOCK_V, BLOCK_G], 1.0, ACC)
            total += tl.sum(tl.where(is_pair, value, 0.0))

            if grad_ptr is not None:
                w = tl.full([], grad_weight, ACC)
                grad_row = grad_ptr + sample * grad_stride + v.to(tl.int64) * grad_stride_view
                grad_rows = grad_row[:, None, None]
                # Both factors are by_cos divided once, so that what they leave along p is the
                # rounding of two divisions.
                by_cos = tl.where(is_pair & (is_zero == 0), by_cos, 0.0)
                other = -w * tl.where(is_zero, 0.0, divide(by_cos, norms))
                own = tl.sum(by_cos * cos, axis=1, keep_dims=True)
                own = (w * tl.where(p_square < TINY_SQUARE, 0.0, divide(own, p_square)))[:, :, None]
                if RESIDENT:
                    p_grad = own * p + tl.sum(other[:, :, None] * z, axis=1, keep_dims=True)
                    store(grad_rows + d, p_grad, is_view[:, :, None] & (d < DIM), FULL_V)
                else:
                    for start in range(0, DIM, BLOCK_D):
                        column = start + d
                        p_used = is_view[:, :, None] & (column < DIM)
                        p = load_views(p_ptrs, first_view, p_row + column, p_used, BLOCK_V, FULL_V)
                        p_grad = own * p.to(ACC)
                        for i in range(GLOBALS):
                            z = load_target(z_ptrs, i, z_row, column, DIM, FULL_D).to(ACC)
                            factor = tl.where(g[None, :] == i, other, 0.0)
                            p_grad += tl.sum(factor, axis=1, keep_dims=True)[:, :, None] * z
                        store(grad_rows + column, p_grad, p_used, FULL_V)
                if POWER_SPHERICAL:
                    by_kappa = -w * tl.sum(tl.where(is_pair, by_kappa, 0.0), axis=1, keep_dims=True)
                if kappa_grad_ptr is not None:
                    tl.store(kappa_grad_ptr + scalar, by_kappa, mask=is_view)
                if WIDTH > DIM:
                    column = tl.arange(0, TAIL)[None, :]
                    tail = tl.zeros([BLOCK_V, TAIL], ACC)
                    if RAW:
                        if QUADRATIC:  # at the bound only what raises kappa counts
                            by_kappa = tl.where((x < LEAST_ROOT) & (by_kappa > 0.0), 0.0, by_kappa)
                        by_raw = tl.full([], scale * gain, ACC) * slope * by_kappa
                        tail = tl.where(column == 0, by_raw, tail)
                    used = is_view & (column < WIDTH - DIM)
                    tl.store(grad_row[:, None] + DIM + column, tail, mask=used)

        tl.store(loss_ptr + sample, -tl.full([], weight, ACC) * total)
        sample += tl.num_programs(0) if SEVERAL else 1

    if mean_ptr is not None:
        store_mean(mean_ptr, ticket_ptr, loss_ptr, samples, MEAN_WIDTH)
