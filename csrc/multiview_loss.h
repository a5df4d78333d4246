// What the CPU and the CUDA backend of the multi-view loss are given, and their entry points.

#pragma once

#include <cstdint>

namespace vi_simsiam {

constexpr int64_t MAX_TARGET_VIEWS_CUDA = 16;

// The last dimension of every array has stride 1. Strides count elements: [0] from view to view, [1] from
// sample to sample.
struct MultiviewProblem {
  const void* predictions;  // (views, batch, dim + 1) with the raw concentration last, or (views, batch, dim)
                            // for the cosine
  const void* targets;      // (target_views, batch, dim)
  void* loss;               // (batch,) in the compute type
  void* gradient;           // like predictions; nullptr where no gradient is wanted
  int64_t views, target_views, batch, dim;
  int64_t prediction_strides[2], target_strides[2], gradient_strides[2];
  bool power_spherical;   // false: the negative cosine
  double scale, minimum;  // kappa = scale * softplus(raw concentration) + minimum

  // Weight of one (prediction view, target view) pair: twice the mean over all pairs of different views.
  double pair_weight() const { return 2.0 / (double(target_views) * double(views - 1)); }
};

enum class DType { float32, float64, bfloat16, float16 };

// float32 or float64 throughout, the gradient too.
void multiview_loss_cpu(const MultiviewProblem& problem, DType dtype, int threads);

// Name of the vector instructions the CPU backend uses on this machine.
const char* cpu_variant();

#if defined(VI_SIMSIAM_CUDA)
// Enqueues one kernel on the stream of the current device. Targets have the predictions' dtype or float32
// (float64 goes with float64 only); the loss is float64 for float64 and float32 otherwise; the gradient has
// the loss's or the predictions' dtype. Returns nullptr, or what went wrong.
const char* multiview_loss_cuda(const MultiviewProblem& problem, DType prediction, DType target,
                                DType gradient, void* stream);

// CUDART_VERSION of the toolkit this was built with, e.g. 13000.
int cuda_toolkit_version();
#endif

}  // namespace vi_simsiam
