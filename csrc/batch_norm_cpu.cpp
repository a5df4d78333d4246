// BatchNorm of several groups of rows, an addition and a ReLU on the CPU.
//
// The formulas are those of kernels/batch_norm.py, and so is the traffic, in units of groups x rows
// x channels elements. Forward: x is read for the statistics, and again to write y: 3 units, 4 with
// a residual. Backward: the gradient and x are read for the sums, and again to write dx: 5 units;
// whether the ReLU passed follows from x. With a residual y shows it: it is read with the sums, by
// which the residual's gradient is written, and dx is made from that: 7 units.
//
// The work is cut into tiles of rows that fit the second cache. Forward and backward take all tiles
// twice, the second time in reverse order, since what was read last may still be in a cache. In a
// tile blocks of a few rows are read from left to right, as adjacent addresses arrive fastest. Sums
// over a block are of the compute type, and sums of blocks and tiles float64 in one fixed order: no
// result depends on the number of threads. Sums of squares are those of x minus the group's first
// row: where the mean is large nothing cancels, as long as that row is no outlier of tens of
// deviations.

#include "batch_norm.h"

#include "helpers.h"
#include "simd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace vi_simsiam {
namespace {

constexpr int64_t TILE_ELEMENTS = 16384, BLOCK_ELEMENTS = 2048, LEAST_ROWS = 8;

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

template <typename Element>
class Work {
 public:
  using Real = Compute<Element>;

  Work(const BatchNormProblem& problem, int threads)
      : problem_(problem),
        kernels_(tile_kernels<Element>()),
        channels_(problem.channels),
        rows_(std::max(LEAST_ROWS, TILE_ELEMENTS / channels_)),
        parts_((problem.rows + rows_ - 1) / rows_),
        threads_(threads),
        sums_(size_t(problem.groups * parts_ * 2 * channels_)),
        totals_(size_t(2 * channels_)),
        numbers_(size_t((3 * problem.groups + 1) * channels_)) {
    const Real* bias = static_cast<const Real*>(problem.bias);
    for (int64_t c = 0; c < channels_; ++c) numbers_[size_t(c)] = bias == nullptr ? 0 : bias[c];
  }

  void forward() {
    const double share = 1 / double(problem_.rows), unbiased_share = 1 / double(problem_.rows - 1);
    const double momentum = problem_.momentum;
    Real* const running_mean = static_cast<Real*>(problem_.running_mean);
    Real* const running_var = static_cast<Real*>(problem_.running_var);
    over_tiles(kernels_.sum, false);
    for (int64_t group = 0; group < problem_.groups; ++group) {
      const Element* first = static_cast<const Element*>(problem_.x) + group * group_size();
      add_up(group);
      for (int64_t c = 0; c < channels_; ++c) {
        const double offset = sum(c) * share;
        // Rounding may leave less than nothing of a constant channel's; NaN stays.
        const double left = product(c) - sum(c) * offset, scatter = left < 0 ? 0 : left;
        const double mean = to_real(first[c]) + offset, unbiased = scatter * unbiased_share;
        statistic(0, group)[c] = Real(mean);
        statistic(1, group)[c] = Real(1 / std::sqrt(scatter * share + problem_.eps));
        if (running_mean == nullptr) continue;
        running_mean[c] = Real((1 - momentum) * running_mean[c] + momentum * mean);
        running_var[c] = Real((1 - momentum) * running_var[c] + momentum * unbiased);
      }
      set_scale(group);
    }
    over_tiles(kernels_.normalise[problem_.relu][problem_.residual != nullptr], true);
  }

  void backward() {
    const Passes where = !problem_.relu ? Passes::everywhere
                         : problem_.by_residual == nullptr ? Passes::by_x : Passes::by_result;
    Real* const by_weight = static_cast<Real*>(problem_.by_weight);
    Real* const by_bias = static_cast<Real*>(problem_.by_bias);
    const double share = 1 / double(problem_.rows);
    std::vector<double> of_weight(static_cast<size_t>(channels_)), of_bias(of_weight);
    for (int64_t group = 0; group < problem_.groups; ++group) set_scale(group);
    over_tiles(kernels_.sum_gradient[int(where)], false);
    for (int64_t group = 0; group < problem_.groups; ++group) {
      add_up(group);
      for (int64_t c = 0; c < channels_; ++c) {
        const double invstd = statistic(1, group)[c];
        number(1, group)[c] = Real(sum(c) * share);
        number(2, group)[c] = Real(product(c) * share * invstd * invstd);
        of_weight[size_t(c)] += product(c) * invstd;
        of_bias[size_t(c)] += sum(c);
      }
    }
    for (int64_t c = 0; c < channels_; ++c) {
      if (by_weight != nullptr) by_weight[c] = Real(of_weight[size_t(c)]);
      if (by_bias != nullptr) by_bias[c] = Real(of_bias[size_t(c)]);
    }
    over_tiles(kernels_.gradient[int(where)], true);
  }

 private:
  int64_t group_size() const { return problem_.rows * channels_; }
  double sum(int64_t c) const { return totals_[size_t(c)]; }
  double product(int64_t c) const { return totals_[size_t(channels_ + c)]; }
  Real* statistic(int64_t which, int64_t group) const {
    return static_cast<Real*>(problem_.statistics) + (which * problem_.groups + group) * channels_;
  }
  // scale, by_mean or by_spread; before them lies the bias.
  Real* number(int64_t which, int64_t group) {
    return numbers_.data() + (1 + which * problem_.groups + group) * channels_;
  }

  // Forward and backward find the same scale, and so the same signs.
  void set_scale(int64_t group) {
    const Real* const weight = static_cast<const Real*>(problem_.weight);
    for (int64_t c = 0; c < channels_; ++c)
      number(0, group)[c] = statistic(1, group)[c] * (weight == nullptr ? Real(1) : weight[c]);
  }

  void add_up(int64_t group) {
    std::fill(totals_.begin(), totals_.end(), 0.0);
    const double* part = sums_.data() + group * parts_ * 2 * channels_;
    for (int64_t i = 0; i < parts_; ++i, part += 2 * channels_)
      for (int64_t c = 0; c < 2 * channels_; ++c) totals_[size_t(c)] += part[c];
  }

  void over_tiles(typename TileKernels<Element>::Function function, bool reverse) {
    const int64_t tiles = problem_.groups * parts_;
    // One thread takes about 0.5 ns an element (W in all) and a helper is worth 4 us, so t threads
    // take about t * 4 us + W / t, which is least at t = sqrt(W / 4 us).
    const double elements = double(problem_.groups * group_size());
    const int64_t worthwhile = int64_t(std::sqrt(elements / 8000));
    const int64_t useful = std::min<int64_t>({int64_t(threads_), tiles, worthwhile});
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < tiles;) function(tile(reverse ? tiles - 1 - i : i));
    };
    share_out(threads_, int(useful), work);
  }

  Tile<Element> tile(int64_t index) {
    const int64_t group = index / parts_, row = index % parts_ * rows_;
    const int64_t start = group * group_size(), offset = start + row * channels_;
    const auto from = [](const void* address, int64_t elements) {
      const Element* first = static_cast<const Element*>(address);
      return first == nullptr ? nullptr : first + elements;
    };
    const auto to = [](void* address, int64_t elements) {
      Element* first = static_cast<Element*>(address);
      return first == nullptr ? nullptr : first + elements;
    };
    double* const sums = sums_.data() + index * 2 * channels_;
    return {std::min(rows_, problem_.rows - row),
            channels_,
            from(problem_.x, offset),
            from(problem_.residual, offset),
            from(problem_.gradient, offset),
            from(problem_.y, offset),
            to(problem_.y, offset),
            to(problem_.by_x, offset),
            to(problem_.by_residual, offset),
            from(problem_.x, start),
            statistic(0, group),
            number(0, group),
            numbers_.data(),
            number(1, group),
            number(2, group),
            sums,
            sums + channels_};
  }

  const BatchNormProblem& problem_;
  const TileKernels<Element> kernels_;
  const int64_t channels_, rows_, parts_;
  const int threads_;
  std::vector<double> sums_, totals_;
  std::vector<Real> numbers_;
};

// Calls run with an element of the dtype; returns nullptr, or what is wrong.
template <typename Run>
const char* with_element(DType dtype, Run run) {
  if (dtype == DType::float32) return run(float{}), nullptr;
  if (dtype == DType::float64) return run(double{}), nullptr;
  if (dtype == DType::bfloat16) return run(BFloat16{}), nullptr;
  return "dtype must be float32, float64 or bfloat16";
}

}  // namespace

const char* batch_norm_forward_cpu(const BatchNormProblem& problem, DType dtype, int threads) {
  return with_element(dtype, [&](auto element) {
    Work<decltype(element)>(problem, threads).forward();
  });
}

const char* batch_norm_backward_cpu(const BatchNormProblem& problem, DType dtype, int threads) {
  return with_element(dtype, [&](auto element) {
    Work<decltype(element)>(problem, threads).backward();
  });
}

}  // namespace vi_simsiam
