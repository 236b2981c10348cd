// The kernels of gemm_cpu.cpp, compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/gemm_conv.inl"
#include "conv_engine/narrow_conv.inl"
#include "conv_engine/strassen.inl"
#include "conv_engine/strassen_conv.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on
