// Host side of a launch: a grid that fills the GPU once, and errors with advice.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

namespace vi_simsiam {

inline std::string version_text(int number, int major) {
  return std::to_string(number / major) + "." + std::to_string(number % major / 10);
}

// The architectures that this file was compiled for, e.g. 8.0, 9.0.
inline std::string built_architectures() {
#if defined(__CUDA_ARCH_LIST__)
  constexpr int list[] = {__CUDA_ARCH_LIST__};
  std::string text;
  for (const int architecture : list)
    text += (text.empty() ? "" : ", ") + version_text(architecture, 100);
  return text;
#else
  return "other architectures";
#endif
}

inline std::string capability_text(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return "unknown";
  return std::to_string(major) + "." + std::to_string(minor);
}

// Explains an error of the runtime; the text is valid until the thread's next
// error.
inline const char* explain(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here; the next launch starts without it
  int device = 0, driver = 0;
  const bool has_device = cudaGetDevice(&device) == cudaSuccess;
  const bool has_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
  const std::string toolkit = "CUDA " + version_text(CUDART_VERSION, 1000);
  const std::string gpu =
      "this GPU (compute capability " + (has_device ? capability_text(device)
                                         : std::string("unknown")) + ")";
  const std::string supports =
      has_driver ? "the driver supports CUDA up to " + version_text(driver, 1000)
          : "no driver was found";
  static thread_local std::string text;
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      text =
          "the extension holds no code for " + gpu + ": it was built for " + built_architectures() +
          " with " +
             toolkit + "; set TORCH_CUDA_ARCH_LIST to the GPU's and install again";
      break;
    case cudaErrorUnsupportedPtxVersion:
      text =
          "the extension holds no machine code for " + gpu + ", only for " + built_architectures() +
             ", and the driver cannot compile its PTX: built with " + toolkit + ", " + supports +
             "; set TORCH_CUDA_ARCH_LIST to the GPU's and install again, or update the driver";
      break;
    case cudaErrorInsufficientDriver:
      text = "the driver is too old for the extension: built with " + toolkit + ", " + supports +
             "; update the driver or build with an older toolkit";
      break;
    default:
      text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
  cudaGetLastError();  // left by the questions above
  return text.c_str();
}

struct Device {
  int number, multiprocessors, l2_bytes;
};

inline cudaError_t current_device(Device& device) {
  cudaError_t error = cudaGetDevice(&device.number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount,
                                   device.number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.l2_bytes, cudaDevAttrL2CacheSize, device.number);
  return error;
}

// Blocks of that many threads that share a multiprocessor; the runtime is queried once per kernel,
// device and size.
template <auto KERNEL>
cudaError_t resident_blocks(const Device& device, int threads, int& blocks) {
  constexpr int DEVICES = 64, SIZES = 33;
  static std::atomic<int> known[DEVICES][SIZES];
  const bool remembered = device.number < DEVICES && threads % 32 == 0 && threads / 32 < SIZES;
  if (remembered) blocks = known[device.number][threads / 32].load(std::memory_order_relaxed);
  if (remembered && blocks > 0) return cudaSuccess;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, KERNEL, threads, 0);
  blocks = std::max(blocks, 1);
  if (error == cudaSuccess && remembered)
    known[device.number][threads / 32].store(blocks, std::memory_order_relaxed);
  return error;
}

// Enqueues KERNEL with one block per unit of work, but at most as many as the GPU holds at a time,
// and at most `limit` on a multiprocessor.
template <auto KERNEL, typename... Arguments>
const char* launch(const Device& device, dim3 block, int64_t units, int limit, void* stream,
                   const Arguments&... arguments) {
  int resident = 0;
  const cudaError_t error = resident_blocks<KERNEL>(device, int(block.x * block.y), resident);
  if (error != cudaSuccess) return explain(error);
  const int64_t most = int64_t(device.multiprocessors) * std::min(resident, limit);
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(unsigned(std::max<int64_t>(1, std::min(units, most))));
  configuration.blockDim = block;
  configuration.stream = static_cast<cudaStream_t>(stream);
  return explain(cudaLaunchKernelEx(&configuration, KERNEL, arguments...));
}

}  // namespace vi_simsiam
