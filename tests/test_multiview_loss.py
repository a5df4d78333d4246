"""The multi-view losses: values and gradients of every backend against float64."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import (
    COSINE,
    POWER_SPHERICAL,
    QUADRATIC,
    check_error,
    draw,
    every,
    fused,
    loss_and_gradient,
    on_cpu_only,
    textbook,
)
from test_power_spherical import COLUMN, DIMS, exact
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.functional import power_spherical_log_prob, power_spherical_loss
from vi_simsiam.ops.backends import choose_backend, why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "form", [POWER_SPHERICAL, COSINE, LossForm("power_spherical", 31.0, 2.5), QUADRATIC], ids=str
)
def test_eager_is_algorithm_1(form: LossForm) -> None:
    """At moderate sizes float64 textbook arithmetic is good enough to check the meaning: pairs,
    scale, softplus."""
    for views, targets in ((2, 2), (3, 1), (4, 2), (5, 5)):
        p, z = draw(form, views, targets, 4, 33, raw=4.0)
        p.requires_grad_()
        expected = textbook(p, z, form)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), p)
        loss, gradient = loss_and_gradient(p, z, form, "eager")
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


def test_loss_is_minus_log_prob_relative_to_uniform() -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 5, 40)
    loc, target = F.normalize(p[..., :40], dim=-1), F.normalize(z, dim=-1)
    kappa = F.softplus(p[..., 40])
    uniform = math.lgamma(20) - math.log(2) - 20 * math.log(math.pi)
    expected = sum(
        uniform - power_spherical_log_prob(target[g], loc[v], kappa[v]) for v, g in ((0, 1), (1, 0))
    )
    torch.testing.assert_close(power_spherical_loss(p, z, reduction="none"), expected)


@fused
@pytest.mark.parametrize(
    "form", [POWER_SPHERICAL, COSINE, LossForm("power_spherical", 31.0, 2.5), QUADRATIC], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3, 17, 129, 2048])
def test_fused_error_is_at_most_twice_eagers(
    backend: str, form: LossForm, dtype: torch.dtype, dim: int
) -> None:
    p, z = (x.to(dtype) for x in draw(form, 4, 2, 5, dim, raw=4.0))
    check_error(p, z, form, backend)


@every
def test_ten_times_better_than_textbook_at_high_concentration(backend: str) -> None:
    """D = 2048, kappa from 1e4 to 1e6: where training ends and the textbook formula has lost its
    digits.

    The cosines are 62/64 and 60/64 without any rounding, which at these kappas would be most of the
    error.
    """
    worst, worst_textbook = 0.0, 0.0
    p, z = torch.zeros(2, 64, 2049), torch.zeros(2, 64, 2048)
    p[..., :64] = z[..., :64] = 1
    z[..., 0] = z[:, ::2, 1] = -1
    p[..., 2048] = torch.linspace(-1, 2, 64)
    for kappa in (1e4, 1e5, 1e6):
        form = LossForm("power_spherical", kappa)
        exact = multiview_loss(p.double(), z.double(), form, reduction="none", backend="eager")
        ours = multiview_loss(p, z, form, reduction="none", backend=backend)
        worst = max(worst, (ours - exact).abs().max().item())
        worst_textbook = max(worst_textbook, (textbook(p, z, form) - exact).abs().max().item())
    assert worst <= worst_textbook / 10


@every
@pytest.mark.parametrize(
    ("form", "batch", "dim"),
    [
        *((form, 2, 2) for form in (LossForm("power_spherical", 3.0, 0.5), QUADRATIC, COSINE)),
        *((form, 1, 33) for form in (LossForm("power_spherical", 3.0, 0.5), QUADRATIC)),
    ],
    ids=str,
)
def test_gradcheck(backend: str, form: LossForm, batch: int, dim: int) -> None:
    """Narrow and wide enough for the series as they are, from 33 columns on."""
    p, z = draw(form, batch + 1, 2, batch, dim, raw=4.0)

    def loss(x: Tensor) -> Tensor:
        return multiview_loss(x, z, form, reduction="none", backend=backend)

    assert torch.autograd.gradcheck(loss, p.requires_grad_())
    if backend == "eager":
        assert torch.autograd.gradgradcheck(loss, p)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_at_the_bound_of_the_quadratic_link_only_what_raises_kappa_counts(
    backend: str, dtype: torch.dtype
) -> None:
    """Below the bound: the loss at the bound, the slope there for samples whose cosine wants a
    larger kappa, else 0."""
    dim, bound = 33, 0.02 / QUADRATIC.gain
    p, z = draw(QUADRATIC, 2, 2, 6, dim, near=0.3)
    p, z = p.to(dtype), z.to(dtype)
    z[:, 3:] *= -1  # cosines near -1 for half of the samples
    p[..., dim] = bound
    loss, gradient = loss_and_gradient(p, z, QUADRATIC, backend)
    assert (gradient[:, :3, dim] < 0).all()
    p[..., dim] = torch.tensor([-1e-3, -3.0, -math.inf] * 2).to(p)
    below, found = loss_and_gradient(p, z, QUADRATIC, backend)
    near = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    )
    torch.testing.assert_close(below, loss, **near)
    torch.testing.assert_close(found[..., :dim], gradient[..., :dim], **near)
    torch.testing.assert_close(found[:, :3, dim], gradient[:, :3, dim], **near)
    assert (found[:, 3:, dim] == 0).all()


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_golden_table_by_vectors(backend: str, dtype: torch.dtype, dim: int) -> None:
    """Every kappa and cosine of the table as vectors of the plane: loss and kappa's gradient
    against 60 digits.

    The vectors are rounded to `dtype` first, and the exact values are those of the rounded ones.
    """
    chosen = COLUMN["d"] == dim
    cos = torch.tensor(COLUMN["cos"][chosen], dtype=torch.float64)
    z = torch.zeros(len(cos), dim, dtype=torch.float64)
    z[:, 0], z[:, 1] = cos, (1 - cos**2).sqrt()
    z = (3 * z).to(dtype)
    loc = torch.zeros_like(z)
    loc[:, 0] = 0.5
    real = torch.float64 if dtype == torch.float64 else torch.float32
    kappa = torch.tensor(COLUMN["kappa"][chosen], dtype=real).expand(2, -1).clone().requires_grad_()
    loss = power_spherical_loss(
        [loc, loc], [z, z], concentration=kappa, reduction="none", backend=backend
    )
    loss.sum().backward()
    assert kappa.grad is not None
    eps, tail = (
        torch.finfo(real).eps,
        (4e-6, 7e-7, 2e-5) if real == torch.float32 else (2e-14, 4e-15, 1e-12),
    )
    for i, (x, y) in enumerate(z[:, :2].double().tolist()):
        with mpmath.workdps(60):
            one_plus = max(1 + mpmath.mpf(x) / mpmath.hypot(x, y), mpmath.mpf(1e-6))
            value, slope = exact(kappa[0, i].item(), one_plus - 1, dim)
        # 1 + c keeps a few roundings of c; how far they move the loss and its slope is not the
        # backend's doing.
        lost = 4 * eps / float(one_plus)
        assert (
            abs(loss[i].item() / -2 - value)
            <= tail[0] * max(1, abs(value)) + lost * kappa[0, i].item()
        )
        for view in kappa.grad[:, i].tolist():
            assert abs(-view - slope) <= max(tail[1], tail[2] * abs(slope)) + lost


@fused
@settings(max_examples=60, deadline=None)
@given(
    views=st.integers(2, 6), batch=st.integers(1, 7), dim=st.integers(2, 70), cosine=st.booleans(),
    dtype=st.sampled_from(DTYPES), target_dtype=st.sampled_from(DTYPES), padding=st.integers(0, 5),
    separate=st.booleans(), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_any_shape_stride_and_dtype(
    backend: str,
    views: int,
    batch: int,
    dim: int,
    cosine: bool,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    padding: int,
    separate: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    """Padded rows, transposed and separate views, mixed dtypes and per-sample gradients: what
    contiguous float64 eager gives."""
    form = COSINE if cosine else POWER_SPHERICAL
    targets = data.draw(st.integers(1, views))
    p, z = draw(form, views, targets, batch, dim, seed=seed)
    p, z = p.to(dtype), z.to(target_dtype)
    wide = torch.full((batch, views, p.shape[-1] + padding), float("nan"), dtype=dtype)
    wide[..., : p.shape[-1]] = p.transpose(0, 1)
    strided = wide[..., : p.shape[-1]].transpose(0, 1)
    weights = (
        torch.rand(batch, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") - 0.5
    )
    loss, gradient = loss_and_gradient(p.double(), z.double(), form, "eager", weights)
    leaves = [x.detach().requires_grad_() for x in (strided if separate else [strided])]
    given_views = leaves if separate else leaves[0]
    ours = multiview_loss(given_views, z, form, reduction="none", backend=backend)
    ours.backward(weights.to(ours))
    gradients = [leaf.grad for leaf in leaves]
    found = torch.stack(gradients) if separate else gradients[0]
    assert ours.dtype == (
        torch.float64 if torch.float64 in (dtype, target_dtype) else torch.float32
    )
    assert found is not None
    assert found.dtype == dtype
    # How much a rounding of the cosine moves the result: without bound towards the antipode.
    unit_p, unit_z = F.normalize(p[..., :dim].double(), dim=-1), F.normalize(z.double(), dim=-1)
    slack = 1 / (1 + (unit_p[:, None] * unit_z).sum(-1)).clamp(min=1e-6).min()
    kappa = F.softplus(p[..., -1].double()).max() if form == POWER_SPHERICAL else 1.0
    tolerance = 50 * torch.finfo(ours.dtype).eps * slack * kappa
    assert (ours.detach() - loss).abs().max() <= tolerance
    allowed = tolerance * slack / p[..., :dim].double().norm(dim=-1).min().clamp(max=1)
    kept = torch.finfo(dtype)  # the gradient itself is rounded, a GPU's bfloat16 twice
    assert (
        (found - gradient).abs() <= allowed + 1.1 * kept.eps * gradient.abs() + kept.smallest_normal
    ).all()


@every
@pytest.mark.parametrize("form", [POWER_SPHERICAL, COSINE], ids=str)
def test_extremes(backend: str, form: LossForm) -> None:
    """Antipodes, zero vectors, huge and vanishing concentrations are finite; NaN and infinity stay
    in their sample."""
    p, z = (x.float() for x in draw(form, 2, 2, 8, 20))
    p[0, 0, :20] = -z[1, 0]
    p[:, 1, :20] = 0
    z[:, 2] = 0
    p[0, 3, 4] = float("nan")
    z[1, 4, 0] = float("inf")
    p[0, 7, :20] = 1e20  # finite, its squared length is not
    if form.distribution == "power_spherical":
        p[:, 0, 20] = 1e6
        p[:, 1, 20] = -1e6
        p[:, 5, 20] = -math.inf  # the least concentration
    leaf = p.clone().requires_grad_()
    loss = multiview_loss(leaf, z, form, reduction="none", backend=backend)
    loss[[0, 1, 2, 5, 6]].sum().backward()
    assert loss.isnan().tolist() == [False, False, False, True, True, False, False, True]
    assert torch.isfinite(loss[[0, 1, 2, 5, 6]]).all()
    assert leaf.grad is not None
    finite = leaf.grad[:, [0, 1, 2, 5, 6]]
    assert torch.isfinite(finite).all()
    assert (leaf.grad[:, 1, :20] == 0).all(), "a zero vector has no direction to turn"
    if form.distribution == "cosine":
        assert loss[1] == 0


@every
def test_targets_are_constants_and_no_grad_saves_nothing(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    z.requires_grad_()
    power_spherical_loss(p.requires_grad_(), z, backend=backend).backward()
    assert z.grad is None
    with torch.no_grad():
        assert power_spherical_loss(p, z, backend=backend).grad_fn is None
    assert not power_spherical_loss(p.detach(), z, backend=backend).requires_grad


@every
def test_empty_batch(backend: str) -> None:
    p, z = torch.empty(2, 0, 9, requires_grad=True), torch.empty(2, 0, 8)
    loss = power_spherical_loss(p, z, reduction="none", backend=backend)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert p.grad is not None
    assert p.grad.shape == p.shape
    with pytest.raises(InputError, match="empty batch"):
        power_spherical_loss(p, z, backend=backend)


@every
def test_sequence_of_views_and_autocast(backend: str) -> None:
    """A list of per-view tensors is the same loss, and autocast must not lower the arithmetic to
    bfloat16."""
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 3, 2, 4, 64))
    expected = power_spherical_loss(p, z, backend=backend)
    assert torch.equal(power_spherical_loss(list(p), tuple(z), backend=backend), expected)
    with torch.autocast(p.device.type, torch.bfloat16):
        assert torch.equal(power_spherical_loss(p, z, backend=backend), expected)


@on_cpu_only
def test_auto_takes_the_fastest_that_is_here() -> None:
    assert choose_backend("auto", "cpu") == ("eager" if why_unavailable("cpu", "cpu") else "cpu")
    assert choose_backend("auto", "meta") == "eager"
