#include "pk/row_blocks.h"

#include <limits>

#include "pk/abi.h"
#include "pk/numeric.h"

// One binary for every x86-64: the loader picks the widest clone the machine has. Needs ifunc, hence glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PK_CLONES
#endif

namespace pk {
namespace {

template <typename T>
PK_INLINE float load_block(const void* src, int64_t n, float* block) {
  const T* in = static_cast<const T*>(src);
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(in[i]);
    block[i] = x;
    highest = x > highest ? x : highest;
  }
  return highest;
}

template <typename T>
PK_INLINE void store_block(const float* block, int64_t n, void* dst) {
  T* out = static_cast<T*>(dst);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(block[i]);
}

PK_CLONES float load_f32(const void* src, int64_t n, float* block) { return load_block<float>(src, n, block); }
PK_CLONES float load_bf16(const void* src, int64_t n, float* block) { return load_block<bfloat16>(src, n, block); }
PK_CLONES float load_f16(const void* src, int64_t n, float* block) { return load_block<float16>(src, n, block); }

PK_CLONES void store_f32(const float* block, int64_t n, void* dst) { store_block<float>(block, n, dst); }
PK_CLONES void store_bf16(const float* block, int64_t n, void* dst) { store_block<bfloat16>(block, n, dst); }
PK_CLONES void store_f16(const float* block, int64_t n, void* dst) { store_block<float16>(block, n, dst); }

}  // namespace

const DtypeOps* dtype_ops(int32_t dtype) {
  static const DtypeOps f32{load_f32, store_f32, 4};
  static const DtypeOps bf16{load_bf16, store_bf16, 2};
  static const DtypeOps f16{load_f16, store_f16, 2};
  switch (dtype) {
    case PK_FLOAT32:
      return &f32;
    case PK_BFLOAT16:
      return &bf16;
    case PK_FLOAT16:
      return &f16;
    default:
      return nullptr;
  }
}

PK_CLONES int64_t take_equal(float* block, int64_t n, float value) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = block[i] == value;
    count += equal ? 1 : 0;
    block[i] = equal ? -std::numeric_limits<float>::infinity() : block[i];
  }
  return count;
}

// The order of the additions is fixed by the block alone, so results never depend on the thread count.
PK_CLONES float sum_exp2(const float* block, int64_t n, float shift, float scale) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exp2_fast((block[i] - shift) * scale);
  return sum;
}

PK_CLONES BlockSums sum_exp2_weighted(const float* block, int64_t n, float shift, float scale) {
  float sum = 0.0f;
  float weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < n; ++i) {
    const float t = (block[i] - shift) * scale;
    const float e = exp2_fast(t);
    sum += e;
    weighted += e * clamp_exponent(t);
  }
  return {sum, weighted};
}

PK_CLONES void scale_exp2(float* block, int64_t n, float shift, float scale, float a, float b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = (block[i] - shift) * scale;
    block[i] = exp2_fast(t) * (a + b * clamp_exponent(t));
  }
}

}  // namespace pk
