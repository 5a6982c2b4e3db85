// The inner loops of the row kernels, over one block of at most kBlock columns held in L1 as float. They are the whole
// hot path and the only code that depends on the instruction set, so a hand-written version replaces just this file.
#pragma once

#include <cstdint>

namespace pk {

constexpr int64_t kBlock = 1024;

// Convert `n` values to float; returns their maximum, skipping NaN (a later exp2 brings it back).
using LoadBlock = float (*)(const void* src, int64_t n, float* block);
// Round `n` floats to the destination type.
using StoreBlock = void (*)(const float* block, int64_t n, void* dst);

struct DtypeOps {
  LoadBlock load;
  StoreBlock store;
  int64_t item_size;
};

// Null for an unknown dtype code.
const DtypeOps* dtype_ops(int32_t dtype);

// Replace every element equal to `value` by -inf; returns how many there were.
int64_t take_equal(float* block, int64_t n, float value);

struct BlockSums {
  float exp;       // sum of 2^t
  float weighted;  // sum of t * 2^t, 0 where 2^t is 0
};

// t = (block - shift) * scale
float sum_exp2(const float* block, int64_t n, float shift, float scale);
BlockSums sum_exp2_weighted(const float* block, int64_t n, float shift, float scale);

// block = 2^t * (a + b * t), 0 where 2^t is 0
void scale_exp2(float* block, int64_t n, float shift, float scale, float a, float b);

}  // namespace pk
