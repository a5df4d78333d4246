"""Numerical cases of the Triton kernels' scalar functions, in Triton's interpreter or on a GPU.

Run by `test_triton_kernels.py` in a process of its own, like `triton_cases.py`, whose rule for
errors holds here, too.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_power_spherical import COLUMN, DIMS
from torch import Tensor
from triton_tools import DEVICE

from vi_simsiam.kernels.power_spherical import (
    exp_nonpositive,
    log1p,
    log_density_ratio,
    log_of_sum,
    softplus,
)
from vi_simsiam.ops import power_spherical as eager

Number = float | mpmath.mpf

# The interpreter evaluates 0/0 in lanes that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def _elementary_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, FUNCTION: tl.constexpr, SIZE: tl.constexpr
) -> None:
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
def _ratio_kernel(
    k_ptr: tl.tensor,
    c_ptr: tl.tensor,
    out_ptr: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
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


def exact_ratio(kappa: Number, cos: Number, dim: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """F, dF/dkappa and dF/dcos from the textbook's formula in 40 digits."""
    with mpmath.workdps(40):
        b, k = mpmath.mpf(dim - 1) / 2, mpmath.mpf(kappa)
        one_plus_cos = max(1 + mpmath.mpf(cos), mpmath.mpf(eager.ONE_PLUS_COS_MIN))
        clamped = one_plus_cos == eager.ONE_PLUS_COS_MIN
        value = (
            k * mpmath.log(one_plus_cos / 2) - mpmath.loggamma(b + k) + mpmath.loggamma(2 * b + k)
        )
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
    at_zero = {"log1p": 0.0, "exp": 1.0, "softplus": np.float32(np.log(2)), "sigmoid": 0.5}[
        function
    ]
    assert np.isnan(out[0])
    assert (out[1:3] == at_zero).all()
    if function != "log1p":
        assert out[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shifted", [True, False], ids=["small D", "large D"])
def test_log_density_ratio_is_as_accurate_as_the_reference(
    dtype: torch.dtype, shifted: bool
) -> None:
    ours, reference = np.zeros(3), np.zeros(3)
    for dim in DIMS:
        if (eager.series_shift(dim, dtype) > 0) is not shifted:
            continue
        kappas, cosines = (COLUMN[name][COLUMN["d"] == dim] for name in ("kappa", "cos"))
        kappa, cos = torch.tensor(kappas, dtype=dtype), torch.tensor(cosines, dtype=dtype)
        exact = np.array(
            [exact_ratio(k, c, dim) for k, c in zip(kappa.tolist(), cos.tolist(), strict=True)]
        ).T
        # k c and the normaliser, about k/2 up to k = D and logarithmic from there, are what the
        # value is the sum of.
        size = abs(exact) + np.stack(
            [np.minimum(kappas, dim) + 1, np.ones(len(kappas)), np.zeros(len(kappas)) + 1e-30]
        )
        plain = (
            eager.log_density_ratio(kappa, cos, dim),
            eager.concentration_derivative(kappa, cos, dim),
            eager.cosine_derivative(kappa, cos),
        )
        for worst, got in ((ours, _ratio(kappa, cos, dim)), (reference, torch.stack(plain))):
            np.maximum(
                worst, (abs(got.double().numpy() - exact) / size).max(1).astype(float), out=worst
            )
    assert (ours <= np.maximum(2 * reference, 1.5 * torch.finfo(dtype).eps)).all(), (
        ours,
        reference,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [2, 2048])
def test_log_density_ratio_at_the_clamp(dtype: torch.dtype, dim: int) -> None:
    kappa = torch.tensor([0.0, 3.0, 1e4, 3.0, torch.nan, torch.inf], dtype=dtype)
    cos = torch.tensor([-1.0, -1.0, -1.0, torch.nan, 0.5, 0.5], dtype=dtype)
    value, by_kappa, by_cos = _ratio(kappa, cos, dim)
    torch.testing.assert_close(value, eager.log_density_ratio(kappa, cos, dim), equal_nan=True)
    torch.testing.assert_close(
        by_kappa, eager.concentration_derivative(kappa, cos, dim), equal_nan=True
    )
    assert by_cos[:3].tolist() == [0, 0, 0]
    assert value[3:].isnan().all()
