#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pk {
namespace {

constexpr Isa kWidestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

#if defined(__x86_64__)
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf(unsigned leaf, unsigned part) {
    if (__get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx) == 0) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned word, int at) { return (word >> at & 1u) != 0; }

uint64_t enabled_states() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// The registers of AMX are large: Linux lets a process use them only after it has asked.
bool permitted_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool available(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAmx: {
      const Leaf features(7, 0);
      constexpr uint64_t kTiles = uint64_t{3} << 17;
      return available(Isa::kAvx512Bf16) && bit(features.edx, 22) && bit(features.edx, 24) &&
             (enabled_states() & kTiles) == kTiles && permitted_amx();
    }
    case Isa::kAvx512Bf16:
      return available(Isa::kAvx512) && bit(Leaf(7, 1).eax, 5);
    case Isa::kAvx512:
      return available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kPortable:
      return true;
  }
  return false;
}
#else
bool available(Isa isa) { return isa == Isa::kPortable; }
#endif

Isa choose() {
  const char* wanted = std::getenv("PRIME_KERNELS_CPU_ISA");
  std::string names;
  for (const Isa isa : kWidestFirst) {
    if (!available(isa)) continue;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("PRIME_KERNELS_CPU_ISA: expected one of " + names + ", got " + wanted);
}

}  // namespace

Isa cpu_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace pk
