// The problem that the CPU and the CUDA backend of the multi-view loss solve; their entry points.

#pragma once

#include "dtype.h"
#include "power_spherical.cuh"

#include <cstdint>

namespace vi_simsiam {

constexpr int MAX_VIEWS = 16;

enum class Form {
  cosine,               // minus the cosine
  raw_concentration,    // Power Spherical, kappa = scale * link(gain * raw) + minimum, raw in p
  given_concentration,  // Power Spherical, kappa in an array of its own
};

// The rows of a view lie `stride` elements apart, their elements beside one another. Addresses of
// outputs that are not wanted are nullptr.
struct MultiviewProblem {
  Form form;
  Link link;
  int64_t views, target_views, batch, dim;
  int64_t width;                       // columns of a row of the gradient; unused ones get 0
  const void* predictions[MAX_VIEWS];  // (batch, dim), or dim + 1 with the raw concentration
  const void* targets[MAX_VIEWS];      // (batch, dim)
  const void* concentration;           // (views, batch), contiguous; given_concentration only
  void* loss;                          // (batch,), like all but rows in the compute type
  void* mean;                          // the mean of loss
  void* gradient;                      // (views, batch, width)
  void* concentration_gradient;        // (views, batch); given_concentration only
  int64_t prediction_stride, target_stride;
  int64_t gradient_view_stride, gradient_stride;
  double scale, minimum, gain;
  double cosine;           // weight of the cosine, which is added to F; not with Form::cosine
  double weight;           // the loss is -weight * the sum of F + cosine * c over the pairs
  double gradient_weight;  // weight, or weight / batch for the gradient of the mean
};

// float64 throughout, or float32 and bfloat16 in any combination; the gradient has the predictions'
// dtype. Returns nullptr, or what is wrong.
const char* multiview_loss_cpu(const MultiviewProblem& problem, DType prediction, DType target,
                               int threads);

#if defined(VI_SIMSIAM_CUDA)
// Enqueues one kernel on the stream of the current device. Targets have the predictions' dtype or
// float32 (float64 goes with float64 only); the compute type is float64 for float64 and float32
// otherwise; the gradient has the compute type or the predictions' dtype. ticket, needed with mean:
// a number that is 0 before the launch and after it. Returns nullptr, or what went wrong.
const char* multiview_loss_cuda(const MultiviewProblem& problem, DType prediction, DType target,
                                DType gradient, uint32_t* ticket, void* stream);

// A gradient of shape (views, batch, width) to be multiplied, sample by sample, by a factor on the
// device.
struct ScaledGradient {
  int64_t views, batch, width;
  const void* gradient;
  int64_t gradient_view_stride, gradient_stride;
  void* out;  // the gradient itself where it is scaled in place
  int64_t out_view_stride, out_stride;
  void* concentration_gradient;  // (views, batch), compute type, scaled in place; or nullptr
  const void* factor;            // compute type; of sample b: factor[b * factor_stride]
  int64_t factor_stride;
};

// Enqueues one kernel; in place it leaves at once where the factor is 1. out has the gradient's
// dtype (float32, float64, bfloat16), or float16 with a float32 gradient. Returns nullptr, or what
// went wrong.
const char* scale_gradient_cuda(const ScaledGradient& problem, DType gradient, DType out,
                                void* stream);

// The reason why the kernels cannot run on the current device: no code, or an old driver. nullptr
// where they can.
const char* cuda_problem();

// CUDART_VERSION of the toolkit this was built with, e.g. 13000.
int cuda_toolkit_version();
#endif

}  // namespace vi_simsiam
