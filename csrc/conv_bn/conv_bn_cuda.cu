// Convolution + batch norm + activation (+ residual) on CUDA: torch's convolution, then passes of
// ours that are memory bound. Statistics: every block takes the moments of a slice of the positions
// of some channels, one small kernel merges the slices in a fixed order. All sums have a fixed
// order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "common/counters.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_direct.h"

namespace fastseg {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1056;       // of a large launch: 8 blocks on each of 132 multiprocessors
constexpr int kLeastPositions = 8;  // of a thread, for slices that are worth a block

// Elements of one access, and the channels they belong to: channels last as many, NCHW one.
template <typename T>
constexpr int kCount = 16 / sizeof(T);
template <typename T, bool kChannelsLast>
constexpr int kLanes = kChannelsLast ? kCount<T> : 1;

// Block (x, y) takes slice y of the positions of its channels. Channels last: threadIdx.x counts
// groups of kCount channels, threadIdx.y pixels. NCHW: block x is a channel, threadIdx.x counts
// vectors of its planes.
template <typename T, bool kChannelsLast>
__device__ int64_t first_channel() {
  return kChannelsLast ? (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount<T> : blockIdx.x;
}

// fn(offset of the first element, number of elements) for each vector of this thread.
template <typename T, bool kChannelsLast, typename Fn>
__device__ __forceinline__ void for_each_vector(const DenseLayout& l, const Fn& fn) {
  const int slice = blockIdx.y, slices = gridDim.y;
  const int64_t c = first_channel<T, kChannelsLast>();
  if constexpr (kChannelsLast) {
    if (c >= l.C) return;
    const int count = l.C - c < kCount<T> ? static_cast<int>(l.C - c) : kCount<T>;
    const int64_t pixels = l.N * l.HW, end = pixels * (slice + 1) / slices;
    for (int64_t p = pixels * slice / slices + threadIdx.y; p < end; p += blockDim.y) {
      fn(p * l.C + c, count);
    }
  } else {
    const int64_t per_plane = ceil_div<int64_t>(l.HW, kCount<T>), total = l.N * per_plane;
    const int64_t end = total * (slice + 1) / slices;
    for (int64_t v = total * slice / slices + threadIdx.x; v < end; v += kThreads) {
      const int64_t n = v / per_plane, i = (v - n * per_plane) * kCount<T>;
      fn((n * l.C + c) * l.HW + i, l.HW - i < kCount<T> ? static_cast<int>(l.HW - i) : kCount<T>);
    }
  }
}

// State<acc>[kLanes] of all threads that share channels -> that of the whole block, in the threads
// whose index along the shared dimension is 0, for which it returns true.
template <bool kChannelsLast, typename State, int kStates>
__device__ bool reduce_block(State (&mine)[kStates]) {
  FASTSEG_SHARED(State, states, kThreads * kStates);
  const int index = kChannelsLast ? threadIdx.y : threadIdx.x;
  const int size = kChannelsLast ? blockDim.y : kThreads, step = kChannelsLast ? blockDim.x : 1;
  const int self = kChannelsLast ? threadIdx.y * blockDim.x + threadIdx.x : threadIdx.x;
#pragma unroll
  for (int k = 0; k < kStates; ++k) states[self * kStates + k] = mine[k];
  __syncthreads();
  for (int half = size / 2; half > 0; half /= 2) {
    if (index < half) {
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        states[self * kStates + k].merge(states[(self + half * step) * kStates + k]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) mine[k] = states[self * kStates + k];
  return index == 0;
}

// Number, mean and sum of squared deviations of some values, joined by the method of Chan et al.
template <typename acc>
struct Moments {
  acc n, mean, m2;
  __device__ void merge(const Moments& other) {
    if (other.n == 0) return;
    const acc total = n + other.n, share = other.n / total, delta = other.mean - mean;
    m2 += other.m2 + delta * delta * n * share;
    mean += delta * share;
    n = total;
  }
};

// Sums of g = dz * activation' and of g * (y - mean).
template <typename acc>
struct Sums {
  acc g, gc;
  __device__ void merge(const Sums& other) {
    g += other.g;
    gc += other.gc;
  }
};

// The first element of channel c. Moments are taken of differences from it: then nothing of the
// variance is lost in a mean that is large against it.
template <typename T>
__device__ __forceinline__ typename Accumulate<T>::type centre(const DenseLayout& l, const T* y,
                                                               int64_t c) {
  return static_cast<typename Accumulate<T>::type>(y[l.channels_last ? c : c * l.HW]);
}

// partials (C, slices) of y - centre.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(DenseLayout layout, bool whole, const T* y,
                   Moments<typename Accumulate<T>::type>* partials) {
  using acc = typename Accumulate<T>::type;
  constexpr int kStates = kLanes<T, kChannelsLast>;
  const int64_t c = first_channel<T, kChannelsLast>();
  acc centres[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) centres[k] = c + k < layout.C ? centre(layout, y, c + k) : 0;
  Moments<acc> mine[kStates] = {};
  acc n = 0;
  for_each_vector<T, kChannelsLast>(layout, [&](int64_t at, int count) {
    T values[kCount<T>];
    load_vector(y + at, count, whole, values);
    if constexpr (kChannelsLast) {
      n += 1;
      const acc share = 1 / n;
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        const acc value = static_cast<acc>(values[k]) - centres[k], delta = value - mine[k].mean;
        mine[k].mean += delta * share;
        mine[k].m2 += delta * (value - mine[k].mean);
      }
    } else {
      Moments<acc> some{static_cast<acc>(count), 0, 0};
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        if (k < count) some.mean += static_cast<acc>(values[k]) - centres[0];
      }
      some.mean /= some.n;
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const acc delta = static_cast<acc>(values[k]) - centres[0] - some.mean;
        if (k < count) some.m2 += delta * delta;
      }
      mine[0].merge(some);
    }
  });
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) mine[k].n = n;
  }
  if (!reduce_block<kChannelsLast>(mine)) return;
  for (int k = 0; k < kStates; ++k) {
    if (c + k < layout.C) partials[(c + k) * gridDim.y + blockIdx.y] = mine[k];
  }
}

template <typename acc>
__device__ acc scale_of(const acc* weight, acc var, double eps, int64_t c) {
  return static_cast<acc>((weight ? weight[c] : acc(1)) / sqrt(static_cast<double>(var) + eps));
}

// One thread per channel: merges its slices; writes mean, biased variance and weight / deviation.
template <typename T, typename acc>
__global__ void merge_moments(DenseLayout layout, int slices, const T* y,
                              const Moments<acc>* partials, const acc* weight, double eps,
                              acc* mean, acc* var, acc* scale) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= layout.C) return;
  Moments<double> all{0, 0, 0};
  for (int s = 0; s < slices; ++s) {
    const Moments<acc> part = partials[c * slices + s];
    all.merge({part.n, part.mean, part.m2});
  }
  mean[c] = static_cast<acc>(centre(layout, y, c) + all.mean);
  var[c] = static_cast<acc>(all.m2 / all.n);
  scale[c] = scale_of(weight, var[c], eps, c);
}

template <typename acc>
__global__ void scales(int64_t C, const acc* weight, const acc* var, double eps, acc* scale) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c < C) scale[c] = scale_of(weight, var[c], eps, c);
}

// Leaky ReLU; slope 0 is ReLU (a product would turn -inf into NaN), slope 1 is the identity.
template <typename acc>
__device__ __forceinline__ acc activate(acc t, acc slope) {
  const acc below = slope == 0 ? acc(0) : t * slope;
  return t <= 0 ? below : t;
}

// The batch norm of one channel: (y - mean) * scale + shift.
template <typename acc>
struct Channel {
  acc mean, scale, shift;
};

template <typename T, bool kChannelsLast, typename acc, int kStates>
__device__ __forceinline__ void load_channels(int64_t C, const acc* mean, const acc* scale,
                                              const acc* shift, Channel<acc> (&channels)[kStates]) {
  const int64_t first = first_channel<T, kChannelsLast>();
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const int64_t c = first + k < C ? first + k : C - 1;
    channels[k] = {mean[c], scale[c], shift ? shift[c] : acc(0)};
  }
}

// z = activation((y - mean) * scale + shift + residual); residual and shift may be null.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    normalize(DenseLayout layout, bool whole, const T* y, const T* residual, const acc* mean,
              const acc* scale, const acc* shift, acc slope, T* z) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, mean, scale, shift, channels);
  for_each_vector<T, kChannelsLast>(layout, [&](int64_t at, int count) {
    T values[kCount<T>], added[kCount<T>];
    load_vector(y + at, count, whole, values);
    if (residual) load_vector(residual + at, count, whole, added);
#pragma unroll
    for (int k = 0; k < kCount<T>; ++k) {
      const Channel<acc>& p = channels[k % kStates];
      acc t = (static_cast<acc>(values[k]) - p.mean) * p.scale + p.shift;
      if (residual) t += static_cast<acc>(added[k]);
      values[k] = static_cast<T>(activate(t, slope));
    }
    store_vector(z + at, count, whole, values);
  });
}

// partials (C, slices) of g and g * (y - mean), g = dz * activation'; with a residual, g is
// written.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    backward_reduce(DenseLayout layout, bool whole, const T* dz, const T* y, const T* residual,
                    const acc* mean, const acc* scale, const acc* shift, acc slope, T* g_out,
                    Sums<acc>* partials) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, mean, scale, shift, channels);
  Sums<acc> mine[kStates] = {};
  for_each_vector<T, kChannelsLast>(layout, [&](int64_t at, int count) {
    T values[kCount<T>], grads[kCount<T>], added[kCount<T>];
    load_vector(y + at, count, whole, values);
    load_vector(dz + at, count, whole, grads);  // absent: 0, and so are its terms
    if (residual) load_vector(residual + at, count, whole, added);
#pragma unroll
    for (int k = 0; k < kCount<T>; ++k) {
      const Channel<acc>& p = channels[k % kStates];
      const acc centred = static_cast<acc>(values[k]) - p.mean;
      acc t = centred * p.scale + p.shift;
      if (residual) t += static_cast<acc>(added[k]);
      acc g = static_cast<acc>(grads[k]);
      if (t <= 0) g *= slope;
      if (k < count) {
        mine[k % kStates].g += g;
        mine[k % kStates].gc += g * centred;
      }
      grads[k] = static_cast<T>(g);
    }
    if (residual) store_vector(g_out + at, count, whole, grads);
  });
  if (!reduce_block<kChannelsLast>(mine)) return;
  const int64_t c = first_channel<T, kChannelsLast>();
  for (int k = 0; k < kStates; ++k) {
    if (c + k < layout.C) partials[(c + k) * gridDim.y + blockIdx.y] = mine[k];
  }
}

// One thread per channel: the gradients of weight and shift, and k1, k2 of backward_apply.
template <typename acc>
__global__ void merge_sums(int64_t C, int slices, double count, const Sums<acc>* partials,
                           const acc* var, const acc* scale, double eps, acc* dweight, acc* dshift,
                           acc* k1, acc* k2) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= C) return;
  Sums<double> all{0, 0};
  for (int s = 0; s < slices; ++s) {
    const Sums<acc> part = partials[c * slices + s];
    all.merge({part.g, part.gc});
  }
  const double variance = static_cast<double>(var[c]) + eps;
  dweight[c] = static_cast<acc>(all.gc / sqrt(variance));
  dshift[c] = static_cast<acc>(all.g);
  k1[c] = static_cast<acc>(scale[c] * all.g / count);
  k2[c] = static_cast<acc>(scale[c] / variance * all.gc / count);
}

// dy = g * scale - k1 - (y - mean) * k2. `dz` holds g already if `gated`.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    backward_apply(DenseLayout layout, bool whole, const T* dz, bool gated, const T* y,
                   const acc* mean, const acc* scale, const acc* shift, const acc* k1,
                   const acc* k2, acc slope, T* dy) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, mean, scale, shift, channels);
  Channel<acc> terms[kStates];  // k1 and k2
  load_channels<T, kChannelsLast>(layout.C, k1, k2, static_cast<const acc*>(nullptr), terms);
  for_each_vector<T, kChannelsLast>(layout, [&](int64_t at, int count) {
    T values[kCount<T>], grads[kCount<T>];
    load_vector(y + at, count, whole, values);
    load_vector(dz + at, count, whole, grads);
#pragma unroll
    for (int k = 0; k < kCount<T>; ++k) {
      const Channel<acc>& p = channels[k % kStates];
      const acc centred = static_cast<acc>(values[k]) - p.mean;
      acc g = static_cast<acc>(grads[k]);
      if (!gated && centred * p.scale + p.shift <= 0) g *= slope;
      grads[k] = static_cast<T>(g * p.scale - terms[k % kStates].mean -
                                centred * terms[k % kStates].scale);
    }
    store_vector(dy + at, count, whole, grads);
  });
}

// z = activation(z + residual), in place; residual may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_activate(int64_t size, bool aligned, const T* residual, typename Accumulate<T>::type slope,
                 T* z) {
  using acc = typename Accumulate<T>::type;
  const int64_t step = int64_t{gridDim.x} * kThreads * kCount<T>;
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount<T>; at < size;
       at += step) {
    const int count = size - at < kCount<T> ? static_cast<int>(size - at) : kCount<T>;
    const bool whole = aligned && count == kCount<T>;
    T values[kCount<T>], added[kCount<T>];
    load_vector(z + at, count, whole, values);
    if (residual) load_vector(residual + at, count, whole, added);
#pragma unroll
    for (int k = 0; k < kCount<T>; ++k) {
      acc t = static_cast<acc>(values[k]);
      if (residual) t += static_cast<acc>(added[k]);
      values[k] = static_cast<T>(activate(t, slope));
    }
    store_vector(z + at, count, whole, values);
  }
}

// ---- host functions -----------------------------------------------------------------------------

// How a pass over a tensor of this layout is launched.
template <typename T>
struct Pass {
  dim3 grid, block;
  int slices;
  bool whole;  // all accesses are 16 bytes

  template <typename... Pointers>
  explicit Pass(const DenseLayout& l, const Pointers*... pointers) {
    const int64_t groups = ceil_div<int64_t>(l.C, kCount<T>);
    unsigned width = 1;  // channels last: threads of a block side by side over channels
    while (width < kThreads && width < groups) width *= 2;
    block = l.channels_last ? dim3(width, kThreads / width) : dim3(kThreads);
    const int64_t channel_blocks = l.channels_last ? ceil_div<int64_t>(groups, width) : l.C;
    const int64_t positions =
        l.channels_last ? l.N * l.HW : l.N * ceil_div<int64_t>(l.HW, kCount<T>);
    const int64_t useful = positions / (kLeastPositions * (l.channels_last ? block.y : block.x));
    const int64_t wanted = ceil_div<int64_t>(kBlocks, channel_blocks);
    slices = static_cast<int>(std::max<int64_t>(1, std::min(wanted, useful)));
    grid = dim3(static_cast<unsigned>(channel_blocks), slices);
    whole = (l.channels_last ? l.C : l.HW) % kCount<T> == 0 && aligned_16(pointers...);
  }
};

unsigned channel_blocks(int64_t C) { return static_cast<unsigned>(ceil_div<int64_t>(C, 128)); }

template <typename acc>
constexpr ScalarType kStats = sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float;

// Batch-norm parameters as acc, null where they are absent. `holder` keeps them alive.
template <typename acc>
const acc* parameters(const OptionalTensor& values, int64_t C, Tensor& holder) {
  if (!values.has_value()) return nullptr;
  FASTSEG_CHECK(values->dim() == 1 && values->size(0) == C,
                "conv_bn_act: batch-norm parameters must have shape (", C, ",)");
  holder = torch::stable::contiguous(torch::stable::to(*values, kStats<acc>));
  return holder.const_data_ptr<acc>();
}

// Calls fn(std::true_type or std::false_type) for the layout.
template <typename Fn>
void dispatch_layout(const DenseLayout& layout, const Fn& fn) {
  layout.channels_last ? fn(std::true_type{}) : fn(std::false_type{});
}

// Whether the direct convolution takes this layer, and its parameters if so: 16-bit channels-last
// tensors of which at most 60 % of the (pixel, tap) pairs lie inside the image. Below that share,
// skipping outweighs what mma.sync reaches less than a library's kernel (computed from published
// fractions of peak, 0.55 against 0.85; no GPU has measured it yet).
bool direct_conv_of(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                    const IntList& stride, const IntList& padding, const IntList& dilation,
                    int64_t groups, double slope, DirectConv* conv) {
  constexpr double kLargestShare = 0.6;
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  const int64_t C = x.size(1), K = weight.size(0), taps = weight.size(2) * weight.size(3);
  if (!half || groups != 1 || C % 8 != 0 || K % 8 != 0 || taps > 64 || x.numel() == 0 ||
      x.numel() > INT32_MAX || x.scalar_type() != weight.scalar_type()) {
    return false;
  }
  const auto axis = [&](int i) {
    const int64_t in = x.size(2 + i), reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    const int64_t out = (in + 2 * padding[i] - reach) / stride[i] + 1;
    return ConvAxis{static_cast<int>(in),
                    static_cast<int>(out),
                    static_cast<int>(weight.size(2 + i)),
                    static_cast<int>(stride[i]),
                    static_cast<int>(padding[i]),
                    static_cast<int>(dilation[i])};
  };
  *conv = DirectConv{static_cast<int>(x.size(0)),
                     static_cast<int>(C),
                     static_cast<int>(K),
                     axis(0),
                     axis(1),
                     {},
                     {},
                     static_cast<float>(slope)};
  if (conv->rows.out < 1 || conv->cols.out < 1) return false;
  const auto is_channels_last = [](const Tensor& t) {
    return t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(3) * t.size(1) &&
           t.stride(0) == t.size(2) * t.stride(2) && aligned_16(static_cast<char*>(t.data_ptr()));
  };
  if (!is_channels_last(x) || (residual.has_value() && !is_channels_last(*residual))) return false;
  if (inside_share(conv->rows) * inside_share(conv->cols) > kLargestShare) return false;
  conv->row_segments = tap_segments(conv->rows);
  conv->col_segments = tap_segments(conv->cols);
  return true;
}

template <typename T>
Tensor run_direct_conv(const DirectConv& conv, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual) {
  const Tensor filters = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);
  Tensor z = empty_image(x, {conv.N, conv.K, conv.rows.out, conv.cols.out}, x.scalar_type(),
                         MemoryFormat::ChannelsLast);
  const auto data = [](const OptionalTensor& t) {
    return t.has_value() ? t->const_data_ptr<T>() : nullptr;
  };
  OptionalTensor biases;
  if (bias.has_value()) biases = torch::stable::contiguous(*bias);
  launch_direct_conv<T>(conv, x.const_data_ptr<T>(), filters.const_data_ptr<T>(), data(biases),
                        data(residual), z.mutable_data_ptr<T>(), current_stream(x));
  return z;
}

Tensor conv_act_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const IntList& stride, const IntList& padding,
                     const IntList& dilation, int64_t groups, double negative_slope) {
  const DeviceGuard guard(x);
  DirectConv conv;
  if (direct_conv_of(x, weight, residual, stride, padding, dilation, groups, negative_slope,
                     &conv)) {
    FASTSEG_COUNT("conv_act.cuda_direct");
    return x.scalar_type() == ScalarType::Half
               ? run_direct_conv<Half>(conv, x, weight, bias, residual)
               : run_direct_conv<BFloat16>(conv, x, weight, bias, residual);
  }
  Tensor z = torch_convolution(x, weight, bias, stride, padding, dilation, groups);
  if ((!residual.has_value() && negative_slope == 1) || z.numel() == 0) return z;
  const DenseLayout layout = dense_layout(z);
  Tensor r;
  if (residual.has_value()) r = with_layout(*residual, z, layout);
  dispatch_floating(z, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    T* data = z.mutable_data_ptr<T>();
    const T* added = residual.has_value() ? r.const_data_ptr<T>() : nullptr;
    const int64_t blocks = ceil_div<int64_t>(z.numel(), kThreads * kCount<T>);
    launch(add_activate<T>, static_cast<unsigned>(std::min<int64_t>(blocks, 4 * kBlocks)), kThreads,
           0, current_stream(z), z.numel(), aligned_16(data, added), added, negative_slope, data);
  });
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_cuda(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
    double eps, double negative_slope) {
  const DeviceGuard guard(x);
  Tensor y = torch_convolution(x, weight, bias, stride, padding, dilation, groups);
  const DenseLayout layout = dense_layout(y);
  Tensor z = torch::stable::empty_like(y), mean, var, r;
  if (residual.has_value()) r = with_layout(*residual, y, layout);
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    mean = torch::stable::new_empty(y, {layout.C}, kStats<acc>);
    var = torch::stable::new_empty(y, {layout.C}, kStats<acc>);
    if (y.numel() == 0) return;
    Tensor weight_holder, bias_holder;
    const acc* w = parameters<acc>(bn_weight, layout.C, weight_holder);
    const acc* shift = parameters<acc>(bn_bias, layout.C, bias_holder);
    const T* added = residual.has_value() ? r.const_data_ptr<T>() : nullptr;
    const T* from = y.const_data_ptr<T>();
    T* to = z.mutable_data_ptr<T>();
    const Pass<T> pass(layout, from, to, added);
    Tensor work = torch::stable::new_empty(y, {layout.C * (3 * pass.slices + 1)}, kStats<acc>);
    acc* scale = work.mutable_data_ptr<acc>();
    auto* partials = reinterpret_cast<Moments<acc>*>(scale + layout.C);
    acc *mean_data = mean.mutable_data_ptr<acc>(), *var_data = var.mutable_data_ptr<acc>();
    const cudaStream_t stream = current_stream(y);
    dispatch_layout(layout, [&](auto channels_last) {
      constexpr bool kChannelsLast = decltype(channels_last)::value;
      launch(moments_kernel<T, kChannelsLast>, pass.grid, pass.block, 0, stream, layout, pass.whole,
             from, partials);
      launch(merge_moments<T, acc>, channel_blocks(layout.C), 128, 0, stream, layout, pass.slices,
             from, partials, w, eps, mean_data, var_data, scale);
      launch(normalize<T, kChannelsLast, acc>, pass.grid, pass.block, 0, stream, layout, pass.whole,
             from, added, mean_data, scale, shift, static_cast<acc>(negative_slope), to);
    });
  });
  return {z, y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cuda(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, double negative_slope) {
  const DenseLayout layout = dense_layout(y);
  FASTSEG_CHECK(mean.numel() == layout.C && var.numel() == layout.C && mean.is_contiguous() &&
                    var.is_contiguous(),
                "conv_bn_act: mean and var must have shape (", layout.C, ",)");
  const DeviceGuard guard(y);
  const Tensor gradient = with_layout(dz, y, layout);
  Tensor dy = torch::stable::empty_like(y);
  Tensor dweight = torch::stable::empty_like(mean), dshift = torch::stable::empty_like(mean);
  const bool with_residual = residual.has_value();
  Tensor r,
      dresidual = with_residual ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (with_residual) r = with_layout(*residual, y, layout);
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    if (y.numel() == 0) return;
    Tensor weight_holder, bias_holder;
    const acc* w = parameters<acc>(bn_weight, layout.C, weight_holder);
    const acc* shift = parameters<acc>(bn_bias, layout.C, bias_holder);
    const T *values = y.const_data_ptr<T>(), *grads = gradient.const_data_ptr<T>();
    const T* added = with_residual ? r.const_data_ptr<T>() : nullptr;
    T* g = with_residual ? dresidual.mutable_data_ptr<T>() : nullptr;
    T* to = dy.mutable_data_ptr<T>();
    const Pass<T> pass(layout, values, grads, added, g, to);
    Tensor work = torch::stable::new_empty(y, {layout.C * (2 * pass.slices + 3)}, kStats<acc>);
    acc *scale = work.mutable_data_ptr<acc>(), *k1 = scale + layout.C, *k2 = k1 + layout.C;
    auto* partials = reinterpret_cast<Sums<acc>*>(k2 + layout.C);
    const acc *mean_data = mean.const_data_ptr<acc>(), *var_data = var.const_data_ptr<acc>();
    const acc slope = static_cast<acc>(negative_slope);
    const cudaStream_t stream = current_stream(y);
    dispatch_layout(layout, [&](auto channels_last) {
      constexpr bool kChannelsLast = decltype(channels_last)::value;
      launch(scales<acc>, channel_blocks(layout.C), 128, 0, stream, layout.C, w, var_data, eps,
             scale);
      launch(backward_reduce<T, kChannelsLast, acc>, pass.grid, pass.block, 0, stream, layout,
             pass.whole, grads, values, added, mean_data, scale, shift, slope, g, partials);
      launch(merge_sums<acc>, channel_blocks(layout.C), 128, 0, stream, layout.C, pass.slices,
             static_cast<double>(layout.N * layout.HW), partials, var_data, scale, eps,
             dweight.mutable_data_ptr<acc>(), dshift.mutable_data_ptr<acc>(), k1, k2);
      launch(backward_apply<T, kChannelsLast, acc>, pass.grid, pass.block, 0, stream, layout,
             pass.whole, with_residual ? g : grads, with_residual, values, mean_data, scale, shift,
             k1, k2, slope, to);
    });
  });
  return {dy, dweight, dshift, dresidual};
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("conv_act", TORCH_BOX(&conv_act_cuda));
  m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cuda));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward_cuda));
}

}  // namespace fastseg
