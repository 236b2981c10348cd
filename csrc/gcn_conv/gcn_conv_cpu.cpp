// The large separable kernel of GCN on the CPU: all four convolutions by Winograd F(5, 5) along
// their axis (conv_engine/winograd_1d.inl). Lines of both first convolutions make one pool of
// tasks, so that the second branch finds the input in cache; what is between the stages covers a
// few images at a time and stays there as well.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "common/counters.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_bn/conv_bn.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/pack.h"
#include "conv_engine/tiles.h"
#include "conv_engine/winograd.h"
#include "gcn_conv/gcn_conv.h"

namespace fastseg {
namespace {

using namespace conv_engine;  // NOLINT: the kernels' own namespace

#define FASTSEG_KERNEL_FILE "gcn_conv/gcn_conv_kernel.inl"
#include "common/foreach_isa.inl"

// Values between the stages that stay in cache, of both branches.
constexpr int64_t kBetweenFloats = 1024 * 1024;

struct LineBuffer;  // name scratch memory
struct BetweenBuffer;
struct PackedBuffer;

enum Stage { kL1, kL2, kR1, kR2 };
using Conv = Convolution<float, float>;
// A first stage: the image is widened as it is read.
template <typename T>
struct FirstConv : Conv {
  using Source = T;
  Image<const T> x;
};

constexpr bool kVertical[] = {true, false, false, true};

// Contiguous weights of a stage.
Weights stage_weights(const GlobalConv& g, int stage, const float* data) {
  const int64_t C = stage == kL1 || stage == kR1 ? g.C : g.K;
  const int64_t R = kVertical[stage] ? g.taps : 1, S = kVertical[stage] ? 1 : g.taps;
  return {data, g.K, C, R, S, C * g.taps, g.taps, S, 1};
}

// The packed form of all weights, the bias of a stage behind its weights.
struct Packing {
  std::array<int64_t, 4> weight, bias;  // offsets
  int64_t size = 0;

  explicit Packing(const GlobalConv& g) {
    for (int stage : {kL1, kL2, kR1, kR2}) {
      weight[stage] = size;
      size += packed_floats(stage_weights(g, stage, nullptr), kLineTile);
      bias[stage] = size - round_up(g.K, kPanel);
    }
  }
};

using Stages = std::array<Tensor, 4>;

void pack(const GlobalConv& g, const Stages& weights, const Stages& biases, float* packed) {
  const Packing packing(g);
  for (int stage : {kL1, kL2, kR1, kR2}) {
    check_stage(g, weights[stage], biases[stage], weights[stage].size(1), kVertical[stage]);
    const Tensor weight =
        torch::stable::contiguous(torch::stable::to(weights[stage], ScalarType::Float));
    const Tensor bias =
        torch::stable::contiguous(torch::stable::to(biases[stage], ScalarType::Float));
    pack_weights(stage_weights(g, stage, weight.const_data_ptr<float>()),
                 bias.const_data_ptr<float>(), kLineTile, packed + packing.weight[stage]);
  }
}

Image<float> dense_image(float* data, int64_t H, int64_t W, int64_t channels) {
  return {data, H * W * channels, W * channels, channels};
}

Image<const float> readable(const Image<float>& image) {
  return {image.data, image.batch, image.row, image.pixel};
}

// Lines of the convolutions, in tasks: each of them reads all weights of its convolution.
template <class C, size_t kCount>
void run_lines(const std::array<C, kCount>& convs) {
  constexpr int64_t kTaskLines = 42;  // three register tiles, as in the engine
  const int64_t share = ceil_div(torch::stable::get_num_threads(), int64_t{kCount});
  std::array<int64_t, kCount> lines, parts;
  int64_t tasks = 0, floats = 0;
  for (size_t i = 0; i < kCount; ++i) {
    lines[i] = convs[i].N * (convs[i].S == 1 ? convs[i].W : convs[i].H);
    parts[i] = std::min(lines[i], round_up(ceil_div(lines[i], kTaskLines), share));
    tasks += parts[i];
    floats = std::max(floats, FASTSEG_ISA_CALL(Winograd1dKernel<C>::scratch_size)(
                                  convs[i], ceil_div(lines[i], parts[i])));
  }
  const auto kernel = FASTSEG_ISA_CALL(Winograd1dKernel<C>::run);
  parallel_tasks(tasks, [&](int64_t task) {
    size_t i = 0;
    for (; task >= parts[i]; ++i) task -= parts[i];
    kernel(convs[i], part_begin(lines[i], parts[i], task), part_begin(lines[i], parts[i], task + 1),
           scratch<LineBuffer>(floats));
  });
}

// x, y and what is between, l and r (dense; null where nobody wants it), for all images.
template <typename T>
void forward(const GlobalConv& g, Image<const T> x, const float* packed, float* l, float* r,
             float* y) {
  const Packing packing(g);
  const int64_t size = g.H * g.W * g.K, reach = g.reach();
  const int64_t images = std::clamp<int64_t>(kBetweenFloats / (2 * size), 1, g.N);
  float* between = l == nullptr ? scratch<BetweenBuffer>(2 * images * size) : nullptr;
  for (int64_t n = 0; n < g.N; n += images) {
    const int64_t count = std::min(images, g.N - n);
    const auto mid_l = dense_image(l != nullptr ? l + n * size : between, g.H, g.W, g.K);
    const auto mid_r =
        dense_image(r != nullptr ? r + n * size : between + images * size, g.H, g.W, g.K);
    const auto out = dense_image(y + n * size, g.H, g.W, g.K);
    const auto conv = [&](auto kind, Stage stage, auto from, int64_t channels, Image<float> to) {
      const bool vertical = kVertical[stage];
      decltype(kind) c{};
      c.N = count, c.C = channels, c.K = g.K;
      c.H = c.Ho = g.H, c.W = c.Wo = g.W;
      c.R = vertical ? g.taps : 1, c.S = vertical ? 1 : g.taps;
      c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
      c.pad_h = vertical ? reach : 0, c.pad_w = vertical ? 0 : reach;
      c.x = from, c.y = to;
      c.weight = packed + packing.weight[stage], c.bias = packed + packing.bias[stage];
      return c;
    };
    const Image<const T> in{x.at(n, 0, 0), x.batch, x.row, x.pixel};
    const FirstConv<T> first{};
    run_lines(std::array{conv(first, kL1, in, g.C, mid_l), conv(first, kR1, in, g.C, mid_r)});
    const Conv second{};
    run_lines(std::array{conv(second, kL2, readable(mid_l), g.K, out)});
    Conv last = conv(second, kR2, readable(mid_r), g.K, out);
    last.residual = readable(out);
    run_lines(std::array{last});
  }
}

// forward() of x as it is or, where the kernels do not read that, as a channels-last copy; float16
// as float32.
void forward(const GlobalConv& g, const Tensor& x, const float* packed, float* l, float* r,
             float* y) {
  FASTSEG_COUNT("gcn_conv.winograd_1d");
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  Tensor image = half ? x : torch::stable::to(x, ScalarType::Float);
  if (image.stride(1) != 1 && image.size(1) != 1) {
    image = torch::stable::contiguous(image, MemoryFormat::ChannelsLast);
  }
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const Image<const T> pixels{image.const_data_ptr<T>(), image.stride(0), image.stride(2),
                                image.stride(3)};
    forward(g, pixels, packed, l, r, y);
  };
  half ? run(BFloat16{}) : run(float{});
}

Tensor empty_output(const Tensor& x, const GlobalConv& g, ScalarType dtype) {
  return empty_image(x, {g.N, g.K, g.H, g.W}, dtype, MemoryFormat::ChannelsLast);
}

// Returns y in the dtype of x and, for the backward, l1(x) and r1(x) in the accumulation type.
std::tuple<Tensor, Tensor, Tensor> gcn_conv_cpu(const Tensor& x, const Tensor& l1,
                                                const Tensor& l1_bias, const Tensor& l2,
                                                const Tensor& l2_bias, const Tensor& r1,
                                                const Tensor& r1_bias, const Tensor& r2,
                                                const Tensor& r2_bias) {
  const GlobalConv g = global_conv(x, l1.size(0), l1.size(2));
  const Stages weights{l1, l2, r1, r2}, biases{l1_bias, l2_bias, r1_bias, r2_bias};
  for (int stage : {kL1, kL2, kR1, kR2}) {
    check_stage(g, weights[stage], biases[stage], stage == kL1 || stage == kR1 ? g.C : g.K,
                kVertical[stage]);
  }
  if (x.scalar_type() == ScalarType::Double) {
    const auto conv = [&](const Tensor& from, Stage stage) {
      const IntList pad = kVertical[stage] ? IntList{g.reach(), 0} : IntList{0, g.reach()};
      const Tensor y =
          torch_convolution(from, weights[stage], biases[stage], {1, 1}, pad, {1, 1}, 1);
      return torch::stable::contiguous(y, MemoryFormat::ChannelsLast);
    };
    const Tensor l = conv(x, kL1), r = conv(x, kR1);
    const Tensor y = conv(l, kL2), other = conv(r, kR2);
    double* sum = y.mutable_data_ptr<double>();
    const double* addend = other.const_data_ptr<double>();
    for (int64_t i = 0; i < y.numel(); ++i) sum[i] += addend[i];
    return {y, l, r};
  }
  const Tensor y = empty_output(x, g, ScalarType::Float), l = empty_output(x, g, ScalarType::Float),
               r = empty_output(x, g, ScalarType::Float);
  if (y.numel() > 0) {
    float* packed = scratch<PackedBuffer>(Packing(g).size);
    pack(g, weights, biases, packed);
    forward(g, x, packed, l.mutable_data_ptr<float>(), r.mutable_data_ptr<float>(),
            y.mutable_data_ptr<float>());
  }
  return {torch::stable::to(y, x.scalar_type()), l, r};
}

// The weights as gcn_conv_packed takes them, one flat float32 tensor.
Tensor gcn_conv_pack(const Tensor& l1, const Tensor& l1_bias, const Tensor& l2,
                     const Tensor& l2_bias, const Tensor& r1, const Tensor& r1_bias,
                     const Tensor& r2, const Tensor& r2_bias) {
  const GlobalConv g{0, l1.size(1), 0, 0, l1.size(0), l1.size(2)};
  check_stage(g, l1, l1_bias, g.C, true);
  check_stage(g, l2, l2_bias, g.K, false);
  check_stage(g, r1, r1_bias, g.C, false);
  check_stage(g, r2, r2_bias, g.K, true);
  const int64_t size = Packing(g).size;
  Tensor packed = torch::stable::empty({&size, 1}, ScalarType::Float);
  pack(g, {l1, l2, r1, r2}, {l1_bias, l2_bias, r1_bias, r2_bias}, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor gcn_conv_packed_cpu(const Tensor& x, const Tensor& packed, int64_t out_channels,
                           int64_t kernel_size) {
  const GlobalConv g = global_conv(x, out_channels, kernel_size);
  FASTSEG_CHECK(packed.is_contiguous() && packed.scalar_type() == ScalarType::Float &&
                    packed.numel() == Packing(g).size,
                "global_conv2d: weights were packed for another layer");
  const Tensor y = empty_output(x, g, ScalarType::Float);
  if (y.numel() > 0) {
    forward(g, x, packed.const_data_ptr<float>(), nullptr, nullptr, y.mutable_data_ptr<float>());
  }
  return torch::stable::to(y, x.scalar_type());
}

// The transpose of the tap form: rows [begin, end) of two images (N, K, H, W), counted over all
// images -> ((end - begin) * W, 2 * k * K), so that a stage's gradients are matrix products.
Tensor gcn_expand_cpu(const Tensor& vertical, const Tensor& horizontal, int64_t kernel_size,
                      int64_t begin, int64_t end) {
  check_gradients(vertical, horizontal, begin, end);
  GlobalConv g = global_conv(vertical, vertical.size(1), kernel_size);
  const Tensor v = torch::stable::contiguous(vertical, MemoryFormat::ChannelsLast);
  const Tensor h = torch::stable::contiguous(horizontal, MemoryFormat::ChannelsLast);
  const Tensor out = torch::stable::new_empty(v, {(end - begin) * g.W, g.columns()});
  dispatch_floating(v, "gcn_expand", [&](auto tag) {
    using T = decltype(tag);
    const T *from_v = v.const_data_ptr<T>(), *from_h = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const auto kernel = FASTSEG_ISA_CALL(expand_row<T>);
    parallel_tasks(end - begin, [&](int64_t row) {
      kernel(g, from_v, from_h, begin + row, to + row * g.W * g.columns());
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "gcn_conv(Tensor x, Tensor l1, Tensor l1_bias, Tensor l2, Tensor l2_bias, Tensor r1, "
      "Tensor r1_bias, Tensor r2, Tensor r2_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gcn_conv_pack(Tensor l1, Tensor l1_bias, Tensor l2, Tensor l2_bias, Tensor r1, "
      "Tensor r1_bias, Tensor r2, Tensor r2_bias) -> Tensor");
  m.def("gcn_conv_packed(Tensor x, Tensor packed, int out_channels, int kernel_size) -> Tensor");
  m.def(
      "gcn_expand(Tensor vertical, Tensor horizontal, int kernel_size, int begin, int end) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("gcn_conv", TORCH_BOX(&gcn_conv_cpu));
  m.impl("gcn_conv_pack", TORCH_BOX(&gcn_conv_pack));
  m.impl("gcn_conv_packed", TORCH_BOX(&gcn_conv_packed_cpu));
  m.impl("gcn_expand", TORCH_BOX(&gcn_expand_cpu));
}

}  // namespace fastseg
