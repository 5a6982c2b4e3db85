// 16-bit floats: storage and conversion to and from float.
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
  const float finite = float_of(magnitude) * float_of(0x77800000u);
  return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(finite)));
}

template <typename T>
PK_INLINE T from_float(float x);

template <>
PK_INLINE float from_float<float>(float x) {
  return x;
}

// To nearest even; NaN stays NaN (rounding its payload could carry into its sign).
template <>
PK_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
PK_INLINE float16 from_float<float16>(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (a < 0x38800000u) {
    // One ulp of 0.5f is 2^-24, the step of float16 subnormals, so this addition rounds exactly there.
    h = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace pk
