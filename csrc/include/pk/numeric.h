// Branch-free scalar conversions and exp2, written so that a loop over them vectorises without -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define PK_INLINE inline __attribute__((always_inline))
#else
#define PK_INLINE inline
#endif

namespace pk {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

PK_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

PK_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

PK_INLINE float to_float(float x) { return x; }

PK_INLINE float to_float(bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

PK_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const uint32_t finite = bits_of(float_of(magnitude) * float_of(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <typename T>
PK_INLINE T from_float(float x);

template <>
PK_INLINE float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN (rounding its payload could carry into infinity).
template <>
PK_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
PK_INLINE float16 from_float<float16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // One ulp of 0.5f is 2^-24, the step of float16 subnormals, so this addition rounds exactly there.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  return {static_cast<uint16_t>(sign | h)};
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kExp2Low = -126.0f;  // below it the result would be subnormal and counts as zero

// max(x, kExp2Low) that keeps NaN: the factor beside a vanished probability must be finite, 0 * -inf is NaN.
PK_INLINE float clamp_exponent(float x) { return x < kExp2Low ? kExp2Low : x; }

// 2^x, relative error under 2 ulp; 0 below kExp2Low (so for -inf), NaN for NaN.
PK_INLINE float exp2_fast(float x) {
  const float high = x > 127.0f ? 127.0f : x;
  const float t = clamp_exponent(high);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  const float shifted = t + magic;
  const float f = t - (shifted - magic);
  // Minimax polynomial of 2^f on [-1/2, 1/2].
  float p = 0.000153458121587f;
  p = p * f + 0.00133999312095f;
  p = p * f + 0.00961848895652f;
  p = p * f + 0.05550328777f;
  p = p * f + 0.240226468906f;
  p = p * f + 0.693147205737f;
  p = p * f + 1.0f;
  return x < kExp2Low ? 0.0f : p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

}  // namespace pk
