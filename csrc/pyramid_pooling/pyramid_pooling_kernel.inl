// Sums of a map over grid cells, and the spreading of a convolution of grids; plain loops over
// channels that the compiler vectorises.

#include "common/convert.inl"

// Segment `rows` of image n: sums over its crossings with the column segments, of channels
// [begin, end), to `sums` (column segments, end - begin).
template <typename T>
void sum_segment(const GridPool<T>& p, int64_t n, int64_t rows, int64_t begin, int64_t end,
                 typename Accumulate<T>::type* sums, typename Accumulate<T>::type* pixel) {
  using acc = typename Accumulate<T>::type;
  const int64_t count = end - begin, columns = p.cols.segments();
  std::fill_n(sums, columns * count, acc{0});
  for (int64_t y = p.rows.edges[rows]; y < p.rows.edges[rows + 1]; ++y) {
    const T* from = p.in + n * p.in_batch + y * p.in_row + begin;
    for (int64_t s = 0; s < columns; ++s) {
      acc* __restrict__ to = sums + s * count;
      for (int64_t x = p.cols.edges[s]; x < p.cols.edges[s + 1]; ++x) {
        if constexpr (std::is_same_v<T, acc>) {
          const T* __restrict__ value = from + x * p.in_pixel;
          for (int64_t c = 0; c < count; ++c) to[c] += value[c];
        } else {
          widen(from + x * p.in_pixel, pixel, count);
          for (int64_t c = 0; c < count; ++c) to[c] += pixel[c];
        }
      }
    }
  }
}

// The mean of a cell from the sums of its crossings of segments.
template <typename T>
void average_cell(const GridPool<T>& p, const Cell& cell, int64_t n, T* out,
                  typename Accumulate<T>::type* mean) {
  using acc = typename Accumulate<T>::type;
  const int64_t columns = p.cols.segments();
  std::fill_n(mean, p.C, acc{0});
  for (int64_t r = cell.rows.first; r < cell.rows.end; ++r) {
    for (int64_t s = cell.cols.first; s < cell.cols.end; ++s) {
      const acc* __restrict__ sums = p.sums + ((n * p.rows.segments() + r) * columns + s) * p.C;
      for (int64_t c = 0; c < p.C; ++c) mean[c] += sums[c];
    }
  }
  const acc share = acc{1} / static_cast<acc>(cell.pixels);
  for (int64_t c = 0; c < p.C; ++c) mean[c] *= share;
  narrow(mean, out, p.C);
}

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif
// Row y of image n of the result; `lines` has room for (columns of all grids and taps, pitch).
template <typename T>
void spread_line(const Spread<T>& s, int64_t n, int64_t y, T* lines) {
  const int64_t O = s.O;
  int64_t j = 0;  // over grids, their taps along x and their columns
  for (const auto& grid : s.grids) {
    const T* values = grid.values + n * grid.b * grid.b * s.k * s.k * O;
    for (int64_t kx = 0; kx < s.k; ++kx) {
      for (int64_t bx = 0; bx < grid.b; ++bx, ++j) {
        T* __restrict__ line = lines + j * s.pitch;
        std::fill_n(line, O, T{0});
        for (const Share<T>& share : grid.rows[y]) {
          const int64_t cell = share.cell * grid.b + bx, tap = share.tap * s.k + kx;
          const T* __restrict__ value = values + (cell * s.k * s.k + tap) * O;
          for (int64_t o = 0; o < O; ++o) line[o] += share.weight * value[o];
        }
      }
    }
  }
  // Output channels in registers.
  typedef T Line __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  constexpr int kVectors = FASTSEG_ISA_LEVEL >= 2 ? 8 : 4;
  constexpr int64_t kLanes = 64 / sizeof(T), kRun = kVectors * kLanes;
  for (int64_t begin = 0; begin < O; begin += kRun) {
    const int64_t count = std::min(kRun, O - begin);
    for (int64_t x = 0; x < s.W; ++x) {
      T* out = s.out + n * s.out_batch + y * s.out_row + x * s.out_pixel + begin;
      if (count == kRun) {
        Line sums[kVectors] = {};
        for (const auto& [index, weight] : s.columns[x]) {
          const T* line = lines + index * s.pitch + begin;
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sums[v] += weight * *reinterpret_cast<const Line*>(line + v * kLanes);
          }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Line*>(out + v * kLanes) = sums[v];
        continue;
      }
      std::fill_n(out, count, T{0});
      for (const auto& [index, weight] : s.columns[x]) {
        const T* line = lines + index * s.pitch + begin;
        for (int64_t o = 0; o < count; ++o) out[o] += weight * line[o];
      }
    }
  }
}
#if !defined(__clang__)
#pragma GCC pop_options
#endif
