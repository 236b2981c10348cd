// Kernels of batch norm + activation (+ residual), forward and backward: passes that are memory
// bound. Statistics: every block takes the moments of a slice of the positions of some channels, a
// small kernel merges the slices. All sums have a fixed order.
#pragma once

#include "common/cuda.h"
#include "common/dispatch.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_gemm.h"

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

// State<acc>[kLanes] of all threads that share channels -> that of the whole block of kThreads, in
// the threads whose index along the shared dimension is 0, for which it returns true.
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

// partials (slices, C) of y - centre.
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
    if (c + k < layout.C) partials[blockIdx.y * layout.C + c + k] = mine[k];
  }
}

// Threads (32, 8) have 32 channels: merges their slices; writes mean and biased variance. `y` is
// null for moments of values that are not centred.
template <typename T, typename acc>
__global__ void __launch_bounds__(kThreads)
    merge_moments(DenseLayout layout, int slices, const T* y, const Moments<acc>* partials,
                  acc* mean, acc* var) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  Moments<double> all[1] = {{0, 0, 0}};
  for (int s = threadIdx.y; s < slices && c < layout.C; s += blockDim.y) {
    const Moments<acc> part = partials[s * layout.C + c];
    all[0].merge({part.n, part.mean, part.m2});
  }
  if (!reduce_block<true>(all) || c >= layout.C) return;
  mean[c] = static_cast<acc>((y ? centre(layout, y, c) : acc(0)) + all[0].mean);
  var[c] = static_cast<acc>(all[0].m2 / all[0].n);
}

// Leaky ReLU; slope 0 is ReLU (a product would turn -inf into NaN), slope 1 is the identity.
template <typename acc>
__device__ __forceinline__ acc activate(acc t, acc slope) {
  const acc below = slope == 0 ? acc(0) : t * slope;
  return t <= 0 ? below : t;
}

// Statistics and parameters of a batch norm; weight and shift may be null.
template <typename acc>
struct Norm {
  const acc *mean, *var, *weight, *shift;
  acc eps;
};

// The batch norm of one channel: (y - mean) * scale + shift.
template <typename acc>
struct Channel {
  acc mean, invstd, scale, shift;
};

template <typename T, bool kChannelsLast, typename acc, int kStates>
__device__ __forceinline__ void load_channels(int64_t C, const Norm<acc>& norm,
                                              Channel<acc> (&channels)[kStates]) {
  const int64_t first = first_channel<T, kChannelsLast>();
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const int64_t c = first + k < C ? first + k : C - 1;
    const acc invstd = 1 / sqrt(norm.var[c] + norm.eps);
    channels[k] = {norm.mean[c], invstd, norm.weight ? norm.weight[c] * invstd : invstd,
                   norm.shift ? norm.shift[c] : acc(0)};
  }
}

// z = activation((y - mean) * scale + shift + residual); residual may be null.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    normalize(DenseLayout layout, bool whole, const T* y, const T* residual, Norm<acc> norm,
              acc slope, T* z) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, norm, channels);
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

// partials (slices, C) of g and g * (y - mean), g = dz * activation'; with a residual, g is
// written.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    backward_reduce(DenseLayout layout, bool whole, const T* dz, const T* y, const T* residual,
                    Norm<acc> norm, acc slope, T* g_out, Sums<acc>* partials) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, norm, channels);
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
    if (c + k < layout.C) partials[blockIdx.y * layout.C + c + k] = mine[k];
  }
}

// Threads (32, 8) have 32 channels: merges their slices into sums (2, C). Unless dweight is null,
// also the gradients of weight and shift, and `values`, how many the sums are of, as a count.
template <typename acc>
__global__ void __launch_bounds__(kThreads)
    merge_sums(int64_t C, int slices, const Sums<acc>* partials, Norm<acc> norm, acc values,
               acc* sums, acc* dweight, acc* dshift, acc* count) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  Sums<double> all[1] = {{0, 0}};
  for (int s = threadIdx.y; s < slices && c < C; s += blockDim.y) {
    const Sums<acc> part = partials[s * C + c];
    all[0].merge({part.g, part.gc});
  }
  if (!reduce_block<true>(all) || c >= C) return;
  sums[c] = static_cast<acc>(all[0].g);
  sums[C + c] = static_cast<acc>(all[0].gc);
  if (dweight == nullptr) return;
  dweight[c] = static_cast<acc>(all[0].gc / sqrt(static_cast<double>(norm.var[c]) + norm.eps));
  dshift[c] = sums[c];
  if (c == 0) *count = values;
}

// dy = (g - mean of g - (y - mean) * invstd^2 * mean of g * (y - mean)) * scale, the means being
// sums (2, C) / count (1,), which other processes may have added to. `dz` holds g already if
// `gated`.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads)
    backward_apply(DenseLayout layout, bool whole, const T* dz, bool gated, const T* y,
                   Norm<acc> norm, const acc* sums, const acc* count, acc slope, T* dy) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  Channel<acc> channels[kStates];
  load_channels<T, kChannelsLast>(layout.C, norm, channels);
  const acc share = 1 / *count;
  acc k1[kStates], k2[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const Channel<acc>& p = channels[k];
    const int64_t c = min(first_channel<T, kChannelsLast>() + k, layout.C - 1);
    k1[k] = p.scale * sums[c] * share;
    k2[k] = p.scale * p.invstd * p.invstd * sums[layout.C + c] * share;
  }
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
      grads[k] = static_cast<T>(g * p.scale - k1[k % kStates] - centred * k2[k % kStates]);
    }
    store_vector(dy + at, count, whole, grads);
  });
}

// z = activation(z + bias + residual), in place; bias (C,) and residual may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_activate(DenseLayout layout, int64_t size, bool aligned, const T* bias, const T* residual,
                 typename Accumulate<T>::type slope, T* z) {
  using acc = typename Accumulate<T>::type;
  const int64_t step = int64_t{gridDim.x} * kThreads * kCount<T>;
  const auto channel_of = [&](int64_t at) {
    return (layout.channels_last ? at : at / layout.HW) % layout.C;
  };
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
      if (bias && k < count) t += static_cast<acc>(bias[channel_of(at + k)]);
      if (residual) t += static_cast<acc>(added[k]);
      values[k] = static_cast<T>(activate(t, slope));
    }
    store_vector(z + at, count, whole, values);
  }
}

}  // namespace
}  // namespace fastseg
