// bfloat16 as CUDA has it, by the conversions of the CPU kernels: to nearest even, NaN stays NaN.
#pragma once

#include "cpu/half.h"

struct __nv_bfloat16 {
  pk::bfloat16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) { return pk::to_float(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {pk::from_float<pk::bfloat16>(x)}; }
