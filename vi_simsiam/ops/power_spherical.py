"""Power Spherical density against the uniform one, in plain PyTorch: the reference every kernel is
held to.

With c = mu.z the cosine, k the concentration (kappa), b = (D - 1)/2, a = b + k and s = 2b + k, De
Cao and Aziz (2020, arXiv 2006.04437, eq. 8) give

    log PS(z; mu, k) = log C(k) + k log(1 + c)
    log C(k) = -[s log 2 + lgamma(a) - lgamma(s) + b log pi]

Evaluated as printed this subtracts lgammas of about 1e4 and keeps three digits in fp32. Stirling's
formula applied to every lgamma, and log(1 + c) merged with the normaliser's slope before it is
multiplied by k, leave

    F = log PS - log uniform = k log1p(t) + (b - 1/2) log1p(-k/(2a)) + b log1p(k/(2b)) + S(s) - S(a)
    - S(2b) + S(b)
    t = (2bc - k(1 - c)) / (2a) = (1 + c) s/(2a) - 1        exactly 0 at the best k* = 2bc/(1 - c)
    S(x) = 1/(12x) - 1/(360x^3) + 1/(1260x^5) - ...           the tail of Stirling's series

The series needs arguments of at least 8 (fp32) or 16 (fp64). For small D all four gamma arguments
are shifted upwards by an integer n, lgamma(x) = lgamma(x + n) - sum log(x + i), and the logarithms
combine pairwise:

    F = k log1p(t) + (q - 1/2) log1p(-kb/(a'p)) + b log1p(k/p) + S(s') - S(a') - S(p) + S(q) - sum_i
    log1p(-kb/((a+i)(2b+i)))
    p = 2b + n,  q = b + n,  a' = q + k,  s' = p + k,  t = (2bc - (n + k)(1 - c)) / (2a')
    dF/dk = log1p(t) + [psi(s') - log s'] - [psi(a') - log a'] + sum_i b/((s+i)(a+i))
    dF/dc = k/(1 + c)

which is the formula above at n = 0 (D >= 17 in fp32, D >= 33 in fp64).
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

ONE_PLUS_COS_MIN = 1e-6
"""1 + cos is clamped from below here: the density is 0 at the antipode, its logarithm -inf."""

_Number = TypeVar("_Number", Tensor, float)
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_DIGAMMA = (-1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132, 691 / 32760, -1 / 12)
_TERMS = {torch.float32: 3, torch.float64: 7}
_SMALLEST_SERIES_ARGUMENT = {torch.float32: 8.0, torch.float64: 16.0}


def log_uniform(dim: int) -> float:
    """Log-density of the uniform distribution on the unit sphere in R^dim: log Gamma(dim/2) - log 2
    - (dim/2) log pi."""
    return math.lgamma(dim / 2) - math.log(2.0) - dim / 2 * math.log(math.pi)


def series_shift(dim: int, dtype: torch.dtype) -> int:
    """Upward shift of the gamma arguments that makes every series exact in `dtype`."""
    return max(0, math.ceil(_SMALLEST_SERIES_ARGUMENT[dtype] - (dim - 1) / 2))


def log_density_ratio(concentration: Tensor, cosine: Tensor, dim: int) -> Tensor:
    """Log-density of the Power Spherical distribution relative to the uniform one, elementwise, in
    nats.

    Args:
        concentration: kappa >= 0, any shape, float32 or float64.
        cosine: mu.z, same dtype, a shape that broadcasts with `concentration`. 1 + cos is clamped
            from below at `ONE_PLUS_COS_MIN`; where the clamp acts the derivative with respect to
            the cosine is 0.
        dim: D, the dimension of the space the sphere lies in, at least 2.

    Returns:
        F(kappa, cos) of the broadcast shape; differentiable twice in both arguments.
    """
    broadcast: Any = torch.broadcast_tensors
    value: Tensor = _LogDensityRatio.apply(*broadcast(concentration, cosine), dim)
    return value


def concentration_derivative(concentration: Tensor, cosine: Tensor, dim: int) -> Tensor:
    """dF/dkappa of `log_density_ratio`, with the same arguments. It is 0 where kappa is optimal for
    the cosine."""
    b = (dim - 1) / 2
    n = series_shift(dim, concentration.dtype)
    a, s = b + concentration, 2 * b + concentration
    value = _log_slope(concentration, cosine, b, n) + _digamma_tail(s + n) - _digamma_tail(a + n)
    for i in range(n):
        value = value + b / ((s + i) * (a + i))
    return value


def cosine_derivative(concentration: Tensor, cosine: Tensor) -> Tensor:
    """dF/dcos = kappa / (1 + cos) of `log_density_ratio`, 0 where the clamp on 1 + cos acts."""
    clamped = 1 + cosine < ONE_PLUS_COS_MIN
    return torch.where(clamped, 0, concentration / (1 + cosine).masked_fill(clamped, 1))


def kl_to_uniform(k: Tensor, dim: int) -> Tensor:
    """KL(PS || uniform) in nats, elementwise in the concentration k (float32 or float64).

    It is F - k dF/dk of ops.power_spherical, at any cosine, with that module's p, q, a', s' and
    shift n. Its terms of first order in k cancel; struck out by hand, they leave terms that are all
    of second order, as KL itself is near 0. With g(x) = x - log1p(x), x = kb/(a'p), x_i =
    kb/((a+i)(2b+i)) and S's divergence B from q to q + k and from p to p + k (`_tail_divergence`):

        KL = b log1p(q k^2/(p (a'p + kn))) - b g(kn/(a'p)) - (n - 1/2) g(-x) + k x/(2s') + B(q) -
        B(p)
             + sum_{i<n} [g(-x_i) + k x_i/(s+i)]
    """
    b = (dim - 1) / 2
    n = series_shift(dim, k.dtype)
    p, q = 2 * b + n, b + n
    a, s = q + k, p + k
    x = k / a * (b / p)
    value = b * torch.log1p(k / p * (k * q / (a * p + k * n))) + k / s * x / 2
    value = value + _tail_divergence(q, k) - _tail_divergence(p, k)
    value = value - b * _log1p_gap(k / a * (n / p)) - (n - 0.5) * _log1p_gap(-x)
    for i in range(n):
        x_i = k / (b + k + i) * (b / (2 * b + i))
        value = value + _log1p_gap(-x_i) + k / (2 * b + k + i) * x_i
    return value


class _LogDensityRatio(torch.autograd.Function):
    """The value with its analytic derivatives: autograd of the value would subtract terms of size
    k/(1 + c)."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, cosine: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(concentration, cosine)
        ctx.dim = dim
        return _value(concentration, cosine, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        concentration, cosine = ctx.saved_tensors
        to_concentration = grad * concentration_derivative(concentration, cosine, ctx.dim)
        return to_concentration, grad * cosine_derivative(concentration, cosine), None


def _value(k: Tensor, cosine: Tensor, dim: int) -> Tensor:
    b = (dim - 1) / 2
    n = series_shift(dim, k.dtype)
    p, q = 2 * b + n, b + n
    a, s = q + k, p + k
    at_zero = _odd_series(q, _STIRLING) - _odd_series(p, _STIRLING)
    value = (
        k * _log_slope(k, cosine, b, n)
        + (q - 0.5) * torch.log1p(-k * b / (a * p))
        + b * torch.log1p(k / p)
    )
    terms = _STIRLING[: _TERMS[k.dtype]]
    value = value + (_odd_series(s, terms) - _odd_series(a, terms) + at_zero)
    for i in range(n):
        value = value - torch.log1p(-k * b / ((b + k + i) * (2 * b + i)))
    return value


def _log_slope(k: Tensor, cosine: Tensor, b: float, n: int) -> Tensor:
    """log[(1 + c) s'/(2a')], as log1p(t) where t is small and from its factors far below the
    optimum."""
    a, s = b + n + k, 2 * b + n + k
    one_plus_cosine = (1 + cosine).clamp(min=ONE_PLUS_COS_MIN)
    clamped_cosine = torch.where(1 + cosine < ONE_PLUS_COS_MIN, ONE_PLUS_COS_MIN - 1, cosine)
    t = (2 * b * clamped_cosine - (n + k) * (1 - clamped_cosine)) / (2 * a)
    far = t < -0.5
    return torch.where(
        far, torch.log(one_plus_cosine * s / (2 * a)), torch.log1p(t.masked_fill(far, 0))
    )


def _digamma_tail(x: Tensor) -> Tensor:
    """psi(x) - log x."""
    inverse = 1 / x
    return inverse * (_odd_series(x, _DIGAMMA[: _TERMS[x.dtype]]) - 0.5)


def _log1p_gap(x: Tensor) -> Tensor:
    """x - log1p(x) for -1/2 <= x <= 1 without cancellation: log1p(x) = 2 atanh(r), r = x/(2 + x), x
    - 2r = xr."""
    r = x / (2 + x)
    square = r * r
    tail = torch.zeros_like(x)
    for j in range(15, 0, -1):  # |r| <= 1/3: exact in float64
        tail = tail * square + 1 / (2 * j + 1)
    return r * (x - 2 * square * tail)


def _tail_divergence(x: float, k: Tensor) -> Tensor:
    """S(x) - S(y) + k S'(y) at y = x + k, for Stirling's tail S(x) = sum_m c_m / x^m over odd m;
    without cancellation.

    With u = 1/x and v = 1/y the term of order m is c_m u (k v)^2 sum_{j<m} (j + 1) u^(m-1-j) v^j.
    """
    u, v = 1 / x, 1 / (x + k)
    polynomial, power = torch.ones_like(k), torch.ones_like(k)
    total = _STIRLING[0] * polynomial
    for index, coefficient in enumerate(_STIRLING[1 : _TERMS[k.dtype]]):
        for order in (2 * index + 2, 2 * index + 3):
            power = power * v
            polynomial = u * polynomial + order * power
        total = total + coefficient * polynomial
    return u * (k * v).square() * total


def _odd_series(x: _Number, coefficients: tuple[float, ...]) -> _Number:
    """sum_j coefficients[j] / x^(2j + 1), by Horner's rule."""
    inverse = 1 / x
    square = inverse * inverse
    total = coefficients[-1] * square
    for coefficient in reversed(coefficients[1:-1]):
        total = (total + coefficient) * square
    return (total + coefficients[0]) * inverse
