"""The fused multi-view loss: one launch for loss and gradient, one for backward, in eager PyTorch and under torch.compile.

In eager PyTorch an autograd Function calls a backend's launcher directly. Under torch.compile and torch.export the same
launch is the operator `vi_simsiam::multiview_loss`; that way costs more on the host, and its backward is a plain product.

The gradient is written with the loss, while the rows are in registers, and so before its incoming factor is known; the
host cannot read that factor without waiting for the device. Backward multiplies the kept gradient in place, by a kernel
that leaves at once where the factor is 1, as it is for loss.backward(). That uses the gradient up: a second backward
through a retained graph computes it anew from the inputs. Hooks on saved tensors (torch.utils.checkpoint, save_on_cpu)
see the inputs and not that gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vi_simsiam.ops.multiview_loss_launch import (
    LossCall,
    launch_loss,
    launch_scale,
    new_gradient,
    prepare,
)

TRANSFORMED = (
    "the multi-view loss does not run under torch.vmap, the other transforms of torch.func and forward-mode "
    "differentiation: one call takes all views and samples, reduction='none' gives a loss per sample, and "
    "torch.autograd.grad its gradient"
)
_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_TWICE = "the fused multi-view loss cannot be differentiated twice; use backend='eager' for that"


class _Result(NamedTuple):
    loss: Tensor
    gradient: Tensor | None
    """(V, B, W), of the predictions."""
    concentration_gradient: Tensor | None
    """(V, B)."""


def fused_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    call: LossCall,
) -> Tensor:
    """The loss of checked inputs by a fused backend, differentiable once in predictions and concentration.

    Args:
        predictions: (V, B, W), or V tensors (B, W).
        targets: G tensors (B, D).
        concentration: (V, B), or None where it is raw, in column D of the predictions.
        call: backend, form of the loss and reduction.

    Returns:
        The mean over the batch where `call` asks for it, else (B,).

    Raises:
        RuntimeError: on differentiating twice.
    """
    whole = isinstance(predictions, Tensor)
    given = (predictions,) if isinstance(predictions, Tensor) else predictions
    compiling = torch.compiler.is_compiling()
    if (
        compiling
        or _dispatch_modes()
        or not all(type(x) in _PLAIN for x in (*given, *targets, concentration) if x is not None)
    ):
        # Fake tensors, other subclasses and modes that trace: what has no memory of its own is the operator's to see.
        if compiling:
            prepare(given[0].device.type, given[0].device.index)
        views = list(given[0].unbind(0) if whole else given)
        result: Tensor = torch.ops.vi_simsiam.multiview_loss(
            views, list(targets), concentration, *call
        )[0]
        return result
    loss: Tensor = _FusedLoss.apply(call, whole, len(given), concentration, *given, *targets)
    return loss


def _compute(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    call: LossCall,
) -> _Result:
    first, dtype = predictions[0], call.dtype
    loss = first.new_empty(len(first), dtype=dtype)
    mean = first.new_empty((), dtype=dtype) if call.mean else None
    if concentration is not None:
        concentration = concentration.to(dtype).contiguous()
    gradient, concentration_gradient = None, None
    if call.wants_gradient:
        gradient = new_gradient(predictions, call)
        concentration_gradient = None if concentration is None else torch.empty_like(concentration)
    if len(first):
        launch_loss(
            predictions, targets, concentration, loss, mean, gradient, concentration_gradient, call
        )
    return _Result(loss if mean is None else mean, gradient, concentration_gradient)


class _FusedLoss(torch.autograd.Function):
    """Inputs: the call, whether the predictions are one tensor, their number, concentration, predictions, targets.

    The context is taken by forward: with a setup_context of its own apply() costs 40 us more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: LossCall,
        whole: bool,
        count: int,
        concentration: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        loss, *kept = _compute(*_split(whole, count, tensors), concentration, call)
        if call.wants_gradient:
            ctx.call, ctx.whole, ctx.count, ctx.kept = call, whole, count, kept
            ctx.dtypes = tensors[0].dtype, None if concentration is None else concentration.dtype
            # Made under inference_mode, by a frozen teacher, targets cannot be saved, and nothing can change them.
            ctx.frozen = tensors[count:] if any(z.is_inference() for z in tensors[count:]) else ()
            ctx.save_for_backward(concentration, *tensors[: count if ctx.frozen else None])
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        (gradient, by_concentration), ctx.kept = ctx.kept, (None, None)
        if gradient is None:
            concentration, *tensors = ctx.saved_tensors
            views = _split(ctx.whole, ctx.count, [*tensors, *ctx.frozen])
            _, gradient, by_concentration = _compute(*views, concentration, ctx.call)
        gradient, by_concentration = launch_scale(
            gradient, by_concentration, factor.detach(), ctx.call, *ctx.dtypes
        )
        inputs: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        inputs[0] = by_concentration
        inputs[1 : 1 + ctx.count] = [gradient] if ctx.whole else gradient.unbind(0)
        if (
            torch.is_grad_enabled()
        ):  # create_graph: without this they would pass for constants, without a word
            inputs = _refuse_second_derivative(inputs, (factor, *ctx.saved_tensors))
        return None, None, None, *inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(TRANSFORMED)


def _split(
    whole: bool, count: int, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The views of predictions and of targets."""
    return tensors[0].unbind(0) if whole else tensors[:count], tensors[count:]


class _Refusal(torch.autograd.Function):
    """The first `count` tensors as they are, whose derivative with respect to any of the others is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE)


def _refuse_second_derivative(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    there = [x for x in gradients if x is not None]
    refusing = iter(_Refusal.apply(len(there), *there, *(x for x in inputs if x is not None)))
    return [None if x is None else next(refusing) for x in gradients]


torch.library.define(
    "vi_simsiam::multiview_loss",
    "(Tensor[] predictions, Tensor[] targets, Tensor? concentration, str backend, str distribution, ScalarType dtype, "
    "float scale, float minimum, float factor, str link, float gain, float cosine, bool mean, bool wants_gradient) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("vi_simsiam::multiview_loss", "default")  # type: ignore[misc]
def _multiview_loss(
    predictions: list[Tensor], targets: list[Tensor], concentration: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient (V, B, W) and gradient of the concentration (V, B); empty where there is none."""
    loss, *gradients = _compute(predictions, targets, concentration, LossCall(*call))
    gradient, by_concentration = (
        predictions[0].new_empty(0) if x is None else x for x in gradients
    )
    return loss, gradient, by_concentration


@torch.library.register_fake("vi_simsiam::multiview_loss")  # type: ignore[misc]
def _shapes(
    predictions: list[Tensor], targets: list[Tensor], concentration: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    asked, first = LossCall(*call), predictions[0]
    loss = first.new_empty(() if asked.mean else first.shape[:1], dtype=asked.dtype)
    gradient = new_gradient(predictions, asked) if asked.wants_gradient else first.new_empty(0)
    if concentration is None or not asked.wants_gradient:
        return loss, gradient, first.new_empty(0)
    return loss, gradient, first.new_empty(concentration.shape, dtype=asked.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    predictions, targets, concentration, *call = inputs
    _, gradient, concentration_gradient = output
    ctx.mark_non_differentiable(gradient, concentration_gradient)
    ctx.save_for_backward(gradient, concentration_gradient, concentration, *predictions)
    ctx.call, ctx.targets = LossCall(*call), len(targets)
    ctx.dtypes = predictions[0].dtype, None if concentration is None else concentration.dtype


def _scale(ctx: Any, factor: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient, by_concentration, *inputs = ctx.saved_tensors
    if not ctx.call.wants_gradient:
        raise RuntimeError(
            "vi_simsiam::multiview_loss was called with wants_gradient=False: export or compile it with predictions that "
            "require a gradient"
        )
    dtype, concentration_dtype = ctx.dtypes
    views: list[Tensor | None] = [
        *(gradient * (factor if ctx.call.mean else factor[:, None])).to(dtype).unbind(0)
    ]
    views.append(
        None if concentration_dtype is None else (by_concentration * factor).to(concentration_dtype)
    )
    if torch.is_grad_enabled():
        views = _refuse_second_derivative(
            [None if x is None else x.detach() for x in views], (factor, *inputs)
        )
    return views[:-1], [None] * ctx.targets, views[-1], *[None] * len(LossCall._fields)


torch.library.register_autograd("vi_simsiam::multiview_loss", _scale, setup_context=_keep)
