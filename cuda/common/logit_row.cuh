/*
 * Logits four neighbours (a quad) at a time: the tokens of one Philox call, and 16 bytes of f32.
 */
#pragma once

namespace dspark {

constexpr int kQuad = 4;

}  // namespace dspark
