"""BatchNorm of several views, an addition and a ReLU in one: the operation and its reference.

A batch holds `groups` views one after the other. Each is normalised by its own statistics, and
running statistics are updated by the views in turn, as if they had come one by one. What the fused
backends compute and move is described in kernels/batch_norm.py and csrc/batch_norm_cpu.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.ops.batch_norm_checks import (
    check_groups,
    check_parameters,
    check_shapes,
    choose_fused,
)
from vi_simsiam.ops.batch_norm_fused import NormCall, fused_batch_norm_act


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """relu(batch_norm(x) + residual), every group of consecutive samples normalised by its own
    statistics.

    Args:
        x: (N, C, height, width), for the fused backends in channels_last, or (N, C).
        weight, bias: (C,), or None for 1 and 0.
        running_mean, running_var: (C,), updated in training mode by each group in turn; both or
            none.
        groups: how many views of equally many samples x holds.
        residual: shaped as x, of any dtype; None for nothing to add.
        relu: whether what is negative becomes 0.
        momentum: weight of a group's statistics in the running ones.
        eps: added to the variance.
        training: whether the batch's statistics normalise, not the running ones.
        backend: "eager", one of the fused "triton" and "cpu" (once differentiable, training mode
            only), or "auto": triton for CUDA tensors and cpu for CPU tensors where they run and
            take x, and triton under TRITON_INTERPRET=1.

    Returns:
        Shaped as x, in its dtype and layout.

    Raises:
        InputError: a shape, layout, number of groups or backend that is not accepted.
        BackendUnavailableError: the backend was named explicitly and cannot run on this device.
    """
    check_shapes(x, residual)
    check_groups(x, groups, training=training)
    parameters = weight, bias, running_mean, running_var
    check_parameters(x, *parameters)
    chosen = choose_fused(backend, x, parameters, residual, training=training)
    if chosen != "eager":
        call = NormCall(groups, relu, momentum, eps, chosen)
        return fused_batch_norm_act(x, residual, *parameters, call)
    parts = x.chunk(groups) if training and groups > 1 else (x,)
    statistics = running_mean, running_var, weight, bias, training, momentum, eps
    normalised = [F.batch_norm(part, *statistics) for part in parts]
    y = normalised[0] if len(normalised) == 1 else torch.cat(normalised)
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).to(x.dtype)
