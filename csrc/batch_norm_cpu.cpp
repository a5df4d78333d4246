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

#include "batch_norm_tiles.h"
#include "helpers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace vi_simsiam {
namespace {

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
