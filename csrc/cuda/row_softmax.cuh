// What the row kernels share: 16-byte loads of rows at any address, and the softmax sums of a thread and of a block. Each
// thread keeps an online softmax over 16-byte loads, and the block combines them. The target is excluded from that pass
// and added at the end in double, as in the CPU kernels: in a float sum near 1 the tail of a peaked row would be rounded
// away.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pk/abi.h"

namespace pk::rows {

constexpr int kWarp = 32;
#ifdef PK_SMALL_TILES  // for tests: short rows take every path, and few threads are emulated
constexpr int kThreads = 64;
constexpr int kManyThreads = 128;
constexpr int64_t kFewRows = 8;
#else
constexpr int kThreads = 256;
// Threads per row where there are too few rows to fill the device.
constexpr int kManyThreads = 1024;
constexpr int64_t kFewRows = 512;
#endif
// Outstanding loads per thread: latency times bandwidth requires about 40 KiB in flight per multiprocessor.
constexpr int kUnroll = 4;
constexpr double kLn2 = 0.693147180559945309;
constexpr double kLog2e = 1.44269504088896340736;
constexpr float kLowest = -126.0f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// As many columns as a Pack<T> has, rounded to Out.
template <typename T, typename Out>
struct alignas(Pack<T>::kSize * sizeof(Out)) Rounded {
  Out value[Pack<T>::kSize];
};

// Elements of a row before its first 16-byte boundary: rows of odd length or of a slice start at any element. Columns
// are int32 throughout, as comparing an int64 with the target takes two instructions for each element.
template <typename T>
__device__ __forceinline__ int head_of(const T* row, int n_cols) {
  const int misaligned = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  const int head = misaligned == 0 ? 0 : Pack<T>::kSize - misaligned;
  return head < n_cols ? head : n_cols;
}

// 2^t in one instruction, without the scaling by which exp2f keeps results below 2^-126: next to a sum of 1 or more they
// are nothing.
__device__ __forceinline__ float power_of_two(float t) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}

// Keeps the factor of a vanished 2^t finite (0 * -inf is NaN); NaN stays NaN.
__device__ __forceinline__ float clamp_exponent(float t) { return t < kLowest ? kLowest : t; }

// sum of 2^t and of t * 2^t, with t = (z - highest) * scale.
struct Softmax {
  float highest;
  float sum;
  float weighted;

  __device__ __forceinline__ void raise_to(float value, float scale) {
    if (!(value > highest)) return;
    if (highest != -INFINITY) {
      const float step = (highest - value) * scale;
      const float factor = power_of_two(step);
      weighted = factor * (weighted + clamp_exponent(step) * sum);
      sum *= factor;
    }
    highest = value;
  }

  template <bool kEntropy>
  __device__ __forceinline__ void add(float z, float scale) {
    const float t = (z - (highest == -INFINITY ? 0.0f : highest)) * scale;
    const float e = power_of_two(t);
    sum += e;
    if (kEntropy) weighted += e * clamp_exponent(t);
  }

  __device__ __forceinline__ void merge(Softmax other, float scale) {
    raise_to(other.highest, scale);
    other.raise_to(highest, scale);
    sum += other.sum;
    weighted += other.weighted;
  }
};

__device__ __forceinline__ Softmax warp_combine(Softmax mine, float scale) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
    Softmax other;
    other.highest = __shfl_xor_sync(0xffffffffu, mine.highest, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, offset);
    other.weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, offset);
    mine.merge(other, scale);
  }
  return mine;
}

// Adds a pack of logits, with the target replaced by -inf.
template <typename T, bool kEntropy>
__device__ __forceinline__ void take_pack(Softmax& softmax, const Pack<T>& pack, int column, int id, float scale) {
  float z[Pack<T>::kSize];
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) z[k] = column + k == id ? -INFINITY : to_float(pack.value[k]);
  float highest = z[0];
#pragma unroll
  for (int k = 1; k < Pack<T>::kSize; ++k) highest = fmaxf(highest, z[k]);
  softmax.raise_to(highest, scale);
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) softmax.add<kEntropy>(z[k], scale);
}

// Calls take_pack(pack, first column) and take_one(value, column) for all that this thread has of a row of n_cols columns,
// with kAtOnce loads under way.
template <typename T, int kBlock, int kAtOnce, typename TakePack, typename TakeOne>
__device__ __forceinline__ void visit(const T* z, int n_cols, const TakePack& take_pack, const TakeOne& take_one) {
  const int head = head_of(z, n_cols);
  const int packs = (n_cols - head) / Pack<T>::kSize;
  const Pack<T>* body = reinterpret_cast<const Pack<T>*>(z + head);
  for (int i = threadIdx.x; i < head; i += kBlock) take_one(to_float(z[i]), i);
  int i = threadIdx.x;
  for (; i + (kAtOnce - 1) * kBlock < packs; i += kAtOnce * kBlock) {
    Pack<T> pack[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) pack[u] = body[i + u * kBlock];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) take_pack(pack[u], head + (i + u * kBlock) * Pack<T>::kSize);
  }
  for (; i < packs; i += kBlock) {
    const Pack<T> pack = body[i];  // one 16-byte load
    take_pack(pack, head + i * Pack<T>::kSize);
  }
  for (int c = head + packs * Pack<T>::kSize + threadIdx.x; c < n_cols; c += kBlock) take_one(to_float(z[c]), c);
}

// The sums of this thread's columns without the target, column id.
template <typename T, int kBlock, bool kEntropy>
__device__ __forceinline__ Softmax sweep(const T* z, int n_cols, int id, float scale) {
  Softmax softmax{-INFINITY, 0.0f, 0.0f};
  visit<T, kBlock, kUnroll>(
      z, n_cols,
      [&](const Pack<T>& pack, int column) { take_pack<T, kEntropy>(softmax, pack, column, id, scale); },
      [&](float z_of, int column) {
        const float value = column == id ? -INFINITY : z_of;
        softmax.raise_to(value, scale);
        softmax.add<kEntropy>(value, scale);
      });
  return softmax;
}

// The sums of the block's threads, in all of them.
template <int kBlock>
__device__ __forceinline__ Softmax block_combine(Softmax mine, float scale) {
  __shared__ Softmax partial[kBlock / kWarp];
  mine = warp_combine(mine, scale);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = mine;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  mine = lane < kBlock / kWarp ? partial[lane] : Softmax{-INFINITY, 0.0f, 0.0f};
  return warp_combine(mine, scale);
}

struct Results {
  double logp;
  double lse;
  double entropy;
};

// Adds the target's logit to the sums of the other columns.
__device__ __forceinline__ Results with_target(Softmax rest_of_row, double target, double inverse_temperature) {
  const double highest = fmax(static_cast<double>(rest_of_row.highest), target);
  const double exact_scale = inverse_temperature * kLog2e;
  const double step = rest_of_row.highest == -INFINITY ? 0.0 : (rest_of_row.highest - highest) * exact_scale;
  const double factor = exp2(step);
  const double rest = factor * rest_of_row.sum;
  const double t = (target - highest) * exact_scale;
  const double p = exp2(t);
  const double sum = rest + p;
  const double log_sum = log(sum);
  // log1p keeps the digits of `rest` if p is near 1; if p vanishes, the direct formula is exact enough.
  const double logp = p > 1e-280 ? -log1p(rest / p) : kLn2 * t - log_sum;
  const double weighted = factor == 0.0 ? 0.0 : factor * (rest_of_row.weighted + step * rest_of_row.sum);
  const double entropy = log_sum - kLn2 * (weighted + (p == 0.0 ? 0.0 : p * t)) / sum;
  return {logp, highest * inverse_temperature + log_sum, entropy};
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  cudaLaunchKernel(kernel, grid, dim3(threads), addresses, 0, stream);
}

// Columns are int32, with room for one loop step beyond the last.
constexpr int64_t kMaxColumns = int64_t{1} << 30;

inline bool valid_sizes(int64_t n_rows, int64_t n_cols) {
  return n_rows >= 0 && n_rows <= INT32_MAX && n_cols >= 1 && n_cols <= kMaxColumns;
}

inline bool known_dtype(int32_t dtype) { return dtype == PK_FLOAT32 || dtype == PK_BFLOAT16 || dtype == PK_FLOAT16; }

}  // namespace pk::rows
