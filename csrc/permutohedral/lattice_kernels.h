// The tile kernels of permutohedral_kernel.inl for the instruction set in use.
#pragma once

#include <cstdint>

#include "permutohedral/lattice_cpu.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

using WideKey = unsigned __int128;

template <typename T>
struct LatticeKernels {
  void (*locate_points)(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                        int32_t* rank, T* weight);
  bool (*value_range)(const T* values, int64_t n, T* low, T* high);
  void (*pack_simplices)(const KeyFields<uint64_t>& fields, int n, int stride, const int32_t* cell,
                         const int32_t* rank, uint64_t* key, uint64_t* order);
  void (*pack_wide_simplices)(const KeyFields<WideKey>& fields, int n, int stride,
                              const int32_t* cell, const int32_t* rank, WideKey* key,
                              uint64_t* order);
  void (*slice_tile)(const TileView<T>& tile, const T* values, int width, const T* coefficient,
                     const T* in, T* out);
  void (*splat_tile)(const TileView<T>& tile, const T* in, const T* factor, int width, T* sums);
  void (*merge_rows)(const int32_t* extra_begin, const int32_t* extra, int64_t begin, int64_t end,
                     int width, T* sums, T* values);
  void (*blur_chains)(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                      int width, T* values);
  void (*transform_rows)(const T* matrix, int64_t begin, int64_t end, int width, T* rows);
  bool (*softmax_tile)(T* rows, int points, int width, bool shift, T* inverse);
  void (*logistic)(const T* x, int n, T* positive, T* negative);
  void (*scale_rows)(T* rows, int points, int width, const T* factor);
  void (*load_rows)(const T* planes, int64_t plane, int channels, int64_t length, T sign, T padding,
                    int width, int stride, T* rows);
  void (*store_rows)(const T* rows, int stride, int channels, int64_t length, int64_t plane,
                     T* planes);
  bool (*shift_logits)(T* rows, int points, int width);
};

template <typename T>
const LatticeKernels<T>& lattice_kernels();

}  // namespace fastseg
