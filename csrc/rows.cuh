// Rows of a tensor in the registers of a team of threads: loads, stores and conversions.
//
// A team deals the columns of a row out in chunks of COLUMNS, so many that a chunk of the narrowest
// row has 16 bytes. WIDE: a chunk is COLUMNS columns side by side, moved by 16-byte instructions;
// addresses and strides are divisible by 16 bytes and the number of columns by COLUMNS. Otherwise a
// chunk is COLUMNS columns that lie a team apart, moved one by one: neighbouring threads then still
// touch neighbouring columns. What is read stays as packed as in memory.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vi_simsiam {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int VECTOR_BYTES = 16;

template <typename Element>
using Compute = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// CONSTANT: nothing writes there while the kernel runs.
template <bool CONSTANT, typename Word>
__device__ __forceinline__ Word read(const Word* address) {
  if constexpr (CONSTANT) {
    return __ldg(address);
  } else {
    return *address;
  }
}

// The same number, from a source that the compiler cannot see: what follows from it is computed
// again where it is used, in a few instructions, and is not held in registers that the rows need.
__device__ __forceinline__ uint32_t hidden(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <int COLUMNS, bool WIDE>
struct Columns {
  int thread, threads, count;

  __device__ __forceinline__ int at(int chunk, int i) const {
    return WIDE ? (chunk * threads + thread) * COLUMNS + i
        : (chunk * COLUMNS + i) * threads + thread;
  }
  __device__ __forceinline__ bool exists(int chunk, int i) const { return at(chunk, i) < count; }
};

template <typename Element, int COLUMNS>
struct Chunk {
  static constexpr int WORDS = COLUMNS * int(sizeof(Element)) / 4;
  static constexpr int VECTORS = WORDS / 4;
  uint32_t word[WORDS];

  // Columns that do not exist are read as 0.
  template <bool CONSTANT = true, bool WIDE>
  __device__ __forceinline__ void load(const Element* row, const Columns<COLUMNS, WIDE>& columns,
                                       int chunk) {
    if constexpr (WIDE) {
      const bool exists = columns.exists(chunk, 0);
      const uint4* source = reinterpret_cast<const uint4*>(row + columns.at(chunk, 0));
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const uint4 part = exists ? read<CONSTANT>(source + i) : make_uint4(0, 0, 0, 0);
        word[4 * i] = part.x;
        word[4 * i + 1] = part.y;
        word[4 * i + 2] = part.z;
        word[4 * i + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const bool exists = columns.exists(chunk, i);
        const int column = columns.at(chunk, i);
        if constexpr (sizeof(Element) == 2) {
          const uint32_t bits = exists
              ? read<CONSTANT>(reinterpret_cast<const unsigned short*>(row) + column) : 0;
          word[i / 2] = i % 2 == 0 ? bits : word[i / 2] | bits << 16;
        } else if constexpr (sizeof(Element) == 4) {
          word[i] = exists ? read<CONSTANT>(reinterpret_cast<const uint32_t*>(row) + column) : 0;
        } else {
          const uint2* source = reinterpret_cast<const uint2*>(row) + column;
          const uint2 bits = exists ? read<CONSTANT>(source) : make_uint2(0, 0);
          word[2 * i] = bits.x;
          word[2 * i + 1] = bits.y;
        }
      }
    }
  }

  // Before a second use of at(): converted numbers are not kept from the first.
  __device__ __forceinline__ void stay_packed() {
    if constexpr (sizeof(Element) == 2) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) word[i] = hidden(word[i]);
    }
  }

  __device__ __forceinline__ Compute<Element> at(int i) const {
    if constexpr (std::is_same_v<Element, double>) {
      return __hiloint2double(int(word[2 * i + 1]), int(word[2 * i]));
    } else if constexpr (std::is_same_v<Element, float>) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(word[i / 2] >> i % 2 * 16)));
    }
  }
};

template <typename Element>
__device__ __forceinline__ Compute<Element> load_element(const Element* address) {
  if constexpr (sizeof(Element) == 2) {
    return float(*address);
  } else {
    return *address;
  }
}

template <typename Element, typename Real>
__device__ __forceinline__ Element rounded(Real x) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <bool WIDE, typename Element, int COLUMNS, typename Real>
__device__ __forceinline__ void store_chunk(Element* row, const Columns<COLUMNS, WIDE>& columns,
                                            int chunk, const Real (&x)[COLUMNS]) {
  if constexpr (WIDE) {
    if (!columns.exists(chunk, 0)) return;
    constexpr int IN_VECTOR = VECTOR_BYTES / int(sizeof(Element));
    uint4* out = reinterpret_cast<uint4*>(row + columns.at(chunk, 0));
#pragma unroll
    for (int i = 0; i < COLUMNS / IN_VECTOR; ++i) {
      alignas(VECTOR_BYTES) Element part[IN_VECTOR];
#pragma unroll
      for (int j = 0; j < IN_VECTOR; ++j) part[j] = rounded<Element>(x[i * IN_VECTOR + j]);
      uint4 vector;
      memcpy(&vector, part, VECTOR_BYTES);
      __stwb(out + i, vector);  // an assignment may become four stores
    }
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if (columns.exists(chunk, i)) row[columns.at(chunk, i)] = rounded<Element>(x[i]);
    }
  }
}

}  // namespace vi_simsiam
