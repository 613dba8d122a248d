// The attention configuration without a GPU: prints nothing but "ok".
#include "kernels/attention/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace {

using namespace dspark;

#define CHECK(condition)                                  \
  do {                                                    \
    if (!(condition)) {                                   \
      std::printf("line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                       \
    }                                                     \
  } while (0)

constexpr AttentionDevice kH100 = {132, 228 * 1024};
constexpr AttentionDevice kSmall = {20, 100 * 1024};

AttentionDesc decode(int num_reqs, int context) {
  AttentionDesc desc = {};
  desc.num_reqs = num_reqs;
  desc.max_rows_per_req = 8;
  desc.max_seq_len = context;
  desc.group_size = 4;
  desc.num_kv_heads = 8;
  desc.head_dim = 128;
  return desc;
}

void check_balanced() {
  const AttentionConfig one_wave = configure_attention(decode(128, 4096), kH100);
  CHECK(one_wave.warps_m == 2);
  CHECK(one_wave.plan.num_chunks == 132 * 3 / 8);
  CHECK(one_wave.num_items == one_wave.plan.num_chunks);
  CHECK(one_wave.num_slots == 2 * one_wave.num_items);

  /* Memory does not grow with the context, and no chunk stands for less than a tile. */
  const AttentionConfig longer = configure_attention(decode(128, 1 << 20), kH100);
  CHECK(longer.workspace_bytes(decode(128, 1 << 20)) ==
        one_wave.workspace_bytes(decode(128, 4096)));
  CHECK(configure_attention(decode(1, 1024), kH100).plan.num_chunks == 16);
  CHECK(configure_attention(decode(1, 1025), kH100).plan.num_chunks == 17);

  /* One tile is never cut: no partial results, no second launch. */
  const AttentionConfig single = configure_attention(decode(9, 64), kH100);
  CHECK(!single.plan.is_balanced() && single.num_slots == 0);
  CHECK(single.workspace_bytes(decode(9, 64)) == 0);

  CHECK(configure_attention(decode(128, 4096), kSmall).plan.num_chunks == 20 / 8);
  AttentionDesc many_heads = decode(2, 4096);
  many_heads.num_kv_heads = 4096;
  CHECK(configure_attention(many_heads, kH100).plan.num_chunks == 1);
}

void check_prefill() {
  AttentionDesc prefill = decode(2, 4096);
  prefill.max_rows_per_req = 2048;
  const AttentionConfig config = configure_attention(prefill, kH100);
  CHECK(config.warps_m == 4 && !config.plan.is_balanced());
  CHECK(config.plan.ctas_per_req == 2048 * 4 / 64 && config.num_slots == 0);
}

/* What a request gets must not depend on the bounds, which its neighbours set. */
void check_invariant() {
  for (int rows : {1, 8, 16, 40, 500}) {
    for (int tiles : {1, 7, 8, 33, 64, 5000}) {
      const int m_tiles = (rows * 4 + 31) / 32;
      int splits = 0;
      for (int max_rows : {rows, rows + 1, 64, 700, 4000}) {
        for (int max_tiles : {tiles, tiles + 1, 100, 20000}) {
          if (max_rows < rows || max_tiles < tiles) continue;
          AttentionDesc desc = decode(3, max_tiles * kTileKeys);
          desc.max_rows_per_req = max_rows;
          desc.batch_invariant = true;
          const AttentionConfig config = configure_attention(desc, kH100);
          CHECK(config.warps_m == 2 && !config.plan.is_balanced());
          const int found = config.plan.splits_of(m_tiles, tiles);
          CHECK(splits == 0 || found == splits);
          CHECK(found == 1 || config.num_slots > 0);
          CHECK(found * m_tiles <= config.plan.ctas_per_req);
          splits = found;
        }
      }
    }
  }
}

void check_chunks() {
  for (int64_t tiles : {1, 2, 49, 50, 97, 98, 8192, 123457}) {
    for (int max_chunks : {1, 2, 49, 66}) {
      const Chunks chunks = Chunks::cut(tiles, max_chunks);
      CHECK(chunks.count >= 1 && chunks.count <= max_chunks);
      CHECK(chunks.begin(0) == 0 && chunks.begin(chunks.count) == tiles);
      const int64_t even = (tiles + max_chunks - 1) / max_chunks;
      const int64_t longest = std::max<int64_t>(even, kMinTilesPerChunk);
      for (int64_t c = 0; c < chunks.count; ++c) {
        const int64_t length = chunks.begin(c + 1) - chunks.begin(c);
        CHECK(length >= 1 && length <= longest);
        CHECK(chunks.chunk_of(chunks.begin(c)) == c);
        CHECK(chunks.chunk_of(chunks.begin(c + 1) - 1) == c);
      }
    }
  }
  CHECK(Chunks::cut(0, 49).count == 0);
}

void check_slots() {
  const WorkPlan balanced = {49, 0, 1};
  CHECK(balanced.slot(7, 0) == 7 && balanced.slot(7, 1) == 8 && balanced.slot(7, 2) == 10);
  const WorkPlan fixed = {0, 16, 16};
  CHECK(fixed.slot(7, 0) == 7 && fixed.slot(7, 1) == 8 && fixed.slot(7, 2) == 9);
}

}  // namespace

int main() {
  check_balanced();
  check_prefill();
  check_invariant();
  check_chunks();
  check_slots();
  std::printf("ok\n");
}
