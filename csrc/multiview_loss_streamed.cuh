// The kernel of multiview_loss.cu for rows that are read twice.

#pragma once

#include "multiview_loss_parts.cuh"

namespace vi_simsiam {
namespace {

constexpr int STREAMED_THREADS = 256;

// One sample per block, rows read twice: forwards for the sums, backwards, beginning with what the
// caches still hold, for the gradient.
template <typename Prediction, typename Target, bool WIDE>
__global__ void __launch_bounds__(STREAMED_THREADS,
                                  WIDE && std::is_same_v<Prediction, float> ? 3 : 2)
    streamed_kernel(const __grid_constant__ MultiviewProblem given,
                    const __grid_constant__ Settings<Compute<Prediction>> given_settings) {
  using Real = Compute<Prediction>;
  using Lane = Pair<MAX_VIEWS, Prediction>;
  constexpr int COLUMNS = VECTOR_BYTES / int(sizeof(Prediction));
  __shared__ Shared<Real> shared;

  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / WARP, lane = thread % WARP;
  uint32_t arrived = 0;
  int set = 0;

  for (int64_t sample = blockIdx.x; sample < given.batch; sample += gridDim.x) {
    const MultiviewProblem& problem = reread(given);
    const Settings<Real>& settings = reread(given_settings);
    const Columns<COLUMNS, WIDE> columns{int(hidden(thread)), threads, int(problem.dim)};
    const int chunks = (columns.count + threads * COLUMNS - 1) / (threads * COLUMNS);
    const int views = int(problem.views), targets = int(problem.target_views);
    Lane pair(problem, settings, sample, int(hidden(lane)));
    const auto view_row = [&](int v) {
      return static_cast<const Prediction*>(problem.predictions[min(v, views - 1)]) +
             sample * problem.prediction_stride;
    };
    const auto target_row = [&](int g) {
      return static_cast<const Target*>(problem.targets[min(g, targets - 1)]) +
          sample * problem.target_stride;
    };
    Real loss = 0;
    for (int v = 0; v < views; v += TILE) {
      const Real argument = warp == 0 ? pair.load(v) : Real(0);
      const Prediction* p_rows[TILE] = {view_row(v), view_row(v + 1)};
      for (int g = 0; g < targets; g += TILE) {
        const Target* z_rows[TILE] = {target_row(g), target_row(g + 1)};
        Real sums[SUMS] = {};
#pragma unroll(WIDE ? 2 : 1)
        for (int c = 0; c < chunks; ++c) {
          Chunk<Prediction, COLUMNS> p[TILE];
          Chunk<Target, COLUMNS> z[TILE];
#pragma unroll
          for (int k = 0; k < TILE; ++k) {
            p[k].load(p_rows[k], columns, c);
            z[k].load(z_rows[k], columns, c);
          }
          add_products(sums, p, z, std::integral_constant<int, COLUMNS>());
        }
        const Real of_warp = warp_sums(sums, lane);
        if (lane % (WARP / SUMS) == 0) shared.partial[set][lane / (WARP / SUMS)][warp] = of_warp;
        __syncthreads();
        if (thread < SUMS) {
          Real total = 0;
          for (int w = 0; w < threads / WARP; ++w) total += shared.partial[set][thread][w];
          Real* const sum = thread < TILE       ? &shared.square_p[thread]
                            : thread < 2 * TILE ? &shared.square_z[g + thread - TILE]
                                                : &shared.product[thread / TILE - TILE][g +
                                                    thread % TILE];
          *sum = total;
        }
        set ^= 1;
      }
      if (warp == 0) {
        __syncwarp();
        pair.prepare(v, argument);
        const int k = pair.view_in_tile(), g = pair.target();
        const int known = min(g, targets - 1);  // the others' sums were never formed
        loss += pair.evaluate(shared.square_p[k], shared.square_z[known], shared.product[k][known],
                              shared, 0, true);
        if (v + TILE >= views) {
          if (lane == 0) static_cast<Real*>(problem.loss)[sample] = loss;
          if (problem.mean != nullptr && sample + gridDim.x >= problem.batch)
            arrived = take_ticket(settings.ticket, lane);
        }
      }
      __syncthreads();
      if (problem.gradient == nullptr) continue;

#pragma unroll 1
      for (int c = chunks - 1; c >= 0; --c) {
        Chunk<Prediction, COLUMNS> p[TILE];
        Real x[TILE][COLUMNS];
#pragma unroll
        for (int k = 0; k < TILE; ++k) p[k].load(p_rows[k], columns, c);
#pragma unroll
        for (int k = 0; k < TILE; ++k) {
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) x[k][i] = shared.along[k] * p[k].at(i);
        }
#pragma unroll 1
        for (int g = 0; g < targets; g += TILE) {
          Chunk<Target, COLUMNS> z[TILE];
#pragma unroll
          for (int j = 0; j < TILE; ++j) z[j].load(target_row(g + j), columns, c);
#pragma unroll
          for (int j = 0; j < TILE; ++j) {
#pragma unroll
            for (int k = 0; k < TILE; ++k) {
              const Real toward = shared.toward[k * MAX_VIEWS + g + j];
#pragma unroll
              for (int i = 0; i < COLUMNS; ++i) x[k][i] += toward * z[j].at(i);
            }
          }
        }
#pragma unroll
        for (int k = 0; k < TILE; ++k) {
          if (v + k < views)
            GradientRow<Prediction, WIDE>(problem, settings.gradient_is_real, v + k,
                                          sample).store(columns, c, x[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < TILE; ++k) {
        if (v + k < views)
          GradientRow<Prediction, WIDE>(problem, settings.gradient_is_real, v + k, sample)
              .store_rest(columns, shared.to_concentration[k]);
      }
    }
  }
  finish(given, shared, arrived, thread, threads);
}

}  // namespace
}  // namespace vi_simsiam
