// Multi-view loss and its gradient on the CPU, in one pass over the samples.
//
// For sample i with predictions p_v and targets z_g, over all pairs v != g, w the weight of a pair
// in the loss and w' in the gradient:
//     c_vg    = (p_v . z_g) / (|p_v| |z_g|)
//     loss_i  = -w sum_vg F(kappa_v, c_vg)                                        cosine: F = c
//     dp_v    = -w' / |p_v| sum_g dF/dc (z_g/|z_g| - c_vg p_v/|p_v|)
//     dkappa_v = -w' sum_g dF/dkappa,   draw_v = scale gain link'(gain raw_v) dkappa_v
//     kappa_v = scale link(gain raw_v) + minimum
//
// The rows of a sample (16 to 64 KB at dim 2048) stay in the first two cache levels from the first
// dot product to the gradient, so memory moves each prediction, target and gradient once. A sample
// is computed by one thread in one fixed order: the result does not depend on the number of
// threads.

#include "helpers.h"
#include "multiview_loss.h"
#include "power_spherical.cuh"
#include "simd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>

namespace vi_simsiam {
namespace {

constexpr int MAX_TERMS = 2;  // rows of targets that one loop of dot products takes

// The loops over the columns of predictions of type P and targets of type Z. Everything else is per
// pair.
template <typename P, typename Z>
struct RowKernels {
  using Real = Compute<P>;
  Real (*square)(const Z* z, int64_t n);
  // dots[0] = p . p and dots[1 + k] = p . z[k] for k < terms, reading p once
  void (*dot)(Real* dots, const P* p, const Z* const* z, int terms, int64_t n);
  // out = a p + sum over k < terms of b[k] z[k]
  void (*combine)(P* out, const P* p, Real a, const Z* const* z, const Real* b, int terms,
                  int64_t n);
};

#if defined(VI_VECTORS)

// Independent partial sums hide the latency of the addition.
template <int Bytes, int Terms, typename X, typename Y>
VI_ALWAYS_INLINE void dot_terms(Compute<X>* dots, const X* x, const Y* const* y, int64_t n) {
  using Real = Compute<X>;
  using In = Lanes<Real, Bytes>;
  constexpr int sums = 4;
  typename In::Vector sum[1 + Terms][sums] = {}, u, w;
  const auto add = [&](int64_t i, int k) __attribute__((always_inline)) {
    In::load(u, x + i);
    sum[0][k] += u * u;
    for (int t = 0; t < Terms; ++t) {
      In::load(w, y[t] + i);
      sum[1 + t][k] += u * w;
    }
  };
  int64_t i = 0;
  for (; i + sums * In::COUNT <= n; i += sums * In::COUNT) {
    for (int k = 0; k < sums; ++k) add(i + k * In::COUNT, k);
  }
  for (; i + In::COUNT <= n; i += In::COUNT) add(i, 0);
  for (int t = 0; t <= Terms; ++t) {
    u = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
    Real total = 0;
    for (int64_t j = i; j < n; ++j)
      total += to_real(x[j]) * (t == 0 ? to_real(x[j]) : to_real(y[t - 1][j]));
    for (int k = 0; k < In::COUNT; ++k) total += u[k];
    dots[t] = total;
  }
}

// Terms as a constant, or 0 for any number of `terms`.
template <int Bytes, int Terms, typename P, typename Z>
VI_ALWAYS_INLINE void combine_terms(P* out, const P* p, Compute<P> a, const Z* const* z,
                                    const Compute<P>* b, int terms, int64_t n) {
  using In = Lanes<Compute<P>, Bytes>;
  const int count = Terms > 0 ? Terms : terms;
  typename In::Vector u, w;
  int64_t i = 0;
  for (; i + In::COUNT <= n; i += In::COUNT) {
    In::load(u, p + i);
    u *= a;
    for (int t = 0; t < count; ++t) {
      In::load(w, z[t] + i);
      u += w * b[t];
    }
    In::store(out + i, u);
  }
  for (; i < n; ++i) {
    Compute<P> total = to_real(p[i]) * a;
    for (int t = 0; t < count; ++t) total += to_real(z[t][i]) * b[t];
    from_real(out[i], total);
  }
}

#else  // no vector extension: plain loops that a compiler may vectorise

template <int Bytes, int Terms, typename X, typename Y>
void dot_terms(Compute<X>* dots, const X* x, const Y* const* y, int64_t n) {
  constexpr int lanes = 16;
  for (int t = 0; t <= Terms; ++t) {
    Compute<X> sum[lanes] = {}, total = 0;
    const auto product = [&](int64_t i) {
      return to_real(x[i]) * (t == 0 ? to_real(x[i]) : to_real(y[t - 1][i]));
    };
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      for (int k = 0; k < lanes; ++k) sum[k] += product(i + k);
    }
    for (; i < n; ++i) total += product(i);
    for (int k = 0; k < lanes; ++k) total += sum[k];
    dots[t] = total;
  }
}

template <int Bytes, int Terms, typename P, typename Z>
void combine_terms(P* out, const P* p, Compute<P> a, const Z* const* z, const Compute<P>* b,
                   int terms, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Compute<P> total = to_real(p[i]) * a;
    for (int t = 0; t < terms; ++t) total += to_real(z[t][i]) * b[t];
    from_real(out[i], total);
  }
}

#endif

// The functions of one instruction set; Attributes let the compiler use it in them.
#define VI_ROW_KERNELS(Name, Bytes, Attributes)                                                   \
  template <typename P, typename Z>                                                               \
  struct Rows_##Name {                                                                            \
    using Real = Compute<P>;                                                                      \
    Attributes static Real square(const Z* z, int64_t n) {                                        \
      Real out;                                                                                   \
      dot_terms<Bytes, 0, Z, Z>(&out, z, nullptr, n);                                             \
      return out;                                                                                 \
    }                                                                                             \
    Attributes static void dot(Real* dots, const P* p, const Z* const* z, int terms, int64_t n) { \
      if (terms == 1) return dot_terms<Bytes, 1>(dots, p, z, n);                                  \
      dot_terms<Bytes, 2>(dots, p, z, n);                                                         \
    }                                                                                             \
    Attributes static void combine(P* out, const P* p, Real a, const Z* const* z, const Real* b,  \
                                   int terms, int64_t n) {                                        \
      if (terms == 1) return combine_terms<Bytes, 1>(out, p, a, z, b, terms, n);                  \
      if (terms == 2) return combine_terms<Bytes, 2>(out, p, a, z, b, terms, n);                  \
      combine_terms<Bytes, 0>(out, p, a, z, b, terms, n);                                         \
    }                                                                                             \
    static RowKernels<P, Z> functions() { return {square, dot, combine}; }                        \
  };

VI_ROW_KERNELS(plain, 16, )
#if defined(VI_DISPATCH)
VI_ROW_KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))
VI_ROW_KERNELS(avx512, 64, __attribute__((target("avx512f"))))
#endif

template <typename P, typename Z>
RowKernels<P, Z> row_kernels() {
  [[maybe_unused]] const Simd chosen = simd();
#if defined(VI_DISPATCH)
  if (chosen == Simd::avx512) return Rows_avx512<P, Z>::functions();
  if (chosen == Simd::avx2) return Rows_avx2<P, Z>::functions();
#endif
  return Rows_plain<P, Z>::functions();
}

template <typename P, typename Z>
class Samples {
 public:
  using Real = Compute<P>;

  explicit Samples(const MultiviewProblem& problem)
      : problem_(problem),
        density_(problem.dim),
        rows_(row_kernels<P, Z>()),
        weight_(Real(problem.gradient_weight)),
        scale_(Real(problem.scale)),
        minimum_(Real(problem.minimum)),
        gain_(Real(problem.gain)),
        cosine_(Real(problem.cosine)) {}

  void compute(int64_t sample) const {
    Real inverse_target[MAX_VIEWS];
    for (int64_t g = 0; g < problem_.target_views; ++g)
      inverse_target[g] = inverse_norm(rows_.square(target(g, sample), problem_.dim));
    Real total = 0;
    for (int64_t v = 0; v < problem_.views; ++v) total += view(v, sample, inverse_target);
    static_cast<Real*>(problem_.loss)[sample] = Real(-problem_.weight) * total;
  }

 private:
  const Z* target(int64_t g, int64_t sample) const {
    return static_cast<const Z*>(problem_.targets[g]) + sample * problem_.target_stride;
  }

  // Writes the gradient of one prediction and returns the sum of F over its targets.
  Real view(int64_t v, int64_t sample, const Real* inverse_target) const {
    const int64_t dim = problem_.dim;
    const P* p =
        static_cast<const P*>(problem_.predictions[v]) + sample * problem_.prediction_stride;
    const int64_t in_array = v * problem_.batch + sample;
    PowerSphericalNormalizer<Real> normalizer{};
    Concentration<Real> linked{};
    if (problem_.form == Form::raw_concentration) {
      linked = concentration(problem_.link, to_real(p[dim]), scale_, minimum_, gain_);
      normalizer = density_.with_concentration(linked.kappa);
    } else if (problem_.form == Form::given_concentration) {
      const Real kappa = static_cast<const Real*>(problem_.concentration)[in_array];
      normalizer =
          density_.with_concentration(kappa < 0 ? std::numeric_limits<Real>::quiet_NaN() : kappa);
    }

    const Z* paired[MAX_VIEWS];
    Real inverse_paired[MAX_VIEWS], toward_target[MAX_VIEWS];
    int64_t pairs = 0;
    for (int64_t g = 0; g < problem_.target_views; ++g) {
      if (g == v) continue;
      paired[pairs] = target(g, sample);
      inverse_paired[pairs++] = inverse_target[g];
    }
    Real inverse_p = 0, value = 0, d_kappa = 0, radial = 0;
    for (int64_t first = 0; first < pairs; first += MAX_TERMS) {
      Real dots[1 + MAX_TERMS];
      const int terms = int(std::min<int64_t>(MAX_TERMS, pairs - first));
      rows_.dot(dots, p, paired + first, terms, dim);
      inverse_p = inverse_norm(dots[0]);
      for (int k = 0; k < terms; ++k) {
        const Real inverse_z = inverse_paired[first + k],
            cosine = dots[1 + k] * inverse_p * inverse_z;
        PowerSphericalTerms<Real> terms_of_pair{cosine, Real(0), Real(1)};
        if (problem_.form != Form::cosine)
          terms_of_pair = normalizer.at(cosine).plus(cosine_, cosine);
        value += terms_of_pair.value;
        d_kappa += terms_of_pair.d_kappa;
        radial += terms_of_pair.d_cos * cosine;
        toward_target[first + k] = -weight_ * inverse_p * terms_of_pair.d_cos * inverse_z;
      }
    }
    if (problem_.gradient == nullptr) return value;

    P* out =
        static_cast<P*>(problem_.gradient) + v * problem_.gradient_view_stride +
        sample * problem_.gradient_stride;
    if (pairs > 0)
      rows_.combine(out, p, weight_ * inverse_p * inverse_p * radial, paired, toward_target,
                    int(pairs), dim);
    // A view without a pair, and the columns that stand for nothing; the bits of 0 are 0 in every
    // type.
    std::fill(pairs == 0 ? out : out + dim, out + problem_.width, P{});
    if (problem_.form == Form::raw_concentration && pairs > 0)
      from_real(out[dim], linked.by_raw(-weight_ * d_kappa));
    if (problem_.form == Form::given_concentration)
      static_cast<Real*>(problem_.concentration_gradient)[in_array] = -weight_ * d_kappa;
    return value;
  }

  const MultiviewProblem& problem_;
  const PowerSpherical<Real> density_;
  const RowKernels<P, Z> rows_;
  const Real weight_, scale_, minimum_, gain_, cosine_;
};

template <typename P, typename Z>
const char* compute_all(const MultiviewProblem& problem, int threads) {
  const Samples<P, Z> samples(problem);
  // One thread needs about 0.15 ns a column (W in all) and waking a helper keeps it for 5 us, so t
  // threads take about t * 5 us + W / t, which is least at t = sqrt(W / 5 us).
  const int64_t written = problem.gradient == nullptr ? 0 : problem.views;
  const int64_t columns =
      problem.batch * problem.dim * (problem.views + problem.target_views + written);
  const int64_t worthwhile = int64_t(std::sqrt(double(columns) / 33000));
  const int64_t most = std::min<int64_t>({int64_t(threads), problem.batch, worthwhile});
  const int64_t useful = std::max<int64_t>(1, most);
  const int64_t block = std::max<int64_t>(1, problem.batch / (8 * useful));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(block)) < problem.batch;) {
      const int64_t end = std::min(begin + block, problem.batch);
      for (int64_t sample = begin; sample < end; ++sample) samples.compute(sample);
    }
  };
  share_out(threads, int(useful), work);
  if (problem.mean != nullptr) {
    using Real = Compute<P>;
    const Real* loss = static_cast<const Real*>(problem.loss);
    *static_cast<Real*>(problem.mean) =
        Real(std::accumulate(loss, loss + problem.batch, double(0)) / double(problem.batch));
  }
  return nullptr;
}

}  // namespace

const char* multiview_loss_cpu(const MultiviewProblem& problem, DType prediction, DType target,
                               int threads) {
  const bool same = prediction == target;
  if (same && target == DType::float64) return compute_all<double, double>(problem, threads);
  if (same && target == DType::float32) return compute_all<float, float>(problem, threads);
  if (prediction == DType::bfloat16 && target == DType::bfloat16)
    return compute_all<BFloat16, BFloat16>(problem, threads);
  if (prediction == DType::bfloat16 && target == DType::float32)
    return compute_all<BFloat16, float>(problem, threads);
  if (prediction == DType::float32 && target == DType::bfloat16)
    return compute_all<float, BFloat16>(problem, threads);
  return "dtypes must be float64 for both, or float32 or bfloat16";
}

}  // namespace vi_simsiam
