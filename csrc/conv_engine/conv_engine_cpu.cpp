// The inference convolution of the CPU: weights are packed once (pack_cpu.cpp), then every call is
// one pass with bias, residual and activation in the epilogue. This file checks and registers the
// ops; run.h lists the algorithms, and the arithmetic is in the .inl files.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/counters.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/few_channels.h"
#include "conv_engine/groups.h"
#include "conv_engine/images.h"
#include "conv_engine/run.h"
#include "conv_engine/tiles.h"

namespace fastseg {
namespace conv_engine {
namespace {

// The part of the arguments that both ops share, in the order of the schema.
struct Options {
  int64_t R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile, activation;
  double slope;
  bool residual_last;
  int64_t strassen, groups;
};

// The poolings around a convolution, see conv_pool.inl: codes of x and the size that was pooled,
// if x is to be unpooled; where maxima and their codes go, if wanted.
struct Poolings {
  std::optional<Tensor> x_codes;
  int64_t H, W;
  std::optional<Tensor> pooled, codes;
};

// The 1x1 convolution that is summed with this one, if there is an image for it.
struct Summand {
  std::optional<Tensor> x;
  int64_t stride_h, stride_w;
};

// Output size of one axis.
int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  FASTSEG_CHECK(kernel >= 1 && stride >= 1 && pad >= 0 && dilation >= 1,
                "conv_engine: kernel, stride and dilation must be positive and padding not "
                "negative, got ",
                kernel, ", ", stride, ", ", dilation, " and ", pad);
  const int64_t room = in + 2 * pad - dilation * (kernel - 1);
  FASTSEG_CHECK(room >= 1, "conv_engine: the kernel reaches over ", dilation * (kernel - 1) + 1,
                " pixels, the padded input has only ", in + 2 * pad);
  return (room - 1) / stride + 1;
}

// Image of codes with the sizes of `values`.
Image<uint8_t> code_image(const Tensor& t, const Tensor& values) {
  FASTSEG_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Byte &&
                    (t.stride(1) == 1 || t.size(1) == 1) && t.size(0) == values.size(0) &&
                    t.size(1) == values.size(1) && t.size(2) == values.size(2) &&
                    t.size(3) == values.size(3),
                "conv_engine: codes must be uint8, channels last, with the shape of the maxima");
  return {static_cast<uint8_t*>(t.mutable_data_ptr()), t.stride(0), t.stride(2), t.stride(3)};
}

// Whether there are `windows` windows along an axis of `size` pixels, with or without one that
// hangs over.
bool windows_fit(int64_t windows, int64_t size) {
  return windows == size / 2 || windows == (size + 1) / 2;
}

template <class Conv>
void set_poolings(Conv& conv, const Tensor& x, int64_t outputs, const Poolings& p, int64_t tile) {
  using T = typename Conv::Storage;
  const bool winograd = tile != 0 && tile != kLineTile && tile != kGroupedTile;
  if (p.x_codes) {
    FASTSEG_CHECK(winograd, "conv_engine: only square Winograd tiles unpool, got tile ", tile);
    const Image<uint8_t> codes = code_image(*p.x_codes, x);
    conv.x_codes = {codes.data, codes.batch, codes.row, codes.pixel};
    conv.H = p.H, conv.W = p.W;
    conv.Hp = x.size(2), conv.Wp = x.size(3);
    FASTSEG_CHECK(windows_fit(conv.Hp, conv.H) && windows_fit(conv.Wp, conv.W),
                  "conv_engine: x does not have the size of a pooled image of ", conv.H, "x",
                  conv.W);
  }
  if (p.pooled) {
    FASTSEG_CHECK(winograd && tile % 2 == 0 && conv.dilation_h == 1 && conv.dilation_w == 1,
                  "conv_engine: only even Winograd tiles without dilation pool, got tile ", tile);
    FASTSEG_CHECK(!p.x_codes, "conv_engine: cannot unpool and pool at once");
    conv.pooled = output_image<T>(*p.pooled, "pooled");
    conv.Hp = p.pooled->size(2), conv.Wp = p.pooled->size(3);
    FASTSEG_CHECK(p.pooled->size(0) == conv.N && p.pooled->size(1) == outputs &&
                      windows_fit(conv.Hp, conv.Ho) && windows_fit(conv.Wp, conv.Wo),
                  "conv_engine: pooled does not have the size of the pooled output");
    if (p.codes) conv.codes = code_image(*p.codes, *p.pooled);
  }
}

template <class Conv>
constexpr bool is_widened = !std::is_same_v<typename Conv::Storage, typename Conv::Result>;

// A convolution of one group.
template <class Conv>
void run_one(const Conv& conv, int64_t tile) {
  if (tile == 0 && has_few_channels(conv)) {
    FASTSEG_COUNT("conv_engine.few_channels");
    run_few_channels(conv);
  } else if (tile == 0) {
    run_gemm(conv);
  } else if (tile == kLineTile) {
    FASTSEG_COUNT("conv_engine.winograd_1d");
    if constexpr (!is_widened<Conv>) run_winograd_1d(conv);
  } else {
    FASTSEG_COUNT("conv_engine.winograd");
    run_winograd(conv, tile);
  }
}

struct GroupImage;  // names the scratch memory of a copy

// Gives it a copy of the image with its channels side by side and the zeros left and right of it
// in place: where pixels lie 4 KB apart, those that a register tile multiplies at a time share a
// set of L1, which cannot hold them, and blocks at the ends of a line would be copied once more.
template <class Conv>
void copy_image(Conv& conv) {
  using T = typename Conv::Storage;
  const int64_t line = (conv.W + 2 * conv.pad_w) * conv.C, border = conv.pad_w * conv.C;
  T* const copy = scratch<GroupImage, T>(conv.N * conv.H * line);
  T* to = copy;
  for (int64_t n = 0; n < conv.N; ++n) {
    for (int64_t y = 0; y < conv.H; ++y) {
      std::memset(to, 0, border * sizeof(T));
      to += border;
      for (int64_t x = 0; x < conv.W; ++x, to += conv.C) {
        std::memcpy(to, conv.x.at(n, y, x), conv.C * sizeof(T));
      }
      std::memset(to, 0, border * sizeof(T));
      to += border;
    }
  }
  conv.x = {copy, conv.H * line, line, conv.C};
  conv.W += 2 * conv.pad_w;
  conv.pad_w = 0;
}

template <class Conv>
void set_summand(Conv& conv, const Summand& summand, const Options& o) {
  if (!summand.x) return;
  const Tensor& x = *summand.x;
  conv.x2 = input_image<typename Conv::Storage>(x, "the summand");
  conv.C2 = x.size(1);
  conv.stride2_h = summand.stride_h, conv.stride2_w = summand.stride_w;
  FASTSEG_CHECK(o.tile == 0 && o.R == 1 && o.S == 1 && o.pad_h == 0 && o.pad_w == 0,
                "conv_engine: only 1x1 kernels without padding can be summed");
  using E = typename Conv::Operand;
  constexpr int64_t kWhole = std::is_same_v<E, BFloat16> ? kLine<E> : 1;
  FASTSEG_CHECK(conv.C > 0 && conv.C2 > 0 && conv.C % kWhole == 0 && conv.C2 % kWhole == 0,
                "conv_engine: of bfloat16 products only multiples of 32 channels can be summed, "
                "got ",
                conv.C, " and ", conv.C2);
  FASTSEG_CHECK(!o.strassen || (conv.C % (2 * kGroup) == 0 && conv.C2 % (2 * kGroup) == 0),
                "conv_engine: strassen needs summands of multiples of 32 channels, got ", conv.C,
                " and ", conv.C2);
  FASTSEG_CHECK(x.size(0) == conv.N && output_size(x.size(2), 1, conv.stride2_h, 0, 1) == conv.Ho &&
                    output_size(x.size(3), 1, conv.stride2_w, 0, 1) == conv.Wo,
                "conv_engine: the summand does not have the size of the output");
}

template <class Conv>
void set_scale(Conv& conv, const Tensor& scale, const Options& o) {
  const auto image = input_image<typename Conv::Storage>(scale, "scale");
  FASTSEG_CHECK(scale.size(0) == conv.N && scale.size(1) == conv.C && scale.size(2) == 1 &&
                    scale.size(3) == 1,
                "conv_engine: scale must be (", conv.N, ", ", conv.C, ", 1, 1)");
  FASTSEG_CHECK(o.tile == 0 && o.groups == 1 && !o.strassen && o.R == 1 && o.S == 1 &&
                    o.stride_h == 1 && o.stride_w == 1 && o.pad_h == 0 && o.pad_w == 0,
                "conv_engine: only a 1x1 kernel of one group, without stride, padding and "
                "strassen, takes a scale");
  conv.scale = image.data, conv.scale_batch = image.batch;
}

template <class Conv>
void run_as(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
            const std::optional<Tensor>& out, int64_t out_channels, const Options& o,
            const std::optional<Tensor>& scale, const Poolings& poolings, const Summand& summand) {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  InGroups<Conv> conv{};
  conv.x = input_image<T>(x, "x");
  FASTSEG_CHECK(o.groups >= 1 && x.size(1) % o.groups == 0,
                "conv_engine: groups must divide the channels, got ", o.groups, " and ", x.size(1));
  check_groups<E>(o.groups, out_channels, x.size(1) / o.groups, o.tile);
  conv.groups = o.groups;
  conv.N = x.size(0), conv.C = x.size(1) / o.groups, conv.H = x.size(2), conv.W = x.size(3);
  conv.K = out_channels / o.groups;
  if (poolings.x_codes) conv.H = poolings.H, conv.W = poolings.W;
  conv.Ho = output_size(conv.H, o.R, o.stride_h, o.pad_h, o.dilation_h);
  conv.Wo = output_size(conv.W, o.S, o.stride_w, o.pad_w, o.dilation_w);
  conv.R = o.R, conv.S = o.S;
  conv.stride_h = o.stride_h, conv.stride_w = o.stride_w;
  conv.pad_h = o.pad_h, conv.pad_w = o.pad_w;
  conv.dilation_h = o.dilation_h, conv.dilation_w = o.dilation_w;
  set_poolings(conv, x, out_channels, poolings, o.tile);
  set_summand(conv, summand, o);
  if (scale) set_scale(conv, *scale, o);
  FASTSEG_CHECK(out || conv.pooled.data || conv.pixels() == 0, "conv_engine: nothing to write to");
  if (out) {
    conv.y = output_image<typename Conv::Result>(*out, "out");
    FASTSEG_CHECK(out->size(0) == conv.N && out->size(1) == out_channels &&
                      out->size(2) == conv.Ho && out->size(3) == conv.Wo,
                  "conv_engine: out does not have the size of this convolution's output");
  }
  if (residual) {
    conv.residual = input_image<T>(*residual, "residual");
    FASTSEG_CHECK(residual->size(0) == conv.N && residual->size(1) == out_channels &&
                      residual->size(2) == conv.Ho && residual->size(3) == conv.Wo,
                  "conv_engine: residual must have the shape of the output");
  }
  FASTSEG_CHECK(!is_widened<Conv> || (o.groups == 1 && o.tile != kLineTile && !poolings.pooled),
                "conv_engine: a float32 result of a bfloat16 image needs one group, another tile "
                "than 5 and no pooling, got ",
                o.groups, " groups and tile ", o.tile);
  check_tile<E>(o.tile, conv.K, conv.C + conv.C2, o.R, o.S, o.strassen);
  FASTSEG_CHECK(!o.strassen || (o.pad_h == 0 && o.pad_w == 0),
                "conv_engine: strassen needs padding 0, got ", o.pad_h, " and ", o.pad_w);
  FASTSEG_CHECK(o.activation >= 0 && o.activation < kActivations,
                "conv_engine: activation must be in [0, ", kActivations, "), got ", o.activation);
  FASTSEG_CHECK(o.tile == 0 || o.tile == kGroupedTile || (o.stride_h == 1 && o.stride_w == 1),
                "conv_engine: Winograd tiles need stride 1, got ", o.stride_h, " and ", o.stride_w);
  FASTSEG_CHECK(o.tile != kLineTile ||
                    (o.dilation_h == 1 && o.dilation_w == 1 && (o.S == 1 ? o.pad_w : o.pad_h) == 0),
                "conv_engine: tile 5 needs dilation 1 and padding along the kernel alone");
  const int64_t most = o.tile == 1 ? 2 : 3;  // pixels of a sub-grid
  FASTSEG_CHECK((o.tile != 1 && o.tile != 3) ||
                    (o.pad_h == o.dilation_h && o.pad_w == o.dilation_w &&
                     conv.H <= most * o.dilation_h && conv.W <= most * o.dilation_w),
                "conv_engine: bordered tiles need padding == dilation and sub-grids of at most ",
                most, " pixels, got ", conv.H, "x", conv.W, " at dilation ", o.dilation_h, "x",
                o.dilation_w);
  FASTSEG_CHECK(!summand.x || o.groups == 1, "conv_engine: a summand needs one group");
  const PackedGroups<E> layout(o.groups, out_channels, conv.C + conv.C2, o.R * o.S, o.tile,
                               o.strassen);
  FASTSEG_CHECK(packed.is_contiguous() && packed.numel() == layout.parts * layout.size,
                "conv_engine: weights were packed for another convolution");
  if (conv.pixels() == 0 || conv.K == 0) return;
  conv.weight = packed.const_data_ptr<E>();
  conv.bias = reinterpret_cast<const float*>(conv.weight + layout.bias);
  conv.activation = static_cast<Activation>(o.activation);
  conv.slope = static_cast<float>(o.slope);
  conv.residual_last = o.residual_last && residual;
  conv.strassen = o.strassen;
  // A residual that is overwritten has just been read.
  const bool in_place = residual && static_cast<const void*>(conv.residual.data) == conv.y.data;
  const bool side_by_side = o.groups == 1 || o.tile == kGroupedTile;  // all channels at a time
  conv.stream = out && !in_place && (side_by_side || conv.K % kLine<T> == 0) &&
                is_streamed(out->numel(), conv.y);
  if (o.tile == kGroupedTile) {
    FASTSEG_COUNT("conv_engine.grouped");
    if constexpr (std::is_same_v<E, float>) {
      conv.C == 1 && conv.K == 1 ? run_depthwise(conv) : run_grouped(conv);
    } else if constexpr (!is_widened<Conv>) {
      run_grouped(conv);
    }
  } else if (o.groups == 1) {
    run_one<Conv>(conv, o.tile);
  } else {
    const auto run_group = [&](int64_t g) {
      Conv one = conv.group(g, layout.size);
      if (o.tile == 0 && o.R * o.S > 1) copy_image(one);
      run_one(one, o.tile);
    };
    if (o.groups >= 2 * torch::stable::get_num_threads()) {
      parallel_tasks(o.groups, run_group);
    } else {
      for (int64_t g = 0; g < o.groups; ++g) run_group(g);
    }
  }
}

void run(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
         const std::optional<Tensor>& out, int64_t K, const Options& o,
         const std::optional<Tensor>& scale = {}, const Poolings& p = {}, const Summand& s = {}) {
  const bool dots = packed.scalar_type() == ScalarType::BFloat16;
  FASTSEG_CHECK(dots || packed.scalar_type() == ScalarType::Float,
                "conv_engine: packed weights must come from conv_engine_pack");
  if (x.scalar_type() != ScalarType::BFloat16) {
    FASTSEG_CHECK(!dots, "conv_engine: weights packed for bfloat16 products need a bfloat16 image");
    run_as<Convolution<float, float>>(x, packed, residual, out, K, o, scale, p, s);
  } else if (dots) {
    FASTSEG_COUNT("conv_engine.bf16_products");
    const bool widened = out && out->scalar_type() == ScalarType::Float;
    const auto run = widened ? run_as<WidenedConvolution> : run_as<Convolution<BFloat16, BFloat16>>;
    run(x, packed, residual, out, K, o, scale, p, s);
  } else {
    FASTSEG_CHECK(!out || out->scalar_type() == ScalarType::BFloat16,
                  "conv_engine: out must be a bfloat16 image, for weights packed for bfloat16 "
                  "products it can be float32");
    run_as<Convolution<BFloat16, float>>(x, packed, residual, out, K, o, scale, p, s);
  }
}

// The memory order of the result is that of a channels-last tensor.
Tensor conv_engine_cpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
                       int64_t out_channels, int64_t R, int64_t S, int64_t stride_h,
                       int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                       int64_t dilation_w, int64_t tile, int64_t activation, double slope,
                       bool residual_last, int64_t strassen, int64_t groups,
                       const std::optional<Tensor>& scale, bool widen) {
  FASTSEG_CHECK(x.dim() == 4, "conv_engine: x must be (N, C, H, W), got ", x.dim(), " dimensions");
  const int64_t Ho = output_size(x.size(2), R, stride_h, pad_h, dilation_h);
  const int64_t Wo = output_size(x.size(3), S, stride_w, pad_w, dilation_w);
  const std::vector<int64_t> sizes{x.size(0), Ho, Wo, out_channels};
  const Tensor nhwc =
      widen ? pooled_empty(x, sizes, ScalarType::Float, sizeof(float)) : pooled_empty(x, sizes);
  const Tensor out = torch::stable::transpose(torch::stable::transpose(nhwc, 1, 3), 2, 3);
  run(x, packed, residual, out, out_channels,
      {R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile, activation, slope,
       residual_last, strassen, groups},
      scale);
  return out;
}

void conv_engine_out(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
                     const Tensor& out, int64_t R, int64_t S, int64_t stride_h, int64_t stride_w,
                     int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                     int64_t tile, int64_t activation, double slope, bool residual_last,
                     int64_t strassen, int64_t groups, const std::optional<Tensor>& scale) {
  FASTSEG_CHECK(x.dim() == 4 && out.dim() == 4, "conv_engine: x and out must be (N, C, H, W)");
  run(x, packed, residual, out, out.size(1),
      {R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile, activation, slope,
       residual_last, strassen, groups},
      scale);
}

void conv_engine_pool(const Tensor& x, const std::optional<Tensor>& x_codes, int64_t H, int64_t W,
                      const Tensor& packed, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& out, const std::optional<Tensor>& pooled,
                      const std::optional<Tensor>& codes, int64_t out_channels, int64_t R,
                      int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                      int64_t dilation_h, int64_t dilation_w, int64_t tile, int64_t activation,
                      double slope, bool residual_last, int64_t strassen, int64_t groups) {
  FASTSEG_CHECK(x.dim() == 4, "conv_engine: x must be (N, C, H, W), got ", x.dim(), " dimensions");
  run(x, packed, residual, out, out_channels,
      {R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile, activation, slope,
       residual_last, strassen, groups},
      {}, {x_codes, H, W, pooled, codes});
}

void conv_engine_sum(const Tensor& x, const Tensor& summand, int64_t summand_stride_h,
                     int64_t summand_stride_w, const Tensor& packed, const Tensor& out, int64_t R,
                     int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                     int64_t dilation_h, int64_t dilation_w, int64_t tile, int64_t activation,
                     double slope, bool residual_last, int64_t strassen) {
  FASTSEG_CHECK(x.dim() == 4 && summand.dim() == 4 && out.dim() == 4,
                "conv_engine: x, summand and out must be (N, C, H, W)");
  FASTSEG_COUNT("conv_engine.sum");
  run(x, packed, {}, out, out.size(1),
      {R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile, activation, slope,
       residual_last, strassen, 1},
      {}, {}, {summand, summand_stride_h, summand_stride_w});
}

}  // namespace
}  // namespace conv_engine

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "conv_engine(Tensor x, Tensor packed, Tensor? residual, int out_channels, int R, int S, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, "
      "int tile, int activation, float slope, bool residual_last=False, int strassen=0, int "
      "groups=1, Tensor? scale=None, bool widen=False) -> Tensor");
  m.def(
      "conv_engine_out(Tensor x, Tensor packed, Tensor? residual, Tensor(a!) out, int R, int S, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, "
      "int tile, int activation, float slope, bool residual_last=False, int strassen=0, int "
      "groups=1, Tensor? scale=None) -> ()");
  m.def(
      "conv_engine_sum(Tensor x, Tensor other, int other_stride_h, int other_stride_w, "
      "Tensor packed, Tensor(a!) out, int R, int S, int stride_h, int stride_w, int pad_h, "
      "int pad_w, int dilation_h, int dilation_w, int tile, int activation, float slope, "
      "bool residual_last=False, int strassen=0) -> ()");
  m.def(
      "conv_engine_pool(Tensor x, Tensor? x_codes, int H, int W, Tensor packed, Tensor? residual, "
      "Tensor(a!)? out, Tensor(b!)? pooled, Tensor(c!)? codes, int out_channels, int R, int S, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, "
      "int tile, int activation, float slope, bool residual_last=False, int strassen=0, int "
      "groups=1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("conv_engine_sum", TORCH_BOX(&conv_engine::conv_engine_sum));
  m.impl("conv_engine", TORCH_BOX(&conv_engine::conv_engine_cpu));
  m.impl("conv_engine_out", TORCH_BOX(&conv_engine::conv_engine_out));
  m.impl("conv_engine_pool", TORCH_BOX(&conv_engine::conv_engine_pool));
}

}  // namespace fastseg
