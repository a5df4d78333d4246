"""The reference math against values computed with 60 digits."""

from __future__ import annotations

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from vi_simsiam.ops.power_spherical import (
    ONE_PLUS_COS_MIN,
    concentration_derivative,
    cosine_derivative,
    digamma_tail,
    log_density_ratio,
    log_uniform,
    stirling_tail,
)

TABLE = json.loads((Path(__file__).parent / "golden" / "power_spherical.json").read_text())
ROWS = np.array(TABLE["rows"])
COLUMN = {name: ROWS[:, i] for i, name in enumerate(TABLE["columns"])}
DIMS = sorted({int(dim) for dim in COLUMN["d"]})


def exact(kappa: float, cos: float, dim: int) -> tuple[float, float]:
    """F and dF/dkappa at exactly these arguments, from the textbook formula with 60 digits."""
    with mpmath.workdps(60):
        k, c, b = mpmath.mpf(kappa), mpmath.mpf(cos), mpmath.mpf(dim - 1) / 2
        lgamma = (
            mpmath.loggamma(b + k)
            - mpmath.loggamma(2 * b + k)
            - mpmath.loggamma(b)
            + mpmath.loggamma(2 * b)
        )
        value = k * mpmath.log1p(c) - k * mpmath.log(2) - lgamma
        slope = mpmath.log1p(c) - mpmath.log(2) + mpmath.digamma(2 * b + k) - mpmath.digamma(b + k)
        return float(value), float(slope)


def arguments(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The table's kappa and cos for `dim`, rounded to `dtype`, and the exact values at the rounded
    arguments."""
    chosen = COLUMN["d"] == dim
    kappa = torch.tensor(COLUMN["kappa"][chosen]).to(dtype)
    cos = torch.tensor(COLUMN["cos"][chosen]).to(dtype)
    value, slope = np.array(
        [exact(k, c, dim) for k, c in zip(kappa.tolist(), cos.tolist(), strict=True)]
    ).T
    return kappa, cos, value, slope


@pytest.mark.parametrize("dim", DIMS)
def test_exact_agrees_with_the_golden_table(dim: int) -> None:
    """The oracle of this file is itself held to the independent table."""
    chosen = COLUMN["d"] == dim
    _, _, value, slope = arguments(dim, torch.float64)
    error = np.abs(value + log_uniform(dim) - COLUMN["log_prob"][chosen])
    assert np.all(error <= 1e-15 * (np.abs(value) + abs(log_uniform(dim))))
    np.testing.assert_allclose(slope, COLUMN["dlogp_dkappa"][chosen], rtol=1e-12, atol=1e-15)


def summands(kappa: Tensor, dim: int) -> np.ndarray:
    """Error of the two large summands of F, which nearly cancel far below the optimum: 1.5 eps of
    each.

    They are b log1p(k / 2b) or less, with b = (D - 1)/2. A log1p is right to an ulp, on the
    processor at hand.
    """
    return (
        1.5
        * torch.finfo(kappa.dtype).eps
        * (dim - 1)
        * np.log1p(kappa.double().numpy() / (dim - 1))
    )


@pytest.mark.parametrize("dim", DIMS)
def test_float32_keeps_its_digits(dim: int) -> None:
    kappa, cos, value, slope = arguments(dim, torch.float32)
    error = np.abs(log_density_ratio(kappa, cos, dim).double().numpy() - value)
    assert np.all(error <= np.maximum(4e-6 * np.maximum(1, np.abs(value)), summands(kappa, dim)))
    error = np.abs(concentration_derivative(kappa, cos, dim).double().numpy() - slope)
    assert np.all((error <= 7e-7) | (error <= 2e-5 * np.abs(slope)))


@pytest.mark.parametrize("dim", DIMS)
def test_float64_keeps_its_digits(dim: int) -> None:
    kappa, cos, value, slope = arguments(dim, torch.float64)
    error = np.abs(log_density_ratio(kappa, cos, dim).numpy() - value)
    assert np.all(error <= np.maximum(1e-14 * np.maximum(1, np.abs(value)), summands(kappa, dim)))
    error = np.abs(concentration_derivative(kappa, cos, dim).numpy() - slope)
    assert np.all(error <= 1e-14)


def test_textbook_float32_would_fail() -> None:
    """The bound above is one that the textbook formula misses by orders of magnitude where training
    operates."""
    dim, kappa, cos = 2048, 128961.0, 63 / 64
    b, k, c = (dim - 1) / 2, torch.tensor(kappa), torch.tensor(cos)
    upper, lower = torch.tensor(2 * b), torch.tensor(b)
    lgammas = torch.lgamma(b + k) - torch.lgamma(2 * b + k) - torch.lgamma(lower)
    textbook = k * torch.log1p(c) - (k * np.log(2) + lgammas + torch.lgamma(upper))
    value, slope = exact(kappa, cos, dim)
    ours = abs(log_density_ratio(k, c, dim).item() - value)
    assert abs(textbook.item() - value) > 1e-2
    assert ours < 2e-4
    assert abs(concentration_derivative(k, c, dim).item() - slope) < 1e-11


@pytest.mark.parametrize("dim", [2, 3, 16, 17, 33, 2048])
def test_derivatives_by_gradcheck(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    kappa = (
        torch.rand(8, dtype=torch.float64, generator=generator) * 3 * dim + 0.1
    ).requires_grad_()
    cos = (torch.rand(8, dtype=torch.float64, generator=generator) * 1.9 - 0.95).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, c: log_density_ratio(k, c, dim), (kappa, cos))
    assert torch.autograd.gradgradcheck(lambda k, c: log_density_ratio(k, c, dim), (kappa, cos))


def test_gradient_uses_the_analytic_derivatives() -> None:
    kappa = torch.tensor([0.0, 5.0, 1e6], requires_grad=True)
    cos = torch.tensor([0.3, -0.9, 0.999], requires_grad=True)
    log_density_ratio(kappa, cos, 128).sum().backward()
    torch.testing.assert_close(
        kappa.grad, concentration_derivative(kappa, cos, 128).detach(), rtol=0, atol=0
    )
    torch.testing.assert_close(cos.grad, kappa.detach() / (1 + cos.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_concentration_is_the_uniform_distribution(dtype: torch.dtype) -> None:
    cos = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=dtype)
    for dim in (2, 17, 2048):
        assert (
            log_density_ratio(torch.zeros_like(cos), cos, dim).abs().max()
            < 0.1 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antipode_is_clamped(dtype: torch.dtype) -> None:
    """At and beyond cos = -1 the value is that of 1 + cos = 1e-6, and the cosine has no pull."""
    kappa = torch.tensor([10.0, 1e6], dtype=dtype)
    at = log_density_ratio(kappa, torch.full_like(kappa, -1.0), 64)
    beyond = log_density_ratio(kappa, torch.full_like(kappa, -1.0 - 1e-7), 64)
    expected = torch.tensor(
        [exact(k, ONE_PLUS_COS_MIN - 1, 64)[0] for k in kappa.tolist()], dtype=dtype
    )
    torch.testing.assert_close(at, expected, rtol=2e-6, atol=0)
    assert torch.equal(at, beyond)
    assert torch.equal(
        cosine_derivative(kappa, torch.full_like(kappa, -1.0)), torch.zeros_like(kappa)
    )
    assert torch.isfinite(concentration_derivative(kappa, torch.full_like(kappa, -1.0), 64)).all()


def test_nan_goes_through() -> None:
    nan = torch.tensor(float("nan"))
    one = torch.tensor(1.0)
    assert log_density_ratio(nan, one, 32).isnan()
    assert log_density_ratio(one, nan, 32).isnan()
    assert cosine_derivative(one, nan).isnan()


def test_tails_and_uniform_density() -> None:
    x = torch.tensor([16.0, 33.5, 1e4], dtype=torch.float64)
    with mpmath.workdps(60):
        stirling = [
            float(
                mpmath.loggamma(v)
                - ((mpmath.mpf(v) - 0.5) * mpmath.log(v) - v + mpmath.log(2 * mpmath.pi) / 2)
            )
            for v in x.tolist()
        ]
        digamma = [float(mpmath.digamma(v) - mpmath.log(v)) for v in x.tolist()]
    np.testing.assert_allclose(stirling_tail(x).numpy(), stirling, rtol=1e-14)
    np.testing.assert_allclose(digamma_tail(x).numpy(), digamma, rtol=1e-14)
    assert log_uniform(2) == pytest.approx(-np.log(2 * np.pi), rel=1e-15)
    assert log_uniform(3) == pytest.approx(-np.log(4 * np.pi), rel=1e-15)
