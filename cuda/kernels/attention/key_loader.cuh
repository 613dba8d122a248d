/*
 * Brings tiles of K and V from pages or block rows into shared memory. See paged_attention.cuh.
 */
#pragma once

#include "common/async_copy.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

/* Copies K and V tiles to shared memory. A lane looks after one key (lane % 16) of its warp's 16:
 * it finds the key's offset one tile ahead, so that the page lookup hides behind the products, and
 * hands it to the lanes that copy. */
template <typename T, typename Policy>
struct KeyLoader {
  const AttentionArgs<T>& args;
  const AttentionTile& tile;
  int warp;
  int lane;
  int64_t offset; /* of this lane's key in the tile to copy next, or kUnmappedSlot */

  /* Finds this lane's key of tile `t`; tiles at or past last_tile have none. */
  __device__ __forceinline__ void locate(int t) {
    offset = kUnmappedSlot;
    if (t >= tile.last_tile) return;
    const int key_in_tile = warp * Policy::kKeysCopied + lane % Policy::kKeysCopied;
    if (t < tile.cache_tiles) {
      const int slot = t * kTileKeys + key_in_tile;
      if (slot < tile.cache_keys) {
        offset = slot_offset(args.cache, tile.keys.req, slot, tile.kv_head);
      }
    } else {
      const int block_row = (t - tile.cache_tiles) * kTileKeys + key_in_tile;
      if (block_row < tile.keys.num_rows) {
        offset = (tile.keys.row_begin + block_row) * args.stride_block_row +
                 static_cast<int64_t>(tile.kv_head) * Policy::kHeadDim;
      }
    }
  }

  /* Starts the copy of tile `t`, the one located last, into k_stage and v_stage, and notes which
   * keys are there. All lanes call; key k of the tile is bit k of the mask. */
  __device__ __forceinline__ void copy(int t, T* k_stage, T* v_stage, uint16_t* key_mask) const {
    const uint32_t present = __ballot_sync(kAllLanes, offset != kUnmappedSlot);
    if (lane == 0) key_mask[warp] = static_cast<uint16_t>(present);

    const bool in_cache = t < tile.cache_tiles;
    const T* k_base = in_cache ? args.k_cache : args.k_block;
    const T* v_base = in_cache ? args.v_cache : args.v_block;
    constexpr int kKeysAtOnce = kWarpSize / Policy::kChunks;
    const int chunk = lane % Policy::kChunks;
#pragma unroll
    for (int i = 0; i < Policy::kKeysCopied / kKeysAtOnce; ++i) {
      const int key = i * kKeysAtOnce + lane / Policy::kChunks;
      const int64_t key_offset = __shfl_sync(kAllLanes, offset, key);
      const bool valid = key_offset != kUnmappedSlot;
      const int64_t source = valid ? key_offset + chunk * 8 : 0;
      const int row = warp * Policy::kKeysCopied + key;
      const int target = row * Policy::kHeadDim + swizzle(row, chunk) * 8;
      copy_async_16(shared_address(k_stage + target), k_base + source, valid);
      copy_async_16(shared_address(v_stage + target), v_base + source, valid);
    }
  }
};

}  // namespace dspark
