// Steps of the lattice filter that the filter op and the mean-field op share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/parallel.h"
#include "common/workspace.h"
#include "permutohedral/lattice_cpu.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

// Builds the lattice of features (d, height * width) in the buffer that `allocate(bytes)` returns.
// Throws std::invalid_argument where the features cannot be held.
template <typename T>
void build_lattice(const T* features, int64_t d, int64_t height, int64_t width,
                   Normalization normalization, const std::function<void*(int64_t)>& allocate);

// What happens to one lattice between splat and slice.
template <typename T>
struct Blur {
  const Lattice<T>* lattice;
  T* sums;                    // [rows] that were splatted into; 0 afterwards
  T* values;                  // [vertices], or the same array as `sums`
  const T* matrix = nullptr;  // symmetric, multiplies the channels of the blurred vertices
};

// Adds the extra rows of the sums to their vertices and blurs these along all axes, last axis first
// if `reversed`: all lattices at a time.
template <typename T>
void merge_and_blur(const std::vector<Blur<T>>& blurs, bool reversed, int width);

// Rows are padded to a multiple of 8 channels; single channels are not.
inline int row_width(int64_t channels) { return static_cast<int>((channels + 7) / 8 * 8); }

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
               int width, T* rows, T sign = 1, T padding = 0) {
  const auto load = lattice_kernels<T>().load_rows;
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    load(planes + begin, plane, static_cast<int>(channels), length, sign, padding, width, width,
         rows + position * width);
  });
}

template <typename T>
void store_tile(const Tiling& tiling, int64_t tile, const T* rows, int width, int64_t channels,
                int64_t plane, T* planes) {
  const auto store = lattice_kernels<T>().store_rows;
  tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
    store(rows + position * width, width, static_cast<int>(channels), length, plane,
          planes + begin);
  });
}

// Splats all points and blurs the vertices. load(tile, rows) fills the `width` channels of a tile.
template <typename T, typename Load>
void splat_and_blur(const Lattice<T>& lattice, bool transposed, int width, Load&& load, T* values) {
  const Tiling tiling = lattice.tiling();
  const Chunking chunks(tiling);
  parallel_tasks(chunks.count, [&](int64_t chunk) {
    const FlushDenormals flush;
    Workspace<T> rows(kTilePoints * width);
    lattice.clear_rows(chunk, width, values);
    for (int64_t t = chunks.first_tile(chunk); t < chunks.first_tile(chunk + 1); ++t) {
      const TileView<T> tile(lattice, t, tiling.first_point(t), tiling.points(t), transposed);
      load(t, rows.data());
      lattice_kernels<T>().splat_tile(tile, rows.data(), nullptr, width, values);
    }
  });
  merge_and_blur<T>({{&lattice, values, values}}, transposed, width);
}

// The inverse: store(tile, rows) receives the filtered `width` channels of each tile.
template <typename T, typename Store>
void slice(const Lattice<T>& lattice, bool transposed, int width, const T* values, Store&& store) {
  const Tiling tiling = lattice.tiling();
  const Chunking chunks(tiling);
  const std::vector<T> gain(static_cast<size_t>(width),
                            static_cast<T>(lattice_gain(static_cast<int>(lattice.d()))));
  parallel_tasks(chunks.count, [&](int64_t chunk) {
    const FlushDenormals flush;
    Workspace<T> rows(kTilePoints * width);
    for (int64_t t = chunks.first_tile(chunk); t < chunks.first_tile(chunk + 1); ++t) {
      const TileView<T> tile(lattice, t, tiling.first_point(t), tiling.points(t), transposed);
      lattice_kernels<T>().slice_tile(tile, values, width, gain.data(), nullptr, rows.data());
      store(t, rows.data());
    }
  });
}

// Row sums of the filter as it is normalised, tile by tile.
template <typename T>
void filter_ones(const Lattice<T>& lattice, T* row_sum) {
  const Tiling tiling = lattice.tiling();
  Workspace<T> values(lattice.rows());
  splat_and_blur(
      lattice, false, 1, [&](int64_t t, T* rows) { std::fill_n(rows, tiling.points(t), T(1)); },
      values.data());
  slice(lattice, false, 1, values.data(), [&](int64_t t, const T* rows) {
    std::copy_n(rows, tiling.points(t), row_sum + tiling.first_point(t));
  });
}

}  // namespace fastseg
