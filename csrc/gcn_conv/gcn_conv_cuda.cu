// The large separable kernel of GCN on CUDA. Both first convolutions are one matrix product: P =
// X W has, for every pixel, the tap form of gcn_conv.h, and reads X once. A second kernel adds P's
// shifted slices, each of which it reads once as well, to the middle maps, which the backward needs
// anyway. A third convolves those: one block makes a square of the output; its left and right half
// make a branch each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

#include "common/cuda.h"
#include "common/ptx.cuh"
#include "gcn_conv/gcn_conv.h"

namespace fastseg {
namespace {

constexpr int kTile = 8;       // a block's output: kTile x kTile pixels,
constexpr int kOutputs = 32;   // channels
constexpr int kTapsOnce = 24;  // taps of the second stage that a block does at a time
constexpr int kThreads = 256;
constexpr int kHalf = kThreads / 2;          // threads of a branch
constexpr int kSumStride = kOutputs + 1;     // of a pixel in the sums that the branches exchange
constexpr int kLoads = 8;                    // of a thread before it uses the first
constexpr int kStrip = 11;                   // the same of a strip: half of one for 15 taps
constexpr int kSlices = 5;                   // the same of slices: all of 15 taps but at the edges
constexpr int kShiftAddBlocks = 8 * 132;     // at most: all at once
constexpr int64_t kTapFormBytes = 48 << 20;  // of P at a time: it stays in the L2 cache

// bfloat16 would round P more coarsely than a convolution rounds its result.
template <typename T>
using TapForm = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;

// Products of the second stage by tensor cores, in TF32: the middle maps then have the precision of
// float16, the weights are exact.
template <typename T>
constexpr bool kTensorCores = sizeof(T) == 2;

// Middle channels that a block has at a time: both branches of kTapsOnce taps fit 80 KB.
template <typename acc>
constexpr int kDepth = 128 / sizeof(acc);

template <typename T>
struct Stage {
  const T* weight;
  int64_t out, in, tap;  // strides
  const T* bias;
  int64_t bias_step;

  __device__ T at(int64_t k, int64_t c, int64_t t) const {
    return weight[k * out + c * in + t * tap];
  }
  template <typename acc>
  __device__ acc bias_of(int k) const {
    return static_cast<acc>(bias[k * bias_step]);
  }
};

template <typename T>
struct Stages {
  Stage<T> first[2], second[2];  // of the branches: l1 and r1, l2 and r2
};

// What one thread sums: 16 values of the tile. add() adds one tap: `from` is the middle pixel that
// meets the tile's first, `down` and `right` are the elements between neighbours there, `depth` the
// middle channels, `weight_step` the elements between the weights of two of them.

// By tensor cores: a warp makes two rows of the tile, all outputs.
struct TensorSums {
  float values[kOutputs / 8][4] = {};
  int row, col, pair;  // col: pixel of the A fragment and output of the B fragment

  __device__ explicit TensorSums(int thread)
      : row(thread / 32 * 2), col(thread % 32 / 4), pair(thread % 4) {}

  template <typename Fn>
  __device__ void for_each(Fn&& fn) const {
#pragma unroll
    for (int j = 0; j < kOutputs / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        fn((row + e / 2) * kTile + col, j * 8 + pair * 2 + e % 2, values[j][e]);
      }
    }
  }

  // Of the weight of middle channel c and output k: a lane's two values of the product of eight
  // channels and eight outputs are neighbours, and the lanes follow each other.
  static __device__ int weight_at(int c, int k, int padded) {
    return c / 8 * 8 * padded + k / 8 * 64 + (k % 8 * 4 + c % 4) * 2 + c % 8 / 4;
  }

  __device__ void add(const float* from, int down, int right, int depth, const float* weight,
                      int64_t weight_step, int outputs) {
    const float* at = from + row * down + col * right + pair;
    weight += (col * 4 + pair) * 2;
#pragma unroll 3
    for (int k = 0; k < depth; k += 8, at += 8, weight += 8 * weight_step) {
      const uint32_t a[4] = {__float_as_uint(at[0]), __float_as_uint(at[down]),
                             __float_as_uint(at[4]), __float_as_uint(at[down + 4])};
      float w[kOutputs / 8][2];
#pragma unroll
      for (int j = 0; j < kOutputs / 8; ++j) {
        if (j * 8 < outputs) load_vector(weight + j * 64, w[j]);
      }
#pragma unroll
      for (int j = 0; j < kOutputs / 8; ++j) {
        if (j * 8 < outputs) {
          mma_m16n8k8_tf32(values[j], a, __float_as_uint(w[j][0]), __float_as_uint(w[j][1]));
        }
      }
    }
  }
};

// Without: four pixels of a column, four outputs.
template <typename acc>
struct PlainSums {
  acc values[4][4] = {};
  int row, col, output;

  __device__ explicit PlainSums(int thread)
      : row(thread / kTile % 2), col(thread % kTile), output(thread / 16 * 4) {}

  template <typename Fn>
  __device__ void for_each(Fn&& fn) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fn((row + 2 * i) * kTile + col, output + j, values[i][j]);
    }
  }

  __device__ void add(const acc* from, int down, int right, int depth, const acc* weight,
                      int64_t weight_step, int outputs) {
    if (output >= outputs) return;
    from += row * down + col * right;
    weight += output;
    for (int k = 0; k < depth; k += 4) {
      acc middle[4][4], w[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_vector(from + 2 * i * down + k, middle[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_vector(weight + (k + i) * weight_step, w[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) values[i][j] += middle[i][c] * w[c][j];
        }
      }
    }
  }
};

// Weights as the products read them: `first`, a row of C for each column of the tap form and zero
// rows up to `columns`; `second`, [branch][tap][middle channel][output], both of `padded` channels,
// for tensor cores in the order of TensorSums.
template <typename T, typename acc>
__global__ void pack_weights(GlobalConv g, Stages<T> stages, int64_t columns, int padded, T* first,
                             acc* second) {
  const int K = static_cast<int>(g.K), taps = static_cast<int>(g.taps);
  for_each_in_rows(2, K, static_cast<int>(g.C), [&](int64_t branch, int k, int c) {
    for (int tap = 0; tap < taps; tap += kLoads) {  // a store would hold up the loads behind it
      T values[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (tap + i < taps) values[i] = stages.first[branch].at(k, c, tap + i);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (tap + i < taps) first[((branch * taps + tap + i) * K + k) * g.C + c] = values[i];
      }
    }
    if (branch > 0) return;
    for (int64_t row = g.columns() + k; row < columns; row += K) first[row * g.C + c] = T(0.f);
  });
  for_each_in_rows(2 * taps, padded, padded, [&](int64_t at, int c, int k) {
    const bool real = k < K && c < K;
    int64_t to = (at * padded + c) * padded + k;
    if constexpr (kTensorCores<T>) to = at * padded * padded + TensorSums::weight_at(c, k, padded);
    second[to] = real ? static_cast<acc>(stages.second[at / taps].at(k, c, at % taps)) : acc(0);
  });
}

// The middle map of a branch, kDown for the first one, whose first stage runs down the columns.
template <typename T, bool kDown>
__device__ __forceinline__ void add_slices(const GlobalConv& g, int lines, const Stage<T>& first,
                                           int64_t columns, const TapForm<T>* tap_form,
                                           typename Accumulate<T>::type* map) {
  using acc = typename Accumulate<T>::type;
  const int H = static_cast<int>(g.H), W = static_cast<int>(g.W), K = static_cast<int>(g.K);
  const int taps = static_cast<int>(g.taps), reach = taps / 2, end = kDown ? H : W;
  const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (item >= W * K) return;
  const int x = item / K, k = item % K;
  const acc bias = first.template bias_of<acc>(k);
  const int64_t next = (kDown ? W : 1) * columns, step = next + K;  // of pixel, of tap
  for (int line = static_cast<int>(blockIdx.y); line < lines; line += gridDim.y) {
    const int center = kDown ? line % H : x;
    const int from = reach - center > 0 ? reach - center : 0;
    const int to = end + reach - center < taps ? end + reach - center : taps;
    const TapForm<T>* p = tap_form + (int64_t{line} * W + x) * columns + (kDown ? 0 : taps * K) + k;
    p += from * step - reach * next;
    acc value = bias;
    const auto add = [&](int count) {
      TapForm<T> values[kSlices];
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        values[i] = TapForm<T>(0);
        if (i < count) values[i] = p[i * step];
      }
#pragma unroll
      for (int i = 0; i < kSlices; ++i) value += static_cast<acc>(values[i]);
      p += kSlices * step;
    };
    int left = to - from;
#pragma unroll 1
    for (; left >= kSlices; left -= kSlices) add(kSlices);
    if (left > 0) add(left);
    map[int64_t{line} * W * K + item] = value;
  }
}

// The middle maps of `lines` rows of images, whose pixels have `columns` values in `tap_form`.
// Grid: values of a row, rows, branches.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shift_add(GlobalConv g, int lines, Stages<T> stages, int64_t columns,
              const TapForm<T>* tap_form, typename Accumulate<T>::type* left,
              typename Accumulate<T>::type* right) {
  if (blockIdx.z == 0) {
    add_slices<T, true>(g, lines, stages.first[0], columns, tap_form, left);
  } else {
    add_slices<T, false>(g, lines, stages.first[1], columns, tap_form, right);
  }
}

// Grid: tiles of an image, output channels by kOutputs, images.
template <typename T>
__global__ void __launch_bounds__(kThreads, kTensorCores<T> ? 3 : 2)
    second_stage(GlobalConv g, Stages<T> stages, int padded,
                 const typename Accumulate<T>::type* left,
                 const typename Accumulate<T>::type* right,
                 const typename Accumulate<T>::type* second, T* y) {
  using acc = typename Accumulate<T>::type;
  constexpr int kRows = kThreads / kDepth<acc>;  // threads with the same channel
  static_assert(kRows % kTile == 0);
  constexpr int kStep = kRows / kTile;  // pixels of a line between those of a thread
  FASTSEG_DYNAMIC_SHARED(shared);
  acc* middle = reinterpret_cast<acc*>(shared);
  const int H = static_cast<int>(g.H), W = static_cast<int>(g.W), K = static_cast<int>(g.K);
  const int taps = static_cast<int>(g.taps), reach = taps / 2;
  const int tile_cols = ceil_div(W, kTile), tile = static_cast<int>(blockIdx.x);
  const int y0 = tile / tile_cols * kTile, x0 = tile % tile_cols * kTile;
  const int n0 = static_cast<int>(blockIdx.y) * kOutputs;
  const int thread = static_cast<int>(threadIdx.x);
  const int own = thread / kHalf;  // this thread's branch
  std::conditional_t<kTensorCores<T>, TensorSums, PlainSums<acc>> sums(thread % kHalf);

  const int64_t image = int64_t{blockIdx.z} * H * W;  // its first pixel
  for (int k0 = 0; k0 < K; k0 += kDepth<acc>) {
    const int depth = padded - k0 < kDepth<acc> ? padded - k0 : kDepth<acc>;
    const int stride = depth + 4;  // puts neighbouring pixels into different banks
    for (int t0 = 0; t0 < taps; t0 += kTapsOnce) {
      const int count = taps - t0 < kTapsOnce ? taps - t0 : kTapsOnce;
      const int width = kTile + count - 1, size = kTile * width;
      __syncthreads();  // the last product has read its strips
      const int c = thread % kDepth<acc>, line = thread / kDepth<acc> % kTile;
      // Pixels of a strip from the image's `before`, `step` elements from each other.
      const auto fill = [&](const acc* map, bool inside, int before, int size, int64_t step,
                            acc* to, int to_step) {
        if (c >= depth) return;
        const int begin = before < 0 ? -before : 0, end = inside && k0 + c < K ? size - before : 0;
        for (int at = thread / kDepth<acc> / kTile; at < width; at += kStrip * kStep) {
          acc some[kStrip];
#pragma unroll
          for (int i = 0; i < kStrip; ++i) {
            const int pixel = at + i * kStep;
            some[i] = 0;
            if (pixel >= begin && pixel < end && pixel < width) some[i] = map[pixel * step];
          }
#pragma unroll
          for (int i = 0; i < kStrip; ++i) {
            if constexpr (kTensorCores<T>) some[i] = __uint_as_float(to_tf32(some[i]));
            if (at + i * kStep < width) to[(at + i * kStep) * to_step] = some[i];
          }
        }
      };
      const int before_x = x0 + t0 - reach, before_y = y0 + t0 - reach;
      fill(left + (image + int64_t{y0 + line} * W + before_x) * K + k0 + c, y0 + line < H, before_x,
           W, K, middle + line * width * stride + c, stride);
      fill(right + (image + int64_t{before_y} * W + x0 + line) * K + k0 + c, x0 + line < W,
           before_y, H, int64_t{W} * K, middle + (size + line) * stride + c, kTile * stride);
      __syncthreads();
      const int down = own == 0 ? width : kTile, tap = own == 0 ? 1 : kTile;  // in pixels
      for (int t = 0; t < count; ++t) {
        const acc* weight = second + ((int64_t{own} * taps + t0 + t) * padded + k0) * padded +
                            n0 * (kTensorCores<T> ? 8 : 1);
        sums.add(middle + (own * size + t * tap) * stride, down * stride, stride, depth, weight,
                 padded, K - n0);
      }
    }
  }

  __syncthreads();
  for (int branch = 1; branch >= 0; --branch) {
    if (own == branch) {
      sums.for_each([&](int pixel, int output, acc value) {
        acc& sum = middle[pixel * kSumStride + output];
        sum = branch == 1 ? value : sum + value;
      });
    }
    __syncthreads();
  }
  const int k = thread % kOutputs;
  if (n0 + k >= K) return;
  const acc bias = stages.second[0].template bias_of<acc>(n0 + k) +
                   stages.second[1].template bias_of<acc>(n0 + k);
#pragma unroll
  for (int pixel = thread / kOutputs; pixel < kTile * kTile; pixel += kThreads / kOutputs) {
    const int py = y0 + pixel / kTile, px = x0 + pixel % kTile;
    if (py >= H || px >= W) continue;
    y[(image + int64_t{py} * W + px) * K + n0 + k] =
        static_cast<T>(middle[pixel * kSumStride + k] + bias);
  }
}

// Rows [begin, end) of gcn_expand's result, one thread per value.
template <typename T>
__global__ void expand(GlobalConv g, int64_t begin, int64_t end, const T* vertical,
                       const T* horizontal, T* out) {
  const int H = static_cast<int>(g.H), W = static_cast<int>(g.W), K = static_cast<int>(g.K);
  const int taps = static_cast<int>(g.taps), columns = static_cast<int>(g.columns());
  for_each_in_rows(end - begin, W, columns, [&](int64_t line, int x, int column) {
    const int64_t row = begin + line;
    const int tap = column / K, shift = taps / 2 - tap % taps;
    T value = T(0.f);
    if (tap < taps) {
      const int y = static_cast<int>(row % H) + shift;
      if (y >= 0 && y < H) value = vertical[((row + shift) * W + x) * K + column % K];
    } else if (x + shift >= 0 && x + shift < W) {
      value = horizontal[(row * W + x + shift) * K + column % K];
    }
    out[(line * W + x) * columns + column] = value;
  });
}

// a (m, k) b (n, k)^T in the dtype of the tap form. Into a tensor of that dtype: autocast, which
// may be on for calls from here, leaves such products alone.
template <typename T>
Tensor product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const Tensor right = torch::stable::transpose(b, 0, 1);
  const int64_t size[] = {a.size(0), b.size(0)};
  if constexpr (std::is_same_v<T, BFloat16>) {  // torch has this overload on CUDA only
    const Tensor out = torch::stable::new_empty(a, {size, 2}, ScalarType::Float);
    std::array<StableIValue, 4> stack{from(a), from(right), from(ScalarType::Float), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    const Tensor out = torch::stable::new_empty(a, {size, 2});
    std::array<StableIValue, 3> stack{from(a), from(right), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
}

// (N, C, H, W) -> (N * H * W, C), dense.
Tensor pixels_of(const Tensor& x, const GlobalConv& g) {
  const Tensor image = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor last = torch::stable::transpose(torch::stable::transpose(image, 1, 3), 1, 2);
  return torch::stable::reshape(last, {g.pixels(), g.C});
}

template <typename T>
Stage<T> stage_of(const GlobalConv& g, const Tensor& weight, const Tensor& bias, int64_t channels,
                  bool vertical) {
  check_stage(g, weight, bias, channels, vertical);
  return {weight.const_data_ptr<T>(),      weight.stride(0),         weight.stride(1),
          weight.stride(vertical ? 2 : 3), bias.const_data_ptr<T>(), bias.stride(0)};
}

// Returns y in the dtype of x and, for the backward, l1(x) and r1(x) in the accumulation type.
std::tuple<Tensor, Tensor, Tensor> gcn_conv_cuda(const Tensor& x, const Tensor& l1,
                                                 const Tensor& l1_bias, const Tensor& l2,
                                                 const Tensor& l2_bias, const Tensor& r1,
                                                 const Tensor& r1_bias, const Tensor& r2,
                                                 const Tensor& r2_bias) {
  const GlobalConv g = global_conv(x, l1.size(0), l1.size(2));
  const DeviceGuard guard(x);
  const cudaStream_t stream = current_stream(x);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const auto output = [&](ScalarType dtype) {
    return empty_image(x, {g.N, g.K, g.H, g.W}, dtype, MemoryFormat::ChannelsLast);
  };
  const ScalarType acc_type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor y = output(x.scalar_type()), left = output(acc_type), right = output(acc_type);
  dispatch_floating(x, "global_conv2d", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    const Stages<T> stages{
        {stage_of<T>(g, l1, l1_bias, g.C, true), stage_of<T>(g, r1, r1_bias, g.C, false)},
        {stage_of<T>(g, l2, l2_bias, g.K, false), stage_of<T>(g, r2, r2_bias, g.K, true)}};
    if (y.numel() == 0) return;
    const int64_t columns = ceil_div<int64_t>(g.columns(), 8) * 8;  // rows of 16 bytes
    const int padded = static_cast<int>(ceil_div<int64_t>(g.K, 8) * 8);
    const Tensor first = torch::stable::new_empty(x, {columns, g.C});
    const Tensor second = torch::stable::new_empty(x, {2 * g.taps * padded * padded}, acc_type);
    const RowGrid rows(2 * g.taps, std::max<int64_t>(g.K, padded), std::max<int64_t>(g.C, padded));
    launch(pack_weights<T, acc>, rows.grid, rows.block, 0, stream, g, stages, columns, padded,
           first.mutable_data_ptr<T>(), second.mutable_data_ptr<acc>());

    const Tensor pixels = pixels_of(x, g);
    const int64_t size = g.H * g.W;
    const int64_t images = std::clamp<int64_t>(
        kTapFormBytes / (size * columns * static_cast<int64_t>(sizeof(TapForm<T>))), 1, 65535);
    for (int64_t n = 0; n < g.N; n += images) {
      const int64_t count = std::min(images, g.N - n), at = n * size * g.K;
      const Tensor some =
          torch::stable::narrow(const_cast<Tensor&>(pixels), 0, n * size, count * size);
      const Tensor tap_form = product<T>(some, first);
      const int64_t blocks = ceil_div<int64_t>(g.W * g.K, kThreads), lines = count * g.H;
      const int64_t rows = std::min(lines, std::max<int64_t>(kShiftAddBlocks / (2 * blocks), 1));
      const dim3 values(static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 2);
      launch(shift_add<T>, values, dim3(kThreads), 0, stream, g, static_cast<int>(lines), stages,
             columns, tap_form.const_data_ptr<TapForm<T>>(), left.mutable_data_ptr<acc>() + at,
             right.mutable_data_ptr<acc>() + at);
    }

    const int width = kTile + static_cast<int>(std::min<int64_t>(g.taps, kTapsOnce)) - 1;
    const int strips = 2 * kTile * width * (std::min(padded, kDepth<acc>) + 4);
    const size_t shared = std::max(strips, kTile * kTile * kSumStride) * sizeof(acc);
    const dim3 grid(
        static_cast<unsigned>(ceil_div<int64_t>(g.H, kTile) * ceil_div<int64_t>(g.W, kTile)),
        static_cast<unsigned>(ceil_div<int64_t>(g.K, kOutputs)), static_cast<unsigned>(g.N));
    launch(second_stage<T>, grid, dim3(kThreads), shared, stream, g, stages, padded,
           left.const_data_ptr<acc>(), right.const_data_ptr<acc>(), second.const_data_ptr<acc>(),
           y.mutable_data_ptr<T>());
  });
  return {y, left, right};
}

Tensor gcn_expand_cuda(const Tensor& vertical, const Tensor& horizontal, int64_t kernel_size,
                       int64_t begin, int64_t end) {
  check_gradients(vertical, horizontal, begin, end);
  const GlobalConv g = global_conv(vertical, vertical.size(1), kernel_size);
  const DeviceGuard guard(vertical);
  const Tensor v = torch::stable::contiguous(vertical, MemoryFormat::ChannelsLast);
  const Tensor h = torch::stable::contiguous(horizontal, MemoryFormat::ChannelsLast);
  const Tensor out = torch::stable::new_empty(v, {(end - begin) * g.W, g.columns()});
  if (out.numel() == 0) return out;
  dispatch_floating(v, "gcn_expand", [&](auto tag) {
    using T = decltype(tag);
    const RowGrid rows(end - begin, g.W, g.columns());
    launch(expand<T>, rows.grid, rows.block, 0, current_stream(v), g, begin, end,
           v.const_data_ptr<T>(), h.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("gcn_conv", TORCH_BOX(&gcn_conv_cuda));
  m.impl("gcn_expand", TORCH_BOX(&gcn_expand_cuda));
}

}  // namespace fastseg
