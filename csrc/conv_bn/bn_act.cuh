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
constexpr int kResident = 3;              // blocks of a pass that a multiprocessor has at a time
constexpr int kBlocks = 132 * kResident;  // of a large launch: all of them at once
constexpr int kWidth = 8;                 // threads side by side over channels, at most
constexpr int kLeastPositions = 4;        // of a thread, for slices that are worth a block
constexpr int kInFlight = 4;              // 16-byte loads that a thread has in flight, about

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

// The channel that thread t of a block stands for where each of them takes one.
template <typename T, bool kChannelsLast>
__device__ int64_t block_channel() {
  if (!kChannelsLast) return blockIdx.x;
  return int64_t{blockIdx.x} * blockDim.x * kCount<T> + threadIdx.y * blockDim.x + threadIdx.x;
}

// Some vectors of this thread, loaded together. kWhole: all accesses are 16 bytes.
template <typename T, int kVectorsOf, bool kWhole>
struct Batch {
  static constexpr int kVectors = kVectorsOf;
  int64_t at[kVectors];  // offset of the first element
  int count[kVectors];   // elements; 0 for a vector that does not exist, whose elements load as 0

  using Values = T[kVectors][kCount<T>];
  __device__ __forceinline__ void load(const T* from, Values& to) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kWhole) {
#pragma unroll
        for (int k = 0; k < kCount<T>; ++k) to[i][k] = T(0);
        if (count[i] > 0) load_vector(from + at[i], to[i]);
      } else {
        load_vector(from + at[i], count[i], false, to[i]);
      }
    }
  }
  __device__ __forceinline__ void store(T* to, int i, const T (&from)[kCount<T>]) const {
    if (count[i] > 0) store_vector(to + at[i], count[i], kWhole, from);
  }
};

template <typename T, bool kChannelsLast, bool kReverse, int kVectors, bool kWhole, typename Fn>
__device__ __forceinline__ void for_each_batch(const DenseLayout& l, const Fn& fn) {
  const int64_t c = first_channel<T, kChannelsLast>();
  if (c >= l.C) return;
  const int64_t per_plane = ceil_div<int64_t>(l.HW, kCount<T>);
  const int64_t total = l.N * (kChannelsLast ? l.HW : per_plane);
  const int64_t begin = total * blockIdx.y / gridDim.y, end = total * (blockIdx.y + 1) / gridDim.y;
  const int own = kChannelsLast ? threadIdx.y : threadIdx.x;
  const int step = kChannelsLast ? blockDim.y : kThreads;
#pragma unroll 1  // a batch has the loads of kVectors turns already
  for (int64_t first = begin + own; first < end; first += kVectors * step) {
    Batch<T, kVectors, kWhole> batch;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t position = first + i * step,
                    v = kReverse ? begin + end - 1 - position : position;
      int64_t left = 0;
      if constexpr (kChannelsLast) {
        batch.at[i] = v * l.C + c;
        left = l.C - c;
      } else {
        // 32 bits: 2^32 vectors of a channel would be 64 GB.
        const int64_t n = static_cast<uint32_t>(v) / static_cast<uint32_t>(per_plane);
        const int64_t at = (v - n * per_plane) * kCount<T>;
        batch.at[i] = (n * l.C + c) * l.HW + at;
        left = l.HW - at;
      }
      batch.count[i] = !kWhole && left < kCount<T> ? static_cast<int>(left) : kCount<T>;
      if (position >= end) batch.count[i] = 0;
    }
    fn(batch);
  }
}

// fn(Batch) until all vectors of this thread have had their turn. kReverse: the last first, as
// they are what a pass before this one has left in the cache.
template <typename T, bool kChannelsLast, bool kReverse, int kVectors, typename Fn>
__device__ __forceinline__ void for_each_batch(const DenseLayout& l, bool whole, const Fn& fn) {
  if (whole) {
    for_each_batch<T, kChannelsLast, kReverse, kVectors, true>(l, fn);
  } else {
    for_each_batch<T, kChannelsLast, kReverse, 1, false>(l, fn);
  }
}

// Merges the states of all threads of the block that share channels. kStates are of a thread,
// `width` threads side by side have different channels. Thread t gets the state of channel t of
// the block, if it has one: then the result is true.
template <typename State, int kStates>
__device__ bool reduce_block(State (&mine)[kStates], int width, State& total) {
  constexpr int kWarps = kThreads / 32;
  FASTSEG_SHARED(State, states, kWarps * kWidth * kStates);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, lane = thread % 32;
  for (int step = 16; step >= width; step /= 2) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) mine[k].merge(mine[k].from_lane_below(step));
  }
  const int channels = width * kStates;
  if (lane < width) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) states[thread / 32 * channels + lane * kStates + k] = mine[k];
  }
  __syncthreads();
  if (thread >= channels) return false;
  total = states[thread];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total.merge(states[warp * channels + thread]);
  return true;
}

// Sums of g = dz * activation' and of g * (y - mean).
template <typename acc>
struct Sums {
  acc g, gc;
  __device__ void merge(const Sums& other) {
    g += other.g;
    gc += other.gc;
  }
  __device__ Sums from_lane_below(int step) const {
    return {__shfl_down_sync(0xffffffffu, g, step), __shfl_down_sync(0xffffffffu, gc, step)};
  }
};

// max(x, 0), but NaN stays.
template <typename acc>
__device__ __forceinline__ acc not_negative(acc x) {
  return x < 0 ? acc(0) : x;
}

// Moments of a thread, or of several.
template <typename acc>
struct ThreadMoments : Moments<acc> {
  __device__ ThreadMoments from_lane_below(int step) const {
    return {{__shfl_down_sync(0xffffffffu, this->n, step),
             __shfl_down_sync(0xffffffffu, this->mean, step),
             __shfl_down_sync(0xffffffffu, this->m2, step)}};
  }
};

// Moments of slices as sums of differences from `shift`, the mean of one of them: n, n (mean -
// shift), and m2 + n (mean - shift)^2. A merge divides nothing; in double precision the variance
// loses no more than a factor of the number of slices, as the shift is itself one of the means.
struct ShiftedMoments {
  double n, sum, squares;
  __device__ void merge(const ShiftedMoments& other) {
    n += other.n;
    sum += other.sum;
    squares += other.squares;
  }
  __device__ ShiftedMoments from_lane_below(int step) const {
    return {__shfl_down_sync(0xffffffffu, n, step), __shfl_down_sync(0xffffffffu, sum, step),
            __shfl_down_sync(0xffffffffu, squares, step)};
  }
};

// The first element of channel c. Moments are taken of differences from it: then nothing of the
// variance is lost in a mean that is large against it.
template <typename T>
__device__ __forceinline__ typename Accumulate<T>::type centre(const DenseLayout& l, const T* y,
                                                               int64_t c) {
  return static_cast<typename Accumulate<T>::type>(y[l.channels_last ? c : c * l.HW]);
}

// partials (slices, C) of y - centre. Of the values that a thread has in flight together it takes
// the mean first, then the differences from it, and merges those moments with what it has.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, resident_blocks(kResident))
    moments_kernel(DenseLayout layout, bool whole, const T* y,
                   Moments<typename Accumulate<T>::type>* partials) {
  using acc = typename Accumulate<T>::type;
  constexpr int kStates = kLanes<T, kChannelsLast>, kTogether = 3;  // four would spill
  const int64_t c = first_channel<T, kChannelsLast>();
  acc centres[kStates] = {};
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    if (c + k < layout.C) centres[k] = centre(layout, y, c + k);
  }
  ThreadMoments<acc> mine[kStates] = {};
  acc n = 0;
  for_each_batch<T, kChannelsLast, false, kTogether>(layout, whole, [&](const auto& batch) {
    typename std::decay_t<decltype(batch)>::Values values;
    batch.load(y, values);
    acc count = 0, means[kStates] = {};
#pragma unroll
    for (int i = 0; i < batch.kVectors; ++i) {
      count += static_cast<acc>(kChannelsLast ? batch.count[i] > 0 : batch.count[i]);
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const acc value = static_cast<acc>(values[i][k]) - centres[k % kStates];
        if (k < batch.count[i]) means[k % kStates] += value;
      }
    }
    const acc share = 1 / count, weight = count / (n + count);
#pragma unroll
    for (int k = 0; k < kStates; ++k) means[k] *= share;
#pragma unroll
    for (int i = 0; i < batch.kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const acc value = static_cast<acc>(values[i][k]) - centres[k % kStates];
        const acc delta = value - means[k % kStates];
        if (k < batch.count[i]) mine[k % kStates].m2 += delta * delta;
      }
    }
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const acc delta = means[k] - mine[k].mean;
      mine[k].mean += delta * weight;
      mine[k].m2 += delta * delta * (n * weight);
    }
    n += count;
  });
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    if (c + k < layout.C) mine[k].n = n;
  }
  ThreadMoments<acc> total;
  if (!reduce_block(mine, kChannelsLast ? blockDim.x : 1, total)) return;
  const int64_t own = block_channel<T, kChannelsLast>();
  if (own < layout.C) partials[blockIdx.y * layout.C + own] = total;
}

// fn(part) for this thread's share of the slices (slices, C) of channel c, in threads (kWidth, 32).
// Eight are loaded together, with zeros for those that do not exist.
template <typename Part, typename Fn>
__device__ __forceinline__ void for_each_slice(int64_t c, int64_t C, int slices,
                                               const Part* partials, const Fn& fn) {
  constexpr int kTogether = 8, kStep = kThreads / kWidth;
  if (c >= C) return;
#pragma unroll 1
  for (int first = threadIdx.y; first < slices; first += kTogether * kStep) {
    Part parts[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int s = first + i * kStep;
      if (s < slices) parts[i] = partials[s * C + c];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) fn(parts[i]);
  }
}

// Threads (kWidth, 32) have kWidth channels: merges their slices; writes mean and biased variance.
// `y` is null for moments of values that are not centred.
template <typename T, typename acc>
__global__ void __launch_bounds__(kThreads)
    merge_moments(DenseLayout layout, int slices, const T* y, const Moments<acc>* partials,
                  acc* mean, acc* var) {
  const int64_t c = int64_t{blockIdx.x} * kWidth + threadIdx.x;
  const double shift = c < layout.C ? partials[c].mean : 0;
  ShiftedMoments mine[1] = {}, total;
  for_each_slice(c, layout.C, slices, partials, [&](const Moments<acc>& part) {
    const double delta = part.mean - shift, weighted = part.n * delta;
    mine[0].merge({part.n, weighted, part.m2 + weighted * delta});
  });
  if (!reduce_block(mine, kWidth, total) || c >= layout.C) return;
  const double delta = total.sum / total.n;
  mean[c] = static_cast<acc>((y ? centre(layout, y, c) : acc(0)) + shift + delta);
  var[c] = static_cast<acc>(not_negative(total.squares / total.n - delta * delta));
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

enum : int { kMean, kScale, kShift, kNormValues };  // of a channel

// Values of this thread's channels that fn(channel, values) computes, once for the whole block:
// mine[i][k] is value i of channel k.
template <typename T, bool kChannelsLast, typename acc, int kValues, int kStates, typename Fn>
__device__ __forceinline__ void load_channels(int64_t C, acc (&mine)[kValues][kStates],
                                              const Fn& fn) {
  constexpr int kMost = kWidth * kStates;
  struct alignas(16) Staged {
    acc values[kValues][kMost];
  };
  FASTSEG_SHARED(Staged, staged, 1);
  const int width = kChannelsLast ? blockDim.x : 1;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < width * kStates) {
    acc values[kValues];
    const int64_t c = block_channel<T, kChannelsLast>();
    fn(c < C ? c : C - 1, values);
#pragma unroll
    for (int i = 0; i < kValues; ++i) staged[0].values[i][thread] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    load_vector(&staged[0].values[i][kChannelsLast ? threadIdx.x * kStates : 0], mine[i]);
  }
}

// The batch norm of channel c, (y - mean) * scale + shift, and 1 / standard deviation.
template <typename acc>
__device__ __forceinline__ acc load_channel(const Norm<acc>& norm, int64_t c, acc* channel) {
  const acc invstd = 1 / sqrt(norm.var[c] + norm.eps);
  channel[kMean] = norm.mean[c];
  channel[kScale] = norm.weight ? norm.weight[c] * invstd : invstd;
  channel[kShift] = norm.shift ? norm.shift[c] : acc(0);
  return invstd;
}

// z = activation((y - mean) * scale + shift + residual); residual may be null.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads, resident_blocks(kResident))
    normalize(DenseLayout layout, bool whole, const T* y, const T* residual, Norm<acc> norm,
              acc slope, T* z) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  acc channels[kNormValues][kStates];
  load_channels<T, kChannelsLast>(layout.C, channels,
                                  [&](int64_t c, acc* channel) { load_channel(norm, c, channel); });
  const auto apply = [&](const auto& batch) {
    typename std::decay_t<decltype(batch)>::Values values, added;
    batch.load(y, values);
    if (residual) batch.load(residual, added);
#pragma unroll
    for (int i = 0; i < batch.kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const int s = k % kStates;
        acc t = (static_cast<acc>(values[i][k]) - channels[kMean][s]) * channels[kScale][s] +
                channels[kShift][s];
        if (residual) t += static_cast<acc>(added[i][k]);
        values[i][k] = static_cast<T>(activate(t, slope));
      }
      batch.store(z, i, values[i]);
    }
  };
  if (residual) {
    for_each_batch<T, kChannelsLast, true, kInFlight / 2>(layout, whole, apply);
  } else {
    for_each_batch<T, kChannelsLast, true, kInFlight>(layout, whole, apply);
  }
}

// partials (slices, C) of g and g * (y - mean), g = dz * activation'; with a residual, g is
// written.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads, resident_blocks(kResident))
    backward_reduce(DenseLayout layout, bool whole, const T* dz, const T* y, const T* residual,
                    Norm<acc> norm, acc slope, T* g_out, Sums<acc>* partials) {
  constexpr int kStates = kLanes<T, kChannelsLast>;
  acc channels[kNormValues][kStates];
  load_channels<T, kChannelsLast>(layout.C, channels,
                                  [&](int64_t c, acc* channel) { load_channel(norm, c, channel); });
  Sums<acc> mine[kStates] = {}, total;
  const auto add = [&](const auto& batch) {
    typename std::decay_t<decltype(batch)>::Values values, grads, added;
    batch.load(y, values);
    batch.load(dz, grads);  // absent: 0, and so are its terms
    if (residual) batch.load(residual, added);
#pragma unroll
    for (int i = 0; i < batch.kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const int s = k % kStates;
        const acc centred = static_cast<acc>(values[i][k]) - channels[kMean][s];
        acc t = centred * channels[kScale][s] + channels[kShift][s];
        if (residual) t += static_cast<acc>(added[i][k]);
        acc g = static_cast<acc>(grads[i][k]);
        if (t <= 0) g *= slope;
        mine[s].g += g;
        mine[s].gc += g * centred;
        grads[i][k] = static_cast<T>(g);
      }
      if (residual) batch.store(g_out, i, grads[i]);
    }
  };
  if (residual) {
    for_each_batch<T, kChannelsLast, false, kInFlight / 4>(layout, whole, add);
  } else {
    for_each_batch<T, kChannelsLast, false, kInFlight / 2>(layout, whole, add);
  }
  if (!reduce_block(mine, kChannelsLast ? blockDim.x : 1, total)) return;
  const int64_t own = block_channel<T, kChannelsLast>();
  if (own < layout.C) partials[blockIdx.y * layout.C + own] = total;
}

// Threads (kWidth, 32) have kWidth channels: merges their slices into sums (2, C). Unless dweight
// is null, also the gradients of weight and shift, and `values`, how many the sums are of, as a
// count.
template <typename acc>
__global__ void __launch_bounds__(kThreads)
    merge_sums(int64_t C, int slices, const Sums<acc>* partials, Norm<acc> norm, acc values,
               acc* sums, acc* dweight, acc* dshift, acc* count) {
  const int64_t c = int64_t{blockIdx.x} * kWidth + threadIdx.x;
  Sums<double> mine[1] = {}, total;
  for_each_slice(c, C, slices, partials,
                 [&](const Sums<acc>& part) { mine[0].merge({part.g, part.gc}); });
  if (!reduce_block(mine, kWidth, total) || c >= C) return;
  sums[c] = static_cast<acc>(total.g);
  sums[C + c] = static_cast<acc>(total.gc);
  if (dweight == nullptr) return;
  dweight[c] = static_cast<acc>(total.gc / sqrt(static_cast<double>(norm.var[c]) + norm.eps));
  dshift[c] = sums[c];
  if (c == 0) *count = values;
}

// dy = (g - mean of g - (y - mean) * invstd^2 * mean of g * (y - mean)) * scale, the means being
// sums (2, C) / count (1,), which other processes may have added to. `dz` holds g already if
// `gated`.
template <typename T, bool kChannelsLast, typename acc>
__global__ void __launch_bounds__(kThreads, resident_blocks(kResident))
    backward_apply(DenseLayout layout, bool whole, const T* dz, bool gated, const T* y,
                   Norm<acc> norm, const acc* sums, const acc* count, acc slope, T* dy) {
  constexpr int kStates = kLanes<T, kChannelsLast>, k1 = kNormValues, k2 = kNormValues + 1;
  acc channels[kNormValues + 2][kStates];
  load_channels<T, kChannelsLast>(layout.C, channels, [&](int64_t c, acc* channel) {
    const acc invstd = load_channel(norm, c, channel), share = 1 / *count;
    channel[k1] = channel[kScale] * sums[c] * share;
    channel[k2] = channel[kScale] * invstd * invstd * sums[layout.C + c] * share;
  });
  for_each_batch<T, kChannelsLast, true, kInFlight / 2>(layout, whole, [&](const auto& batch) {
    typename std::decay_t<decltype(batch)>::Values values, grads;
    batch.load(y, values);
    batch.load(dz, grads);
#pragma unroll
    for (int i = 0; i < batch.kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kCount<T>; ++k) {
        const int s = k % kStates;
        const acc centred = static_cast<acc>(values[i][k]) - channels[kMean][s];
        const acc scale = channels[kScale][s];
        acc g = static_cast<acc>(grads[i][k]);
        if (!gated && centred * scale + channels[kShift][s] <= 0) g *= slope;
        grads[i][k] = static_cast<T>(g * scale - channels[k1][s] - centred * channels[k2][s]);
      }
      batch.store(dy, i, grads[i]);
    }
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
