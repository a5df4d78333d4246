"""BatchNorm of several views, an addition and a ReLU in one: the reference, the choice of a
backend, and its gradients.

A batch holds `groups` views one after the other. Each is normalised by its own statistics, and
running statistics are updated by the views in turn, as if they had come one by one. What the fused
backends compute and move is described in kernels/batch_norm.py and csrc/batch_norm_cpu.cpp.

Code under torch.compile is left to PyTorch, which fuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import choose_backend, extension, interpreting
from vi_simsiam.ops.multiview_loss_fused import has_memory
from vi_simsiam.ops.tickets import new_tickets

if TYPE_CHECKING:
    from vi_simsiam.kernels.batch_norm import Plan

BATCH_NORM_BACKENDS = ("eager", "triton", "cpu")
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}


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
    parameters = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_parameters(x, parameters)
    chosen = choose_fused(backend, x, parameters, residual, training=training)
    if chosen == "eager":
        parts = x.chunk(groups) if training and groups > 1 else (x,)
        statistics = running_mean, running_var, weight, bias, training, momentum, eps
        normalised = [F.batch_norm(part, *statistics) for part in parts]
        y = normalised[0] if len(normalised) == 1 else torch.cat(normalised)
        y = y if residual is None else y + residual
        return (y.relu() if relu else y).to(x.dtype)
    x = x.contiguous(memory_format=_layout(x))
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=_layout(x))
    numbers = groups, relu, momentum, eps, chosen
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
    backend: str,
    x: Tensor,
    parameters: Mapping[str, Tensor | None],
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
    given = [parameter for parameter in parameters.values() if parameter is not None]
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    accepted = narrow if chosen == "triton" else (statistics_dtype(x),)
    problem = None
    if torch.compiler.is_compiling():
        problem = "no code under torch.compile"
    elif chosen == "cpu" and not has_memory(x, residual, *given):
        problem = "tensors with memory of their own, not fake, traced or negated ones"
    elif not training:
        problem = "training mode alone"
    elif x.dtype not in _DTYPES[chosen]:
        problem = f"{_names(_DTYPES[chosen])}, not {_names((x.dtype,))}"
    elif not all(parameter.dtype in accepted for parameter in given):
        problem = f"parameters in {_names(accepted)}"
    elif not all(parameter.is_contiguous() for parameter in given):
        problem = "contiguous parameters"
    elif x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        problem = f"torch.channels_last, not strides {tuple(x.stride())} of shape {tuple(x.shape)}"
    if problem is None:
        return "cpu" if chosen == "cpu" else "triton"
    if backend == chosen:
        raise InputError(f"x: the backend {chosen!r} takes {problem}")
    return "eager"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x's statistics and parameters: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


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
        backend: str,
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=_layout(x))
        # Mean, invstd and, of Triton, the unbiased variance.
        shape, dtype = (3, groups, x.shape[1]), statistics_dtype(x)
        statistics = torch.empty(shape, dtype=dtype, device=x.device)
        given = (x, residual, weight, bias, running_mean, running_var, y, statistics)
        numbers = {"groups": groups, "relu": relu, "momentum": momentum, "eps": eps}
        if backend == "cpu":
            _run_on_cpu("batch_norm_forward_cpu", dict(zip(_FORWARD, given, strict=True)), numbers)
        else:
            _launch_forward(given, numbers)
        ctx.backend, ctx.has_residual = backend, residual is not None
        ctx.numbers = {"groups": groups, "relu": relu}
        ctx.save_for_backward(
            x, y if relu and residual is not None else None, weight, bias, statistics
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, statistics = ctx.saved_tensors
        # Without a ReLU the residual's gradient is that of the result.
        by_residual = gradient if ctx.has_residual else None
        gradient = gradient.contiguous(memory_format=_layout(x)).resolve_neg()
        by_x = torch.empty_like(x, memory_format=_layout(x))
        if y is not None:
            by_residual = torch.empty_like(by_x)
        by_weight = None if weight is None else torch.empty_like(weight)
        by_bias = None if bias is None else torch.empty_like(bias)
        results = by_x, None if y is None else by_residual, by_weight, by_bias
        tensors = gradient, x, y, weight, bias, statistics, *results
        if ctx.backend == "cpu":
            named = dict(zip(_BACKWARD, tensors, strict=True))
            _run_on_cpu("batch_norm_backward_cpu", named, ctx.numbers)
        else:
            _launch_backward(tensors, ctx.numbers)
        return by_x, by_residual, by_weight, by_bias, *[None] * 7


_FORWARD = ("x", "residual", "weight", "bias", "running_mean", "running_var", "y", "statistics")
_BACKWARD = (
    "gradient", "x", "y", "weight", "bias", "statistics",
    "by_x", "by_residual", "by_weight", "by_bias",
)  # fmt: skip


def _run_on_cpu(
    name: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
) -> None:
    x = tensors["x"]
    assert x is not None
    rows, channels, _, _ = _size(x, numbers["groups"])
    addresses = {key: each.data_ptr() for key, each in tensors.items() if each is not None}
    numbers = {**numbers, "rows": rows, "channels": channels, "dtype": _names((x.dtype,))}
    getattr(extension(), name)(**addresses, **numbers, threads=torch.get_num_threads())


def _launch_forward(given: tuple[Tensor | None, ...], numbers: Mapping[str, Any]) -> None:
    from vi_simsiam.kernels import batch_norm as kernel

    x, groups = given[0], numbers["groups"]
    assert x is not None
    chosen = kernel.plan(*_size(x, groups), 1, multiprocessors(x.device))
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if not chosen.single:
        sums = workspace(x, chosen, groups)
    kernel.forward(*given, *sums, chosen, **numbers)


def _launch_backward(given: tuple[Tensor | None, ...], numbers: Mapping[str, Any]) -> None:
    from vi_simsiam.kernels import batch_norm as kernel
    from vi_simsiam.kernels import batch_norm_backward

    _, x, y, _, _, statistics, *_ = given
    assert x is not None
    assert statistics is not None
    groups, tensors = numbers["groups"], 2 if y is None else 3
    chosen = kernel.plan(*_size(x, groups), tensors, multiprocessors(x.device))
    sums: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if not chosen.single:
        sums = (torch.empty_like(statistics[:2]), *workspace(x, chosen, groups))
    batch_norm_backward.backward(*given, *sums, chosen, **numbers)
