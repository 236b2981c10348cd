// The tile kernels of permutohedral_kernel.inl for the instruction set in use.
#pragma once

#include <cstdint>

#include "permutohedral/lattice_cpu.h"

namespace fastseg {

template <typename T>
struct LatticeKernels {
  void (*locate_points)(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                        int32_t* rank, T* weight);
  void (*gather_rows)(const T* values, int width, int local_stride, const int32_t* vertex,
                      int count, const T* diagonal, const T* matrix, T* local);
  void (*scatter_rows)(const T* local, int width, int local_stride, const int32_t* row, int count,
                       T* values);
  void (*slice_tile)(const TileView<T>& tile, const T* local, int width, int stride, const T* in,
                     int in_stride, T* out);
  void (*splat_tile)(const TileView<T>& tile, const T* in, int width, int stride, T* local);
  void (*merge_rows)(const int32_t* vertex, const int32_t* rows_begin, int64_t begin, int64_t end,
                     int64_t vertices, int width, T* values);
  void (*blur_chains)(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                      int width, T* values);
  void (*softmax_tile)(T* rows, int points, int width, int stride);
};

template <typename T>
const LatticeKernels<T>& lattice_kernels();

}  // namespace fastseg
