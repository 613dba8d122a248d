/*
 * Tokens that a grammar allows: a bit per (row, token), 1 = allowed, token v in bit v % 32 of word
 * v / 32 of its row. A forbidden token's logit is -inf, in the law handed on as in the draw.
 */
#pragma once

#include <cmath>
#include <cstdint>

#include "common/logit_row.cuh"

namespace dspark {

struct GrammarMask {
  const int32_t* words; /* [rows, words_per_row]; nullptr: everything is allowed */
  int32_t words_per_row;
};

/* Bit i: whether token 4 * quad + i of the row is allowed. */
__device__ __forceinline__ uint32_t allowed_in_quad(const GrammarMask& mask,
                                                    int64_t row,
                                                    int32_t quad) {
  if (mask.words == nullptr) return 0xfu;
  constexpr int kQuadsPerWord = 32 / kQuad;
  const auto word =
      static_cast<uint32_t>(mask.words[row * mask.words_per_row + quad / kQuadsPerWord]);
  return word >> quad % kQuadsPerWord * kQuad & 0xfu;
}

}  // namespace dspark
