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
    log_density_ratio,
    log_uniform,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", DIMS)
def test_values_and_slopes_keep_their_digits(dim: int, dtype: torch.dtype) -> None:
    kappa, cos, value, slope = arguments(dim, dtype)
    single = dtype == torch.float32
    error = np.abs(log_density_ratio(kappa, cos, dim).double().numpy() - value)
    allowed = (4e-6 if single else 1e-14) * np.maximum(1, np.abs(value))
    assert np.all(error <= np.maximum(allowed, summands(kappa, dim)))
    error = np.abs(concentration_derivative(kappa, cos, dim).double().numpy() - slope)
    assert np.all(error <= (np.maximum(7e-7, 2e-5 * np.abs(slope)) if single else 1e-14))


@pytest.mark.parametrize("dim", [2, 17, 33, 2048])
def test_derivatives_by_gradcheck(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    kappa = (
        torch.rand(8, dtype=torch.float64, generator=generator) * 3 * dim + 0.1
    ).requires_grad_()
    cos = (torch.rand(8, dtype=torch.float64, generator=generator) * 1.9 - 0.95).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, c: log_density_ratio(k, c, dim), (kappa, cos))
    assert torch.autograd.gradgradcheck(lambda k, c: log_density_ratio(k, c, dim), (kappa, cos))


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
