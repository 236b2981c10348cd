// The tile kernels of permutohedral_kernel.inl for the instruction set in use.
#pragma once

#include <cstdint>

#include "permutohedral/lattice_cpu.h"

namespace fastseg {

template <typename T>
struct LatticeKernels {
  void (*locate_points)(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                        int32_t* rank, T* weight);
  T (*gather_rows)(const T* values, int width, int local_stride, const int32_t* vertex, int count,
                   const T* diagonal, const T* matrix, T* local);
  void (*scatter_rows)(const T* local, int width, int local_stride, const int32_t* row, int count,
                       int64_t vertices, T* values, T* extra);
  void (*slice_tile)(const TileView<T>& tile, const T* local, int width, int stride, const T* in,
                     int in_stride, T* out);
  void (*splat_tile)(const TileView<T>& tile, const T* in, const T* factor, int width, int stride,
                     T* local);
  void (*merge_rows)(const int32_t* vertex, const int32_t* rows_begin, int64_t begin, int64_t end,
                     const T* extra, int width, T* values);
  void (*blur_chains)(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                      int width, T* values);
  void (*softmax_tile)(T* rows, int points, int width, int stride, bool bounded, T* inverse);
  void (*scale_rows)(T* rows, int points, int width, int stride, const T* factor);
  void (*load_rows)(const T* planes, int64_t plane, int channels, int64_t length, T sign, T padding,
                    int width, int stride, T* rows);
  void (*store_rows)(const T* rows, int stride, int channels, int64_t length, int64_t plane,
                     T* planes);
  bool (*shift_logits)(T* rows, int points, int width);
};

template <typename T>
const LatticeKernels<T>& lattice_kernels();

}  // namespace fastseg
