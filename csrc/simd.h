// Vector instructions of the CPU backend.

#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__GNUC__) || defined(__clang__)
#define VI_VECTORS
#define VI_ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define VI_DISPATCH
#endif
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

}  // namespace vi_simsiam
