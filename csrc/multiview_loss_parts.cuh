// Parts of the kernels of multiview_loss.cu: the products of a tile of rows, the functions
// of one pair, the gradient's rows, the mean.

#pragma once

#include "multiview_loss.h"
#include "power_spherical.cuh"
#include "rows.cuh"

namespace vi_simsiam {

constexpr int MAX_WARPS = 32;
constexpr int TILE = 2;                       // views and targets whose sums are formed at once
constexpr int SUMS = 2 * TILE + TILE * TILE;  // |p_v|^2, |z_g|^2, p_v.z_g
constexpr int RESIDENT_TARGETS = TILE;
constexpr int MEAN_LOADS = 16;  // losses that a thread of the last block has in flight

// Numbers of the kernels in the compute type, made on the host.
template <typename Real>
struct Settings {
  PowerSpherical<Real> density;
  Real scale, minimum, gain, cosine, weight, gradient_weight;
  uint32_t* ticket;
  bool gradient_is_real;  // false: the gradient has the predictions' dtype
};

// A parameter of the kernel for use in a loop: hoisted out of the loop, its members would take 40
// registers.
template <typename Parameter>
__device__ __forceinline__ const Parameter& reread(const Parameter& parameter) {
  return (&parameter)[hidden(0)];
}

// Numbers that the threads of a block exchange.
template <typename Real>
struct Shared {
  // Sums of every warp. Two sets: while a slow warp still reads one, a fast one may write the next
  // tile's.
  Real partial[2][SUMS][MAX_WARPS];
  // Sums of a sample whose rows are streamed.
  Real square_p[TILE], square_z[MAX_VIEWS], product[TILE][MAX_VIEWS];
  // The gradient of a view is along * p + sum_g toward[g] z_g.
  Real toward[WARP], along[WARP], to_concentration[WARP];
  bool is_last;
};

// x summed over the warp: lane l is left with the sum of x[l / 4].
template <typename Real>
__device__ __forceinline__ Real warp_sums(Real (&x)[SUMS], int lane) {
  static_assert(SUMS == 8, "three halvings");
#pragma unroll
  for (int half = SUMS / 2, offset = WARP / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Real kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
      x[i] = kept + __shfl_xor_sync(ALL_LANES, given, offset);
    }
  }
  x[0] += __shfl_xor_sync(ALL_LANES, x[0], 2);
  return x[0] + __shfl_xor_sync(ALL_LANES, x[0], 1);
}

// The sum over groups of COUNT lanes, in all of them.
template <int COUNT, typename Real>
__device__ __forceinline__ Real lanes_sum(Real x) {
#pragma unroll
  for (int offset = COUNT / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// The first view has none if it is the only target as well.
__device__ __forceinline__ bool has_pair(const MultiviewProblem& problem, int view) {
  return problem.target_views > 1 || view != 0;
}

template <typename Chunk, typename TargetChunk, typename Real, int COLUMNS>
__device__ __forceinline__ void add_products(Real (&sums)[SUMS], const Chunk (&p)[TILE],
                                             const TargetChunk (&z)[TILE],
                                             std::integral_constant<int, COLUMNS>) {
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    Real x[TILE], y[TILE];
#pragma unroll
    for (int k = 0; k < TILE; ++k) {
      x[k] = p[k].at(i);
      y[k] = z[k].at(i);
      sums[k] += x[k] * x[k];
      sums[TILE + k] += y[k] * y[k];
    }
#pragma unroll
    for (int v = 0; v < TILE; ++v) {
#pragma unroll
      for (int g = 0; g < TILE; ++g) sums[2 * TILE + v * TILE + g] += x[v] * y[g];
    }
  }
}

// One pair of a view and a target, evaluated by one lane. TARGETS lanes side by side share a view,
// LANES a sample, whose results go to a slot of the shared arrays.
template <int TARGETS, typename Prediction>
class Pair {
  using Real = Compute<Prediction>;

 public:
  static constexpr int LANES = TILE * TARGETS;

  __device__ __forceinline__ Pair(const MultiviewProblem& problem, const Settings<Real>& settings,
                                  int64_t sample, int lane)
      : problem_(problem), settings_(settings), sample_(sample), k_(lane / TARGETS % TILE),
          g_(lane % TARGETS) {}

  __device__ __forceinline__ int view_in_tile() const { return k_; }
  __device__ __forceinline__ int target() const { return g_; }

  // The raw concentration of the lane's view in the tile that begins with first_view, or the
  // concentration itself.
  __device__ __forceinline__ Real load(int first_view) const {
    const int v = min(first_view + k_, int(problem_.views) - 1);
    if (problem_.form == Form::raw_concentration)
      return load_element(static_cast<const Prediction*>(problem_.predictions[v]) +
                          sample_ * problem_.prediction_stride + problem_.dim);
    if (problem_.form == Form::given_concentration)
      return static_cast<const Real*>(problem_.concentration)[v * problem_.batch + sample_];
    return Real(0);
  }

  // Computes what does not depend on the cosine, while the rows are on their way.
  __device__ __forceinline__ void prepare(int first_view, Real argument) {
    v_ = first_view + k_;
    if (problem_.form == Form::cosine) return;
    Real kappa = argument < Real(0) ? Real(NAN) : argument;
    slope_ = Real(1);
    if (problem_.form == Form::raw_concentration) {
      const Concentration<Real> linked =
          concentration(problem_.link, argument, settings_.scale, settings_.minimum,
                        settings_.gain);
      kappa = linked.kappa;
      slope_ = linked.slope;
      at_bound_ = linked.at_bound;
    }
    normalizer_ = settings_.density.with_concentration(kappa);
  }

  // Leaves the factors of the gradient in the slot and returns what the sample's pairs of this tile
  // add to the loss.
  __device__ __forceinline__ Real evaluate(Real square_p, Real square_z, Real product,
                                           Shared<Real>& shared, int slot, bool writes) const {
    const Real inverse_p = inverse_norm(square_p), inverse_z = inverse_norm(square_z);
    const Real cosine = product * inverse_p * inverse_z, weight = settings_.gradient_weight;
    PowerSphericalTerms<Real> terms{cosine, Real(0), Real(1)};
    if (problem_.form != Form::cosine)
      terms = normalizer_.at(cosine).plus(settings_.cosine, cosine);
    const bool is_pair = v_ < problem_.views && g_ < problem_.target_views && v_ != g_;
    const Real radial = lanes_sum<TARGETS>(is_pair ? terms.d_cos * cosine : Real(0));
    const Real d_kappa = lanes_sum<TARGETS>(is_pair ? terms.d_kappa : Real(0));
    if (writes) {
      shared.toward[slot * LANES + k_ * TARGETS + g_] =
          is_pair ? -weight * inverse_p * terms.d_cos * inverse_z : Real(0);
      if (g_ == 0) {
        shared.along[slot * TILE + k_] = weight * inverse_p * inverse_p * radial;
        const Concentration<Real> linked{Real(0), slope_, at_bound_};
        const Real by_argument = has_pair(problem_, v_) ? linked.by_raw(-weight * d_kappa)
            : Real(0);
        shared.to_concentration[slot * TILE + k_] = by_argument;
        if (problem_.concentration_gradient != nullptr && v_ < problem_.views)
          static_cast<Real*>(problem_.concentration_gradient)[v_ * problem_.batch + sample_] =
              by_argument;
      }
    }
    return -settings_.weight * lanes_sum<LANES>(is_pair ? terms.value : Real(0));
  }

 private:
  const MultiviewProblem& problem_;
  const Settings<Real>& settings_;
  const int64_t sample_;
  const int k_, g_;
  int v_ = 0;
  Real slope_ = 0;
  bool at_bound_ = false;
  PowerSphericalNormalizer<Real> normalizer_{};
};

// The gradient of one view of one sample.
template <typename Prediction, bool WIDE>
class GradientRow {
  using Real = Compute<Prediction>;
  static constexpr int COLUMNS = VECTOR_BYTES / int(sizeof(Prediction));

 public:
  __device__ __forceinline__ GradientRow(const MultiviewProblem& problem, bool is_real, int view,
                                         int64_t sample)
      : problem_(problem),
        is_real_(is_real || std::is_same_v<Prediction, Real>),
        has_pair_(has_pair(problem, view)),
        offset_(view * problem.gradient_view_stride + sample * problem.gradient_stride) {}

  __device__ __forceinline__ void store(const Columns<COLUMNS, WIDE>& columns, int chunk,
                                        Real (&x)[COLUMNS]) const {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) x[i] = has_pair_ ? x[i] : Real(0);
    if (is_real_) {
      store_chunk(static_cast<Real*>(problem_.gradient) + offset_, columns, chunk, x);
    } else {
      store_chunk(static_cast<Prediction*>(problem_.gradient) + offset_, columns, chunk, x);
    }
  }

  // The columns after the direction: the raw concentration's, if there is one, then zeros.
  __device__ __forceinline__ void store_rest(const Columns<COLUMNS, WIDE>& columns,
                                             Real to_concentration) const {
    for (int64_t column = columns.count + columns.thread; column < problem_.width;
         column += columns.threads) {
      const bool is_raw = column == columns.count && problem_.form == Form::raw_concentration;
      const Real x = is_raw ? to_concentration : Real(0);
      if (is_real_) {
        static_cast<Real*>(problem_.gradient)[offset_ + column] = x;
      } else {
        static_cast<Prediction*>(problem_.gradient)[offset_ + column] = rounded<Prediction>(x);
      }
    }
  }

 private:
  const MultiviewProblem& problem_;
  const bool is_real_, has_pair_;
  const int64_t offset_;
};

template <int FIRST, int COUNT, int SIZE, typename Real>
__device__ __forceinline__ Real tree_sum(const Real (&x)[SIZE]) {
  if constexpr (COUNT == 1) {
    return x[FIRST];
  } else {
    return tree_sum<FIRST, COUNT / 2>(x) + tree_sum<FIRST + COUNT / 2, COUNT / 2>(x);
  }
}

// By the last block of the grid: losses are read from L2, in an order that depends on the size of
// the block alone.
template <typename Real>
__device__ __forceinline__ void write_mean(const MultiviewProblem& problem, Real* partial,
                                           int thread, int threads) {
  Real sums[MEAN_LOADS] = {};
  for (int64_t first = 0; first < problem.batch; first += MEAN_LOADS * threads) {
    const Real* loss = static_cast<const Real*>(problem.loss) + first;
    const int left = int(min(problem.batch - first, int64_t(MEAN_LOADS * threads)));
#pragma unroll
    for (int i = 0; i < MEAN_LOADS; ++i) {
      if (const int sample = i * threads + thread; sample < left) sums[i] += __ldcg(loss + sample);
    }
  }
  const Real of_warp = lanes_sum<WARP>(tree_sum<0, MEAN_LOADS>(sums));
  if (thread % WARP == 0) partial[thread / WARP] = of_warp;
  __syncthreads();
  if (thread >= WARP) return;
  const Real total = lanes_sum<WARP>(thread < threads / WARP ? partial[thread] : Real(0));
  if (thread == 0) *static_cast<Real*>(problem.mean) = total / Real(problem.batch);
}

// By the warp that stored the block's losses, after its last one: how many blocks came before, in
// lane 0.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* ticket, int lane) {
  uint32_t arrived = 0;
  __syncwarp();
  if (lane == 0) {
    __threadfence();
    arrived = atomicInc(ticket, gridDim.x - 1);  // the last one sets it back to 0
  }
  return arrived;
}

template <typename Real>
__device__ __forceinline__ void finish(const MultiviewProblem& problem, Shared<Real>& shared,
                                       uint32_t arrived, int thread, int threads) {
  if (problem.mean == nullptr) return;
  if (thread == 0) shared.is_last = arrived == gridDim.x - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  write_mean(problem, shared.partial[0][0], thread, threads);
}

}  // namespace vi_simsiam
