/*
 * Walks the segments of one CTA. See plan.h for the rules and paged_attention.cuh for the use.
 *
 * All threads of the CTA walk alike; the search for the beginning of a chunk is made by every warp
 * for itself, 32 requests at a time, so that it needs no barrier.
 */
#pragma once

#include "kernels/attention/tile.cuh"

namespace dspark {

/* In shared memory, one per warp: registers are for the products. */
struct CursorState {
  Segment segment;
  int64_t num_tiles; /* of the line; only the scribe's are set */
  int64_t num_chunks;
  int remaining; /* balanced: tiles of the chunk after the segment; fixed: 0 */
};

template <typename T, typename Policy>
struct WorkCursor {
  const AttentionArgs<T>& args;
  CursorState& state;
  int item;
  bool is_scribe; /* one thread of one KV head, which notes what is left to merge */
  int tile;       /* the next one of the segment */

  __device__ __forceinline__ WorkCursor(const AttentionArgs<T>& attention_args,
                                        CursorState* warp_states,
                                        int item_of_grid,
                                        bool notes_merges)
      : args(attention_args),
        state(warp_states[threadIdx.x / kWarpSize]),
        item(item_of_grid),
        is_scribe(notes_merges),
        tile(0) {}

  __device__ __forceinline__ const Segment& segment() const { return state.segment; }

  /* Goes to the first segment of the item; false when it has none. */
  __device__ __forceinline__ bool start() {
    return args.plan.is_balanced() ? start_chunk() : start_fixed();
  }

  __device__ __forceinline__ bool has_next() const { return state.remaining > 0; }

  /* Goes to the next segment; has_next() must hold. */
  __device__ __forceinline__ void advance() {
    int req = state.segment.req;
    int m_tile = state.segment.m_tile + 1;
    RequestKeys keys = args.keys_of(req);
    if (m_tile == keys.num_m_tiles(args.group_size, Policy::kTileM)) {
      m_tile = 0;
      do {
        keys = args.keys_of(++req);
      } while (keys.num_rows == 0);
    }
    take(keys, m_tile, 0, state.remaining);
  }

 private:
  __device__ __forceinline__ int64_t tiles_of(int req) const {
    if (req >= args.num_reqs) return 0;
    const RequestKeys keys = args.keys_of(req);
    if (keys.num_rows == 0) return 0;
    return int64_t{keys.num_m_tiles(args.group_size, Policy::kTileM)} * keys.num_tiles();
  }

  /* Tiles of all requests: the length of the line. */
  __device__ __forceinline__ int64_t total_tiles() const {
    const int lane = threadIdx.x % kWarpSize;
    int64_t total = 0;
    for (int base = 0; base < args.num_reqs; base += kWarpSize) total += tiles_of(base + lane);
    return warp_reduce(total, SumOp{});
  }

  /* The request that `position` of the line lies in; leaves the position within it. */
  __device__ __forceinline__ int find(int64_t& position) const {
    const int lane = threadIdx.x % kWarpSize;
    for (int base = 0;; base += kWarpSize) {
      const int64_t own = tiles_of(base + lane);
      const int64_t inclusive = warp_inclusive_sum(own);
      const uint32_t past = __ballot_sync(kAllLanes, inclusive > position);
      if (past != 0) {
        const int source = __ffs(past) - 1;
        position -= __shfl_sync(kAllLanes, inclusive - own, source);
        return base + source;
      }
      position -= __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
    }
  }

  __device__ __forceinline__ bool start_chunk() {
    const Chunks chunks = Chunks::cut(total_tiles(), args.plan.num_chunks);
    if (is_scribe) {
      state.num_tiles = chunks.num_tiles;
      state.num_chunks = chunks.count;
    }
    if (item >= chunks.count) {
      note_merge(0);
      return false;
    }
    int64_t position = chunks.begin(item);
    const int length = static_cast<int>(chunks.begin(item + 1) - position);
    const RequestKeys keys = args.keys_of(find(position));
    const int tiles = keys.num_tiles();
    take(keys, static_cast<int>(position / tiles), static_cast<int>(position % tiles), length);
    return true;
  }

  /* Makes an M tile, from its tile `first` on, the segment, as far as the `length` tiles left of the
   * chunk go. */
  __device__ __forceinline__ void take(const RequestKeys& keys, int m_tile, int first, int length) {
    const int tiles = keys.num_tiles();
    const int taken = min(tiles - first, length);
    const bool begins = first == 0;
    const bool ends = first + taken == tiles;
    const int slot = !begins ? 2 * item : (ends ? Segment::kWhole : 2 * item + 1);
    set_segment(keys, m_tile, keys.first_tile(0) + first, taken, slot, length - taken);
    if (taken < length || !is_scribe) return;
    int num_partials = 0;
    if (begins && !ends) {
      const Chunks chunks(state.num_tiles, state.num_chunks);
      const int64_t last_of_m_tile = chunks.begin(item + 1) - taken + tiles - 1;
      num_partials = static_cast<int>(chunks.chunk_of(last_of_m_tile)) - item + 1;
    }
    note_merge(num_partials);
  }

  __device__ __forceinline__ bool start_fixed() {
    const RequestKeys keys = args.keys_of(item / args.plan.ctas_per_req);
    const int cta = item % args.plan.ctas_per_req;
    const int m_tiles = keys.num_m_tiles(args.group_size, Policy::kTileM);
    const int splits = m_tiles == 0 ? 1 : args.plan.splits_of(m_tiles, keys.num_tiles());
    const int m_tile = cta / splits;
    if (m_tile >= m_tiles) {
      note_merge(0);
      return false;
    }
    const int first = keys.first_tile(keys.first_row(m_tile, args.group_size, Policy::kTileM));
    const int last = keys.last_tile(keys.last_row(m_tile, args.group_size, Policy::kTileM));
    const int tiles = last - first;
    const int num_splits = min(splits, tiles);
    const int split = cta % splits;
    const int begin = tile_of_split(split, tiles, num_splits);
    const int end = split < num_splits ? tile_of_split(split + 1, tiles, num_splits) : begin;
    set_segment(keys, m_tile, first + begin, end - begin, num_splits == 1 ? Segment::kWhole : item,
                0);
    note_merge(split == 0 && num_splits > 1 ? num_splits : 0);
    return end > begin;
  }

  static __device__ __forceinline__ int tile_of_split(int split, int tiles, int num_splits) {
    return static_cast<int>(int64_t{split} * tiles / num_splits);
  }

  __device__ __forceinline__ void set_segment(
      const RequestKeys& keys, int m_tile, int first_tile, int num_tiles, int slot, int remaining) {
    tile = first_tile;
    __syncwarp(); /* all lanes are done with the segment before */
    if (threadIdx.x % kWarpSize == 0) {
      Segment& segment = state.segment;
      segment.req = keys.req;
      segment.row_begin = keys.row_begin;
      segment.num_rows = keys.num_rows;
      segment.seq_len = keys.seq_len;
      segment.m_tile = m_tile;
      segment.last_tile = first_tile + num_tiles;
      const int first_row = keys.first_row(m_tile, args.group_size, Policy::kTileM);
      const int last_row = keys.last_row(m_tile, args.group_size, Policy::kTileM);
      segment.first_key = keys.first_key(first_row);
      segment.last_key = keys.cache_keys(last_row);
      segment.whole_begin = keys.whole_begin(last_row);
      segment.whole_end = keys.whole_end(first_row);
      segment.cache_tiles = keys.cache_tiles();
      segment.slot = slot;
      state.remaining = remaining;
    }
    __syncwarp();
  }

  /* Notes how many partial results the segment's M tile has if the item leaves the first of them,
   * else 0. */
  __device__ __forceinline__ void note_merge(int num_partials) const {
    if (!is_scribe || args.partials.merges == nullptr) return;
    int4 record = make_int4(0, 0, 0, 0);
    if (num_partials > 0) {
      const Segment& segment = state.segment;
      const int m_begin = segment.m_tile * Policy::kTileM;
      const int m_end = min(m_begin + Policy::kTileM, segment.num_rows * args.group_size);
      record = make_int4(segment.row_begin, m_begin, m_end, num_partials);
    }
    args.partials.merges[item] = record;
  }
};

}  // namespace dspark
