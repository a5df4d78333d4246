// Multi-view loss and its gradient on the GPU, in one launch.
//
// For every sample, over the pairs v != g of a prediction and a target of another view, with F of
// power_spherical.cuh (cosine: F = c) plus cosine times c, w the weight and w' the weight of the
// gradient:
//     c_vg   = p_v.z_g / (|p_v| |z_g|)
//     loss   = -w sum_vg F(kappa_v, c_vg)
//     dp_v   = along_v p_v + sum_g toward_vg z_g
//     toward = -w' dF/dc / (|p_v| |z_g|),   along = w' sum_g dF/dc c_vg / |p_v|^2
//     draw_v = -w' scale gain link'(gain raw_v) sum_g dF/dkappa,   kappa_v = scale link(gain raw_v) + minimum
//
// Traffic. The kernel must read every prediction and target once and write every gradient once, 3 V
// B D numbers for as many targets as views, and moves no more than that where rows stay in
// registers: for at most two targets, two views up to 8192 columns, more views, if aligned, up to
// 4096 (float) or 8192 (16 bits). Others, and float64, are streamed and read a second time for the
// gradient, from L1 or L2 where the caches hold them.
//
// Launch shape. A team of whole warps holds the rows of a sample, in 16-byte chunks: one a thread
// for short rows, four for float, else two. 2048 columns are 128 threads in float and in bfloat16.
// Two views have all their loads under way before anything waits, then one sum over the warp for
// all eight products, one barrier, and the pairs' functions of kappa and c in one lane each; what
// needs kappa alone is done before, while the rows arrive. With more views the targets stay and the
// next two predictions are fetched while these two are worked on. Memory of 4.8 TB/s that answers
// after 0.7 us wants 25 KB under way on each of 132 multiprocessors: at 128 registers a thread four
// blocks of 32 KB fit there (float, 2048 columns), at 96 registers five of 16 KB (bfloat16). There
// are no more blocks than the GPU holds at a time, and they take sample after sample, so that the
// tickets below are few. All of this is reckoned from bytes, registers and machine code; no time
// was measured.
//
// The mean is summed by the block that draws the last ticket, over the losses in a fixed order. All
// sums are taken in a fixed order: the same input gives the same bits.

#include "cuda_launch.cuh"
#include "multiview_loss_parts.cuh"

namespace vi_simsiam {
namespace {

constexpr int MAX_THREADS = 512, SMALL_THREADS = 128, STREAMED_THREADS = 256;

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

  static int64_t warps(int64_t dim) { return (dim + CHUNKS * COLUMNS * WARP - 1) / (CHUNKS * COLUMNS * WARP); }
};

// The gradient of a tile whose rows are in registers, with the factors in `slot`.
template <bool WIDE, int CHUNKS, int COLUMNS, typename Prediction, typename Target, typename Real>
__device__ __forceinline__ void store_tile(const MultiviewProblem& problem, bool is_real, int first_view,
                                           int64_t sample, int slot, const Shared<Real>& shared,
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
  constexpr int CHUNKS = Resident<MODE, Prediction, Target>::CHUNKS, COLUMNS = VECTOR_BYTES / int(sizeof(Prediction));
  constexpr int SLOTS = WARP / Lane::LANES;
  __shared__ Shared<Real> shared;

  const int team = threadIdx.y, teams = blockDim.y, team_warps = int(blockDim.x) / WARP;
  const int thread = team * int(blockDim.x) + int(threadIdx.x), lane = thread % WARP;
  const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);  // tells the compiler that it is the same in all lanes
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
    const Columns<COLUMNS, WIDE> columns{int(hidden(threadIdx.x)), int(blockDim.x), int(problem.dim)};
    const int views = int(problem.views), last_target = int(problem.target_views) - 1;
    const bool exists = first + team < problem.batch;
    const int64_t sample = exists ? first + team : problem.batch - 1;

    const int here = int(hidden(lane)), lane_team = everywhere ? 0 : min(here / Lane::LANES, teams - 1);
    const bool lane_exists = first + lane_team < problem.batch;
    const bool writes = here / Lane::LANES < (everywhere ? 1 : teams) && lane_exists;
    Lane pair(problem, settings, lane_exists ? first + lane_team : problem.batch - 1, here);

    Chunk<Prediction, COLUMNS> p[CHUNKS][TILE], next[CHUNKS][TILE];
    Chunk<Target, COLUMNS> z[CHUNKS][TILE];
    const auto load_views = [&](auto& rows, int first_view) {
#pragma unroll
      for (int k = 0; k < TILE; ++k) {
        const Prediction* row = static_cast<const Prediction*>(problem.predictions[min(first_view + k, views - 1)]) +
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
          static_cast<const Target*>(problem.targets[min(g, last_target)]) + sample * problem.target_stride;
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
      for (int c = 0; c < CHUNKS; ++c) add_products(sums, p[c], z[c], std::integral_constant<int, COLUMNS>());
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
        loss += pair.evaluate(square_p, square_z, product, shared, everywhere ? warp : lane_team, writes);
        if (!more && warp == 0) {
          if (writes && here % Lane::LANES == 0) static_cast<Real*>(problem.loss)[first + lane_team] = loss;
          // Before the gradient: the way to memory and back is covered by the stores.
          if (problem.mean != nullptr && first + step >= problem.batch) arrived = take_ticket(settings.ticket, lane);
        }
      }
      if (everywhere) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      set ^= 1;

      if (exists)
        store_tile<WIDE>(reread(given), settings.gradient_is_real, v, sample, everywhere ? warp : team, shared, p, z);
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

// One sample per block, rows read twice: forwards for the sums, backwards, beginning with what the
// caches still hold, for the gradient.
template <typename Prediction, typename Target, bool WIDE>
__global__ void __launch_bounds__(STREAMED_THREADS, WIDE && std::is_same_v<Prediction, float> ? 3 : 2)
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
      return static_cast<const Target*>(problem.targets[min(g, targets - 1)]) + sample * problem.target_stride;
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
                                                : &shared.product[thread / TILE - TILE][g + thread % TILE];
          *sum = total;
        }
        set ^= 1;
      }
      if (warp == 0) {
        __syncwarp();
        pair.prepare(v, argument);
        const int k = pair.view_in_tile(), g = pair.target();
        const int known = min(g, targets - 1);  // the others' sums were never formed
        loss += pair.evaluate(shared.square_p[k], shared.square_z[known], shared.product[k][known], shared, 0, true);
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
            GradientRow<Prediction, WIDE>(problem, settings.gradient_is_real, v + k, sample).store(columns, c, x[k]);
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

bool is_aligned(const MultiviewProblem& problem, size_t prediction_size, size_t target_size, size_t gradient_size) {
  uintptr_t bits = uintptr_t(problem.prediction_stride) * prediction_size;
  bits |= uintptr_t(problem.target_stride) * target_size;
  for (int64_t v = 0; v < problem.views; ++v) bits |= reinterpret_cast<uintptr_t>(problem.predictions[v]);
  for (int64_t g = 0; g < problem.target_views; ++g) bits |= reinterpret_cast<uintptr_t>(problem.targets[g]);
  if (problem.gradient != nullptr)
    bits |= reinterpret_cast<uintptr_t>(problem.gradient) | uintptr_t(problem.gradient_stride) * gradient_size |
            uintptr_t(problem.gradient_view_stride) * gradient_size;
  return bits % VECTOR_BYTES == 0 && problem.dim % int64_t(VECTOR_BYTES / prediction_size) == 0;
}

template <typename Prediction, typename Target, bool WIDE>
const char* launch_kernel(const MultiviewProblem& problem, const Settings<Compute<Prediction>>& settings,
                          const Device& device, void* stream) {
  // Blocks of at least 128 threads, whose first warp evaluates the pairs of all its samples, once
  // there are more samples than the GPU needs to be busy; below that the shortest way for each of
  // them.
  const bool many_samples = problem.batch >= 16 * int64_t(device.multiprocessors);
  const auto resident = [&](auto mode) {
    constexpr Mode MODE = decltype(mode)::value;
    const int warps = int(Resident<MODE, Prediction, Target>::warps(problem.dim));
    const int teams = many_samples ? std::max(1, SMALL_THREADS / WARP / warps) : 1;
    return launch<resident_kernel<MODE, Prediction, Target, WIDE>>(
        device, dim3(unsigned(warps * WARP), unsigned(teams)), (problem.batch + teams - 1) / teams, INT32_MAX, stream,
        problem, settings);
  };
  const auto fits = [&](auto mode) {
    return problem.target_views <= RESIDENT_TARGETS &&
           problem.dim <= Resident<decltype(mode)::value, Prediction, Target>::MAX_DIM;
  };
  constexpr std::integral_constant<Mode, Mode::small> small{};
  constexpr std::integral_constant<Mode, Mode::two_views> two_views{};
  constexpr std::integral_constant<Mode, Mode::many_views> many_views{};
  // Rarer cases are streamed, so that the extension is quickly built.
  constexpr bool SAME = std::is_same_v<Prediction, Target>, DOUBLES = std::is_same_v<Prediction, double>;
  if (problem.views <= TILE) {
    if constexpr (WIDE && SAME && !DOUBLES) {
      if (fits(small)) return resident(small);
    }
    if constexpr ((WIDE || SAME) && !DOUBLES) {
      if (fits(two_views)) return resident(two_views);
    }
  } else if constexpr (WIDE && !DOUBLES) {
    if (fits(many_views)) return resident(many_views);
  }
  // No more blocks than let the rows they work on stay in half of L2 between the two times they are
  // read.
  const int64_t vectors = (problem.dim * int64_t(sizeof(Prediction)) + VECTOR_BYTES - 1) / VECTOR_BYTES;
  const int threads = int(std::min<int64_t>(STREAMED_THREADS, (vectors + WARP - 1) / WARP * WARP));
  const int64_t bytes =
      problem.dim * int64_t(TILE * sizeof(Prediction) + problem.target_views * sizeof(Target)) * device.multiprocessors;
  const int limit = int(std::clamp<int64_t>(device.l2_bytes / 2 / bytes, 1, 32));
  return launch<streamed_kernel<Prediction, Target, WIDE>>(device, dim3(threads), problem.batch, limit, stream, problem,
                                                           settings);
}

template <typename Prediction, typename Target>
const char* launch_loss(const MultiviewProblem& problem, bool gradient_is_real, uint32_t* ticket, void* stream) {
  using Real = Compute<Prediction>;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return explain(error);
  const Settings<Real> settings{PowerSpherical<Real>(problem.dim), Real(problem.scale),
                                Real(problem.minimum),             Real(problem.gain),
                                Real(problem.cosine),              Real(problem.weight),
                                Real(problem.gradient_weight),     ticket,
                                gradient_is_real};
  const size_t gradient_size = gradient_is_real ? sizeof(Real) : sizeof(Prediction);
  return is_aligned(problem, sizeof(Prediction), sizeof(Target), gradient_size)
             ? launch_kernel<Prediction, Target, true>(problem, settings, device, stream)
             : launch_kernel<Prediction, Target, false>(problem, settings, device, stream);
}

template <typename Prediction>
const char* launch_half(const MultiviewProblem& problem, DType prediction, DType target, DType gradient,
                        uint32_t* ticket, void* stream) {
  const bool is_real = gradient == DType::float32;
  if (!is_real && gradient != prediction) return "the gradient must be float32 or have the predictions' dtype";
  if (target == prediction) return launch_loss<Prediction, Prediction>(problem, is_real, ticket, stream);
  if (target == DType::float32) return launch_loss<Prediction, float>(problem, is_real, ticket, stream);
  return "the targets must be float32 or have the predictions' dtype";
}

}  // namespace

const char* multiview_loss_cuda(const MultiviewProblem& problem, DType prediction, DType target, DType gradient,
                                uint32_t* ticket, void* stream) {
  if (problem.views < 1 || problem.views > MAX_VIEWS) return "between 1 and 16 views are accepted";
  if (problem.target_views < 1 || problem.target_views > problem.views)
    return "between 1 target view and as many as there are views are accepted";
  if (problem.dim > INT32_MAX / 4) return "more than 2^29 dimensions";
  if (problem.mean != nullptr && ticket == nullptr) return "the mean needs a ticket";
  if (problem.mean != nullptr && problem.batch <= 0) return "the mean over an empty batch is undefined";
  if (problem.batch <= 0) return nullptr;
  if (prediction == DType::bfloat16)
    return launch_half<__nv_bfloat16>(problem, prediction, target, gradient, ticket, stream);
  if (prediction == DType::float16) return launch_half<__half>(problem, prediction, target, gradient, ticket, stream);
  if (target != prediction || gradient != prediction) return "targets and gradient must have the predictions' dtype";
  if (prediction == DType::float64) return launch_loss<double, double>(problem, true, ticket, stream);
  return launch_loss<float, float>(problem, true, ticket, stream);
}

}  // namespace vi_simsiam
