/*
 * The warps that bring tiles of K and V from pages or block rows into shared memory. See
 * stream_attention.cuh.
 */
#pragma once

#include "kernels/attention/stream_tile.cuh"

namespace dspark {

/* Goes through the tiles of a CTA's segments and starts the copies of one box of keys of each, K and
 * V, as soon as the tile's stage is free. A tile has four boxes, each with a warp of its own: to name
 * a box to the accelerator takes a thread a hundred cycles. Every warp walks for itself; the first
 * one tells the warps that compute what they will find. It looks one segment ahead: lists, pages and q
 * of the next one come while tiles of this one are still to be asked for. */
template <typename T, typename Policy>
struct TileProducer {
  using Shared = StreamShared<Policy>;

  const KeyMaps& maps;
  const AttentionArgs<T>& args;
  Shared& shared;
  WorkCursor<T, Policy>& cursor;
  int kv_head;
  int box;
  int lane;
  Segment segment; /* whose tiles are brought; the cursor may be at the next one */
  /* Where the box of tile `lane` of a batch of 32 lies: those of the next tile, and of the batch after
   * it. */
  int2 places;
  int2 next_places;
  int2 places_ahead;     /* of the first batch of the next segment */
  bool is_early = false; /* the copy of the next tile has started */

  __device__ __forceinline__ TileProducer(const StreamArgs<T>& stream_args,
                                          Shared& cta_shared,
                                          WorkCursor<T, Policy>& started_cursor,
                                          int head,
                                          int own_box)
      : maps(stream_args.maps),
        args(stream_args.attention),
        shared(cta_shared),
        cursor(started_cursor),
        kv_head(head),
        box(own_box),
        lane(threadIdx.x % kWarpSize) {}

  /* Where the first tile of a chunk is soon found, tells the warps that compute of its rows and starts
   * its copy, before all else that is to know of the segment. All lanes call. */
  __device__ __forceinline__ void bring_first(const FoundChunk& found) {
    int tile = 0;
    is_early = cursor.look_at_first(found, &segment, &tile);
    if (!is_early) return;
    places = places_of(segment, tile / kWarpSize);
    if (box == 0 && lane == 0) {
      SegmentNote& note = shared.segments[0];
      note.row_begin = segment.row_begin;
      note.num_rows = segment.num_rows;
      note.m_begin = 0;
      shared.has_keys = true;
      barrier_arrive(&shared.started);
    }
    const Box first = find_box(tile);
    if (first.keys == 0 || lane != 0) return;
    barrier_expect(&shared.full[0], 2 * Policy::kBoxBytes);
    bring(first, 0);
  }

  /* Brings all tiles. All lanes call; the cursor has started. */
  __device__ __forceinline__ void run() {
    __syncwarp();
    segment = cursor.segment();
    if (lane == 0 && box == 0) {
      if (is_early) {
        cursor.describe_keys(&shared.segments[0]);
      } else {
        cursor.describe(&shared.segments[0]);
        shared.has_keys = true;
        barrier_arrive(&shared.started);
      }
    }
    int stage = 0;
    uint32_t parity = 1; /* the first round finds all stages free */
    int segment_place = 0;
    int tile = cursor.tile;
    int second_tile = tile + 1;
    places = places_of(segment, tile / kWarpSize);
    ask_for_next_batch(tile);
    while (true) {
      /* One tile is on its way; the note of what follows must be there before the last one. */
      if (segment.remaining > 0 && tile == min(second_tile, segment.last_tile - 1)) {
        segment_place = segment_place + 1 == Policy::kSegments ? 0 : segment_place + 1;
        look_ahead(segment_place);
      }
      copy(tile, stage, parity);
      if (++stage == Policy::kStages) {
        stage = 0;
        parity ^= 1;
      }
      ++tile;
      if (tile < segment.last_tile) {
        find_places(tile);
        continue;
      }
      if (segment.remaining == 0) return;
      segment = cursor.segment();
      tile = cursor.tile;
      second_tile = tile + 1;
      places = places_ahead;
      ask_for_next_batch(tile);
    }
  }

 private:
  static constexpr int kNoPage = -1;
  static constexpr int kBoxThreads = Policy::kBoxes * kWarpSize;

  /* (page or kNoPage, slot in it) of the box of tile `lane` of a batch. */
  __device__ __forceinline__ int2 places_of(const Segment& of, int batch) const {
    const int slot = (batch * kWarpSize + lane) * kTileKeys + box * kBoxKeys;
    if (slot >= of.last_key || slot <= of.first_key - kBoxKeys) return {kNoPage, 0};
    const int page_index = args.by_page_size.quotient(slot);
    if (page_index >= args.cache.max_pages_per_req) return {kNoPage, 0};
    const int64_t row = int64_t{of.req} * args.cache.max_pages_per_req;
    return {args.cache.page_table[row + page_index], slot - page_index * args.cache.page_size};
  }

  /* Sees to it that `places` are those of the tile, not the first of its segment. */
  __device__ __forceinline__ void find_places(int tile) {
    if (tile % kWarpSize != 0) return;
    places = next_places;
    ask_for_next_batch(tile);
  }

  __device__ __forceinline__ void ask_for_next_batch(int tile) {
    const int batch = tile / kWarpSize + 1;
    if (batch * kWarpSize < segment.last_tile) next_places = places_of(segment, batch);
  }

  /* Sends the cursor to the next segment, notes it at `place`, and asks for what its start waits for:
   * its pages and its rows of q. */
  __device__ __forceinline__ void look_ahead(int place) {
    cursor.advance();
    places_ahead = places_of(cursor.segment(), cursor.tile / kWarpSize);
    describe_segment(place);
    prefetch_rows(cursor.segment());
  }

  /* Brings the rows of q of an M tile into L2. */
  __device__ __forceinline__ void prefetch_rows(const Segment& of) const {
    constexpr int kLine = 128 / sizeof(T);
    constexpr int kLines = Policy::kHeadDim / kLine;
    for (int i = box * kWarpSize + lane; i < Policy::kTileM * kLines; i += kBoxThreads) {
      const int m = of.m_tile * Policy::kTileM + i / kLines;
      if (m >= of.num_rows * args.group_size) return;
      const int row = args.by_group_size.quotient(m);
      const int head = kv_head * args.group_size + m - row * args.group_size;
      const T* line = args.q + (of.row_begin + row) * args.stride_q_row +
                      static_cast<int64_t>(head) * Policy::kHeadDim + i % kLines * kLine;
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line));
    }
  }

  __device__ __forceinline__ void describe_segment(int place) const {
    if (lane == 0 && box == 0) cursor.describe(&shared.segments[place]);
  }

  /* The box of a tile: where it lies, and which of its keys there are. */
  struct Box {
    int page;
    int slot;
    uint32_t keys;
    bool in_cache;
  };

  /* `segment` is the tile's, `places` as well. All lanes call. */
  __device__ __forceinline__ Box find_box(int tile) const {
    const bool in_cache = tile < segment.cache_tiles;
    const int first = (in_cache ? tile : tile - segment.cache_tiles) * kTileKeys + box * kBoxKeys;
    const int page = in_cache ? __shfl_sync(kAllLanes, places.x, tile % kWarpSize) : 0;
    const int slot =
        in_cache ? __shfl_sync(kAllLanes, places.y, tile % kWarpSize) : segment.row_begin + first;
    const int begin = in_cache ? segment.first_key : 0;
    const int end = in_cache ? segment.last_key : segment.num_rows;
    const uint32_t keys =
        page < 0 ? 0u : box_bits_from(begin - first) & ~box_bits_from(end - first);
    return {page, slot, keys, in_cache};
  }

  /* Starts the copies of a box. One lane calls. */
  __device__ __forceinline__ void bring(const Box& of, int stage) const {
    unsigned char* target = &shared.stages[stage][box * Policy::kBoxBytes];
    const int32_t place[5] = {0, kv_head, of.slot, 0, of.page};
    copy_box(target, of.in_cache ? &maps.k_cache : &maps.k_block, &shared.full[stage], place);
    copy_box(target + Policy::kTileBytes, of.in_cache ? &maps.v_cache : &maps.v_block,
             &shared.full[stage], place);
  }

  /* Notes the tile and starts its copies, if they have not. */
  __device__ __forceinline__ void copy(int tile, int stage, uint32_t parity) {
    const Box found = find_box(tile);
    const bool has_started = is_early;
    is_early = false;
    barrier_wait(&shared.empty[stage], parity);
    if (lane != 0) return;
    TileNote& note = shared.tiles[stage];
    reinterpret_cast<uint16_t*>(&note.key_mask)[box] = static_cast<uint16_t>(found.keys);
    if (box == 0) {
      note.first_key = tile * kTileKeys;
      note.ends_segment = tile + 1 == segment.last_tile;
    }
    if (found.keys == 0 || has_started) {
      barrier_arrive(&shared.full[stage]);
      return;
    }
    barrier_arrive_expect(&shared.full[stage], 2 * Policy::kBoxBytes);
    bring(found, stage);
  }

  /* Bits n .. 15. */
  static __device__ __forceinline__ uint32_t box_bits_from(int n) {
    constexpr uint32_t kAll = (1u << kBoxKeys) - 1;
    return n <= 0 ? kAll : (n >= kBoxKeys ? 0u : kAll << n & kAll);
  }
};

}  // namespace dspark
