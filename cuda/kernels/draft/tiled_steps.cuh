/*
 * Steps of the draft head on tensor cores: W2 passes by once per step for all requests of a CTA,
 * and one launch runs all the steps of a vanilla head.
 *
 *   l_k(v) = U_k(v) + W2[v] . latent       written over U_k, f32; -inf where the grammar forbids v
 *   x_k    = argmax over v of l_k(v) - T log E_v     (the race of race.cuh; T = 0: argmax)
 *
 * Mapping: persistent CTAs of four warps, each walking every num_slots-th tile of tile_tokens
 * tokens, forwards on even steps and backwards on odd ones, so that the end of one pass over W2 is
 * found in L2 by the next. W2 rows and U stream through kStages buffers in shared memory (cp.async)
 * that know nothing of steps: while a step's winner travels, the next step's tiles are on their
 * way. A warp owns kMTiles x 16 requests and keeps their latents in registers as A fragments; W2
 * rows are the B operand (m16n8k16, f32 accumulation). Rows of 16 tokens lie in shared memory in
 * the order 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15, so that the accumulators of two products hold
 * four neighbouring tokens of a request in each lane: one 16-byte access of U and l and one Philox
 * call. With few requests the warps split the tokens of a tile instead.
 *
 *   requests of a CTA   1-16   17-32   33-64   65-128
 *   warps per request   4      2       1       1 (kMTiles 2)
 *   tokens per tile     64     32      32      32
 *
 * Latents. vanilla: W1[x_{k-1}], already 16-bit. gated, rnn (kParts 2): f32, split into two 16-bit
 * parts whose products are added, exact to 2^-17 (bf16) of the latent; their latents come from a
 * kernel of their own, so they launch once per step.
 *
 * Between steps: a row's winner is one atomic maximum (race_keys), pushed after every tile that
 * improves it, which is also what screens the other CTAs' tokens; then a count of arrivals, of
 * which the last writes the tokens. The wait needs a cooperative launch.
 *
 * Per step: W2 (2 * vocab_size * rank bytes) once per CTA's worth of requests (further groups find
 * it in L2) and 8 * vocab_size bytes of logits per request. Limited by that traffic. A dot is
 * summed over k in steps of 16, parts inner, whatever the tile or its neighbours.
 *
 * Limits: rank a multiple of 64, at most 256; logits rows, W1 and W2 at multiples of 16 bytes.
 */
#pragma once

#include "common/async_copy.cuh"
#include "common/grid_sync.cuh"
#include "common/mma.cuh"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/latent.cuh"
#include "kernels/draft/race.cuh"

namespace dspark {

template <int kMTilesPerWarp, int kLatentParts>
struct TiledPolicy {
  static constexpr int kMTiles = kMTilesPerWarp; /* tiles of 16 requests that a warp owns */
  static constexpr int kParts = kLatentParts;    /* 16-bit values that make up a latent */
  static constexpr int kNumWarps = 4;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kStages = 3;
  static constexpr int kMTileReqs = 16;
  static constexpr int kMaxReqs = kNumWarps * kMTiles * kMTileReqs;
  static constexpr int kMaxRank = 256;
  static constexpr int kStepRank = 16; /* columns of a product */
  static constexpr int kMaxSteps = kMaxRank / kStepRank;
  static constexpr int kStepsPerBatch = 4; /* whose W2 loads are issued together */
  static constexpr int kRankMultiple = kStepsPerBatch * kStepRank;
  static constexpr int kGroupTokens = 16; /* tokens that a warp takes at once */
  static constexpr int kPad = 8;          /* elements between W2 rows: no bank conflicts */
  static constexpr int kMinCtasPerSm = kMTiles * kParts == 1 ? 3 : 2; /* 168, 255 registers */
};

template <typename T>
struct TiledArgs {
  HeadInputs<T> in;
  const T* markov_w2;
  const float* latent; /* [num_reqs, rank]: kParts 2 */
  float* logits;       /* [num_reqs * draft_len, vocab_size] */
  const int32_t* anchor_positions;
  const float* temperature;
  const uint64_t* seeds;
  const int32_t* rules;  /* nullptr: none is coupled */
  int32_t* draft_tokens; /* [num_reqs, draft_len] */
  RaceKey* race_keys;    /* [draft_len, num_reqs], 0 before the first step */
  uint32_t* arrivals;    /* [draft_len, num_groups], 0 before the first step */
  GrammarMask mask;
  int64_t stride_logits_row;
  int32_t first_step;
  int32_t num_steps; /* of this launch; more than one only in a cooperative launch */
  int32_t reqs_per_cta;
  int32_t num_groups; /* of reqs_per_cta requests */
  int32_t num_slots;  /* CTAs of a group */
  int32_t tile_tokens;
  int32_t num_tiles;
};

/* What a CTA works on. */
struct TiledWork {
  int32_t group;
  int32_t slot;
  int32_t first_req;
  int32_t num_reqs;
  int32_t num_tiles; /* of this CTA, at least 1 */
};

template <typename T>
__device__ __forceinline__ TiledWork tiled_work(const TiledArgs<T>& args) {
  TiledWork work;
  work.group = blockIdx.x % args.num_groups; /* neighbours share tiles */
  work.slot = blockIdx.x / args.num_groups;
  work.first_req = work.group * args.reqs_per_cta;
  work.num_reqs = min(args.reqs_per_cta, args.in.num_reqs - work.first_req);
  work.num_tiles = (args.num_tiles - work.slot + args.num_slots - 1) / args.num_slots;
  return work;
}

/* The i-th tile of a step. */
template <typename T>
__device__ __forceinline__ int32_t
tile_at(const TiledArgs<T>& args, const TiledWork& work, int32_t step, int32_t i) {
  const int32_t turn = step % 2 == 0 ? i : work.num_tiles - 1 - i;
  return work.slot + turn * args.num_slots;
}

/* Bytes of a W2 row in shared memory. */
template <typename Policy>
__host__ __device__ constexpr int32_t tiled_row_bytes(int32_t rank) {
  return (rank + Policy::kPad) * 2;
}

template <typename Policy>
__host__ __device__ constexpr int32_t tiled_stage_bytes(int32_t rank,
                                                        int32_t tile_tokens,
                                                        int32_t num_reqs) {
  return tile_tokens * (tiled_row_bytes<Policy>(rank) + num_reqs * 4);
}

/* Where token t of 16 lies: see the mapping above. */
__device__ __forceinline__ int token_slot(int t) {
  return (t & ~15) | (t >> 1 & 1) << 3 | (t >> 2 & 3) << 1 | (t & 1);
}

/* Where quad `quad` of local request q lies in its row of U: neighbouring requests use different
 * banks. */
__device__ __forceinline__ int quad_slot(int q, int quad) { return quad ^ (q & 1) << 2; }

/* Starts the copies of one tile of W2 and of U at `step`. */
template <typename Policy, typename T>
__device__ __forceinline__ void fetch_tile(
    const TiledArgs<T>& args, const TiledWork& work, int32_t step, int32_t tile, uint32_t stage) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t rank = args.in.markov_rank;
  const int32_t first_token = tile * args.tile_tokens;
  for (int t = warp; t < args.tile_tokens; t += Policy::kNumWarps) {
    const bool valid = first_token + t < args.in.vocab_size;
    const T* row = args.markov_w2 + static_cast<int64_t>(valid ? first_token + t : 0) * rank;
    const uint32_t shared_row = stage + token_slot(t) * tiled_row_bytes<Policy>(rank);
    for (int chunk = lane; chunk < rank / 8; chunk += kWarpSize) {
      copy_async_16(shared_row + chunk * 16, row + chunk * 8, valid);
    }
  }
  const uint32_t shared_logits = stage + args.tile_tokens * tiled_row_bytes<Policy>(rank);
  const int quads_per_tile = args.tile_tokens / kQuad; /* 8 or 16 */
  const int quads_log2 = quads_per_tile == 8 ? 3 : 4;
  for (int i = threadIdx.x; i < work.num_reqs * quads_per_tile; i += Policy::kNumThreads) {
    const int q = i >> quads_log2;
    const int quad = i & (quads_per_tile - 1);
    const int64_t row = static_cast<int64_t>(work.first_req + q) * args.in.draft_len + step;
    const int32_t token = first_token + quad * kQuad;
    const int32_t left = args.in.vocab_size - token;
    const int source_bytes = min(max(left, 0), kQuad) * 4;
    const float* source = args.logits + row * args.stride_logits_row + (left > 0 ? token : 0);
    copy_async_up_to_16(shared_logits + (q * quads_per_tile + quad_slot(q, quad)) * 16, source,
                        source_bytes);
  }
}

/* A fragments of 16 requests, whole rank: words (row, columns 2c and 2c + 1). */
template <typename Policy>
using LatentFragments = uint32_t[Policy::kParts][Policy::kMaxSteps][4];

/* Two neighbouring elements of a latent row as kParts words whose sum they are. */
template <typename T>
__device__ __forceinline__ void split_pair(const T* row, int32_t column, uint32_t (&words)[1]) {
  words[0] = row == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(row + column);
}

template <typename T>
__device__ __forceinline__ void split_pair(const float* row, int32_t column, uint32_t (&words)[2]) {
  const float2 pair =
      row == nullptr ? make_float2(0.f, 0.f) : *reinterpret_cast<const float2*>(row + column);
  words[0] = Element<T>::pack(pair.x, pair.y);
  const float2 high = Element<T>::unpack(words[0]);
  words[1] = Element<T>::pack(pair.x - high.x, pair.y - high.y);
}

/* W1[x_{k-1}] of a request; the winner of an earlier step is read where the race left it. */
template <typename T>
__device__ __forceinline__ const T* raced_markov_row(const TiledArgs<T>& args,
                                                     int32_t req,
                                                     int32_t step) {
  const HeadInputs<T>& in = args.in;
  const int32_t token =
      step == 0
          ? in.anchors[req]
          : race_token(__ldcg(args.race_keys + static_cast<int64_t>(step - 1) * in.num_reqs + req));
  if (token < 0 || token >= in.vocab_size) return nullptr;
  return in.markov_w1 + static_cast<int64_t>(token) * in.markov_rank;
}

/* Rows g and g + 8 of the 16 requests from local request `first` on; zeros past the last one. */
template <typename Policy, typename T>
__device__ __forceinline__ void load_latents(const TiledArgs<T>& args,
                                             const TiledWork& work,
                                             int32_t step,
                                             int first,
                                             LatentFragments<Policy>& fragments) {
  using Source = std::conditional_t<Policy::kParts == 1, T, float>;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = args.in.markov_rank;
  const Source* rows[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q = first + lane / 4 + 8 * half;
    if (q >= work.num_reqs) continue;
    if constexpr (Policy::kParts == 1) {
      rows[half] = raced_markov_row(args, work.first_req + q, step);
    } else {
      rows[half] = args.latent + static_cast<int64_t>(work.first_req + q) * rank;
    }
  }
#pragma unroll
  for (int s = 0; s < Policy::kMaxSteps; ++s) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int32_t column = s * Policy::kStepRank + lane % 4 * 2 + word / 2 * 8;
      uint32_t parts[Policy::kParts] = {};
      if (column < rank) split_pair<T>(rows[word % 2], column, parts);
#pragma unroll
      for (int part = 0; part < Policy::kParts; ++part) fragments[part][s][word] = parts[part];
    }
  }
}

/* dots[m][j] += latents of M tile m . W2 rows of product j, for the 16 tokens that start at shared
 * row address `rows` (this lane's row). */
template <typename Policy, typename T>
__device__ __forceinline__ void multiply_group(
    const LatentFragments<Policy> (&latents)[Policy::kMTiles],
    uint32_t rows,
    int32_t rank,
    float (&dots)[Policy::kMTiles][2][4]) {
#pragma unroll
  for (int first = 0; first < Policy::kMaxSteps; first += Policy::kStepsPerBatch) {
    if (first * Policy::kStepRank >= rank) break;
    uint32_t weights[Policy::kStepsPerBatch][4];
#pragma unroll
    for (int i = 0; i < Policy::kStepsPerBatch; ++i) {
      load_matrix_x4(weights[i], rows + (first + i) * Policy::kStepRank * 2);
    }
#pragma unroll
    for (int i = 0; i < Policy::kStepsPerBatch; ++i) {
#pragma unroll
      for (int m = 0; m < Policy::kMTiles; ++m) {
#pragma unroll
        for (int part = 0; part < Policy::kParts; ++part) {
          const uint32_t (&latent)[4] = latents[m][part][first + i];
          mma_m16n8k16<T>(dots[m][0], latent, weights[i][0], weights[i][1]);
          mma_m16n8k16<T>(dots[m][1], latent, weights[i][2], weights[i][3]);
        }
      }
    }
  }
}

/* Writes four tokens' logits from `token` on, over U; gives them back with -inf for tokens past the
 * vocabulary. They are not read again before the draft is done: the first to leave the caches. */
__device__ __forceinline__ float4 write_logits(float* row,
                                               int32_t token,
                                               int32_t vocab_size,
                                               float4 l) {
  const int32_t left = vocab_size - token;
  if (left >= kQuad) {
    __stcs(reinterpret_cast<float4*>(row + token), l);
    return l;
  }
  if (left > 0) row[token] = l.x;
  if (left > 1) row[token + 1] = l.y;
  if (left > 2) row[token + 2] = l.z;
  return only_allowed(l, (1u << max(left, 0)) - 1u);
}

/* Leaders of the (up to) 2 kMTiles requests of a lane. */
template <typename Policy>
struct Leaders {
  static constexpr int kSize = 2 * Policy::kMTiles;
  Indexed own[kSize];  /* the best of this thread */
  RaceKey seen[kSize]; /* the best of the row so far, as far as known */
};

/* The warp's place in its CTA: with fewer than kNumWarps groups of requests, warps share them. */
template <typename Policy>
struct WarpShare {
  int first_req; /* local */
  int part;      /* of the tile's groups of tokens: part, part + num_parts, ... */
  int num_parts;
};

template <typename Policy>
__device__ __forceinline__ WarpShare<Policy> warp_share(int32_t reqs_per_cta) {
  constexpr int kWarpReqs = Policy::kMTiles * Policy::kMTileReqs;
  const int warp = threadIdx.x / kWarpSize;
  int num_sets = 1; /* 1, 2 or 4 */
  while (num_sets * kWarpReqs < reqs_per_cta) num_sets *= 2;
  return {warp % num_sets * kWarpReqs, warp / num_sets, Policy::kNumWarps / num_sets};
}

/* The noise of a tile's zone for the requests of this lane's Leaders. The four lanes that share
 * requests make a request's each. */
template <typename Policy>
__device__ __forceinline__ void tile_zones(const Runner* runners,
                                           int first_req,
                                           int32_t num_reqs,
                                           int32_t step,
                                           int32_t zone,
                                           ZoneNoise (&zones)[Leaders<Policy>::kSize]) {
  static_assert(Leaders<Policy>::kSize <= 4);
  const int lane = threadIdx.x % kWarpSize;
  const int mine = lane % 4;
  const int q = first_req + mine / 2 * Policy::kMTileReqs + lane / 4 + mine % 2 * 8;
  ZoneNoise noise = {};
  if (mine < Leaders<Policy>::kSize && q < num_reqs && runners[q].temperature > 0.f) {
    noise = zone_noise(runners[q].seed, zone, runners[q].position + step, runners[q].purpose);
  }
#pragma unroll
  for (int i = 0; i < Leaders<Policy>::kSize; ++i) {
    zones[i].least = __shfl_sync(kAllLanes, noise.least, (lane & ~3) + i);
    zones[i].least_at = __shfl_sync(kAllLanes, noise.least_at, (lane & ~3) + i);
  }
}

/* One tile for this warp: products, logits, race. */
template <typename Policy, typename T>
__device__ __forceinline__ void run_tile(const TiledArgs<T>& args,
                                         const TiledWork& work,
                                         const WarpShare<Policy>& share,
                                         const Runner* runners,
                                         const LatentFragments<Policy> (&latents)[Policy::kMTiles],
                                         int32_t step,
                                         int32_t tile,
                                         const unsigned char* stage,
                                         Leaders<Policy>& leaders) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = args.in.markov_rank;
  const int32_t row_bytes = tiled_row_bytes<Policy>(rank);
  const int quads_per_tile = args.tile_tokens / kQuad;
  const float4* base_logits = reinterpret_cast<const float4*>(stage + args.tile_tokens * row_bytes);
  /* Lanes 0-15: product 0, its two halves of 8 columns; 16-31: product 1. */
  const uint32_t lane_row =
      shared_address(stage) + (lane / 16 * 8 + lane % 8) * row_bytes + lane / 8 % 2 * 16;
  ZoneNoise zones[Leaders<Policy>::kSize];
  tile_zones<Policy>(runners, share.first_req, work.num_reqs, step,
                     tile * args.tile_tokens / kNoiseZone, zones);
  for (int group = share.part; group < args.tile_tokens / Policy::kGroupTokens;
       group += share.num_parts) {
    float dots[Policy::kMTiles][2][4] = {};
    multiply_group<Policy, T>(latents, lane_row + group * Policy::kGroupTokens * row_bytes, rank,
                              dots);
    const int quad = group * (Policy::kGroupTokens / kQuad) + lane % 4;
    const int32_t token = tile * args.tile_tokens + quad * kQuad;
#pragma unroll
    for (int i = 0; i < Leaders<Policy>::kSize; ++i) {
      const int m = i / 2;
      const int half = i % 2;
      const int q = share.first_req + m * Policy::kMTileReqs + lane / 4 + 8 * half;
      if (q >= work.num_reqs || token >= args.in.vocab_size) continue;
      float4 l = base_logits[q * quads_per_tile + quad_slot(q, quad)];
      l = make_float4(l.x + dots[m][0][2 * half], l.y + dots[m][0][2 * half + 1],
                      l.z + dots[m][1][2 * half], l.w + dots[m][1][2 * half + 1]);
      const int64_t row = static_cast<int64_t>(work.first_req + q) * args.in.draft_len + step;
      l = only_allowed(l, allowed_in_quad(args.mask, row, token / kQuad));
      l = write_logits(args.logits + row * args.stride_logits_row, token, args.in.vocab_size, l);
      Runner runner = runners[q];
      runner.position += step;
      const float bound = screen_bound(race_score(leaders.seen[i]), runner.temperature);
      race_screened(leaders.own[i], l, runner, zones[i], bound, token / kQuad);
    }
    __syncwarp(); /* the next products need all lanes */
  }
}

/* Pushes this warp's leaders where they improve on what is known of the row. */
template <typename Policy>
__device__ __forceinline__ void publish(Leaders<Policy>& leaders,
                                        RaceKey* keys, /* of the CTA's requests at this step */
                                        int first_req,
                                        int32_t num_reqs) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < Leaders<Policy>::kSize; ++i) {
    const int q = first_req + i / 2 * Policy::kMTileReqs + lane / 4 + i % 2 * 8;
    const RaceKey key = race_key(warp_reduce<4>(leaders.own[i], ArgmaxOp{}));
    if (key <= leaders.seen[i]) continue;
    leaders.seen[i] = key;
    if (lane % 4 == 0 && q < num_reqs) atomicMax(keys + q, key);
  }
}

/* All tiles of one step for this CTA. `fetch` starts the next tile's copies. */
template <typename Policy, typename T, typename Fetch>
__device__ __forceinline__ void run_step(const TiledArgs<T>& args,
                                         const TiledWork& work,
                                         const WarpShare<Policy>& share,
                                         const Runner* runners,
                                         int32_t step,
                                         const unsigned char* stages,
                                         int32_t stage_bytes,
                                         int& stage,
                                         Fetch fetch) {
  const int lane = threadIdx.x % kWarpSize;
  LatentFragments<Policy> latents[Policy::kMTiles];
#pragma unroll
  for (int m = 0; m < Policy::kMTiles; ++m) {
    load_latents<Policy, T>(args, work, step, share.first_req + m * Policy::kMTileReqs, latents[m]);
  }
  RaceKey* keys = args.race_keys + static_cast<int64_t>(step) * args.in.num_reqs + work.first_req;
  Leaders<Policy> leaders;
#pragma unroll
  for (int i = 0; i < Leaders<Policy>::kSize; ++i) {
    leaders.own[i] = empty_race();
    leaders.seen[i] = kEmptyRaceKey;
  }
  for (int32_t i = 0; i < work.num_tiles; ++i) {
    copy_async_wait<Policy::kStages - 2>();
    __syncthreads(); /* the tile is there, and the buffer that `fetch` fills is free */
    fetch();
    /* Asked for now, used after the tile. */
    RaceKey latest[Leaders<Policy>::kSize] = {};
#pragma unroll
    for (int j = 0; j < Leaders<Policy>::kSize; ++j) {
      const int q = share.first_req + j / 2 * Policy::kMTileReqs + lane / 4 + j % 2 * 8;
      if (q < work.num_reqs) latest[j] = __ldcg(keys + q);
    }
    run_tile<Policy, T>(args, work, share, runners, latents, step, tile_at(args, work, step, i),
                        stages + stage * stage_bytes, leaders);
#pragma unroll
    for (int j = 0; j < Leaders<Policy>::kSize; ++j) {
      leaders.seen[j] = max(leaders.seen[j], latest[j]);
    }
    publish<Policy>(leaders, keys, share.first_req, work.num_reqs);
    stage = stage + 1 == Policy::kStages ? 0 : stage + 1;
  }
}

/* Counts this CTA in; the last of its group writes the step's tokens. With `wait` returns when the
 * group's races of the step are decided. */
template <typename T>
__device__ __forceinline__ void finish_step(const TiledArgs<T>& args,
                                            const TiledWork& work,
                                            int32_t step,
                                            bool wait) {
  __shared__ bool is_last;
  uint32_t* arrivals = args.arrivals + static_cast<int64_t>(step) * args.num_groups + work.group;
  __syncthreads(); /* all warps have published */
  if (threadIdx.x == 0) {
    is_last = arrive(arrivals) + 1 == static_cast<uint32_t>(args.num_slots);
    if (wait) wait_for_arrivals(arrivals, args.num_slots);
  }
  __syncthreads();
  if (!is_last) return;
  for (int q = threadIdx.x; q < work.num_reqs; q += blockDim.x) {
    const int64_t req = work.first_req + q;
    const RaceKey key =
        __ldcg(args.race_keys + static_cast<int64_t>(step) * args.in.num_reqs + req);
    args.draft_tokens[req * args.in.draft_len + step] = race_token(key);
  }
}

/* Grid: num_slots x num_groups, flat. Shared memory: kStages stages. */
template <typename T, typename Policy>
__global__ void __launch_bounds__(Policy::kNumThreads, Policy::kMinCtasPerSm)
    tiled_steps_kernel(TiledArgs<T> args) {
  extern __shared__ float4 shared_stages[];
  __shared__ Runner runners[Policy::kMaxReqs];
  const TiledWork work = tiled_work(args);
  const WarpShare<Policy> share = warp_share<Policy>(args.reqs_per_cta);
  const auto* stages = reinterpret_cast<const unsigned char*>(shared_stages);
  const int32_t stage_bytes =
      tiled_stage_bytes<Policy>(args.in.markov_rank, args.tile_tokens, args.reqs_per_cta);
  for (int q = threadIdx.x; q < work.num_reqs; q += Policy::kNumThreads) {
    const int32_t req = work.first_req + q;
    const float temperature = args.temperature[req];
    runners[q] = {args.seeds[req], temperature, 1.44269504f / temperature,
                  args.anchor_positions[req] + 1, draft_purpose(args.rules, req)};
  }

  const int32_t last_step = args.first_step + args.num_steps;
  int32_t fetch_step = args.first_step;
  int32_t fetch_tile_index = 0;
  int fetch_stage = 0;
  const auto fetch = [&] {
    if (fetch_step < last_step) {
      fetch_tile<Policy>(args, work, fetch_step, tile_at(args, work, fetch_step, fetch_tile_index),
                         shared_address(stages) + fetch_stage * stage_bytes);
      fetch_stage = fetch_stage + 1 == Policy::kStages ? 0 : fetch_stage + 1;
      if (++fetch_tile_index == work.num_tiles) {
        fetch_tile_index = 0;
        ++fetch_step;
      }
    }
    copy_async_commit(); /* possibly empty: one group per tile keeps the count */
  };
  for (int i = 0; i < Policy::kStages - 1; ++i) fetch();

  int stage = 0;
  for (int32_t step = args.first_step; step < last_step; ++step) {
    run_step<Policy, T>(args, work, share, runners, step, stages, stage_bytes, stage, fetch);
    finish_step(args, work, step, step + 1 < last_step);
  }
}

}  // namespace dspark
