// Multi-view loss and its gradient on the GPU, in one launch.
//
// For every sample, over the pairs v != g of a prediction and a target of another view, with F of
// power_spherical.cuh (cosine: F = c) plus cosine times c, w the weight and w' the weight of the
// gradient:
//     c_vg   = p_v.z_g / (|p_v| |z_g|)
//     loss   = -w sum_vg F(kappa_v, c_vg)
//     dp_v   = along_v p_v + sum_g toward_vg z_g
//     toward = -w' dF/dc / (|p_v| |z_g|),   along = w' sum_g dF/dc c_vg / |p_v|^2
//     draw_v = -w' scale gain link'(gain raw_v) sum_g dF/dkappa
//     kappa_v = scale link(gain raw_v) + minimum
//
// Traffic. The kernel must read every prediction and target once and write every gradient once, 3 V
// B D numbers for as many targets as views, and moves no more than that where rows stay in
// registers: for at most two targets, two views up to 8192 columns, more views, if aligned, up to
// 4096 (float) or 8192 (16 bits). Others, and float64, are streamed and read a second time for the
// gradient, from L1 or L2 where the caches hold them.
//
// Launch shape. A team of whole warps holds the rows of a sample, in 16-byte chunks: one a thread
// for short rows, four for float, else two. 2048 columns are 128 threads in float and in bfloat16.
// Two views have all their loads under way before anything waits, then one sum over the warp for
// all eight products, one barrier, and the pairs' functions of kappa and c in one lane each; what
// needs kappa alone is done before, while the rows arrive. With more views the targets stay and the
// next two predictions are fetched while these two are worked on. Memory of 4.8 TB/s with a latency
// of 0.7 us needs 25 KB in flight on each of 132 multiprocessors: at 128 registers a thread four
// blocks of 32 KB fit there (float, 2048 columns), at 96 registers five of 16 KB (bfloat16). There
// are no more blocks than the GPU holds at a time, and they take sample after sample, so that the
// tickets below are few. All of this is reckoned from bytes, registers and machine code; no time
// was measured.
//
// The mean is summed by the block that draws the last ticket, over the losses in a fixed order. All
// sums are taken in a fixed order: the same input gives the same bits.

#include "cuda_launch.cuh"
#include "multiview_loss_resident.cuh"
#include "multiview_loss_streamed.cuh"

namespace vi_simsiam {
namespace {

bool is_aligned(const MultiviewProblem& problem, size_t prediction_size, size_t target_size,
                size_t gradient_size) {
  uintptr_t bits = uintptr_t(problem.prediction_stride) * prediction_size;
  bits |= uintptr_t(problem.target_stride) * target_size;
  for (int64_t v = 0; v < problem.views; ++v)
    bits |= reinterpret_cast<uintptr_t>(problem.predictions[v]);
  for (int64_t g = 0; g < problem.target_views; ++g)
    bits |= reinterpret_cast<uintptr_t>(problem.targets[g]);
  if (problem.gradient != nullptr)
    bits |= reinterpret_cast<uintptr_t>(problem.gradient) |
        uintptr_t(problem.gradient_stride) * gradient_size |
            uintptr_t(problem.gradient_view_stride) * gradient_size;
  return bits % VECTOR_BYTES == 0 && problem.dim % int64_t(VECTOR_BYTES / prediction_size) == 0;
}

template <typename Prediction, typename Target, bool WIDE>
const char* launch_kernel(const MultiviewProblem& problem,
                          const Settings<Compute<Prediction>>& settings, const Device& device,
                          void* stream) {
  // Blocks of at least 128 threads, whose first warp evaluates the pairs of all its samples, once
  // there are more samples than the GPU needs to be busy; below that the shortest way for each of
  // them.
  const bool many_samples = problem.batch >= 16 * int64_t(device.multiprocessors);
  const auto resident = [&](auto mode) {
    constexpr Mode MODE = decltype(mode)::value;
    const int warps = int(Resident<MODE, Prediction, Target>::warps(problem.dim));
    const int teams = many_samples ? std::max(1, SMALL_THREADS / WARP / warps) : 1;
    return launch<resident_kernel<MODE, Prediction, Target, WIDE>>(device,
        dim3(unsigned(warps * WARP), unsigned(teams)), (problem.batch + teams - 1) / teams,
        INT32_MAX, stream, problem, settings);
  };
  const auto fits = [&](auto mode) {
    return problem.target_views <= RESIDENT_TARGETS &&
           problem.dim <= Resident<decltype(mode)::value, Prediction, Target>::MAX_DIM;
  };
  constexpr std::integral_constant<Mode, Mode::small> small{};
  constexpr std::integral_constant<Mode, Mode::two_views> two_views{};
  constexpr std::integral_constant<Mode, Mode::many_views> many_views{};
  // Rarer cases are streamed, so that the extension is quickly built.
  constexpr bool SAME = std::is_same_v<Prediction, Target>,
      DOUBLES = std::is_same_v<Prediction, double>;
  if (problem.views <= TILE) {
    if constexpr (WIDE && SAME && !DOUBLES) {
      if (fits(small)) return resident(small);
    }
    if constexpr ((WIDE || SAME) && !DOUBLES) {
      if (fits(two_views)) return resident(two_views);
    }
  } else if constexpr (WIDE && !DOUBLES) {
    if (fits(many_views)) return resident(many_views);
  }
  // No more blocks than let the rows they work on stay in half of L2 between the two times they are
  // read.
  const int64_t vectors =
      (problem.dim * int64_t(sizeof(Prediction)) + VECTOR_BYTES - 1) / VECTOR_BYTES;
  const int threads = int(std::min<int64_t>(STREAMED_THREADS, (vectors + WARP - 1) / WARP * WARP));
  const int64_t bytes =
      problem.dim * int64_t(TILE * sizeof(Prediction) +
                            problem.target_views * sizeof(Target)) * device.multiprocessors;
  const int limit = int(std::clamp<int64_t>(device.l2_bytes / 2 / bytes, 1, 32));
  return launch<streamed_kernel<Prediction, Target, WIDE>>(device, dim3(threads), problem.batch,
                                                           limit, stream, problem, settings);
}

template <typename Prediction, typename Target>
const char* launch_loss(const MultiviewProblem& problem, bool gradient_is_real, uint32_t* ticket,
                        void* stream) {
  using Real = Compute<Prediction>;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return explain(error);
  const Settings<Real> settings{PowerSpherical<Real>(problem.dim), Real(problem.scale),
                                Real(problem.minimum),             Real(problem.gain),
                                Real(problem.cosine),              Real(problem.weight),
                                Real(problem.gradient_weight),     ticket,
                                gradient_is_real};
  const size_t gradient_size = gradient_is_real ? sizeof(Real) : sizeof(Prediction);
  return is_aligned(problem, sizeof(Prediction), sizeof(Target), gradient_size)
             ? launch_kernel<Prediction, Target, true>(problem, settings, device, stream)
             : launch_kernel<Prediction, Target, false>(problem, settings, device, stream);
}

template <typename Prediction>
const char* launch_half(const MultiviewProblem& problem, DType prediction, DType target,
                        DType gradient, uint32_t* ticket, void* stream) {
  const bool is_real = gradient == DType::float32;
  if (!is_real && gradient != prediction)
    return "the gradient must be float32 or have the predictions' dtype";
  if (target == prediction)
    return launch_loss<Prediction, Prediction>(problem, is_real, ticket, stream);
  if (target == DType::float32)
    return launch_loss<Prediction, float>(problem, is_real, ticket, stream);
  return "the targets must be float32 or have the predictions' dtype";
}

}  // namespace

const char* multiview_loss_cuda(const MultiviewProblem& problem, DType prediction, DType target,
                                DType gradient, uint32_t* ticket, void* stream) {
  if (problem.views < 1 || problem.views > MAX_VIEWS) return "between 1 and 16 views are accepted";
  if (problem.target_views < 1 || problem.target_views > problem.views)
    return "between 1 target view and as many as there are views are accepted";
  if (problem.dim > INT32_MAX / 4) return "more than 2^29 dimensions";
  if (problem.mean != nullptr && ticket == nullptr) return "the mean needs a ticket";
  if (problem.mean != nullptr && problem.batch <= 0)
    return "the mean over an empty batch is undefined";
  if (problem.batch <= 0) return nullptr;
  if (prediction == DType::bfloat16)
    return launch_half<__nv_bfloat16>(problem, prediction, target, gradient, ticket, stream);
  if (prediction == DType::float16)
    return launch_half<__half>(problem, prediction, target, gradient, ticket, stream);
  if (target != prediction || gradient != prediction)
    return "targets and gradient must have the predictions' dtype";
  if (prediction == DType::float64)
    return launch_loss<double, double>(problem, true, ticket, stream);
  return launch_loss<float, float>(problem, true, ticket, stream);
}

}  // namespace vi_simsiam
