/*
 * Tuning constants of the attention kernels. Plain C++: the host's configuration reads them too.
 */
#pragma once

#include <cstddef>

namespace dspark {

/* Keys of one tile of the attention kernel. */
constexpr int kTileKeys = 64;

template <int kHeadDim_, int kWarpsM_>
struct AttentionPolicy {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTileM = 16 * kWarpsM;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
  /* Resident CTAs hide each other's page lookups and barriers: three where few rows leave the
   * registers for it (sm_90 has the shared memory), two for a prefill tile of head_dim 128. */
  static constexpr int kMinCtasPerSm = kHeadDim == 128 && kWarpsM == 4 ? 2 : 3;

  static constexpr int kKeysPerWarp = kTileKeys / kWarpsN; /* of the products */
  static constexpr int kKeysCopied = kTileKeys / kWarps;   /* by one warp */
  static constexpr int kChunks = kHeadDim / 8;             /* of 16 bytes in a key */
  static constexpr int kTileElements = kTileKeys * kHeadDim;
  static constexpr int kStageElements = 2 * kTileElements; /* K, then V */
  static constexpr size_t kStageBytes = size_t{2} * kStageElements;
  static constexpr size_t kSharedBytes = kStages * kStageBytes;

  /* Exchange of the warps that share rows: O in f32, rows padded so that fragment accesses are free
   * of bank conflicts, then m and l. It takes the place of the stage just read. */
  static constexpr int kOutStride = kHeadDim + 8;
  static constexpr int kExchangeRows = (kWarpsN - 1) * kTileM;

  static_assert(kWarpsM * kWarpsN == kWarps && kKeysPerWarp % 16 == 0, "warps tile M x keys");
  static_assert(kKeysCopied == 16, "the key mask of a tile is four 16-bit words");
  static_assert(kHeadDim % 64 == 0, "the swizzle spreads eight rows over eight chunks");
  static_assert(size_t{4} * kExchangeRows * (kOutStride + 2) <= kStageBytes,
                "the exchange fits into a stage");
};

template <int kHeadDim>
struct MergePolicy {
  static constexpr int kThreads = 128;
  static constexpr int kLanesPerRow = kHeadDim / 4;
  static constexpr int kRowsPerCta = kThreads / kLanesPerRow;
};

}  // namespace dspark
