// float16 as CUDA has it, by the conversions of the CPU kernels: to nearest even, NaN stays NaN.
#pragma once

#include "cpu/half.h"

struct __half {
  pk::float16 value;
};
inline float __half2float(__half x) { return pk::to_float(x.value); }
inline __half __float2half_rn(float x) { return {pk::from_float<pk::float16>(x)}; }
