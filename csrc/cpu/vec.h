// Vectors of the instruction set that the including file is compiled for. Everything is in a namespace of that
// instruction set, so that the linker never merges an inline function compiled for two of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#define PK_ISA amx
#define PK_ISA_LANES 16
#elif defined(__AVX512BF16__)
#define PK_ISA avx512_bf16
#define PK_ISA_LANES 16
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define PK_ISA avx512
#define PK_ISA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PK_ISA avx2
#define PK_ISA_LANES 8
#else
#define PK_ISA portable
#define PK_ISA_LANES 4
#endif

namespace pk {
namespace PK_ISA {

constexpr int kLanes = PK_ISA_LANES;
constexpr int kVectors = 4;                   // a step: enough independent chains to hide the latency of an FMA
constexpr int64_t kStep = kVectors * kLanes;  // elements

typedef float F __attribute__((vector_size(4 * PK_ISA_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * PK_ISA_LANES)));

template <typename V>
PK_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
PK_INLINE void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

PK_INLINE F as_f(U u) { return (F)u; }
PK_INLINE U as_u(F x) { return (U)x; }

PK_INLINE F broadcast(float x) { return x - F{}; }

// The larger one; b where either is NaN.
PK_INLINE F max(F a, F b) {
#if PK_ISA_LANES == 16
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif PK_ISA_LANES == 8
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller one; b where either is NaN.
PK_INLINE F min(F a, F b) {
#if PK_ISA_LANES == 16
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif PK_ISA_LANES == 8
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Lower clamp of exponents t where t multiplies 2^t: 2^kLowest is 0, and kLowest * 0 is not NaN.
#if PK_ISA_LANES == 16
constexpr float kLowest = -151.0f;
#else
constexpr float kLowest = -127.0f;
#endif

// NaN stays NaN.
PK_INLINE F clamp(F t) { return max(broadcast(kLowest), t); }

// The polynomial 1 + c1 f + c2 f^2 ..., minimax for the relative error of 2^f with its value at 0 fixed.
template <int kTerms>
PK_INLINE F polynomial(const float (&c)[kTerms], F f) {
  F p = broadcast(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) p = p * f + c[i];
  return p * f + 1.0f;
}

// 2^t: exactly 1 at 0, exactly 0 at -inf, NaN for NaN. With kPrecise for t below 127 and with a relative error below 1
// ulp; otherwise infinite from 2^128 on and with an error below 2 ulp (less than 1e-8 on average), enough for long
// sums.
template <bool kPrecise>
PK_INLINE F exp2(F t) {
#if PK_ISA_LANES == 16
  // 2^f on [0, 1), f = t - floor(t); scalef multiplies by 2^floor(t).
  constexpr float kFive[5] = {0.6931512951850891f, 0.24016444385051727f, 0.05579991638660431f, 0.009017027914524078f,
                              0.0018671313300728798f};
  constexpr float kSix[6] = {0.6931470632553101f,   0.2402293086051941f,    0.055485282093286514f,
                             0.009675451554358006f, 0.0012467843480408192f, 0.0002161292650271207f};
  const F f = (F)_mm512_reduce_ps((__m512)t, 0x09);
  const F p = kPrecise ? polynomial(kSix, f) : polynomial(kFive, f);
  return (F)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  constexpr float kFive[5] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f, 0.009671512991189957f,
                              0.001326472731307149f};
  constexpr float kSix[6] = {0.6931471824645996f,  0.24022647738456726f,   0.055503323674201965f,
                             0.00961843691766262f, 0.0013398875016719103f, 0.00015353361959569156f};
  t = clamp(t);
  // A logit far above the estimated maximum must give infinity: without the clamp the exponent bits would wrap around.
  if (!kPrecise) t = min(broadcast(128.0f), t);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  const F shifted = t + magic;
  const F f = t - (shifted - magic);
  const F p = kPrecise ? polynomial(kSix, f) : polynomial(kFive, f);
  return p * as_f((as_u(shifted) << 23) + 0x3f800000u);
#endif
}

PK_INLINE float sum_of(const F x[kVectors]) {
  const F pair = (x[0] + x[1]) + (x[2] + x[3]);
  float lanes[kLanes];
  store_as(lanes, pair);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

PK_INLINE float max_of(const F x[kVectors]) {
  float lanes[kLanes];
  store_as(lanes, max(max(x[0], x[1]), max(x[2], x[3])));
  float highest = lanes[0];
  for (int i = 1; i < kLanes; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
  return highest;
}

// --- conversion of a step of elements to floats and back; the order of the elements differs per type ----------------

PK_INLINE void load(const float* p, F x[kVectors]) {
  for (int i = 0; i < kVectors; ++i) x[i] = load_as<F>(p + i * kLanes);
}

// Even elements in one vector, odd ones in the next: a shift and a mask instead of a shuffle.
PK_INLINE void load(const bfloat16* p, F x[kVectors]) {
  for (int i = 0; i < kVectors; i += 2) {
    const U words = load_as<U>(p + i * kLanes);
    x[i] = as_f(words << 16);
    x[i + 1] = as_f(words & 0xffff0000u);
  }
}

#if PK_ISA_LANES == 4
PK_INLINE F half_to_float(U h) {
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const U magnitude = (h & 0x7fffu) << 13;
  const U finite = as_u(as_f(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000u;
  return as_f(((h & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? special : finite));
}

PK_INLINE U half_of(F x) {
  const U u = as_u(x);
  const U a = u & 0x7fffffffu;
  const U normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // One ulp of 0.5f is 2^-24, the step of float16 subnormals, so this addition rounds exactly there.
  const U subnormal = as_u(as_f(a) + 0.5f) - 0x3f000000u;
  U h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? U{} + 0x7c00u : h;
  h = a > 0x7f800000u ? U{} + 0x7e00u : h;
  return ((u >> 16) & 0x8000u) | h;
}
#endif

PK_INLINE void load(const float16* p, F x[kVectors]) {
#if PK_ISA_LANES == 16
  for (int i = 0; i < kVectors; ++i) x[i] = (F)_mm512_cvtph_ps(load_as<__m256i>(p + i * kLanes));
#elif PK_ISA_LANES == 8
  for (int i = 0; i < kVectors; ++i) x[i] = (F)_mm256_cvtph_ps(load_as<__m128i>(p + i * kLanes));
#else
  for (int i = 0; i < kVectors; i += 2) {
    const U words = load_as<U>(p + i * kLanes);
    x[i] = half_to_float(words & 0xffffu);
    x[i + 1] = half_to_float(words >> 16);
  }
#endif
}

// With kStream, writes around the cache, for results too large for it; addresses must then be aligned to a vector.
template <bool kStream, typename V>
PK_INLINE void put(void* p, V v) {
#if PK_ISA_LANES == 16
  if (kStream) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif PK_ISA_LANES == 8
  if (kStream) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  store_as(p, v);
}

template <bool kStream>
PK_INLINE void store(float* p, const F x[kVectors]) {
  for (int i = 0; i < kVectors; ++i) put<kStream>(p + i * kLanes, x[i]);
}

// To nearest even in the upper half of each word.
PK_INLINE U round_to_upper_half(F x) {
  const U u = as_u(x);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

// Finite values only: rounding the payload of a NaN could carry into its sign.
template <bool kStream>
PK_INLINE void store(bfloat16* p, const F x[kVectors]) {
  for (int i = 0; i < kVectors; i += 2) {
    const U even = round_to_upper_half(x[i]) >> 16;
    const U odd = round_to_upper_half(x[i + 1]) & 0xffff0000u;
    put<kStream>(p + i * kLanes, even | odd);
  }
}

template <bool kStream>
PK_INLINE void store(float16* p, const F x[kVectors]) {
#if PK_ISA_LANES == 16
  for (int i = 0; i < kVectors; i += 2) {
    const __m256i low = _mm512_cvtps_ph((__m512)x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i high = _mm512_cvtps_ph((__m512)x[i + 1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    put<kStream>(p + i * kLanes, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
#elif PK_ISA_LANES == 8
  for (int i = 0; i < kVectors; i += 2) {
    const __m128i low = _mm256_cvtps_ph((__m256)x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i high = _mm256_cvtps_ph((__m256)x[i + 1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    put<kStream>(p + i * kLanes, _mm256_set_m128i(high, low));
  }
#else
  for (int i = 0; i < kVectors; i += 2) put<kStream>(p + i * kLanes, half_of(x[i]) | (half_of(x[i + 1]) << 16));
#endif
}

}  // namespace PK_ISA
}  // namespace pk
