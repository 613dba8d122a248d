/*
 * How the work of an attention pass is cut: keys into tiles, rows into M tiles, tiles into the
 * segments that CTAs walk. The attention kernel, the merge kernel and the host's configuration
 * read the same rules here; plain C++.
 *
 * A CTA works for one KV head; all KV heads are cut alike. Three forms of work:
 *
 *   balanced  The key tiles of all (request, M tile) pairs of the pass stand in one line, cut into
 *             chunks of equal length (to one tile), one for each resident CTA. The line is measured
 *             on the device, so any lengths balance, whatever the launch was sized for. A chunk
 *             leaves at most two partial results, where the line is cut: the memory they take
 *             depends on the GPU, not on the context.
 *   clusters  Where the requests are few, each one M tile, and of about one length, the CTAs of a cluster
 *             share the keys of one of them and merge by themselves (cluster_merge.cuh). The lengths
 *             are known on the device only: it forms clusters or, where they are too uneven, takes
 *             the balanced form.
 *   fixed     The CTAs of a request share its M tiles and splits of their keys, by the request's
 *             own rows and length: its result does not depend on its neighbours.
 *
 * A partial result has a slot. Those of one M tile are merged in the order of the keys:
 *   balanced  chunk c leaves slot 2 c when it begins an M tile that it cannot end, and 2 c + 1 when it
 *             goes on with one that an earlier chunk began
 *   fixed     one slot per CTA: first, first + 1, first + 2 ..
 *
 * Where results must not depend on the batch (has_parts), the balanced form sums up in one order: the
 * tiles of an M tile form parts, by the request's own length; chunks are cut between parts; parts
 * are summed up from the first to the last. The chunk c that an M tile begins in adds up the parts
 * that it has and leaves the sum in slot s c, s = slots_per_chunk(); chunks that go on leave every
 * part p for itself in slot s c + p, and the merge adds them to that sum one by one, as a CTA that
 * has them all does.
 */
#pragma once

#include <cstdint>

#include "kernels/attention/policy.h"

#if defined(__CUDACC__)
#define DSPARK_HOST_DEVICE __host__ __device__
#else
#define DSPARK_HOST_DEVICE
#endif

namespace dspark {

/* Fixed form: the most CTAs per (request, KV head) that splits alone may ask for, and the fewest
 * tiles that make a split worth merging. */
constexpr int kMaxSplits = 16;
constexpr int kMinTilesPerSplit = 4;
/* Below this a chunk of the paged kernel costs more in merging than its CTA saves. */
constexpr int kMinTilesPerChunk = 4;
constexpr int kMinTilesPerStreamChunk = 2; /* and of the streaming one */
/* Chunks that can be a cluster: what any device with clusters can run. */
constexpr int kMaxClusterCtas = 8;
/* Requests of a pass that forms clusters: a lane looks at each. */
constexpr int kMaxClusterReqs = 32;
/* Parts of an M tile where the order of sums must not depend on the batch. */
constexpr int kMaxParts = 16;
constexpr int kMinTilesPerPart = 2;

DSPARK_HOST_DEVICE constexpr int num_key_tiles(int keys) {
  /* Not (keys + 63) / 64: keys may be close to INT32_MAX. */
  return keys / kTileKeys + (keys % kTileKeys != 0);
}

/* Division of numbers in [0, 2^31) by one divisor >= 1: a multiplication and a shift. */
struct Divider {
  uint32_t multiplier; /* 0: the divisor is 1 */
  uint32_t shift;

  static Divider by(int32_t divisor) {
    if (divisor == 1) return {0, 0};
    uint32_t bits = 0; /* 2^bits >= divisor */
    while ((int64_t{1} << bits) < divisor) ++bits;
    /* 2^(31 + bits) / divisor, rounded up: too large by less than 2^bits / 2^31 of itself. */
    return {
        static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / static_cast<uint32_t>(divisor)) + 1,
        bits - 1};
  }
  DSPARK_HOST_DEVICE int32_t quotient(int32_t n) const {
    if (multiplier == 0) return n;
#if defined(__CUDA_ARCH__)
    return static_cast<int32_t>(__umulhi(static_cast<uint32_t>(n), multiplier) >> shift);
#else
    return static_cast<int32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >>
                                (32 + shift));
#endif
  }
};

/* The line of tiles cut into `count` chunks of one length, but that the last may be shorter. */
struct Chunks {
  int32_t num_tiles;
  int32_t length;

  DSPARK_HOST_DEVICE int32_t count() const {
    return num_tiles == 0 ? 0 : (num_tiles - 1) / length + 1;
  }
  /* First tile of a chunk; of those past the last, the end of the line. */
  DSPARK_HOST_DEVICE int32_t begin(int32_t chunk) const {
    const int64_t tile = int64_t{chunk} * length;
    return tile < num_tiles ? static_cast<int32_t>(tile) : num_tiles;
  }
  /* The chunk that tile `position` lies in. */
  DSPARK_HOST_DEVICE int32_t chunk_of(int32_t position) const { return position / length; }
};

/* Fixed at launch by the sizes in the params. CTA b of the grid has KV head b % num_kv_heads and
 * item b / num_kv_heads. */
struct WorkPlan {
  int32_t num_chunks;   /* balanced: bound on the chunks; items are chunks. 0: the fixed form */
  int32_t ctas_per_req; /* fixed: per KV head; items are req * ctas_per_req + CTA */
  int32_t max_splits;   /* fixed: per M tile */
  int32_t min_tiles_per_chunk;
  int32_t cluster_ctas; /* balanced: of a request and KV head, where clusters suit; or at most 1 */
  bool has_parts; /* balanced: chunks end where parts end, and parts are summed up one by one */
  Divider by_num_chunks;

  DSPARK_HOST_DEVICE bool is_balanced() const { return num_chunks > 0; }

  /* As few chunks as the longest of num_chunks equal ones allows: merging costs, idle CTAs do not. */
  DSPARK_HOST_DEVICE Chunks cut(int32_t tiles) const {
    return cut_into(tiles, tiles == 0 ? 1 : by_num_chunks.quotient(tiles - 1) + 1);
  }
  /* Base 2 logarithm of the CTAs of a cluster. */
  DSPARK_HOST_DEVICE int cluster_shift() const {
    return cluster_ctas >= 8 ? 3 : (cluster_ctas >= 4 ? 2 : (cluster_ctas >= 2 ? 1 : 0));
  }
  /* Whether a pass, of whose requests the longest has so many of all tiles, is even enough for the
   * same share of the GPU to each request, or short enough. */
  DSPARK_HOST_DEVICE bool suits_clusters(int num_reqs, int32_t longest, int32_t tiles) const {
    if (longest <= cluster_ctas * min_tiles_per_chunk) return true;
    return int64_t{4} * num_reqs * longest <= int64_t{5} * tiles;
  }
  /* Chunks of length `even`, or of the least that is worth a CTA. */
  DSPARK_HOST_DEVICE Chunks cut_into(int32_t tiles, int32_t even) const {
    return {tiles, even > min_tiles_per_chunk ? even : min_tiles_per_chunk};
  }

  /* Splits of each M tile of a request in the fixed form. */
  DSPARK_HOST_DEVICE int splits_of(int num_m_tiles, int num_tiles) const {
    int splits = num_tiles / kMinTilesPerSplit;
    if (splits > max_splits / num_m_tiles) splits = max_splits / num_m_tiles;
    if (splits > ctas_per_req / num_m_tiles) splits = ctas_per_req / num_m_tiles;
    return splits < 1 ? 1 : splits;
  }

  /* Slots of a chunk for partial results. */
  DSPARK_HOST_DEVICE int slots_per_chunk() const { return has_parts ? kMaxParts + 1 : 2; }
};

/* Tiles of a part (but the last) of an M tile with so many: by the request's own length. */
DSPARK_HOST_DEVICE constexpr int part_tiles(int tiles) {
  return tiles <= kMaxParts * kMinTilesPerPart ? kMinTilesPerPart : (tiles - 1) / kMaxParts + 1;
}

/* The first cache slot in the window (0: none) of a row that stands `place` places after the
 * committed tokens; the window ends with the row itself. At most seq_len + place. */
DSPARK_HOST_DEVICE inline int window_begin(int seq_len, int place, int window) {
  if (window == 0) return 0;
  const int begin = seq_len + place + 1 - window;
  return begin > 0 ? begin : 0;
}

}  // namespace dspark
