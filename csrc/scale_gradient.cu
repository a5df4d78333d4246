// Scales a precomputed gradient by the upstream gradient, read on the device without a host sync:
// out = factor * gradient.
//
// In place with one factor of exactly 1, the usual case, every block reads that number and leaves;
// the grid is bounded, so that this costs the same for any batch. Otherwise a warp takes a row at a
// time and moves it by 16-byte instructions: one read and one write of the gradient, rounded once.
// With a factor per sample the rows whose factor is 1 are left alone.
//
// Launch shape: two blocks of 512 threads on a multiprocessor, four vectors per thread in flight:
// 64 KB, twice what 4.8 TB/s times 0.7 us need on each of 132. This is reckoned, no time was
// measured.

#include "cuda_launch.cuh"
#include "multiview_loss.h"
#include "rows.cuh"

namespace vi_simsiam {
namespace {

constexpr int THREADS = 512, BLOCKS = 2;

template <typename In, typename Out, bool WIDE>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_gradient_kernel(const __grid_constant__ ScaledGradient problem) {
  using Real = Compute<In>;
  constexpr int COLUMNS = VECTOR_BYTES / int(sizeof(Out)), IN_FLIGHT = WIDE ? 4 : 2;  // chunks
  const bool in_place = problem.out == problem.gradient;
  const Real* factors = static_cast<const Real*>(problem.factor);
  if (in_place && problem.factor_stride == 0 && __ldg(factors) == Real(1)) return;

  const int lane = threadIdx.x % WARP;
  const int64_t rows = problem.views * problem.batch, warps = int64_t(gridDim.x) * (THREADS / WARP);
  const int64_t first_row = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  for (int64_t row = first_row; row < rows; row += warps) {
    const int64_t view = row / problem.batch, sample = row - view * problem.batch;
    const Real factor = __ldg(factors + sample * problem.factor_stride);
    if (in_place && factor == Real(1)) continue;
    const In* in = static_cast<const In*>(problem.gradient) + view * problem.gradient_view_stride +
                   sample * problem.gradient_stride;
    Out* out =
        static_cast<Out*>(problem.out) + view * problem.out_view_stride +
        sample * problem.out_stride;

    // Whole chunks first; with WIDE the last columns may not fill one.
    const int width = int(problem.width), whole = WIDE ? width - width % COLUMNS : width;
    const Columns<COLUMNS, WIDE> columns{lane, WARP, whole};
    for (int first = 0; columns.exists(first, 0); first += IN_FLIGHT) {
      Chunk<In, COLUMNS> chunk[IN_FLIGHT];
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) chunk[k].template load<false>(in, columns, first + k);
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) {
        Real x[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) x[i] = factor * chunk[k].at(i);
        store_chunk(out, columns, first + k, x);
      }
    }
    if (const int column = whole + lane; column < width)
      out[column] = rounded<Out>(factor * load_element(in + column));
    if (lane == 0 && problem.concentration_gradient != nullptr)
      static_cast<Real*>(problem.concentration_gradient)[row] *= factor;
  }
}

template <typename In, typename Out>
const char* launch_scaling(const ScaledGradient& problem, void* stream) {
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return explain(error);
  const auto aligned = [](const void* address, int64_t stride, int64_t view_stride, size_t size) {
    return (reinterpret_cast<uintptr_t>(address) | uintptr_t(stride) * size |
            uintptr_t(view_stride) * size) %
               VECTOR_BYTES ==
           0;
  };
  const int64_t blocks = (problem.views * problem.batch + THREADS / WARP - 1) / (THREADS / WARP);
  const bool wide =
      aligned(problem.gradient, problem.gradient_stride, problem.gradient_view_stride,
              sizeof(In)) &&
      aligned(problem.out, problem.out_stride, problem.out_view_stride, sizeof(Out));
  const auto run = [&](auto is_wide) {
    return launch<scale_gradient_kernel<In, Out, decltype(is_wide)::value>>(
        device, dim3(THREADS), blocks, BLOCKS, stream, problem);
  };
  return wide ? run(std::true_type()) : run(std::false_type());
}

}  // namespace

const char* scale_gradient_cuda(const ScaledGradient& problem, DType gradient, DType out,
                                void* stream) {
  if (problem.views <= 0 || problem.batch <= 0) return nullptr;
  if (problem.width > INT32_MAX / 4) return "a gradient with more than 2^29 columns";
  if (gradient == DType::float32 && out == DType::float16)
    return launch_scaling<float, __half>(problem, stream);
  if (out != gradient)
    return "out must have the gradient's dtype, or float16 with a float32 gradient";
  if (gradient == DType::float32) return launch_scaling<float, float>(problem, stream);
  if (gradient == DType::float64) return launch_scaling<double, double>(problem, stream);
  if (gradient == DType::bfloat16)
    return launch_scaling<__nv_bfloat16, __nv_bfloat16>(problem, stream);
  return "the gradient must be float32, float64 or bfloat16";
}

}  // namespace vi_simsiam
