#include "row_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pk {
namespace {

// Fastest first; portable, which is always there, comes last.
struct Choice {
  const RowKernels* kernels;
  bool available;
};

const RowKernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const Choice choices[] = {
      {&row_kernels_avx512, avx512}, {&row_kernels_avx2, avx2}, {&row_kernels_portable, true}};
#else
  const Choice choices[] = {{&row_kernels_portable, true}};
#endif
  const char* wanted = std::getenv("PRIME_KERNELS_CPU_ISA");
  std::string available;
  for (const Choice& choice : choices) {
    if (!choice.available) continue;
    if (wanted == nullptr || *wanted == '\0' || choice.kernels->name == std::string(wanted)) return *choice.kernels;
    available += (available.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw std::runtime_error("PRIME_KERNELS_CPU_ISA: expected one of " + available + ", got " + wanted);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace pk
