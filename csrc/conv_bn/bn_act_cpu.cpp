// What follows a convolution on the CPU: the statistics of its output, and batch norm, residual and
// activation in one pass; its backward in two. NCHW: one task per channel, which stays in cache
// between the passes. Channels-last: one task per slab of pixels.
#include "conv_bn/bn_act_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/isa.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"

namespace fastseg {
namespace {

constexpr int64_t kChunk = 512;         // elements per step: the L1 buffers of a kernel
constexpr int64_t kPlaneLanes = 256;    // partial sums of a plane
constexpr int64_t kPlaneBlock = 8192;   // elements of a plane whose moments are taken at once (L1)
constexpr int64_t kCentreRuns = 4;      // of a first block, whose mean its deviations are from
constexpr int64_t kSumsPerLane = 64;    // float32 additions before a partial sum goes to double
constexpr int64_t kPixelBlock = 65536;  // elements of a channels-last block (L2)
constexpr int64_t kSlabs = 64;          // channels-last tasks; fixed, so results do not depend on
                                        // the number of threads

// The normalisation (y - mean) * scale + shift; one value, or one per lane.
template <typename acc>
struct Affine {
  const acc* mean;
  const acc* scale;
  const acc* shift;

  template <bool kPerLane>
  Affine at(int64_t lane) const {
    return kPerLane ? Affine{mean + lane, scale + lane, shift + lane} : *this;
  }
};

#define FASTSEG_KERNEL_FILE "conv_bn/bn_act_kernel.inl"
#include "common/foreach_isa.inl"

// Values per channel as `acc`: a batch-norm parameter, or a constant where it is absent.
template <typename acc>
std::vector<acc> per_channel(const OptionalTensor& values, double otherwise, int64_t C) {
  if (!values.has_value()) return std::vector<acc>(C, static_cast<acc>(otherwise));
  FASTSEG_CHECK(values->dim() == 1 && values->size(0) == C,
                "conv_bn_act: batch-norm parameters must have shape (", C, ",)");
  const auto type = sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor dense = torch::stable::contiguous(torch::stable::to(*values, type));
  const acc* data = dense.const_data_ptr<acc>();
  return std::vector<acc>(data, data + C);
}

// fn(c) for every channel of an NCHW tensor, in parallel, small planes several at a time: two
// threads that take one of 16x16 each wait longer for the next number than they work.
template <typename Fn>
void for_each_channel(const DenseLayout& layout, const Fn& fn) {
  constexpr int64_t kElements = 8192;  // of a task
  const int64_t share =
      std::max<int64_t>(1, kElements / std::max<int64_t>(1, layout.N * layout.HW));
  parallel_tasks((layout.C + share - 1) / share, [&](int64_t task) {
    for (int64_t c = task * share; c < std::min((task + 1) * share, layout.C); ++c) fn(c);
  });
}

// Channels-last: C values repeated to `width` lanes, so that few channels still fill vectors.
int64_t lanes_of(int64_t C) { return C * std::max<int64_t>(1, 256 / C); }

template <typename acc>
std::vector<acc> repeat(const std::vector<acc>& values, int64_t width) {
  std::vector<acc> lanes(width);
  for (int64_t i = 0; i < width; ++i) lanes[i] = values[i % values.size()];
  return lanes;
}

// Channels-last work: `total` elements in runs of `width`, blocks of `block` elements (whole runs)
// and slabs of `slab` elements (whole blocks).
struct Slabs {
  int64_t total, width, block, slab, count;

  Slabs(const DenseLayout& layout)
      : total(layout.N * layout.C * layout.HW), width(lanes_of(layout.C)) {
    block = std::clamp<int64_t>(kPixelBlock / width, 8, kSumsPerLane) * width;
    const int64_t blocks = (total + block - 1) / block;
    slab = (blocks + kSlabs - 1) / kSlabs * block;
    count = total == 0 ? 0 : (total + slab - 1) / slab;
  }

  // fn(index of the slab, first element, one past its last), in parallel.
  template <typename Fn>
  void for_each(const Fn& fn) const {
    parallel_tasks(count, [&](int64_t s) { fn(s, s * slab, std::min((s + 1) * slab, total)); });
  }
};

// Statistics: block by block, sums of deviations from a centre and of their squares, joined by the
// method of Chan et al. The centre is the mean so far (in the first block of some of its values),
// so nothing cancels that is large against the variance of all, and every element is read once.

// The sum of a plane's partial sums, which it overwrites. One chain of additions in double would
// take longer than a plane of 33x33.
template <typename acc>
double plane_total(acc* lanes) {
  constexpr int64_t kLast = 16, kChains = 4;
  for (int64_t half = kPlaneLanes / 2; half >= kLast; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  double chains[kChains] = {};
  for (int64_t i = 0; i < kLast; ++i) chains[i % kChains] += lanes[i];
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// Mean and biased variance of one channel of an NCHW tensor.
template <typename T, typename acc>
void plane_moments(const T* y, const DenseLayout& layout, int64_t channel, acc* mean, acc* var) {
  double total_mean = 0, m2 = 0, count = 0;
  for (int64_t n = 0; n < layout.N; ++n) {
    const T* plane = y + (n * layout.C + channel) * layout.HW;
    for (int64_t at = 0; at < layout.HW; at += kPlaneBlock) {
      const int64_t size = std::min(kPlaneBlock, layout.HW - at);
      if (count == 0) {
        acc sums[kPlaneLanes] = {};
        const int64_t sampled = std::min(size, kCentreRuns * kPlaneLanes);
        FASTSEG_ISA_CALL(accumulate<T>)(plane, sums, sampled, kPlaneLanes);
        total_mean = plane_total(sums) / sampled;
      }
      const acc centre = static_cast<acc>(total_mean);
      acc sums[kPlaneLanes] = {}, squares[kPlaneLanes] = {};
      FASTSEG_ISA_CALL(accumulate_centred<T, false>)(plane + at, &centre, sums, squares, size,
                                                     kPlaneLanes);
      const double centre_exact = centre, sum = plane_total(sums), square = plane_total(squares);
      FASTSEG_ISA_CALL(merge_moments<double>)(&total_mean, &m2, count, &centre_exact, &sum, &square,
                                              size, 1);
      count += size;
    }
  }
  *mean = static_cast<acc>(total_mean);
  *var = static_cast<acc>(m2 / count);
}

// Mean and biased variance of every channel of a channels-last tensor.
template <typename T, typename acc>
void pixel_moments(const T* y, const DenseLayout& layout, acc* mean, acc* var) {
  const Slabs slabs(layout);
  const int64_t C = layout.C, width = slabs.width;
  std::vector<double> means(slabs.count * C), m2s(slabs.count * C), counts(slabs.count);
  slabs.for_each([&](int64_t s, int64_t begin, int64_t end) {
    double *slab_mean = &means[s * C], *slab_m2 = &m2s[s * C];
    std::vector<acc> centre(width), sums(width), squares(width);
    for (int64_t at = begin; at < end;) {
      // Blocks of whole runs, then what is left, whose lanes hold one element each.
      const int64_t left = end - at;
      const int64_t size = left >= width ? std::min(slabs.block, left / width * width) : left;
      const int64_t lanes = std::min(size, width), per_lane = size / lanes;
      if (at == begin) {
        const int64_t sampled = std::min(per_lane, kCentreRuns);
        FASTSEG_ISA_CALL(accumulate<T>)(y + at, centre.data(), sampled * lanes, width);
        for (int64_t i = 0; i < lanes; ++i) centre[i] /= static_cast<acc>(sampled);
      } else {
        for (int64_t i = 0; i < lanes; i += C) {
          std::transform(slab_mean, slab_mean + C, &centre[i],
                         [](double m) { return static_cast<acc>(m); });
        }
      }
      std::fill(sums.begin(), sums.end(), acc{0});
      std::fill(squares.begin(), squares.end(), acc{0});
      FASTSEG_ISA_CALL(accumulate_centred<T, true>)(y + at, centre.data(), sums.data(),
                                                    squares.data(), size, width);
      for (int64_t i = 0; i < lanes; i += C) {
        FASTSEG_ISA_CALL(merge_moments<acc>)(slab_mean, slab_m2, counts[s], &centre[i], &sums[i],
                                             &squares[i], per_lane, C);
        counts[s] += per_lane;
      }
      at += size;
    }
  });
  const std::vector<double> no_offset(C);
  for (int64_t s = 1; s < slabs.count; ++s) {
    FASTSEG_ISA_CALL(merge_moments<double>)(&means[0], &m2s[0], counts[0], &means[s * C],
                                            no_offset.data(), &m2s[s * C], counts[s], C);
    counts[0] += counts[s];
  }
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = static_cast<acc>(means[c]);
    var[c] = static_cast<acc>(m2s[c] / counts[0]);
  }
}

// z = activation(batch_norm(y) + residual) with the statistics of y, written to mean and var.
template <typename T, typename acc>
void batch_norm(const Tensor& y, const DenseLayout& layout, const std::vector<acc>& weight,
                const std::vector<acc>& bias, const Tensor* residual, double eps, double slope,
                Tensor& z, acc* mean, acc* var) {
  const T* y_data = y.const_data_ptr<T>();
  const T* residual_data = residual != nullptr ? residual->const_data_ptr<T>() : nullptr;
  T* z_data = z.mutable_data_ptr<T>();
  const auto scale_of = [&](int64_t c) {
    return static_cast<acc>(weight[c] / std::sqrt(static_cast<double>(var[c]) + eps));
  };
  const auto residual_at = [&](int64_t at) {
    return residual_data != nullptr ? residual_data + at : nullptr;
  };
  if (!layout.channels_last) {
    for_each_channel(layout, [&](int64_t c) {
      plane_moments(y_data, layout, c, mean + c, var + c);
      const acc scale = scale_of(c);
      for (int64_t n = 0; n < layout.N; ++n) {
        const int64_t at = (n * layout.C + c) * layout.HW;
        FASTSEG_ISA_CALL(normalize<T, false>)(y_data + at, residual_at(at), z_data + at,
                                              {mean + c, &scale, &bias[c]}, slope, layout.HW,
                                              layout.HW);
      }
    });
    return;
  }
  pixel_moments(y_data, layout, mean, var);
  const Slabs slabs(layout);
  std::vector<acc> scale(layout.C);
  for (int64_t c = 0; c < layout.C; ++c) scale[c] = scale_of(c);
  const auto means = repeat(std::vector<acc>(mean, mean + layout.C), slabs.width),
             scales = repeat(scale, slabs.width), shifts = repeat(bias, slabs.width);
  slabs.for_each([&](int64_t, int64_t begin, int64_t end) {
    FASTSEG_ISA_CALL(normalize<T, true>)(y_data + begin, residual_at(begin), z_data + begin,
                                         {means.data(), scales.data(), shifts.data()}, slope,
                                         end - begin, slabs.width);
  });
}

// Sums of g = dz * activation' and of g * (y - mean) over all pixels of a channel.
struct Sums {
  double g = 0, gc = 0;
};

// dy = g * scale - k1 - (y - mean) * k2, the gradient of batch normalisation.
template <typename acc>
struct Coefficients {
  acc k1, k2;
  Coefficients(const Sums& sums, double scale, double invstd, double count)
      : k1(static_cast<acc>(scale * sums.g / count)),
        k2(static_cast<acc>(scale * invstd * invstd * sums.gc / count)) {}
};

template <typename T, typename acc>
void batch_norm_backward(const Tensor& dz, const Tensor& y, const DenseLayout& layout,
                         const acc* mean, const acc* var, const std::vector<acc>& weight,
                         const std::vector<acc>& bias, const Tensor* residual, double eps,
                         double slope, Tensor& dy, acc* dweight, acc* dbias, Tensor& dresidual) {
  const bool with_residual = residual != nullptr;
  const T *dz_data = dz.const_data_ptr<T>(), *y_data = y.const_data_ptr<T>();
  const T* residual_data = with_residual ? residual->const_data_ptr<T>() : nullptr;
  T* dy_data = dy.mutable_data_ptr<T>();
  T* g_data = with_residual ? dresidual.mutable_data_ptr<T>() : nullptr;
  const T* second_data = with_residual ? g_data : dz_data;  // what the second pass reads
  const double count = static_cast<double>(layout.N * layout.HW);

  const auto invstd_of = [&](int64_t c) { return 1 / std::sqrt(var[c] + eps); };
  // Writes the parameters' gradients; returns what the second pass needs.
  const auto finish = [&](int64_t c, const Sums& sums) {
    const double invstd = invstd_of(c);
    dweight[c] = static_cast<acc>(sums.gc * invstd);
    dbias[c] = static_cast<acc>(sums.g);
    return Coefficients<acc>(sums, weight[c] * invstd, invstd, count);
  };
  const auto reduce = [&](auto per_lane, int64_t at, const Affine<acc>& params, acc* g, acc* gc,
                          int64_t size, int64_t width) {
    FASTSEG_ISA_CALL(backward_reduce<T, decltype(per_lane)::value>)(
        dz_data + at, y_data + at, with_residual ? residual_data + at : nullptr,
        with_residual ? g_data + at : nullptr, params, slope, g, gc, size, width);
  };

  if (!layout.channels_last) {
    for_each_channel(layout, [&](int64_t c) {
      const acc scale = static_cast<acc>(weight[c] * invstd_of(c));
      const Affine<acc> params{mean + c, &scale, &bias[c]};
      Sums sums;
      for (int64_t n = 0; n < layout.N; ++n) {
        const int64_t plane = (n * layout.C + c) * layout.HW;
        for (int64_t at = 0; at < layout.HW; at += kPlaneBlock) {
          acc g[kPlaneLanes] = {}, gc[kPlaneLanes] = {};
          reduce(std::false_type{}, plane + at, params, g, gc,
                 std::min(kPlaneBlock, layout.HW - at), kPlaneLanes);
          sums.g += plane_total(g);
          sums.gc += plane_total(gc);
        }
      }
      const auto [k1, k2] = finish(c, sums);
      for (int64_t n = 0; n < layout.N; ++n) {
        const int64_t at = (n * layout.C + c) * layout.HW;
        FASTSEG_ISA_CALL(backward_apply<T, false>)(second_data + at, with_residual, y_data + at,
                                                   dy_data + at, params, &k1, &k2, slope, layout.HW,
                                                   layout.HW);
      }
    });
    return;
  }

  const Slabs slabs(layout);
  const int64_t C = layout.C, width = slabs.width;
  std::vector<acc> scale(C), k1(C), k2(C);
  for (int64_t c = 0; c < C; ++c) scale[c] = static_cast<acc>(weight[c] * invstd_of(c));
  const auto means = repeat(std::vector<acc>(mean, mean + C), width), scales = repeat(scale, width),
             shifts = repeat(bias, width);
  const Affine<acc> params{means.data(), scales.data(), shifts.data()};
  std::vector<Sums> sums(slabs.count * C);
  slabs.for_each([&](int64_t s, int64_t begin, int64_t end) {
    std::vector<acc> g(width), gc(width);
    for (int64_t at = begin; at < end; at += slabs.block) {
      std::fill(g.begin(), g.end(), acc{0});
      std::fill(gc.begin(), gc.end(), acc{0});
      reduce(std::true_type{}, at, params, g.data(), gc.data(), std::min(slabs.block, end - at),
             width);
      for (int64_t i = 0; i < width; i += C) {
        for (int64_t c = 0; c < C; ++c) {
          sums[s * C + c].g += g[i + c];
          sums[s * C + c].gc += gc[i + c];
        }
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    Sums total;
    for (int64_t s = 0; s < slabs.count; ++s) {
      total.g += sums[s * C + c].g;
      total.gc += sums[s * C + c].gc;
    }
    const auto coefficients = finish(c, total);
    k1[c] = coefficients.k1;
    k2[c] = coefficients.k2;
  }
  const auto k1s = repeat(k1, width), k2s = repeat(k2, width);
  slabs.for_each([&](int64_t, int64_t begin, int64_t end) {
    FASTSEG_ISA_CALL(backward_apply<T, true>)(second_data + begin, with_residual, y_data + begin,
                                              dy_data + begin, params, k1s.data(), k2s.data(),
                                              slope, end - begin, width);
  });
}

}  // namespace

void add_activate_cpu(Tensor& z, const OptionalTensor& residual, double slope) {
  if (!residual.has_value() && slope == 1) return;
  const DenseLayout layout = dense_layout(z);
  Tensor r;
  if (residual.has_value()) r = with_layout(*residual, z, layout);
  dispatch_floating(z, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    T* data = z.mutable_data_ptr<T>();
    const T* residual_data = residual.has_value() ? r.const_data_ptr<T>() : nullptr;
    constexpr int64_t kGrain = 16384;  // elements; below that a thread costs more than it saves
    torch::stable::parallel_for(0, z.numel(), kGrain, [&](int64_t begin, int64_t end) {
      FASTSEG_ISA_CALL(add_activate<T>)(data + begin,
                                        residual_data != nullptr ? residual_data + begin : nullptr,
                                        slope, end - begin);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_act_stats_cpu(const Tensor& y,
                                                    const OptionalTensor& bn_weight,
                                                    const OptionalTensor& bn_bias,
                                                    const OptionalTensor& residual, double eps,
                                                    double negative_slope) {
  const DenseLayout layout = dense_layout(y);
  const auto stats = y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor z = pooled_like(y);
  Tensor mean = torch::stable::new_empty(y, {layout.C}, stats);
  Tensor var = torch::stable::new_empty(y, {layout.C}, stats);
  Tensor r;
  if (residual.has_value()) r = with_layout(*residual, y, layout);
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    batch_norm<T, acc>(y, layout, per_channel<acc>(bn_weight, 1, layout.C),
                       per_channel<acc>(bn_bias, 0, layout.C), residual.has_value() ? &r : nullptr,
                       eps, negative_slope, z, mean.mutable_data_ptr<acc>(),
                       var.mutable_data_ptr<acc>());
  });
  return {z, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cpu(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, double negative_slope) {
  const DenseLayout layout = dense_layout(y);
  FASTSEG_CHECK(mean.numel() == layout.C && var.numel() == layout.C && mean.is_contiguous() &&
                    var.is_contiguous(),
                "conv_bn_act: mean and var must have shape (", layout.C, ",)");
  const Tensor gradient = with_layout(dz, y, layout);
  Tensor dy = pooled_like(y);
  Tensor dweight = torch::stable::empty_like(mean), dbias = torch::stable::empty_like(mean);
  Tensor r, dresidual = residual.has_value() ? pooled_like(y) : torch::stable::new_empty(y, {0});
  if (residual.has_value()) r = with_layout(*residual, y, layout);
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    batch_norm_backward<T, acc>(
        gradient, y, layout, mean.const_data_ptr<acc>(), var.const_data_ptr<acc>(),
        per_channel<acc>(bn_weight, 1, layout.C), per_channel<acc>(bn_bias, 0, layout.C),
        residual.has_value() ? &r : nullptr, eps, negative_slope, dy,
        dweight.mutable_data_ptr<acc>(), dbias.mutable_data_ptr<acc>(), dresidual);
  });
  return {dy, dweight, dbias, dresidual};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor var, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, float eps, float negative_slope) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward_cpu));
}

}  // namespace fastseg
