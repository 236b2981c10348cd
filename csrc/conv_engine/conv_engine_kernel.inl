// The kernels of the convolution engine, compiled once per instruction set.
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
#include "conv_engine/epilogue.inl"
#include "conv_engine/gemm_conv.inl"
#include "conv_engine/narrow_conv.inl"
#include "conv_engine/conv_pool.inl"
#include "conv_engine/winograd.inl"
#include "conv_engine/winograd_1d.inl"
// clang-format on
#if !defined(__clang__)
#pragma GCC pop_options
#endif
#undef FASTSEG_MEMBER_INLINE
#undef FASTSEG_INLINE
