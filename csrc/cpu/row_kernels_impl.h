// The row kernels; row_kernels_{avx512,avx2,portable}.cpp compile this file with their flags. It uses no standard
// library templates: the linker could choose an inline std::max compiled for AVX-512 for the whole program.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_kernels.h"
#include "vec.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int64_t kBlock = kSoftmaxBlock;  // at most 64 additions per lane
constexpr float kLargestSum = 16384.0f;  // of a block: beyond it exponents lose digits, and the bias must be raised
constexpr float kInf = __builtin_inff();

template <typename T>
PK_INLINE T minus_infinity();
template <>
PK_INLINE float minus_infinity<float>() {
  return -kInf;
}
template <>
PK_INLINE bfloat16 minus_infinity<bfloat16>() {
  return {0xff80u};
}
template <>
PK_INLINE float16 minus_infinity<float16>() {
  return {0xfc00u};
}

// The last elements of a row, fewer than a step, padded with -inf to a whole step.
template <typename T>
struct Tail {
  alignas(64) T step[kStep];
  PK_INLINE Tail(const T* z, int64_t n) {
    for (int64_t i = 0; i < kStep; ++i) step[i] = minus_infinity<T>();
    std::memcpy(step, z, static_cast<size_t>(n) * sizeof(T));
  }
};

struct BlockSums {
  F sum[kVectors];
  F weighted[kVectors];
};

// The reference point of a block's exponents; 0 while all logits were -inf.
struct Origin {
  F scale;
  F highest;
  F bias;
  PK_INLINE explicit Origin(const RowSoftmax& state) {
    const float finite = state.highest == -kInf ? 0.0f : state.highest;
    scale = broadcast(state.scale);
    highest = broadcast(finite);
    bias = broadcast(-(finite * state.scale));
  }
};

template <typename T, bool kWeighted>
PK_INLINE void take_step(const T* z, const Origin& origin, BlockSums& block) {
  F x[kVectors];
  load(z, x);
  for (int i = 0; i < kVectors; ++i) {
    if (kWeighted) {
      // e is exactly 1 at the maximum, so that the entropy of a peaked row keeps its digits.
      const F t = clamp((x[i] - origin.highest) * origin.scale);
      const F e = exp2<true>(t);
      block.sum[i] += e;
      block.weighted[i] += t * e;
    } else {
      block.sum[i] += exp2<false>(x[i] * origin.scale + origin.bias);
    }
  }
}

template <typename T, bool kWeighted>
PK_INLINE BlockSums take_block(const T* z, int64_t n, const RowSoftmax& state) {
  BlockSums block;
  for (int i = 0; i < kVectors; ++i) block.sum[i] = block.weighted[i] = F{};
  const Origin origin(state);
  int64_t start = 0;
  for (; start + kStep <= n; start += kStep) take_step<T, kWeighted>(z + start, origin, block);
  if (start < n) take_step<T, kWeighted>(Tail<T>(z + start, n - start).step, origin, block);
  return block;
}

// Ignores NaN.
template <typename T>
PK_INLINE float highest_of(const T* z, int64_t n) {
  F x[kVectors];
  F highest[kVectors];
  for (int i = 0; i < kVectors; ++i) highest[i] = broadcast(-kInf);
  int64_t start = 0;
  for (; start + kStep <= n; start += kStep) {
    load(z + start, x);
    for (int i = 0; i < kVectors; ++i) highest[i] = max(x[i], highest[i]);
  }
  if (start < n) {
    load(Tail<T>(z + start, n - start).step, x);
    for (int i = 0; i < kVectors; ++i) highest[i] = max(x[i], highest[i]);
  }
  return max_of(highest);
}

// Rescales the sums to a higher logit. False if that is out of range.
template <bool kWeighted>
PK_INLINE bool raise_to(float highest, RowSoftmax& state) {
  if (!(highest > state.highest)) return true;
  const float shift = highest * state.scale;
  if (!(shift < kFarthest && shift > -kFarthest)) return false;
  const double scale = state.scale;
  const double offset = kWeighted ? 0.0 : highest * scale - shift;
  if (state.highest != -kInf) {
    const double step = (static_cast<double>(state.highest) - highest) * scale + offset - state.offset;
    const double factor = std::exp2(step);
    // If the factor has vanished, step may be infinite and inf * 0 is NaN.
    state.weighted = factor == 0.0 ? 0.0 : factor * (state.weighted + step * state.sum);
    state.sum *= factor;
  }
  state.highest = highest;
  state.offset = offset;
  return true;
}

template <typename T, bool kWeighted>
bool softmax(const void* logits, int64_t n, RowSoftmax* state) {
  const T* z = static_cast<const T*>(logits);
  // Without weights no maximum is kept: an estimate is used until the sums show that it is far too low.
  if (!kWeighted && !raise_to<kWeighted>(highest_of(z, n < kStep ? n : kStep), *state)) return false;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = n - start < kBlock ? n - start : kBlock;
    const bool raise = kWeighted || state->highest == -kInf;
    if (raise && !raise_to<kWeighted>(highest_of(z + start, size), *state)) return false;
    BlockSums block = take_block<T, kWeighted>(z + start, size, *state);
    float sum = sum_of(block.sum);
    if (!kWeighted && sum > kLargestSum) {
      if (!raise_to<kWeighted>(highest_of(z + start, size), *state)) return false;
      block = take_block<T, kWeighted>(z + start, size, *state);
      sum = sum_of(block.sum);
    }
    state->sum += static_cast<double>(sum);
    if (state->blocks != nullptr) *state->blocks++ = {state->highest, state->offset, static_cast<double>(sum)};
    if (kWeighted) state->weighted += static_cast<double>(sum_of(block.weighted));
  }
  return true;
}

template <typename T, bool kWeighted>
PK_INLINE void gradient_step(const T* z, F scale, F bias, F a, F b, F out[kVectors]) {
  F x[kVectors];
  load(z, x);
  for (int i = 0; i < kVectors; ++i) {
    F t = x[i] * scale + bias;
    if (kWeighted) t = clamp(t);
    const F e = exp2<true>(t);
    out[i] = kWeighted ? e * (a + b * t) : e * a;
  }
}

template <typename T, bool kWeighted, bool kStream>
PK_INLINE void gradient_row(const T* z, int64_t n, const RowGradient& by, T* out) {
  const F scale = broadcast(by.scale);
  const F bias = broadcast(by.bias);
  const F a = broadcast(by.a);
  const F b = broadcast(by.b);
  F g[kVectors];
  int64_t start = 0;
  for (; start + kStep <= n; start += kStep) {
    gradient_step<T, kWeighted>(z + start, scale, bias, a, b, g);
    store<kStream>(out + start, g);
  }
  if (start < n) {
    Tail<T> tail(z + start, n - start);
    gradient_step<T, kWeighted>(tail.step, scale, bias, a, b, g);
    store<false>(tail.step, g);
    std::memcpy(out + start, tail.step, static_cast<size_t>(n - start) * sizeof(T));
  }
}

template <typename T, bool kWeighted>
void gradient(const void* logits, int64_t n, const RowGradient& by, bool stream, void* out) {
  const T* z = static_cast<const T*>(logits);
  T* to = static_cast<T*>(out);
#if PK_ISA_LANES > 4
  if (stream && reinterpret_cast<uintptr_t>(to) % sizeof(F) == 0) {
    gradient_row<T, kWeighted, true>(z, n, by, to);
    _mm_sfence();
    return;
  }
#else
  (void)stream;
#endif
  gradient_row<T, kWeighted, false>(z, n, by, to);
}

template <typename T>
int64_t search(const void* logits, int64_t n, float threshold) {
  const T* z = static_cast<const T*>(logits);
  for (int64_t start = 0; start < n; start += kSearchBlock) {
    const int64_t size = n - start < kSearchBlock ? n - start : kSearchBlock;
    if (highest_of(z + start, size) >= threshold) return start;
  }
  return n;
}

}  // namespace
}  // namespace PK_ISA

#define PK_PASTE(a, b) a##b
#define PK_TABLE(isa) PK_PASTE(row_kernels_, isa)
#define PK_STRING(text) #text
#define PK_NAME(isa) PK_STRING(isa)

// Indexed by pk_dtype: float32, bfloat16, float16.
extern const RowKernels PK_TABLE(PK_ISA);
const RowKernels PK_TABLE(PK_ISA) = {
    PK_NAME(PK_ISA),
    {{PK_ISA::softmax<float, false>, PK_ISA::softmax<float, true>},
     {PK_ISA::softmax<bfloat16, false>, PK_ISA::softmax<bfloat16, true>},
     {PK_ISA::softmax<float16, false>, PK_ISA::softmax<float16, true>}},
    {{PK_ISA::gradient<float, false>, PK_ISA::gradient<float, true>},
     {PK_ISA::gradient<bfloat16, false>, PK_ISA::gradient<bfloat16, true>},
     {PK_ISA::gradient<float16, false>, PK_ISA::gradient<float16, true>}},
    {PK_ISA::search<float>, PK_ISA::search<bfloat16>, PK_ISA::search<float16>},
};

}  // namespace pk
