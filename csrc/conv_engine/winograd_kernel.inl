// The kernels of winograd_cpu.cpp, compiled once per instruction set. Vectors are written out: what
// -O3 adds to -O2 is a sixth more time to compile. With -O1 they run 1.6 times as long.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#pragma GCC optimize("O2")
#endif
#include "conv_engine/winograd_transform.inl"
#include "conv_engine/conv_pool.inl"
#include "conv_engine/winograd.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on
