"""Numerical cases of the Triton kernels, on CPU tensors in Triton's interpreter or on a GPU.

Triton decides at import whether it interprets, so `test_triton_kernels.py` runs this file in a
process of its own; its name keeps pytest from collecting it anywhere else.

Rule for errors: over a set of samples, the largest error against 40 digits is at most twice that of
the eager reference in the same dtype, or 1.5 ulp. Each error is divided by what the rounding of a
cosine costs there (`_exact`), so that the largest one is not the luck of the worst conditioned
sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_function_cases import exact_ratio

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.kernels.multiview_loss_parts import store_mean
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SPHERICAL = LossForm("power_spherical", scale=1 / 3, minimum=0.1)
QUADRATIC = LossForm(
    "power_spherical", scale=1 / 3, minimum=0.1, link="quadratic", gain=0.3, cosine=1.5
)
COSINE = LossForm("cosine")
GIVEN = LossForm("power_spherical")
"""Predictions of this form hold kappa itself in their last column; the kernel gets it in a tensor
of its own."""

# The interpreter evaluates 0/0 in lanes that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_FORMS = {"raw": SPHERICAL, "quadratic": QUADRATIC, "cosine": COSINE, "given": GIVEN}
every_form = pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
forms = pytest.mark.parametrize(
    "form", [QUADRATIC, COSINE, GIVEN], ids=["quadratic", "cosine", "given"]
)


def _inputs(
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


def _launch(
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
    """Loss and gradient, in the compute dtype unless told otherwise, of a launch that is itself
    checked.

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


def _eager(
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


def _check(
    predictions: Tensor, targets: Tensor, form: LossForm, loss: Tensor, grad: Tensor
) -> None:
    (exact_loss, loss_size), (exact_grad, grad_size) = _exact(predictions, targets, form)
    eager_loss_, eager_grad = _eager(predictions, targets, form, loss.dtype)
    dim, eps = targets.shape[-1], torch.finfo(loss.dtype).eps
    for got, reference, want, size, part in (
        (loss, eager_loss_, exact_loss, loss_size, slice(None)),
        (grad, eager_grad, exact_grad, grad_size, slice(0, dim)),
        (grad, eager_grad, exact_grad, grad_size, slice(dim, None)),
    ):
        error, limit = (
            float((abs(x.double().cpu().numpy() - want) / size)[..., part].max(initial=0))
            for x in (got, reference)
        )
        assert error <= max(2 * limit, 1.5 * eps), (
            f"{part}: error {error:.2e}, of the reference {limit:.2e}"
        )


@every_form
@pytest.mark.parametrize(
    ("views", "globals_", "dim", "dtype"),
    [
        (2, 2, 2, torch.float32),
        (2, 1, 3, torch.float32),
        (3, 2, 16, torch.float32),
        (4, 4, 37, torch.float32),
        (8, 2, 128, torch.float32),
        (2, 2, 2048, torch.float32),
        (6, 5, 12, torch.float32),  # views in blocks, the last one not full
        (16, 3, 9, torch.float32),
        (2, 2, 2, torch.float64),
        (5, 3, 64, torch.float64),
        (2, 2, 100, torch.bfloat16),
        (3, 2, 48, torch.float16),
    ],
    ids=str,
)
def test_loss_and_gradient(
    form: LossForm, views: int, globals_: int, dim: int, dtype: torch.dtype
) -> None:
    predictions, targets = _inputs(
        form, views, globals_, dim, dtype, samples=4 if dim < 1000 else 2
    )
    loss, grad = _launch(predictions, targets, form)
    _check(predictions, targets, form, loss, grad)
    if globals_ == 1:
        assert (grad[0] == 0).all()  # the first view has no target of another view


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits of the launch for one test."""

    def change(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(kernel, name, value)
        kernel.launch_arguments.cache_clear()

    yield change
    kernel.launch_arguments.cache_clear()


def _arguments(dim: int, views: int, globals_: int) -> dict[str, int | bool]:
    return kernel.launch_arguments(dim, views, globals_, 4, width=dim, spherical=True, double=False)


@forms
@pytest.mark.parametrize(("views", "globals_", "dim"), [(2, 2, 40), (3, 1, 37), (5, 3, 32)])
def test_rows_in_chunks(
    form: LossForm, views: int, globals_: int, dim: int, limits: Callable[..., None]
) -> None:
    limits(_MOST_PAIRS=0, _WARPS=1, _STREAMED=triton.next_power_of_2(views) // 2)
    arguments = _arguments(dim, views, globals_)
    assert (arguments["RESIDENT"], arguments["BLOCK_D"]) == (False, 16)
    predictions, targets = _inputs(form, views, globals_, dim, torch.float32)
    _check(predictions, targets, form, *_launch(predictions, targets, form))


def test_views_one_by_one(limits: Callable[..., None]) -> None:
    limits(_MOST_PAIRS=2)
    assert _arguments(12, 3, 2)["BLOCK_V"] == 1
    predictions, targets = _inputs(SPHERICAL, 3, 2, 12, torch.float32)
    _check(predictions, targets, SPHERICAL, *_launch(predictions, targets, SPHERICAL))


@forms
@pytest.mark.parametrize("programs", [1, 3])
def test_several_samples_to_a_program_change_nothing(
    form: LossForm, programs: int, limits: Callable[..., None]
) -> None:
    inputs = _inputs(form, 3, 2, 12, torch.float32, samples=5)
    want = _launch(*inputs, form)
    limits(_MOST_WARPS_IN_ALL=programs)
    assert all(map(torch.equal, _launch(*inputs, form), want))


@triton.jit(do_not_specialize=["samples"])
def _mean_kernel(loss_ptr, mean_ptr, ticket_ptr, samples, WIDTH: tl.constexpr):
    store_mean(mean_ptr, ticket_ptr, loss_ptr, samples.to(tl.int64), WIDTH)


@pytest.mark.parametrize("samples", [1, 300, 512, 513, 1536, 1950])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_mean_of_many_losses(samples: int, bad: float | None) -> None:
    loss = torch.rand(samples + 1, generator=torch.Generator().manual_seed(samples)).to(DEVICE)
    loss[-1] = torch.nan  # behind the end
    if bad is not None:
        loss[samples // 2] = bad
    mean, ticket = (
        torch.full((), torch.nan, device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    means = []
    for programs in (1, 3, 3):
        mean.fill_(-7)
        _mean_kernel[(programs,)](loss, mean, ticket, samples, 32)
        assert ticket.item() == 0
        means.append(mean.item())
    want = loss[:samples].double().mean().item()
    np.testing.assert_allclose(means, [want] * 3, rtol=2e-7)
    assert len(set(map(str, means))) == 1


@forms
def test_repeated_launches_are_bitwise_equal(form: LossForm) -> None:
    inputs = _inputs(form, 4, 2, 33, torch.float32, samples=3)
    first = _launch(*inputs, form)
    assert all(map(torch.equal, first, _launch(*inputs, form)))
    assert all(map(torch.equal, first, _launch(*inputs, form, padding=0)))


@forms
@pytest.mark.parametrize(("padding", "offset"), [(0, 1), (13, 5), (70, 16)])
def test_views_anywhere_in_rows_of_any_width(form: LossForm, padding: int, offset: int) -> None:
    inputs = _inputs(form, 5, 3, 16, torch.float32, samples=3)
    want_loss, want_grad = _launch(*inputs, form)
    loss, grad = _launch(*inputs, form, padding=padding, offset=offset)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


@every_form
def test_weights_of_loss_and_gradient(form: LossForm) -> None:
    weight = (
        1 / 7 if form is QUADRATIC else -1 / 7
    )  # the side of the link's bound is that of a loss to be minimised
    inputs = _inputs(form, 3, 2, 21, torch.float64)
    want_loss, want_grad = _launch(*inputs, form)
    loss, grad = _launch(*inputs, form, weights=(3.0, weight))
    torch.testing.assert_close(loss, 3 * want_loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, want_grad * weight, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("predictions_dtype", "targets_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(predictions_dtype: torch.dtype, targets_dtype: torch.dtype) -> None:
    predictions, targets = _inputs(SPHERICAL, 3, 2, 24, torch.float64)
    predictions, targets = predictions.to(predictions_dtype), targets.to(targets_dtype)
    _check(predictions, targets, SPHERICAL, *_launch(predictions, targets, SPHERICAL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_the_dtype_of_the_buffer(dtype: torch.dtype) -> None:
    predictions, targets = _inputs(SPHERICAL, 2, 2, 20, dtype)
    _, grad = _launch(predictions, targets, SPHERICAL)
    _, rounded = _launch(predictions, targets, SPHERICAL, dtype)
    # The interpreter truncates where a GPU rounds.
    torch.testing.assert_close(rounded.float(), grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_what_lies_around_the_outputs_is_left_alone() -> None:
    predictions, targets = _inputs(SPHERICAL, 3, 2, 13, torch.float32)
    loss = torch.full((8,), -7.0, device=DEVICE)
    grad = torch.full((5, 4, 19), -7.0, device=DEVICE)
    _call(predictions.unbind(), targets.unbind(), loss[1:5], grad[1:4, :, 3:18], SPHERICAL)
    want_loss, want_grad = _launch(predictions, targets, SPHERICAL)
    torch.testing.assert_close(loss[1:5], want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[1:4, :, 3:17], want_grad, rtol=1e-5, atol=1e-6)
    assert (grad[1:4, :, 17] == 0).all()
    loss[1:5], grad[1:4, :, 3:18] = -7.0, -7.0
    assert (loss == -7).all()
    assert (grad == -7).all()


def _call(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    loss: Tensor,
    grad: Tensor | None,
    form: LossForm,
) -> None:
    """A launch without mean and without anything around it."""
    weight = 2 / (len(targets) * (len(predictions) - 1))
    kernel.multiview_loss(
        *(predictions, targets, None, loss, None, None, grad, None),
        distribution=form.distribution,
        scale=form.scale,
        minimum=form.minimum,
        link=form.link,
        gain=form.gain,
        cosine=form.cosine,
        weight=weight,
        gradient_weight=weight,
    )


def test_rows_and_views_further_apart_than_int32(tmp_path: Path) -> None:
    """The third row, and the third view of the gradient, start 2^31 elements on; the file behind
    them is sparse."""
    stride, dim = 1 << 30, 5
    if INTERPRETED:
        memory = torch.from_file(
            str(tmp_path / "rows"), shared=True, size=2 * stride + 64, dtype=torch.float16
        )
    else:
        memory = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    predictions, targets = _inputs(COSINE, 3, 3, dim, torch.float16, samples=3)
    loss, grad = (
        torch.full((3,), torch.nan, device=DEVICE),
        torch.full((3, 3, dim), torch.nan, device=DEVICE),
    )
    _call(predictions.unbind(), targets.unbind(), loss, grad, COSINE)
    got_loss, got_grad = torch.full_like(loss, torch.nan), torch.full_like(grad, torch.nan)
    apart = [
        memory.as_strided((3, dim), (stride, 1), 8 * v).copy_(predictions[v]) for v in range(3)
    ]
    _call(apart, targets.unbind(), got_loss, got_grad, COSINE)
    assert torch.equal(got_loss, loss)
    assert torch.equal(got_grad, grad)
    apart = [memory.as_strided((3, dim), (stride, 1), 8 * v).copy_(targets[v]) for v in range(3)]
    wide = memory.as_strided((3, 3, dim), (stride, 8, 1), 32)
    _call(predictions.unbind(), apart, got_loss.fill_(torch.nan), wide, COSINE)
    assert torch.equal(got_loss, loss)
    torch.testing.assert_close(wide.float(), grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
def test_zero_and_opposite_vectors(form: LossForm) -> None:
    predictions, targets = _inputs(form, 2, 2, 6, torch.float32)
    predictions[0, 0, :6] = 0
    targets[0, 1] = 0
    predictions[0, 2, :6] = torch.tensor([3.0, 0, 0, 0, 0, 0])
    targets[1, 2] = torch.tensor([-2.0, 0, 0, 0, 0, 0])
    predictions[0, 3, :6] = targets[1, 3] = torch.tensor([0, 2.0, 0, 0, 0, 0])
    loss, grad = _launch(predictions, targets, form)
    _check(predictions, targets, form, loss, grad)
    for v, b in (
        (0, 0),
        (1, 1),
        (0, 2),
        (0, 3),
    ):  # no direction of the prediction, none of the target, two poles
        assert (grad[v, b, :6] == 0).all()


@forms
def test_bad_numbers_stay_in_their_sample(form: LossForm) -> None:
    predictions, targets = _inputs(form, 3, 2, 11, torch.float32, samples=6)
    want_loss, want_grad = _launch(predictions, targets, form)
    predictions[1, 0, 4] = torch.nan
    targets[0, 2, 3] = torch.inf
    predictions[2, 4, 0] = -torch.inf
    targets[1, 5] *= 1e25  # finite, its squared length is not
    loss, grad = _launch(predictions, targets, form)
    bad, good = [0, 2, 4, 5], [1, 3]
    assert loss[bad].isnan().all()
    assert grad[1, 0, :11].isnan().all()
    assert grad[1:, 2, :11].isnan().all()
    assert grad[2, 4, :11].isnan().all()
    assert torch.equal(loss[good], want_loss[good])
    assert torch.equal(grad[:, good], want_grad[:, good])
    assert torch.equal(
        grad[0, 0], want_grad[0, 0]
    )  # another view of the same image does not see it


@pytest.mark.parametrize("form", [SPHERICAL, GIVEN], ids=["raw", "given"])
def test_extreme_concentrations(form: LossForm) -> None:
    predictions, targets = _inputs(form, 2, 2, 7, torch.float32, samples=4)
    given = form is GIVEN
    predictions[0, :, 7] = torch.tensor(
        [0.0 if given else -torch.inf, 1e6, torch.inf, -1e-30 if given else torch.nan]
    )
    loss, grad = _launch(predictions, targets, form)
    _check(predictions[:, 1:2], targets[:, 1:2], form, loss[1:2], grad[:, 1:2])
    want, want_grad = _eager(predictions, targets, form, torch.float32)
    torch.testing.assert_close(loss[0], want[0])  # kappa is the minimum
    torch.testing.assert_close(grad[0, 0, :7], want_grad[0, 0, :7])
    assert given or grad[0, 0, 7] == 0
    assert loss[2:].isnan().all()


@forms
@pytest.mark.parametrize(("views", "globals_", "dim"), [(2, 2, 19), (16, 3, 19)])
def test_loss_without_gradient(form: LossForm, views: int, globals_: int, dim: int) -> None:
    predictions, targets = _inputs(form, views, globals_, dim, torch.float32)
    want, _ = _launch(predictions, targets, form)
    loss, _ = _launch(predictions, targets, form, with_grad=False)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


@forms
def test_empty_batch(form: LossForm) -> None:
    loss, grad = _launch(*_inputs(form, 2, 2, 5, torch.float32, samples=0), form)
    assert (loss.shape, grad.shape[:2]) == ((0,), (2, 0))
