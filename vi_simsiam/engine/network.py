"""The layers that a training step calls: the project's kernels, compiled, or over several ranks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.engine.distributed import World
from vi_simsiam.models import Output, SimSiam
from vi_simsiam.normalisation import PerView

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
    model.shared_passes = own_norm(model) is None
    model.fused = kernels and model.shared_passes and not compiled
    if compiled:
        return torch.compile(model, dynamic=False)  # type: ignore[no-any-return]
    return Bfloat16Weights(model) if model.fused and bf16 else model


def backward(
    network: Network,
    loss: Callable[[Output], Tensor],
    views: Sequence[Tensor],
    *,
    parts: int = 1,
    bf16: bool = False,
) -> tuple[Output, Tensor]:
    """Add the gradients of a batch's mean loss to those of the parameters, part by part.

    The parts are of equal size, and only one part's activations are in memory at a time. Loss and
    gradients are those of the undivided batch, up to BatchNorm, which normalises every part by its
    own statistics and updates the running ones once for each part.

    Args:
        network: maps views to an `Output`. Ranks reduce their gradients once, with the last part.
        loss: of an `Output`, the mean over its samples, a scalar.
        views: V views (B, 3, height, width).
        parts: N, a divisor of B. Part i has the samples i, i + N, and so on: where B is a multiple
            of 2 N, "shuffled" concentrations are exchanged between the same samples as undivided.
        bf16: compute the network in bfloat16 (autocast).

    Returns:
        The output of the whole batch without its graph, and its loss, a float32 scalar.
    """
    outputs, total = list[Output](), None
    for part in range(parts):
        local = isinstance(network, DistributedDataParallel) and part + 1 < parts
        with network.no_sync() if local else contextlib.nullcontext():  # type: ignore[attr-defined]
            with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
                output = network([view[part::parts] for view in views] if parts > 1 else views)
                share = loss(output) / parts if parts > 1 else loss(output)
            share.backward()
        share = share.detach().float()
        total = share if total is None else total + share
        detached = tuple(prediction.detach() for prediction in output.predictions)
        outputs.append(Output(detached, output.targets))
        del output  # with its activations, before the next part's are made
    assert total is not None
    return _interleaved(outputs), total


def _interleaved(parts: list[Output]) -> Output:
    """The outputs of parts as one, with the samples in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    predictions, targets = (
        tuple(torch.stack(columns, 1).flatten(0, 1) for columns in zip(*each, strict=True))
        for each in zip(*parts, strict=True)
    )
    return Output(predictions, targets)


def own_norm(model: nn.Module) -> str | None:
    """The name of the first BatchNorm that would see several views as one batch, None if no layer
    does: those of this package take the views one by one."""
    norms: Iterator[str] = (
        name
        for name, module in model.named_modules()
        if (isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None)
        and not isinstance(module, PerView)
    )
    return next(norms, None)


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


class Bfloat16Weights(nn.Module):
    """A model that computes with bfloat16 copies of its convolutions' and linear layers' weights.

    The result is that of autocast. Autocast copies the weights layer by layer and converts every
    gradient on its own: two launches for each weight. Here one launch makes all copies, and one all
    gradients. Call it under autocast, which converts everything else.

    DistributedDataParallel wraps it as it wraps the model. Save and restore the model, not this.

    Args:
        model: its weights stay float32, and receive float32 gradients.
    """

    def __init__(self, model: SimSiam) -> None:
        super().__init__()
        self.model = model
        self._names = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            # Layers with a forward of their own may use the weights for more than a product.
            if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        ]

    def forward(self, views: Sequence[Tensor]) -> Output:
        """The model's output for `views`."""
        weights = [self.model.get_parameter(name) for name in self._names]
        copies = dict(zip(self._names, _Converted.apply(*weights), strict=True))
        return torch.func.functional_call(self.model, copies, (views,))  # type: ignore[no-any-return]


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
