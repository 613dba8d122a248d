/*
 * Brings tiles of K and V from pages or block rows into shared memory. See paged_attention.cuh.
 */
#pragma once

#include "common/async_copy.cuh"
#include "kernels/attention/work_cursor.cuh"

namespace dspark {

/* Stands beside a tile in shared memory: the warps that read a stage need nothing else to know what
 * they read. */
struct StageNote {
  TileNote tile;
  SegmentNote segment;
};

/* Copies the tiles of a CTA's segments, one after the other, to shared memory. A lane looks after
 * one key (lane % 16) of its warp's 16: it finds the key's offset one tile ahead, so that the page
 * lookup hides behind the products, and hands it to the lanes that copy. */
template <typename T, typename Policy>
struct KeyLoader {
  const AttentionArgs<T>& args;
  WorkCursor<T, Policy>& cursor;
  int kv_head;
  int warp;
  int lane;
  int64_t offset; /* of this lane's key in the next tile, or kUnmappedSlot */

  __device__ __forceinline__ KeyLoader(const AttentionArgs<T>& attention_args,
                                       WorkCursor<T, Policy>& started_cursor,
                                       int head)
      : args(attention_args),
        cursor(started_cursor),
        kv_head(head),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize) {
    locate();
  }

  /* Starts the copy of the next tile, if there is one, into `stage`, describes it in `note`, and
   * closes a group either way. All threads call. */
  __device__ __forceinline__ void copy_next(unsigned char* stage, StageNote* note) {
    if (has_tile()) {
      copy(stage, note);
      step();
    }
    copy_async_commit();
    locate();
  }

 private:
  __device__ __forceinline__ bool has_tile() const {
    return cursor.tile < cursor.segment().last_tile;
  }

  __device__ __forceinline__ void step() {
    ++cursor.tile;
    if (!has_tile() && cursor.has_next()) cursor.advance();
  }

  /* Finds this lane's key of the next tile. */
  __device__ __forceinline__ void locate() {
    offset = kUnmappedSlot;
    if (!has_tile()) return;
    const Segment& segment = cursor.segment();
    const int key_in_tile = warp * Policy::kKeysCopied + lane % Policy::kKeysCopied;
    if (cursor.tile < segment.cache_tiles) {
      const int slot = cursor.tile * kTileKeys + key_in_tile;
      if (slot >= segment.first_key && slot < segment.last_key) {
        offset = slot_offset(args.cache, segment.req, slot, kv_head);
      }
      return;
    }
    const int block_row = (cursor.tile - segment.cache_tiles) * kTileKeys + key_in_tile;
    if (block_row < segment.num_rows) {
      offset = (segment.row_begin + block_row) * args.stride_block_row +
               static_cast<int64_t>(kv_head) * Policy::kHeadDim;
    }
  }

  /* Key k of the tile is bit k of the note's mask: a word of 16 bits from every warp. */
  __device__ __forceinline__ void copy(unsigned char* stage, StageNote* note) const {
    const uint32_t present = __ballot_sync(kAllLanes, offset != kUnmappedSlot);
    if (lane == 0) {
      reinterpret_cast<uint16_t*>(&note->tile.key_mask)[warp] = static_cast<uint16_t>(present);
    }
    if (threadIdx.x == 0) {
      cursor.describe(&note->segment);
      note->tile.first_key = cursor.tile * kTileKeys;
      note->tile.ends_segment = cursor.tile + 1 == cursor.segment().last_tile;
    }

    const bool in_cache = cursor.tile < cursor.segment().cache_tiles;
    const auto* k_base = static_cast<const unsigned char*>(in_cache ? args.k_cache : args.k_block);
    const auto* v_base = static_cast<const unsigned char*>(in_cache ? args.v_cache : args.v_block);
    constexpr int kKeysAtOnce = kWarpSize / Policy::kChunks;
    const int chunk = lane % Policy::kChunks;
#pragma unroll
    for (int i = 0; i < Policy::kKeysCopied / kKeysAtOnce; ++i) {
      const int key = i * kKeysAtOnce + lane / Policy::kChunks;
      const int64_t key_offset = __shfl_sync(kAllLanes, offset, key);
      const bool valid = key_offset != kUnmappedSlot;
      const int64_t source = valid ? key_offset * Policy::kKeyBytes + chunk * 16 : 0;
      const int row = warp * Policy::kKeysCopied + key;
      unsigned char* target = stage + tile_offset<Policy::kRowBytes>(row, chunk);
      copy_async_16(shared_address(target), k_base + source, valid);
      copy_async_16(shared_address(target + Policy::kTileBytes), v_base + source, valid);
    }
  }
};

}  // namespace dspark
