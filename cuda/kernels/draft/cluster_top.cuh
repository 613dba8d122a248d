/*
 * The K largest logits of a row, by one CTA that reads the row once (sm_90).
 *
 * Every thread reads its own pieces of 16 bytes by way of its own places in shared memory and keeps the
 * largest logit of each zone of 64 of its tokens in a register: nothing is exchanged while the row
 * comes. Or the maxima of zones have been found before. Each warp names the K / 16 best zones of
 * different lanes, so that the least of these is a bound that K zones reach; among the zones that do the
 * K-th is found by bisection, only zones that reach it are read again (from L2), and what reaches it
 * there is ranked by counting, so that equal logits come in order of index and nothing depends on the
 * order of atomics. Should more reach it than fit, as in a row of equal logits, the K-th key itself is
 * found by bisection over those zones: slower, not wrong.
 *
 * NaN, -inf and what a grammar forbids are not candidates. Keys as in race.cuh.
 */
#pragma once

#include "common/async_copy.cuh"
#include "kernels/draft/top_k.cuh"

namespace dspark {

struct RowPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kBatch = 4;   /* pieces of a thread that are waited for at once */
  static constexpr int kBatches = 3; /* on their way */
  static constexpr int kPieceBytes = 16;
  static constexpr int kZoneTokens = 64;
  static constexpr int kZonesPerThread = 8;
  static constexpr int kMaxZones = kZonesPerThread * kNumThreads;
  static constexpr int kMaxVocab = kMaxZones * kZoneTokens;
  static constexpr int kMaxSurvivors = 2048;
  static constexpr int kMaxRanked = 512; /* zones */
  static constexpr int kRankLanes = 4;   /* that rank a zone or a survivor */
  static constexpr size_t kRingBytes = size_t{kBatches} * kBatch * kNumThreads * kPieceBytes;
};

/* What a CTA knows of its row once it has come; lies where the pieces were. */
struct RowLists {
  RaceKey survivors[RowPolicy::kMaxSurvivors];
  uint16_t zones[RowPolicy::kMaxZones];
  uint32_t tops[RowPolicy::kMaxRanked]; /* of the first ones */
};
static_assert(sizeof(RowLists) <= RowPolicy::kRingBytes);

/* Static shared memory. */
struct RowState {
  uint32_t bounds[RowPolicy::kNumWarps]; /* of the zone maxima, by warps */
  uint32_t bound;
  int counts[2][RowPolicy::kNumWarps];
  int num_zones;
  int num_survivors;
};

/* logit_order of the lowest number. */
constexpr uint32_t kLowestOrder = 0x00800000u;

/* kZoned: the zones are neighbouring tokens whose maxima a kernel before has found; else pieces of a
 * thread, whose maxima are found here. */
template <typename U, bool kZoned>
struct RowTop {
  static constexpr int kTokens = RowPolicy::kPieceBytes / static_cast<int>(sizeof(U));
  static constexpr int kZonePieces = RowPolicy::kZoneTokens / kTokens;
  static constexpr uint32_t kStride = RowPolicy::kNumThreads * RowPolicy::kPieceBytes;
  using Tops = uint32_t[RowPolicy::kZonesPerThread];

  const U* logits;     /* of the row */
  const int32_t* mask; /* of the row; nullptr: none */
  int32_t vocab_size;
  int32_t num_top;
  bool aligned;              /* the row starts at a multiple of 16 bytes */
  const uint32_t* zone_tops; /* kZoned: of the row */
  int32_t num_zones;
  unsigned char* shared; /* a ring, unless kZoned, then lists */
  RowState& state;

  __device__ __forceinline__ RowLists& lists() const {
    return *reinterpret_cast<RowLists*>(shared);
  }

  /* First token of a thread's i-th piece. */
  static __device__ __forceinline__ int32_t token_of(int32_t i, int32_t thread) {
    return (i * RowPolicy::kNumThreads + thread) * kTokens;
  }
  /* Of a piece of a listed zone. */
  static __device__ __forceinline__ int32_t token_in_zone(int32_t zone, int32_t piece) {
    return kZoned ? zone * RowPolicy::kZoneTokens + piece * kTokens
                  : token_of(zone / RowPolicy::kNumThreads * kZonePieces + piece,
                             zone % RowPolicy::kNumThreads);
  }
  __device__ __forceinline__ bool whole(int32_t token) const {
    return aligned && token + kTokens <= vocab_size;
  }

  /* Logits of a piece, -inf past the row's end and for what is forbidden; `raw` where it is whole. */
  __device__ __forceinline__ void unpack(int32_t token,
                                         const uint4& raw,
                                         float (&values)[kTokens]) const {
    if (whole(token)) {
      if constexpr (sizeof(U) == 4) {
        unpack_vec(raw, values);
      } else {
        unpack_vec<U>(raw, values);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        values[i] = token + i < vocab_size ? Element<U>::to_float(logits[token + i]) : -INFINITY;
      }
    }
    if (mask == nullptr || token >= vocab_size) return;
    const uint32_t allowed = static_cast<uint32_t>(mask[token / 32]) >> token % 32;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if ((allowed >> i & 1u) == 0) values[i] = -INFINITY;
    }
  }

  /* The largest logit of a piece. */
  __device__ __forceinline__ float top_of(int32_t token, const uint4& raw) const {
    if (sizeof(U) == 2 && mask == nullptr && whole(token)) {
      const auto pair = [](uint32_t word) { return *reinterpret_cast<__nv_bfloat162*>(&word); };
      const __nv_bfloat162 top =
          __hmax2(__hmax2(pair(raw.x), pair(raw.y)), __hmax2(pair(raw.z), pair(raw.w)));
      return fmaxf(__low2float(top), __high2float(top));
    }
    float values[kTokens];
    unpack(token, raw, values);
    float top = values[0];
#pragma unroll
    for (int i = 1; i < kTokens; ++i) top = fmaxf(top, values[i]);
    return top;
  }

  /* Starts the reads of a batch of this thread's pieces into its places. */
  __device__ __forceinline__ void request(int32_t batch, uint32_t places) const {
#pragma unroll
    for (int i = 0; i < RowPolicy::kBatch; ++i) {
      const int32_t token = token_of(batch * RowPolicy::kBatch + i, threadIdx.x);
      if (whole(token)) copy_async_16(places + i * kStride, logits + token, true);
    }
    copy_async_commit();
  }

  /* The largest logits of this thread's zones, see logit_order. */
  __device__ __forceinline__ void scan(Tops& tops) const {
    constexpr int kBatch = RowPolicy::kBatch;
    constexpr uint32_t kBatchBytes = kBatch * kStride;
    const auto* own = shared + threadIdx.x * RowPolicy::kPieceBytes;
    const uint32_t first = shared_address(own);
    const int32_t num_batches = (vocab_size - 1) / (kTokens * RowPolicy::kNumThreads * kBatch) + 1;
    for (int i = 0; i < RowPolicy::kBatches; ++i) request(i, first + i * kBatchBytes);
    uint32_t place = 0;
#pragma unroll
    for (int z = 0; z < RowPolicy::kZonesPerThread; ++z) {
      float top = -INFINITY;
#pragma unroll 1
      for (int32_t j = z * kZonePieces / kBatch;
           j < min((z + 1) * kZonePieces / kBatch, num_batches); ++j) {
        copy_async_wait<RowPolicy::kBatches - 1>();
        uint4 raw[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          raw[i] = *reinterpret_cast<const uint4*>(own + place + i * kStride);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          top = fmaxf(top, top_of(token_of(j * kBatch + i, threadIdx.x), raw[i]));
        }
        request(j + RowPolicy::kBatches, first + place);
        place = place == (RowPolicy::kBatches - 1) * kBatchBytes ? 0 : place + kBatchBytes;
      }
      tops[z] = logit_order(top);
    }
    copy_async_wait<0>();
  }

  /* The same where they have been found. */
  __device__ __forceinline__ void read_tops(Tops& tops) const {
#pragma unroll
    for (int z = 0; z < RowPolicy::kZonesPerThread; ++z) {
      const int32_t zone = z * RowPolicy::kNumThreads + static_cast<int32_t>(threadIdx.x);
      tops[z] = zone < num_zones ? __ldcg(zone_tops + zone) : 0u;
    }
  }

  /* What at least num_top zone maxima reach, if so many can be drawn: every warp has its share of
   * them, of different lanes, the least of which is the bound. */
  __device__ __forceinline__ uint32_t loose_bound(const Tops& tops) const {
    const int quota = (num_top + RowPolicy::kNumWarps - 1) / RowPolicy::kNumWarps;
    uint32_t top = tops[0]; /* of the lane, until it is counted */
#pragma unroll
    for (int z = 1; z < RowPolicy::kZonesPerThread; ++z) top = max(top, tops[z]);
    uint32_t bound = 0;
    for (int counted = 0; counted < quota;) {
      bound = __reduce_max_sync(kAllLanes, top);
      counted += __popc(__ballot_sync(kAllLanes, top == bound));
      if (top == bound) top = 0;
    }
    if (threadIdx.x % kWarpSize == 0) state.bounds[threadIdx.x / kWarpSize] = bound;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < RowPolicy::kNumWarps; ++warp) bound = min(bound, state.bounds[warp]);
    return max(bound, kLowestOrder);
  }

  /* Lists the zones that reach a bound which at least num_top of them reach, if so many can be drawn,
   * and returns such a bound: the num_top-th of the zone maxima, rounded down, or a looser
   * one where that is not worth it. */
  __device__ __forceinline__ uint32_t list_zones(const Tops& tops) const {
    const uint32_t loose = loose_bound(tops); /* a barrier */
#pragma unroll
    for (int z = 0; z < RowPolicy::kZonesPerThread; ++z) {
      if (tops[z] < loose) continue;
      const int at = atomicAdd(&state.num_zones, 1);
      lists().zones[at] = static_cast<uint16_t>(z * RowPolicy::kNumThreads + threadIdx.x);
      if (at < RowPolicy::kMaxRanked) lists().tops[at] = tops[z];
    }
    __syncthreads();
    const int count = state.num_zones;
    if (count <= num_top || count > RowPolicy::kMaxRanked) return loose;
    if (threadIdx.x < kWarpSize) {
      const uint32_t bound = bisect(count, loose);
      if (threadIdx.x == 0) state.bound = bound;
    }
    __syncthreads();
    return state.bound;
  }

  /* By a warp: what num_top of the first `count` listed zones reach, all of which reach `loose`. */
  __device__ __forceinline__ uint32_t bisect(int count, uint32_t loose) const {
    constexpr int kLowBits = 16; /* a bf16 is the rest; of an f32 these are rounded down */
    constexpr int kPerLane = RowPolicy::kMaxRanked / kWarpSize;
    uint32_t own[kPerLane];
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = j * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
      own[j] = i < count ? lists().tops[i] >> kLowBits : 0u;
      most = max(most, own[j]);
    }
    uint32_t reached = loose >> kLowBits; /* by num_top zones */
    uint32_t beyond = __reduce_max_sync(kAllLanes, most) + 1;
    while (beyond - reached > 1) {
      const uint32_t trial = (reached + beyond) / 2;
      int reaching = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) reaching += own[j] >= trial;
      if (__reduce_add_sync(kAllLanes, reaching) >= num_top) {
        reached = trial;
      } else {
        beyond = trial;
      }
    }
    return max(reached << kLowBits, loose);
  }

  /* Reads the listed zones whose maximum reaches `least`, kAtOnce for a group of lanes at a time, and
   * calls visit(values, token) for every piece. */
  template <typename Visit>
  __device__ __forceinline__ void visit_zones(uint32_t least, Visit visit) const {
    constexpr int kAtOnce = sizeof(U) == 4 ? 4 : 3;
    constexpr int kGroups = RowPolicy::kNumThreads / kZonePieces;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kZonePieces;
    for (int32_t base = threadIdx.x / kZonePieces; base < state.num_zones;
         base += kAtOnce * kGroups) {
      uint4 raw[kAtOnce] = {};
      int32_t tokens[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t i = base + k * kGroups;
        tokens[k] = vocab_size;
        if (i >= state.num_zones) continue;
        if (i < RowPolicy::kMaxRanked && lists().tops[i] < least) continue;
        tokens[k] = token_in_zone(lists().zones[i], lane);
        if (whole(tokens[k])) raw[k] = __ldcg(reinterpret_cast<const uint4*>(logits + tokens[k]));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (tokens[k] >= vocab_size) continue;
        float values[kTokens];
        unpack(tokens[k], raw[k], values);
        visit(values, tokens[k]);
      }
    }
  }

  /* Which of a piece's logits reach a key, a bit each. */
  static __device__ __forceinline__ uint32_t reaching(const float (&values)[kTokens],
                                                      int32_t token,
                                                      RaceKey bound) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const bool reaches = values[j] > -INFINITY && race_key({values[j], token + j}) >= bound;
      bits |= static_cast<uint32_t>(reaches) << j;
    }
    return bits;
  }

  /* Keys of the listed zones from `least` on whose logits `reach` names go to the list, as many as fit. */
  template <typename Reach>
  __device__ __forceinline__ void collect(uint32_t least, Reach reach) const {
    visit_zones(least, [&](const float (&values)[kTokens], int32_t token) {
      const uint32_t bits = reach(values, token);
      if (bits == 0) return;
      int at = atomicAdd(&state.num_survivors, __popc(bits));
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        if ((bits >> j & 1u) == 0) continue;
        if (at < RowPolicy::kMaxSurvivors) lists().survivors[at] = race_key({values[j], token + j});
        ++at;
      }
    });
    __syncthreads();
  }

  /* The num_top largest keys, and few more, into the list. */
  __device__ __forceinline__ void find() const {
    if (threadIdx.x == 0) state.num_zones = state.num_survivors = 0;
    Tops tops;
    if constexpr (kZoned) {
      read_tops(tops);
    } else {
      scan(tops);
    }
    const uint32_t bound = list_zones(tops); /* a barrier, at least */
    const float least = race_score(static_cast<RaceKey>(bound) << 32);
    collect(bound, [&](const float (&values)[kTokens], int32_t) {
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < kTokens; ++j) bits |= static_cast<uint32_t>(values[j] >= least) << j;
      return bits;
    });
    if (state.num_survivors <= RowPolicy::kMaxSurvivors) return;
    CtaCounter<RowPolicy::kNumWarps> counter{state.counts, 0};
    const RaceKey last = largest_reached<0, RaceKey>(num_top, [&](RaceKey trial) {
      int count = 0;
      visit_zones(bound, [&](const float (&values)[kTokens], int32_t token) {
        count += __popc(reaching(values, token, trial));
      });
      return counter.sum(count);
    });
    __syncthreads();
    if (threadIdx.x == 0) state.num_survivors = 0;
    __syncthreads();
    collect(bound, [&](const float (&values)[kTokens], int32_t token) {
      return reaching(values, token, last);
    });
  }

  /* Calls take(rank, key, lane) by kRankLanes lanes for each of the num_top largest keys. */
  template <typename Take>
  __device__ __forceinline__ void rank_survivors(Take take) const {
    constexpr int kLanes = RowPolicy::kRankLanes;
    const int count = state.num_survivors;
    const RaceKey* survivors = lists().survivors;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    for (int base = 0; base < count; base += RowPolicy::kNumThreads / kLanes) {
      const int i = base + static_cast<int>(threadIdx.x) / kLanes;
      const RaceKey key = i < count ? survivors[i] : kEmptyRaceKey;
      int rank = 0;
#pragma unroll 8
      for (int other = lane; other < count; other += kLanes) rank += survivors[other] > key;
      rank = warp_reduce<kLanes>(rank, SumOp{});
      if (i < count && rank < num_top) take(rank, key, lane);
    }
  }
};

}  // namespace dspark
