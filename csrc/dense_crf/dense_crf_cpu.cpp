// Mean field of the dense CRF on the CPU. One sweep over the tiles of points does everything that
// happens to a point: slice every pairwise term, add the unary energy, soft-max, splat into the
// next iteration's vertices. Beliefs never leave the cache; only vertices are blurred in between.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
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

constexpr double kLog2E = 1.4426950408889634;  // logits are kept in base 2

// Nanoseconds spent in each stage, the sum over threads but for the blur, for benchmarks.
struct StageTimes {
  enum Stage { kLoad, kSlice, kUpdate, kSplat, kBlur, kStore, kStages };
  std::atomic<int64_t> of[kStages] = {};
};
class Stopwatch {
 public:
  explicit Stopwatch(StageTimes* times) : times_(times) { lap(StageTimes::kStages); }
  // Adds the time since the last lap to a stage.
  void lap(int stage) {
    if (times_ == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    if (stage < StageTimes::kStages) times_->of[stage] += (now - last_).count();
    last_ = now;
  }

 private:
  StageTimes* times_;
  std::chrono::steady_clock::time_point last_;
};

// One pairwise term of one image.
template <typename T>
struct Term {
  Lattice<T> lattice;
  std::vector<T> coefficient;  // of the sliced channels in the logits
  std::vector<T> matrix;       // of the vertices' channels, or empty
  Workspace<T> values;         // of the vertices that are sliced
  Workspace<T> sums;           // rows that are splatted into meanwhile

  Term(const void* buffer, int width)
      : lattice(buffer),
        coefficient(static_cast<size_t>(width)),
        values(lattice.header->vertices * width),
        sums(lattice.rows() * width) {}
};

// The label compatibility of a term: (L) factors, or a symmetric (L, L) matrix.
template <typename T>
struct Compatibility {
  const T* data;
  bool full;
  int64_t labels;
  T at(int64_t l, int64_t m) const { return full ? data[l * labels + m] : l == m ? data[l] : T(0); }
};

template <typename T>
struct Problem {
  int64_t labels, points, iterations;
  const T* unary;  // (labels, points)
  T sign;          // logits are sign * unary
  const T* start;  // beliefs to start from, or null
  bool point_major;
  T* out;
  StageTimes* times;  // or null
  Tiling tiling;
  std::vector<const void*> lattices;  // one per term
  std::vector<Compatibility<T>> compatibilities;
};

// Beliefs as rows of all labels.
template <typename T>
class LabelRows {
 public:
  explicit LabelRows(const Problem<T>& problem)
      : width(row_width(problem.labels)), problem_(problem) {
    for (size_t k = 0; k < problem.lattices.size(); ++k) {
      terms.emplace_back(problem.lattices[k], width);
      Term<T>& term = terms.back();
      const Compatibility<T>& c = problem.compatibilities[k];
      const T gain = static_cast<T>(kLog2E * lattice_gain(static_cast<int>(term.lattice.d())));
      if (c.full) term.matrix.resize(static_cast<size_t>(width) * static_cast<size_t>(width));
      for (int64_t l = 0; l < c.labels; ++l) {
        term.coefficient[static_cast<size_t>(l)] = c.full ? gain : gain * c.data[l];
        for (int64_t m = 0; c.full && m < c.labels; ++m) {
          term.matrix[static_cast<size_t>(m * width + l)] = c.at(l, m);
        }
      }
    }
  }

  // Fills the constant part of a tile's logits, and rows[p] * factor[p], its first beliefs. False
  // if the unary energies are not valid.
  bool load(int64_t tile, int points, T* constant, T* rows, T* factor) const {
    const auto& kernels = lattice_kernels<T>();
    load_tile(problem_.tiling, tile, problem_.unary, problem_.points, problem_.labels, width,
              constant, static_cast<T>(kLog2E) * problem_.sign,
              -std::numeric_limits<T>::infinity());
    const bool valid = kernels.shift_logits(constant, points, width);
    if (problem_.start == nullptr) {
      std::copy_n(constant, points * width, rows);
      kernels.softmax_tile(rows, points, width, false, factor);
    } else {
      load_tile(problem_.tiling, tile, problem_.start, problem_.points, problem_.labels, width,
                rows);
      std::fill_n(factor, points, T(1));
    }
    return valid;
  }
  // Beliefs from logits, which `make_logits` puts into `rows`.
  template <typename MakeLogits>
  void update(int points, MakeLogits&& make_logits, T* rows, T* factor) const {
    const auto& kernels = lattice_kernels<T>();
    make_logits();
    if (kernels.softmax_tile(rows, points, width, false, factor)) return;
    make_logits();
    kernels.softmax_tile(rows, points, width, true, factor);
  }
  void splat(size_t term, const TileView<T>& tile, const T* rows, const T* factor) const {
    lattice_kernels<T>().splat_tile(tile, rows, factor, width, terms[term].sums.data());
  }
  // Reads from where a run of points will be stored, so that the stores need not wait for these
  // lines. A prefetch instruction would be dropped where the page is not known to the core.
  void approach(int64_t begin, int64_t length) const {
    if (problem_.point_major) return;
    constexpr int64_t kLine = 64 / sizeof(T);
    const volatile T* out = problem_.out + begin;
    for (int64_t l = 0; l < problem_.labels; ++l, out += problem_.points) {
      for (int64_t i = 0; i < length; i += kLine) static_cast<void>(out[i]);
      static_cast<void>(out[length - 1]);
    }
  }
  void store(int64_t tile, int points, T* rows, const T* factor) const {
    lattice_kernels<T>().scale_rows(rows, points, width, factor);
    if (!problem_.point_major) {
      store_tile(problem_.tiling, tile, rows, width, problem_.labels, problem_.points,
                 problem_.out);
      return;
    }
    problem_.tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
      for (int64_t i = 0; i < length; ++i) {
        std::copy_n(rows + (position + i) * width, problem_.labels,
                    problem_.out + (begin + i) * problem_.labels);
      }
    });
  }

  const int width;
  std::vector<Term<T>> terms;

 private:
  const Problem<T>& problem_;
};

// Two labels: only the difference of their logits matters, and a term's message to it is the filter
// of one channel, a combination of both beliefs.
template <typename T>
class TwoLabels {
 public:
  explicit TwoLabels(const Problem<T>& problem) : problem_(problem) {
    for (size_t k = 0; k < problem.lattices.size(); ++k) {
      terms.emplace_back(problem.lattices[k], width);
      Term<T>& term = terms.back();
      const Compatibility<T>& c = problem.compatibilities[k];
      term.coefficient[0] =
          static_cast<T>(kLog2E * lattice_gain(static_cast<int>(term.lattice.d())));
      of_belief_.push_back({c.at(1, 0) - c.at(0, 0), c.at(1, 1) - c.at(0, 1)});
    }
  }

  bool load(int64_t tile, int points, T* constant, T* rows, T* factor) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    int bad = 0;
    problem_.tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
      const T *u0 = problem_.unary + begin, *u1 = u0 + problem_.points;
      for (int64_t i = 0; i < length; ++i) {
        const T x0 = problem_.sign * u0[i], x1 = problem_.sign * u1[i];
        bad |= !(x0 < kInfinity) | !(x1 < kInfinity) | !(std::max(x0, x1) > -kInfinity);
        constant[position + i] = static_cast<T>(kLog2E) * (x1 - x0);
      }
    });
    lattice_kernels<T>().logistic(constant, points, rows, factor);
    return bad == 0;
  }
  // The belief in label 1 goes to `rows`, that in label 0 to `factor`.
  template <typename MakeLogits>
  void update(int points, MakeLogits&& make_logits, T* rows, T* factor) const {
    make_logits();
    lattice_kernels<T>().logistic(rows, points, rows, factor);
  }
  void splat(size_t term, const TileView<T>& tile, const T* rows, const T* factor) const {
    const auto [of_0, of_1] = of_belief_[term];
    T combined[kTilePoints];
    for (int p = 0; p < tile.points; ++p) combined[p] = of_1 * rows[p] + of_0 * factor[p];
    lattice_kernels<T>().splat_tile(tile, combined, nullptr, width, terms[term].sums.data());
  }
  void approach(int64_t, int64_t) const {}
  void store(int64_t tile, int, const T* rows, const T* factor) const {
    const int64_t along = problem_.point_major ? 2 : 1,
                  plane = problem_.point_major ? 1 : problem_.points;
    problem_.tiling.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
      T* out = problem_.out + begin * along;
      for (int64_t i = 0; i < length; ++i) {
        out[i * along] = factor[position + i];
        out[i * along + plane] = rows[position + i];
      }
    });
  }

  static constexpr int width = 1;
  std::vector<Term<T>> terms;

 private:
  const Problem<T>& problem_;
  std::vector<std::pair<T, T>> of_belief_;  // of each term: factors of the beliefs in 0 and 1
};

// Runs the updates of one image; `Form` is LabelRows or TwoLabels. False if the unary energies are
// not valid.
template <typename T, typename Form>
bool mean_field(const Problem<T>& problem, Form form) {
  const auto& kernels = lattice_kernels<T>();
  const Tiling& tiling = problem.tiling;
  const Chunking chunks(tiling);
  const int width = form.width;
  Workspace<T> constants(problem.points * width);
  std::vector<Blur<T>> blurs;
  for (const Term<T>& term : form.terms) {
    blurs.push_back({&term.lattice, term.sums.data(), term.values.data(),
                     term.matrix.empty() ? nullptr : term.matrix.data()});
  }
  std::atomic<bool> valid{true};
  for (int64_t step = 0; step <= problem.iterations; ++step) {
    const bool last = step == problem.iterations;
    parallel_tasks(chunks.count, [&](int64_t chunk) {
      const FlushDenormals flush;
      Workspace<T> rows_space(kTilePoints * width);
      T factor[kTilePoints];
      T* rows = rows_space.data();
      Stopwatch watch(problem.times);
      if (step == 0 && !last) {
        for (const Term<T>& term : form.terms) {
          term.lattice.clear_rows(chunk, width, term.sums.data());
        }
      }
      for (int64_t t = chunks.first_tile(chunk); t < chunks.first_tile(chunk + 1); ++t) {
        const int64_t first = tiling.first_point(t);
        const auto points = static_cast<int>(tiling.points(t));
        T* constant = constants.data() + first * width;
        if (step == 0) {
          if (!form.load(t, points, constant, rows, factor)) valid = false;
          watch.lap(StageTimes::kLoad);
        } else {
          const auto make_logits = [&] {
            const auto slice = [&](int64_t position, int64_t count) {
              const T* from = constant + position * width;
              T* out = rows + position * width;
              for (const Term<T>& term : form.terms) {
                const TileView<T> tile(term.lattice, t, first, points);
                kernels.slice_tile(tile.part(static_cast<int>(position), static_cast<int>(count)),
                                   term.values.data(), width, term.coefficient.data(), from, out);
                from = out;
              }
            };
            if (!last || width == 1) {
              slice(0, points);
            } else {
              tiling.for_each_run(t, [&](int64_t begin, int64_t length, int64_t position) {
                form.approach(begin, length);
                slice(position, length);
              });
            }
            if (form.terms.empty()) std::copy_n(constant, points * width, rows);
            watch.lap(StageTimes::kSlice);
          };
          form.update(points, make_logits, rows, factor);
          watch.lap(StageTimes::kUpdate);
        }
        if (last) {
          form.store(t, points, rows, factor);
          watch.lap(StageTimes::kStore);
          continue;
        }
        for (size_t k = 0; k < form.terms.size(); ++k) {
          form.splat(k, TileView<T>(form.terms[k].lattice, t, first, points), rows, factor);
        }
        watch.lap(StageTimes::kSplat);
      }
    });
    if (!valid) return false;
    if (last) break;
    Stopwatch watch(problem.times);
    merge_and_blur(blurs, false, width);
    watch.lap(StageTimes::kBlur);
  }
  return true;
}

// unary (B, L, N), energies or their negatives `logits` -> beliefs after `iterations` updates,
// (B, L, N), or (B, N, L) if `point_major`. Term k uses `lattice_counts[k]` consecutive lattices, B
// or one for all images, and coefficients[k], (L) or a symmetric (L, L): the message it adds to the
// logits is coefficients * (K Q). The first update starts from `start`, or from the soft-max of the
// logits.
Tensor solve(const Tensor& unary, const std::optional<Tensor>& start,
             const std::vector<Tensor>& lattices, const std::vector<int64_t>& lattice_counts,
             const std::vector<Tensor>& coefficients, int64_t height, int64_t width,
             int64_t iterations, bool point_major, bool logits, StageTimes* times) {
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
      const int64_t offset = b * labels * points;
      Problem<T> problem{labels,
                         points,
                         iterations,
                         unary.const_data_ptr<T>() + offset,
                         logits ? T(1) : T(-1),
                         start ? start->template const_data_ptr<T>() + offset : nullptr,
                         point_major,
                         out.mutable_data_ptr<T>() + offset,
                         times,
                         Tiling(height, width),
                         {},
                         {}};
      size_t first = 0;
      for (size_t k = 0; k < lattice_counts.size(); ++k) {
        const size_t at = first + (lattice_counts[k] == 1 ? 0 : static_cast<size_t>(b));
        problem.lattices.push_back(lattices[at].const_data_ptr());
        problem.compatibilities.push_back(
            {coefficients[k].template const_data_ptr<T>(), coefficients[k].dim() == 2, labels});
        first += static_cast<size_t>(lattice_counts[k]);
      }
      // Beliefs that are given need not sum to 1.
      const bool image_valid = labels == 2 && !start ? mean_field(problem, TwoLabels<T>(problem))
                                                     : mean_field(problem, LabelRows<T>(problem));
      if (!image_valid) all_valid = false;
    });
    valid = all_valid;
  });
  FASTSEG_CHECK(valid, "dense_crf: unary must hold no NaN or ", logits ? "+inf" : "-inf",
                ", and a finite ", logits ? "logit" : "energy", " for some label of every point");
  return out;
}

Tensor dense_crf_cpu(const Tensor& unary, std::optional<Tensor> start, std::vector<Tensor> lattices,
                     std::vector<int64_t> lattice_counts, std::vector<Tensor> coefficients,
                     int64_t height, int64_t width, int64_t iterations, bool point_major,
                     bool logits) {
  return solve(unary, start, lattices, lattice_counts, coefficients, height, width, iterations,
               point_major, logits, nullptr);
}

// Seconds that dense_crf spends in the stages of StageTimes, float64.
Tensor dense_crf_stages_cpu(const Tensor& unary, std::vector<Tensor> lattices,
                            std::vector<int64_t> lattice_counts, std::vector<Tensor> coefficients,
                            int64_t height, int64_t width, int64_t iterations) {
  StageTimes times;
  solve(unary, std::nullopt, lattices, lattice_counts, coefficients, height, width, iterations,
        false, true, &times);
  Tensor seconds = torch::stable::new_empty(unary, {StageTimes::kStages}, ScalarType::Double);
  for (int stage = 0; stage < StageTimes::kStages; ++stage) {
    seconds.mutable_data_ptr<double>()[stage] = 1e-9 * static_cast<double>(times.of[stage]);
  }
  return seconds;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "dense_crf(Tensor unary, Tensor? start, Tensor[] lattices, int[] lattice_counts, Tensor[] "
      "coefficients, int height, int width, int iterations, bool point_major, bool "
      "logits) -> Tensor");
  m.def(
      "dense_crf_stages(Tensor logits, Tensor[] lattices, int[] lattice_counts, Tensor[] "
      "coefficients, int height, int width, int iterations) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu));
  m.impl("dense_crf_stages", TORCH_BOX(&dense_crf_stages_cpu));
}

}  // namespace fastseg
