// The kernels of pack_cpu.cpp, compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/transpose.inl"
#include "conv_engine/pack_gemm.inl"
#include "conv_engine/pack_winograd.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on
