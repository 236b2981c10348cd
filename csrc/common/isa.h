// Instruction sets: one binary carries every CPU kernel for several of them and picks at run time.
//
// A kernel file <op>_kernel.inl holds plain loops (or intrinsics) and no includes. Its <op>_cpu.cpp
// does
//   #define FASTSEG_KERNEL_FILE "max_unpool/max_unpool_kernel.inl"
//   #include "common/foreach_isa.inl"
// which compiles it once per instruction set, in namespaces baseline, avx2 and avx512, and then
// calls
//   FASTSEG_ISA_CALL(pool_plane<float>)(arguments...);
// once per task, never per element.
#pragma once

#include <atomic>

#include "common/amx.h"

namespace fastseg {

// In ascending order: a level includes all below it.
enum class Isa : int {
  kBaseline = 0,    // x86-64 (SSE2), aarch64 (NEON), anything else
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx512 = 2,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16 = 3,  // AVX-512 with BF16 dot products
  kAmx = 4,         // AMX with BF16 products
};

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

// The best level of this CPU and operating system.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(FASTSEG_AMX)
  static const bool amx = request_amx();
  if (avx512_bf16 && amx) return Isa::kAmx;
#endif
  if (avx512_bf16) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// Whether bfloat16 dot products are the faster way to multiply. AMD's do two registers a cycle,
// twice the rate of float32; Intel's half of it (Emerald Rapids: torch's bfloat16 convolutions 100
// GFLOP/s a core, float32 190), but those of AMX sixteen times.
inline std::atomic<bool>& bf16_products() {
  static std::atomic<bool> fast{[] {
#if defined(__x86_64__)
    const Isa isa = detect_isa();
    return isa >= Isa::kAmx || (isa >= Isa::kAvx512Bf16 && __builtin_cpu_is("amd"));
#else
    return false;
#endif
  }()};
  return fast;
}

// The level in use: detect_isa() unless a test or a user lowered it with set_cpu_isa().
inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{detect_isa()};
  return isa;
}

}  // namespace fastseg

#if defined(__x86_64__)
#define FASTSEG_ISA_CALL(...)                                                 \
  (::fastseg::current_isa() >= ::fastseg::Isa::kAvx512 ? &avx512::__VA_ARGS__ \
   : ::fastseg::current_isa() >= ::fastseg::Isa::kAvx2 ? &avx2::__VA_ARGS__   \
                                                       : &baseline::__VA_ARGS__)
#else
#define FASTSEG_ISA_CALL(...) (&baseline::__VA_ARGS__)
#endif
