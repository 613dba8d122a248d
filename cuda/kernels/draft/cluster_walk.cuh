/*
 * The candidate form of the draft head in one launch (sm_90): a cluster of CTAs per request, a CTA
 * per row of base logits (cluster_top.cuh), the law and the order of walk.cuh.
 *
 * Mapping: each CTA finds the top of its row, makes the candidates' noise, asks L2 for their W2 rows
 * and hands the candidates to the cluster's first CTA, which then walks; the others are done. So
 * requests that walk, which waits, share the device with rows that are read, which does not.
 *
 * A step of the walk. 16 candidates a warp are A (their W2 rows), the latent is B, all columns alike, so
 * that no lane exchanges anything; four warps share the columns of a row. Their sums meet in shared
 * memory, where one warp runs the race while the others have the next candidates' rows brought: what a
 * step waits for is W1 (from L2, or memory with many requests), two barriers and the race. Word w of a
 * lane's 16 bytes enters product w / 2 of two: the columns of a product are a permutation of 32
 * neighbours, the same for both operands.
 *
 * Bytes: base logits once, K * 2 * rank per row. Limited by latency: of 23 us with one request 5 read the
 * row, 5 find the top, 10 walk (2,600 cycles a step, whether or not W1's row is in L2). With many
 * requests, too: clusters of a row's reading are all at the same point, so that memory waits.
 *
 * Dropped: a persistent grid without clusters whose CTAs take row after row with the next row's first
 * 64 KB on their way, the last to finish a request walking (222 us for 128 requests against 176); every
 * warp running the whole race by itself, with one barrier a step (2,700 cycles a step).
 */
#pragma once

#include "common/bulk_copy.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "kernels/draft/cluster_top.cuh"
#include "kernels/draft/walk.cuh"

namespace dspark {

struct ClusterPolicy {
  static constexpr int kMaxCtas = 8;
  static constexpr int kTile = 64;     /* candidates of a product of all warps */
  static constexpr int kWarpRows = 16; /* of these, with one warp */
  static constexpr int kTileWarps = kTile / kWarpRows;
  static constexpr int kParts = RowPolicy::kNumWarps / kTileWarps; /* of a row's columns */
  static constexpr int kPairColumns = 32;                          /* of two products */
  static constexpr int kMaxRank = 256;
  static constexpr int kWarpPairs = kMaxRank / kPairColumns / kParts;
};

/* A candidate that travels as 16 bytes. */
struct alignas(16) PlacedCandidate : Candidate {};

/* Dynamic shared memory: candidates of all steps, sums of two steps, a row's ring or lists. */
__host__ __device__ constexpr size_t cluster_candidate_bytes(int32_t num_top, int32_t num_steps) {
  return static_cast<size_t>(num_top) * num_steps * sizeof(PlacedCandidate);
}
__host__ __device__ constexpr size_t cluster_sum_bytes(int32_t num_top) {
  constexpr int kTile = ClusterPolicy::kTile;
  return size_t{2} * ClusterPolicy::kParts * ((num_top + kTile - 1) / kTile * kTile) *
         sizeof(float);
}
__host__ __device__ constexpr size_t cluster_shared_bytes(int32_t num_top,
                                                          int32_t num_steps,
                                                          bool zoned) {
  return cluster_candidate_bytes(num_top, num_steps) + cluster_sum_bytes(num_top) +
         (zoned ? sizeof(RowLists) : RowPolicy::kRingBytes);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* W2 rows g and g + 8 of a warp's candidates: 16 bytes of 32 columns each. */
struct WalkRows {
  uint4 low[ClusterPolicy::kWarpPairs];
  uint4 high[ClusterPolicy::kWarpPairs];
};

template <typename T, typename U>
struct ClusterWalk {
  using Policy = ClusterPolicy;
  const WalkArgs<T, U>& args;
  int32_t req;
  PlacedCandidate* candidates; /* shared, [num_steps, num_top] */
  float* sums;                 /* shared, [2, kParts, tiles * kTile] */
  Runner runner;               /* position: of the first step */

  __device__ __forceinline__
  ClusterWalk(const WalkArgs<T, U>& args, int32_t req, PlacedCandidate* candidates, float* sums)
      : args(args),
        req(req),
        candidates(candidates),
        sums(sums),
        runner{args.seeds[req], args.temperature[req], 0.f, args.anchor_positions[req] + 1,
               draft_purpose(args.rules, req)} {}

  __device__ __forceinline__ Runner runner_at(int32_t step) const {
    Runner at = runner;
    at.position += step;
    return at;
  }

  template <bool kZoned>
  __device__ __forceinline__ RowTop<U, kZoned> top(int32_t step,
                                                   unsigned char* shared,
                                                   RowState& state) const {
    const int64_t at = row(step);
    const int32_t* mask =
        args.mask.words == nullptr ? nullptr : args.mask.words + at * args.mask.words_per_row;
    return {args.logits + at * args.stride_logits_row,
            mask,
            args.in.vocab_size,
            args.num_top,
            args.aligned_rows,
            kZoned ? args.zone_tops + at * args.num_zones : nullptr,
            args.num_zones,
            shared,
            state};
  }

  __device__ __forceinline__ int64_t row(int32_t step) const {
    return static_cast<int64_t>(req) * args.in.draft_len + step;
  }
  __device__ __forceinline__ int32_t num_padded() const {
    return (args.num_top + Policy::kTile - 1) / Policy::kTile * Policy::kTile;
  }
  __device__ __forceinline__ PlacedCandidate* of_step(int32_t step) const {
    return candidates + step * args.num_top;
  }
  static __device__ __forceinline__ int32_t warp() {
    return static_cast<int32_t>(threadIdx.x) / kWarpSize;
  }
  static __device__ __forceinline__ int32_t part() { return warp() / Policy::kTileWarps; }
  static __device__ __forceinline__ int32_t first_row() {
    return warp() % Policy::kTileWarps * Policy::kWarpRows;
  }

  /* This lane's columns of a row of either table; zeros without one. */
  __device__ __forceinline__ void read_row(const T* table,
                                           int32_t token,
                                           uint4 (&words)[Policy::kWarpPairs]) const {
    const int32_t rank = args.in.markov_rank;
    const bool known = token >= 0 && token < args.in.vocab_size;
    const T* from = table + static_cast<int64_t>(known ? token : 0) * rank;
#pragma unroll
    for (int i = 0; i < Policy::kWarpPairs; ++i) {
      const int32_t column = (part() + i * Policy::kParts) * Policy::kPairColumns +
                             static_cast<int32_t>(threadIdx.x) % 4 * 8;
      words[i] = known && column < rank ? __ldg(reinterpret_cast<const uint4*>(from + column))
                                        : make_uint4(0u, 0u, 0u, 0u);
    }
  }

  /* W2 rows of a tile of candidates. */
  __device__ __forceinline__ void read_tile(int32_t step, int32_t tile, WalkRows& rows) const {
    const int32_t i =
        tile * Policy::kTile + first_row() + static_cast<int32_t>(threadIdx.x) % kWarpSize / 4;
    const PlacedCandidate* top = of_step(step);
    read_row(args.markov_w2, i < args.num_top ? top[i].token : kNoCandidate, rows.low);
    read_row(args.markov_w2, i + 8 < args.num_top ? top[i + 8].token : kNoCandidate, rows.high);
  }

  /* This part's sums of a tile of candidates with the latent. */
  __device__ __forceinline__ void multiply_tile(const WalkRows& rows,
                                                const uint4 (&latent)[Policy::kWarpPairs],
                                                float* to) const {
    float dots[2][4] = {}; /* of every other product: a chain half as long */
#pragma unroll
    for (int i = 0; i < Policy::kWarpPairs; ++i) {
      const uint4& low = rows.low[i];
      const uint4& high = rows.high[i];
      const uint32_t first[4] = {low.x, high.x, low.y, high.y};
      const uint32_t second[4] = {low.z, high.z, low.w, high.w};
      mma_m16n8k16<T>(dots[0], first, latent[i].x, latent[i].y);
      mma_m16n8k16<T>(dots[1], second, latent[i].z, latent[i].w);
    }
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float* own = to + part() * num_padded() + first_row() + lane / 4;
    if (lane % 4 == 0) own[0] = dots[0][0] + dots[1][0];
    if (lane % 4 == 1) own[8] = dots[0][2] + dots[1][2];
  }

  /* What the products add to a candidate's logit. */
  __device__ __forceinline__ float bias(const float* of_step, int32_t i) const {
    static_assert(Policy::kParts == 4);
    const int32_t n = num_padded();
    return (of_step[i] + of_step[n + i]) + (of_step[2 * n + i] + of_step[3 * n + i]);
  }

  /* A candidate's logit; `of_step_sums`: nullptr: it is whole. */
  __device__ __forceinline__ float whole_logit(const Candidate& candidate,
                                               const float* of_step_sums,
                                               int32_t i) const {
    if (candidate.token < 0) return -INFINITY;
    return of_step_sums == nullptr ? candidate.logit : candidate.logit + bias(of_step_sums, i);
  }

  /* The race of a step, by a warp: all lanes get the winner, 0 without one. */
  __device__ __forceinline__ int32_t race(int32_t step, const float* of_step_sums) const {
    Indexed best = empty_race();
#pragma unroll 2
    for (int32_t i = static_cast<int32_t>(threadIdx.x) % kWarpSize; i < args.num_top;
         i += kWarpSize) {
      const Candidate candidate = of_step(step)[i];
      const float l = whole_logit(candidate, of_step_sums, i);
      if (candidate.token >= 0) race_step(best, l - candidate.noise, candidate.token);
    }
    return race_token(warp_leader(race_key(best)));
  }

  /* The pairs of a step, by a warp. */
  __device__ __forceinline__ void write_pairs(int32_t step, const float* of_step_sums) const {
    const int64_t pairs = row(step) * args.num_top;
    for (int32_t i = static_cast<int32_t>(threadIdx.x) % kWarpSize; i < args.num_top;
         i += kWarpSize) {
      const Candidate candidate = of_step(step)[i];
      args.candidate_tokens[pairs + i] = candidate.token;
      args.candidate_logits[pairs + i] = whole_logit(candidate, of_step_sums, i);
    }
  }

  /* Cuts the step's law down to what the request's filters leave. */
  __device__ __forceinline__ void filter(int32_t step, const float* sums, const LawFilter& law) {
    PlacedCandidate* top = of_step(step);
    for (int32_t i = threadIdx.x; i < args.num_top; i += RowPolicy::kNumThreads) {
      if (sums != nullptr) top[i].logit += bias(sums, i);
    }
    __syncthreads();
    filter_candidates(top, args.num_top, runner.temperature, law, [] { __syncthreads(); });
  }

  /* `winner`: shared. Warp 0 runs the races; the others have the next rows of W2 brought meanwhile. */
  __device__ __forceinline__ void run(int32_t* winner) {
    const bool biased = args.markov_w2 != nullptr;
    const LawFilter law = law_filter(args, req);
    const bool filtered =
        runner.temperature > 0.f && (law.top_k > 0 || law.top_p < 1.f || law.min_p > 0.f);
    int32_t previous = biased ? args.in.anchors[req] : 0;
    WalkRows rows;
    if (biased && warp() != 0) read_tile(0, 0, rows);
    for (int32_t step = 0; step < args.num_steps; ++step) {
      float* of_step = biased ? sums + step % 2 * Policy::kParts * num_padded() : nullptr;
      if (biased) {
        uint4 latent[Policy::kWarpPairs];
        read_row(args.in.markov_w1, previous, latent);
        if (warp() == 0) read_tile(step, 0, rows);
        multiply_tile(rows, latent, of_step);
        for (int32_t tile = 1; tile < num_padded() / Policy::kTile; ++tile) {
          read_tile(step, tile, rows);
          multiply_tile(rows, latent, of_step + tile * Policy::kTile);
        }
        __syncthreads();
      }
      if (filtered) {
        filter(step, of_step, law);
        of_step = nullptr;
      }
      if (warp() == 0) {
        const int32_t token = race(step, of_step);
        if (threadIdx.x == 0) args.draft_tokens[row(step)] = *winner = token;
      } else {
        if (biased && step + 1 < args.num_steps) read_tile(step + 1, 0, rows);
        if (warp() == RowPolicy::kNumWarps - 1) write_pairs(step, of_step);
      }
      __syncthreads();
      if (biased) previous = *winner;
    }
  }
};

/* token_noise() by four lanes that share the work: counters as in philox.cuh. */
__device__ __forceinline__ float noise_by_four(const Runner& runner, int32_t token) {
  if (!(runner.temperature > 0.f)) return 0.f;
  const int lane = static_cast<int>(threadIdx.x) % 4;
  const int32_t zone = token / kNoiseZone;
  /* Lane 0: the zone's least; 1: whose it is; 2: the token's own. */
  const uint32_t what = lane == 0 ? zone / kZonesPerCounter : lane == 1 ? zone : token / kQuad;
  const uint32_t kind = lane == 0 ? kMinimaWord : lane == 1 ? kWhoseWord : 0u;
  const uint4 words = philox4x32_10(
      runner.seed, make_uint4(what, static_cast<uint32_t>(runner.position), runner.purpose, kind));
  const int at = lane == 0 ? zone % kZonesPerCounter : token % kQuad;
  const uint32_t word = at == 0 ? words.x : at == 1 ? words.y : at == 2 ? words.z : words.w;
  const float exponential = exponential_from_word(word);
  const unsigned four = 0xfu << (threadIdx.x % kWarpSize / 4 * 4);
  const float least = __shfl_sync(four, exponential, 0, 4) * (1.f / kNoiseZone);
  const auto least_at = static_cast<int32_t>(__shfl_sync(four, words.x, 1, 4) % kNoiseZone);
  const float own = __shfl_sync(four, exponential, 2, 4);
  return runner.temperature * logf(token % kNoiseZone == least_at ? least : least + own);
}

/* The top of one row, each candidate to put(rank, candidate) by one lane; `runner` stands at its
 * position. ready(): before the first. */
template <bool kZoned, typename T, typename U, typename Ready, typename Put>
__device__ __forceinline__ void find_candidates(const WalkArgs<T, U>& args,
                                                const RowTop<U, kZoned>& top,
                                                const Runner& runner,
                                                Ready ready,
                                                Put put) {
  constexpr int32_t kLineBytes = 128;
  static_assert(RowPolicy::kRankLanes == 4);
  const int32_t row_bytes = args.in.markov_rank * static_cast<int32_t>(sizeof(T));
  top.find();
  ready();
  top.rank_survivors([&](int rank, RaceKey key, int lane) {
    const int32_t token = race_token(key);
    for (int32_t at = lane * kLineBytes; at < row_bytes && args.markov_w2 != nullptr;
         at += RowPolicy::kRankLanes * kLineBytes) {
      const int64_t from = static_cast<int64_t>(token) * row_bytes + at;
      prefetch_line(reinterpret_cast<const char*>(args.markov_w2) + from);
      if (args.ask_for_w1) prefetch_line(reinterpret_cast<const char*>(args.in.markov_w1) + from);
    }
    const float noise = noise_by_four(runner, token);
    if (lane == 0) put(rank, Candidate{race_score(key), noise, token});
  });
  for (int32_t i = top.state.num_survivors + static_cast<int32_t>(threadIdx.x); i < args.num_top;
       i += RowPolicy::kNumThreads) {
    put(i, Candidate{-INFINITY, 0.f, kNoCandidate});
  }
}

#endif

/* Grid: requests x CTAs of a cluster, flat. No bigrams; markov_rank a multiple of kPairColumns up to
 * kMaxRank, rows of both tables at multiples of 16 bytes. Shared memory: cluster_shared_bytes. kZoned:
 * after zone_top_kernel, whose end it need not wait for. */
template <typename T, typename U, bool kZoned>
__global__ void __launch_bounds__(RowPolicy::kNumThreads, 2)
    cluster_walk_kernel(const __grid_constant__ WalkArgs<T, U> args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_cluster[];
  __shared__ RowState state;
  __shared__ uint64_t handed_over; /* of the first CTA: the bytes of all candidates */
  __shared__ int32_t winner;
  const int32_t num_ctas = args.num_ctas;
  const int32_t req = static_cast<int32_t>(blockIdx.x) / num_ctas;
  const int32_t rank = static_cast<int32_t>(blockIdx.x) % num_ctas;
  if (threadIdx.x == 0) {
    barrier_init(&handed_over, 1);
    fence_barrier_init();
    if (rank == 0) {
      const auto bytes =
          static_cast<uint32_t>(sizeof(PlacedCandidate)) * args.num_top * args.num_steps;
      barrier_arrive_expect(&handed_over, bytes);
    }
  }
  __syncwarp();
  cluster_arrive(); /* this CTA has begun */
  auto* candidates = reinterpret_cast<PlacedCandidate*>(shared_cluster);
  unsigned char* rest = shared_cluster + cluster_candidate_bytes(args.num_top, args.num_steps);
  ClusterWalk<T, U> walk(args, req, candidates, reinterpret_cast<float*>(rest));
  rest += cluster_sum_bytes(args.num_top);
  wait_for_prerequisites();
  for (int32_t step = rank; step < args.num_steps; step += num_ctas) {
    const RowTop<U, kZoned> top = walk.template top<kZoned>(step, rest, state);
    find_candidates(
        args, top, walk.runner_at(step),
        [&] {
          if (step == rank) cluster_wait(); /* for the others to begin */
        },
        [&](int32_t i, const Candidate& candidate) {
          store_remote_counted(
              shared_address(walk.of_step(step) + i), shared_address(&handed_over), 0,
              make_uint4(__float_as_uint(candidate.logit), __float_as_uint(candidate.noise),
                         static_cast<uint32_t>(candidate.token), 0u));
        });
    __syncthreads();
  }
  if (rank != 0) return;
  barrier_wait(&handed_over, 0);
  walk.run(&winner);
#endif
}

}  // namespace dspark
