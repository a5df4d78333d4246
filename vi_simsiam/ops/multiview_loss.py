"""The multi-view loss: checks, the eager reference, and the fused backends behind one autograd Function.

Every ordered pair (v, g) of a prediction v and a target g of another view counts; the loss of a sample is twice the
mean over these pairs, so that two views give L = l(1, 2) + l(2, 1), Algorithm 1 of Nakamura et al. (arXiv 2203.11437).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import choose_backend, extension
from vi_simsiam.ops.power_spherical import log_density_ratio

DistributionName = Literal["power_spherical", "cosine"]
Reduction = Literal["mean", "none"]

MAX_VIEWS = 16
TINY_SQUARE = 1e-24
"""A vector whose squared length is below this has no direction: cosine 0, gradient 0."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LossForm:
    """Which loss: "power_spherical" with kappa = scale * softplus(raw) + minimum, or SimSiam's "cosine"."""

    distribution: DistributionName
    scale: float = 1.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"concentration_scale: {self.scale} is not a positive number")
        if not (math.isfinite(self.minimum) and self.minimum >= 0):
            raise InputError(f"concentration_min: {self.minimum} is not a number of at least 0")


def multiview_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    form: LossForm,
    *,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """The loss of `vi_simsiam.functional`, for either form; see there for shapes, dtypes and errors."""
    predictions, targets = _stacked(predictions, "predictions"), _stacked(targets, "targets")
    _check(predictions, targets, form, reduction)
    name = choose_backend(backend, predictions.device)
    if name == "eager":
        per_sample = eager_loss(predictions, targets, form)
    else:
        per_sample = _fused_loss(predictions, targets, form, name)
    return per_sample.mean() if reduction == "mean" else per_sample


def eager_loss(predictions: Tensor, targets: Tensor, form: LossForm) -> Tensor:
    """The reference in plain PyTorch, twice differentiable: loss of every sample, (B,)."""
    dtype = compute_dtype(predictions, targets)
    dim = targets.shape[-1]
    with torch.autocast(predictions.device.type, enabled=False):
        online, target = predictions.to(dtype), targets.detach().to(dtype)
        direction, target = _unit(online[..., :dim]), _unit(target)
        pairs = [(v, g) for v in range(len(online)) for g in range(len(target)) if v != g]
        cosine = torch.stack([(direction[v] * target[g]).sum(-1) for v, g in pairs])
        if form.distribution == "cosine":
            gain = cosine
        else:
            concentration = form.scale * softplus(online[..., dim]) + form.minimum
            gain = log_density_ratio(torch.stack([concentration[v] for v, _ in pairs]), cosine, dim)
        return -2 / len(pairs) * gain.sum(0)


def softplus(raw: Tensor) -> Tensor:
    """log(1 + exp(raw)) without the linear cut-off at 20 of torch's softplus, which costs float64 its digits."""
    return torch.logaddexp(raw, torch.zeros_like(raw))


def compute_dtype(predictions: Tensor, targets: Tensor) -> torch.dtype:
    """float64 where any input is, float32 otherwise: a bfloat16 cosine would cost nats at large concentrations."""
    return torch.float64 if torch.float64 in (predictions.dtype, targets.dtype) else torch.float32


@torch.compiler.disable
def _fused_loss(predictions: Tensor, targets: Tensor, form: LossForm, backend: str) -> Tensor:
    wants_gradient = torch.is_grad_enabled() and predictions.requires_grad
    loss: Tensor = _FusedLoss.apply(predictions, targets.detach(), form, backend, wants_gradient)
    return loss


class _FusedLoss(torch.autograd.Function):
    """One launch writes the loss and, where it is wanted, the gradient that backward only has to scale."""

    @staticmethod
    def forward(
        ctx: Any, predictions: Tensor, targets: Tensor, form: LossForm, backend: str, wants_gradient: bool
    ) -> Tensor:
        dtype = compute_dtype(predictions, targets)
        loss = predictions.new_empty(predictions.shape[1], dtype=dtype)
        # Kept in the compute dtype: a gradient divided by a large batch underflows in float16.
        gradient = predictions.new_empty(predictions.shape, dtype=dtype) if wants_gradient else None
        if loss.numel():
            _LAUNCHERS[backend](_unit_stride(predictions), _unit_stride(targets), loss, gradient, form)
        ctx.dtype = predictions.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # create_graph: the saved gradient would pass for a constant, without a word
            raise RuntimeError(
                "the fused loss cannot be differentiated twice; use backend='eager' with create_graph=True"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(ctx.dtype), None, None, None, None


def _launch_triton(p: Tensor, z: Tensor, loss: Tensor, gradient: Tensor | None, form: LossForm) -> None:
    from vi_simsiam.kernels import multiview_loss as kernel

    kernel.multiview_loss(p, z, loss, gradient, distribution=form.distribution, scale=form.scale, minimum=form.minimum)


def _launch_cpu(p: Tensor, z: Tensor, loss: Tensor, gradient: Tensor | None, form: LossForm) -> None:
    p, z = p.to(loss.dtype), z.to(loss.dtype)
    dtype = _name(loss.dtype)
    extension().multiview_loss_cpu(  # type: ignore[union-attr]
        **_problem(p, z, loss, gradient, form), dtype=dtype, threads=torch.get_num_threads()
    )


def _launch_cuda(p: Tensor, z: Tensor, loss: Tensor, gradient: Tensor | None, form: LossForm) -> None:
    if loss.dtype == torch.float64:
        p = p.to(loss.dtype)
    if z.dtype != p.dtype:  # compiled for equal dtypes, and for half predictions with float32 targets
        z = z.to(loss.dtype)
    with torch.cuda.device(p.device):
        extension().multiview_loss_cuda(  # type: ignore[union-attr]
            **_problem(p, z, loss, gradient, form),
            prediction_dtype=_name(p.dtype),
            target_dtype=_name(z.dtype),
            gradient_dtype=_name(loss.dtype),
            stream=torch.cuda.current_stream().cuda_stream,
        )


def _problem(p: Tensor, z: Tensor, loss: Tensor, gradient: Tensor | None, form: LossForm) -> dict[str, Any]:
    """The arguments that both compiled backends take; an address of 0 asks for no gradient."""
    return {
        "predictions": p.data_ptr(),
        "targets": z.data_ptr(),
        "loss": loss.data_ptr(),
        "gradient": 0 if gradient is None else gradient.data_ptr(),
        "views": p.shape[0],
        "target_views": z.shape[0],
        "batch": p.shape[1],
        "dim": z.shape[2],
        "prediction_strides": p.stride()[:2],
        "target_strides": z.stride()[:2],
        "gradient_strides": (0, 0) if gradient is None else gradient.stride()[:2],
        "power_spherical": form.distribution == "power_spherical",
        "scale": form.scale,
        "minimum": form.minimum,
    }


_LAUNCHERS = {"triton": _launch_triton, "cpu": _launch_cpu, "cuda": _launch_cuda}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unit(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    tiny = square < TINY_SQUARE
    safe = square.masked_fill(tiny, 1)
    # sqrt(s)/s and not 1/sqrt(s): an infinite length must give NaN, not the zero vector.
    return x * (safe.sqrt() / safe).masked_fill(tiny, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _stacked(views: Tensor | Sequence[Tensor], name: str) -> Tensor:
    if isinstance(views, Tensor):
        return views
    if not isinstance(views, Sequence) or not all(isinstance(view, Tensor) for view in views):
        raise TypeError(f"{name}: must be a tensor or a sequence of tensors, one a view, not {type(views).__name__}")
    if not views:
        raise InputError(f"{name}: the sequence of views is empty")
    first = views[0]
    for i, view in enumerate(views):
        if (view.shape, view.dtype, view.device) != (first.shape, first.dtype, first.device):
            raise InputError(
                f"{name}: every view needs the shape, dtype and device of the first: {_describe(first)}; "
                f"view {i} has {_describe(view)}"
            )
    return torch.stack(tuple(views))


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {_name(x.dtype)} on {x.device}"


def _check(predictions: Tensor, targets: Tensor, form: LossForm, reduction: str) -> None:
    extra, what = (1, " + 1 (mean direction and raw concentration)") if form.distribution != "cosine" else (0, "")
    for name, x in (("predictions", predictions), ("targets", targets)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is none of float16, bfloat16, float32, float64")
        if x.dim() != 3:
            raise InputError(f"{name}: shape {tuple(x.shape)} must be (views, batch, features)")
    if predictions.device != targets.device:
        raise InputError(f"targets: on {targets.device}, must be on predictions' device {predictions.device}")
    views, batch, width = predictions.shape
    if not 2 <= views <= MAX_VIEWS:
        raise InputError(f"predictions: {views} views given, 2 to {MAX_VIEWS} are accepted")
    if not 1 <= targets.shape[0] <= views:
        raise InputError(f"targets: {targets.shape[0]} views given, 1 to predictions' {views} are accepted")
    if targets.shape[1] != batch:
        raise InputError(f"targets: batch of {targets.shape[1]} must be predictions' {batch}")
    dim = targets.shape[2]
    if dim < 2:
        raise InputError(f"targets: last dimension {dim} must be at least 2")
    if width != dim + extra:
        raise InputError(f"predictions: last dimension {width} must be targets' {dim}{what}")
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction: {reduction!r} is neither 'mean' nor 'none'")
    if reduction == "mean" and batch == 0:
        raise InputError("predictions: the mean over an empty batch is undefined; use reduction='none'")
