// The kernels of winograd_cpu.cpp, compiled once per instruction set; vectors are written out, and
// what -O3 would add takes a sixth more time to compile.
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
