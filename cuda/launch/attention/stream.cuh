/*
 * Launches the streaming attention kernel. See kernels/attention/stream_attention.cuh.
 */
#pragma once

#include <algorithm>

#include "common/tensor_map.cuh"
#include "kernels/attention/config.h"
#include "kernels/attention/stream_attention.cuh"

namespace dspark {

/* A map of boxes of kBoxKeys keys of one head. */
inline bool encode_keys(const void* base,
                        int element_bytes,
                        const dspark_attention_params* p,
                        int64_t num_keys,
                        int64_t stride_key,
                        int64_t stride_head,
                        int64_t num_pages,
                        int64_t stride_page,
                        CUtensorMap* map) {
  const int bytes = element_bytes;
  const int panel = std::min(p->head_dim, 128 / bytes); /* elements in 128 bytes */
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  TensorBox tensor = {};
  tensor.base = base;
  tensor.element_bytes = bytes;
  tensor.sizes[0] = size(panel);
  tensor.sizes[1] = size(p->num_kv_heads);
  tensor.sizes[2] = size(num_keys);
  tensor.sizes[3] = size(p->head_dim / panel);
  tensor.sizes[4] = size(num_pages);
  /* The stride of a single head is never used, but has to be one. */
  tensor.strides[0] = size((p->num_kv_heads == 1 ? p->head_dim : stride_head) * bytes);
  tensor.strides[1] = size(stride_key * bytes);
  tensor.strides[2] = size(panel * bytes);
  tensor.strides[3] = size(stride_page * bytes);
  tensor.box[0] = static_cast<cuuint32_t>(panel);
  tensor.box[1] = 1;
  tensor.box[2] = kBoxKeys;
  tensor.box[3] = static_cast<cuuint32_t>(p->head_dim / panel);
  tensor.box[4] = 1;
  return encode_tensor_map(tensor, map);
}

/* False where the accelerator cannot address the tensors. */
inline bool encode_maps(const dspark_attention_params* p,
                        int key_bytes,
                        bool is_draft,
                        KeyMaps* maps) {
  constexpr int64_t kAnyPage = INT32_MAX;
  const auto cache = [&](const void* base, CUtensorMap* map) {
    return encode_keys(base, key_bytes, p, p->page_size, p->stride_cache_slot, p->stride_cache_head,
                       kAnyPage, p->stride_cache_page, map);
  };
  const auto block = [&](const void* base, CUtensorMap* map) {
    return encode_keys(base, key_bytes, p, p->num_rows, p->stride_block_row, p->head_dim, 1,
                       p->stride_block_row, map);
  };
  return cache(p->k_cache, &maps->k_cache) && cache(p->v_cache, &maps->v_cache) &&
         (!is_draft || (block(p->k_block, &maps->k_block) && block(p->v_block, &maps->v_block)));
}

template <typename T, int kHeadDim, int kWarpsM, int kKeyBytes>
dspark_status launch_stream_tiles(const AttentionConfig& config,
                                  const StreamArgs<T>& args,
                                  dspark_stream stream) {
  using Policy = StreamPolicy<kHeadDim, kWarpsM, kKeyBytes>;
  const dim3 grid(static_cast<unsigned>(config.num_items * args.attention.num_kv_heads));
  LaunchShape shape{grid, dim3(Policy::kThreads), Policy::kSharedBytes};
  shape.dependent = true;
  shape.cluster_ctas = static_cast<uint32_t>(config.plan.cluster_ctas);
  return launch("stream_attention_kernel", stream_attention_kernel<T, Policy>, shape, stream, args);
}

template <typename T, int kHeadDim, int kKeyBytes>
dspark_status launch_stream(const AttentionConfig& config,
                            const StreamArgs<T>& args,
                            dspark_stream stream) {
  switch (config.tile_m) {
    case 16:
      return launch_stream_tiles<T, kHeadDim, 1, kKeyBytes>(config, args, stream);
    case 32:
      return launch_stream_tiles<T, kHeadDim, 2, kKeyBytes>(config, args, stream);
    default:
      if constexpr (kHeadDim <= 128) {
        return launch_stream_tiles<T, kHeadDim, 4, kKeyBytes>(config, args, stream);
      }
      return fail(DSPARK_ERROR_INTERNAL, "no stream of %d rows and %d dimensions", config.tile_m,
                  kHeadDim);
  }
}

}  // namespace dspark
