"""The network as a training step calls it: with the project's kernels, compiled, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.distributed import World
from vi_simsiam.errors import InputError
from vi_simsiam.models import Output, SimSiam
from vi_simsiam.normalisation import PerView
from vi_simsiam.ops.backends import why_unavailable

Network = Callable[[Sequence[Tensor]], Output]


def training_network(
    model: SimSiam, *, kernels: bool, compiled: bool = False, bf16: bool = False
) -> Network:
    """Choose the layers that map views to the model's `Output`; all compute the same function.

    Args:
        model: on the device to train on. From now on views of one size pass through it together,
            unless it has a BatchNorm that would see them as one batch: that of an own backbone, or
            SyncBatchNorm.
        kernels: use the project's operations for BatchNorm and its successors, the first
            convolution and the conversion of weights. Ignored with `compiled`, and where views do
            not pass together.
        compiled: pass the network through torch.compile.
        bf16: the network is called under autocast to bfloat16.
    """
    model.shared_passes = all(
        isinstance(norm, PerView) for norm in model.modules() if isinstance(norm, _BatchNorm)
    )
    model.fused = kernels and model.shared_passes and not compiled
    if compiled:
        return torch.compile(model, dynamic=False)  # type: ignore[no-any-return]
    return Bfloat16Weights(model) if model.fused and bf16 else model


def use_kernels(config: TrainConfig, world: World) -> bool:
    """Decide on the project's kernels.

    Raises:
        InputError: kernels is "on", and they cannot be used.
    """
    problem = why_unavailable("triton", world.device.type)
    if problem is not None:
        problem = f"Triton cannot run them here: {problem}"
    elif config.compile:
        problem = "compile replaces them"
    elif not world.alone:
        problem = "they are for a run without torchrun"
    elif config.sync_batch_norm:
        problem = "they do not take statistics over several GPUs, as sync_batch_norm asks"
    if config.kernels == "on" and problem is not None:
        raise InputError(f"kernels: 'on' cannot be used: {problem}; auto and off run here")
    wanted = config.kernels == "on" or (config.kernels == "auto" and world.device.type == "cuda")
    return wanted and problem is None


def check_capture(config: TrainConfig, world: World) -> None:
    """Raise InputError if capture is "on", and the step cannot be captured."""
    if config.capture != "on":
        return
    if world.device.type != "cuda":
        raise InputError(
            f"capture: 'on' needs a CUDA device, and this run is on {world.device}; "
            "auto and off run here"
        )
    if not world.alone:
        raise InputError(
            "capture: 'on' is for a run without torchrun; the ranks' collectives are not captured"
        )


def check_compiler(device: torch.device) -> None:
    """Compile a small function, so that a missing compiler is found before a run begins.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or library each raises its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"compile: torch.compile does not work here ({reason}); leave --compile out, "
            "or install a C++ compiler such as g++"
        ) from error


class Bfloat16Weights:
    """A model that computes with bfloat16 copies of its convolutions' and linear layers' weights.

    The result is that of autocast. Autocast copies the weights layer by layer and converts every
    gradient on its own: two launches for each weight. Here one launch makes all copies, and one all
    gradients. Call it under autocast, which converts everything else.

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
        """The model's output for `views`."""
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
        used = iter(_all_to([g for g in gradients if g is not None], torch.float32))
        return tuple(None if gradient is None else next(used) for gradient in gradients)


def _all_to(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if converted:
        torch._foreach_copy_(converted, list(tensors))
    return tuple(converted)
