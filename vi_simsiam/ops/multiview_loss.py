"""The multi-view loss: its meaning, the checks, and the reference in plain PyTorch beside the fused
backends.

Every ordered pair (v, g) of a prediction v and a target g of another view counts; the loss of a
sample is twice the mean over these pairs, so that two views give L = l(1, 2) + l(2, 1), Algorithm 1
of Nakamura et al. (arXiv 2203.11437).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vi_simsiam.config import Link
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.ops.backends import choose_backend
from vi_simsiam.ops.multiview_loss_fused import TRANSFORMED, LossCall, fused_loss, padded_width
from vi_simsiam.ops.power_spherical import log_density_ratio

DistributionName = Literal["power_spherical", "cosine"]
Reduction = Literal["mean", "none"]

MAX_VIEWS = 16
TINY_SQUARE = 1e-24
"""A vector whose squared length is below this has no direction: cosine 0, gradient 0."""
LEAST_ROOT = 0.02
"""Least r of the link "quadratic": kappa/scale is at least 0.0202."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LossForm:
    """The form of a loss: `factor` times "power_spherical", or times SimSiam's "cosine".

    kappa = scale * link(gain * raw) + minimum; the links are described at `linked`. `cosine` times
    SimSiam's loss is added to that of "power_spherical".
    """

    distribution: DistributionName
    scale: float = 1.0
    minimum: float = 0.0
    factor: float = 1.0
    link: Link = "softplus"
    gain: float = 1.0
    cosine: float = 0.0

    def __post_init__(self) -> None:
        positive = (
            ("concentration_scale", self.scale),
            ("concentration_gain", self.gain),
            ("loss_scale", self.factor),
        )
        for name, number in positive:
            if not (isinstance(number, (int, float)) and 0 < number < math.inf):
                raise InputError(f"{name}: {number!r} is not a positive number")
        for name, number in (("concentration_min", self.minimum), ("cosine_weight", self.cosine)):
            if not (isinstance(number, (int, float)) and 0 <= number < math.inf):
                raise InputError(f"{name}: {number!r} is not a number of at least 0")
        if not self.cosine / self.factor < math.inf:  # the kernels' weight beside the density
            raise InputError(f"cosine_weight: {self.cosine!r} is too large for the loss_scale")
        if self.link not in get_args(Link):
            raise none_of("concentration_link", self.link, get_args(Link))

    def concentration(self, raw: Tensor) -> Tensor:
        """kappa of raw concentrations, in their dtype."""
        return self.scale * linked(self.gain * raw, self.link) + self.minimum


def multiview_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    form: LossForm,
    *,
    concentration: Tensor | Sequence[Tensor] | None = None,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """The loss of `vi_simsiam.functional`, for either form; see there for shapes, dtypes and
    errors."""
    first = _check(predictions, targets, concentration, form)
    check_reduction(reduction)
    mean = reduction == "mean"
    if mean and first.shape[-2] == 0:
        raise InputError(
            "predictions: the mean over an empty batch is undefined; use reduction='none'"
        )
    if concentration is not None and not isinstance(concentration, Tensor):
        concentration = torch.stack(tuple(concentration))
    name = choose_backend(backend, first.device.type)
    try:
        if name == "eager":
            per_sample = eager_loss(predictions, targets, form, concentration)
            return per_sample.mean() if mean else per_sample
        differentiable = [predictions] if isinstance(predictions, Tensor) else [*predictions]
        differentiable += [] if concentration is None else [concentration]
        constant = (
            targets.detach().unbind(0)
            if isinstance(targets, Tensor)
            else [x.detach() for x in targets]
        )
        call = LossCall(
            backend=name,
            distribution=form.distribution,
            dtype=_compute_dtype(constant[0].dtype, *(x.dtype for x in differentiable)),
            scale=form.scale,
            minimum=form.minimum,
            factor=form.factor,
            link=form.link,
            gain=form.gain,
            cosine=form.cosine / form.factor,
            mean=mean,
            wants_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in differentiable),
        )
        return fused_loss(predictions, constant, concentration, call)
    except RuntimeError as error:
        # torch names what an autograd Function lacks, not what its user can do.
        if "functorch" in str(error):
            raise RuntimeError(TRANSFORMED) from None
        raise


def eager_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    form: LossForm,
    concentration: Tensor | None = None,
) -> Tensor:
    """The reference in plain PyTorch, twice differentiable: loss of every sample, (B,)."""
    inputs = (
        (predictions, targets) if concentration is None else (predictions, targets, concentration)
    )
    dtype = _compute_dtype(*(x[0].dtype for x in inputs))
    dim = targets[0].shape[-1]
    with torch.autocast(predictions[0].device.type, enabled=False):
        direction = [_unit(x[:, :dim].to(dtype)) for x in predictions]
        target = [_unit(x.detach().to(dtype)) for x in targets]
        pairs = [(v, g) for v in range(len(direction)) for g in range(len(target)) if v != g]
        gain = cosine = torch.stack([(direction[v] * target[g]).sum(-1) for v, g in pairs])
        if form.distribution == "power_spherical":
            if concentration is None:
                kappa = [form.concentration(x[:, dim].to(dtype)) for x in predictions]
            else:
                kappa = list(concentration.to(dtype).masked_fill(concentration < 0, math.nan))
            gain = log_density_ratio(torch.stack([kappa[v] for v, _ in pairs]), cosine, dim)
            if form.cosine:
                gain = gain + form.cosine / form.factor * cosine
        return -2 / len(pairs) * form.factor * gain.sum(0)


def softplus(raw: Tensor) -> Tensor:
    """log(1 + exp(raw)) without the linear cut-off at 20 of torch's softplus, which costs float64
    its digits."""
    return torch.logaddexp(raw, torch.zeros_like(raw))


def linked(x: Tensor, link: Link) -> Tensor:
    """A positive number for one of any size, in x's dtype.

    - "softplus": log(1 + exp(x)). Its slope falls exponentially below 0, and with it all gradients.
    - "quadratic": r + r^2/2 with r = max(x, 0.02). With k = kappa/(D - 1) the likelihood's
      curvature in k is 1/((1 + k)(1 + 2k)) for large D, and so 1/(1 + k) in r, since dk/dr =
      sqrt(1 + 2k): at most 1, and it falls no faster than r^-2. At the bound x has the gradient of
      r where a step along it raises r.
    """
    if link == "softplus":
        return softplus(x)
    traced = torch.is_grad_enabled() and x.requires_grad
    r = _Bounded.apply(x) if traced else x.clamp(min=LEAST_ROOT)
    return r * (1 + 0.5 * r)


class _Bounded(torch.autograd.Function):
    """max(x, LEAST_ROOT), whose gradient is kept at the bound where a step along it raises x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=LEAST_ROOT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient.masked_fill((x < LEAST_ROOT) & (gradient > 0), 0)


def check_reduction(reduction: str) -> None:
    """Raises InputError for what is no reduction."""
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction: {reduction!r} is neither 'mean' nor 'none'")


def _compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any input is, float32 otherwise: a bfloat16 cosine would cost nats at large
    concentrations."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _unit(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    tiny = square < TINY_SQUARE
    safe = square.masked_fill(tiny, 1)
    # sqrt(s)/s and not 1/sqrt(s): an infinite length must give NaN, not the zero vector.
    return x * (safe.sqrt() / safe).masked_fill(tiny, 0)


def _shape(
    views: Tensor | Sequence[Tensor], name: str, axes: tuple[str, ...], device: torch.device | None
) -> tuple[int, ...]:
    """The shape of one tensor, or of the views of a sequence stacked."""
    if isinstance(views, Tensor):
        one = views
        shape: tuple[int, ...] = ()
    else:
        if not isinstance(views, Sequence) or not all(isinstance(view, Tensor) for view in views):
            raise TypeError(
                f"{name}: must be a tensor or a sequence of tensors, one a view, "
                f"not {type(views).__name__}"
            )
        if not views:
            raise InputError(f"{name}: the sequence of views is empty")
        one, shape = views[0], (len(views),)
        for i, view in enumerate(views[1:], 1):
            if view.shape != one.shape or view.dtype != one.dtype or view.device != one.device:
                raise InputError(
                    f"{name}: every view needs the shape, dtype and device of the first: "
                    f"{_describe(one)}; view {i} has {_describe(view)}"
                )
    if one.dtype not in _DTYPES:
        raise TypeError(f"{name}: dtype {one.dtype} is none of float16, bfloat16, float32, float64")
    if one.layout is not torch.strided or one.is_nested:
        raise TypeError(f"{name}: must be dense, not {'nested' if one.is_nested else one.layout}")
    shape = (*shape, *one.shape)
    if len(shape) != len(axes):
        raise InputError(f"{name}: shape {shape} must be ({', '.join(axes)})")
    if device is not None and one.device != device:
        raise InputError(f"{name}: on {one.device}, must be on predictions' device {device}")
    return shape


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    concentration: Tensor | Sequence[Tensor] | None,
    form: LossForm,
) -> Tensor:
    """The predictions, or the first view of them, where everything fits."""
    axes = ("views", "batch", "features")
    views, batch, width = _shape(predictions, "predictions", axes, None)
    first = predictions if isinstance(predictions, Tensor) else predictions[0]
    target_views, rows, dim = _shape(targets, "targets", axes, first.device)
    if not 2 <= views <= MAX_VIEWS:
        raise InputError(f"predictions: {views} views given, 2 to {MAX_VIEWS} are accepted")
    if not 1 <= target_views <= views:
        raise InputError(
            f"targets: {target_views} views given, 1 to predictions' {views} are accepted"
        )
    if rows != batch:
        raise InputError(f"targets: batch of {rows} must be predictions' {batch}")
    if dim < 2:
        raise InputError(f"targets: last dimension {dim} must be at least 2")
    raw = form.distribution == "power_spherical" and concentration is None
    columns = dim + int(raw)  # torch 2.11 adds no bool to a size that changes
    if width not in (columns, padded_width(columns)):
        what = " + 1 (mean direction and raw concentration)" if raw else ""
        raise InputError(
            f"predictions: last dimension {width} must be targets' {dim}{what}, "
            f"or that padded to {padded_width(columns)} columns"
        )
    if concentration is not None:
        options = (form.scale, form.minimum, form.gain, form.link)
        if form.distribution == "cosine" or options != (1.0, 0.0, 1.0, "softplus"):
            raise InputError(
                "concentration: given as it is, "
                "it takes no concentration_scale, _min, _gain or _link"
            )
        shape = _shape(concentration, "concentration", axes[:2], first.device)
        if shape != (views, batch):
            raise InputError(
                f"concentration: shape {shape} must be (views, batch) = {(views, batch)}"
            )
    return first
