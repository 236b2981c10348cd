// Mean field of the dense CRF on the CPU. One sweep over the tiles of points does everything that
// happens to a point: slice every pairwise term, add the unary energy, soft-max, splat into the
// next iteration's vertices. Beliefs never leave the cache; only vertices are blurred in between.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/lattice_tensor.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

// One pairwise term of one image.
template <typename T>
struct Term {
  Lattice<T> lattice;
  std::vector<T> diagonal, matrix;  // coefficients of the message with the slice's gain folded in
  Workspace<T> values, next;  // vertices that are sliced, and those that are splatted meanwhile
  Workspace<T> extra;         // further partial sums of `next`

  Term(const void* buffer, const T* coefficients, bool full, int64_t labels, int width)
      : lattice(buffer),
        values(lattice.header->vertices * width),
        next(lattice.header->vertices * width),
        extra(lattice.extra_rows() * width) {
    const T gain = static_cast<T>(lattice_gain(static_cast<int>(lattice.d())));
    if (full) {
      matrix.assign(static_cast<size_t>(width) * static_cast<size_t>(width), T(0));
      for (int64_t m = 0; m < labels; ++m) {
        for (int64_t l = 0; l < labels; ++l) {
          matrix[static_cast<size_t>(m * width + l)] = gain * coefficients[l * labels + m];
        }
      }
    } else {
      diagonal.assign(static_cast<size_t>(width), T(0));
      for (int64_t l = 0; l < labels; ++l) {
        diagonal[static_cast<size_t>(l)] = gain * coefficients[l];
      }
    }
  }
};

template <typename T>
struct Problem {
  int64_t labels, points, iterations;
  const T* unary;  // (labels, points)
  const T* start;  // beliefs to start from, or null
  bool point_major;
  T* out;
};

template <typename T>
bool mean_field_image(const Problem<T>& problem, const std::vector<std::unique_ptr<Term<T>>>& terms,
                      const Tiling& tiling) {
  const auto& kernels = lattice_kernels<T>();
  const int width = row_width(problem.labels), stride = tile_stride(width);
  const int64_t tiles = tiling.count();
  int64_t most = 0;
  for (const auto& term : terms) most = std::max(most, largest_tile(term->lattice));
  Workspace<T> energies(problem.points * width);
  std::atomic<bool> valid{true};
  for (int64_t step = 0; step <= problem.iterations; ++step) {
    constexpr int64_t kTiles = 16;  // per task
    parallel_tasks((tiles + kTiles - 1) / kTiles, [&](int64_t task) {
      const int64_t begin = task * kTiles, end = std::min(tiles, begin + kTiles);
      const FlushDenormals flush;
      Workspace<T> rows_space(kTilePoints * stride), local_space(most * stride);
      T inverse[kTilePoints];
      T* rows = rows_space.data();
      T* local = local_space.data();
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = tiling.first_point(t);
        const auto points = static_cast<int>(tiling.points(t));
        T* energy = energies.data() + first * width;
        if (step == 0) {
          load_tile(tiling, t, problem.unary, problem.points, problem.labels, width, width, energy,
                    T(-1), -std::numeric_limits<T>::infinity());
          if (!kernels.shift_logits(energy, points, width)) valid = false;
        }
        if (step == 0 && problem.start != nullptr) {
          load_tile(tiling, t, problem.start, problem.points, problem.labels, width, stride, rows);
          std::fill_n(inverse, points, T(1));
        } else {
          const T* from = energy;
          int from_stride = width;
          if (step == 0 || terms.empty()) {
            for (int i = 0; i < points; ++i) {
              std::copy_n(energy + i * width, width, rows + i * stride);
            }
            kernels.softmax_tile(rows, points, width, stride, true, inverse);
          } else {
            T bound = 0;  // of the messages, and so of the logits, whose largest energy is 0
            for (const auto& term : terms) {
              const TileView<T> tile(term->lattice, t, first, points);
              bound +=
                  term->lattice.header->largest_weight *
                  kernels.gather_rows(term->values.data(), width, stride, tile.pair_vertex,
                                      tile.pairs, term->diagonal.data(),
                                      term->matrix.empty() ? nullptr : term->matrix.data(), local);
              kernels.slice_tile(tile, local, width, stride, from, from_stride, rows);
              from = rows;
              from_stride = stride;
            }
            kernels.softmax_tile(rows, points, width, stride, bound <= 80, inverse);
          }
        }
        if (step < problem.iterations) {
          for (const auto& term : terms) {
            const TileView<T> tile(term->lattice, t, first, points);
            kernels.splat_tile(tile, rows, inverse, width, stride, local);
            kernels.scatter_rows(local, width, stride, tile.pair_row, tile.pairs,
                                 term->lattice.header->vertices, term->next.data(),
                                 term->extra.data());
          }
          continue;
        }
        kernels.scale_rows(rows, points, width, stride, inverse);
        if (problem.point_major) {
          tiling.for_each_run(t, [&](int64_t run, int64_t length, int64_t position) {
            for (int64_t i = 0; i < length; ++i) {
              std::copy_n(rows + (position + i) * stride, problem.labels,
                          problem.out + (run + i) * problem.labels);
            }
          });
        } else {
          store_tile(tiling, t, rows, stride, problem.labels, problem.points, problem.out);
        }
      }
    });
    if (!valid) return false;
    if (step < problem.iterations) {
      for (const auto& term : terms) {
        std::swap(term->values, term->next);
        merge_and_blur(term->lattice, false, width, term->extra.data(), term->values.data());
      }
    }
  }
  return true;
}

// unary (B, L, N) energies -> beliefs after `iterations` updates, (B, L, N), or (B, N, L) if
// `point_major`. Term k uses `lattice_counts[k]` consecutive lattices, B or one for all images, and
// coefficients[k], (L) or a symmetric (L, L): the message it adds to the logits is
// coefficients * (K Q). The first update starts from `start`, or from soft-max(-unary).
Tensor dense_crf_cpu(const Tensor& unary, std::optional<Tensor> start, std::vector<Tensor> lattices,
                     std::vector<int64_t> lattice_counts, std::vector<Tensor> coefficients,
                     int64_t height, int64_t width, int64_t iterations, bool point_major) {
  FASTSEG_CHECK(unary.dim() == 3 && unary.is_contiguous(),
                "dense_crf: unary must be contiguous with shape (B, L, N)");
  const int64_t batch = unary.size(0), labels = unary.size(1), points = unary.size(2);
  FASTSEG_CHECK(labels >= 1 && iterations >= 0,
                "dense_crf: needs at least one label and iterations >= 0");
  FASTSEG_CHECK(height * width == points, "dense_crf: height * width must be N = ", points);
  FASTSEG_CHECK(!start || (start->is_contiguous() && start->numel() == unary.numel() &&
                           start->scalar_type() == unary.scalar_type()),
                "dense_crf: start must have the shape and dtype of unary");
  FASTSEG_CHECK(lattice_counts.size() == coefficients.size(),
                "dense_crf: needs one coefficient tensor per term");
  Tensor out = pooled_empty(unary, point_major ? std::vector<int64_t>{batch, points, labels}
                                               : std::vector<int64_t>{batch, labels, points});
  bool valid = true;
  dispatch_lattice(unary, "dense_crf", [&](auto tag) {
    using T = decltype(tag);
    size_t used = 0;
    for (size_t k = 0; k < lattice_counts.size(); ++k) {
      FASTSEG_CHECK(lattice_counts[k] == 1 || lattice_counts[k] == batch,
                    "dense_crf: a term needs 1 or B lattices, got ", lattice_counts[k]);
      const Tensor& c = coefficients[k];
      FASTSEG_CHECK(c.is_contiguous() && c.scalar_type() == unary.scalar_type() &&
                        (c.dim() == 1 || c.dim() == 2) && c.size(0) == labels &&
                        c.size(c.dim() - 1) == labels,
                    "dense_crf: coefficients must have shape (L) or (L, L) and the dtype of unary");
      used += static_cast<size_t>(lattice_counts[k]);
    }
    FASTSEG_CHECK(used == lattices.size(), "dense_crf: lattice_counts must add up to ",
                  lattices.size());
    for (const Tensor& lattice : lattices) {
      check_lattice("dense_crf", lattice, points, sizeof(T));
      const auto* header = static_cast<const LatticeHeader*>(lattice.const_data_ptr());
      FASTSEG_CHECK(header->height == height && header->width == width,
                    "dense_crf: all lattices must be built for points of one height and width");
    }
    std::atomic<bool> all_valid{true};
    for_each_image(batch, [&](int64_t b) {
      std::vector<std::unique_ptr<Term<T>>> terms;
      size_t first = 0;
      for (size_t k = 0; k < lattice_counts.size(); ++k) {
        const size_t at = first + (lattice_counts[k] == 1 ? 0 : static_cast<size_t>(b));
        terms.push_back(std::make_unique<Term<T>>(
            lattices[at].const_data_ptr(), coefficients[k].template const_data_ptr<T>(),
            coefficients[k].dim() == 2, labels, row_width(labels)));
        first += static_cast<size_t>(lattice_counts[k]);
      }
      const int64_t offset = b * labels * points;
      const Problem<T> problem{labels,
                               points,
                               iterations,
                               unary.const_data_ptr<T>() + offset,
                               start ? start->template const_data_ptr<T>() + offset : nullptr,
                               point_major,
                               out.mutable_data_ptr<T>() + offset};
      if (!mean_field_image(problem, terms, Tiling(height, width))) all_valid = false;
    });
    valid = all_valid;
  });
  FASTSEG_CHECK(valid,
                "dense_crf: unary must hold no NaN or -inf, and a finite energy for some label of "
                "every point");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "dense_crf(Tensor unary, Tensor? start, Tensor[] lattices, int[] lattice_counts, Tensor[] "
      "coefficients, int height, int width, int iterations, bool point_major) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu)); }

}  // namespace fastseg
