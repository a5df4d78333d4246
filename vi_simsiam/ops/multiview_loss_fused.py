"""The fused multi-view loss: one launch for loss and gradient, one for backward.

In eager PyTorch an autograd Function calls a backend's launcher directly. Under torch.compile and
torch.export the same launch is the operator `vi_simsiam::multiview_loss`, whose backward is a plain
product; its autograd takes two to three times as long on the host.

The gradient is written with the loss while the rows are in registers, before its incoming factor is
known; the host cannot read that factor without waiting for the device. Backward multiplies the kept
gradient in place, by a kernel that returns at once where the factor is 1, as it is for
loss.backward(). That uses the gradient up: a second backward through a retained graph computes it
again from the inputs. Hooks on saved tensors (torch.utils.checkpoint, save_on_cpu) see the inputs
and not that gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vi_simsiam.ops.backends import PLAIN, check_storage, dispatch_modes, extension
from vi_simsiam.ops.once import refuse_derivative
from vi_simsiam.ops.tickets import new_tickets, reserve_tickets

ROW_MULTIPLE = 16
"""Rows that start at multiples of this many elements can be moved 16 bytes at a time."""
_NAME = "multi-view loss"
TRANSFORMED = (
    "the multi-view loss does not run under torch.vmap, the other transforms of torch.func and "
    "forward-mode differentiation: one call takes all views and samples, reduction='none' gives a "
    "loss per sample, and torch.autograd.grad its gradient"
)


class LossCall(NamedTuple):
    """Arguments of a launch beside its tensors."""

    backend: str
    distribution: Literal["power_spherical", "cosine"]
    dtype: torch.dtype
    """Dtype of the arithmetic and the loss: float32 or float64."""
    scale: float
    minimum: float
    factor: float
    """Factor on the loss, and so on the gradient."""
    link: str
    gain: float
    cosine: float
    """Weight of SimSiam's loss relative to the density's; `factor` applies to both."""
    mean: bool
    """The loss is the mean over the samples, and the gradient that of the mean."""
    wants_gradient: bool


def padded_width(columns: int) -> int:
    """The least multiple of `ROW_MULTIPLE` that holds `columns`."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


def fused_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    call: LossCall,
) -> Tensor:
    """The loss (B,) of checked inputs or its mean, differentiable once (else RuntimeError).

    `concentration` is None where it is raw, in column D of the predictions.
    """
    given = (predictions,) if isinstance(predictions, Tensor) else predictions
    compiling = torch.compiler.is_compiling()
    tensors = (*given, *targets, concentration)
    if compiling or dispatch_modes() or any(type(x) not in PLAIN for x in tensors):
        # Fake tensors, other subclasses and tracing modes have no memory of their own.
        if compiling:
            reserve_tickets(given[0].device.type, given[0].device.index)
        views = list(given[0].unbind(0) if len(given) == 1 else given)
        operator = torch.ops.vi_simsiam.multiview_loss
        loss: Tensor = operator(views, list(targets), concentration, *call)[0]
    else:
        loss = _FusedLoss.apply(call, len(given), concentration, *given, *targets)
    return loss


def _outputs(
    views: Sequence[Tensor], concentration: Tensor | None, call: LossCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised result, gradient (V, B, W) and concentration's gradient, or empty tensors."""
    first, dtype = views[0], call.dtype
    result = first.new_empty(() if call.mean else first.shape[:1], dtype=dtype)
    gradient, by_concentration = first.new_empty(0), first.new_empty(0)  # may not alias
    if call.wants_gradient:
        # float16 would lose a gradient divided by a large batch.
        narrow = first.dtype == torch.bfloat16 and dtype == torch.float32
        kept = first.dtype if narrow else dtype
        gradient = _padded_rows(first, (len(views), *first.shape), kept)
        if concentration is not None:
            by_concentration = first.new_empty(concentration.shape, dtype=dtype)
    return result, gradient, by_concentration


def _padded_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    *outer, width = shape
    return like.new_empty((*outer, padded_width(width)), dtype=dtype)[..., :width]


def _compute(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient (V, B, W) and gradient of the concentration (V, B); empty where unwanted."""
    call = LossCall(*arguments)
    result, gradient, by_concentration = _outputs(predictions, concentration, call)
    if concentration is not None:
        concentration = concentration.to(call.dtype).contiguous()
    if batch := len(predictions[0]):
        launch_loss(
            predictions,
            targets,
            concentration,
            result.new_empty(batch) if call.mean else result,
            result if call.mean else None,
            gradient if call.wants_gradient else None,
            None if concentration is None or not call.wants_gradient else by_concentration,
            call,
        )
    return result, gradient, by_concentration


def _check_storages(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], concentration: Tensor | None
) -> None:
    check_storage("predictions", *predictions)
    check_storage("targets", *targets)
    check_storage("concentration", concentration)


class _FusedLoss(torch.autograd.Function):
    """Inputs: the call, the number of predictions (1 for whole ones), concentration and tensors.

    forward takes the context: with a setup_context of its own apply() costs 40 us more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: LossCall,
        count: int,
        concentration: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        loss: Tensor
        _check_storages(tensors[:count], tensors[count:], concentration)
        loss, *kept = _compute(*_split(count, tensors), concentration, *call)
        if call.wants_gradient:
            ctx.call, ctx.count, ctx.kept = call, count, kept
            ctx.dtypes = tensors[0].dtype, getattr(concentration, "dtype", None)
            # Targets made under inference_mode, by a frozen teacher, cannot be saved; nothing
            # changes them.
            ctx.frozen = tensors[count:] if any(z.is_inference() for z in tensors[count:]) else ()
            ctx.save_for_backward(concentration, *tensors[: count if ctx.frozen else None])
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            concentration, *tensors = ctx.saved_tensors
            check_storage("saved for backward", concentration, *tensors)
            views = _split(ctx.count, [*tensors, *ctx.frozen])
            _, *kept = _compute(*views, concentration, *ctx.call)
        inputs: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 2)
        number = factor.detach()
        gradient, inputs[0] = launch_scale(kept[0], kept[1], number, ctx.call, *ctx.dtypes)
        inputs[1 : 1 + ctx.count] = [gradient] if ctx.count == 1 else gradient.unbind(0)
        if torch.is_grad_enabled():  # create_graph: without this they would pass for constants
            inputs = list(refuse_derivative(_NAME, inputs, factor, *ctx.saved_tensors))
        return None, None, *inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(TRANSFORMED)


def _split(count: int, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The views of predictions, of which a single tensor holds all, and of targets."""
    return tensors[0].unbind(0) if count == 1 else tensors[:count], tensors[count:]


torch.library.define(
    "vi_simsiam::multiview_loss",
    "(Tensor[] predictions, Tensor[] targets, Tensor? concentration, str backend, "
    "str distribution, ScalarType dtype, float scale, float minimum, float factor, str link, "
    "float gain, float cosine, bool mean, bool wants_gradient) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _operate(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_storages(predictions, targets, concentration)
    return _compute(predictions, targets, concentration, *arguments)


torch.library.impl("vi_simsiam::multiview_loss", "default", _operate)


@torch.library.register_fake("vi_simsiam::multiview_loss")  # type: ignore[misc]
def _shapes(
    predictions: Sequence[Tensor], _: Any, concentration: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(predictions, concentration, LossCall(*arguments))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    predictions, targets, concentration, *arguments = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], concentration, *predictions)
    ctx.call, ctx.targets = LossCall(*arguments), len(targets)
    ctx.dtypes = predictions[0].dtype, getattr(concentration, "dtype", None)


def _scale(ctx: Any, factor: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient, by_concentration, *inputs = ctx.saved_tensors
    if not ctx.call.wants_gradient:
        raise RuntimeError(
            "vi_simsiam::multiview_loss was called with wants_gradient=False: export or compile it "
            "with predictions that require a gradient"
        )
    dtype, concentration_dtype = ctx.dtypes
    scaled = gradient * (factor if ctx.call.mean else factor[:, None])
    views: list[Tensor | None] = list(scaled.to(dtype).unbind(0))
    given = concentration_dtype is not None
    views.append((by_concentration * factor).to(concentration_dtype) if given else None)
    if torch.is_grad_enabled():
        views = list(refuse_derivative(_NAME, views, factor, *inputs))
    return views[:-1], [None] * ctx.targets, views[-1], *[None] * len(ctx.call)


torch.library.register_autograd("vi_simsiam::multiview_loss", _scale, setup_context=_keep)


def launch_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    loss: Tensor,
    mean: Tensor | None,
    gradient: Tensor | None,
    concentration_gradient: Tensor | None,
    call: LossCall,
) -> None:
    """Write the loss (B,) and, where given, its mean and the gradients of the one or the other.

    `concentration` and its gradient (V, B) are contiguous and in the dtype of the arithmetic.
    """
    views, batch = len(predictions), len(loss)
    weight = 2 * call.factor / (len(targets) * (views - 1))
    names = ("link", "scale", "minimum", "gain", "cosine")
    numbers = {name: getattr(call, name) for name in names}
    numbers |= {"weight": weight, "gradient_weight": weight / batch if call.mean else weight}
    if call.backend == "triton":
        from vi_simsiam.kernels import multiview_loss as kernel

        kernel.multiview_loss(
            _rows(predictions),
            _rows(targets),
            concentration,
            loss,
            mean,
            None if mean is None else new_tickets(loss.device),
            gradient,
            concentration_gradient,
            distribution=call.distribution,
            **numbers,
        )
        return
    p, z = _rows(predictions, call), _rows(targets, call)
    if call.backend == "cuda" and z[0].dtype != p[0].dtype:
        # Compiled for equal dtypes, and for float32 targets.
        z = [x.to(call.dtype, memory_format=torch.contiguous_format) for x in z]
    spherical = "raw_concentration" if concentration is None else "given_concentration"
    problem: dict[str, Any] = {
        "predictions": [x.data_ptr() for x in p],
        "targets": [x.data_ptr() for x in z],
        "concentration": _address(concentration),
        "loss": loss.data_ptr(),
        "mean": _address(mean),
        "gradient": _address(gradient),
        "concentration_gradient": _address(concentration_gradient),
        "batch": batch,
        "dim": z[0].shape[1],
        "width": p[0].shape[1],
        "prediction_stride": p[0].stride(0),
        "target_stride": z[0].stride(0),
        "gradient_strides": (0, 0) if gradient is None else gradient.stride()[:2],
        "form": "cosine" if call.distribution == "cosine" else spherical,
        "prediction_dtype": _name(p[0].dtype),
        "target_dtype": _name(z[0].dtype),
        **numbers,
    }
    module: Any = extension()
    if call.backend == "cpu":
        module.multiview_loss_cpu(**problem, threads=torch.get_num_threads())
        return
    with torch.cuda.device(loss.device):
        module.multiview_loss_cuda(
            **problem,
            gradient_dtype=_name(call.dtype if gradient is None else gradient.dtype),
            ticket=0 if mean is None else new_tickets(loss.device).data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )


def launch_scale(
    gradient: Tensor,
    concentration_gradient: Tensor | None,
    factor: Tensor,
    call: LossCall,
    dtype: torch.dtype,
    concentration_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients times the factor, () or (B,), in these dtypes. Overwrites the inputs."""
    check_storage("gradient of the loss", factor)
    if concentration_dtype is None:
        concentration_gradient = None
    if call.backend == "cpu":
        number = factor[:, None] if factor.dim() else factor.item()
        if factor.dim() or number != 1:
            gradient.mul_(number)
            if concentration_gradient is not None:
                concentration_gradient.mul_(factor)
    elif gradient.numel():
        half = dtype == torch.float16 and gradient.dtype == torch.float32
        out = _padded_rows(gradient, gradient.shape, dtype) if half else gradient
        if call.backend == "triton":
            from vi_simsiam.kernels import multiview_loss as kernel

            kernel.scale_gradient(gradient, factor, out, concentration_gradient)
        else:
            module: Any = extension()
            with torch.cuda.device(gradient.device):
                module.scale_gradient_cuda(
                    gradient=gradient.data_ptr(),
                    out=out.data_ptr(),
                    concentration_gradient=_address(concentration_gradient),
                    factor=factor.data_ptr(),
                    views=gradient.shape[0],
                    batch=gradient.shape[1],
                    width=gradient.shape[2],
                    gradient_strides=gradient.stride()[:2],
                    out_strides=out.stride()[:2],
                    factor_stride=factor.stride(0) if factor.dim() else 0,
                    gradient_dtype=_name(gradient.dtype),
                    out_dtype=_name(out.dtype),
                    stream=torch.cuda.current_stream().cuda_stream,
                )
        gradient = out
    if concentration_gradient is not None:
        concentration_gradient = concentration_gradient.to(concentration_dtype)
    return gradient.to(dtype), concentration_gradient


def _rows(views: Sequence[Tensor], call: LossCall | None = None) -> Sequence[Tensor]:
    """The views with one row stride and adjacent columns, in a dtype of the compiled backend."""
    first = views[0]
    unknown = call is not None and (
        call.dtype == torch.float64 or (call.backend, first.dtype) == ("cpu", torch.float16)
    )
    if call is not None and unknown and first.dtype != call.dtype:
        return [x.to(call.dtype, memory_format=torch.contiguous_format) for x in views]
    stride = first.stride(0)
    if all(x.stride(0) == stride and x.stride(1) == 1 for x in views):
        return views
    return [x.contiguous() for x in views]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
