// Steps of the lattice filter that the filter op and the mean-field op share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "permutohedral/lattice_cpu.h"
#include "permutohedral/lattice_kernels.h"

namespace fastseg {

// Builds the lattice of features (d, height * width) in the buffer that `allocate(bytes)` returns.
// Throws std::invalid_argument where the features cannot be held.
template <typename T>
void build_lattice(const T* features, int64_t d, int64_t height, int64_t width,
                   Normalization normalization, const std::function<void*(int64_t)>& allocate);

// Row sums of the filter as it is normalised, tile by tile.
template <typename T>
void filter_ones(const Lattice<T>& lattice, T* row_sum);

// Adds the partial sums `extra` (lattice.extra_rows(), width) of the tiles to the vertices `values`
// (M, width) and blurs these along all axes, last axis first if `reversed`.
template <typename T>
void merge_and_blur(const Lattice<T>& lattice, bool reversed, int width, const T* extra, T* values);

// Rows are padded to a multiple of 8 channels in memory, and to 16 in a tile's scratch.
inline int row_width(int64_t channels) { return static_cast<int>((channels + 7) / 8 * 8); }
inline int tile_stride(int width) { return (width + 15) / 16 * 16; }

// The most vertices that one tile of the lattice touches.
template <typename T>
int64_t largest_tile(const Lattice<T>& lattice) {
  int64_t most = 0;
  for (int64_t t = 0; t < lattice.tiling().count(); ++t) {
    most = std::max<int64_t>(most, lattice.pair_begin[t + 1] - lattice.pair_begin[t]);
  }
  return most;
}

// Denormal operands cost 100 cycles each and nothing here depends on them: flush them to 0 while
// this object lives.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// Copies a tile of planar data, channel c of point i at planes[c * plane + i], to rows.
template <typename T>
void load_tile(const Tiling& tiling, int64_t tile, const T* planes, int64_t plane, int64_t channels,
               int width, int stride, T* rows, T sign = 1, T padding = 0) {
  const auto load = lattice_kernels<T>().load_rows;
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    load(planes + begin, plane, static_cast<int>(channels), length, sign, padding, width, stride,
         rows + position * stride);
  });
}

template <typename T>
void store_tile(const Tiling& tiling, int64_t tile, const T* rows, int stride, int64_t channels,
                int64_t plane, T* planes) {
  const auto store = lattice_kernels<T>().store_rows;
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    store(rows + position * stride, stride, static_cast<int>(channels), length, plane,
          planes + begin);
  });
}

}  // namespace fastseg
