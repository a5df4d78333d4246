"""Inputs, launches and references of `triton_cases.py`.

Rule for errors: over a set of samples, the largest error against 40 digits is at most twice that of
the eager reference in the same dtype, or 1.5 ulp. Each error is divided by the effect of a rounded
cosine there (`_exact`), so that the largest one is not the luck of the worst conditioned sample.
"""

from __future__ import annotations

import mpmath
import numpy as np
import torch
from torch import Tensor
from triton_function_cases import exact_ratio
from triton_tools import DEVICE

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

SPHERICAL = LossForm("power_spherical", scale=1 / 3, minimum=0.1)
QUADRATIC = LossForm(
    "power_spherical", scale=1 / 3, minimum=0.1, link="quadratic", gain=0.3, cosine=1.5
)
COSINE = LossForm("cosine")
GIVEN = LossForm("power_spherical")
"""Predictions of this form hold kappa itself in their last column; the kernel gets it in a tensor
of its own."""


def inputs(
    form: LossForm, views: int, globals_: int, dim: int, dtype: torch.dtype, samples: int = 4
) -> tuple[Tensor, Tensor]:
    """Views of one image that agree to a degree that differs from sample to sample."""
    generator = torch.Generator().manual_seed(views * 1000 + dim)
    width = dim + (form.distribution == "power_spherical")
    image = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    noise = torch.logspace(-2, 0.5, samples, dtype=torch.float64)[:, None]
    predictions = image + noise * torch.randn(
        views, samples, width, generator=generator, dtype=torch.float64
    )
    targets = image + noise * torch.randn(
        globals_, samples, width, generator=generator, dtype=torch.float64
    )
    if width > dim:
        predictions[..., dim] = 8 * torch.randn(
            views, samples, generator=generator, dtype=torch.float64
        )
    if form is GIVEN:
        predictions[..., dim] = predictions[..., dim].abs()
    return predictions.to(dtype).to(DEVICE), targets[..., :dim].to(dtype).to(DEVICE).contiguous()


def _apart(views: Tensor, columns: int, offset: int) -> list[Tensor]:
    """The views one by one in rows of `columns` columns, the further ones NaN; view i starts i *
    offset elements late."""
    rows = []
    for i, view in enumerate(views):
        memory = torch.full(
            (view.shape[0] * columns + i * offset,), torch.nan, dtype=view.dtype, device=view.device
        )
        rows.append(memory[i * offset :].view(view.shape[0], columns))
        rows[i][:, : view.shape[1]] = view
    return rows


def launch(
    predictions: Tensor,
    targets: Tensor,
    form: LossForm,
    grad_dtype: torch.dtype | None = None,
    *,
    with_grad: bool = True,
    padding: int = 3,
    offset: int = 0,
    weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a launch that is itself checked, in the compute dtype or `grad_dtype`.

    Every output holds NaN before it, the ticket 0 after it; the padding of the gradient is 0, the
    mean that of the losses. For GIVEN the last column of the gradient is the one with respect to
    the concentration.
    """
    dtype = torch.promote_types(
        torch.promote_types(predictions.dtype, targets.dtype), torch.float32
    )
    views, samples, width = predictions.shape
    dim = targets.shape[2]
    used = dim if form is GIVEN else width

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)

    concentration = predictions[..., dim].to(dtype).contiguous() if form is GIVEN else None
    loss, mean, ticket = empty(samples), empty(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    grad = empty(views, samples, used + padding, dtype=grad_dtype or dtype) if with_grad else None
    concentration_grad = empty(views, samples) if with_grad and form is GIVEN else None
    weight = 2 / (len(targets) * (views - 1))
    kernel.multiview_loss(
        _apart(predictions[..., :used], used + padding, offset),
        [rows[:, :dim] for rows in _apart(targets, dim + offset, offset)],
        concentration,
        loss,
        mean,
        ticket,
        grad,
        concentration_grad,
        distribution=form.distribution,
        scale=form.scale,
        minimum=form.minimum,
        link=form.link,
        gain=form.gain,
        cosine=form.cosine,
        weight=weights[0] * weight,
        gradient_weight=weights[1] * weight,
    )
    assert ticket.item() == 0
    if samples:
        torch.testing.assert_close(mean, loss.mean(), rtol=1e-6, atol=1e-6, equal_nan=True)
    if grad is None:
        return loss, empty(0)
    assert (grad[..., used:] == 0).all()
    columns = [] if concentration_grad is None else [concentration_grad[..., None]]
    return loss, torch.cat([grad[..., :used], *columns], -1)


def eager(
    predictions: Tensor, targets: Tensor, form: LossForm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leaf = predictions.to(dtype).clone().requires_grad_()
    dim = targets.shape[2]
    rows, concentration = (leaf[..., :dim], leaf[..., dim]) if form is GIVEN else (leaf, None)
    loss = eager_loss(rows, targets.to(dtype), form, concentration)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _exact(
    predictions: Tensor, targets: Tensor, form: LossForm
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Loss and gradient in 40 digits, by the formulas at the head of the kernel, and the size of
    their terms.

    The size is the sum of the terms' absolute values plus the change that a change of the cosine by
    1 would make.
    """
    dim = targets.shape[-1]
    with mpmath.workdps(40):
        p, z = (
            np.vectorize(mpmath.mpf, otypes=[object])(x.double().cpu().numpy())
            for x in (predictions, targets)
        )
        weight = mpmath.mpf(2) / (len(z) * (len(p) - 1))
        unit_p, inverse_p = _exact_unit(p[..., :dim])
        unit_z, _ = _exact_unit(z)
        loss, grad = np.full(p.shape[1], mpmath.mpf(0)), np.full(p.shape, mpmath.mpf(0))
        loss_size, grad_size = loss.copy(), grad + 1e-30
        by_kappas = np.full(p.shape[:2], mpmath.mpf(0))
        for v, g, b in np.ndindex(len(p), len(z), p.shape[1]):
            if v == g:
                continue
            cos = (unit_p[v, b] * unit_z[g, b]).sum()
            value, by_cos = cos, mpmath.mpf(1)
            if form.distribution == "power_spherical":
                kappa, factor = p[v, b, dim], weight
                if form is not GIVEN:
                    linked, slope = _exact_link(mpmath.mpf(form.gain) * kappa, form.link)
                    kappa = mpmath.mpf(form.scale) * linked + mpmath.mpf(form.minimum)
                    factor = weight * mpmath.mpf(form.scale) * mpmath.mpf(form.gain) * slope
                value, by_kappa, by_cos = exact_ratio(kappa, cos, dim)
                value, by_cos = (
                    value + mpmath.mpf(form.cosine) * cos,
                    by_cos + mpmath.mpf(form.cosine),
                )
                by_kappas[v, b] -= by_kappa
                grad[v, b, dim] -= factor * by_kappa
                grad_size[v, b, dim] += factor * (
                    abs(by_kappa) + 1 / max(1 + cos, mpmath.mpf(1e-6))
                )
            loss[b] -= weight * value
            loss_size[b] += weight * (abs(value) + by_cos)
            factor = weight * by_cos * inverse_p[v, b]
            grad[v, b, :dim] -= factor * (unit_z[g, b] - cos * unit_p[v, b])
            grad_size[v, b, :dim] += factor * (abs(unit_z[g, b]) + abs(unit_p[v, b])).max()
        if form.link == "quadratic":  # at the bound only what raises kappa counts
            at_bound = form.gain * predictions[..., dim].double().cpu().numpy() < 0.02
            grad[..., dim][at_bound & (by_kappas > 0)] = mpmath.mpf(0)
        return (loss, loss_size), (grad, grad_size)


def _exact_link(x: mpmath.mpf, link: str) -> tuple[mpmath.mpf, mpmath.mpf]:
    if link == "softplus":
        e = mpmath.exp(x)
        return mpmath.log1p(e), e / (1 + e)
    r = max(x, mpmath.mpf(0.02))
    return r + r * r / 2, 1 + r


def _exact_unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    square = (x * x).sum(-1, keepdims=True)
    inverse = np.vectorize(
        lambda s: 1 / mpmath.sqrt(s) if s >= 1e-24 else mpmath.mpf(0), otypes=[object]
    )(square)
    return x * inverse, inverse


def check(predictions: Tensor, targets: Tensor, form: LossForm, loss: Tensor, grad: Tensor) -> None:
    (exact_loss, loss_size), (exact_grad, grad_size) = _exact(predictions, targets, form)
    eager_loss_, eager_grad = eager(predictions, targets, form, loss.dtype)
    dim, eps = targets.shape[-1], torch.finfo(loss.dtype).eps
    for got, reference, want, size, part in (
        (loss, eager_loss_, exact_loss, loss_size, slice(None)),
        (grad, eager_grad, exact_grad, grad_size, slice(0, dim)),
        (grad, eager_grad, exact_grad, grad_size, slice(dim, None)),
    ):
        error, limit = (
            float(
                (abs(x.double().cpu().numpy()[..., part] - want[..., part]) / size[..., part]).max(
                    initial=0
                )
            )
            for x in (got, reference)
        )
        assert error <= max(2 * limit, 1.5 * eps), (
            f"{part}: error {error:.2e}, of the reference {limit:.2e}"
        )
