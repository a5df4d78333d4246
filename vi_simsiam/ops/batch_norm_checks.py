"""The inputs that `batch_norm_act` and its operator accept, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import check_storage, choose_backend, has_memory, interpreting

BATCH_NORM_BACKENDS = ("eager", "triton", "cpu")
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x's statistics and parameters: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shapes(x: Tensor, residual: Tensor | None) -> None:
    """Raise InputError unless x holds features or images, and the residual fits it."""
    if x.dim() not in (2, 4):
        raise InputError(f"x: shape {tuple(x.shape)} must be (N, C, height, width) or (N, C)")
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            f"residual: shape {tuple(residual.shape)} must be that of x, {tuple(x.shape)}"
        )
    if residual is not None and residual.device != x.device:
        raise InputError(f"residual: on {residual.device}, must be on x's device {x.device}")


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


def check_storages(x: Tensor, *parameters: Tensor | None, residual: Tensor | None = None) -> None:
    """Raise InputError for a tensor of forward that reaches beyond its storage."""
    check_storage("x", x)
    check_storage("residual", residual)
    for name, parameter in zip(_PARAMETERS, parameters, strict=True):
        check_storage(name, parameter)


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
    compiling = torch.compiler.is_compiling()
    if not (_untransformed() if compiling else has_memory(x, residual, *parameters)):
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


@torch.compiler.assume_constant_result
def _untransformed() -> bool:
    """True outside of torch.func's transforms; an operator would pass for a constant there."""
    return torch._C._functorch.peek_interpreter_stack() is None


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
