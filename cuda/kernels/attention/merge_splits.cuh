/*
 * Merges the partial results of the M tiles that more than one CTA worked on.
 *
 * Maths     M = max_s m_s;  out = sum_s 2^(m_s - M) O_s / sum_s 2^(m_s - M) l_s, summed up in the order
 *           of the keys.
 * Mapping   One CTA per (item of the attention grid, KV head). Those whose items worked on an M tile
 *           share its rows; head_dim / 4 lanes own one row, 4 values (16 bytes) each. They find out
 *           what there is by themselves, from the lists, while the attention kernel still runs beside
 *           them; after that they wait for memory once or twice.
 * Traffic   partials * rows of the M tile * (head_dim + 2) * 4 bytes in, from L2.
 *           Nothing where the first kernel's CTAs formed clusters.
 * Limit     launch latency, hidden behind the attention kernel by programmatic dependent launch.
 * Source    flash-decoding (Dao et al. 2023).
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "common/vec.cuh"
#include "kernels/attention/sum_up.cuh"
#include "kernels/attention/work_cursor.cuh"

namespace dspark {

/* The partial results of an M tile, and the rows of it that a CTA merges. */
struct MergeWork {
  int row_begin; /* of the request */
  int m_begin;
  int m_end;
  int first_row; /* in the M tile */
  int row_step;
  int num_partials; /* fewer than two: nothing to merge */
  int first_slot;
  int second_slot;
  int slot_step; /* from the second on */

  __device__ __forceinline__ int slot(int i) const {
    return i == 0 ? first_slot : second_slot + (i - 1) * slot_step;
  }
};

template <typename T>
__device__ __forceinline__ MergeWork
merge_of_m_tile(const AttentionArgs<T>& args, const RequestKeys& keys, int m_tile, int tile_m) {
  MergeWork work = {};
  work.row_begin = keys.row_begin;
  work.m_begin = m_tile * tile_m;
  work.m_end = min(work.m_begin + tile_m, keys.num_rows * args.group_size);
  return work;
}

/* Balanced form: the M tile that stands at `found`, tile `position` of the line. */
template <typename T>
__device__ __forceinline__ MergeWork find_chunk_merge(const AttentionArgs<T>& args,
                                                      const Chunks& chunks,
                                                      const LinePlace& found,
                                                      int position,
                                                      int item,
                                                      int tile_m) {
  const RequestKeys keys = args.keys_of(found.req);
  const int tiles = keys.num_tiles();
  const bool has_parts = args.plan.has_parts;
  const MTilePlace place(found.offset, tiles, false);
  const int begin = position - place.first;
  const int part = has_parts ? part_tiles(tiles) : 1;
  const int first_chunk = chunks.chunk_of(begin + min(part, tiles) - 1);
  const int last_chunk = chunks.chunk_of(begin + tiles - 1);
  if (item < first_chunk || item > last_chunk || first_chunk == last_chunk) return {};
  MergeWork work = merge_of_m_tile(args, keys, place.m_tile, tile_m);
  work.first_row = item - first_chunk;
  work.row_step = last_chunk - first_chunk + 1;
  const int slots = args.plan.slots_per_chunk();
  work.first_slot = first_chunk * slots;
  if (has_parts) {
    const int parts_added = (chunks.begin(first_chunk + 1) - begin) / part;
    work.num_partials = (tiles - 1) / part + 1 - parts_added + 1;
    work.second_slot = work.first_slot + parts_added;
    work.slot_step = 1;
  } else {
    work.num_partials = work.row_step;
    work.second_slot = work.first_slot + slots + 1;
    work.slot_step = slots;
  }
  return work;
}

/* Fixed form: the M tile of the item. */
template <typename T>
__device__ __forceinline__ MergeWork find_split_merge(const AttentionArgs<T>& args,
                                                      int item,
                                                      int tile_m) {
  const RequestKeys keys = args.keys_of(item / args.plan.ctas_per_req);
  const int cta = item % args.plan.ctas_per_req;
  const int m_tiles = keys.num_m_tiles(args.group_size, tile_m);
  const int splits = m_tiles == 0 ? 1 : args.plan.splits_of(m_tiles, keys.num_tiles());
  const int m_tile = cta / splits;
  if (m_tile >= m_tiles) return {};
  MergeWork work = merge_of_m_tile(args, keys, m_tile, tile_m);
  const int tiles = keys.last_tile(keys.last_row(m_tile, tile_m)) -
                    keys.first_tile(keys.first_row(m_tile, tile_m));
  work.num_partials = min(splits, tiles);
  work.first_row = cta % splits;
  work.row_step = splits;
  work.first_slot = item - cta % splits;
  work.second_slot = work.first_slot + 1;
  work.slot_step = 1;
  return work;
}

/* Four values of a partial result of a row. */
template <typename T, int kHeadDim>
__device__ __forceinline__ RowSum read_partial(const AttentionArgs<T>& args,
                                               int64_t slot,
                                               int kv_head,
                                               int tile_m,
                                               int m_in_tile,
                                               int column) {
  const int64_t entry = (slot * args.num_kv_heads + kv_head) * tile_m + m_in_tile;
  return {*reinterpret_cast<const float4*>(args.partials.out + entry * kHeadDim + column),
          args.partials.max_sum[entry]};
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void write_row(const AttentionArgs<T>& args,
                                          int row_begin,
                                          int m,
                                          int kv_head,
                                          int column,
                                          const RowSum& sum) {
  float o[4] = {sum.out.x, sum.out.y, sum.out.z, sum.out.w};
  normalise(o, sum.max_sum.y);
  const int row_in_req = args.by_group_size.quotient(m);
  const int64_t row = row_begin + row_in_req;
  const int head = kv_head * args.group_size + m - row_in_req * args.group_size;
  const uint2 packed = make_uint2(Element<T>::pack(o[0], o[1]), Element<T>::pack(o[2], o[3]));
  *reinterpret_cast<uint2*>(args.out + row * args.stride_out_row +
                            static_cast<int64_t>(head) * kHeadDim + column) = packed;
}

/* A lane looks at kRows rows at a time. */
template <typename T, int kHeadDim, int kRows>
__device__ __forceinline__ void merge_rows(const AttentionArgs<T>& args,
                                           const MergeWork& work,
                                           int kv_head,
                                           int tile_m) {
  using Policy = MergePolicy<kHeadDim>;
  constexpr int kBatch = Policy::kBatch / kRows;
  if (work.num_partials < 2) return;
  const int column = threadIdx.x % Policy::kLanesPerRow * 4;
  const int step = Policy::kRowsPerCta * work.row_step;
  for (int m_in_tile = work.first_row + threadIdx.x / Policy::kLanesPerRow * work.row_step;
       work.m_begin + m_in_tile < work.m_end; m_in_tile += kRows * step) {
    RowSum totals[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) totals[r] = RowSum::empty();
    for (int first = 0; first < work.num_partials; first += kBatch) {
      /* The reads go out together. */
      RowSum parts[kRows][kBatch];
#pragma unroll
      for (int p = 0; p < kBatch; ++p) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          parts[r][p] = RowSum::empty();
          const int m = m_in_tile + r * step;
          if (first + p >= work.num_partials || work.m_begin + m >= work.m_end) continue;
          parts[r][p] =
              read_partial<T, kHeadDim>(args, work.slot(first + p), kv_head, tile_m, m, column);
        }
      }
#pragma unroll
      for (int p = 0; p < kBatch; ++p) {
        if (first + p >= work.num_partials) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) totals[r].add(parts[r][p]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int m = work.m_begin + m_in_tile + r * step;
      if (m < work.m_end)
        write_row<T, kHeadDim>(args, work.row_begin, m, kv_head, column, totals[r]);
    }
  }
}

/* Two partial results are what most M tiles have that more than one CTA worked on. */
template <typename T, int kHeadDim>
__device__ __forceinline__ void merge_m_tile(const AttentionArgs<T>& args,
                                             const MergeWork& work,
                                             int kv_head,
                                             int tile_m) {
  if (work.num_partials <= MergePolicy<kHeadDim>::kFewPartials) {
    merge_rows<T, kHeadDim, 2>(args, work, kv_head, tile_m);
  } else {
    merge_rows<T, kHeadDim, 1>(args, work, kv_head, tile_m);
  }
}

/* Grid (items, num_kv_heads); tile_m is that of the attention kernel. */
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(MergePolicy<kHeadDim>::kThreads,
                                  MergePolicy<kHeadDim>::kMinCtasPerSm)
    merge_splits_kernel(const AttentionArgs<T> args, int tile_m) {
  __shared__ FinderScratch scratch;
  release_dependents(); /* what follows waits for the end of this grid */
  const int item = blockIdx.x;
  const int kv_head = blockIdx.y;
  MergeWork works[2] = {}; /* of the M tiles that the item begins and ends in */
  if (forms_clusters(args, tile_m)) {
    /* nothing was left */
  } else if (args.plan.is_balanced()) {
    const ChunkFinder<T, MergePolicy<kHeadDim>::kThreads> finder{args, scratch, tile_m};
    const FoundChunk found = finder.find(item);
    const Chunks& chunks = found.chunks;
    const int begin = chunks.begin(item);
    if (begin < chunks.num_tiles) {
      const int end = chunks.begin(item + 1);
      works[0] = find_chunk_merge(args, chunks, found.begin, begin, item, tile_m);
      if (end < chunks.num_tiles) {
        works[1] = find_chunk_merge(args, chunks, found.end, end, item, tile_m);
        const bool same = works[0].row_begin == works[1].row_begin &&
                          works[0].m_begin == works[1].m_begin && works[0].num_partials > 1;
        if (same) works[1].num_partials = 0;
      }
    }
  } else {
    works[0] = find_split_merge(args, item, tile_m);
  }
  wait_for_prerequisites();
#pragma unroll
  for (const MergeWork& work : works) merge_m_tile<T, kHeadDim>(args, work, kv_head, tile_m);
}

}  // namespace dspark
