/*
 * The paged KV cache and the ragged rows of a pass: where slot s of a request lies, and which
 * request a flattened row belongs to.
 */
#pragma once

#include <cstdint>

namespace dspark {

/* Layout of one cache [num_pages, page_size, num_kv_heads, head_dim] and its page table
 * [num_reqs, max_pages_per_req]. K and V share it. */
struct PagedLayout {
  const int32_t* page_table;
  int32_t page_size;
  int32_t max_pages_per_req;
  int64_t stride_page;
  int64_t stride_slot;
  int64_t stride_head;
};

constexpr int64_t kUnmappedSlot = -1;

/* Element offset of (slot, kv_head) of request `req`, or kUnmappedSlot when the slot is negative,
 * past the page table or on a page with a negative id; the table is not read out of bounds. */
__device__ __forceinline__ int64_t slot_offset(const PagedLayout& layout,
                                               int req,
                                               int slot,
                                               int kv_head) {
  if (slot < 0) return kUnmappedSlot;
  const int page_index = slot / layout.page_size;
  if (page_index >= layout.max_pages_per_req) return kUnmappedSlot;
  const int32_t page =
      layout.page_table[static_cast<int64_t>(req) * layout.max_pages_per_req + page_index];
  if (page < 0) return kUnmappedSlot;
  const int slot_in_page = slot - page_index * layout.page_size;
  return page * layout.stride_page + slot_in_page * layout.stride_slot +
         kv_head * layout.stride_head;
}

/* The request r with qo_indptr[r] <= row < qo_indptr[r + 1], or -1 for a padding row at or beyond
 * qo_indptr[num_reqs]. Requests without rows are passed over. */
__device__ __forceinline__ int find_request(const int32_t* qo_indptr, int num_reqs, int row) {
  if (row >= qo_indptr[num_reqs]) return -1;
  int low = 0; /* invariant: qo_indptr[low] <= row < qo_indptr[high] */
  int high = num_reqs;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (qo_indptr[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace dspark
