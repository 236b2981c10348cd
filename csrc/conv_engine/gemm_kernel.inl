// The kernels of gemm_cpu.cpp, compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/gemm_conv.inl"
#include "conv_engine/narrow_conv.inl"
#include "conv_engine/strassen.inl"
#include "conv_engine/strassen_conv.inl"
#if FASTSEG_ISA_LEVEL == 2 || FASTSEG_ISA_LEVEL == 3
#include "conv_engine/wide_tile.inl"
#include "conv_engine/wide_conv.inl"
#endif
#if FASTSEG_ISA_LEVEL == 2
#include "conv_engine/wide_strassen.inl"
#endif
#include "conv_engine/kernel_end.inl"
// clang-format on
