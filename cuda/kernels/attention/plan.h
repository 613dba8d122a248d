/*
 * How the work of an attention pass is cut: keys into tiles, rows into M tiles, tiles into the
 * segments that CTAs walk. The attention kernel, the merge kernel and the host's configuration
 * read the same rules here; plain C++.
 *
 * A CTA works for one KV head; all KV heads are cut alike. Two forms of work:
 *
 *   balanced  The key tiles of all (request, M tile) pairs of the pass stand in one line, cut into
 *             chunks of equal length (to one tile), one for each resident CTA. The line is measured
 *             on the device, so any lengths balance, whatever the launch was sized for. A chunk
 *             leaves at most two partial results, where the line is cut: the memory they take
 *             depends on the GPU, not on the context.
 *   fixed     The CTAs of a request share its M tiles and splits of their keys, by the request's
 *             own rows and length: its result does not depend on its neighbours.
 *
 * A partial result has a slot. Those of one M tile are merged in the order of the keys:
 *   balanced  chunk c leaves slot 2 c when it goes on with an M tile that an earlier chunk began,
 *             and slot 2 c + 1 when it begins one that it cannot end: first, first + 1, first + 3 ..
 *   fixed     one slot per CTA: first, first + 1, first + 2 ..
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
/* Below this a chunk costs more in merging than its CTA saves. */
constexpr int kMinTilesPerChunk = 4;

DSPARK_HOST_DEVICE constexpr int num_key_tiles(int keys) {
  /* Not (keys + 63) / 64: keys may be close to INT32_MAX. */
  return keys / kTileKeys + (keys % kTileKeys != 0);
}

/* Fixed at launch by the sizes in the params. CTA b of the grid has KV head b % num_kv_heads and
 * item b / num_kv_heads. */
struct WorkPlan {
  int32_t num_chunks;   /* balanced: bound on the chunks; items are chunks. 0: the fixed form */
  int32_t ctas_per_req; /* fixed: per KV head; items are req * ctas_per_req + CTA */
  int32_t max_splits;   /* fixed: per M tile */

  DSPARK_HOST_DEVICE bool is_balanced() const { return num_chunks > 0; }

  /* Splits of each M tile of a request in the fixed form. */
  DSPARK_HOST_DEVICE int splits_of(int num_m_tiles, int num_tiles) const {
    int splits = num_tiles / kMinTilesPerSplit;
    if (splits > max_splits / num_m_tiles) splits = max_splits / num_m_tiles;
    if (splits > ctas_per_req / num_m_tiles) splits = ctas_per_req / num_m_tiles;
    return splits < 1 ? 1 : splits;
  }

  /* The slot of partial i of an M tile whose first partial has slot `first`. */
  DSPARK_HOST_DEVICE int slot(int first, int i) const {
    if (!is_balanced() || i == 0) return first + i;
    return first + 2 * i - 1;
  }
};

/* The line of tiles cut into `count` chunks whose lengths differ by one at most; none is empty. */
struct Chunks {
  int64_t num_tiles;
  int64_t count;

  DSPARK_HOST_DEVICE Chunks(int64_t tiles, int64_t num_chunks)
      : num_tiles(tiles), count(num_chunks) {}

  /* As few chunks as the longest of max_chunks equal ones allows: merging costs, idle CTAs do not. */
  static DSPARK_HOST_DEVICE Chunks cut(int64_t tiles, int max_chunks) {
    if (tiles == 0) return {0, 0};
    const int64_t even = (tiles + max_chunks - 1) / max_chunks;
    const int64_t longest = even > kMinTilesPerChunk ? even : kMinTilesPerChunk;
    return {tiles, (tiles + longest - 1) / longest};
  }
  /* First tile of a chunk; of chunk `count`, the end of the line. */
  DSPARK_HOST_DEVICE int64_t begin(int64_t chunk) const { return chunk * num_tiles / count; }
  /* The chunk that tile `position` lies in. */
  DSPARK_HOST_DEVICE int64_t chunk_of(int64_t position) const {
    return ((position + 1) * count - 1) / num_tiles;
  }
};

/* The first cache slot in the window (0: none) of a row that stands `place` places after the
 * committed tokens; the window ends with the row itself. At most seq_len + place. */
DSPARK_HOST_DEVICE inline int window_begin(int seq_len, int place, int window) {
  if (window == 0) return 0;
  const int begin = seq_len + place + 1 - window;
  return begin > 0 ? begin : 0;
}

}  // namespace dspark
