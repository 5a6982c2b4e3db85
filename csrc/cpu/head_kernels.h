// Microkernels of an output layer: packed operands, block products with float32 accumulators, and the softmax of a tile
// of logits while it is in cache. One set per instruction set, chosen once (head_kernels.cpp); head_forward.cpp and
// head_backward.cpp know the order of the work, and nothing of instructions.
//
// Every product here is tile[row][lane] = sum over k of strip[k][row] * panel[k][lane]:
//   logits           rows are entries of the vocabulary, lanes tokens, k the width D;
//   gradient of hidden  rows are columns of D, lanes tokens, k the vocabulary;
//   gradient of weight  rows are entries of the vocabulary, lanes columns of D, k tokens.
// Each element is summed over k in order, by itself: its bits depend on its two operands, never on where in a tile it
// lies or on what lies beside it. What is missing to a whole panel or strip is zeros, and goes through the same code.
#pragma once

#include <cstdint>

#include "half.h"

namespace pk {

// k is summed in registers over at most this many elements, then added to the tile: with one running sum the rounding
// of a large logit would grow with the width.
constexpr int64_t kMaxDepth = 96;
// Rows or columns of a row-major matrix; dtype is a pk_dtype.
struct HeadMatrix {
  const void* data;
  int64_t stride;  // elements
  int64_t rows;
  int64_t columns;
  int32_t dtype;
};

// Of the lanes of a panel, over the rows of the vocabulary taken so far: the largest logit, the sum of 2^t and of t 2^t
// with t = (z - highest) * scale. -inf, 0 and 0 before the first.
struct LaneSoftmax {
  float* highest;
  float* sum;
  float* weighted;  // or null
  float* of_tile = nullptr;  // or where the largest logit of the tile being taken is left, by itself
};

// d loss / dz = 2^t (a + b t), t = z * scale + bias. Where z is capped the logit's own gradient is (1 - (z / softcap)^2)
// times that.
struct LaneGradient {
  const float* bias;
  const float* a;
  const float* b;  // or null for 0
  float scale;
  float inverse_cap;  // 1 / softcap, or 0 for no cap
};

struct HeadKernels {
  const char* name;
  int32_t lanes;          // of a panel
  int32_t rows;           // of a strip
  int32_t depth_unit;     // depths are multiples of this
  int32_t operand_bytes;  // 4: float32 operands; 2: bfloat16 ones

  // Around the work of one thread; null where there is nothing to do.
  void (*begin)();
  void (*end)();

  // Elements [k, k + depth) of the rows (or columns) [first, first + lanes or rows) of a matrix; zeros beyond its ends.
  void (*panel_of_rows)(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out);
  void (*panel_of_columns)(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out);
  void (*strip_of_rows)(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out);
  void (*strip_of_columns)(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out);

  // One strip times one panel. Rows of the tile are row_stride floats apart; `add` adds to it.
  void (*product)(const void* strip, const void* panel, int64_t depth, float* tile, int64_t row_stride, bool add);
  // The same where the rows are those of gradient tiles, k their tokens: n_tiles of them, tile_stride operands apart.
  void (*product_of_tiles)(const void* tiles, int64_t tile_stride, int64_t n_tiles, const void* panel, float* out,
                           int64_t row_stride, bool add);

  // z + bias of each row (bias or null), rounded to `rounded` if that is a 16-bit dtype, then softcap tanh(z / softcap)
  // unless softcap is 0.
  void (*finish)(float* tile, int64_t n_rows, const float* bias, int32_t rounded, float softcap);
  // Takes n_rows of a tile. The same bits of highest and sum with and without `weighted`.
  void (*softmax)(const float* tile, int64_t n_rows, float scale, const LaneSoftmax& state);
  // Takes what another state took.
  void (*merge)(const LaneSoftmax& other, float scale, const LaneSoftmax& state);
  // float32 operands: rows (= columns) of the gradient, [n_rows][lanes]. bfloat16 ones: rows [n_rows][lanes], and as
  // pairs of rows [n_rows / 2][lanes][2], n_rows even. `pairs` is not used with float32 operands.
  void (*gradient)(const float* tile, int64_t n_rows, const LaneGradient& by, void* rows, void* pairs);
  // n floats in another dtype.
  void (*convert)(const float* in, int64_t n, int32_t dtype, void* out);
};

// For inputs of this dtype (a pk_dtype) on this processor, or the instruction set that PRIME_KERNELS_CPU_ISA names.
const HeadKernels& head_kernels(int32_t dtype);

}  // namespace pk
