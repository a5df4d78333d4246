// Multi-view loss and its gradient on the GPU, in one launch (the formulas are in multiview_loss_cpu.cpp).
//
// One block per sample. The target norms come first; then, prediction by prediction, one pass forms the norm
// and the cosines, a few threads do the scalar math, and a second pass writes the gradient. The second pass
// reads rows that the first has just brought into L1 or L2 (16 to 64 KB a sample at dim 2048 in float), so
// DRAM sees each prediction and target once and each gradient once. Rows with dim + 1 columns are not aligned
// for vector loads: neighbouring threads read neighbouring columns.
//
// All sums are taken in a fixed order: the same input gives the same bits.

#include "multiview_loss.h"
#include "power_spherical.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vi_simsiam {
namespace {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 256;  // 8 columns of a 2048-wide row per thread
constexpr int TARGETS_PER_PASS = 2;

template <typename Real, typename Element>
__device__ __forceinline__ Real load(const Element* address) {
  if constexpr (sizeof(Element) == 2) {
    return Real(float(*address));
  } else {
    return Real(*address);
  }
}

// Sums each of N values over the block; every thread gets the totals, after two barriers. partial: shared, N
// * (MAX_THREADS / WARP) numbers.
template <int N, typename Real>
__device__ void block_sum(Real (&values)[N], Real* partial) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
      values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
    if (threadIdx.x % WARP == 0) partial[k * warps + warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    values[k] = 0;
    for (int w = 0; w < warps; ++w) values[k] += partial[k * warps + w];
  }
  __syncthreads();  // partial is free again
}

// What every thread needs in the compute type; made on the host.
template <typename Real>
struct Scalars {
  Real pair_weight, scale, minimum;
  bool gradient_is_real;  // false: the gradient has the predictions' dtype
};

// The bound on blocks per multiprocessor allows 64 registers in float (128 in double): without it ptxas aims
// at more blocks and spills.
template <typename Prediction, typename Target, typename Real>
__global__ void __launch_bounds__(MAX_THREADS, sizeof(Real) == 4 ? 4 : 2)
    multiview_loss_kernel(MultiviewProblem problem, PowerSpherical<Real> density, Scalars<Real> scalars) {
  __shared__ Real partial[(1 + TARGETS_PER_PASS) * (MAX_THREADS / WARP)];
  __shared__ Real inverse_target[MAX_TARGET_VIEWS_CUDA];  // 1 / |z_g|
  __shared__ Real dot[MAX_TARGET_VIEWS_CUDA];             // p_v . z_g
  __shared__ Real value[MAX_TARGET_VIEWS_CUDA];           // F
  __shared__ Real d_kappa[MAX_TARGET_VIEWS_CUDA];         // dF/dkappa
  __shared__ Real radial[MAX_TARGET_VIEWS_CUDA];          // c dF/dc
  __shared__ Real toward_target[MAX_TARGET_VIEWS_CUDA];   // factor of z_g in the gradient

  const int64_t sample = blockIdx.x;
  const int dim = int(problem.dim), thread = threadIdx.x, threads = blockDim.x;
  const int views = int(problem.views), targets = int(problem.target_views);
  const Real weight = scalars.pair_weight;
  const Target* z = static_cast<const Target*>(problem.targets) + sample * problem.target_strides[1];

  for (int g = 0; g < targets; ++g) {
    const Target* z_g = z + g * problem.target_strides[0];
    Real square[1] = {0};
#pragma unroll 4
    for (int j = thread; j < dim; j += threads) {
      const Real y = load<Real>(z_g + j);
      square[0] += y * y;
    }
    block_sum(square, partial);
    if (thread == 0) inverse_target[g] = inverse_norm(square[0]);
  }

  // No barrier is needed at the end of the loop: the shared numbers change only after those of the next
  // block_sum.
  Real total = 0;  // sum of F over the pairs, used by thread 0
  for (int v = 0; v < views; ++v) {
    const Prediction* p = static_cast<const Prediction*>(problem.predictions) +
                          v * problem.prediction_strides[0] + sample * problem.prediction_strides[1];

    Real inverse_p = 0;
    for (int first = 0; first < targets; first += TARGETS_PER_PASS) {
      const Target* rows[TARGETS_PER_PASS];
#pragma unroll
      for (int k = 0; k < TARGETS_PER_PASS; ++k) {
        rows[k] = z + (first + k < targets ? first + k : first) * problem.target_strides[0];
      }
      Real sums[1 + TARGETS_PER_PASS] = {};
#pragma unroll 4
      for (int j = thread; j < dim; j += threads) {
        const Real x = load<Real>(p + j);
        sums[0] += x * x;
#pragma unroll
        for (int k = 0; k < TARGETS_PER_PASS; ++k) sums[1 + k] += x * load<Real>(rows[k] + j);
      }
      block_sum(sums, partial);
      inverse_p = inverse_norm(sums[0]);
      if (thread == 0) {
#pragma unroll
        for (int k = 0; k < TARGETS_PER_PASS; ++k) {
          if (first + k < targets) dot[first + k] = sums[1 + k];
        }
      }
    }
    __syncthreads();

    const Real raw = problem.power_spherical ? load<Real>(p + dim) : Real(0);
    if (thread < targets) {
      const Real cosine = dot[thread] * inverse_p * inverse_target[thread];
      PowerSphericalTerms<Real> terms{cosine, Real(0), Real(1)};
      if (problem.power_spherical) {
        terms = density.with_concentration(scalars.scale * softplus(raw) + scalars.minimum).at(cosine);
      }
      value[thread] = terms.value;
      d_kappa[thread] = terms.d_kappa;
      radial[thread] = terms.d_cos * cosine;
      toward_target[thread] = -weight * inverse_p * terms.d_cos * inverse_target[thread];
    }
    __syncthreads();

    Real radial_sum = 0, d_kappa_sum = 0;
    for (int g = 0; g < targets; ++g) {
      if (g == v) continue;
      total += value[g];
      d_kappa_sum += d_kappa[g];
      radial_sum += radial[g];
    }

    if (problem.gradient != nullptr) {
      const int64_t row = v * problem.gradient_strides[0] + sample * problem.gradient_strides[1];
      const auto store = [&](int column, Real gradient) {
        if (scalars.gradient_is_real) {
          static_cast<Real*>(problem.gradient)[row + column] = gradient;
        } else {
          static_cast<Prediction*>(problem.gradient)[row + column] = Prediction(gradient);
        }
      };
      const bool paired = targets > 1 || v != 0;
      const Real along_p = weight * inverse_p * inverse_p * radial_sum;
#pragma unroll 2
      for (int j = thread; j < dim; j += threads) {
        Real gradient = paired ? along_p * load<Real>(p + j) : Real(0);
        for (int g = 0; g < targets; ++g) {
          if (g == v) continue;
          gradient += toward_target[g] * load<Real>(z + g * problem.target_strides[0] + j);
        }
        store(j, gradient);
      }
      if (thread == 0 && problem.power_spherical)
        store(dim, -weight * scalars.scale * sigmoid(raw) * d_kappa_sum);
    }
  }
  if (thread == 0) static_cast<Real*>(problem.loss)[sample] = -weight * total;
}

template <typename Prediction, typename Target, typename Real>
const char* launch(const MultiviewProblem& problem, bool gradient_is_real, void* stream) {
  if (problem.target_views > MAX_TARGET_VIEWS_CUDA) return "more than 16 target views";
  if (problem.batch > INT32_MAX || problem.dim > INT32_MAX / 2)
    return "more than 2^31 - 1 samples or 2^30 columns";
  if (problem.batch <= 0) return nullptr;
  const int64_t columns = problem.dim > WARP ? problem.dim : WARP;
  const int threads = columns < MAX_THREADS ? int((columns + WARP - 1) / WARP) * WARP : MAX_THREADS;
  const Scalars<Real> scalars{Real(problem.pair_weight()), Real(problem.scale), Real(problem.minimum),
                              gradient_is_real};
  multiview_loss_kernel<Prediction, Target, Real>
      <<<unsigned(problem.batch), threads, 0, static_cast<cudaStream_t>(stream)>>>(
          problem, PowerSpherical<Real>(problem.dim), scalars);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Prediction>
const char* launch_half(const MultiviewProblem& problem, DType prediction, DType target, DType gradient,
                        void* stream) {
  const bool gradient_is_real = gradient == DType::float32;
  if (!gradient_is_real && gradient != prediction)
    return "the gradient must be float32 or have the predictions' dtype";
  if (target == prediction) return launch<Prediction, Prediction, float>(problem, gradient_is_real, stream);
  if (target == DType::float32) return launch<Prediction, float, float>(problem, gradient_is_real, stream);
  return "the targets must be float32 or have the predictions' dtype";
}

}  // namespace

const char* multiview_loss_cuda(const MultiviewProblem& problem, DType prediction, DType target,
                                DType gradient, void* stream) {
  if (prediction == DType::bfloat16)
    return launch_half<__nv_bfloat16>(problem, prediction, target, gradient, stream);
  if (prediction == DType::float16) return launch_half<__half>(problem, prediction, target, gradient, stream);
  if (target != prediction || gradient != prediction)
    return "targets and gradient must have the predictions' dtype";
  if (prediction == DType::float64) return launch<double, double, double>(problem, true, stream);
  return launch<float, float, float>(problem, true, stream);
}

int cuda_toolkit_version() {
  return CUDART_VERSION;
}

}  // namespace vi_simsiam
