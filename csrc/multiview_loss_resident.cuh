// The kernel of multiview_loss.cu for rows that stay in registers.

#pragma once

#include "multiview_loss_parts.cuh"

namespace vi_simsiam {
namespace {

constexpr int MAX_THREADS = 512, SMALL_THREADS = 128;

enum class Mode {
  small,       // two views, short rows: few registers, many blocks
  two_views,   // one tile
  many_views,  // tile after tile, each fetched while the one before it is worked on
};

template <Mode MODE, typename Prediction, typename Target>
struct Resident {
  static constexpr bool FLOATS = std::is_same_v<Prediction, float>;
  static constexpr int CHUNKS = MODE == Mode::small ? 1 : MODE == Mode::two_views && FLOATS ? 4 : 2;
  static constexpr int THREADS = MODE == Mode::small ? SMALL_THREADS : MAX_THREADS;
  static constexpr int BLOCKS = MODE == Mode::small ? 8 : 1;
  static constexpr int COLUMNS = VECTOR_BYTES / int(sizeof(Prediction));
  static constexpr int64_t MAX_DIM = THREADS * CHUNKS * COLUMNS;

  static int64_t warps(int64_t dim) {
    constexpr int64_t PER_WARP = CHUNKS * COLUMNS * WARP;
    return (dim + PER_WARP - 1) / PER_WARP;
  }
};

// The gradient of a tile whose rows are in registers, with the factors in `slot`.
template <bool WIDE, int CHUNKS, int COLUMNS, typename Prediction, typename Target, typename Real>
__device__ __forceinline__ void store_tile(const MultiviewProblem& problem, bool is_real,
                                           int first_view, int64_t sample, int slot,
                                           const Shared<Real>& shared,
                                           Chunk<Prediction, COLUMNS> (&p)[CHUNKS][TILE],
                                           Chunk<Target, COLUMNS> (&z)[CHUNKS][TILE]) {
  if (problem.gradient == nullptr) return;
  const Columns<COLUMNS, WIDE> columns{int(hidden(threadIdx.x)), int(blockDim.x), int(problem.dim)};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int k = 0; k < TILE; ++k) {
      p[c][k].stay_packed();
      z[c][k].stay_packed();
    }
  }
#pragma unroll
  for (int k = 0; k < TILE; ++k) {
    if (first_view + k >= problem.views) break;
    const Real along = shared.along[slot * TILE + k];
    const Real* toward = shared.toward + (slot * TILE + k) * RESIDENT_TARGETS;
    const GradientRow<Prediction, WIDE> row(problem, is_real, first_view + k, sample);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Real x[COLUMNS];
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        x[i] = along * p[c][k].at(i) + (toward[0] * z[c][0].at(i) + toward[1] * z[c][1].at(i));
      row.store(columns, c, x);
    }
    row.store_rest(columns, shared.to_concentration[slot * TILE + k]);
  }
}

// blockDim: (threads of a team, samples of a block); every team holds the rows of one sample.
template <Mode MODE, typename Prediction, typename Target, bool WIDE>
__global__ void __launch_bounds__(Resident<MODE, Prediction, Target>::THREADS,
                                  Resident<MODE, Prediction, Target>::BLOCKS)
    resident_kernel(const __grid_constant__ MultiviewProblem given,
                    const __grid_constant__ Settings<Compute<Prediction>> given_settings) {
  using Real = Compute<Prediction>;
  using Lane = Pair<RESIDENT_TARGETS, Prediction>;
  constexpr bool MANY = MODE == Mode::many_views;
  constexpr int CHUNKS = Resident<MODE, Prediction, Target>::CHUNKS,
      COLUMNS = VECTOR_BYTES / int(sizeof(Prediction));
  constexpr int SLOTS = WARP / Lane::LANES;
  __shared__ Shared<Real> shared;

  const int team = threadIdx.y, teams = blockDim.y, team_warps = int(blockDim.x) / WARP;
  const int thread = team * int(blockDim.x) + int(threadIdx.x), lane = thread % WARP;
  // A shuffle, so that the compiler treats it as uniform in the warp
  const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
  // A block of one sample and few warps lets each of them evaluate the pairs for itself, which
  // saves a barrier. In others the first warp evaluates those of all samples.
  const bool everywhere = teams == 1 && team_warps <= SLOTS;
  const bool evaluates = everywhere || warp == 0;
  const int64_t step = int64_t(gridDim.x) * teams;
  uint32_t arrived = 0;
  int set = 0;

  for (int64_t first = int64_t(blockIdx.x) * teams; first < given.batch; first += step) {
    const MultiviewProblem& problem = reread(given);
    const Settings<Real>& settings = reread(given_settings);
    const Columns<COLUMNS, WIDE> columns{int(hidden(threadIdx.x)), int(blockDim.x),
                                         int(problem.dim)};
    const int views = int(problem.views), last_target = int(problem.target_views) - 1;
    const bool exists = first + team < problem.batch;
    const int64_t sample = exists ? first + team : problem.batch - 1;

    const int here = int(hidden(lane)),
        lane_team = everywhere ? 0 : min(here / Lane::LANES, teams - 1);
    const bool lane_exists = first + lane_team < problem.batch;
    const bool writes = here / Lane::LANES < (everywhere ? 1 : teams) && lane_exists;
    Lane pair(problem, settings, lane_exists ? first + lane_team : problem.batch - 1, here);

    Chunk<Prediction, COLUMNS> p[CHUNKS][TILE], next[CHUNKS][TILE];
    Chunk<Target, COLUMNS> z[CHUNKS][TILE];
    const auto load_views = [&](auto& rows, int first_view) {
#pragma unroll
      for (int k = 0; k < TILE; ++k) {
        const Prediction* row =
            static_cast<const Prediction*>(problem.predictions[min(first_view + k, views - 1)]) +
                                sample * problem.prediction_stride;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) rows[c][k].load(row, columns, c);
      }
    };
    Real argument = evaluates ? pair.load(0) : Real(0), loss = 0;
    load_views(p, 0);
#pragma unroll
    for (int g = 0; g < RESIDENT_TARGETS; ++g) {
      const Target* row =
          static_cast<const Target*>(problem.targets[min(g, last_target)]) +
              sample * problem.target_stride;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) z[c][g].load(row, columns, c);
    }

#pragma unroll 1
    for (int v = 0; v < (MANY ? views : 1); v += TILE) {
      const bool more = MANY && v + TILE < views;
      if (evaluates) {
        pair.prepare(v, argument);
        if (more) argument = pair.load(v + TILE);
      }
      if (more) load_views(next, v + TILE);
      Real sums[SUMS] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        add_products(sums, p[c], z[c], std::integral_constant<int, COLUMNS>());
      const Real of_warp = warp_sums(sums, lane);
      if (lane % (WARP / SUMS) == 0) shared.partial[set][lane / (WARP / SUMS)][warp] = of_warp;
      __syncthreads();

      if (evaluates) {
        const int k = pair.view_in_tile(), g = pair.target();
        Real square_p = 0, square_z = 0, product = 0;
        const Real(&partial)[SUMS][MAX_WARPS] = shared.partial[set];
#pragma unroll 4
        for (int w = lane_team * team_warps; w < (lane_team + 1) * team_warps; ++w) {
          square_p += partial[k][w];
          square_z += partial[TILE + g][w];
          product += partial[2 * TILE + k * TILE + g][w];
        }
        loss += pair.evaluate(square_p, square_z, product, shared, everywhere ? warp : lane_team,
                              writes);
        if (!more && warp == 0) {
          if (writes && here % Lane::LANES == 0)
            static_cast<Real*>(problem.loss)[first + lane_team] = loss;
          // Before the gradient: the way to memory and back is covered by the stores.
          if (problem.mean != nullptr && first + step >= problem.batch)
            arrived = take_ticket(settings.ticket, lane);
        }
      }
      if (everywhere) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      set ^= 1;

      if (exists)
        store_tile<WIDE>(reread(given), settings.gradient_is_real, v, sample,
                         everywhere ? warp : team, shared, p, z);
      if constexpr (MANY) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
          for (int k = 0; k < TILE; ++k) p[c][k] = next[c][k];
        }
      }
    }
  }
  finish(given, shared, arrived, thread, int(blockDim.x) * teams);
}

}  // namespace
}  // namespace vi_simsiam
