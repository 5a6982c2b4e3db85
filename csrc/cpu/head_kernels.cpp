#include "head_kernels.h"

#include "isa.h"
#include "pk/abi.h"

namespace pk {

extern const HeadKernels head_kernels_portable;
#if defined(__x86_64__)
extern const HeadKernels head_kernels_avx2;
extern const HeadKernels head_kernels_avx512;
extern const HeadKernels head_kernels_avx512_bf16;
extern const HeadKernels head_kernels_amx;
#endif

const HeadKernels& head_kernels([[maybe_unused]] int32_t dtype) {
#if defined(__x86_64__)
  const Isa isa = cpu_isa();
  if (dtype == PK_BFLOAT16 && isa == Isa::kAmx) return head_kernels_amx;
  if (dtype == PK_BFLOAT16 && isa == Isa::kAvx512Bf16) return head_kernels_avx512_bf16;
  if (isa >= Isa::kAvx512) return head_kernels_avx512;
  if (isa == Isa::kAvx2) return head_kernels_avx2;
#endif
  return head_kernels_portable;
}

}  // namespace pk
