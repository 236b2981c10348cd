// The kernels of depthwise_cpu.cpp, compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/lines.inl"
#include "conv_engine/depthwise.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on
