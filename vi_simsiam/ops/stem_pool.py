"""BatchNorm of several views, ReLU and max-pool in one, as they follow the first convolution of a
ResNet.

The meaning of the groups is that of `batch_norm_act`: each is a view, normalised by its own
statistics, and running statistics are updated by the views in turn. The pool is that of a ResNet: 3
x 3, stride 2, padding 1. What the fused kernels compute and move is described in
kernels/stem_pool.py: forward is two launches, and so is backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import check_storage
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.batch_norm_checks import (
    check_groups,
    check_parameters,
    check_storages,
    choose_fused,
)
from vi_simsiam.ops.batch_norm_fused import multiprocessors, workspace
from vi_simsiam.ops.once import refuse_derivative

_LAYOUT = torch.channels_last


def batch_norm_relu_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """max_pool2d(relu(batch_norm(x)), 3, stride=2, padding=1) in training mode, each group
    normalised by its own statistics.

    Where values of a window are equal, the first one gets the gradient. Triton compares before it
    rounds; channels whose weight is 0 pass the gradient, which reaches the weight and the
    bias alone, to the largest x.

    Args:
        x: (N, C, height, width), for the fused backends in channels_last.
        weight, bias: (C,), or None for 1 and 0.
        running_mean, running_var: (C,), updated by each group in turn; both or none.
        groups: how many views of equally many images x holds, one after the other.
        momentum: weight of a group's statistics in the running ones.
        eps: added to the variance.
        backend: as in `batch_norm_act`; all but triton pool the result of that.

    Returns:
        (N, C, (height + 1) // 2, (width + 1) // 2) in x's dtype; of the fused backends
        in channels_last.

    Raises:
        InputError: a shape, layout, number of groups or backend that is not accepted.
        BackendUnavailableError: the backend was named explicitly and cannot run on this device.
    """
    if x.dim() != 4 or 0 in x.shape:
        shape = tuple(x.shape)
        raise InputError(f"x: shape {shape} must be (N, C, height, width), each at least 1")
    check_groups(x, groups)
    parameters = weight, bias, running_mean, running_var
    check_parameters(x, *parameters)
    chosen = choose_fused(backend, x, parameters)
    if chosen != "triton" or torch.compiler.is_compiling():
        y = batch_norm_act(
            x, *parameters, groups=groups, momentum=momentum, eps=eps, backend=chosen
        )
        return F.max_pool2d(y, 3, 2, 1)
    pooled: Tensor = _StemPool.apply(x, *parameters, groups, momentum, eps)
    return pooled


class _StemPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        groups: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        from vi_simsiam.kernels import stem_pool as kernel

        check_storages(x, weight, bias, running_mean, running_var)
        images, channels, height, width = x.shape
        chosen = kernel.plan(*x.shape, groups, x.element_size(), multiprocessors(x.device))
        shape = images, channels, kernel.pooled(height), kernel.pooled(width)
        y, taken = (
            torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
            for _ in range(2)
        )
        codes = torch.empty_like(y, dtype=torch.uint8, memory_format=_LAYOUT)
        statistics = torch.empty((3, groups, channels), dtype=torch.float32, device=x.device)
        sums = workspace(x, chosen.statistics, groups)
        given = (x, weight, bias, running_mean, running_var)
        results = (y, taken, codes, statistics, *sums)
        kernel.forward(*given, *results, chosen, groups=groups, momentum=momentum, eps=eps)
        ctx.groups, ctx.chosen = groups, chosen
        ctx.save_for_backward(x, taken, codes, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from vi_simsiam.kernels import stem_pool_backward as kernel

        x, taken, codes, weight, bias, statistics = ctx.saved_tensors
        check_storage("gradient", gradient)
        check_storage("saved for backward", x, weight, bias)
        gradient = gradient.contiguous(memory_format=_LAYOUT)
        by_x = torch.empty_like(x, memory_format=_LAYOUT)
        by_weight = None if weight is None else torch.empty_like(weight)
        by_bias = None if bias is None else torch.empty_like(bias)
        sums = (torch.empty_like(statistics[:2]), *workspace(x, ctx.chosen.sums, ctx.groups))
        given = (gradient, x, taken, codes, weight, bias, statistics)
        results: tuple[Tensor | None, ...] = (by_x, by_weight, by_bias)
        kernel.backward(*given, *results, *sums, ctx.chosen, groups=ctx.groups)
        if torch.is_grad_enabled():
            saved = (gradient, *ctx.saved_tensors)
            results = refuse_derivative("batch_norm_relu_max_pool", results, *saved)
        return *results, *[None] * 5
