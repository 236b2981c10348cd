// The permutohedral filter on the CPU: y = K x by splat, blur and slice. Tiles of points, then
// chains of vertices along each axis, are shared among the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/lattice_tensor.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

using torch::stable::parallel_for;

template <typename T>
void merge_and_blur(const Lattice<T>& lattice, bool reversed, int width, const T* extra,
                    T* values) {
  const auto& kernels = lattice_kernels<T>();
  parallel_for(0, lattice.header->merges, 1024, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    kernels.merge_rows(lattice.merge_vertex, lattice.merge_begin, begin, end, extra, width, values);
  });
  const int64_t d1 = lattice.d() + 1;
  for (int64_t j = 0; j < d1; ++j) {
    const int64_t axis = reversed ? d1 - 1 - j : j;
    const int64_t first = lattice.axis_begin[axis], last = lattice.axis_begin[axis + 1];
    if (first == last) continue;
    const int64_t length =
        (lattice.chain_begin[last] - lattice.chain_begin[first]) / (last - first);
    parallel_for(first, last, 2048 / length + 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      kernels.blur_chains(lattice.chain_begin, lattice.chain_vertex, begin, end, width, values);
    });
  }
}

namespace {

// Runs the filter for up to 32 channels. load(tile, rows) and store(tile, rows) move one tile of
// points in and out of rows of tile_stride(width).
template <typename T, typename Load, typename Store>
void filter_channels(const Lattice<T>& lattice, bool transposed, int width, Load&& load,
                     Store&& store) {
  const auto& kernels = lattice_kernels<T>();
  const Tiling tiling = lattice.tiling();
  const int stride = tile_stride(width);
  const int64_t tiles = tiling.count(), most = largest_tile(lattice);
  const int64_t grain = 8;
  const std::vector<T> ones(kTilePoints, T(1));
  const int64_t vertices = lattice.header->vertices;
  Workspace<T> values(vertices * width), extra(lattice.extra_rows() * width);
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Workspace<T> rows(kTilePoints * stride), local(most * stride);
    std::fill_n(rows.data(), kTilePoints * stride, T(0));
    for (int64_t t = begin; t < end; ++t) {
      const TileView<T> tile(lattice, t, tiling.first_point(t), tiling.points(t), transposed);
      load(t, rows.data(), stride);
      kernels.splat_tile(tile, rows.data(), ones.data(), width, stride, local.data());
      kernels.scatter_rows(local.data(), width, stride, tile.pair_row, tile.pairs, vertices,
                           values.data(), extra.data());
    }
  });
  merge_and_blur(lattice, transposed, width, extra.data(), values.data());
  const std::vector<T> gain(static_cast<size_t>(width),
                            static_cast<T>(lattice_gain(static_cast<int>(lattice.d()))));
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Workspace<T> rows(kTilePoints * stride), local(most * stride);
    for (int64_t t = begin; t < end; ++t) {
      const TileView<T> tile(lattice, t, tiling.first_point(t), tiling.points(t), transposed);
      kernels.gather_rows(values.data(), width, stride, tile.pair_vertex, tile.pairs, gain.data(),
                          nullptr, local.data());
      std::fill_n(rows.data(), tile.points * stride, T(0));
      kernels.slice_tile(tile, local.data(), width, stride, rows.data(), stride, rows.data());
      store(t, rows.data(), stride);
    }
  });
}

}  // namespace

template <typename T>
void filter_ones(const Lattice<T>& lattice, T* row_sum) {
  const Tiling tiling = lattice.tiling();
  filter_channels(
      lattice, false, row_width(1),
      [&](int64_t t, T* rows, int stride) {
        for (int64_t i = 0; i < tiling.points(t); ++i) rows[i * stride] = 1;
      },
      [&](int64_t t, const T* rows, int stride) {
        T* sums = row_sum + tiling.first_point(t);
        for (int64_t i = 0; i < tiling.points(t); ++i) sums[i] = rows[i * stride];
      });
}

template void merge_and_blur<float>(const Lattice<float>&, bool, int, const float*, float*);
template void merge_and_blur<double>(const Lattice<double>&, bool, int, const double*, double*);
template void filter_ones<float>(const Lattice<float>&, float*);
template void filter_ones<double>(const Lattice<double>&, double*);

namespace {

// features (B, d, height * width) -> one lattice buffer per image, bytes in a 1-D uint8 tensor.
std::vector<Tensor> permutohedral_build_cpu(const Tensor& features, int64_t height, int64_t width,
                                            int64_t normalization) {
  FASTSEG_CHECK(features.dim() == 3 && features.is_contiguous(),
                "permutohedral_build: features must be contiguous with shape (B, d, N)");
  const int64_t batch = features.size(0), d = features.size(1), points = features.size(2);
  FASTSEG_CHECK(d >= 1 && d <= kMaxFeatures, "permutohedral_build: d must be in 1..", kMaxFeatures,
                ", got ", d);
  FASTSEG_CHECK(points >= 1 && height >= 1 && height * width == points,
                "permutohedral_build: needs height * width = N >= 1 points, got ", height, " * ",
                width, " and N = ", points);
  FASTSEG_CHECK(normalization >= 0 && normalization <= 3,
                "permutohedral_build: normalization must be in 0..3, got ", normalization);
  std::vector<Tensor> lattices;
  dispatch_lattice(features, "permutohedral_build", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < batch; ++b) {
      build_lattice(
          features.const_data_ptr<T>() + b * d * points, d, height, width,
          static_cast<Normalization>(normalization), [&](int64_t bytes) -> void* {
            lattices.push_back(torch::stable::new_empty(features, {bytes}, ScalarType::Byte));
            return lattices.back().mutable_data_ptr();
          });
    }
  });
  return lattices;
}

// values (B, C, N) -> K values, the adjoint filter if `transposed`. One lattice per image, or one
// for all.
Tensor permutohedral_filter_cpu(const Tensor& values, std::vector<Tensor> lattices,
                                bool transposed) {
  FASTSEG_CHECK(values.dim() == 3 && values.is_contiguous(),
                "permutohedral_filter: values must be contiguous with shape (B, C, N)");
  const int64_t batch = values.size(0), channels = values.size(1), points = values.size(2);
  FASTSEG_CHECK(static_cast<int64_t>(lattices.size()) == batch || lattices.size() == 1,
                "permutohedral_filter: needs 1 or B = ", batch, " lattices, got ", lattices.size());
  Tensor out = torch::stable::empty_like(values);
  dispatch_lattice(values, "permutohedral_filter", [&](auto tag) {
    using T = decltype(tag);
    for (const Tensor& lattice : lattices) {
      check_lattice("permutohedral_filter", lattice, points, sizeof(T));
    }
    const T* in = values.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    for_each_image(batch, [&](int64_t b) {
      const Lattice<T> lattice(
          lattices[lattices.size() == 1 ? 0 : static_cast<size_t>(b)].const_data_ptr());
      const Tiling tiling = lattice.tiling();
      for (int64_t c = 0; c < channels; c += 32) {
        const int64_t count = std::min<int64_t>(32, channels - c), at = (b * channels + c) * points;
        filter_channels(
            lattice, transposed, row_width(count),
            [&](int64_t t, T* rows, int stride) {
              load_tile(tiling, t, in + at, points, count, row_width(count), stride, rows);
            },
            [&](int64_t t, const T* rows, int stride) {
              store_tile(tiling, t, rows, stride, count, points, result + at);
            });
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "permutohedral_build(Tensor features, int height, int width, int normalization) -> Tensor[]");
  m.def("permutohedral_filter(Tensor values, Tensor[] lattices, bool transposed) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("permutohedral_build", TORCH_BOX(&permutohedral_build_cpu));
  m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter_cpu));
}

}  // namespace fastseg
