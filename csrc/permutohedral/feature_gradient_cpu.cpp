// The gradient of the lattice filter for its features: the derivative of <a, K x> when the points
// move within their simplices. Both vectors are splatted and blurred, each in its own direction;
// then a point's gradient is a matter of the d + 1 vertices around it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/lattice_tensor.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

// The simplices of one tile's points: ranks, planar, and weights without any normalisation.
template <typename T>
class TileSimplices {
 public:
  explicit TileSimplices(int d) : d_(d) {
    lattice_scale(d, scale_);
    const size_t d1 = static_cast<size_t>(d) + 1, plane = kTilePoints;
    features_.resize(d * plane);
    cell_.resize(d1 * plane);
    rank.resize(d1 * plane);
    planar_.resize(d1 * plane);
    weight.resize(d1 * plane);
  }
  void locate(const Tiling& tiling, int64_t tile, const T* features, int64_t points) {
    const int n = static_cast<int>(tiling.points(tile)), padded = (n + 15) / 16 * 16;
    for (int k = 0; k < d_; ++k) {
      T* row = features_.data() + k * kTilePoints;
      tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
        std::copy_n(features + k * points + begin, length, row + position);
      });
      std::fill(row + n, row + padded, row[0]);
    }
    lattice_kernels<T>().locate_points(d_, padded, kTilePoints, features_.data(), scale_,
                                       cell_.data(), rank.data(), planar_.data());
    for (int r = 0; r <= d_; ++r) {
      for (int i = 0; i < n; ++i) weight[i * (d_ + 1) + r] = planar_[r * kTilePoints + i];
    }
  }
  // The gradient for the features of point i from that for its weights.
  void pull_back(int i, const T* weight_gradient, T* feature_gradient) const {
    T sum = 0;  // of the lifted coordinates below k
    for (int k = 0; k <= d_; ++k) {
      const int position = rank[k * kTilePoints + i];
      const T lifted = (weight_gradient[d_ - position] -
                        weight_gradient[position == 0 ? 0 : d_ + 1 - position]) /
                       T(d_ + 1);
      if (k > 0) feature_gradient[k - 1] = scale_[k - 1] * (sum - T(k) * lifted);
      sum += lifted;
    }
  }

  std::vector<int32_t> rank;  // [d + 1][kTilePoints]
  std::vector<T> weight;      // [points][d + 1]

 private:
  int d_;
  T scale_[kMaxFeatures];
  std::vector<T> features_, planar_;
  std::vector<int32_t> cell_;
};

// Sum of a[l] * b[l] over a row, in eight interleaved partial sums.
template <typename T>
T dot(const T* a, const T* b, int width) {
  T part[8] = {};
  for (int l = 0; l < width; l += 8) {
    for (int k = 0; k < 8; ++k) part[k] += a[l + k] * b[l + k];
  }
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

template <typename T>
struct FeatureGradient {
  const Lattice<T>& lattice;
  const T* features;  // (d, N)
  T* out;             // (d, N), added to

  // Adds the gradient of sum over channels of <a, K x>, K without normalisation, for up to 32
  // channels. load_a and load_x(tile, rows) fill the rows of a tile. If not null, with_a[i] and
  // with_x[i], points numbered tile by tile, grow by the parts of point i in <a, K x> and
  // <x, K^T a>.
  template <typename LoadA, typename LoadX>
  void add(int width, LoadA&& load_a, LoadX&& load_x, T* with_a, T* with_x) const {
    const auto& kernels = lattice_kernels<T>();
    const Tiling tiling = lattice.tiling();
    const Chunking chunks(tiling);
    const int d = static_cast<int>(lattice.d());
    const int64_t points = lattice.header->points;
    Workspace<T> v(lattice.rows() * width), w(lattice.rows() * width);
    const auto tile_view = [&](int64_t t, const TileSimplices<T>& simplices) {
      TileView<T> tile(lattice, t, tiling.first_point(t), tiling.points(t));
      tile.weight = simplices.weight.data();
      tile.slice_scale = tile.splat_scale = nullptr;
      return tile;
    };
    parallel_tasks(chunks.count, [&](int64_t chunk) {
      const FlushDenormals flush;
      TileSimplices<T> simplices(d);
      Workspace<T> rows(kTilePoints * width);
      lattice.clear_rows(chunk, width, v.data());
      lattice.clear_rows(chunk, width, w.data());
      for (int64_t t = chunks.first_tile(chunk); t < chunks.first_tile(chunk + 1); ++t) {
        simplices.locate(tiling, t, features, points);
        const TileView<T> tile = tile_view(t, simplices);
        load_x(t, rows.data());
        kernels.splat_tile(tile, rows.data(), nullptr, width, v.data());
        load_a(t, rows.data());
        kernels.splat_tile(tile, rows.data(), nullptr, width, w.data());
      }
    });
    merge_and_blur<T>({{&lattice, v.data(), v.data()}}, false, width);
    merge_and_blur<T>({{&lattice, w.data(), w.data()}}, true, width);
    const T gain = static_cast<T>(lattice_gain(d));
    parallel_tasks(chunks.count, [&](int64_t chunk) {
      const FlushDenormals flush;
      TileSimplices<T> simplices(d);
      Workspace<T> rows_x(kTilePoints * width), rows_a(kTilePoints * width);
      Workspace<T> gradient(kTilePoints * d);
      for (int64_t t = chunks.first_tile(chunk); t < chunks.first_tile(chunk + 1); ++t) {
        simplices.locate(tiling, t, features, points);
        const TileView<T> tile = tile_view(t, simplices);
        load_x(t, rows_x.data());
        load_a(t, rows_a.data());
        const int64_t first = tiling.first_point(t);
        for (int i = 0; i < tile.points; ++i) {
          const int32_t* vertex = tile.simplex_vertex + tile.point_simplex[i] * (d + 1);
          const T *a = rows_a.data() + i * width, *x = rows_x.data() + i * width;
          T by_weight[kMaxFeatures + 1], sum_a = 0, sum_x = 0;
          for (int r = 0; r <= d; ++r) {
            const int64_t row = static_cast<int64_t>(vertex[r]) * width;
            const T of_a = gain * dot(a, v.data() + row, width);
            const T of_x = gain * dot(x, w.data() + row, width);
            by_weight[r] = of_a + of_x;
            sum_a += tile.weight[i * (d + 1) + r] * of_a;
            sum_x += tile.weight[i * (d + 1) + r] * of_x;
          }
          simplices.pull_back(i, by_weight, gradient.data() + i * d);
          if (with_a != nullptr) with_a[first + i] += sum_a;
          if (with_x != nullptr) with_x[first + i] += sum_x;
        }
        tiling.for_each_run(t, [&](int64_t run, int64_t length, int64_t position) {
          for (int k = 0; k < d; ++k) {
            for (int64_t i = 0; i < length; ++i) {
              out[k * points + run + i] += gradient[(position + i) * d + k];
            }
          }
        });
      }
    });
  }
};

// Adds to `out` (d, N) the gradient of <a, Khat x>, Khat normalised as the lattice is.
//
// Khat = diag(left) K diag(right), and the scales depend on the features through n = K 1. Hence the
// gradient of <left a, K right x>, scales held, plus that of <c, K 1>, c the derivative for n.
template <typename T>
void add_feature_gradient(const Lattice<T>& lattice, const T* features, const T* x, const T* a,
                          int64_t channels, T* out) {
  const auto& kernels = lattice_kernels<T>();
  const Tiling tiling = lattice.tiling();
  const int64_t points = lattice.header->points;
  const auto mode = static_cast<Normalization>(lattice.header->normalization);
  const bool symmetric = mode == Normalization::kSymmetric;
  const bool left = symmetric || mode == Normalization::kAfter;
  const bool right = symmetric || mode == Normalization::kBefore;
  const FeatureGradient<T> gradient{lattice, features, out};

  Workspace<T> parts_a(left ? points : 0), parts_x(right ? points : 0);
  if (left) std::fill_n(parts_a.data(), points, T(0));
  if (right) std::fill_n(parts_x.data(), points, T(0));
  for (int64_t c = 0; c < channels; c += 32) {
    const int64_t count = std::min<int64_t>(32, channels - c);
    const int width = row_width(count);
    const auto loader = [&, c](const T* planes, bool scaled) {
      return [&, planes, scaled](int64_t t, T* rows) {
        load_tile(tiling, t, planes + c * points, points, count, width, rows);
        if (!scaled) return;
        kernels.scale_rows(rows, static_cast<int>(tiling.points(t)), width,
                           lattice.scale + tiling.first_point(t));
      };
    };
    gradient.add(width, loader(a, left), loader(x, right), left ? parts_a.data() : nullptr,
                 right ? parts_x.data() : nullptr);
  }
  if (!left && !right) return;

  // d scale / d n = -1/2 scale^3 (symmetric) or -scale^2; the parts above hold one scale already.
  const int width = row_width(1);
  const auto load_one = [&](int64_t t, T* rows) {
    std::fill_n(rows, tiling.points(t) * width, T(0));
    for (int64_t i = 0; i < tiling.points(t); ++i) rows[i * width] = 1;
  };
  const auto load_c = [&](int64_t t, T* rows) {
    const int64_t first = tiling.first_point(t);
    std::fill_n(rows, tiling.points(t) * width, T(0));
    for (int64_t i = 0; i < tiling.points(t); ++i) {
      const T s = lattice.scale[first + i];
      const T part = (left ? parts_a[first + i] : T(0)) + (right ? parts_x[first + i] : T(0));
      rows[i * width] = symmetric ? T(-0.5) * s * s * part : -s * part;
    }
  };
  gradient.add(width, load_c, load_one, nullptr, nullptr);
}

// features (B, d, N) of the lattices, values x and grad a (B, C, N) -> (B, d, N), the gradient of
// <a, Khat x>. Lattices may be one for all images; then features are (1, d, N) and so is the sum.
Tensor permutohedral_feature_gradient_cpu(const Tensor& features, const Tensor& values,
                                          const Tensor& grad, std::vector<Tensor> lattices) {
  FASTSEG_CHECK(features.dim() == 3 && features.is_contiguous() && values.dim() == 3 &&
                    values.is_contiguous() && grad.dim() == 3 && grad.is_contiguous(),
                "permutohedral_feature_gradient: features, values and grad must be contiguous with "
                "shapes (B, d, N), (B, C, N) and (B, C, N)");
  const int64_t batch = values.size(0), channels = values.size(1), points = values.size(2);
  const auto count = static_cast<int64_t>(lattices.size());
  FASTSEG_CHECK(
      grad.size(0) == batch && grad.size(1) == channels && grad.size(2) == points &&
          features.size(0) == count && features.size(2) == points && (count == batch || count == 1),
      "permutohedral_feature_gradient: features, values and grad must have matching shapes");
  FASTSEG_CHECK(
      features.scalar_type() == values.scalar_type() && grad.scalar_type() == values.scalar_type(),
      "permutohedral_feature_gradient: features, values and grad must have one dtype");
  const int64_t d = features.size(1);
  Tensor out = torch::stable::new_zeros(features, {count, d, points});
  dispatch_lattice(values, "permutohedral_feature_gradient", [&](auto tag) {
    using T = decltype(tag);
    for (const Tensor& lattice : lattices) {
      check_lattice("permutohedral_feature_gradient", lattice, points, sizeof(T));
      FASTSEG_CHECK(static_cast<const LatticeHeader*>(lattice.const_data_ptr())->features == d,
                    "permutohedral_feature_gradient: lattices must be those of the features");
    }
    const T *f = features.const_data_ptr<T>(), *x = values.const_data_ptr<T>(),
            *a = grad.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    const auto image = [&](int64_t b) {
      const int64_t at = count == 1 ? 0 : b;
      add_feature_gradient(Lattice<T>(lattices[static_cast<size_t>(at)].const_data_ptr()),
                           f + at * d * points, x + b * channels * points,
                           a + b * channels * points, channels, result + at * d * points);
    };
    if (count == batch) {
      for_each_image(batch, image);
    } else {
      for (int64_t b = 0; b < batch; ++b) image(b);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "permutohedral_feature_gradient(Tensor features, Tensor values, Tensor grad, Tensor[] "
      "lattices) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("permutohedral_feature_gradient", TORCH_BOX(&permutohedral_feature_gradient_cpu));
}

}  // namespace fastseg
