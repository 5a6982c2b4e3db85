// The instructions of AVX-512, AVX-512 BF16 and AMX that csrc/cpu uses, in plain C++, for tests of what the kernels of
// those sets compute on a processor without them. Included before everything else (-include); products are rounded after
// each addition, as the instructions may do in another order.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

// After the compiler's own header, which must not see them.
#define PK_EMULATED 1
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#if defined(PK_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif
#if defined(PK_EMULATE_AMX)
#define __AMX_BF16__ 1
#endif

namespace emulated {

typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
constexpr int kLanes = 16;

// As the instructions: b where either is NaN.
inline F max_ps(F a, F b) { return a > b ? a : b; }
inline F min_ps(F a, F b) { return a < b ? a : b; }

inline F reduce_ps(F x, int what) {
  if (what != 0x09) __builtin_trap();  // x - floor(x)
  for (int i = 0; i < kLanes; ++i) x[i] = std::isinf(x[i]) ? 0.0f : x[i] - std::floor(x[i]);
  return x;
}

inline F scalef_ps(F x, F exponent) {
  for (int i = 0; i < kLanes; ++i) {
    const float e = std::floor(exponent[i]);
    x[i] = std::isnan(e) ? e : std::ldexp(x[i], static_cast<int>(std::fmax(-1000.0f, std::fmin(1000.0f, e))));
  }
  return x;
}

inline F cvtph_ps(__m256i packed) {
  const H half = (H)packed;
  F x;
  for (int i = 0; i < kLanes; ++i) x[i] = pk::to_float(pk::float16{half[i]});
  return x;
}

inline __m256i cvtps_ph(F x, int) {
  H half;
  for (int i = 0; i < kLanes; ++i) half[i] = pk::from_float<pk::float16>(x[i]).bits;
  return (__m256i)half;
}

inline __m256i cvtneps_pbh(F x) {
  H half;
  for (int i = 0; i < kLanes; ++i) {
    // The instruction takes denormals as 0.
    half[i] = pk::from_float<pk::bfloat16>(std::fpclassify(x[i]) == FP_SUBNORMAL ? std::copysign(0.0f, x[i]) : x[i]).bits;
  }
  return (__m256i)half;
}

inline __m512i cvtepu16_epi32(__m256i packed) { return (__m512i)__builtin_convertvector((H)packed, U); }

inline F high_of(U words) { return (F)(words & 0xffff0000u); }
inline F low_of(U words) { return (F)(words << 16); }

inline F dpbf16_ps(F sum, U a, U b) {
  sum = sum + high_of(a) * high_of(b);
  return sum + low_of(a) * low_of(b);
}

inline __m512i castsi256_si512(__m256i low) {
  __m512i wide{};
  std::memcpy(&wide, &low, sizeof low);
  return wide;
}

inline __m512i inserti64x4(__m512i wide, __m256i high, int place) {
  if (place != 1) __builtin_trap();
  std::memcpy(reinterpret_cast<char*>(&wide) + sizeof high, &high, sizeof high);
  return wide;
}

// Memory of the configured tiles alone may be touched, between loadconfig and release.
struct Tiles {
  bool configured = false;
  alignas(64) uint32_t rows[8][16][16];
};
inline thread_local Tiles tiles;

inline void loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1) __builtin_trap();
  for (int tile = 0; tile < 8; ++tile) {
    if (bytes[16 + 2 * tile] != 64 || bytes[48 + tile] != 16) __builtin_trap();
  }
  tiles.configured = true;
  std::memset(tiles.rows, 0, sizeof tiles.rows);
}

inline void release() { tiles.configured = false; }

inline void loadd(int tile, const void* base, int64_t stride) {
  if (!tiles.configured) __builtin_trap();
  for (int r = 0; r < 16; ++r) std::memcpy(tiles.rows[tile][r], static_cast<const char*>(base) + r * stride, 64);
}

inline void stored(int tile, void* base, int64_t stride) {
  if (!tiles.configured) __builtin_trap();
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tiles.rows[tile][r], 64);
}

inline void zero(int tile) { std::memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]); }

inline void dpbf16(int sum, int a, int b) {
  if (!tiles.configured) __builtin_trap();
  for (int m = 0; m < 16; ++m) {
    F row;
    std::memcpy(&row, tiles.rows[sum][m], sizeof row);
    for (int k = 0; k < 16; ++k) {
      U words;
      std::memcpy(&words, tiles.rows[b][k], sizeof words);
      row = dpbf16_ps(row, U{} + tiles.rows[a][m][k], words);
    }
    std::memcpy(tiles.rows[sum][m], &row, sizeof row);
  }
}

}  // namespace emulated

#define _mm512_max_ps(a, b) emulated::max_ps(a, b)
#define _mm512_min_ps(a, b) emulated::min_ps(a, b)
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, what) emulated::reduce_ps(x, what)
#define _mm512_scalef_ps(x, e) emulated::scalef_ps(x, e)
#define _mm512_cvtph_ps(x) emulated::cvtph_ps(x)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, how) emulated::cvtps_ph((emulated::F)(x), how)
#define _mm512_loadu_ps(p) pk::PK_ISA::load_as<pk::PK_ISA::F>(p)
#define _mm512_stream_si512(p, v) pk::PK_ISA::store_as(p, v)
#define _mm512_castsi256_si512(x) emulated::castsi256_si512(x)
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(a, b, place) emulated::inserti64x4(a, b, place)
#define _mm512_cvtneps_pbh(x) emulated::cvtneps_pbh((emulated::F)(x))
#define _mm512_cvtepu16_epi32(x) emulated::cvtepu16_epi32(x)
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16_ps((emulated::F)(sum), (emulated::U)(a), (emulated::U)(b))
#undef _tile_loadconfig
#define _tile_loadconfig(p) emulated::loadconfig(p)
#undef _tile_release
#define _tile_release() emulated::release()
#undef _tile_loadd
#define _tile_loadd(tile, p, stride) emulated::loadd(tile, p, stride)
#undef _tile_stored
#define _tile_stored(tile, p, stride) emulated::stored(tile, p, stride)
#undef _tile_zero
#define _tile_zero(tile) emulated::zero(tile)
#undef _tile_dpbf16ps
#define _tile_dpbf16ps(sum, a, b) emulated::dpbf16(sum, a, b)
