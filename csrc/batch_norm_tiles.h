// The passes of BatchNorm over one tile of rows, for each set of vector instructions.

#pragma once

#include "simd.h"

#include <algorithm>
#include <cstdint>

namespace vi_simsiam {
namespace {

constexpr int64_t TILE_ELEMENTS = 65536, BLOCK_ELEMENTS = 2048, LEAST_ROWS = 8;

// Rows of a group, and the numbers of their columns.
template <typename Element>
struct Tile {
  using Real = Compute<Element>;
  int64_t rows, columns;
  const Element *x, *residual, *gradient, *passed;  // passed: the result of the ReLU
  Element *y, *by_x, *by_residual;
  const Element* first;             // the group's first row
  const Real *mean, *scale, *bias;  // h = (x - mean) scale + bias
  const Real *by_mean, *by_spread;  // dx = scale (g - by_mean - (x - mean) by_spread)
  double *sums, *products;          // over the rows, of each column; 0 before
};

// Where the gradient passes: everywhere, or where the ReLU did by x or by its result.
enum class Passes { everywhere, by_x, by_result };

// Adjacent columns of a row, in `Vectors` vectors.
template <typename Lane, int Vectors>
struct Columns {
  static constexpr int VECTORS = Vectors, COUNT = Vectors * Lane::COUNT;
  typename Lane::Vector at[Vectors] = {};

  template <typename Element>
  VI_ALWAYS_INLINE void load(const Element* from) {
    for (int k = 0; k < Vectors; ++k) Lane::load(at[k], from + k * Lane::COUNT);
  }
  template <typename Element>
  VI_ALWAYS_INLINE void store(Element* to) const {
    for (int k = 0; k < Vectors; ++k) Lane::store(to + k * Lane::COUNT, at[k]);
  }
  template <typename Real>
  VI_ALWAYS_INLINE void add_to(double* sums, Real (&&buffer)[COUNT]) const {
    store(buffer);
    for (int k = 0; k < COUNT; ++k) sums[k] += buffer[k];
  }
  // 0 where h is 0 or negative; NaN passes.
  VI_ALWAYS_INLINE void mask(const Columns& h) {
    const typename Lane::Vector zero = {};
    for (int k = 0; k < Vectors; ++k) at[k] = h.at[k] <= zero ? zero : at[k];
  }
};

template <typename Type>
struct Tag {
  using type = Type;
};

// Calls body(Tag<Columns>, column, rows' begin, end) for all columns of all blocks of rows, with as
// many columns at a time as keep their numbers in registers while the rows pass.
template <int Bytes, typename Element, typename Body>
VI_ALWAYS_INLINE void over_blocks(const Tile<Element>& tile, Body body) {
  using Last = Columns<Single<Compute<Element>>, 1>;
  const int64_t block = std::max(LEAST_ROWS, BLOCK_ELEMENTS / tile.columns);
  for (int64_t begin = 0; begin < tile.rows; begin += block) {
    const int64_t end = std::min(begin + block, tile.rows);
    int64_t c = 0;
#if defined(VI_VECTORS)
    using Wide = Lanes<Compute<Element>, Bytes>;
    using Several = Columns<Wide, Bytes == 64 ? 4 : 2>;
    using One = Columns<Wide, 1>;
    for (; c + Several::COUNT <= tile.columns; c += Several::COUNT)
      body(Tag<Several>{}, c, begin, end);
    for (; c + One::COUNT <= tile.columns; c += One::COUNT) body(Tag<One>{}, c, begin, end);
#endif
    for (; c < tile.columns; ++c) body(Tag<Last>{}, c, begin, end);
  }
}

template <int Bytes, typename Element>
VI_ALWAYS_INLINE void sum_tile(const Tile<Element>& tile) {
  over_blocks<Bytes>(tile, [&](auto tag, int64_t c, int64_t begin, int64_t end) VI_INLINE_LAMBDA {
    typename decltype(tag)::type shift, sums, squares, x;
    shift.load(tile.first + c);
    for (int64_t row = begin; row < end; ++row) {
      x.load(tile.x + row * tile.columns + c);
      for (int k = 0; k < x.VECTORS; ++k) {
        const auto difference = x.at[k] - shift.at[k];
        sums.at[k] += difference;
        squares.at[k] += difference * difference;
      }
    }
    sums.template add_to<Compute<Element>>(tile.sums + c, {});
    squares.template add_to<Compute<Element>>(tile.products + c, {});
  });
}

template <typename X>
VI_ALWAYS_INLINE void normalised(X& h, const X& x, const X& mean, const X& scale, const X& bias) {
  for (int k = 0; k < X::VECTORS; ++k) h.at[k] = (x.at[k] - mean.at[k]) * scale.at[k] + bias.at[k];
}

template <int Bytes, bool Relu, bool Residual, typename Element>
VI_ALWAYS_INLINE void normalise_tile(const Tile<Element>& tile) {
  over_blocks<Bytes>(tile, [&](auto tag, int64_t c, int64_t begin, int64_t end) VI_INLINE_LAMBDA {
    typename decltype(tag)::type mean, scale, bias, x, residual;
    mean.load(tile.mean + c);
    scale.load(tile.scale + c);
    bias.load(tile.bias + c);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * tile.columns + c;
      x.load(tile.x + element);
      normalised(x, x, mean, scale, bias);
      if (Residual) {
        residual.load(tile.residual + element);
        for (int k = 0; k < x.VECTORS; ++k) x.at[k] += residual.at[k];
      }
      if (Relu) x.mask(x);
      x.store(tile.y + element);
    }
  });
}

template <int Bytes, Passes Where, typename Element>
VI_ALWAYS_INLINE void sum_gradient_tile(const Tile<Element>& tile) {
  over_blocks<Bytes>(tile, [&](auto tag, int64_t c, int64_t begin, int64_t end) VI_INLINE_LAMBDA {
    typename decltype(tag)::type mean, scale, bias, sums, products, x, h, gradient;
    mean.load(tile.mean + c);
    if (Where == Passes::by_x) {
      scale.load(tile.scale + c);
      bias.load(tile.bias + c);
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * tile.columns + c;
      gradient.load(tile.gradient + element);
      x.load(tile.x + element);
      if (Where == Passes::by_result) {
        h.load(tile.passed + element);
        gradient.mask(h);
        gradient.store(tile.by_residual + element);
      } else if (Where == Passes::by_x) {
        normalised(h, x, mean, scale, bias);
        gradient.mask(h);
      }
      for (int k = 0; k < x.VECTORS; ++k) {
        sums.at[k] += gradient.at[k];
        products.at[k] += gradient.at[k] * (x.at[k] - mean.at[k]);
      }
    }
    sums.template add_to<Compute<Element>>(tile.sums + c, {});
    products.template add_to<Compute<Element>>(tile.products + c, {});
  });
}

template <int Bytes, Passes Where, typename Element>
VI_ALWAYS_INLINE void gradient_tile(const Tile<Element>& tile) {
  over_blocks<Bytes>(tile, [&](auto tag, int64_t c, int64_t begin, int64_t end) VI_INLINE_LAMBDA {
    typename decltype(tag)::type mean, scale, bias, by_mean, by_spread, x, h, gradient;
    mean.load(tile.mean + c);
    scale.load(tile.scale + c);
    by_mean.load(tile.by_mean + c);
    by_spread.load(tile.by_spread + c);
    if (Where == Passes::by_x) bias.load(tile.bias + c);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t element = row * tile.columns + c;
      gradient.load((Where == Passes::by_result ? tile.by_residual : tile.gradient) + element);
      x.load(tile.x + element);
      if (Where == Passes::by_x) {
        normalised(h, x, mean, scale, bias);
        gradient.mask(h);
      }
      for (int k = 0; k < x.VECTORS; ++k) {
        const auto apart = (x.at[k] - mean.at[k]) * by_spread.at[k];
        x.at[k] = scale.at[k] * (gradient.at[k] - by_mean.at[k] - apart);
      }
      x.store(tile.by_x + element);
    }
  });
}

template <typename Element>
struct TileKernels {
  using Function = void (*)(const Tile<Element>&);
  Function sum;
  Function normalise[2][2];                // without and with a ReLU, a residual
  Function sum_gradient[3], gradient[3];   // by Passes
};

// The functions of one instruction set; Attributes let the compiler use it in them.
#define VI_TILE_KERNELS(Name, Bytes, Attributes)                                                \
  template <typename E>                                                                         \
  struct Tiles_##Name {                                                                         \
    Attributes static void sum(const Tile<E>& tile) { sum_tile<Bytes>(tile); }                  \
    template <bool Relu, bool Residual>                                                         \
    Attributes static void normalise(const Tile<E>& tile) {                                     \
      normalise_tile<Bytes, Relu, Residual>(tile);                                              \
    }                                                                                           \
    template <Passes Where>                                                                     \
    Attributes static void sum_gradient(const Tile<E>& tile) {                                  \
      sum_gradient_tile<Bytes, Where>(tile);                                                    \
    }                                                                                           \
    template <Passes Where>                                                                     \
    Attributes static void gradient(const Tile<E>& tile) { gradient_tile<Bytes, Where>(tile); } \
    static TileKernels<E> functions() {                                                         \
      using P = Passes;                                                                         \
      return {sum,                                                                              \
              {{normalise<false, false>, normalise<false, true>},                               \
               {normalise<true, false>, normalise<true, true>}},                                \
              {sum_gradient<P::everywhere>, sum_gradient<P::by_x>, sum_gradient<P::by_result>}, \
              {gradient<P::everywhere>, gradient<P::by_x>, gradient<P::by_result>}};            \
    }                                                                                           \
  };

VI_TILE_KERNELS(plain, 16, )
#if defined(VI_DISPATCH)
VI_TILE_KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))
VI_TILE_KERNELS(avx512, 64, __attribute__((target("avx512f"))))
#endif

template <typename Element>
TileKernels<Element> tile_kernels() {
  [[maybe_unused]] const Simd chosen = simd();
#if defined(VI_DISPATCH)
  if (chosen == Simd::avx512) return Tiles_avx512<Element>::functions();
  if (chosen == Simd::avx2) return Tiles_avx2<Element>::functions();
#endif
  return Tiles_plain<Element>::functions();
}

}  // namespace
}  // namespace vi_simsiam
