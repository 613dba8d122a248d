/*
 * Walks the segments of one CTA. See plan.h for the rules and paged_attention.cuh for the use. Every
 * warp walks for itself.
 */
#pragma once

#include "kernels/attention/chunk_finder.cuh"

namespace dspark {

/* In shared memory, one per warp: registers are for the products. */
struct CursorState {
  Segment segment;
  Chunks chunks; /* balanced */
  int32_t end;   /* balanced: of the CTA's chunk on the line */
};

/* Where a chunk begins or ends: an M tile and how many of its tiles stand before. */
struct MTilePlace {
  int m_tile;
  int first;

  __device__ __forceinline__ MTilePlace(int offset, int tiles_per_m_tile, bool has_parts) {
    m_tile = offset < tiles_per_m_tile ? 0 : offset / tiles_per_m_tile;
    first = offset - m_tile * tiles_per_m_tile;
    if (has_parts) first -= first % part_tiles(tiles_per_m_tile);
  }
  /* Tiles of the request before it. */
  __device__ __forceinline__ int offset(int tiles_per_m_tile) const {
    return m_tile * tiles_per_m_tile + first;
  }
};

template <typename T, typename Policy>
struct WorkCursor {
  const AttentionArgs<T>& args;
  CursorState& state;
  int item;
  int tile; /* the next one of the segment */

  __device__ __forceinline__ WorkCursor(const AttentionArgs<T>& attention_args,
                                        CursorState* own_state,
                                        int item_of_grid)
      : args(attention_args), state(*own_state), item(item_of_grid), tile(0) {}

  __device__ __forceinline__ const Segment& segment() const { return state.segment; }

  __device__ __forceinline__ bool has_next() const { return state.segment.remaining > 0; }

  /* Goes to the next segment; has_next() must hold. Balanced form. */
  __device__ __forceinline__ void advance() {
    const Segment& last = state.segment;
    RequestKeys keys = args.keys_of(last.req);
    int m_tile = last.m_tile;
    int first = last.m_first;
    bool begins = last.sums == kGoesOn || last.sums == (kAddsUp | kGoesOn);
    if (first == keys.num_tiles()) {
      first = 0;
      begins = true;
      if (++m_tile == keys.num_m_tiles(args.group_size, Policy::kTileM)) {
        m_tile = 0;
        do {
          keys = args.keys_of(keys.req + 1);
        } while (keys.num_rows == 0);
      }
    }
    take(keys, m_tile, first, last.remaining, begins);
  }

  /* One thread calls. */
  __device__ __forceinline__ void describe(SegmentNote* note) const {
    const Segment& segment = state.segment;
    note->row_begin = segment.row_begin;
    note->num_rows = segment.num_rows;
    note->m_begin = segment.m_tile * Policy::kTileM;
    describe_keys(note);
  }
  /* But for the rows. */
  __device__ __forceinline__ void describe_keys(SegmentNote* note) const {
    const Segment& segment = state.segment;
    note->whole_begin = segment.whole_begin;
    note->whole_end = segment.whole_end;
    note->seq_len = segment.seq_len;
    note->slot = segment.slot;
    note->sums = segment.sums;
    note->ends_work = segment.remaining == 0;
  }
  /* The rows of the first M tile of a request alone. */
  __device__ __forceinline__ void describe_rows(int req, SegmentNote* note) const {
    const RequestKeys keys = args.keys_of(req);
    note->row_begin = keys.row_begin;
    note->num_rows = keys.num_rows;
    note->m_begin = 0;
  }

  /* Finds what the copy of the first tile of a chunk needs, for it alone, where that is soon known; else
   * returns false. */
  __device__ __forceinline__ bool look_at_first(const FoundChunk& found,
                                                Segment* segment,
                                                int* tile) const {
    if (args.plan.has_parts || found.chunks.begin(item) == found.chunks.num_tiles) return false;
    const RequestKeys keys = args.keys_of(found.begin.req);
    if (keys.num_rows * args.group_size > Policy::kTileM) return false;
    segment->req = keys.req;
    segment->row_begin = keys.row_begin;
    segment->num_rows = keys.num_rows;
    segment->first_key = keys.first_key(0);
    segment->last_key = keys.cache_keys(keys.num_rows - 1);
    segment->cache_tiles = keys.cache_tiles();
    *tile = keys.first_tile(0) + found.begin.offset;
    return true;
  }

  /* Goes to the first segment of a chunk; false when it has none. */
  __device__ __forceinline__ bool start_chunk(const FoundChunk& found) {
    const Chunks& chunks = found.chunks;
    int begin = chunks.begin(item);
    if (begin == chunks.num_tiles) return false;
    int end = chunks.begin(item + 1);
    const RequestKeys keys = args.keys_of(found.begin.req);
    const MTilePlace place(found.begin.offset, keys.num_tiles(), args.plan.has_parts);
    if (args.plan.has_parts) {
      begin -= found.begin.offset - place.offset(keys.num_tiles());
      if (end < chunks.num_tiles) {
        const int tiles = args.keys_of(found.end.req).num_tiles();
        end -= found.end.offset - MTilePlace(found.end.offset, tiles, true).offset(tiles);
      }
      if (begin == end) return false;
    }
    if (threadIdx.x % kWarpSize == 0) {
      state.chunks = chunks;
      state.end = end;
    }
    __syncwarp();
    take(keys, place.m_tile, place.first, end - begin, place.first == 0);
    return true;
  }

  /* Goes to the one segment of an item of the fixed form; false when it has none. */
  __device__ __forceinline__ bool start_fixed() {
    const RequestKeys keys = args.keys_of(item / args.plan.ctas_per_req);
    const int cta = item % args.plan.ctas_per_req;
    const int m_tiles = keys.num_m_tiles(args.group_size, Policy::kTileM);
    const int splits = m_tiles == 0 ? 1 : args.plan.splits_of(m_tiles, keys.num_tiles());
    const int m_tile = cta / splits;
    if (m_tile >= m_tiles) return false;
    const int first = keys.first_tile(keys.first_row(m_tile, Policy::kTileM));
    const int tiles = keys.last_tile(keys.last_row(m_tile, Policy::kTileM)) - first;
    const int num_splits = min(splits, tiles);
    const int split = cta % splits;
    const int begin = tile_of_split(split, tiles, num_splits);
    const int end = split < num_splits ? tile_of_split(split + 1, tiles, num_splits) : begin;
    Segment segment = {};
    segment.slot = num_splits == 1 ? Segment::kWhole : item;
    set_segment(keys, m_tile, first + begin, end - begin, segment);
    return end > begin;
  }

 private:
  static __device__ __forceinline__ int tile_of_split(int split, int tiles, int num_splits) {
    return static_cast<int>(int64_t{split} * tiles / num_splits);
  }

  /* Makes an M tile, from its tile `first` on, the segment, as far as its part and the `length` tiles
   * left of the chunk go. `begins`: all tiles before are the CTA's, too. */
  __device__ __forceinline__ void take(
      const RequestKeys& keys, int m_tile, int first, int length, bool begins) {
    const int tiles = keys.num_tiles();
    const int part = args.plan.has_parts ? part_tiles(tiles) : tiles;
    const int taken = min(min(part, tiles - first), length);
    const bool ends = first + taken == tiles;
    Segment segment = {};
    segment.remaining = length - taken;
    segment.m_first = first + taken;
    segment.slot = begins && ends ? Segment::kWhole
                                  : slot_of(begins, state.end - length - first, first, part, tiles);
    if (args.plan.has_parts && begins) {
      segment.sums = (first > 0 ? kAddsUp : 0) | (!ends && segment.remaining > 0 ? kGoesOn : 0);
    }
    set_segment(keys, m_tile, keys.first_tile(0) + first, taken, segment);
  }

  /* See plan.h. m_tile_begin: the place of the M tile on the line. */
  __device__ __forceinline__ int slot_of(
      bool begins, int m_tile_begin, int first, int part, int tiles) const {
    if (!args.plan.has_parts) return 2 * item + (begins ? 0 : 1);
    if (begins) return item * args.plan.slots_per_chunk();
    /* The chunk that the M tile begins in: chunks that begin within its first part do so with it. */
    const int first_chunk = state.chunks.chunk_of(m_tile_begin + min(part, tiles) - 1);
    return first_chunk * args.plan.slots_per_chunk() + first / part;
  }

  /* Completes and sets a segment whose slot and place in the chunk are known. */
  __device__ __forceinline__ void set_segment(
      const RequestKeys& keys, int m_tile, int first_tile, int num_tiles, Segment segment) {
    tile = first_tile;
    segment.req = keys.req;
    segment.row_begin = keys.row_begin;
    segment.num_rows = keys.num_rows;
    segment.seq_len = keys.seq_len;
    segment.m_tile = m_tile;
    segment.last_tile = first_tile + num_tiles;
    const int first_row = keys.first_row(m_tile, Policy::kTileM);
    const int last_row = keys.last_row(m_tile, Policy::kTileM);
    segment.first_key = keys.first_key(first_row);
    segment.last_key = keys.cache_keys(last_row);
    segment.whole_begin = keys.whole_begin(last_row);
    segment.whole_end = keys.whole_end(first_row);
    segment.cache_tiles = keys.cache_tiles();
    __syncwarp(); /* all lanes are done with the segment before */
    if (threadIdx.x % kWarpSize == 0) state.segment = segment;
    __syncwarp();
  }
};

}  // namespace dspark
