"""Device functions: the Power Spherical density against the uniform one, and elementary functions.

With c = mu.z, k the concentration (kappa), b = (D - 1)/2, a = b + k, s = 2b + k and an upward shift
n of all four gamma arguments (p = 2b + n, q = b + n, a' = q + k, s' = p + k):

    F      = k L + (q - 1/2) log1p(-kb/(a'p)) + b log1p(k/p) + S(s') - S(a') - S(p) + S(q)
             - sum_i log1p(-kb/((a+i)(2b+i)))
    dF/dk  = L + [psi(s') - log s'] - [psi(a') - log a'] + sum_i b/((s+i)(a+i)),   0 <= i < n
    dF/dc  = k/(1 + c)
    L      = log[(1 + c) s'/(2a')] = log1p(t),  t = (2bc - (n + k)(1 - c))/(2a')

S(x) and psi(x) - log x are Stirling's series. `vi_simsiam/ops/power_spherical.py` derives these
formulas and is the reference for them.

Digits. In fp32 Triton compiles `tl.exp` to ex2.approx, whose relative error grows with the
argument, `/` to div.full (2 ulp) and `tl.sqrt` to sqrt.approx; `tl.log` becomes libdevice's logf (1
ulp, on top of the rounding of 1 + x), in the interpreter numpy's. None of them appears where the
digits matter: the functions below are sums, products, correctly rounded divisions and bit patterns,
and give the same digits on every architecture and in the interpreter, up to the fusing of a product
and a sum. The budget in fp32:

    log, log1p   1 ulp. The argument is m 2^e with m in [sqrt(1/2), sqrt(2)]; log m is a series in
                 f/(2 + f), f = m - 1, cut where the next term is 2e-9 of the result; f + e log 2
                 is kept without rounding.
    exp          1 ulp, subnormal results included: a polynomial on |r| <= log(2)/2, cut at 1e-8,
                 times a power of two.
    softplus     2 ulp; sigmoid 2.5 ulp.
    quadratic    2 ulp.
    S, psi       three terms; the rest is below 3e-10 for arguments from 8 on, which n = 0 meets
                 from D = 17 on.
    F            k L carries |k L| ulps, the two normalising terms about k/2 ulps where k < D; at
                 the best k, t is 0.

In fp64 `tl.log`, `tl.exp`, `/` and `tl.sqrt` are the accurate ones (1 ulp), and seven terms with
arguments from 16 on leave 2e-17.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE_PLUS_COS_MIN = tl.constexpr(1e-6)
LEAST_ROOT = tl.constexpr(0.02)
_LOG2_E = tl.constexpr(1.4426950408889634)
# log 2 in two parts: the first has 16 significant bits, so that its product with an exponent is
# exact in fp32.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_MANTISSA_BITS = tl.constexpr(0x007FFFFF)
# Adding 1.5 * 2^23 rounds an fp32 number to an integer and leaves that integer in the low bits of
# the sum.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.constexpr_function
def series_shift(dim: int, double: bool) -> int:
    """n: steps by which the gamma arguments move up until (D - 1)/2 + n reaches 8 (fp32) or 16
    (fp64)."""
    return max(0, ((34 if double else 18) - dim) // 2)


@triton.constexpr_function
def stirling_at_zero(dim: int, n: int) -> float:
    """S(q) - S(p), the part of the normaliser's series without the concentration."""
    coefficients = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
    p, q = float(dim - 1 + n), (dim - 1) / 2 + n
    return sum(c * (q ** -(2 * j + 1) - p ** -(2 * j + 1)) for j, c in enumerate(coefficients))


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, correctly rounded. y is a tensor; x may be a number."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """sqrt(x), correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exp_nonpositive(x: tl.tensor) -> tl.tensor:
    """exp(x) for x <= 0, NaN kept."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # exp(-104) rounds to 0
        shifted = x * _LOG2_E + _ROUNDER
        n = shifted - _ROUNDER
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        tail = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)))
        mantissa = 1.0 + (r + r * r * (0.5 + r * (1.0 / 6.0 + r * tail)))
        # 2^n in two factors, since n goes below the smallest normal exponent.
        exponent = shifted.to(tl.int32, bitcast=True) - _ROUNDER_BITS
        half = exponent >> 1
        return mantissa * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def _power_of_two(n: tl.tensor) -> tl.tensor:
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log_of_sum(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """log(high + low) for normal high > 0 and |low| <= ulp(high)/2. NaN in `low` is kept, in `high`
    alone it is not."""
    if high.dtype == tl.float64:
        return tl.log(high) + low / high
    else:
        bits = high.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
        exponent = bits >> 23
        mantissa = ((bits & _MANTISSA_BITS) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True)
        low = low * _power_of_two(-exponent) / mantissa
        f = mantissa - 1.0
        s = f / (2.0 + f)
        z = s * s
        series = z * (2.0 / 3.0 + z * (2.0 / 5.0 + z * (2.0 / 7.0 + z * (2.0 / 9.0))))
        half_square = 0.5 * f * f
        # log(1 + f) = f - f^2/2 + s (f^2/2 + series), because s = f/(2 + f) makes f^2/2 (1 - s) = s
        # f.
        correction = low - (half_square - s * (half_square + series))
        n = exponent.to(tl.float32)
        leading = n * _LN2_HIGH + f
        rounding = f - (leading - n * _LN2_HIGH)
        return leading + (rounding + (n * _LN2_LOW + correction))


@triton.jit
def _rounding_of_one_plus(x: tl.tensor, high: tl.tensor) -> tl.tensor:
    """1 + x - high without error, where high is 1 + x rounded."""
    part = high - 1.0
    return (1.0 - (high - part)) + (x - part)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x > -1, NaN kept."""
    high = 1.0 + x
    return log_of_sum(high, _rounding_of_one_plus(x, high))


@triton.jit
def softplus(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """softplus(x) = log(1 + exp(x)) and its derivative sigmoid(x)."""
    e = exp_nonpositive(-tl.abs(x))
    value = tl.where(x < 0, 0.0, x) + log1p(e)
    return value, divide(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def quadratic(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """r + r^2/2 with r = max(x, LEAST_ROOT), and its derivative by r."""
    r = tl.where(x < LEAST_ROOT, LEAST_ROOT, x)
    return r * (1.0 + 0.5 * r), 1.0 + r


@triton.jit
def _stirling(inverse: tl.tensor) -> tl.tensor:
    """S(x) = lgamma(x) - [(x - 1/2) log x - x + log(2 pi)/2], from 1/x."""
    z = inverse * inverse
    if inverse.dtype == tl.float64:
        rest = -1.0 / 1680.0 + z * (1.0 / 1188.0 + z * (-691.0 / 360360.0 + z * (1.0 / 156.0)))
        return inverse * (1.0 / 12.0 + z * (-1.0 / 360.0 + z * (1.0 / 1260.0 + z * rest)))
    else:
        return inverse * (1.0 / 12.0 + z * (-1.0 / 360.0 + z * (1.0 / 1260.0)))


@triton.jit
def _digamma_minus_log(inverse: tl.tensor) -> tl.tensor:
    """psi(x) - log x, from 1/x."""
    z = inverse * inverse
    if inverse.dtype == tl.float64:
        rest = 1.0 / 240.0 + z * (-1.0 / 132.0 + z * (691.0 / 32760.0 + z * (-1.0 / 12.0)))
        series = -1.0 / 12.0 + z * (1.0 / 120.0 + z * (-1.0 / 252.0 + z * rest))
    else:
        series = -1.0 / 12.0 + z * (1.0 / 120.0 + z * (-1.0 / 252.0))
    return inverse * (inverse * series - 0.5)


@triton.jit
def log_density_ratio(
    kappa: tl.tensor, cos: tl.tensor, DIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """F(kappa, cos), dF/dkappa and dF/dcos, elementwise, in fp32 or fp64.

    kappa >= 0 and cos have the same dtype and shapes that broadcast. 1 + cos is clamped from below
    at ONE_PLUS_COS_MIN; where the clamp acts dF/dcos is 0. NaN in, NaN out.
    """
    N: tl.constexpr = series_shift(DIM, kappa.dtype == tl.float64)
    B: tl.constexpr = (DIM - 1) / 2
    P: tl.constexpr = 2 * B + N
    Q: tl.constexpr = B + N
    a = kappa + Q
    s = kappa + P
    inverse_a = divide(1.0, a)
    inverse_s = divide(1.0, s)

    clamped = 1.0 + cos < ONE_PLUS_COS_MIN
    one_plus_cos = tl.where(clamped, ONE_PLUS_COS_MIN, 1.0 + cos)
    cos = tl.where(clamped, ONE_PLUS_COS_MIN - 1.0, cos)
    t = divide((2 * B) * cos - (kappa + N) * (1.0 - cos), 2.0 * a)
    # Far below the optimum t is close to -1 and has lost the digits that the factors of 1 + t still
    # have.
    far = t < -0.5
    near_one = 1.0 + t
    slope = log_of_sum(
        tl.where(far, one_plus_cos * divide(s, 2.0 * a), near_one),
        tl.where(far, 0.0, _rounding_of_one_plus(t, near_one)),
    )

    value = (
        kappa * slope
        + (Q - 0.5) * log1p(divide(kappa * (-B / P), a))
        + B * log1p(divide(kappa, tl.full([], P, a.dtype)))
    )
    value += _stirling(inverse_s) - _stirling(inverse_a) + stirling_at_zero(DIM, N)
    by_kappa = slope + (_digamma_minus_log(inverse_s) - _digamma_minus_log(inverse_a))
    for i in tl.static_range(N):
        a_i = kappa + (B + i)
        value -= log1p(divide(kappa * (-B / (2 * B + i)), a_i))
        by_kappa += divide(B, a_i * (kappa + (2 * B + i)))

    by_cos = tl.where(clamped, 0.0, divide(kappa, one_plus_cos))
    return value, by_kappa, by_cos
