/*
 * Tuning constants of the attention kernels. Plain C++: the host's configuration reads them too.
 */
#pragma once

#include <cstddef>

namespace dspark {

/* Keys of one tile of the attention kernel. */
constexpr int kTileKeys = 64;
/* Keys that lie together in a tile: what one copy of the tensor memory accelerator brings. */
constexpr int kBoxKeys = 16;

template <int kHeadDim_, int kWarpsM_, int kKeyBytes_ = 2>
struct AttentionPolicy {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeyBytes = kKeyBytes_; /* of an element of K or V: 1 is e4m3 */
  static constexpr int kWarps = 4;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kWarpsD =
      1; /* of a row and its keys, each with a share of the dimensions of O */
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTileM = 16 * kWarpsM;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
  /* Resident CTAs hide each other's page lookups and barriers: three where few rows leave the
   * registers for it (sm_90 has the shared memory), two for a prefill tile of head_dim 128. */
  static constexpr int kMinCtasPerSm =
      kHeadDim == 256 ? 1 : (kHeadDim == 128 && kWarpsM == 4 ? 2 : 3);

  static constexpr int kKeysPerWarp = kTileKeys / kWarpsN; /* of the products */
  static constexpr int kKeysCopied = kTileKeys / kWarps;   /* by one warp */
  static constexpr int kRowBytes = kHeadDim * kKeyBytes;
  static constexpr int kChunks = kRowBytes / 16; /* in a key */
  static constexpr int kTileBytes = kTileKeys * kRowBytes;

  /* Exchange of the warps that share rows: O in f32, rows padded so that fragment accesses are free
   * of bank conflicts, then m and l. It takes the place of the stage just read. */
  static constexpr int kOutStride = kHeadDim + 8;
  static constexpr int kExchangeRows = (kWarpsN - 1) * kTileM;
  static constexpr int kExchangeBytes = 4 * kExchangeRows * (kOutStride + 2);

  static constexpr int kStageBytes = /* K, then V */
      2 * kTileBytes > kExchangeBytes ? 2 * kTileBytes : kExchangeBytes;
  static constexpr size_t kSharedBytes = size_t{kStages} * kStageBytes;

  static_assert(kWarpsM * kWarpsN == kWarps && kKeysPerWarp % 16 == 0, "warps tile M x keys");
  static_assert(kKeysCopied == 16, "the key mask of a tile is four 16-bit words");
};

template <int kHeadDim>
struct MergePolicy {
  static constexpr int kThreads = 128;
  static constexpr int kLanesPerRow = kHeadDim / 4;
  static constexpr int kRowsPerCta = kThreads / kLanesPerRow;
  static constexpr int kBatch = 4; /* partial results that a lane reads at once */
  /* Up to here those are of two rows, beyond of one. */
  static constexpr int kFewPartials = 6;
  /* So few registers that a CTA fits beside one of the streaming kernel's. */
  static constexpr int kMinCtasPerSm = 6;
};

}  // namespace dspark
