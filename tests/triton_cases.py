"""Numerical cases of the Triton kernels, on CPU tensors in Triton's interpreter or on a GPU.

Triton decides at import whether it interprets, so `test_triton_kernels.py` runs this file in a process of its own; its
name keeps pytest from collecting it anywhere else.

Rule for errors: over a set of samples, the largest error against 40 digits is at most twice that of the eager
reference in the same dtype, or 1.5 ulp. Each error is divided by what the rounding of a cosine costs there (`_exact`),
so that the largest one is not the luck of the worst conditioned sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.kernels.power_spherical import exp_nonpositive, log1p, log_density_ratio, log_of_sum, softplus
from vi_simsiam.ops import power_spherical as eager
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

Number = float | mpmath.mpf
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GOLDEN = Path(__file__).parent / "golden" / "power_spherical.json"
SPHERICAL = LossForm("power_spherical", scale=1 / 3, minimum=0.1)
COSINE = LossForm("cosine")

# The interpreter evaluates 0/0 in lanes that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def _elementary_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    if FUNCTION == "log":
        y = log_of_sum(x, tl.zeros_like(x))
    elif FUNCTION == "log1p":
        y = log1p(x)
    elif FUNCTION == "exp":
        y = exp_nonpositive(x)
    elif FUNCTION == "softplus":
        y, _ = softplus(x)
    else:
        _, y = softplus(x)
    tl.store(out_ptr + i, y)


@triton.jit
def _ratio_kernel(k_ptr, c_ptr, out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    i = tl.arange(0, BLOCK)
    used = i < COUNT
    kappa = tl.load(k_ptr + i, mask=used, other=1.0)
    cos = tl.load(c_ptr + i, mask=used, other=0.0)
    value, by_kappa, by_cos = log_density_ratio(kappa, cos, DIM)
    tl.store(out_ptr + i, value, mask=used)
    tl.store(out_ptr + COUNT + i, by_kappa, mask=used)
    tl.store(out_ptr + 2 * COUNT + i, by_cos, mask=used)


def _elementary(function: str, x: np.ndarray) -> np.ndarray:
    out = torch.full((len(x),), torch.nan, dtype=torch.float32, device=DEVICE)
    _elementary_kernel[(1,)](torch.from_numpy(x).to(DEVICE), out, function, len(x))
    return out.cpu().numpy()


def _ratio(kappa: Tensor, cos: Tensor, dim: int) -> Tensor:
    out = torch.full((3, len(kappa)), torch.nan, dtype=kappa.dtype, device=DEVICE)
    block = triton.next_power_of_2(len(kappa))
    _ratio_kernel[(1,)](kappa.to(DEVICE), cos.to(DEVICE), out, len(kappa), block, dim)
    return out.cpu()


def _exact_ratio(kappa: Number, cos: Number, dim: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """F, dF/dkappa and dF/dcos from the textbook's formula in 40 digits."""
    with mpmath.workdps(40):
        b, k = mpmath.mpf(dim - 1) / 2, mpmath.mpf(kappa)
        one_plus_cos = max(1 + mpmath.mpf(cos), mpmath.mpf(eager.ONE_PLUS_COS_MIN))
        clamped = one_plus_cos == eager.ONE_PLUS_COS_MIN
        value = k * mpmath.log(one_plus_cos / 2) - mpmath.loggamma(b + k) + mpmath.loggamma(2 * b + k)
        value += mpmath.loggamma(b) - mpmath.loggamma(2 * b)
        by_kappa = mpmath.log(one_plus_cos / 2) - mpmath.psi(0, b + k) + mpmath.psi(0, 2 * b + k)
        return value, by_kappa, mpmath.mpf(0) if clamped else k / one_plus_cos


def _softplus_reference(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid_reference(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


_random = np.random.default_rng(0)
_SIZE = 1 << 13


@pytest.mark.parametrize(
    ("function", "reference", "x", "ulps"),
    [
        ("log", np.log, 10 ** _random.uniform(-37, 37, _SIZE), 1.0),
        ("log1p", np.log1p, _random.uniform(-0.5, 1, _SIZE), 1.0),
        ("log1p", np.log1p, 10 ** _random.uniform(-38, 30, _SIZE), 1.0),
        ("log1p", np.log1p, -0.5 * 10 ** _random.uniform(-37, 0, _SIZE), 1.0),
        ("exp", np.exp, -_random.uniform(0, 87, _SIZE), 1.0),
        ("exp", np.exp, -_random.uniform(87, 120, _SIZE), 1.0),  # subnormal results and 0
        ("softplus", _softplus_reference, _random.uniform(-90, 90, _SIZE), 2.0),
        ("sigmoid", _sigmoid_reference, _random.uniform(-80, 80, _SIZE), 2.5),
    ],
)
def test_elementary_functions_keep_their_ulps(
    function: str, reference: Callable[[np.ndarray], np.ndarray], x: np.ndarray, ulps: float
) -> None:
    x = x.astype(np.float32)
    exact = reference(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
    error = np.abs(_elementary(function, x).astype(np.longdouble) - exact) / ulp
    assert error.max() <= ulps, f"{error.max():.2f} ulp at {x[error.argmax()]!r}"


@pytest.mark.parametrize("function", ["log1p", "exp", "softplus", "sigmoid"])
def test_elementary_functions_keep_nan_and_take_limits(function: str) -> None:
    out = _elementary(function, np.array([np.nan, 0.0, -0.0, -np.inf], dtype=np.float32))
    at_zero = {"log1p": 0.0, "exp": 1.0, "softplus": np.float32(np.log(2)), "sigmoid": 0.5}[function]
    assert np.isnan(out[0])
    assert (out[1:3] == at_zero).all()
    if function != "log1p":
        assert out[3] == 0


def _golden() -> dict[int, tuple[list[float], list[float]]]:
    points: dict[int, tuple[list[float], list[float]]] = {}
    for dim, kappa, cos, *_ in json.loads(GOLDEN.read_text())["rows"]:
        kappas, cosines = points.setdefault(dim, ([], []))
        kappas.append(kappa)
        cosines.append(cos)
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shifted", [True, False], ids=["small D", "large D"])
def test_log_density_ratio_is_as_accurate_as_the_reference(dtype: torch.dtype, shifted: bool) -> None:
    ours, reference = np.zeros(3), np.zeros(3)
    for dim, (kappas, cosines) in _golden().items():
        if (eager.series_shift(dim, dtype) > 0) is not shifted:
            continue
        kappa, cos = torch.tensor(kappas, dtype=dtype), torch.tensor(cosines, dtype=dtype)
        exact = np.array([_exact_ratio(k, c, dim) for k, c in zip(kappa.tolist(), cos.tolist(), strict=True)]).T
        # k c and the normaliser, about k/2 up to k = D and logarithmic from there, are what the value is the sum of.
        size = abs(exact) + np.stack([np.minimum(kappas, dim) + 1, np.ones(len(kappas)), np.zeros(len(kappas)) + 1e-30])
        plain = (
            eager.log_density_ratio(kappa, cos, dim),
            eager.concentration_derivative(kappa, cos, dim),
            eager.cosine_derivative(kappa, cos),
        )
        for worst, got in ((ours, _ratio(kappa, cos, dim)), (reference, torch.stack(plain))):
            np.maximum(worst, (abs(got.double().numpy() - exact) / size).max(1).astype(float), out=worst)
    assert (ours <= np.maximum(2 * reference, 1.5 * torch.finfo(dtype).eps)).all(), (ours, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [2, 2048])
def test_log_density_ratio_at_the_clamp(dtype: torch.dtype, dim: int) -> None:
    kappa = torch.tensor([0.0, 3.0, 1e4, 3.0, torch.nan, torch.inf], dtype=dtype)
    cos = torch.tensor([-1.0, -1.0, -1.0, torch.nan, 0.5, 0.5], dtype=dtype)
    value, by_kappa, by_cos = _ratio(kappa, cos, dim)
    torch.testing.assert_close(value, eager.log_density_ratio(kappa, cos, dim), equal_nan=True)
    torch.testing.assert_close(by_kappa, eager.concentration_derivative(kappa, cos, dim), equal_nan=True)
    assert by_cos[:3].tolist() == [0, 0, 0]
    assert value[3:].isnan().all()


def _inputs(
    form: LossForm, views: int, globals_: int, dim: int, dtype: torch.dtype, samples: int = 6
) -> tuple[Tensor, Tensor]:
    """Views of one image that agree to a degree that differs from sample to sample."""
    generator = torch.Generator().manual_seed(views * 1000 + dim)
    width = dim + (form.distribution == "power_spherical")
    image = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    noise = torch.logspace(-2, 0.5, samples, dtype=torch.float64)[:, None]
    predictions = image + noise * torch.randn(views, samples, width, generator=generator, dtype=torch.float64)
    targets = image + noise * torch.randn(globals_, samples, width, generator=generator, dtype=torch.float64)
    if width > dim:
        predictions[..., dim] = 8 * torch.randn(views, samples, generator=generator, dtype=torch.float64)
    return predictions.to(dtype).to(DEVICE), targets[..., :dim].to(dtype).to(DEVICE).contiguous()


def _launch(
    predictions: Tensor, targets: Tensor, form: LossForm, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in the compute dtype unless told otherwise, into memory that holds NaN."""
    dtype = torch.promote_types(torch.promote_types(predictions.dtype, targets.dtype), torch.float32)
    loss = torch.full(predictions.shape[1:2], torch.nan, dtype=dtype, device=DEVICE)
    grad = torch.full(predictions.shape, torch.nan, dtype=grad_dtype or dtype, device=DEVICE)
    kernel.multiview_loss(
        predictions, targets, loss, grad, distribution=form.distribution, scale=form.scale, minimum=form.minimum
    )
    return loss, grad


def _eager(predictions: Tensor, targets: Tensor, form: LossForm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = predictions.to(dtype).clone().requires_grad_()
    loss = eager_loss(leaf, targets.to(dtype), form)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _exact(
    predictions: Tensor, targets: Tensor, form: LossForm
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Loss and gradient in 40 digits, by the formulas at the head of the kernel, and the size of their terms.

    The size is the sum of the terms' absolute values plus the change that a change of the cosine by 1 would make.
    """
    dim = targets.shape[-1]
    with mpmath.workdps(40):
        p, z = (np.vectorize(mpmath.mpf, otypes=[object])(x.double().cpu().numpy()) for x in (predictions, targets))
        weight = mpmath.mpf(2) / (len(z) * (len(p) - 1))
        unit_p, inverse_p = _exact_unit(p[..., :dim])
        unit_z, _ = _exact_unit(z)
        loss, grad = np.full(p.shape[1], mpmath.mpf(0)), np.full(p.shape, mpmath.mpf(0))
        loss_size, grad_size = loss.copy(), grad + 1e-30
        for v, g, b in np.ndindex(len(p), len(z), p.shape[1]):
            if v == g:
                continue
            cos = (unit_p[v, b] * unit_z[g, b]).sum()
            value, by_cos = cos, mpmath.mpf(1)
            if form.distribution == "power_spherical":
                e = mpmath.exp(p[v, b, dim])
                kappa = mpmath.mpf(form.scale) * mpmath.log1p(e) + mpmath.mpf(form.minimum)
                value, by_kappa, by_cos = _exact_ratio(kappa, cos, dim)
                factor = weight * mpmath.mpf(form.scale) * e / (1 + e)
                grad[v, b, dim] -= factor * by_kappa
                grad_size[v, b, dim] += factor * (abs(by_kappa) + 1 / max(1 + cos, mpmath.mpf(1e-6)))
            loss[b] -= weight * value
            loss_size[b] += weight * (abs(value) + by_cos)
            factor = weight * by_cos * inverse_p[v, b]
            grad[v, b, :dim] -= factor * (unit_z[g, b] - cos * unit_p[v, b])
            grad_size[v, b, :dim] += factor * (abs(unit_z[g, b]) + abs(unit_p[v, b])).max()
        return (loss, loss_size), (grad, grad_size)


def _exact_unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    square = (x * x).sum(-1, keepdims=True)
    inverse = np.vectorize(lambda s: 1 / mpmath.sqrt(s) if s >= 1e-24 else mpmath.mpf(0), otypes=[object])(square)
    return x * inverse, inverse


def _check(predictions: Tensor, targets: Tensor, form: LossForm, loss: Tensor, grad: Tensor) -> None:
    (exact_loss, loss_size), (exact_grad, grad_size) = _exact(predictions, targets, form)
    eager_loss_, eager_grad = _eager(predictions, targets, form, loss.dtype)
    dim, eps = targets.shape[-1], torch.finfo(loss.dtype).eps
    for got, reference, want, size, part in (
        (loss, eager_loss_, exact_loss, loss_size, slice(None)),
        (grad, eager_grad, exact_grad, grad_size, slice(0, dim)),
        (grad, eager_grad, exact_grad, grad_size, slice(dim, None)),
    ):
        error, limit = (
            float((abs(x.double().cpu().numpy() - want) / size)[..., part].max(initial=0)) for x in (got, reference)
        )
        assert error <= max(2 * limit, 1.5 * eps), f"{part}: error {error:.2e}, of the reference {limit:.2e}"


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
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
        (3, 1, 33, torch.float64),
        (5, 3, 64, torch.float64),
        (2, 2, 100, torch.bfloat16),
        (3, 2, 48, torch.float16),
    ],
    ids=str,
)
def test_loss_and_gradient(form: LossForm, views: int, globals_: int, dim: int, dtype: torch.dtype) -> None:
    predictions, targets = _inputs(form, views, globals_, dim, dtype, samples=6 if dim < 1000 else 2)
    _check(predictions, targets, form, *_launch(predictions, targets, form))


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits of the launch for one test."""

    def change(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(kernel, name, value)
        kernel.launch_arguments.cache_clear()

    yield change
    kernel.launch_arguments.cache_clear()


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
@pytest.mark.parametrize(("views", "globals_", "dim"), [(2, 2, 40), (3, 1, 37), (5, 3, 32)])
def test_rows_in_chunks(form: LossForm, views: int, globals_: int, dim: int, limits: Callable[..., None]) -> None:
    limits(_MOST_PAIRS=0, _WARPS=1, _AT_ONCE=triton.next_power_of_2(views) // 2)
    arguments = kernel.launch_arguments(dim, views, globals_, 4, spherical=True, double=False)
    assert (arguments["RESIDENT"], arguments["BLOCK_D"]) == (False, 16)
    predictions, targets = _inputs(form, views, globals_, dim, torch.float32)
    _check(predictions, targets, form, *_launch(predictions, targets, form))


def test_views_one_by_one(limits: Callable[..., None]) -> None:
    limits(_MOST_PAIRS=2)
    assert kernel.launch_arguments(12, 3, 2, 4, spherical=True, double=False)["BLOCK_V"] == 1
    predictions, targets = _inputs(SPHERICAL, 3, 2, 12, torch.float32)
    _check(predictions, targets, SPHERICAL, *_launch(predictions, targets, SPHERICAL))


@pytest.mark.parametrize(
    ("predictions_dtype", "targets_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
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


def test_strides_are_followed_and_padding_is_left_alone() -> None:
    predictions, targets = _inputs(SPHERICAL, 3, 2, 13, torch.float32)
    want_loss, want_grad = _launch(predictions, targets, SPHERICAL)
    rows = torch.full((6, 3, 16), torch.nan, device=DEVICE)  # samples first, columns padded with NaN
    rows[..., :14] = predictions.transpose(0, 1)
    wide = torch.full((6, 5, 17), torch.nan, device=DEVICE)  # unaligned rows within a larger buffer
    wide[:, 1:3, 2:15] = targets.transpose(0, 1)
    loss = torch.full((8,), -7.0, device=DEVICE)
    grad = torch.full((5, 6, 18), -7.0, device=DEVICE)
    kernel.multiview_loss(
        rows.transpose(0, 1)[..., :14],
        wide[:, 1:3, 2:15].transpose(0, 1),
        loss[1:7],
        grad[1:4, :, 3:17],
        distribution="power_spherical",
        scale=SPHERICAL.scale,
        minimum=SPHERICAL.minimum,
    )
    torch.testing.assert_close(loss[1:7], want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[1:4, :, 3:17], want_grad, rtol=1e-5, atol=1e-6)
    loss[1:7], grad[1:4, :, 3:17] = -7.0, -7.0
    assert (loss == -7).all()
    assert (grad == -7).all()


def test_views_further_apart_than_int32(tmp_path: Path) -> None:
    """The third view starts 2^31 elements after the first; the file behind the tensor is sparse."""
    stride, dim = 1 << 30, 5
    if INTERPRETED:
        memory = torch.from_file(str(tmp_path / "views"), shared=True, size=2 * stride + 16, dtype=torch.float16)
    else:
        memory = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE)
    predictions, targets = _inputs(COSINE, 3, 3, dim, torch.float16, samples=1)
    apart = memory.as_strided((3, 1, dim), (stride, dim, 1))
    apart.copy_(predictions)
    loss, grad = _launch(apart, targets, COSINE)
    want_loss, want_grad = _launch(predictions, targets, COSINE)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-7)
    loss, grad = _launch(predictions, memory.as_strided((3, 1, dim), (stride, dim, 1)).copy_(targets), COSINE)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)


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
    for v, b in ((0, 0), (1, 1), (0, 2), (0, 3)):  # no direction of the prediction, none of the target, two poles
        assert (grad[v, b, :6] == 0).all()


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
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
    assert torch.equal(grad[0, 0], want_grad[0, 0])  # another view of the same image does not see it


def test_infinite_raw_concentrations() -> None:
    predictions, targets = _inputs(SPHERICAL, 2, 2, 7, torch.float32, samples=2)
    predictions[0, 0, 7], predictions[0, 1, 7] = -torch.inf, torch.inf
    loss, grad = _launch(predictions, targets, SPHERICAL)
    want, _ = _eager(predictions, targets, SPHERICAL, torch.float32)
    torch.testing.assert_close(loss[0], want[0])  # kappa is the minimum
    assert grad[0, 0, 7] == 0
    assert loss[1].isnan()


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
@pytest.mark.parametrize(("views", "globals_", "dim"), [(2, 2, 19), (16, 3, 19)])
def test_loss_without_gradient(form: LossForm, views: int, globals_: int, dim: int) -> None:
    predictions, targets = _inputs(form, views, globals_, dim, torch.float32)
    want, _ = _launch(predictions, targets, form)
    loss = torch.full_like(want, torch.nan)
    kernel.multiview_loss(
        predictions, targets, loss, None, distribution=form.distribution, scale=form.scale, minimum=form.minimum
    )
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


def test_empty_batch() -> None:
    loss, grad = _launch(*_inputs(COSINE, 2, 2, 5, torch.float32, samples=0), COSINE)
    assert (loss.shape, grad.shape) == ((0,), (2, 0, 5))
