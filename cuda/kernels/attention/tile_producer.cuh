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
 * one tells the warps that compute what they will find. */
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
  Segment segment; /* the cursor's */
  /* Where the box of tile `lane` of a batch of 32 lies: those of the next tile, and of the batch after
   * it. */
  int2 places;
  int2 next_places;

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

  /* Brings all tiles. All lanes call; the cursor has started. */
  __device__ __forceinline__ void run() {
    segment = cursor.segment();
    describe_segment(0);
    if (lane == 0 && box == 0) barrier_arrive(&shared.started);
    int stage = 0;
    uint32_t parity = 1; /* the first round finds all stages free */
    int segment_place = 0;
    bool is_first = true; /* tile of all: its segment is noted */
    int tile = cursor.tile;
    find_places(tile, true);
    while (true) {
      copy(tile, stage, parity, segment_place, is_first);
      is_first = false;
      if (++stage == Policy::kStages) {
        stage = 0;
        parity ^= 1;
      }
      ++tile;
      const bool is_new_segment = tile == segment.last_tile;
      if (is_new_segment) {
        if (!cursor.has_next()) return;
        cursor.advance();
        segment = cursor.segment();
        tile = cursor.tile;
        segment_place = segment_place + 1 == Policy::kSegments ? 0 : segment_place + 1;
      }
      find_places(tile, is_new_segment);
    }
  }

 private:
  static constexpr int kNoPage = -1;

  /* (page or kNoPage, slot in it) of the box of tile `lane` of a batch. */
  __device__ __forceinline__ int2 places_of(int batch) const {
    const int slot = (batch * kWarpSize + lane) * kTileKeys + box * kBoxKeys;
    if (slot >= segment.last_key || slot <= segment.first_key - kBoxKeys) return {kNoPage, 0};
    const int page_index = args.by_page_size.quotient(slot);
    if (page_index >= args.cache.max_pages_per_req) return {kNoPage, 0};
    const int64_t row = int64_t{segment.req} * args.cache.max_pages_per_req;
    return {args.cache.page_table[row + page_index], slot - page_index * args.cache.page_size};
  }

  /* Sees to it that `places` are those of the tile; they are asked for a batch ahead. */
  __device__ __forceinline__ void find_places(int tile, bool is_new_segment) {
    const int batch = tile / kWarpSize;
    if (is_new_segment) {
      places = places_of(batch);
    } else if (tile % kWarpSize == 0) {
      places = next_places;
    } else {
      return;
    }
    if ((batch + 1) * kWarpSize < segment.last_tile) next_places = places_of(batch + 1);
  }

  __device__ __forceinline__ void describe_segment(int place) const {
    if (lane == 0 && box == 0) cursor.describe(&shared.segments[place]);
  }

  /* Notes the tile and starts its copies. */
  __device__ __forceinline__ void copy(
      int tile, int stage, uint32_t parity, int segment_place, bool is_first) {
    const bool in_cache = tile < segment.cache_tiles;
    const int first = (in_cache ? tile : tile - segment.cache_tiles) * kTileKeys + box * kBoxKeys;
    const int page = in_cache ? __shfl_sync(kAllLanes, places.x, tile % kWarpSize) : 0;
    const int slot =
        in_cache ? __shfl_sync(kAllLanes, places.y, tile % kWarpSize) : segment.row_begin + first;
    const int begin = in_cache ? segment.first_key : 0;
    const int end = in_cache ? segment.last_key : segment.num_rows;
    const uint32_t keys =
        page < 0 ? 0u : box_bits_from(begin - first) & ~box_bits_from(end - first);
    barrier_wait(&shared.empty[stage], parity);
    if (lane != 0) return;
    TileNote& note = shared.tiles[stage];
    reinterpret_cast<uint16_t*>(&note.key_mask)[box] = static_cast<uint16_t>(keys);
    if (box == 0) {
      note.first_key = tile * kTileKeys;
      note.ends_segment = tile + 1 == segment.last_tile;
      if (tile == cursor.tile && !is_first) describe_segment(segment_place);
    }
    if (keys == 0) {
      barrier_arrive(&shared.full[stage]);
      return;
    }
    barrier_arrive_expect(&shared.full[stage], 2 * Policy::kBoxBytes);
    unsigned char* target = &shared.stages[stage][box * Policy::kBoxBytes];
    const int32_t place[5] = {0, kv_head, slot, 0, page};
    copy_box(target, in_cache ? &maps.k_cache : &maps.k_block, &shared.full[stage], place);
    copy_box(target + Policy::kTileBytes, in_cache ? &maps.v_cache : &maps.v_block,
             &shared.full[stage], place);
  }

  /* Bits n .. 15. */
  static __device__ __forceinline__ uint32_t box_bits_from(int n) {
    constexpr uint32_t kAll = (1u << kBoxKeys) - 1;
    return n <= 0 ? kAll : (n >= kBoxKeys ? 0u : kAll << n & kAll);
  }
};

}  // namespace dspark
