// csrc/'s kernels and launchers on the emulation, for ctypes. VI_TYPES chooses one combination of
// dtypes.

#include "multiview_loss.cu"
#include "scale_gradient.cu"

using namespace vi_simsiam;

extern "C" {

void configure(int multiprocessors, int blocks_per_multiprocessor, int l2_bytes, unsigned seed,
               int error) {
  emulation::settings = {multiprocessors, blocks_per_multiprocessor, l2_bytes, seed, error, 0};
}

const char* loss(const MultiviewProblem* problem, int prediction, int target, int gradient,
                 uint32_t* ticket) {
  return multiview_loss_cuda(*problem, DType(prediction), DType(target), DType(gradient), ticket,
                             nullptr);
}

const char* scale(const ScaledGradient* problem, int gradient, int out) {
  return scale_gradient_cuda(*problem, DType(gradient), DType(out), nullptr);
}

int64_t launches() { return emulation::settings.launches; }
}
