// BatchNorm of groups of rows, an addition and a ReLU on the CPU: the problem and its entry points.

#pragma once

#include "dtype.h"

#include <cstdint>

namespace vi_simsiam {

// Elements lie as groups x rows x channels; numbers of channels and statistics are of the compute
// type, float64 for float64 and float32 otherwise. Addresses of what is absent are nullptr.
struct BatchNormProblem {
  int64_t groups, rows, channels;
  bool relu;
  double momentum, eps;
  const void *x, *residual, *weight, *bias;
  void *y, *running_mean, *running_var;
  void* statistics;  // (2, groups, channels): mean, invstd; written by forward, read by backward
  // Of backward. y is read where there is a residual and a ReLU; without a ReLU the residual's
  // gradient is that of y, and by_residual nullptr.
  const void* gradient;
  void *by_x, *by_residual, *by_weight, *by_bias;
};

// float32, float64 or bfloat16. Returns nullptr, or what is wrong.
const char* batch_norm_forward_cpu(const BatchNormProblem& problem, DType dtype, int threads);
const char* batch_norm_backward_cpu(const BatchNormProblem& problem, DType dtype, int threads);

}  // namespace vi_simsiam
