// Enough of CUDA to run the kernels of csrc/ on the CPU, thread by thread, compiled by g++.
//
// A CUDA thread is a fiber that runs until it waits for others: at a barrier of its block or in an
// operation of its warp. Every warp and every lane of it has a rank, drawn at random, and of the
// ready fibers the first in rank goes on: some warps run as far ahead of others as the barriers let
// them, so a missing one shows as a wrong number for some seed. Blocks run in random order on two
// threads of the CPU. A barrier that not all threads reach, or lanes that meet in different
// operations, end the process with a message.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __CUDA_ARCH_LIST__ 800, 900
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

struct Settings {
  int multiprocessors = 2, blocks_per_multiprocessor = 2, l2_bytes = 1 << 20;
  unsigned seed = 0;
  int error = 0;        // what a launch returns
  int64_t launches = 0;
};
inline Settings settings;

[[noreturn]] inline void fail(const char* text) {
  std::fprintf(stderr, "cuda emulation: %s\n", text);
  std::abort();
}

struct Fiber;

// Fibers that wait for one another; the last one to come wakes them.
struct Meeting {
  int size = 0, arrived = 0, operation = 0;
  int64_t round = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  // Two sets: a fast lane may give its next number before a slow one has read the last
  uint64_t given[2][LANES] = {};
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  Block* block;
  Warp* warp;
  dim3 thread;
  int lane;
  unsigned rank;
};

struct Block {
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<Fiber*> ready;  // a heap, the first in rank on top
  std::vector<std::unique_ptr<Warp>> warps;
  Meeting meeting;
  Fiber* current = nullptr;
  int finished = 0;
};

inline thread_local Block* block = nullptr;

inline Fiber& self() { return *block->current; }

inline bool is_behind(const Fiber* x, const Fiber* y) { return x->rank > y->rank; }

inline void make_ready(Block& block, Fiber* fiber) {
  block.ready.push_back(fiber);
  std::push_heap(block.ready.begin(), block.ready.end(), is_behind);
}

inline void meet(Meeting& meeting, int operation) {
  if (meeting.arrived == 0) meeting.operation = operation;
  if (meeting.operation != operation) fail("lanes meet in different operations");
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
    for (Fiber* fiber : meeting.waiting) make_ready(*block, fiber);
    meeting.waiting.clear();
    make_ready(*block, &self());
  } else {
    meeting.waiting.push_back(&self());
  }
  swapcontext(&self().context, &block->scheduler);
}

inline void enter() {
  block->kernel();
  ++block->finished;
  swapcontext(&self().context, &block->scheduler);
}

inline void run_block(const std::function<void()>& kernel, dim3 index, dim3 grid, dim3 size,
                      unsigned seed) {
  Block here;
  block = &here;
  blockIdx = index;
  gridDim = grid;
  blockDim = size;
  here.kernel = kernel;
  const int threads = int(size.x * size.y * size.z);
  if (threads % LANES != 0) fail("a block that is not whole warps");
  here.meeting.size = threads;
  std::vector<Fiber> fibers(threads);
  std::mt19937 random(seed);
  unsigned rank_of_warp = 0;
  for (int t = 0; t < threads; ++t) {
    if (t % LANES == 0) {
      here.warps.push_back(std::make_unique<Warp>());
      here.warps.back()->meeting.size = LANES;
      rank_of_warp = random() % 1024 * 1024;
    }
    Fiber& fiber = fibers[t];
    fiber.block = &here;
    fiber.warp = here.warps.back().get();
    fiber.lane = t % LANES;
    fiber.rank = rank_of_warp + random() % 1024;
    fiber.thread = dim3(t % size.x, t / size.x % size.y, t / (size.x * size.y));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    make_ready(here, &fiber);
  }
  while (here.finished < threads) {
    if (here.ready.empty()) fail("threads wait for others that never come");
    std::pop_heap(here.ready.begin(), here.ready.end(), is_behind);
    here.current = here.ready.back();
    here.ready.pop_back();
    threadIdx = here.current->thread;
    swapcontext(&here.scheduler, &here.current->context);
  }
  block = nullptr;
}

inline void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 size) {
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  std::mt19937 random(settings.seed);
  std::shuffle(order.begin(), order.end(), random);
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    for (unsigned i; (i = next.fetch_add(1)) < grid.x;)
      run_block(kernel, dim3(order[i]), grid, size, settings.seed + 977 * order[i]);
  };
  std::thread helper(work);
  work();
  helper.join();
}

// What all lanes give is there for all lanes.
template <typename T>
T exchange(T value, int source, int operation) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = *self().warp;
  const int set = int(warp.meeting.round % 2);
  std::memcpy(&warp.given[set][self().lane], &value, sizeof(T));
  meet(warp.meeting, operation);
  T result;
  std::memcpy(&result, &warp.given[set][source], sizeof(T));
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block->meeting, 1); }
inline void __syncwarp() { emulation::meet(emulation::self().warp->meeting, 2); }
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, source, 3);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::self().lane ^ mask, 16 + mask);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline uint32_t atomicInc(uint32_t* address, uint32_t most) {
  uint32_t old = __atomic_load_n(address, __ATOMIC_SEQ_CST), next;
  do {
    next = old >= most ? 0 : old + 1;
  } while (!__atomic_compare_exchange_n(address, &old, next, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
    ;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0)
    emulation::fail("an unaligned vector load");
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
void __stwb(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0)
    emulation::fail("an unaligned vector store");
  *address = value;
}

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
template <typename To, typename From>
To emulated_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return emulated_cast<float>(x); }
inline double __hiloint2double(int high, int low) {
  return emulated_cast<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}
inline int min(int x, int y) { return x < y ? x : y; }
inline int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

struct __half {
  _Float16 value;
  operator float() const { return float(value); }
};
inline __half __ushort_as_half(unsigned short bits) { return {emulated_cast<_Float16>(bits)}; }
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }

struct __nv_bfloat16 {
  unsigned short bits;
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = emulated_cast<unsigned>(x);
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
inline const char* cudaGetErrorString(cudaError_t) { return "unspecified launch failure"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::settings.multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = emulation::settings.l2_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 7; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 5; break;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulation::settings.blocks_per_multiprocessor;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration,
                               void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (emulation::settings.error != 0) return cudaError_t(emulation::settings.error);
  ++emulation::settings.launches;
  emulation::run_grid([&] { kernel(arguments...); }, configuration->gridDim,
                      configuration->blockDim);
  return cudaSuccess;
}
