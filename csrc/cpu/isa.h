// The instruction sets that kernels are compiled for, chosen once when the extension is loaded.
#pragma once

namespace pk {

// Each one has what those before it have.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The widest set that this processor and system have, or the one named by the environment variable
// PRIME_KERNELS_CPU_ISA (portable, avx2, avx512, avx512_bf16, amx). Throws std::runtime_error for a name that is unknown
// or not available here.
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace pk
