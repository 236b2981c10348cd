// The permutohedral filter on the CPU: y = K x by splat, blur and slice. Tiles of points, then
// chains of vertices along each axis, are shared among the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/pooled_tensor.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/lattice_tensor.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

// Phase 0 merges, 1 to d + 1 blur along an axis each, and the last one multiplies by the matrices.
template <typename T>
void merge_and_blur(const std::vector<Blur<T>>& blurs, bool reversed, int width) {
  constexpr int kMultiply = kMaxFeatures + 2, kPhases = kMultiply + 1;
  struct Range {
    const Blur<T>* blur;
    int64_t begin, end;  // vertices, or chains of an axis
  };
  const auto whole = [&](const Blur<T>& blur, int phase) -> Range {
    const Lattice<T>& lattice = *blur.lattice;
    if (phase == 0) return {&blur, 0, lattice.header->vertices};
    if (phase == kMultiply) return {&blur, 0, blur.matrix ? lattice.header->vertices : 0};
    if (phase > lattice.d() + 1) return {&blur, 0, 0};
    const int64_t axis = reversed ? lattice.d() + 1 - phase : phase - 1;
    return {&blur, lattice.axis_begin[axis], lattice.axis_begin[axis + 1]};
  };
  const auto& kernels = lattice_kernels<T>();
  const auto run = [&](int phase, const Range& range) {
    const FlushDenormals flush;
    const auto& [blur, begin, end] = range;
    const Lattice<T>& lattice = *blur->lattice;
    if (phase == 0) {
      kernels.merge_rows(lattice.merge_begin, lattice.merge_row, begin, end, width, blur->sums,
                         blur->values);
    } else if (phase == kMultiply) {
      kernels.transform_rows(blur->matrix, begin, end, width, blur->values);
    } else {
      kernels.blur_chains(lattice.chain_begin, lattice.chain_vertex, begin, end, width,
                          blur->values);
    }
  };
  // A thread per lattice where a cache line holds 16 vertices, unless there is only one.
  if (width == 1 && blurs.size() > 1) {
    parallel_tasks(static_cast<int64_t>(blurs.size()), [&](int64_t i) {
      for (int phase = 0; phase < kPhases; ++phase) {
        run(phase, whole(blurs[static_cast<size_t>(i)], phase));
      }
    });
    return;
  }
  std::vector<std::vector<Range>> phases(kPhases);
  for (int phase = 0; phase < kPhases; ++phase) {
    for (const Blur<T>& blur : blurs) {
      const Range all = whole(blur, phase);
      int64_t step = std::max(1, 16384 / std::max(8, width));  // vertices per task
      if (phase > 0 && phase < kMultiply && all.begin < all.end) {
        const int32_t* chain = blur.lattice->chain_begin;
        step = step * (all.end - all.begin) / (chain[all.end] - chain[all.begin]) + 1;
      }
      for (int64_t at = all.begin; at < all.end; at += step) {
        phases[static_cast<size_t>(phase)].push_back({&blur, at, std::min(all.end, at + step)});
      }
    }
  }
  const auto of = [&](int phase) -> const std::vector<Range>& {
    return phases[static_cast<size_t>(phase)];
  };
  parallel_phases(
      kPhases, [&](int phase) { return static_cast<int64_t>(of(phase).size()); },
      [&](int phase, int64_t task) { run(phase, of(phase)[static_cast<size_t>(task)]); });
}

template void merge_and_blur<float>(const std::vector<Blur<float>>&, bool, int);
template void merge_and_blur<double>(const std::vector<Blur<double>>&, bool, int);

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
      build_lattice(features.const_data_ptr<T>() + b * d * points, d, height, width,
                    static_cast<Normalization>(normalization), [&](int64_t bytes) -> void* {
                      lattices.push_back(pooled_empty(features, {bytes}, ScalarType::Byte, 1));
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
        const int width = count == 1 ? 1 : row_width(count);
        Workspace<T> rows(lattice.rows() * width);
        splat_and_blur(
            lattice, transposed, width,
            [&](int64_t t, T* tile) { load_tile(tiling, t, in + at, points, count, width, tile); },
            rows.data());
        slice(lattice, transposed, width, rows.data(), [&](int64_t t, const T* tile) {
          store_tile(tiling, t, tile, width, count, points, result + at);
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
