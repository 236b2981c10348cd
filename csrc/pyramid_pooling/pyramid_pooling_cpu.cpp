// Both ends of a pyramid pooling on the CPU: the averages of a map over several grids, which read
// it once, and the result of a convolution of the resized grids, spread over the map.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "upsample/upsample.h"

namespace fastseg {
namespace pyramid {
namespace {

struct Range {
  int64_t first, end;
};

// An axis of n pixels, cut wherever a cell of one of the grids begins or ends.
struct Segments {
  std::vector<int64_t> edges;
  std::vector<std::vector<Range>> cells;  // of each grid and cell, its segments

  Segments(int64_t n, const std::vector<int64_t>& bins) {
    const auto first = [n](int64_t b, int64_t i) { return i * n / b; };
    const auto end = [n](int64_t b, int64_t i) { return ((i + 1) * n + b - 1) / b; };
    for (const int64_t b : bins) {
      for (int64_t i = 0; i < b; ++i) {
        edges.push_back(first(b, i));
        edges.push_back(end(b, i));
      }
    }
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    const auto segment = [this](int64_t at) {
      return std::lower_bound(edges.begin(), edges.end(), at) - edges.begin();
    };
    for (const int64_t b : bins) {
      auto& grid = cells.emplace_back();
      for (int64_t i = 0; i < b; ++i) grid.push_back({segment(first(b, i)), segment(end(b, i))});
    }
  }
  int64_t segments() const { return static_cast<int64_t>(edges.size()) - 1; }
  int64_t pixels(Range r) const { return edges[r.end] - edges[r.first]; }
};

struct Cell {
  Range rows, cols;
  int64_t pixels;
};

template <typename T>
struct GridPool {
  int64_t C;
  const Segments &rows, &cols;
  const T* in;
  int64_t in_batch, in_row, in_pixel;        // strides; of channels 1
  const typename Accumulate<T>::type* sums;  // (N, row segments, column segments, C)
};

// What one row or column of a grid contributes to a pixel, seen by one tap of a convolution.
template <typename T>
struct Share {
  int64_t tap, cell;
  T weight;
};

template <typename T>
struct Spread {
  struct Grid {
    const T* values;  // (N, b, b, k, k, O): cell, tap, output channel
    int64_t b;
    std::vector<std::vector<Share<T>>> rows;  // of each output row
  };
  int64_t k, O, W;
  int64_t pitch;  // of lines in scratch memory: an odd number of cache lines, for their sets
  std::vector<Grid> grids;
  std::vector<std::vector<std::pair<int64_t, T>>> columns;  // of each output column: line, weight
  T* out;
  int64_t out_batch, out_row, out_pixel;  // strides; of channels 1
};

#define FASTSEG_KERNEL_FILE "pyramid_pooling/pyramid_pooling_kernel.inl"
#include "common/foreach_isa.inl"

struct TaskBuffer;  // names the scratch memory of a task

constexpr int64_t kChannels = 512;  // of a task: its sums stay in L1

// x (N, C, H, W), channels last -> the means over all cells of all square grids, (N, cells, C).
Tensor grid_pool(const Tensor& x, std::vector<int64_t> bins) {
  FASTSEG_CHECK(x.dim() == 4 && (x.stride(1) == 1 || x.size(1) == 1),
                "grid_pool: x must be an image (N, C, H, W), channels last");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  int64_t total = 0;
  for (const int64_t b : bins) {
    FASTSEG_CHECK(b > 0, "grid_pool: bins must be positive, got ", b);
    total += b * b;
  }
  Tensor out = torch::stable::new_empty(x, {N, total, C});
  if (out.numel() == 0) return out;
  FASTSEG_CHECK(H > 0 && W > 0, "grid_pool: x must have at least one pixel");
  const Segments rows(H, bins), cols(W, bins);
  std::vector<Cell> cells;
  for (size_t g = 0; g < bins.size(); ++g) {
    for (const Range r : rows.cells[g]) {
      for (const Range c : cols.cells[g]) cells.push_back({r, c, rows.pixels(r) * cols.pixels(c)});
    }
  }
  dispatch_floating(x, "grid_pool", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    const int64_t row_segments = rows.segments(), col_segments = cols.segments();
    Workspace<acc> sums(N * row_segments * col_segments * C);
    const GridPool<T> p{C,           rows,        cols,        x.const_data_ptr<T>(),
                        x.stride(0), x.stride(2), x.stride(3), sums.data()};
    const int64_t parts = (C + kChannels - 1) / kChannels, sum_tasks = N * row_segments * parts;
    const auto sum = FASTSEG_ISA_CALL(sum_segment<T>);
    const auto average = FASTSEG_ISA_CALL(average_cell<T>);
    T* result = out.mutable_data_ptr<T>();
    parallel_phases(
        2, [&](int phase) { return phase == 0 ? sum_tasks : N * total; },
        [&](int phase, int64_t task) {
          if (phase == 1) {
            average(p, cells[task % total], task / total, result + task * C,
                    scratch<TaskBuffer, acc>(C));
            return;
          }
          const int64_t line = task / parts, begin = task % parts * kChannels;
          const int64_t count = std::min(kChannels, C - begin);
          acc* own = scratch<TaskBuffer, acc>((col_segments + 1) * count);
          sum(p, line / row_segments, line % row_segments, begin, begin + count, own,
              own + col_segments * count);
          acc* to = sums.data() + line * col_segments * C + begin;
          for (int64_t s = 0; s < col_segments; ++s) {
            std::copy(own + s * count, own + (s + 1) * count, to + s * C);
          }
        });
  });
  return out;
}

// What an axis of b cells, resized to n pixels, contributes to each of them through each tap.
template <typename T>
std::vector<std::vector<Share<T>>> shares(int64_t b, int64_t n, int64_t k, bool align_corners) {
  const ResizeAxis axis{b, n, align_corners};
  const bool fused = current_isa() >= Isa::kAvx2;
  std::vector<std::vector<Share<T>>> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t tap = 0; tap < k; ++tap) {
      const int64_t at = i + tap - k / 2;
      if (at < 0 || at >= n) continue;  // the convolution sees a zero
      const Tap<T> source = axis.template tap<T>(at, fused);
      all[i].push_back({tap, source.i0, source.w0});
      if (source.w1 != 0) all[i].push_back({tap, source.i1, source.w1});
    }
  }
  return all;
}

// values, for each grid (N, b, b, k * k * O): what each tap of a k x k convolution makes of each
// cell -> out (N, O, H, W), channels last: that convolution of the grids, resized to (H, W).
void pyramid_spread_out(std::vector<Tensor> values, const Tensor& out, int64_t k,
                        bool align_corners) {
  FASTSEG_CHECK(out.dim() == 4 && (out.stride(1) == 1 || out.size(1) == 1) && k > 0,
                "pyramid_spread: out must be an image (N, O, H, W), channels last");
  const int64_t N = out.size(0), O = out.size(1), H = out.size(2), W = out.size(3);
  for (const Tensor& v : values) {
    FASTSEG_CHECK(v.dim() == 4 && v.size(0) == N && v.size(1) == v.size(2) && v.size(1) > 0 &&
                      v.size(3) == k * k * O && v.is_contiguous() &&
                      v.scalar_type() == out.scalar_type(),
                  "pyramid_spread: values must be contiguous (N, b, b, k * k * O) of out's dtype");
  }
  if (out.numel() == 0) return;
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t pitch = ((O + kLine - 1) / kLine | 1) * kLine;
    Spread<T> s{k,
                O,
                W,
                pitch,
                {},
                {},
                out.mutable_data_ptr<T>(),
                out.stride(0),
                out.stride(2),
                out.stride(3)};
    s.columns.resize(static_cast<size_t>(W));
    int64_t lines = 0;
    for (const Tensor& v : values) {
      const int64_t b = v.size(1);
      s.grids.push_back({v.const_data_ptr<T>(), b, shares<T>(b, H, k, align_corners)});
      const auto columns = shares<T>(b, W, k, align_corners);
      for (int64_t x = 0; x < W; ++x) {
        for (const Share<T>& c : columns[x]) {
          s.columns[x].emplace_back(lines + c.tap * b + c.cell, c.weight);
        }
      }
      lines += k * b;
    }
    const auto kernel = FASTSEG_ISA_CALL(spread_line<T>);
    parallel_tasks(N * H, [&](int64_t task) {
      kernel(s, task / H, task % H, scratch<TaskBuffer, T>(lines * s.pitch));
    });
  };
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    default:
      fail_check("pyramid_spread: dtype must be float32 or float64");
  }
}

}  // namespace
}  // namespace pyramid

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def("grid_pool(Tensor x, int[] bins) -> Tensor");
  m.def("pyramid_spread_out(Tensor[] values, Tensor(a!) out, int k, bool align_corners) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("grid_pool", TORCH_BOX(&pyramid::grid_pool));
  m.impl("pyramid_spread_out", TORCH_BOX(&pyramid::pyramid_spread_out));
}

}  // namespace fastseg
