/*
 * Tuning constants of the streaming attention kernel. Plain C++: the host's configuration reads them
 * too.
 */
#pragma once

#include <cstddef>

#include "kernels/attention/policy.h"

namespace dspark {

/* Of an sm_90 CTA's shared memory; the rest is for barriers and notes. */
constexpr size_t kMaxSharedBytes = 232448;

/* The largest M tile that a cluster merges. */
constexpr int kMaxClusterTileM = 32;

/* The warps that compute stand kWarpsM x kWarpsN over 16 kWarpsM rows and kTileKeys keys, or, where O
 * has many dimensions, kWarpsM x kWarpsD over the rows and the dimensions of O: each then has the
 * scores of all keys, which are fewer sums than O is, and no warp waits for another at the end. */
template <int kHeadDim_, int kWarpsM_, int kKeyBytes_ = 2>
struct StreamPolicy {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeyBytes = kKeyBytes_; /* of an element of K or V: 1 is e4m3 */
  static constexpr int kWarpsM = kWarpsM_;
  /* Registers allow four computing warps of 256 dimensions, eight of fewer. */
  static constexpr int kMostWarps = kHeadDim == 256 ? 4 : 8;
  static constexpr int kWarpsD = kHeadDim == 256 ? kMostWarps / kWarpsM : 1;
  static constexpr int kWarpsN = kWarpsD > 1
                                     ? 1
                                     : (kMostWarps / kWarpsM < 4 ? kMostWarps / kWarpsM : 4);
  static constexpr int kWarps = kWarpsM * kWarpsN * kWarpsD;
  /* Whether a warp's rows are complete without another's, and leave from registers. */
  static constexpr bool kLeavesAlone = kWarpsN == 1;
  static constexpr int kTileM = 16 * kWarpsM;
  static constexpr int kWorkers = kWarps * 32;
  static constexpr int kBoxes =
      kTileKeys / kBoxKeys; /* of K in a tile, and of V; a warp for each */
  static constexpr int kThreads = kWorkers + kBoxes * 32;
  /* Registers of a thread at the start, of one that computes and of one that brings keys: what the
   * latter hand over leaves room on the SM for the merge, which waits there for the end. For 256
   * dimensions all are needed and none moves. */
  static constexpr bool kMovesRegisters = kHeadDim < 256;
  static constexpr int kRegisters = kMovesRegisters ? (kWarps == 8 ? 144 : 168) : 255;
  static constexpr int kWorkerRegisters = kWarps == 8 ? 176 : 208;
  static constexpr int kProducerRegisters = kWarps == 8 ? 80 : 128;
  static_assert(kWarps * kWorkerRegisters + kBoxes * kProducerRegisters <=
                    (kWarps + kBoxes) * kRegisters,
                "registers only change hands");
  /* Warps that share rows form groups that take turns with the tiles. Where a tile is small a warp
   * takes it whole: the chain of a step hardly grows with its keys, and each has four tiles' time. */
  static constexpr bool kHasSmallTiles = kHeadDim == 64 || kKeyBytes == 1;
  static constexpr int kGroups =
      kWarpsN == 4 && kHeadDim < 256 ? (kHasSmallTiles ? kWarpsN : 2) : 1;
  static constexpr int kKeysPerWarp = kTileKeys * kGroups / kWarpsN;

  static constexpr int kRowBytes = kHeadDim * kKeyBytes;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes; /* K, then V */
  static constexpr int kBoxBytes = kBoxKeys * kRowBytes;

  /* Where warps leave 16 rows each to be merged: O in f32, rows padded so that fragment accesses are
   * free of bank conflicts, then m and l. */
  static constexpr int kParts = kWarpsN;
  static constexpr int kExchangeRows = kLeavesAlone ? 1 : kParts * kTileM;
  static constexpr int kOutStride = kHeadDim + 8;
  static constexpr size_t kExchangeBytes = size_t{4} * kExchangeRows * (kOutStride + 2);
  /* The sum of the parts so far, for the M tile of batch-invariant passes; or what the CTAs of a
   * cluster send. */
  static constexpr int kSumRows = kTileM <= kMaxClusterTileM ? kTileM : 1;
  static constexpr size_t kSumBytes = size_t{4} * kSumRows * (kHeadDim + 2 * kWarpsD);

  /* Barriers and notes; of 256 dimensions no more than leaves room for three stages. */
  static constexpr size_t kNoteBytes = kHeadDim == 256 ? 1472 : 2048;
  static constexpr size_t kFixedBytes = kExchangeBytes + kSumBytes + kNoteBytes;
  /* More than eight gain nothing. */
  static constexpr int kRoomForStages =
      static_cast<int>((kMaxSharedBytes - kFixedBytes) / kStageBytes);
  static constexpr int kStages = kRoomForStages < 8 ? kRoomForStages : 8;
  /* In steps of the stages' alignment. */
  static constexpr size_t kSharedBytes = (kStages * kStageBytes + kFixedBytes + 1023) / 1024 * 1024;
  static_assert(kSharedBytes <= kMaxSharedBytes, "a CTA has no more");
  /* Of segments: the warps that compute may still be at the end of one when all stages hold tiles of
   * later ones, one more waits for a stage, and the one after it is noted. */
  static constexpr int kSegments = kStages + 3;

  /* Of the merges: lanes of a row of O, four values each. */
  static constexpr int kLanesPerRow = kHeadDim < 128 ? kHeadDim / 4 : 32;
  static constexpr int kRowsPerWarp = 32 / kLanesPerRow;

  static_assert(kKeysPerWarp % 16 == 0, "warps tile M x keys");
  static_assert(kStages >= 2, "copies run behind the products");
};

}  // namespace dspark
