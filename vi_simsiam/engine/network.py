"""The network as a training step calls it: with the project's kernels, compiled, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.errors import InputError
from vi_simsiam.models import Output, SimSiam
from vi_simsiam.normalisation import PerView

Network = Callable[[Sequence[Tensor]], Output]


def training_network(
    model: SimSiam, *, kernels: bool, compiled: bool = False, bf16: bool = False
) -> Network:
    """Choose the layers that map views to the model's `Output` in training; all compute the same function.

    Args:
        model: on the device to train on. Views of one size pass through it together from now on, unless it has a
            BatchNorm that would see them as one batch: that of an own backbone, or SyncBatchNorm.
        kernels: whether BatchNorm and what follows it, the first convolution and the conversion of the weights are the
            project's own operations. Not used with `compiled`, nor where the views do not pass together.
        compiled: whether the network passes through torch.compile.
        bf16: whether the network is called under autocast to bfloat16.
    """
    model.shared_passes = all(
        isinstance(norm, PerView) for norm in model.modules() if isinstance(norm, _BatchNorm)
    )
    model.fused = kernels and model.shared_passes and not compiled
    if compiled:
        return torch.compile(model, dynamic=False)  # type: ignore[no-any-return]
    return Bfloat16Weights(model) if model.fused and bf16 else model


def check_compiler(device: torch.device) -> None:
    """Compile a small function, so that a compiler that is missing is found before a run begins.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or library each raises its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"compile: torch.compile does not work here ({reason}); leave --compile out, or install a C++ compiler such as g++"
        ) from error


class Bfloat16Weights:
    """A model that computes with bfloat16 copies of its convolutions' and linear layers' weights, as under autocast.

    Autocast makes the copies layer by layer, and converts every gradient by itself: two launches for each weight. Here
    all are made by one, and so are the gradients in float32. Call it under autocast, which converts what is left.

    Args:
        model: its weights stay float32, and receive float32 gradients.
    """

    def __init__(self, model: SimSiam) -> None:
        self._model = model
        self._names = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        ]

    def __call__(self, views: Sequence[Tensor]) -> Output:
        """As the model."""
        weights = [self._model.get_parameter(name) for name in self._names]
        copies = dict(zip(self._names, _Converted.apply(*weights), strict=True))
        return torch.func.functional_call(self._model, copies, (views,))  # type: ignore[no-any-return]


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _all_to(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        used = iter(
            _all_to([gradient for gradient in gradients if gradient is not None], torch.float32)
        )
        return tuple(None if gradient is None else next(used) for gradient in gradients)


def _all_to(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if converted:
        torch._foreach_copy_(converted, list(tensors))
    return tuple(converted)
