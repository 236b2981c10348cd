// What the translation units of the engine share: each cuts one algorithm into tasks.
#pragma once

#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "conv_engine/conv_engine.h"

// FASTSEG_ISA_CALL in a template over Conv: bfloat16 products have two more instruction sets, or
// one in kernels that are not written for AMX (FASTSEG_DOT_CALL).
#if defined(__x86_64__)
#define FASTSEG_DOT_CALL(...)                                                  \
  [] {                                                                         \
    if constexpr (std::is_same_v<typename Conv::Operand, BFloat16>) {          \
      if (current_isa() >= Isa::kAvx512Bf16) return &avx512_bf16::__VA_ARGS__; \
    }                                                                          \
    return FASTSEG_ISA_CALL(__VA_ARGS__);                                      \
  }()
#else
#define FASTSEG_DOT_CALL FASTSEG_ISA_CALL
#endif
#if defined(FASTSEG_AMX)
#define FASTSEG_CONV_CALL(...)                                        \
  [] {                                                                \
    if constexpr (std::is_same_v<typename Conv::Operand, BFloat16>) { \
      if (current_isa() >= Isa::kAmx) return &amx::__VA_ARGS__;       \
    }                                                                 \
    return FASTSEG_DOT_CALL(__VA_ARGS__);                             \
  }()
#else
#define FASTSEG_CONV_CALL FASTSEG_DOT_CALL
#endif

namespace fastseg {
namespace conv_engine {

// Instantiated for all kinds of Convolution.
template <class Conv>
void run_gemm(const Conv& conv);
// Matrix products of one image whose results none of them reads, each as run_gemm does it.
template <class Conv>
void run_gemms(const std::vector<Conv>& convs);
template <class Conv>
void run_winograd(const Conv& conv, int64_t tile);
// The same where y is x: the padding is the dilation, and nothing but a bias is fused. For float32
// products.
template <class Conv>
void run_winograd_in_place(const Conv& conv, int64_t tile);
// For those whose result is stored as x is, as matrix products of several at once are.
template <class Conv>
void run_winograd_1d(const Conv& conv);

}  // namespace conv_engine
}  // namespace fastseg
