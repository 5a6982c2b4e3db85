// In the place of csrc/cpu/isa.cpp: every instruction set is there, emulated where it must be.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pk {

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa cpu_isa() {
  const char* wanted = std::getenv("PRIME_KERNELS_CPU_ISA");
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (wanted != nullptr && std::string(wanted) == isa_name(isa)) return isa;
  }
  throw std::runtime_error("PRIME_KERNELS_CPU_ISA: expected avx512, avx512_bf16 or amx, the emulated ones");
}

}  // namespace pk
