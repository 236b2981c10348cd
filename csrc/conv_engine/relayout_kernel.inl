// The kernels of relayout_cpu.cpp, compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/transpose.inl"
#include "conv_engine/relayout.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on
