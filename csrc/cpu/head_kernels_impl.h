// The microkernels of head_kernels.h, written once; head_kernels_*.cpp compile them with their flags. No standard library
// templates here, for the reason given in row_kernels_impl.h.

#include <cstdint>
#include <cstring>

#include "head_kernels.h"
#include "pk/abi.h"
#include "vec.h"

namespace pk {
namespace PK_ISA {
namespace {

// Operands are words of 32 bits: a float, or two bfloat16 that follow one another in k.
#if defined(__AVX512BF16__)
constexpr int kPerWord = 2;
#else
constexpr int kPerWord = 1;
#endif
constexpr int kPanel = 2 * kLanes;
// As many accumulators as leave room for two vectors of the panel and one of the strip.
constexpr int kStrip = kLanes == 16 ? 12 : 6;
constexpr float kInf = __builtin_inff();

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));
typedef int32_t I __attribute__((vector_size(4 * PK_ISA_LANES)));

// The compiler may fuse no multiplication on one side of this with an addition on the other: what has the same bits in
// two instances of a template stays so.
PK_INLINE F opaque(F x) {
#if defined(PK_EMULATED)  // by tests, without such registers
#elif defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

PK_INLINE F exponential(F t) { return opaque(exp2<true>(opaque(t))); }

// --- packing ----------------------------------------------------------------------------------------------------

// Words of a matrix of floats: one element each.
template <typename T>
struct Elements {
  static constexpr int kPer = 1;
  typedef T Element;
  static PK_INLINE uint32_t word(const T* low, const T*) { return bits_of(to_float(*low)); }
  static PK_INLINE U4 four(const float* p) { return load_as<U4>(p); }
  static PK_INLINE U4 four(const bfloat16* p) { return __builtin_convertvector(load_as<H4>(p), U4) << 16; }
  static PK_INLINE U4 four(const float16* p) {
#if defined(__F16C__)
    return (U4)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return U4{bits_of(to_float(p[0])), bits_of(to_float(p[1])), bits_of(to_float(p[2])), bits_of(to_float(p[3]))};
#endif
  }
};

// Words of a bfloat16 matrix: two elements each, the first one low.
struct Pairs {
  static constexpr int kPer = 2;
  typedef bfloat16 Element;
  static PK_INLINE uint32_t word(const bfloat16* low, const bfloat16* high) {
    return low->bits | (high == nullptr ? 0u : uint32_t{high->bits} << 16);
  }
  static PK_INLINE U4 four(const bfloat16* p) { return load_as<U4>(p); }
};

PK_INLINE void transpose(U4 x[4]) {
  const U4 a = __builtin_shuffle(x[0], x[1], U4{0, 4, 1, 5}), b = __builtin_shuffle(x[2], x[3], U4{0, 4, 1, 5});
  const U4 c = __builtin_shuffle(x[0], x[1], U4{2, 6, 3, 7}), d = __builtin_shuffle(x[2], x[3], U4{2, 6, 3, 7});
  x[0] = __builtin_shuffle(a, b, U4{0, 1, 4, 5});
  x[1] = __builtin_shuffle(a, b, U4{2, 3, 6, 7});
  x[2] = __builtin_shuffle(c, d, U4{0, 1, 4, 5});
  x[3] = __builtin_shuffle(c, d, U4{2, 3, 6, 7});
}

// out[word][i] = words along row first + i, in blocks of four by four.
template <typename Source, int kWidth>
void pack_rows(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, uint32_t* out) {
  typedef typename Source::Element T;
  const T* base = static_cast<const T*>(m.data) + k;
  const int64_t words = depth / Source::kPer;
  const int64_t there = m.columns - k < depth ? m.columns - k : depth;  // elements
  const int64_t fours = there / Source::kPer / 4 * 4;
  const int64_t present = m.rows - first < kWidth ? m.rows - first : kWidth;
  for (int64_t i = 0; i < kWidth; i += 4) {
    const int64_t width = kWidth - i < 4 ? kWidth - i : 4;
    const T* row[4];
    for (int64_t j = 0; j < 4; ++j) row[j] = i + j < present ? base + (first + i + j) * m.stride : nullptr;
    for (int64_t w = 0; w < fours; w += 4) {
      U4 x[4];
      for (int j = 0; j < 4; ++j) x[j] = row[j] == nullptr ? U4{} : Source::four(row[j] + w * Source::kPer);
      transpose(x);
      for (int j = 0; j < 4; ++j) {
        std::memcpy(out + (w + j) * kWidth + i, &x[j], kWidth % 4 == 0 || width == 4 ? 16 : kWidth % 4 * 4);
      }
    }
    for (int64_t w = fours; w < words; ++w) {
      const int64_t e = w * Source::kPer;
      for (int64_t j = 0; j < width; ++j) {
        const T* p = row[j] + e;
        const bool full = Source::kPer == 2 && e + 1 < there;
        out[w * kWidth + i + j] = row[j] == nullptr || e >= there ? 0u : Source::word(p, full ? p + 1 : nullptr);
      }
    }
  }
}

// out[word][i] = words along column first + i.
template <typename Source, int kWidth>
void pack_columns(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, uint32_t* out) {
  typedef typename Source::Element T;
  const T* base = static_cast<const T*>(m.data) + first;
  const int64_t words = depth / Source::kPer;
  const int64_t present = m.columns - first < kWidth ? m.columns - first : kWidth;
  for (int64_t w = 0; w < words; ++w, out += kWidth) {
    const int64_t row = k + w * Source::kPer;
    if (row >= m.rows) {
      std::memset(out, 0, kWidth * sizeof *out);
      continue;
    }
    const T* low = base + row * m.stride;
    const T* high = Source::kPer == 2 && row + 1 < m.rows ? low + m.stride : nullptr;
    if (present == kWidth && (Source::kPer == 1 || high != nullptr)) {
      for (int i = 0; i < kWidth; ++i) out[i] = Source::word(low + i, Source::kPer == 2 ? high + i : nullptr);
    } else {
      for (int i = 0; i < kWidth; ++i) {
        out[i] = i < present ? Source::word(low + i, high == nullptr ? nullptr : high + i) : 0u;
      }
    }
  }
}

template <int kWidth>
void rows_of(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out) {
  uint32_t* to = static_cast<uint32_t*>(out);
#if defined(__AVX512BF16__)
  pack_rows<Pairs, kWidth>(m, first, k, depth, to);
#else
  if (m.dtype == PK_FLOAT32) return pack_rows<Elements<float>, kWidth>(m, first, k, depth, to);
  if (m.dtype == PK_BFLOAT16) return pack_rows<Elements<bfloat16>, kWidth>(m, first, k, depth, to);
  pack_rows<Elements<float16>, kWidth>(m, first, k, depth, to);
#endif
}

template <int kWidth>
void columns_of(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out) {
  uint32_t* to = static_cast<uint32_t*>(out);
#if defined(__AVX512BF16__)
  pack_columns<Pairs, kWidth>(m, first, k, depth, to);
#else
  if (m.dtype == PK_FLOAT32) return pack_columns<Elements<float>, kWidth>(m, first, k, depth, to);
  if (m.dtype == PK_BFLOAT16) return pack_columns<Elements<bfloat16>, kWidth>(m, first, k, depth, to);
  pack_columns<Elements<float16>, kWidth>(m, first, k, depth, to);
#endif
}

// --- products ---------------------------------------------------------------------------------------------------

PK_INLINE F multiply_add(U a, U b, F sum) {
#if defined(__AVX512BF16__)
  return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return as_f(a) * as_f(b) + sum;
#endif
}

// sums += the words of kStrip rows, kRow apart, times the words of a panel; those of a row are kWord apart.
template <int kRow, int kWord>
PK_INLINE void accumulate(const uint32_t* rows, const uint32_t* panel, int64_t words, F sums[kStrip][2]) {
  for (int64_t k = 0; k < words; ++k, rows += kWord, panel += kPanel) {
    const U low = load_as<U>(panel), high = load_as<U>(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const U x = U{} + rows[r * kRow];
      sums[r][0] = multiply_add(x, low, sums[r][0]);
      sums[r][1] = multiply_add(x, high, sums[r][1]);
    }
  }
}

PK_INLINE void leave(const F sums[kStrip][2], float* tile, int64_t row_stride, bool add) {
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
    float* to = tile + r * row_stride;
    store_as(to, add ? load_as<F>(to) + sums[r][0] : sums[r][0]);
    store_as(to + kLanes, add ? load_as<F>(to + kLanes) + sums[r][1] : sums[r][1]);
  }
}

PK_INLINE void clear(F sums[kStrip][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) sums[r][0] = sums[r][1] = F{};
}

[[maybe_unused]] void product(const void* strip, const void* panel, int64_t depth, float* tile, int64_t row_stride,
                              bool add) {
  F sums[kStrip][2];
  clear(sums);
  accumulate<1, kStrip>(static_cast<const uint32_t*>(strip), static_cast<const uint32_t*>(panel), depth / kPerWord,
                        sums);
  leave(sums, tile, row_stride, add);
}

[[maybe_unused]] void product_of_tiles(const void* tiles, int64_t tile_stride, int64_t n_tiles, const void* panel,
                                       float* out, int64_t row_stride, bool add) {
  constexpr int kWords = kPanel / kPerWord;
  F sums[kStrip][2];
  clear(sums);
  const uint32_t* words = static_cast<const uint32_t*>(panel);
  for (int64_t t = 0; t < n_tiles; ++t, words += kWords * kPanel) {
    accumulate<kWords, 1>(static_cast<const uint32_t*>(tiles) + t * (tile_stride / kPerWord), words, kWords, sums);
  }
  leave(sums, out, row_stride, add);
}

// --- tiles ------------------------------------------------------------------------------------------------------

PK_INLINE F rounded_to_bfloat16(F x) { return as_f(round_to_upper_half(x) & 0xffff0000u); }

PK_INLINE F rounded_to_float16(F x) {
#if PK_ISA_LANES == 16
  return (F)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif PK_ISA_LANES == 8
  return (F)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return half_to_float(half_of(x));
#endif
}

// x + x^3 P(x^2) up to 0.625, P minimax for the relative error; beyond it (1 - e) / (1 + e) with e = exp(-2 |x|). Exactly
// -1 and 1 at infinity, NaN for NaN.
PK_INLINE F tanh(F x) {
  constexpr float kFive[5] = {-0.3333328068256378f, 0.13331441581249237f, -0.05373971536755562f, 0.0206390880048275f,
                              -0.00570498825982213f};
  constexpr float kMinusTwoLog2E = -2.8853900817779268f;
  const U sign = as_u(x) & 0x80000000u;
  const F size = as_f(as_u(x) ^ sign), square = x * x;
  F p = broadcast(kFive[4]);
  for (int i = 3; i >= 0; --i) p = p * square + kFive[i];
  const F e = exp2<true>(size * kMinusTwoLog2E);
  const F far = as_f(as_u((1.0f - e) / (1.0f + e)) | sign);
  return size < 0.625f ? x + x * (square * p) : far;
}

void finish(float* tile, int64_t n_rows, const float* bias, int32_t rounded, float softcap) {
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int j = 0; j < kPanel; j += kLanes) {
      float* at = tile + r * kPanel + j;
      F z = load_as<F>(at);
      if (bias != nullptr) z = z + bias[r];
      if (rounded == PK_BFLOAT16) z = rounded_to_bfloat16(z);
      if (rounded == PK_FLOAT16) z = rounded_to_float16(z);
      if (softcap != 0.0f) z = tanh(z * (1.0f / softcap)) * softcap;
      store_as(at, z);
    }
  }
}

// What t is relative to: 0 while every logit was -inf.
PK_INLINE F origin(F highest) { return as_f(as_u(highest) & (U)(I)(highest != -kInf)); }

template <bool kWeighted>
PK_INLINE void join(F old_highest, F old_sum, F old_weighted, F top, F scale, F& sum, F& weighted) {
  const F step = clamp((old_highest - top) * scale);
  const F factor = exponential(step);
  sum = opaque(old_sum * factor);
  if (kWeighted) weighted = factor * (old_weighted + step * old_sum);
}

template <bool kWeighted>
PK_INLINE void softmax_of(const float* tile, int64_t n_rows, F scale, const LaneSoftmax& state) {
  F highest[2], top[2], sum[2], weighted[2];
  for (int j = 0; j < 2; ++j) highest[j] = broadcast(-kInf);
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int j = 0; j < 2; ++j) highest[j] = max(load_as<F>(tile + r * kPanel + j * kLanes), highest[j]);
  }
  for (int j = 0; j < 2; ++j) {
    if (state.of_tile != nullptr) store_as(state.of_tile + j * kLanes, highest[j]);
    highest[j] = max(highest[j], load_as<F>(state.highest + j * kLanes));
    top[j] = origin(highest[j]);
    sum[j] = weighted[j] = F{};
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int j = 0; j < 2; ++j) {
      const F t = clamp((load_as<F>(tile + r * kPanel + j * kLanes) - top[j]) * scale);
      const F e = exponential(t);
      sum[j] += e;
      if (kWeighted) weighted[j] += t * e;
    }
  }
  for (int j = 0; j < 2; ++j) {
    const int at = j * kLanes;
    F old_sum, old_weighted;
    join<kWeighted>(load_as<F>(state.highest + at), load_as<F>(state.sum + at),
                    kWeighted ? load_as<F>(state.weighted + at) : F{}, top[j], scale, old_sum, old_weighted);
    store_as(state.highest + at, highest[j]);
    store_as(state.sum + at, old_sum + sum[j]);
    if (kWeighted) store_as(state.weighted + at, old_weighted + weighted[j]);
  }
}

void softmax(const float* tile, int64_t n_rows, float scale, const LaneSoftmax& state) {
  if (state.weighted == nullptr) return softmax_of<false>(tile, n_rows, broadcast(scale), state);
  softmax_of<true>(tile, n_rows, broadcast(scale), state);
}

template <bool kWeighted>
PK_INLINE void merge_of(const LaneSoftmax& other, F scale, const LaneSoftmax& state) {
  for (int at = 0; at < kPanel; at += kLanes) {
    const F highest = load_as<F>(state.highest + at), other_highest = load_as<F>(other.highest + at);
    const F top = max(highest, other_highest);
    F sum[2], weighted[2];
    join<kWeighted>(highest, load_as<F>(state.sum + at), kWeighted ? load_as<F>(state.weighted + at) : F{},
                    origin(top), scale, sum[0], weighted[0]);
    join<kWeighted>(other_highest, load_as<F>(other.sum + at), kWeighted ? load_as<F>(other.weighted + at) : F{},
                    origin(top), scale, sum[1], weighted[1]);
    store_as(state.highest + at, top);
    store_as(state.sum + at, sum[0] + sum[1]);
    if (kWeighted) store_as(state.weighted + at, weighted[0] + weighted[1]);
  }
}

void merge(const LaneSoftmax& other, float scale, const LaneSoftmax& state) {
  if (state.weighted == nullptr) return merge_of<false>(other, broadcast(scale), state);
  merge_of<true>(other, broadcast(scale), state);
}

template <bool kWeighted, bool kCapped>
PK_INLINE F gradient_at(const float* tile, const LaneGradient& by, int j) {
  const F z = load_as<F>(tile + j);
  F t = z * by.scale + load_as<F>(by.bias + j);
  if (kWeighted) t = clamp(t);
  const F e = exponential(t);
  const F a = load_as<F>(by.a + j);
  const F gradient = kWeighted ? e * (a + load_as<F>(by.b + j) * t) : e * a;
  if (!kCapped) return gradient;
  const F share = z * by.inverse_cap;
  // Rounding must not make the slope at the cap itself negative; NaN stays NaN.
  return gradient * max(F{}, 1.0f - share * share);
}

template <bool kWeighted, bool kCapped>
PK_INLINE void gradient_of(const float* tile, int64_t n_rows, const LaneGradient& by, void* rows,
                           [[maybe_unused]] void* pairs) {
#if defined(__AVX512BF16__)
  for (int64_t r = 0; r < n_rows; r += 2, tile += 2 * kPanel) {
    uint16_t* to = static_cast<uint16_t*>(rows) + r * kPanel;
    uint32_t* pair = static_cast<uint32_t*>(pairs) + r / 2 * kPanel;
    for (int j = 0; j < kPanel; j += kLanes) {
      const F even = gradient_at<kWeighted, kCapped>(tile, by, j);
      const F odd = gradient_at<kWeighted, kCapped>(tile + kPanel, by, j);
      const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)even);
      const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)odd);
      store_as(to + j, low);
      store_as(to + kPanel + j, high);
      const U upper = (U)_mm512_cvtepu16_epi32(high);
      store_as(pair + j, (U)_mm512_cvtepu16_epi32(low) | (upper << 16));
    }
  }
#else
  float* to = static_cast<float*>(rows);
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int j = 0; j < kPanel; j += kLanes) {
      store_as(to + r * kPanel + j, gradient_at<kWeighted, kCapped>(tile + r * kPanel, by, j));
    }
  }
#endif
}

void gradient(const float* tile, int64_t n_rows, const LaneGradient& by, void* rows, void* pairs) {
  if (by.inverse_cap != 0.0f) {
    if (by.b == nullptr) return gradient_of<false, true>(tile, n_rows, by, rows, pairs);
    return gradient_of<true, true>(tile, n_rows, by, rows, pairs);
  }
  if (by.b == nullptr) return gradient_of<false, false>(tile, n_rows, by, rows, pairs);
  gradient_of<true, false>(tile, n_rows, by, rows, pairs);
}

void convert(const float* in, int64_t n, int32_t dtype, void* out) {
  typedef uint16_t H __attribute__((vector_size(2 * PK_ISA_LANES)));
  if (dtype == PK_FLOAT32) {
    std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (dtype == PK_BFLOAT16) {
    for (; i + kLanes <= n; i += kLanes) {
      const F x = load_as<F>(in + i);
      const U number = (U)(I)(x == x);
      const U bits = ((round_to_upper_half(x) >> 16) & number) | (0x7fc0u & ~number);
      store_as(to + i, __builtin_convertvector(bits, H));
    }
    for (; i < n; ++i) to[i] = from_float<bfloat16>(in[i]).bits;
    return;
  }
#if PK_ISA_LANES == 16
  for (; i + kLanes <= n; i += kLanes) {
    store_as(to + i, _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif PK_ISA_LANES == 8
  for (; i + kLanes <= n; i += kLanes) {
    store_as(to + i, _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < n; ++i) to[i] = from_float<float16>(in[i]).bits;
}

}  // namespace
}  // namespace PK_ISA
}  // namespace pk
