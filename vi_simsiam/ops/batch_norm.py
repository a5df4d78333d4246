"""BatchNorm of several views, an addition and a ReLU in one: the reference, and the choice of a
backend.

A batch holds `groups` views one after the other. Each is normalised by its own statistics, and
running statistics are updated by the views in turn, as if they had come one by one. What the fused
backends compute and move is described in kernels/batch_norm.py and csrc/batch_norm_cpu.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import choose_backend, has_memory, interpreting
from vi_simsiam.ops.batch_norm_fused import NormCall, fused_batch_norm_act, statistics_dtype

BATCH_NORM_BACKENDS = ("eager", "triton", "cpu")
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


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
    if x.dim() not in (2, 4):
        raise InputError(f"x: shape {tuple(x.shape)} must be (N, C, height, width) or (N, C)")
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            f"residual: shape {tuple(residual.shape)} must be that of x, {tuple(x.shape)}"
        )
    if residual is not None and residual.device != x.device:
        raise InputError(f"residual: on {residual.device}, must be on x's device {x.device}")
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


def check_groups(x: Tensor, groups: int, *, training: bool = True) -> None:
    """Raise InputError unless the groups divide x's batch and have a variance to train with."""
    batch, channels = x.shape[:2]
    if groups < 1 or batch % groups:
        raise InputError(f"groups: {groups} must divide the batch of {batch}")
    if training and x.numel() <= groups * channels:
        raise InputError(
            f"x: shape {tuple(x.shape)} in {groups} groups must hold more than one value "
            "per channel and group"
        )


def check_parameters(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Raise InputError unless weight, bias, running_mean and running_var, as far as given, fit x's
    channels and device."""
    shape, device = x.shape[1:2], x.device
    for i, parameter in enumerate((weight, bias, running_mean, running_var)):
        if parameter is None:
            continue
        name = _PARAMETERS[i]
        if parameter.shape != shape:
            raise InputError(
                f"{name}: shape {tuple(parameter.shape)} must be ({x.shape[1]},), x's channels"
            )
        if parameter.device != device:
            raise InputError(f"{name}: on {parameter.device}, must be on x's device {device}")
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean, running_var: both must be given or none")


def choose_fused(
    backend: str,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    training: bool = True,
) -> Literal["eager", "triton", "cpu"]:
    """The backend for x: what a fused one does not take is left to eager, unless it was named
    explicitly.

    Raises:
        InputError: no such backend, or a fused one for what it does not take.
        BackendUnavailableError: the backend cannot run on x's device.
    """
    on_cpu = x.device.type == "cpu" and not interpreting()
    preferred = ("cpu" if on_cpu else "triton", "eager")
    chosen = choose_backend(backend, x.device.type, BATCH_NORM_BACKENDS, preferred)
    if chosen == "eager":
        return "eager"
    accepted = _DTYPES["triton"] if chosen == "triton" else (statistics_dtype(x),)
    problem = None
    if not torch.compiler.is_compiling() and not has_memory(x, residual, *parameters):
        problem = "tensors with memory of their own, not fake, traced or negated ones"
    elif not training:
        problem = "training mode alone"
    elif x.dtype not in _DTYPES[chosen]:
        problem = f"{_names(_DTYPES[chosen])}, not {_names((x.dtype,))}"
    elif x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        problem = f"torch.channels_last, not strides {tuple(x.stride())} of shape {tuple(x.shape)}"
    else:
        for parameter in parameters:
            if parameter is not None and parameter.dtype not in accepted:
                problem = f"parameters in {_names(accepted)}"
            elif parameter is not None and not parameter.is_contiguous():
                problem = "contiguous parameters"
    if problem is None:
        return "cpu" if chosen == "cpu" else "triton"
    if backend == chosen:
        raise InputError(f"x: the backend {chosen!r} takes {problem}")
    return "eager"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
