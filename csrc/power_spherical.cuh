// Log-density of the Power Spherical distribution relative to the uniform one, for one (kappa,
// cosine) pair.
//
// With b = (D-1)/2, c = mu.z, k = kappa, n the upward shift of the gamma arguments (0 for large D),
// and
//     p = 2b + n,  q = b + n,  s' = p + k,  a' = q + k,
//     t = (2bc - (n+k)(1-c)) / (2a')        equals (1+c) s'/(2a') - 1 and lies in [-1, 1]
//     L = log1p(t)                                        log((1+c) s'/(2a')) where t < -1/2
//     S(x) = 1/(12x) - 1/(360x^3) + ...                   Stirling's correction of lgamma
//     P(x) = psi(x) - log x = -1/(2x) - 1/(12x^2) + 1/(120x^4) - ...
//
//     F     = k L + (q - 1/2) log1p(-kb/(a'p)) + b log1p(k/p) + S(s') - S(a') - S(p) + S(q)
//             - sum_{i<n} log1p(-kb / ((b+k+i)(2b+i)))
//     dF/dk = L + P(s') - P(a') + sum_{i<n} b / ((2b+k+i)(b+k+i))
//     dF/dc = k / (1+c)
//
// The slope of the normaliser is merged with log(1+c) before anything is multiplied by k, so
// nothing large cancels near the optimum kappa = 2bc/(1-c), where t = 0. The shift makes every
// argument of S and P large enough for the series: 8 with three terms in float, 16 with seven in
// double.
//
// 1 + c is clamped from below at ONE_PLUS_COS_MIN; there dF/dc = 0 and the rest is taken at the
// clamped cosine. NaN in gives NaN out: comparisons are written so that NaN fails them.
//
// The same functions are compiled for the CPU backend and for the CUDA kernel.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define VI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VI_HOST_DEVICE inline
#endif

namespace vi_simsiam {

enum class Link { softplus, quadratic };

constexpr double TINY_SQ =
    1e-24;  // a vector with a smaller squared norm counts as zero: cosine 0, gradient 0
constexpr double LEAST_ROOT = 0.02;        // least r of the quadratic link
constexpr double ONE_PLUS_COS_MIN = 1e-6;  // lower clamp of 1 + cosine, in every dtype

// x / y. On the GPU in float for a finite x and y between 2^-126 and 2^126: correctly rounded but
// for rare ties of the last step, and NaN for an infinite y. The compiler's own division has a
// branch for the rest, which keeps the divisions of one formula from overlapping.
template <typename Real>
VI_HOST_DEVICE Real divide(Real x, Real y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == 4) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
    inverse = fmaf(fmaf(-y, inverse, 1.f), inverse, inverse);
    const float quotient = x * inverse;
    return fmaf(fmaf(-y, quotient, x), inverse, quotient);
  }
#endif
  return x / y;
}

// 1/|x| from the sum of squares: 0 for a zero vector, NaN for an infinite or NaN sum.
template <typename Real>
VI_HOST_DEVICE Real inverse_norm(Real sum_of_squares) {
#if defined(__CUDA_ARCH__)
  // One rounding; the difference is NaN for an infinite sum and otherwise 0
  if constexpr (sizeof(Real) == 4) {
    return sum_of_squares < Real(TINY_SQ)
               ? Real(0)
               : __frsqrt_rn(sum_of_squares) + (sum_of_squares - sum_of_squares);
  }
#endif
  return sum_of_squares < Real(TINY_SQ) ? Real(0) : std::sqrt(sum_of_squares) / sum_of_squares;
}

template <typename Real>
VI_HOST_DEVICE Real softplus(Real x) {
  return (x > Real(0) ? x : Real(0)) + std::log1p(std::exp(-std::fabs(x)));
}

template <typename Real>
VI_HOST_DEVICE Real sigmoid(Real x) {
  const Real decay = std::exp(-std::fabs(x));
  return divide(x < Real(0) ? decay : Real(1), Real(1) + decay);
}

// The concentration of a raw number.
template <typename Real>
struct Concentration {
  Real kappa;
  Real slope;     // dkappa/draw
  bool at_bound;  // the gradient counts only where a step along it raises kappa

  // dloss/draw of dloss/dkappa.
  VI_HOST_DEVICE Real by_raw(Real by_kappa) const {
    return at_bound && by_kappa > Real(0) ? Real(0) : slope * by_kappa;
  }
};

// r + r^2/2 with r = max(x, LEAST_ROOT).
template <typename Real>
VI_HOST_DEVICE Concentration<Real> quadratic_link(Real x) {
  const bool at_bound = x < Real(LEAST_ROOT);
  const Real r = at_bound ? Real(LEAST_ROOT) : x;
  return {r * (Real(1) + Real(0.5) * r), Real(1) + r, at_bound};
}

template <typename Real>
VI_HOST_DEVICE Concentration<Real> softplus_link(Real x) {
  return {softplus(x), sigmoid(x), false};
}

// kappa = scale * link(gain * raw) + minimum.
template <typename Real>
VI_HOST_DEVICE Concentration<Real> concentration(Link link, Real raw, Real scale, Real minimum,
                                                 Real gain) {
  Concentration<Real> out =
      link == Link::softplus ? softplus_link(gain * raw) : quadratic_link(gain * raw);
  out.kappa = scale * out.kappa + minimum;
  out.slope *= scale * gain;
  return out;
}

// S(x) for x >= 8 (float), x >= 16 (double).
template <typename Real>
VI_HOST_DEVICE Real stirling_correction(Real x) {
  const Real i = divide(Real(1), x), y = i * i;
  Real sum;
  if constexpr (sizeof(Real) == 4) {
    sum = Real(1. / 1260);
  } else {
    sum = Real(-1. / 1680) +
        y * (Real(1. / 1188) + y * (Real(-691. / 360360) + y * Real(1. / 156)));
    sum = Real(1. / 1260) + y * sum;
  }
  return i * (Real(1. / 12) + y * (Real(-1. / 360) + y * sum));
}

// P(x) = psi(x) - log x for x >= 8 (float), x >= 16 (double).
template <typename Real>
VI_HOST_DEVICE Real digamma_minus_log(Real x) {
  const Real i = divide(Real(1), x), y = i * i;
  Real sum;
  if constexpr (sizeof(Real) == 4) {
    sum = Real(1. / 252);
  } else {
    sum = Real(-1. / 240) + y * (Real(1. / 132) + y * (Real(-691. / 32760) + y * Real(1. / 12)));
    sum = Real(1. / 252) + y * sum;
  }
  return -i * (Real(1. / 2) + i * (Real(1. / 12) + y * (Real(-1. / 120) + y * sum)));
}

template <typename Real>
struct PowerSphericalTerms {
  Real value;    // F
  Real d_kappa;  // dF/dkappa
  Real d_cos;    // dF/dcosine

  // The same of F + weight * cosine.
  VI_HOST_DEVICE PowerSphericalTerms plus(Real weight, Real cosine) const {
    return {value + weight * cosine, d_kappa, d_cos + weight};
  }
};

// Terms that depend on the dimension and kappa, but not on the cosine.
template <typename Real>
struct PowerSphericalNormalizer {
  Real kappa;
  Real twice_b, shift_plus_kappa;
  Real inverse_twice_a;  // 1/(2a')
  Real half_ratio;       // s'/(2a')
  Real value;            // F - k L
  Real slope;            // dF/dk - L

  VI_HOST_DEVICE PowerSphericalTerms<Real> at(Real cosine) const {
    Real one_plus = Real(1) + cosine;
    const bool clamped = one_plus < Real(ONE_PLUS_COS_MIN);
    if (clamped) {
      one_plus = Real(ONE_PLUS_COS_MIN);
      cosine = one_plus - Real(1);
    }
    const Real t = (twice_b * cosine - shift_plus_kappa * (Real(1) - cosine)) * inverse_twice_a;
    const Real log_ratio = t >= Real(-0.5) ? std::log1p(t) : std::log(one_plus * half_ratio);
    return {kappa * log_ratio + value, log_ratio + slope,
            clamped ? Real(0) : divide(kappa, one_plus)};
  }
};

// Terms of the dimension alone; made once per call on the host and passed to the kernel by
// value.
template <typename Real>
struct PowerSpherical {
  Real b, p, q, b_over_p;
  Real dimension_term;  // S(q) - S(p)
  int shift;            // n

  explicit PowerSpherical(int64_t dim) {
    const double half = (double(dim) - 1) / 2, smallest = sizeof(Real) == 4 ? 8 : 16;
    shift = half < smallest ? int(std::ceil(smallest - half)) : 0;
    b = Real(half);
    p = Real(2 * half + shift);
    q = Real(half + shift);
    b_over_p = b / p;
    dimension_term = stirling_correction(q) - stirling_correction(p);
  }

  VI_HOST_DEVICE PowerSphericalNormalizer<Real> with_concentration(Real kappa) const {
    const Real a = q + kappa, s = p + kappa, inverse_a = divide(Real(1), a);
    PowerSphericalNormalizer<Real> out;
    out.kappa = kappa;
    out.twice_b = Real(2) * b;
    out.shift_plus_kappa = Real(shift) + kappa;
    out.inverse_twice_a = Real(0.5) * inverse_a;
    out.half_ratio = s * out.inverse_twice_a;
    out.value =
        (q - Real(0.5)) * std::log1p(-(kappa * inverse_a) * b_over_p) +
        b * std::log1p(divide(kappa, p));
    out.value += (stirling_correction(s) - stirling_correction(a)) + dimension_term;
    out.slope = digamma_minus_log(s) - digamma_minus_log(a);
    for (int i = 0; i < shift; ++i) {
      const Real a_i = b + kappa + Real(i), p_i = Real(2) * b + Real(i);
      out.value -= std::log1p(-divide(kappa, a_i) * divide(b, p_i));
      out.slope += divide(b, (p_i + kappa) * a_i);
    }
    return out;
  }
};

}  // namespace vi_simsiam
