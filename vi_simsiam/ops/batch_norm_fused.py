"""BatchNorm, addition and ReLU by a fused backend: the launches and their gradients.

In eager PyTorch an autograd Function launches a backend directly. In what torch.compile and
torch.export trace the same launches are the operators `vi_simsiam::batch_norm_act` and
`vi_simsiam::batch_norm_act_backward`, which cost more on the host. An operator with gradients may
change none of its inputs, so the first returns the new running statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vi_simsiam.ops.backends import check_storage, extension
from vi_simsiam.ops.batch_norm_checks import (
    check_groups,
    check_parameters,
    check_shapes,
    check_storages,
    choose_fused,
    statistics_dtype,
)
from vi_simsiam.ops.once import refuse, refuse_derivative
from vi_simsiam.ops.tickets import new_tickets, reserve_tickets

if TYPE_CHECKING:
    from vi_simsiam.kernels.batch_norm import Plan

_NAME = "batch_norm_act"
_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_LAYOUTS = {2: torch.contiguous_format, 4: torch.channels_last}


class NormCall(NamedTuple):
    """Arguments of `batch_norm_act` beside its tensors."""

    groups: int
    relu: bool
    momentum: float
    eps: float
    backend: str


def fused_batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    call: NormCall,
) -> Tensor:
    """The result for checked inputs, differentiable once (else RuntimeError)."""
    given = x, residual, weight, bias, running_mean, running_var
    if torch.compiler.is_compiling():
        reserve_tickets(x.device.type, x.device.index)
        result: Tensor
        result, _, mean, var = torch.ops.vi_simsiam.batch_norm_act(*given, *call)
        if running_mean is not None and running_var is not None:
            running_mean.copy_(mean)
            running_var.copy_(var)
    else:
        result = _BatchNormAct.apply(call, *given)
    return result


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


def _forward(
    call: NormCall,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Result and statistics (2, groups, C): mean and invstd. Triton adds the unbiased variance."""
    groups, relu, momentum, eps, backend = call
    x = _in_rows(x)
    if residual is not None:
        residual = _in_rows(residual if residual.dtype == x.dtype else residual.to(x.dtype))
    y, statistics = _outputs(x, call)
    tensors = x, residual, weight, bias, running_mean, running_var, y, statistics
    size = _size(x, groups)
    if backend == "cpu":
        options = relu, momentum, eps, _NAMES[x.dtype], torch.get_num_threads()
        module: Any = extension()
        module.batch_norm_forward_cpu(*map(_address, tensors), *size, *options)
        return y, statistics
    from vi_simsiam.kernels import batch_norm as kernel

    chosen = kernel.plan(*size, x.element_size(), 1, multiprocessors(x.device))
    sums = (None, None) if chosen.single else workspace(x, chosen, groups)
    kernel.forward(*tensors, *sums, chosen, groups=groups, relu=relu, momentum=momentum, eps=eps)
    return y, statistics


def _backward(
    call: NormCall,
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the residual if y is given, of weight and of bias.

    y, the result of forward, is needed for a ReLU with a residual; the residual's gradient without
    a ReLU is that of the result.
    """
    groups, relu, *_, backend = call
    check_storage("gradient", gradient)
    check_storage("saved for backward", x, y, weight, bias)
    gradient, x, y = _in_rows(gradient).resolve_neg(), _in_rows(x), y if y is None else _in_rows(y)
    results = _gradient_outputs(x, y, weight, bias)
    tensors = gradient, x, y, weight, bias, statistics, *results
    size = _size(x, groups)
    if backend == "cpu":
        options = relu, _NAMES[x.dtype], torch.get_num_threads()
        module: Any = extension()
        module.batch_norm_backward_cpu(*map(_address, tensors), *size, *options)
        return results
    from vi_simsiam.kernels import batch_norm as kernel
    from vi_simsiam.kernels import batch_norm_backward

    read = 2 if y is None else 3
    chosen = kernel.plan(*size, x.element_size(), read, multiprocessors(x.device))
    sums: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if not chosen.single:
        sums = (torch.empty_like(statistics[:2]), *workspace(x, chosen, groups))
    batch_norm_backward.backward(*tensors, *sums, chosen, groups=groups, relu=relu)
    return results


def _outputs(x: Tensor, call: NormCall) -> tuple[Tensor, Tensor]:
    shape = 3 if call.backend == "triton" else 2, call.groups, x.shape[1]
    y = torch.empty_like(x, memory_format=_LAYOUTS[x.dim()])
    return y, x.new_empty(shape, dtype=statistics_dtype(x))


def _gradient_outputs(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    layout = _LAYOUTS[x.dim()]
    return (
        torch.empty_like(x, memory_format=layout),
        None if y is None else torch.empty_like(x, memory_format=layout),
        None if weight is None else torch.empty_like(weight),
        None if bias is None else torch.empty_like(bias),
    )


def _in_rows(x: Tensor) -> Tensor:
    """x as contiguous rows of channels."""
    return x.contiguous(memory_format=_LAYOUTS[x.dim()])


def _size(x: Tensor, groups: int) -> tuple[int, int, int]:
    """Rows of a group, channels and groups."""
    channels = x.shape[1]
    return x.numel() // (groups * channels), channels, groups


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _BatchNormAct(torch.autograd.Function):
    """The context is taken by forward: with a setup_context of its own apply() costs 40 us more."""

    @staticmethod
    def forward(ctx: Any, call: NormCall, *given: Any) -> Tensor:
        x, residual, *parameters = given
        check_storages(x, *parameters, residual=residual)
        y, statistics = _forward(call, *given)
        _keep_for_backward(ctx, call, given, y, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias = _backward(ctx.call, gradient, *ctx.saved_tensors)
        if ctx.has_residual and not ctx.call.relu:
            residual = gradient
        results: tuple[Tensor | None, ...] = x, residual, weight, bias
        if torch.is_grad_enabled():
            results = refuse_derivative(_NAME, results, gradient, *ctx.saved_tensors)
        return None, *results, None, None


def _keep_for_backward(
    ctx: Any, call: NormCall, given: Sequence[Any], y: Tensor, statistics: Tensor
) -> None:
    x, residual, weight, bias, *_ = given
    ctx.call, ctx.has_residual = call, residual is not None
    kept = y if call.relu and ctx.has_residual else None
    ctx.save_for_backward(x, kept, weight, bias, statistics)


_NUMBERS = "int groups, bool relu, float momentum, float eps, str backend"
_OPERATOR, _GRADIENT = "vi_simsiam::batch_norm_act", "vi_simsiam::batch_norm_act_backward"
torch.library.define(
    _OPERATOR,
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    f"Tensor? running_var, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _GRADIENT,
    "(Tensor gradient, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor statistics, "
    f"{_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _operate(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Result, statistics and the new running statistics.

    The tensors are checked again: a saved program may get others than it was made with.
    """
    residual, weight, bias, *running = given[:5]
    check_storages(x, *given[1:5], residual=residual)
    call = NormCall(*given[5:])
    check_shapes(x, residual)
    check_groups(x, call.groups)
    check_parameters(x, *given[1:5])
    choose_fused(call.backend, _in_rows(x), given[1:5], residual)
    mean, var = (t if t is None else t.clone() for t in running)
    results = _forward(call, x, residual, weight, bias, mean, var)
    return (*results, *_without_none(x, (mean, var)))


def _operate_backward(gradient: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return _without_none(x, _backward(NormCall(*given[4:]), gradient, x, *given[:4]))


def _without_none(x: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """The results of an operator, empty ones for None."""
    return tuple(x.new_empty(0) if t is None else t for t in results)


torch.library.impl(_OPERATOR, "default", _operate)
torch.library.impl(_GRADIENT, "default", _operate_backward)


@torch.library.register_fake(_OPERATOR)  # type: ignore[misc]
def _shapes(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    _, _, _, *running = given[:5]
    results = (t if t is None else torch.empty_like(t) for t in running)
    return (*_outputs(x, NormCall(*given[5:])), *_without_none(x, results))


@torch.library.register_fake(_GRADIENT)  # type: ignore[misc]
def _backward_shapes(gradient: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return _without_none(x, _gradient_outputs(x, *given[:3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep_for_backward(ctx, NormCall(*inputs[6:]), inputs, *output[:2])


def _by_operator(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    operator = torch.ops.vi_simsiam.batch_norm_act_backward
    x, residual, weight, bias = operator(gradient, *ctx.saved_tensors, *ctx.call)
    if not ctx.call.relu:
        residual = gradient
    wanted = zip(ctx.needs_input_grad, (x, residual, weight, bias), strict=False)
    return *[t if needed else None for needed, t in wanted], *[None] * (2 + len(ctx.call))


torch.library.register_autograd(_OPERATOR, _by_operator, setup_context=_keep)
torch.library.register_autograd(_GRADIENT, lambda *_: refuse(_NAME))
