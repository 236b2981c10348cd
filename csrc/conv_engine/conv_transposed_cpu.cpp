// Transposed convolutions: the output pixels whose rows and columns leave the same remainders by
// the stride, a phase, are an ordinary convolution of stride 1 by every stride-th tap. Each phase
// is a matrix product (gemm_conv.inl) that writes to its own pixels. Neighbouring columns of phases
// that read the same pixels may be packed as one, whose outputs are those pixels side by side: 21
// channels fill two thirds of a panel, four times 21 almost three panels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/counters.h"
#include "common/dispatch.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/images.h"
#include "conv_engine/run.h"
#include "conv_engine/tiles.h"

namespace fastseg {
namespace conv_engine {
namespace {

// One axis of a phase: the taps that it uses are first, first + stride, ... of the kernel; output
// pixel q of the phase reads input pixels q + offset and those behind it, by the last tap first.
struct Phase {
  int64_t taps, offset, outputs;
};

// a: the first output pixel of the phase.
Phase phase(int64_t a, int64_t kernel, int64_t stride, int64_t pad, int64_t out) {
  const int64_t first = (a + pad) % stride, taps = ceil_div(kernel - first, stride);
  return {taps, (a + pad - first) / stride - (taps - 1), ceil_div(out - a, stride)};
}

struct Options {
  int64_t R, S, stride_h, stride_w, pad_h, pad_w, activation;
  double slope;
  bool residual_last, joined;  // columns of phases, where they read the same
};

template <class Conv>
void run_as(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
            const Tensor& out, const Options& o) {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  const Image<const T> image = input_image<T>(x, "x");
  const Image<T> y = output_image<T>(out, "out");
  const Image<const T> added = residual ? input_image<T>(*residual, "residual") : Image<const T>{};
  FASTSEG_CHECK(o.R >= o.stride_h && o.S >= o.stride_w && std::min(o.stride_h, o.stride_w) >= 1,
                "conv_transposed: the kernel must be at least as large as the stride");
  FASTSEG_CHECK(std::min(o.pad_h, o.pad_w) >= 0, "conv_transposed: padding must not be negative");
  FASTSEG_CHECK(o.activation >= 0 && o.activation < kActivations,
                "conv_engine: activation must be in [0, ", kActivations, "), got ", o.activation);
  FASTSEG_CHECK(out.size(0) == x.size(0), "conv_transposed: out must have the batch of x");
  for (int axis = 0; residual && axis < 4; ++axis) {
    FASTSEG_CHECK(residual->size(axis) == out.size(axis),
                  "conv_transposed: residual must have the shape of the output");
  }
  Conv conv{};
  conv.N = x.size(0), conv.C = x.size(1), conv.K = out.size(1);
  conv.H = x.size(2), conv.W = x.size(3);
  conv.x = image;
  conv.stride_h = conv.stride_w = conv.dilation_h = conv.dilation_w = 1;
  conv.activation = static_cast<Activation>(o.activation);
  conv.slope = static_cast<float>(o.slope);
  conv.residual_last = o.residual_last && residual;
  conv.stream = is_streamed(out.numel(), y) && !(residual && added.data == y.data);
  FASTSEG_CHECK(!o.joined || (out.size(3) % o.stride_w == 0 && y.pixel == conv.K &&
                              (!residual || added.pixel == conv.K)),
                "conv_transposed: joined phases need as many outputs each and pixels side by side");
  std::vector<Conv> phases;
  const E* weight = packed.const_data_ptr<E>();
  for (int64_t a = 0; a < o.stride_h; ++a) {
    const Phase rows = phase(a, o.R, o.stride_h, o.pad_h, out.size(2));
    for (int64_t b = 0, run; b < o.stride_w; b += run) {
      const Phase columns = phase(b, o.S, o.stride_w, o.pad_w, out.size(3));
      for (run = 1; o.joined && b + run < o.stride_w; ++run) {
        const Phase next = phase(b + run, o.S, o.stride_w, o.pad_w, out.size(3));
        if (next.taps != columns.taps || next.offset != columns.offset) break;
      }
      Conv one = conv;
      one.K = run * conv.K;
      one.R = rows.taps, one.S = columns.taps;
      one.pad_h = -rows.offset, one.pad_w = -columns.offset;
      one.Ho = std::max<int64_t>(rows.outputs, 0), one.Wo = std::max<int64_t>(columns.outputs, 0);
      one.weight = weight;
      weight += packed_size<E>(one.K, one.C, one.R * one.S, 0, 0);
      one.bias = reinterpret_cast<const float*>(weight);
      weight += round_up(one.K, kPanel) * kPerWord<E>;
      one.y = {y.at(0, a, b), y.batch, o.stride_h * y.row, o.stride_w * y.pixel};
      if (residual) {
        one.residual = {added.at(0, a, b), added.batch, o.stride_h * added.row,
                        o.stride_w * added.pixel};
      }
      phases.push_back(one);
    }
  }
  FASTSEG_CHECK(packed.is_contiguous() && packed.numel() == weight - packed.const_data_ptr<E>(),
                "conv_transposed: weights were packed for another convolution");
  if (conv.N > 0 && conv.K > 0) run_gemms(phases);
}

void conv_transposed_out(const Tensor& x, const Tensor& packed,
                         const std::optional<Tensor>& residual, const Tensor& out, int64_t R,
                         int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                         int64_t pad_w, int64_t activation, double slope, bool residual_last,
                         bool joined) {
  FASTSEG_CHECK(x.dim() == 4 && out.dim() == 4, "conv_transposed: x and out must be images");
  const Options o{R, S, stride_h, stride_w, pad_h, pad_w, activation, slope, residual_last, joined};
  FASTSEG_COUNT("conv_engine.transposed");
  if (packed.scalar_type() == ScalarType::BFloat16) {
    run_as<Convolution<BFloat16, BFloat16>>(x, packed, residual, out, o);
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    run_as<Convolution<BFloat16, float>>(x, packed, residual, out, o);
  } else {
    run_as<Convolution<float, float>>(x, packed, residual, out, o);
  }
}

}  // namespace
}  // namespace conv_engine

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "conv_transposed_out(Tensor x, Tensor packed, Tensor? residual, Tensor(a!) out, int R, "
      "int S, int stride_h, int stride_w, int pad_h, int pad_w, int activation, float slope, "
      "bool residual_last=False, bool joined=False) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("conv_transposed_out", TORCH_BOX(&conv_engine::conv_transposed_out));
}

}  // namespace fastseg
