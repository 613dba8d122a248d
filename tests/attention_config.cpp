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

constexpr AttentionDevice kH100 = {132, 228 * 1024, true};
/* The same without copies by the tensor memory accelerator. */
constexpr AttentionDevice kPlain = {132, 228 * 1024, false};
constexpr AttentionDevice kSmall = {20, 100 * 1024, false};

AttentionDesc decode(int num_reqs, int context) {
  AttentionDesc desc = {};
  desc.num_reqs = num_reqs;
  desc.max_rows_per_req = 8;
  desc.max_seq_len = context;
  desc.group_size = 4;
  desc.num_kv_heads = 8;
  desc.head_dim = 128;
  desc.page_size = 16;
  desc.key_bytes = 2;
  return desc;
}

WorkPlan plan_of(int max_chunks, int min_tiles) {
  WorkPlan plan = {};
  plan.num_chunks = max_chunks;
  plan.by_num_chunks = Divider::by(max_chunks);
  plan.min_tiles_per_chunk = min_tiles;
  return plan;
}

void check_stream() {
  const AttentionConfig pass = configure_attention(decode(128, 4096), kH100);
  CHECK(pass.streams && pass.tile_m == 32);
  CHECK(pass.plan.num_chunks == 132 / 8 && pass.num_items == pass.plan.num_chunks);
  CHECK(pass.num_slots == 2 * pass.num_items);

  /* Neither memory nor the cut depend on how long contexts may get: graphs replay bit for bit. */
  const AttentionConfig longer = configure_attention(decode(128, 1 << 20), kH100);
  CHECK(longer.workspace_bytes(decode(128, 1 << 20)) == pass.workspace_bytes(decode(128, 4096)));
  CHECK(longer.plan.num_chunks == pass.plan.num_chunks);
  CHECK(configure_attention(decode(128, 1), kH100).plan.num_chunks == pass.plan.num_chunks);

  AttentionDesc desc = decode(16, 4096);
  desc.max_rows_per_req = 4;
  CHECK(configure_attention(desc, kH100).tile_m == 16);
  desc.max_rows_per_req = 64;
  CHECK(configure_attention(desc, kH100).tile_m == 64);
  desc.head_dim = 256;
  CHECK(configure_attention(desc, kH100).tile_m == 32);
  desc.num_kv_heads = 4096;
  CHECK(configure_attention(desc, kH100).plan.num_chunks == 1);

  /* Pages that hold no whole boxes of keys are gathered. */
  for (int page_size : {1, 8, 17, 24}) {
    AttentionDesc gathered = decode(1, 4096);
    gathered.page_size = page_size;
    CHECK(!configure_attention(gathered, kH100).streams);
  }
  for (int page_size : {16, 32, 48, 64, 256}) {
    AttentionDesc boxes = decode(1, 4096);
    boxes.page_size = page_size;
    CHECK(configure_attention(boxes, kH100).streams);
  }
}

/* Few requests: a cluster for each of them and each KV head, as large as all at once may be. */
void check_clusters() {
  const AttentionConfig one = configure_attention(decode(1, 4096), kH100);
  CHECK(one.streams && one.plan.cluster_ctas == 8 && one.num_items == 8);
  CHECK(one.num_slots == 0 && one.workspace_bytes(decode(1, 4096)) == 0);
  /* More than one may be too uneven for clusters, which only the device sees. */
  const AttentionConfig eight = configure_attention(decode(8, 4096), kH100);
  CHECK(eight.plan.cluster_ctas == 2 && eight.num_items == 16 && eight.num_slots == 32);
  for (int reqs : {1, 2, 3, 5, 8, 9, 40}) {
    for (int heads = 1; heads <= 200; ++heads) {
      AttentionDesc desc = decode(reqs, 4096);
      desc.num_kv_heads = heads;
      const AttentionConfig config = configure_attention(desc, kH100);
      const WorkPlan& plan = config.plan;
      CHECK(plan.cluster_ctas == 1 << plan.cluster_shift());
      CHECK(plan.num_chunks >= 1 && config.num_items == plan.num_chunks);
      CHECK(plan.by_num_chunks.quotient(plan.num_chunks) == 1);
      if (plan.cluster_ctas == 1) continue;
      const int ctas = plan.cluster_ctas * heads * reqs;
      CHECK(ctas <= kH100.num_sms && ctas >= kH100.num_sms / 3 && reqs <= kMaxClusterReqs);
      CHECK(plan.num_chunks == plan.cluster_ctas * reqs);
    }
  }
  /* One long request has the whole device; eight leave nothing idle however long they are. */
  CHECK(configure_attention(decode(1, 32768), kH100).plan.cluster_ctas == 8);
  CHECK(configure_attention(decode(1, 32769), kH100).plan.cluster_ctas == 1);
  CHECK(configure_attention(decode(8, 1 << 20), kH100).plan.cluster_ctas == 2);
  AttentionDesc bytes = decode(1, 8192);
  bytes.key_bytes = 1;
  CHECK(configure_attention(bytes, kH100).plan.cluster_ctas == 8);
  bytes.max_seq_len = 8193;
  CHECK(configure_attention(bytes, kH100).plan.cluster_ctas == 1);
  CHECK(configure_attention(bytes, kH100).num_slots > 0);
  AttentionDesc many = decode(1, 4096);
  many.max_rows_per_req = 9; /* more rows than a cluster merges */
  CHECK(configure_attention(many, kH100).plan.cluster_ctas == 1);
  AttentionDesc invariant = decode(1, 4096);
  invariant.batch_invariant = true;
  CHECK(configure_attention(invariant, kH100).plan.cluster_ctas == 1);
  CHECK(configure_attention(decode(9, 4096), kH100).plan.cluster_ctas == 1);
  CHECK(configure_attention(decode(1, 4096), kPlain).plan.cluster_ctas <= 1);
}

/* Clusters suit requests of about one length, and short ones. */
void check_suitable() {
  WorkPlan plan = plan_of(16, 2);
  plan.cluster_ctas = 2;
  CHECK(plan.suits_clusters(8, 16, 8 * 16));
  CHECK(plan.suits_clusters(8, 20, 8 * 16));
  CHECK(!plan.suits_clusters(8, 21, 8 * 16));
  CHECK(!plan.suits_clusters(8, 1024, 1024 + 7 * 8));
  CHECK(plan.suits_clusters(8, 4, 4));
  CHECK(plan.suits_clusters(8, INT32_MAX / 8, INT32_MAX / 8 * 8));
  CHECK(!plan.suits_clusters(8, INT32_MAX, INT32_MAX));
  /* All of a request's tiles, in order. */
  for (int tiles : {1, 2, 3, 5, 16, 17, 1000003}) {
    const Chunks chunks = plan.cut_into(tiles, ((tiles - 1) >> plan.cluster_shift()) + 1);
    CHECK(chunks.count() >= 1 && chunks.count() <= 2 && chunks.begin(2) == tiles);
  }
}

void check_balanced() {
  const AttentionConfig one_wave = configure_attention(decode(128, 4096), kPlain);
  CHECK(!one_wave.streams && one_wave.warps_m == 2 && one_wave.tile_m == 32);
  CHECK(one_wave.plan.num_chunks == 132 * 3 / 8);
  CHECK(one_wave.num_items == one_wave.plan.num_chunks);
  CHECK(one_wave.num_slots == 2 * one_wave.num_items);

  /* Memory does not grow with the context, and no chunk stands for less than a tile. */
  const AttentionConfig longer = configure_attention(decode(128, 1 << 20), kPlain);
  CHECK(longer.workspace_bytes(decode(128, 1 << 20)) ==
        one_wave.workspace_bytes(decode(128, 4096)));
  CHECK(configure_attention(decode(1, 1024), kPlain).plan.num_chunks == 16);
  CHECK(configure_attention(decode(1, 1025), kPlain).plan.num_chunks == 17);

  /* One tile is never cut: no partial results, no second launch. */
  const AttentionConfig single = configure_attention(decode(9, 64), kPlain);
  CHECK(!single.plan.is_balanced() && single.num_slots == 0);
  CHECK(single.workspace_bytes(decode(9, 64)) == 0);

  CHECK(configure_attention(decode(128, 4096), kSmall).plan.num_chunks == 20 / 8);
  AttentionDesc many_heads = decode(2, 4096);
  many_heads.num_kv_heads = 4096;
  CHECK(configure_attention(many_heads, kPlain).plan.num_chunks == 1);

  /* 256 dimensions take a whole SM. */
  AttentionDesc wide = decode(128, 4096);
  wide.head_dim = 256;
  CHECK(configure_attention(wide, kPlain).plan.num_chunks == 132 / 8);
}

void check_prefill() {
  AttentionDesc prefill = decode(2, 4096);
  prefill.max_rows_per_req = 2048;
  const AttentionConfig config = configure_attention(prefill, kH100);
  CHECK(!config.streams && config.warps_m == 4 && !config.plan.is_balanced());
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
          const AttentionConfig stream = configure_attention(desc, kH100);
          CHECK(stream.streams && stream.tile_m == 32 && stream.plan.has_parts);
          CHECK(stream.plan.num_chunks == 132 / 8);
          const AttentionConfig config = configure_attention(desc, kPlain);
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
  for (int min_tiles : {1, 4}) {
    for (int tiles : {1, 2, 16, 17, 49, 50, 97, 98, 8192, 123457, 2147483647}) {
      for (int max_chunks : {1, 2, 16, 49, 66}) {
        const Chunks chunks = plan_of(max_chunks, min_tiles).cut(tiles);
        CHECK(chunks.count() >= 1 && chunks.count() <= max_chunks);
        CHECK(chunks.begin(0) == 0 && chunks.begin(chunks.count()) == tiles);
        const int even = (tiles - 1) / max_chunks + 1;
        const int longest = std::max(even, min_tiles);
        for (int c = 0; c < chunks.count(); ++c) {
          const int length = chunks.begin(c + 1) - chunks.begin(c);
          CHECK(length >= 1 && length <= longest);
          CHECK(chunks.chunk_of(chunks.begin(c)) == c);
          CHECK(chunks.chunk_of(chunks.begin(c + 1) - 1) == c);
        }
        CHECK(chunks.begin(chunks.count() + 1) == tiles);
      }
    }
  }
  CHECK(plan_of(49, 1).cut(0).count() == 0);
}

void check_parts() {
  for (int tiles : {1, 2, 3, 31, 32, 33, 64, 511, 512, 513, 16384}) {
    const int part = part_tiles(tiles);
    CHECK(part >= kMinTilesPerPart && (tiles - 1) / part + 1 <= kMaxParts);
  }
  WorkPlan plan = plan_of(16, 1);
  CHECK(plan.slots_per_chunk() == 2);
  plan.has_parts = true;
  CHECK(plan.slots_per_chunk() > kMaxParts);
}

void check_divisions() {
  for (int divisor : {1, 2, 3, 5, 7, 16, 31, 64, 127, 12345, 1 << 30, 2147483647}) {
    const Divider by = Divider::by(divisor);
    for (int64_t q :
         {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1000}, INT64_C(2147483647) / divisor}) {
      for (int64_t n : {q * divisor - 1, q * divisor, q * divisor + divisor - 1}) {
        if (n < 0 || n > 2147483647) continue;
        CHECK(by.quotient(static_cast<int>(n)) == n / divisor);
      }
    }
  }
}

}  // namespace

int main() {
  check_stream();
  check_clusters();
  check_suitable();
  check_balanced();
  check_prefill();
  check_invariant();
  check_chunks();
  check_parts();
  check_divisions();
  std::printf("ok\n");
}
