"""The losses as part of PyTorch: autograd's rules, and the forms of input."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.utils.checkpoint
from losses import COSINE, POWER_SPHERICAL, QUADRATIC, draw, every, fused, loss_and_gradient
from torch import Tensor

from vi_simsiam.functional import cosine_loss, power_spherical_loss
from vi_simsiam.ops.backends import interpreting
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss
from vi_simsiam.ops.multiview_loss_fused import LossCall

FORMS = pytest.mark.parametrize(
    "form", [LossForm("power_spherical", 3.0, 0.5), QUADRATIC, COSINE], ids=str
)


def padded(p: Tensor, width: int, fill: float = math.nan) -> list[Tensor]:
    """Every view in its own memory, at an odd offset, its rows continued to `width` by `fill`."""
    views = []
    for i, view in enumerate(p):
        storage = torch.full((3 + i + len(view) * width,), fill, dtype=p.dtype)
        rows = storage[3 + i :].view(len(view), width)
        rows[:, : p.shape[-1]] = view
        views.append(rows.requires_grad_())
    return views


@every
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_separate_padded_views_are_the_same_loss(
    backend: str, form: LossForm, dtype: torch.dtype
) -> None:
    """No value of the padding gets in, not even NaN, and its gradient is 0."""
    p, z = (x.to(dtype) for x in draw(form, 3, 2, 5, 20))
    whole = p.clone().requires_grad_()
    views = padded(p, 32)
    expected = multiview_loss(whole, z, form, backend=backend)
    loss = multiview_loss(views, list(z), form, backend=backend)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    assert whole.grad is not None
    for view, gradient in zip(views, whole.grad, strict=True):
        assert view.grad is not None
        assert torch.equal(view.grad[:, : p.shape[-1]], gradient)
        assert (view.grad[:, p.shape[-1] :] == 0).all()


@every
def test_strides_that_alias_are_read_as_they_are(backend: str) -> None:
    """One row for the whole batch, one column for a whole row, views in different layouts: what
    .contiguous() gives."""
    p, z = draw(POWER_SPHERICAL, 2, 2, 4, 8)
    row = p[:, :1].expand(2, 4, 9)
    flat = torch.rand(2, 4, 1, dtype=torch.float64).expand(2, 4, 9)
    mixed = [p[0], p[1].t().contiguous().t()]
    for given in (row, flat, mixed):
        copies = torch.stack(list(given)).contiguous().requires_grad_()
        leaves = [view.detach().requires_grad_() for view in given]
        expected = power_spherical_loss(copies, z, backend=backend)
        loss = power_spherical_loss(leaves, z, backend=backend)
        (gradient,) = torch.autograd.grad(expected, copies)
        found = torch.stack(torch.autograd.grad(loss, leaves))
        # Eager's sums over 8 columns may round otherwise in another layout; the fused loss copies
        # what lies otherwise.
        tolerance = 1e-13 if backend == "eager" else 0.0
        want = (expected, gradient)
        torch.testing.assert_close((loss, found), want, rtol=tolerance, atol=tolerance)


@every
def test_a_given_concentration_is_softplus_of_the_raw_one(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 3, 2, 5, 33, raw=2.0)
    raw = p.clone().requires_grad_()
    loss = power_spherical_loss(
        raw, z, concentration_scale=31.0, concentration_min=0.5, backend=backend
    )
    (expected,) = torch.autograd.grad(loss, raw)
    loc = p[..., :33].clone().requires_grad_()
    column = p[..., 33].clone().requires_grad_()
    kappa = 31 * torch.nn.functional.softplus(column) + 0.5
    ours = power_spherical_loss(loc, z, concentration=kappa, backend=backend)
    torch.testing.assert_close(ours, loss, rtol=1e-13, atol=1e-13)
    by_loc, by_column = torch.autograd.grad(ours, (loc, column))
    torch.testing.assert_close(by_loc, expected[..., :33], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_column, expected[..., 33], rtol=1e-10, atol=1e-12)
    views = power_spherical_loss(list(loc), list(z), concentration=list(kappa), backend=backend)
    assert torch.equal(views, ours)


@every
def test_gradcheck_of_a_given_concentration(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 3, 2, 3, 7)
    loc, kappa = p[..., :7].clone().requires_grad_(), p[..., 7].abs().add(0.1).requires_grad_()

    def loss(loc: Tensor, kappa: Tensor) -> Tensor:
        return power_spherical_loss(loc, z, concentration=kappa, reduction="none", backend=backend)

    assert torch.autograd.gradcheck(loss, (loc, kappa))


@every
def test_extremes_of_a_given_concentration(backend: str) -> None:
    """A negative or NaN kappa makes its own sample NaN; 0 is the uniform distribution, loss 0."""
    p, z = (x.float() for x in draw(COSINE, 2, 2, 5, 20))
    kappa = torch.tensor([[0.0, 1e6, -1e-3, math.nan, 5.0]] * 2, requires_grad=True)
    loss = power_spherical_loss(p, z, concentration=kappa, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, True, False]
    assert loss[0].abs() <= 1e-6
    loss[[0, 1, 4]].sum().backward()
    assert kappa.grad is not None
    assert torch.isfinite(kappa.grad[:, [0, 1, 4]]).all()


@every
@FORMS
def test_loss_scale_is_a_factor(backend: str, form: LossForm) -> None:
    p, z = draw(form, 3, 2, 5, 20)
    p.requires_grad_()
    quarter = dataclasses.replace(form, factor=0.25, cosine=form.cosine / 4)
    for reduction in ("mean", "none"):
        loss = multiview_loss(p, z, form, reduction=reduction, backend=backend)
        scaled = multiview_loss(p, z, quarter, reduction=reduction, backend=backend)
        torch.testing.assert_close(scaled, loss / 4, rtol=1e-14, atol=1e-14)
        expected, gradient = (torch.autograd.grad(x.sum(), p)[0] for x in (loss / 4, scaled))
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-14)


@every
@FORMS
def test_the_mean_is_the_mean(backend: str, form: LossForm) -> None:
    p, z = (x.float() for x in draw(form, 2, 2, 37, 20))
    p.requires_grad_()
    per_sample = multiview_loss(p, z, form, reduction="none", backend=backend)
    mean = multiview_loss(p, z, form, backend=backend)
    torch.testing.assert_close(mean, per_sample.double().mean().float(), rtol=2e-7, atol=0)
    gradients = [torch.autograd.grad(x, p)[0] for x in (mean, per_sample.mean())]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@fused
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_incoming_gradients_of_every_kind(backend: str, dtype: torch.dtype) -> None:
    """1, another number, one a sample, strided, expanded and zero: each the gradient for 1 times
    the factor."""
    p, z = (x.to(dtype) for x in draw(POWER_SPHERICAL, 2, 2, 6, 17))
    p.requires_grad_()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    per_sample = power_spherical_loss(p, z, reduction="none", backend=backend)
    (one,) = torch.autograd.grad(per_sample, p, torch.ones(6, dtype=real), retain_graph=True)
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-6}
    strided = torch.linspace(-2, 3, 12, dtype=real)[::2]
    expanded = torch.full((1,), 3.0, dtype=real).expand(6)
    for factor in (strided, expanded, torch.zeros(6, dtype=real)):
        (gradient,) = torch.autograd.grad(per_sample, p, factor, retain_graph=True)
        expected = one.to(real) * factor[:, None]
        torch.testing.assert_close(gradient.to(real), expected, **tolerance)
    mean = power_spherical_loss(p, z, backend=backend)
    (one,) = torch.autograd.grad(mean, p, retain_graph=True)
    for number in (1.0, -2.5, 0.0):
        (gradient,) = torch.autograd.grad(number * mean, p, retain_graph=True)
        torch.testing.assert_close(gradient.to(real), number * one.to(real), **tolerance)


@fused
def test_a_small_gradient_survives_float16(backend: str) -> None:
    """Below the smallest float16 until the factor of GradScaler, 2^20 here, brings it back."""
    p, z = draw(COSINE, 2, 2, 8, 16)
    p, z = (100 * p).half().requires_grad_(), z.half()
    exact = p.detach().double().requires_grad_()
    (cosine_loss(exact, z.double(), backend="eager", loss_scale=1e-4) * 2**20).backward()
    (cosine_loss(p, z, backend=backend, loss_scale=1e-4) * 2**20).backward()
    assert p.grad is not None
    assert exact.grad is not None
    assert exact.grad.abs().max() * 2**-20 < torch.finfo(torch.float16).smallest_normal / 1024
    torch.testing.assert_close(p.grad.double(), exact.grad, rtol=2e-3, atol=1e-7)


@fused
def test_backward_uses_the_gradient_up_and_computes_it_anew(backend: str) -> None:
    """retain_graph, accumulation, and the same loss twice in one graph; without retain_graph
    torch's own error."""
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    p.requires_grad_()
    loss = power_spherical_loss(p, z, backend=backend)
    loss.backward(retain_graph=True)
    assert p.grad is not None
    first = p.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(p.grad, 2 * first)
    (5 * loss).backward()
    torch.testing.assert_close(p.grad, 7 * first, rtol=1e-13, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    again = power_spherical_loss(p, z, backend=backend)
    (gradient,) = torch.autograd.grad(again + 2 * again, p)
    torch.testing.assert_close(gradient, 3 * first, rtol=1e-13, atol=1e-14)


@fused
def test_a_second_backward_after_a_change_of_the_inputs_is_refused(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    leaf = p.clone().requires_grad_()
    inner = leaf * 1
    loss = power_spherical_loss(inner, z, backend=backend)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@fused
def test_the_gradient_is_freed_with_the_graph_and_not_kept_without_one(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    p.requires_grad_()
    loss = power_spherical_loss(p, z, backend=backend)
    assert loss.grad_fn is not None
    kept = weakref.ref(loss.grad_fn.kept[0])
    assert kept() is not None
    del loss
    gc.collect()
    assert kept() is None
    with torch.no_grad():
        assert power_spherical_loss(p, z, backend=backend).grad_fn is None


@fused
@pytest.mark.parametrize("path", ["function", "operator"])
def test_differentiating_twice_is_an_error(backend: str, path: str) -> None:
    """create_graph gives the first gradient; its derivative is an error with advice."""
    p, z = draw(COSINE, 2, 2, 3, 8)
    p.requires_grad_()
    kappa = torch.rand(2, 3, dtype=p.dtype).requires_grad_()
    numbers = (1.0, 0.0, 1.0, "softplus", 1.0, 0.0)
    call = LossCall(backend, "power_spherical", p.dtype, *numbers, False, True)
    if path == "function":
        loss = power_spherical_loss(p, z, concentration=kappa, reduction="none", backend=backend)
    else:
        loss = torch.ops.vi_simsiam.multiview_loss(list(p), list(z), kappa, *call)[0]
    incoming = torch.ones_like(loss).requires_grad_()
    plain = torch.autograd.grad(loss, (p, kappa), torch.ones_like(loss), retain_graph=True)
    gradients = torch.autograd.grad(loss, (p, kappa), incoming, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
    for gradient, by in itertools.product(gradients, (p, kappa, incoming)):
        with pytest.raises(RuntimeError, match="differentiated twice; use backend='eager'"):
            torch.autograd.grad(gradient.sum(), by, retain_graph=True)
    penalised = loss.sum() + torch.autograd.grad(loss.sum(), p, create_graph=True)[0].square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        penalised.backward()


@fused
def test_hooks_may_change_gradients_in_place(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    p.requires_grad_()
    (plain,) = torch.autograd.grad(power_spherical_loss(p, z, backend=backend), p)
    p.register_hook(lambda gradient: gradient.mul_(2))
    (found,) = torch.autograd.grad(
        power_spherical_loss(p, z, backend=backend), p, create_graph=True
    )
    assert torch.equal(found, 2 * plain)


@every
def test_targets_of_a_frozen_teacher(backend: str) -> None:
    """Made under inference_mode they cannot be saved for backward; first and second backward do
    without."""
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    p.requires_grad_()
    expected = torch.autograd.grad(power_spherical_loss(p, z, backend=backend), p)[0]
    with torch.inference_mode():
        frozen = z * 1
        assert torch.isfinite(power_spherical_loss(p, frozen, backend=backend))
    for targets in (frozen, list(frozen)):
        loss = power_spherical_loss(p, targets, backend=backend)
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss, p, retain_graph=True)[0], expected)


@fused
def test_one_view_that_requires_a_gradient(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 3, 2, 4, 8)
    (expected,) = torch.autograd.grad(
        power_spherical_loss(p.requires_grad_(), z, backend=backend), p
    )
    views = [p[0].detach(), p[1].detach().requires_grad_(), p[2].detach()]
    (found,) = torch.autograd.grad(power_spherical_loss(views, z, backend=backend), views[1])
    assert torch.equal(found, expected[1])


@fused
@FORMS
@pytest.mark.parametrize("views", [2, 5])
def test_the_only_target_view_has_no_gradient(backend: str, form: LossForm, views: int) -> None:
    p, z = draw(form, views, 1, 3, 40)
    if backend != "triton":  # which multiplies the view by 0
        p[0] = math.nan  # it takes no part
    loss, gradient = loss_and_gradient(p, z, form, backend)
    assert loss.isfinite().all()
    assert (gradient[0] == 0).all()
    assert gradient[1:].isfinite().all()


@fused
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_to_the_same_gradient(backend: str, use_reentrant: bool) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 4, 8)
    p.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return power_spherical_loss(x * 2, z, backend=backend)

    expected = torch.autograd.grad(loss(p), p)[0]
    torch.utils.checkpoint.checkpoint(loss, p, use_reentrant=use_reentrant).backward()
    assert p.grad is not None
    assert torch.equal(p.grad, expected)


@fused
def test_repeats_are_bitwise_equal_for_any_number_of_threads(backend: str) -> None:
    size = (50, 300) if interpreting() else (600, 512)
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 3, 2, *size))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4, 1, 2):
            torch.set_num_threads(count)
            leaf = p.clone().requires_grad_()
            loss = power_spherical_loss(leaf, z, backend=backend)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)
    )


@every
def test_the_cosine_stands_beside_a_given_concentration(backend: str) -> None:
    """A weight w of SimSiam's loss, which loss_scale leaves alone."""
    p, z = draw(POWER_SPHERICAL, 3, 2, 5, 17)
    loc, kappa = p[..., :17].requires_grad_(), p[..., 17].abs()
    options = {"concentration": kappa, "loss_scale": 0.25, "backend": backend}
    found = power_spherical_loss(loc, z, cosine_weight=3.0, **options)
    expected = power_spherical_loss(loc, z, **options) + 3 * cosine_loss(loc, z, backend="eager")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, loc)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
