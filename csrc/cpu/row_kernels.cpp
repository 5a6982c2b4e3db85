#include "row_kernels.h"

#include "isa.h"

namespace pk {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  const Isa isa = cpu_isa();
  if (isa >= Isa::kAvx512) return row_kernels_avx512;
  if (isa == Isa::kAvx2) return row_kernels_avx2;
#endif
  return row_kernels_portable;
}

}  // namespace pk
