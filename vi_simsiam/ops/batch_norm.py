"""BatchNorm of several views, an addition and a ReLU in one: the reference, the choice of a
backend, and its gradients.

A batch holds `groups` views one after the other. Each is normalised by its own statistics, and
running statistics are updated by the views in turn, as if they had come one by one. What the fused
kernels compute and move is described in kernels/batch_norm.py: forward is two launches or one, and
so is backward.

Code under torch.compile is left to PyTorch, which fuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import choose_backend
from vi_simsiam.ops.tickets import new_tickets

if TYPE_CHECKING:
    from vi_simsiam.kernels.batch_norm import Plan

BATCH_NORM_BACKENDS = ("eager", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        x: (N, C, height, width), for the fused backend in channels_last, or (N, C).
        weight, bias: (C,), or None for 1 and 0.
        running_mean, running_var: (C,), updated in training mode by each group in turn; both or
            none.
        groups: how many views of equally many samples x holds.
        residual: shaped as x; None for nothing to add.
        relu: whether what is negative becomes 0.
        momentum: weight of a group's statistics in the running ones.
        eps: added to the variance.
        training: whether the batch's statistics normalise, not the running ones.
        backend: "eager", "triton" (fused, once differentiable, training mode only), or "auto":
            triton for CUDA tensors where it runs and takes x, and under TRITON_INTERPRET=1.

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
    check_groups(x, groups, training=training)
    parameters = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_parameters(x, parameters)
    if choose_fused(backend, x, parameters, training=training) == "eager":
        parts = x.chunk(groups) if training and groups > 1 else (x,)
        statistics = running_mean, running_var, weight, bias, training, momentum, eps
        normalised = [F.batch_norm(part, *statistics) for part in parts]
        y = normalised[0] if len(normalised) == 1 else torch.cat(normalised)
        y = y if residual is None else y + residual
        return (y.relu() if relu else y).to(x.dtype)
    x = x.contiguous(memory_format=_layout(x))
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=_layout(x))
    numbers = groups, relu, momentum, eps
    result: Tensor = _BatchNormAct.apply(
        x, residual, weight, bias, running_mean, running_var, *numbers
    )
    return result


def check_groups(x: Tensor, groups: int, *, training: bool = True) -> None:
    """Raise InputError unless the groups divide x's batch and have a variance to train with."""
    if groups < 1 or len(x) % groups:
        raise InputError(f"groups: {groups} must divide the batch of {len(x)}")
    if training and x.numel() <= groups * x.shape[1]:
        raise InputError(
            f"x: shape {tuple(x.shape)} in {groups} groups must hold more than one value "
            "per channel and group"
        )


def check_parameters(x: Tensor, parameters: Mapping[str, Tensor | None]) -> None:
    """Raise InputError unless weight, bias, running_mean and running_var, as far as given, fit x's
    channels and device."""
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.shape != x.shape[1:2]:
            raise InputError(
                f"{name}: shape {tuple(parameter.shape)} must be ({x.shape[1]},), x's channels"
            )
        if parameter.device != x.device:
            raise InputError(f"{name}: on {parameter.device}, must be on x's device {x.device}")
    if (parameters["running_mean"] is None) != (parameters["running_var"] is None):
        raise InputError("running_mean, running_var: both must be given or none")


def choose_fused(
    backend: str, x: Tensor, parameters: Mapping[str, Tensor | None], *, training: bool = True
) -> Literal["eager", "triton"]:
    """The backend for x: what the fused one does not take is left to eager, unless it was named
    explicitly.

    Raises:
        InputError: no such backend, or "triton" for what it does not take.
        BackendUnavailableError: "triton" cannot run on x's device.
    """
    preferred = ("triton", "eager")
    if choose_backend(backend, x.device.type, BATCH_NORM_BACKENDS, preferred) == "eager":
        return "eager"
    given = [parameter for parameter in parameters.values() if parameter is not None]
    problem = None
    if torch.compiler.is_compiling():
        problem = "no code under torch.compile"
    elif not training:
        problem = "training mode alone"
    elif x.dtype not in _DTYPES or any(parameter.dtype == torch.float64 for parameter in given):
        problem = (
            f"float32, bfloat16 and float16, and parameters of at most float32, not x in {x.dtype}"
        )
    elif not all(parameter.is_contiguous() for parameter in given):
        problem = "contiguous parameters"
    elif x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        problem = f"torch.channels_last, not strides {tuple(x.stride())} of shape {tuple(x.shape)}"
    if problem is None:
        return "triton"
    if backend == "triton":
        raise InputError(f"x: the fused backend takes {problem}")
    return "eager"


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def _size(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Rows of a group, channels, groups and bytes of an element."""
    channels = x.shape[1]
    return x.numel() // (groups * channels), channels, groups, x.element_size()


def workspace(x: Tensor, chosen: Plan, groups: int) -> tuple[Tensor, Tensor]:
    """Partial sums and tickets of a launch that sums."""
    floats = 2 * groups * chosen.parts * x.shape[1]
    partials = torch.empty(floats, dtype=torch.float32, device=x.device)
    return partials, new_tickets(x.device, chosen.strips)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 where Triton's interpreter stands in for one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


class _BatchNormAct(torch.autograd.Function):
    """The context is taken by forward: with a setup_context of its own apply() costs 40 us more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        groups: int,
        relu: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        from vi_simsiam.kernels import batch_norm as kernel

        chosen = kernel.plan(*_size(x, groups), 1, multiprocessors(x.device))
        y = torch.empty_like(x, memory_format=_layout(x))
        # Mean, invstd and unbiased variance.
        statistics = torch.empty((3, groups, x.shape[1]), dtype=torch.float32, device=x.device)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if not chosen.single:
            sums = workspace(x, chosen, groups)
        given = (x, residual, weight, bias, running_mean, running_var, y, statistics, *sums)
        kernel.forward(*given, chosen, groups=groups, relu=relu, momentum=momentum, eps=eps)
        ctx.groups, ctx.relu, ctx.has_residual = groups, relu, residual is not None
        ctx.save_for_backward(
            x, y if relu and residual is not None else None, weight, bias, statistics
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from vi_simsiam.kernels import batch_norm as kernel
        from vi_simsiam.kernels import batch_norm_backward

        x, y, weight, bias, statistics = ctx.saved_tensors
        size, tensors = _size(x, ctx.groups), 2 if y is None else 3
        chosen = kernel.plan(*size, tensors, multiprocessors(x.device))
        # Without a ReLU the residual's gradient is that of the result.
        by_residual = gradient if ctx.has_residual else None
        gradient = gradient.contiguous(memory_format=_layout(x))
        by_x = torch.empty_like(x, memory_format=_layout(x))
        if y is not None:
            by_residual = torch.empty_like(by_x)
        by_weight = None if weight is None else torch.empty_like(weight)
        by_bias = None if bias is None else torch.empty_like(bias)
        sums: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if not chosen.single:
            sums = (torch.empty_like(statistics[:2]), *workspace(x, chosen, ctx.groups))
        given = (gradient, x, y, weight, bias, statistics)
        results = (by_x, None if y is None else by_residual, by_weight, by_bias)
        batch_norm_backward.backward(
            *given, *results, *sums, chosen, groups=ctx.groups, relu=ctx.relu
        )
        return by_x, by_residual, by_weight, by_bias, *[None] * 6
