// Diagnostics of the CUDA backend.

#include "cuda_launch.cuh"
#include "multiview_loss.h"

namespace vi_simsiam {
namespace {

__global__ void probe() {}

}  // namespace

const char* cuda_problem() {
  cudaFuncAttributes attributes;  // loads the code for the current device
  return explain(cudaFuncGetAttributes(&attributes, probe));
}

int cuda_toolkit_version() {
  return CUDART_VERSION;
}

}  // namespace vi_simsiam
