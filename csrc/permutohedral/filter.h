// Steps of the lattice filter that the filter op and the mean-field op share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "permutohedral/lattice_cpu.h"

namespace fastseg {

// Builds the lattice of features (d, height * width) in the buffer that `allocate(bytes)` returns.
// Throws std::invalid_argument where the features cannot be held.
template <typename T>
void build_lattice(const T* features, int64_t d, int64_t height, int64_t width,
                   Normalization normalization, const std::function<void*(int64_t)>& allocate);

// Row sums of the filter as it is normalised, tile by tile.
template <typename T>
void filter_ones(const Lattice<T>& lattice, T* row_sum);

// Adds up the partial sums of the tiles and blurs along all axes, last axis first if `reversed`.
// values (lattice.rows(), width): on return the first M rows hold the blurred vertices.
template <typename T>
void merge_and_blur(const Lattice<T>& lattice, bool reversed, int width, T* values);

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
               int stride, T* rows) {
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = planes + c * plane + begin;
      T* to = rows + position * stride + c;
      for (int64_t i = 0; i < length; ++i) to[i * stride] = from[i];
    }
  });
}

template <typename T>
void store_tile(const Tiling& tiling, int64_t tile, const T* rows, int stride, int64_t channels,
                int64_t plane, T* planes) {
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = rows + position * stride + c;
      T* to = planes + c * plane + begin;
      for (int64_t i = 0; i < length; ++i) to[i] = from[i * stride];
    }
  });
}

}  // namespace fastseg
