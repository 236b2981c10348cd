// Kernels of the large separable kernel of GCN: what they compute together is in gcn_conv_cuda.cu.
#pragma once

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
constexpr int kHalf = kThreads / 2;       // threads of a branch
constexpr int kSumStride = kOutputs + 1;  // of a pixel in the sums that the branches exchange
constexpr int kLoads = 8;                 // of a thread before it uses the first
constexpr int kStrip = 11;                // the same of a strip: half of one for 15 taps
constexpr int kSlices = 5;                // the same of slices: all of 15 taps but at the edges

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
__global__ void __launch_bounds__(kThreads, resident_blocks(3))
    pack_weights(GlobalConv g, Stages<T> stages, int64_t columns, int padded, T* first,
                 acc* second) {
  const int K = static_cast<int>(g.K), taps = static_cast<int>(g.taps);
  const int groups = ceil_div(taps, kLoads);  // of taps: a store would hold up the loads behind it
  for_each_in_rows(2 * groups, K, static_cast<int>(g.C), [&](int64_t part, int k, int c) {
    const int branch = static_cast<int>(part) / groups;
    const int tap = static_cast<int>(part) % groups * kLoads;
    T values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (tap + i < taps) values[i] = stages.first[branch].at(k, c, tap + i);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (tap + i < taps) first[(int64_t{branch * taps + tap + i} * K + k) * g.C + c] = values[i];
    }
    if (part > 0) return;
    for (int64_t row = g.columns() + k; row < columns; row += K) first[row * g.C + c] = T(0.f);
  });
  // 32 bits: 2^32 of these weights would be 16 GB.
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned step = gridDim.z * gridDim.y * gridDim.x * kThreads, row = padded;
  for (unsigned item = block * kThreads + threadIdx.y * blockDim.x + threadIdx.x;
       item < 2 * taps * row * row; item += step) {
    const int at = item / (row * row);  // branch and tap
    const int c = item / row % row, k = item % row;
    unsigned to = item;
    if constexpr (kTensorCores<T>) to = at * row * row + TensorSums::weight_at(c, k, padded);
    const bool real = k < K && c < K;
    second[to] = real ? static_cast<acc>(stages.second[at / taps].at(k, c, at % taps)) : acc(0);
  }
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

// Grid: tiles of all images, output channels by kOutputs.
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
  const int tile_cols = ceil_div(W, kTile), tiles = tile_cols * ceil_div(H, kTile);
  const int tile = static_cast<int>(blockIdx.x) % tiles;
  const int y0 = tile / tile_cols * kTile, x0 = tile % tile_cols * kTile;
  const int n0 = static_cast<int>(blockIdx.y) * kOutputs;
  const int thread = static_cast<int>(threadIdx.x);
  const int own = thread / kHalf;  // this thread's branch
  std::conditional_t<kTensorCores<T>, TensorSums, PlainSums<acc>> sums(thread % kHalf);

  const int64_t image = int64_t{blockIdx.x / tiles} * H * W;  // its first pixel
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
      const int down = own == 0 ? width : kTile, along = own == 0 ? 1 : kTile;  // in pixels
      const acc* from = middle + own * size * stride;
      const acc* weight = second + ((int64_t{own} * taps + t0) * padded + k0) * padded +
                          n0 * (kTensorCores<T> ? 8 : 1);
#pragma unroll 1
      for (int t = 0; t < count; ++t, from += along * stride, weight += padded * padded) {
        sums.add(from, down * stride, stride, depth, weight, padded, K - n0);
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

}  // namespace
}  // namespace fastseg
