"""The network as a training step calls it: with the project's kernels, compiled, or in DDP."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.distributed import World
from vi_simsiam.errors import InputError
from vi_simsiam.models import Output, SimSiam
from vi_simsiam.normalisation import PerView
from vi_simsiam.ops.backends import why_unavailable

Network = Callable[[Sequence[Tensor]], Output]

# torch 2.14 renames the option and warns of the old name.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
_NEW_OPTION = "forward_sync_buffers" in _PARAMETERS
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _NEW_OPTION else "broadcast_buffers": False
}
"""Every rank keeps its own BatchNorm statistics, and rank 0's are saved. Training never reads them
(it normalises by the batch), so DistributedDataParallel need not broadcast them at every step."""


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
        problem = "they do not take statistics over several GPUs, as with sync_batch_norm"
    if config.kernels == "on" and problem is not None:
        raise InputError(f"kernels: 'on' cannot be used: {problem}; auto and off run here")
    wanted = config.kernels == "on" or (config.kernels == "auto" and world.device.type == "cuda")
    return wanted and problem is None


def check_capture(config: TrainConfig, world: World) -> None:
    """Raise InputError if capture is "on", and the step cannot be captured."""
    if config.capture != "on":
        return
    if world.device.type != "cuda":
        problem = f"needs a CUDA device, and this run is on {world.device}; auto and off run here"
    elif not world.alone:
        problem = "is for a run without torchrun; the ranks' collectives are not captured"
    else:
        return
    raise InputError(f"capture: 'on' {problem}")


def check_compiler(device: torch.device) -> None:
    """Compile a small function, so that a missing compiler is found before a run begins.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or library each raises its own
        text = str(error).partition(" raised:\n")[2] or str(error)
        reason = (text.splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"compile: torch.compile does not work here ({reason}); leave --compile out, "
            "or install a C++ compiler such as g++"
        ) from error


def wrap(model: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`model` with gradients averaged over the ranks; `model` itself alone.

    All ranks start from rank 0's weights and buffers. Call the wrapper with all views of a step at
    once: it prepares one reduction for one backward. Compute the loss from its output outside, as
    the mean over the rank's part of the batch: with parts of equal size the averaged gradient is
    that of the mean over the whole batch. Every parameter must take part in the loss. Save and
    restore `model`, not the wrapper.
    """
    if world.alone:
        return model
    assert isinstance(model, nn.Module)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        **OWN_BUFFERS,
        gradient_as_bucket_view=True,  # saves one copy of all gradients
    )


def sync_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """`model` with every BatchNorm's statistics over the batch of all ranks.

    The parameters stay the same objects.

    Raises:
        InputError: on a CPU, where torch has no such layer.
    """
    if world.device.type != "cuda":
        raise InputError("sync_batch_norm: SyncBatchNorm runs on GPUs only; leave it out on a CPU")
    if world.alone:
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


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
