// Vector instructions of the CPU backend, and the types of elements.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__GNUC__) || defined(__clang__)
#define VI_VECTORS
#define VI_INLINE_LAMBDA __attribute__((always_inline))
#define VI_ALWAYS_INLINE inline VI_INLINE_LAMBDA
#if defined(__x86_64__)
#define VI_DISPATCH
#endif
#else
#define VI_INLINE_LAMBDA
#define VI_ALWAYS_INLINE inline
#endif

namespace vi_simsiam {

enum class Simd { baseline, avx2, avx512 };

// The widest that the processor has, or the one named by VI_SIMSIAM_SIMD, which lets one machine
// test every path. Throws std::invalid_argument for what does not run here.
inline Simd choose_simd() {
  Simd widest = Simd::baseline;
#if defined(VI_DISPATCH)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Simd::avx2;
  if (__builtin_cpu_supports("avx512f")) widest = Simd::avx512;
#endif
  const char* const asked = std::getenv("VI_SIMSIAM_SIMD");
  if (asked == nullptr || *asked == '\0') return widest;
  const char* const names[] = {"baseline", "avx2", "avx512"};
  std::string accepted;
  for (int i = 0; i <= int(widest); ++i) {
    if (names[i] == std::string(asked)) return Simd(i);
    accepted += std::string(i > 0 ? ", " : "") + names[i];
  }
  throw std::invalid_argument("VI_SIMSIAM_SIMD: '" + std::string(asked) +
                              "' does not run here; accepted: " + accepted);
}

// Chosen once for the process.
inline Simd simd() {
  static const Simd chosen = choose_simd();
  return chosen;
}

// Name of the vector instructions the CPU backend uses on this machine.
inline const char* cpu_variant() {
  if (simd() == Simd::avx512) return "avx512";
  if (simd() == Simd::avx2) return "avx2";
#if defined(VI_VECTORS)
  return "128 bit";
#else
  return "plain loops";
#endif
}

struct BFloat16 {
  uint16_t bits;
};

template <typename Element>
struct ComputeType {
  using type = Element;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <typename Element>
using Compute = typename ComputeType<Element>::type;

inline float to_real(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_real(float x) { return x; }
inline double to_real(double x) { return x; }

// Rounded to the nearest, ties to even; NaN stays NaN.
inline void from_real(BFloat16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_real(float& out, float x) { out = x; }
inline void from_real(double& out, double x) { out = x; }

// One element in the place of a vector: for the last columns, and for other compilers.
template <typename Real>
struct Single {
  static constexpr int COUNT = 1;
  using Vector = Real;
  template <typename Element>
  static VI_ALWAYS_INLINE void load(Vector& out, const Element* address) {
    out = to_real(*address);
  }
  template <typename Element>
  static VI_ALWAYS_INLINE void store(Element* address, const Vector& x) {
    from_real(*address, x);
  }
};

#if defined(VI_VECTORS)

// Vectors of the GCC/Clang extension instead of trust in the vectoriser: a sum of floats is not
// reordered without fast-math, which would break NaN.
template <typename Real, int Bytes>
struct Lanes {
  static constexpr int COUNT = Bytes / int(sizeof(Real));
  typedef Real Vector __attribute__((vector_size(Bytes)));
  // Types that depend on Real: GCC takes no dependent vector size for others.
  using Word = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
  using HalfWord = std::conditional_t<sizeof(Real) == 4, uint16_t, uint32_t>;
  typedef Word Bits __attribute__((vector_size(Bytes)));
  typedef HalfWord Half __attribute__((vector_size(Bytes / 2)));

  static VI_ALWAYS_INLINE void load(Vector& out, const Real* address) {
    std::memcpy(&out, address, Bytes);
  }
  static VI_ALWAYS_INLINE void store(Real* address, const Vector& x) {
    std::memcpy(address, &x, Bytes);
  }

  static VI_ALWAYS_INLINE void load(Vector& out, const BFloat16* address) {
    Half half;
    std::memcpy(&half, address, Bytes / 2);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    std::memcpy(&out, &bits, Bytes);
  }
  static VI_ALWAYS_INLINE void store(BFloat16* address, const Vector& x) {
    Bits bits;
    std::memcpy(&bits, &x, Bytes);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Half half = __builtin_convertvector(x != x ? rounded * 0 + 0x7fc0 : rounded, Half);
    std::memcpy(address, &half, Bytes / 2);
  }
};

#endif

}  // namespace vi_simsiam
