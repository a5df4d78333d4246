// Multi-view loss and its gradient on the CPU, in one pass over the samples.
//
// For sample i with predictions p_v and targets z_g, over all pairs v != g with weight w = 2 / (G (V-1)):
//     c_vg    = (p_v . z_g) / (|p_v| |z_g|)
//     loss_i  = -w sum_vg F(kappa_v, c_vg)                                        cosine: F = c
//     dp_v    = -w / |p_v| sum_g dF/dc (z_g/|z_g| - c_vg p_v/|p_v|)
//     draw_v  = -w scale sigmoid(raw_v) sum_g dF/dkappa,   kappa_v = scale softplus(raw_v) + minimum
//
// The rows of a sample (16 to 64 KB at dim 2048) stay in the first two cache levels from the first dot
// product to the gradient, so memory sees each prediction and target once and each gradient once. A sample is
// computed by one thread in one fixed order: the result does not depend on the number of threads.
//
// Threads are std::threads made per call: 10 us each, but nothing survives the call, so the function is safe
// in forked processes (an OpenMP pool hangs there) and nothing spins between calls.

#include "multiview_loss.h"
#include "power_spherical.cuh"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__GNUC__) || defined(__clang__)
#define VI_VECTORS
#define VI_ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define VI_DISPATCH
#endif
#endif

namespace vi_simsiam {
namespace {

// The two loops over the columns. Everything else is per pair.
template <typename Real>
struct RowKernels {
  Real (*dot)(const Real* x, const Real* y, int64_t n);
  // out = a x + b y, where out may be x
  void (*scale_add)(Real* out, const Real* x, Real a, const Real* y, Real b, int64_t n);
};

#if defined(VI_VECTORS)

// Vectors of the GCC/Clang extension instead of trust in the vectoriser: a sum of floats is not reordered
// without fast-math, which would break NaN. Four independent partial sums hide the latency of the addition.
template <typename Real, int Bytes>
VI_ALWAYS_INLINE Real dot_rows(const Real* x, const Real* y, int64_t n) {
  typedef Real Vector __attribute__((vector_size(Bytes)));
  constexpr int lanes = Bytes / int(sizeof(Real)), sums = 4;
  Vector sum[sums] = {}, u, v;
  int64_t i = 0;
  for (; i + sums * lanes <= n; i += sums * lanes) {
    for (int k = 0; k < sums; ++k) {
      std::memcpy(&u, x + i + k * lanes, Bytes);
      std::memcpy(&v, y + i + k * lanes, Bytes);
      sum[k] += u * v;
    }
  }
  for (; i + lanes <= n; i += lanes) {
    std::memcpy(&u, x + i, Bytes);
    std::memcpy(&v, y + i, Bytes);
    sum[0] += u * v;
  }
  u = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  Real total = 0;
  for (; i < n; ++i) total += x[i] * y[i];
  for (int k = 0; k < lanes; ++k) total += u[k];
  return total;
}

template <typename Real, int Bytes>
VI_ALWAYS_INLINE void scale_add_rows(Real* out, const Real* x, Real a, const Real* y, Real b, int64_t n) {
  typedef Real Vector __attribute__((vector_size(Bytes)));
  constexpr int lanes = Bytes / int(sizeof(Real));
  Vector u, v;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    std::memcpy(&u, x + i, Bytes);
    std::memcpy(&v, y + i, Bytes);
    u = u * a + v * b;
    std::memcpy(out + i, &u, Bytes);
  }
  for (; i < n; ++i) out[i] = x[i] * a + y[i] * b;
}

template <typename Real>
Real dot_16(const Real* x, const Real* y, int64_t n) {
  return dot_rows<Real, 16>(x, y, n);
}

template <typename Real>
void scale_add_16(Real* out, const Real* x, Real a, const Real* y, Real b, int64_t n) {
  scale_add_rows<Real, 16>(out, x, a, y, b, n);
}

#if defined(VI_DISPATCH)

template <typename Real>
__attribute__((target("avx2,fma"))) Real dot_avx2(const Real* x, const Real* y, int64_t n) {
  return dot_rows<Real, 32>(x, y, n);
}

template <typename Real>
__attribute__((target("avx2,fma"))) void scale_add_avx2(Real* out, const Real* x, Real a, const Real* y,
                                                        Real b, int64_t n) {
  scale_add_rows<Real, 32>(out, x, a, y, b, n);
}

template <typename Real>
__attribute__((target("avx512f"))) Real dot_avx512(const Real* x, const Real* y, int64_t n) {
  return dot_rows<Real, 64>(x, y, n);
}

template <typename Real>
__attribute__((target("avx512f"))) void scale_add_avx512(Real* out, const Real* x, Real a, const Real* y,
                                                         Real b, int64_t n) {
  scale_add_rows<Real, 64>(out, x, a, y, b, n);
}

#endif

#else  // no vector extension: plain loops that a compiler may vectorise

template <typename Real>
Real dot_16(const Real* x, const Real* y, int64_t n) {
  constexpr int lanes = 16;
  Real sum[lanes] = {}, total = 0;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int k = 0; k < lanes; ++k) sum[k] += x[i + k] * y[i + k];
  }
  for (; i < n; ++i) total += x[i] * y[i];
  for (int k = 0; k < lanes; ++k) total += sum[k];
  return total;
}

template <typename Real>
void scale_add_16(Real* out, const Real* x, Real a, const Real* y, Real b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * a + y[i] * b;
}

#endif

enum class Variant { plain, avx2, avx512 };

Variant variant() {
#if defined(VI_DISPATCH)
  static const Variant best = __builtin_cpu_supports("avx512f") ? Variant::avx512
                              : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                  ? Variant::avx2
                                  : Variant::plain;
  return best;
#else
  return Variant::plain;
#endif
}

template <typename Real>
RowKernels<Real> row_kernels() {
#if defined(VI_DISPATCH)
  if (variant() == Variant::avx512) return {dot_avx512<Real>, scale_add_avx512<Real>};
  if (variant() == Variant::avx2) return {dot_avx2<Real>, scale_add_avx2<Real>};
#endif
  return {dot_16<Real>, scale_add_16<Real>};
}

template <typename Real>
class Samples {
 public:
  explicit Samples(const MultiviewProblem& problem)
      : problem_(problem),
        density_(problem.dim),
        rows_(row_kernels<Real>()),
        weight_(Real(problem.pair_weight())),
        scale_(Real(problem.scale)),
        minimum_(Real(problem.minimum)) {}

  // scratch: 2 * target_views numbers
  void compute(int64_t sample, Real* scratch) const {
    Real* inverse_target = scratch;
    for (int64_t g = 0; g < problem_.target_views; ++g) {
      const Real* z = target(g, sample);
      inverse_target[g] = inverse_norm(rows_.dot(z, z, problem_.dim));
    }
    Real total = 0;
    for (int64_t v = 0; v < problem_.views; ++v)
      total += view(v, sample, inverse_target, scratch + problem_.target_views);
    static_cast<Real*>(problem_.loss)[sample] = -weight_ * total;
  }

 private:
  const Real* target(int64_t g, int64_t sample) const {
    return static_cast<const Real*>(problem_.targets) + g * problem_.target_strides[0] +
           sample * problem_.target_strides[1];
  }

  // Writes the gradient of one prediction and returns the sum of F over its targets.
  Real view(int64_t v, int64_t sample, const Real* inverse_target, Real* toward_target) const {
    const int64_t dim = problem_.dim;
    const Real* p = static_cast<const Real*>(problem_.predictions) + v * problem_.prediction_strides[0] +
                    sample * problem_.prediction_strides[1];
    const Real inverse_p = inverse_norm(rows_.dot(p, p, dim));
    PowerSphericalNormalizer<Real> normalizer{};
    if (problem_.power_spherical)
      normalizer = density_.with_concentration(scale_ * softplus(p[dim]) + minimum_);

    Real value = 0, d_kappa = 0, radial = 0;
    for (int64_t g = 0; g < problem_.target_views; ++g) {
      if (g == v) continue;
      const Real cosine = rows_.dot(p, target(g, sample), dim) * inverse_p * inverse_target[g];
      PowerSphericalTerms<Real> terms{cosine, Real(0), Real(1)};
      if (problem_.power_spherical) terms = normalizer.at(cosine);
      value += terms.value;
      d_kappa += terms.d_kappa;
      radial += terms.d_cos * cosine;
      toward_target[g] = -weight_ * inverse_p * terms.d_cos * inverse_target[g];
    }
    if (problem_.gradient == nullptr) return value;

    Real* out = static_cast<Real*>(problem_.gradient) + v * problem_.gradient_strides[0] +
                sample * problem_.gradient_strides[1];
    const Real* so_far = p;
    Real factor = weight_ * inverse_p * inverse_p * radial;
    for (int64_t g = 0; g < problem_.target_views; ++g) {
      if (g == v) continue;
      rows_.scale_add(out, so_far, factor, target(g, sample), toward_target[g], dim);
      so_far = out;
      factor = 1;
    }
    if (so_far == p) std::fill(out, out + dim, Real(0));  // the only target view is this view: no pair
    if (problem_.power_spherical) out[dim] = -weight_ * scale_ * sigmoid(p[dim]) * d_kappa;
    return value;
  }

  const MultiviewProblem& problem_;
  const PowerSpherical<Real> density_;
  const RowKernels<Real> rows_;
  const Real weight_, scale_, minimum_;
};

template <typename Real>
void compute_all(const MultiviewProblem& problem, int threads) {
  const Samples<Real> samples(problem);
  // One thread needs about 0.2 ns a column (W in all) and starting a helper keeps it for 10 us, so t threads
  // take about t * 10 us + W / t, which is least at t = sqrt(W / 10 us).
  const int64_t columns = problem.batch * problem.dim * (2 * problem.views + problem.target_views);
  const int64_t worthwhile = int64_t(std::sqrt(double(columns) / 50000));
  const int64_t useful =
      std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), problem.batch, worthwhile}));
  const int64_t block = std::max<int64_t>(1, problem.batch / (8 * useful));
  std::atomic<int64_t> next{0};
  const int64_t scratch_size =
      2 * problem.target_views + 32;  // apart: no two threads write to one cache line
  std::vector<Real> scratch(size_t(useful * scratch_size));
  const auto work = [&](int64_t worker) {
    for (int64_t begin; (begin = next.fetch_add(block)) < problem.batch;) {
      const int64_t end = std::min(begin + block, problem.batch);
      for (int64_t sample = begin; sample < end; ++sample)
        samples.compute(sample, scratch.data() + worker * scratch_size);
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < useful; ++i) helpers.emplace_back(work, i);
  } catch (const std::exception&) {
    // No more threads to be had: those that started and this one share the work.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void multiview_loss_cpu(const MultiviewProblem& problem, DType dtype, int threads) {
  if (dtype == DType::float64) {
    compute_all<double>(problem, threads);
  } else {
    compute_all<float>(problem, threads);
  }
}

const char* cpu_variant() {
  switch (variant()) {
    case Variant::avx512:
      return "avx512";
    case Variant::avx2:
      return "avx2";
    default:
      break;
  }
#if defined(VI_VECTORS)
  return "128 bit";
#else
  return "plain loops";
#endif
}

}  // namespace vi_simsiam
