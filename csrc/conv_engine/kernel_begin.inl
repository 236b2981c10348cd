// Opens a kernel file of the engine: what every kernel uses. kernel_end.inl closes it.
#define FASTSEG_INLINE __attribute__((always_inline)) static inline
#define FASTSEG_MEMBER_INLINE __attribute__((always_inline))
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif
// clang-format off: each builds on the ones before
#include "conv_engine/vec.inl"
#include "conv_engine/bf16.inl"
#include "conv_engine/gemm_tile.inl"
#if FASTSEG_ISA_LEVEL == 4
#include "conv_engine/amx_tile.inl"
#endif
#include "conv_engine/epilogue.inl"
// clang-format on
