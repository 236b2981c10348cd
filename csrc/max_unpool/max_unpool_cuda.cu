// Compact max pooling and unpooling on CUDA. All are memory bound: a thread moves 16 bytes,
// channels of one window in channels-last images, windows of one row in NCHW with 2x2 windows, else
// single elements. Every output element is written once, by one thread, without atomics.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "common/cuda.h"
#include "max_unpool/max_unpool.h"

namespace fastseg {
namespace {

// Channels of one thread in channels-last images: 16 bytes or more, and whole bytes of packed
// codes.
template <typename T>
constexpr int kLanes = sizeof(T) == 2 ? 8 : 4;

// PyTorch's rule: a later value replaces the best if it is larger or NaN.
template <typename T>
__device__ __forceinline__ bool replaces(T value, T best) {
  if constexpr (sizeof(T) == 2) {
    return replaces(static_cast<float>(value), static_cast<float>(best));
  } else {
    return value > best || value != value;
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void consider(const T (&values)[kCount], int tap, T (&best)[kCount],
                                         uint8_t (&codes)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (replaces(values[i], best[i])) {
      best[i] = values[i];
      codes[i] = static_cast<uint8_t>(tap);
    }
  }
}

// Codes of kCount neighbouring channels, from channel c of one pixel on: as they are or four a
// byte.
template <int kCount>
__device__ __forceinline__ void load_codes(const Pool2d& p, const uint8_t* pixel, int c, int count,
                                           bool aligned, uint8_t (&codes)[kCount]) {
  if (!p.packed) {
    load_vector(pixel + c, count, aligned, codes);
    return;
  }
  uint8_t bytes[kCount / 4];
  load_vector(pixel + c / 4, ceil_div(count, 4), aligned, bytes);
#pragma unroll
  for (int i = 0; i < kCount; ++i) codes[i] = bytes[i / 4] >> i % 4 * 2 & 3;
}

template <int kCount>
__device__ __forceinline__ void store_codes(const Pool2d& p, uint8_t* pixel, int c, int count,
                                            bool aligned, const uint8_t (&codes)[kCount]) {
  if (!p.packed) {
    store_vector(pixel + c, count, aligned, codes);
    return;
  }
  uint8_t bytes[kCount / 4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) bytes[i / 4] |= static_cast<uint8_t>(codes[i] << i % 4 * 2);
  }
  store_vector(pixel + c / 4, ceil_div(count, 4), aligned, bytes);
}

// The code of window (oh, ow): `outer` is the image and c its channel in channels-last tensors,
// else `outer` is the plane.
__device__ __forceinline__ int code_of(const Pool2d& p, const uint8_t* indices, int64_t outer,
                                       int c, int oh, int ow) {
  const int64_t window = int64_t{oh} * p.cols.count + ow;
  const int64_t windows = int64_t{p.rows.count} * p.cols.count;
  if (p.channels_last()) {
    const uint8_t* pixel = indices + (outer * windows + window) * p.index_channels();
    return p.packed ? pixel[c / 4] >> c % 4 * 2 & 3 : pixel[c];
  }
  if (!p.packed) return indices[outer * windows + window];
  const int64_t n = outer / p.C, channel = outer % p.C;
  const uint8_t byte = indices[(n * p.index_channels() + channel / 4) * windows + window];
  return byte >> channel % 4 * 2 & 3;
}

// ---- max_pool2d ---------------------------------------------------------------------------------

// Channels last. kKernel: the window is kKernel x kKernel, 0 for any.
template <typename T, int kKernel>
__global__ void pool_channels_last(Pool2d p, bool aligned, const T* x, T* y, uint8_t* indices) {
  constexpr int kCount = kLanes<T>;
  const int C = static_cast<int>(p.C), groups = ceil_div(C, kCount);
  for_each_in_rows(p.N, p.rows.count, p.cols.count * groups, [&](int64_t n, int oh, int item) {
    const int ow = item / groups, c = item % groups * kCount;
    const int count = C - c < kCount ? C - c : kCount;
    const Taps rows = taps_inside(p.rows, oh), cols = taps_inside(p.cols, ow);
    const int64_t corner = (n * p.rows.size + p.rows.start(oh)) * p.cols.size + p.cols.start(ow);
    const T* at = x + corner * C + c;
    T best[kCount];
    uint8_t codes[kCount];
    if (kKernel > 0 && rows.count() == kKernel && cols.count() == kKernel) {
      constexpr int kSide = kKernel > 0 ? kKernel : 1, kTaps = kSide * kSide;
      T values[kTaps][kCount];  // all loads in flight
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int r = tap / kSide, s = tap % kSide;
        load_vector(at + (int64_t{r} * p.cols.size + s) * C, count, aligned, values[tap]);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) best[i] = values[0][i], codes[i] = 0;
#pragma unroll
      for (int tap = 1; tap < kTaps; ++tap) consider(values[tap], tap, best, codes);
    } else {
      const int first = rows.first * p.cols.kernel + cols.first;
      for (int r = rows.first; r < rows.end; ++r) {
        for (int s = cols.first; s < cols.end; ++s) {
          T values[kCount];
          const int tap = r * p.cols.kernel + s;
          load_vector(at + (int64_t{r} * p.cols.size + s) * C, count, aligned, values);
          if (tap != first) {
            consider(values, tap, best, codes);
            continue;
          }
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            best[i] = values[i];
            codes[i] = static_cast<uint8_t>(tap);
          }
        }
      }
    }
    const int64_t pixel = (n * p.rows.count + oh) * p.cols.count + ow;
    store_vector(y + pixel * C + c, count, aligned, best);
    store_codes(p, indices + pixel * p.index_channels(), c, count, aligned, codes);
  });
}

// NCHW, whole 2x2 windows: one thread takes a pack of windows of one row, of four planes if packed.
template <typename T>
__global__ void pool_nchw_2x2(Pool2d p, const T* x, T* y, uint8_t* indices) {
  constexpr int kCount = 16 / sizeof(T);
  const int h = p.rows.count, w = p.cols.count, H = p.rows.size, W = p.cols.size;
  const int64_t index_channels = p.index_channels();
  for_each_in_rows(p.N * index_channels, h, w / kCount, [&](int64_t index_plane, int oh, int item) {
    const int64_t n = index_plane / index_channels;
    const int first = static_cast<int>(index_plane % index_channels) * (p.packed ? 4 : 1);
    const int planes = !p.packed ? 1 : p.C - first < 4 ? static_cast<int>(p.C) - first : 4;
    uint8_t bytes[kCount] = {};
#pragma unroll 4
    for (int k = 0; k < planes; ++k) {
      const int64_t plane = n * p.C + first + k;
      const T* at = x + (plane * H + 2 * oh) * W + 2 * kCount * item;
      T top[2 * kCount], bottom[2 * kCount], best[kCount];
      load_vector(at, top);
      load_vector(at + W, bottom);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T window[4] = {top[2 * i], top[2 * i + 1], bottom[2 * i], bottom[2 * i + 1]};
        best[i] = window[0];
        int code = 0;
#pragma unroll
        for (int tap = 1; tap < 4; ++tap) {
          if (replaces(window[tap], best[i])) best[i] = window[tap], code = tap;
        }
        bytes[i] |= static_cast<uint8_t>(code << 2 * k);
      }
      store_vector(y + (plane * h + oh) * w + kCount * item, best);
    }
    store_vector(indices + (index_plane * h + oh) * w + kCount * item, bytes);
  });
}

// NCHW, any window: one thread per window, of four planes if packed.
template <typename T>
__global__ void pool_nchw(Pool2d p, const T* x, T* y, uint8_t* indices) {
  const int h = p.rows.count, w = p.cols.count;
  const int64_t index_channels = p.index_channels();
  for_each_in_rows(p.N * index_channels, h, w, [&](int64_t index_plane, int oh, int ow) {
    const int64_t n = index_plane / index_channels;
    const int first = static_cast<int>(index_plane % index_channels) * (p.packed ? 4 : 1);
    const int planes = !p.packed ? 1 : p.C - first < 4 ? static_cast<int>(p.C) - first : 4;
    const Taps rows = taps_inside(p.rows, oh), cols = taps_inside(p.cols, ow);
    uint8_t byte = 0;
    for (int k = 0; k < planes; ++k) {
      const int64_t plane = n * p.C + first + k;
      const T* at = x + (plane * p.rows.size + p.rows.start(oh)) * p.cols.size + p.cols.start(ow);
      int code = rows.first * p.cols.kernel + cols.first;
      T best = at[int64_t{rows.first} * p.cols.size + cols.first];
      for (int r = rows.first; r < rows.end; ++r) {
        for (int s = cols.first; s < cols.end; ++s) {  // the first tap does not replace itself
          const T value = at[int64_t{r} * p.cols.size + s];
          if (replaces(value, best)) best = value, code = r * p.cols.kernel + s;
        }
      }
      y[(plane * h + oh) * w + ow] = best;
      byte |= static_cast<uint8_t>(code << 2 * k);
    }
    indices[(index_plane * h + oh) * w + ow] = byte;
  });
}

// ---- max_unpool2d -------------------------------------------------------------------------------

// Channels last, 2x2 windows: one thread writes the four pixels of a window, or the zeros of a cell
// beyond the last window.
template <typename T>
__global__ void unpool_channels_last_2x2(Pool2d p, bool aligned, const T* x, const uint8_t* indices,
                                         T* out) {
  constexpr int kCount = kLanes<T>;
  const int C = static_cast<int>(p.C), groups = ceil_div(C, kCount);
  const int H = p.rows.size, W = p.cols.size, h = p.rows.count, w = p.cols.count;
  for_each_in_rows(p.N, ceil_div(H, 2), ceil_div(W, 2) * groups, [&](int64_t n, int oh, int item) {
    const int ow = item / groups, c = item % groups * kCount;
    const int count = C - c < kCount ? C - c : kCount;
    T values[kCount] = {};
    uint8_t codes[kCount] = {};
    if (oh < h && ow < w) {
      const int64_t pixel = (n * h + oh) * w + ow;
      load_vector(x + pixel * C + c, count, aligned, values);
      load_codes(p, indices + pixel * p.index_channels(), c, count, aligned, codes);
    }
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const int ih = 2 * oh + tap / 2, iw = 2 * ow + tap % 2;
      if (ih >= H || iw >= W) continue;
      T named[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) named[i] = codes[i] == tap ? values[i] : T(0);
      store_vector(out + ((n * H + ih) * W + iw) * C + c, count, aligned, named);
    }
  });
}

// NCHW, 2x2 windows on an even width: one thread writes two rows of a pack of windows.
template <typename T>
__global__ void unpool_nchw_2x2(Pool2d p, const T* x, const uint8_t* indices, T* out) {
  constexpr int kCount = 16 / sizeof(T);
  const int H = p.rows.size, W = p.cols.size, h = p.rows.count, w = p.cols.count;
  for_each_in_rows(p.N * p.C, ceil_div(H, 2), w / kCount, [&](int64_t plane, int oh, int item) {
    const int64_t n = plane / p.C, c = plane % p.C;
    T values[kCount] = {};
    uint8_t codes[kCount] = {};
    if (oh < h) {
      const int64_t index_plane = p.packed ? n * p.index_channels() + c / 4 : plane;
      load_vector(x + (plane * h + oh) * w + kCount * item, values);
      load_vector(indices + (index_plane * h + oh) * w + kCount * item, codes);
    }
    const int shift = p.packed ? static_cast<int>(c % 4) * 2 : 0, mask = p.packed ? 3 : 255;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (2 * oh + r >= H) continue;
      T row[2 * kCount];
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        const int tap = 2 * r + i % 2;
        row[i] = (codes[i / 2] >> shift & mask) == tap ? values[i / 2] : T(0);
      }
      store_vector(out + (plane * H + 2 * oh + r) * W + 2 * kCount * item, row);
    }
  });
}

// Any windows: one thread gathers one pixel, kLanes channels of it in channels-last images, from
// the windows over it. kSum: the values of all that name it add up; otherwise the last one stays.
template <typename T, bool kSum, int kCount>
__global__ void unpool(Pool2d p, bool aligned, const T* x, const uint8_t* indices, T* out) {
  using Acc = std::conditional_t<kSum, typename Accumulate<T>::type, T>;
  constexpr bool kChannelsLast = kCount > 1;
  const int C = kChannelsLast ? static_cast<int>(p.C) : 1, groups = ceil_div(C, kCount);
  const int h = p.rows.count, w = p.cols.count;
  const int64_t outers = kChannelsLast ? p.N : p.N * p.C;
  for_each_in_rows(outers, p.rows.size, p.cols.size * groups, [&](int64_t outer, int ih, int item) {
    const int iw = item / groups, c = item % groups * kCount;
    const int count = C - c < kCount ? C - c : kCount;
    Acc sums[kCount] = {};
    for (int oh = p.rows.first(ih); oh <= p.rows.last(ih); ++oh) {
      for (int ow = p.cols.first(iw); ow <= p.cols.last(iw); ++ow) {
        const int tap = (ih - p.rows.start(oh)) * p.cols.kernel + iw - p.cols.start(ow);
        const int64_t window = (outer * h + oh) * w + ow;
        T values[kCount];
        uint8_t codes[kCount];
        load_vector(x + window * C + c, count, aligned, values);
        if constexpr (kChannelsLast) {
          load_codes(p, indices + window * p.index_channels(), c, count, aligned, codes);
        } else {
          codes[0] = code_of(p, indices, outer, 0, oh, ow);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (codes[i] != tap) continue;
          sums[i] = kSum ? sums[i] + static_cast<Acc>(values[i]) : static_cast<Acc>(values[i]);
        }
      }
    }
    T pixel[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) pixel[i] = static_cast<T>(sums[i]);
    store_vector(out + ((outer * p.rows.size + ih) * p.cols.size + iw) * C + c, count, aligned,
                 pixel);
  });
}

// ---- max_pool2d_by_index ------------------------------------------------------------------------

// Channels last, 2x2 windows. All four pixels are read: their 32-byte sectors would be touched
// anyway by picking.
template <typename T>
__global__ void by_index_channels_last_2x2(Pool2d p, bool aligned, const T* x,
                                           const uint8_t* indices, T* y) {
  constexpr int kCount = kLanes<T>;
  const int C = static_cast<int>(p.C), groups = ceil_div(C, kCount);
  const int H = p.rows.size, W = p.cols.size, h = p.rows.count, w = p.cols.count;
  for_each_in_rows(p.N, h, w * groups, [&](int64_t n, int oh, int item) {
    const int ow = item / groups, c = item % groups * kCount;
    const int count = C - c < kCount ? C - c : kCount;
    const int64_t pixel = (n * h + oh) * w + ow;
    uint8_t codes[kCount];
    load_codes(p, indices + pixel * p.index_channels(), c, count, aligned, codes);
    T named[kCount] = {};
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const int ih = 2 * oh + tap / 2, iw = 2 * ow + tap % 2;
      if (ih >= H || iw >= W) continue;
      T values[kCount];
      load_vector(x + ((n * H + ih) * W + iw) * C + c, count, aligned, values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) named[i] = codes[i] == tap ? values[i] : named[i];
    }
    store_vector(y + pixel * C + c, count, aligned, named);
  });
}

// NCHW, whole 2x2 windows: one thread takes a pack of windows of one row.
template <typename T>
__global__ void by_index_nchw_2x2(Pool2d p, const T* x, const uint8_t* indices, T* y) {
  constexpr int kCount = 16 / sizeof(T);
  const int h = p.rows.count, w = p.cols.count, H = p.rows.size, W = p.cols.size;
  for_each_in_rows(p.N * p.C, h, w / kCount, [&](int64_t plane, int oh, int item) {
    const int64_t n = plane / p.C, c = plane % p.C;
    const int64_t index_plane = p.packed ? n * p.index_channels() + c / 4 : plane;
    const T* at = x + (plane * H + 2 * oh) * W + 2 * kCount * item;
    T top[2 * kCount], bottom[2 * kCount], named[kCount];
    uint8_t codes[kCount];
    load_vector(at, top);
    load_vector(at + W, bottom);
    load_vector(indices + (index_plane * h + oh) * w + kCount * item, codes);
    const int shift = p.packed ? static_cast<int>(c % 4) * 2 : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int code = p.packed ? codes[i] >> shift & 3 : codes[i];
      const T left = code == 2 ? bottom[2 * i] : top[2 * i];
      const T right = code == 3 ? bottom[2 * i + 1] : top[2 * i + 1];
      named[i] = code > 3 ? T(0) : code % 2 == 0 ? left : right;
    }
    store_vector(y + (plane * h + oh) * w + kCount * item, named);
  });
}

// Any windows: one thread picks one value; with last_only, 0 where a later window names its pixel.
template <typename T>
__global__ void by_index(Pool2d p, const T* x, const uint8_t* indices, bool last_only, T* y) {
  const bool channels_last = p.channels_last();
  const int C = channels_last ? static_cast<int>(p.C) : 1, h = p.rows.count, w = p.cols.count;
  const int64_t outers = channels_last ? p.N : p.N * p.C;
  for_each_in_rows(outers, h, w * C, [&](int64_t outer, int oh, int item) {
    const int ow = item / C, c = item % C;
    const auto code = [&](int a, int b) { return code_of(p, indices, outer, c, a, b); };
    const int tap = code(oh, ow), r = tap / p.cols.kernel, s = tap % p.cols.kernel;
    const int ih = p.rows.start(oh) + r, iw = p.cols.start(ow) + s;
    const bool inside =
        r < p.rows.kernel && ih >= 0 && ih < p.rows.size && iw >= 0 && iw < p.cols.size;
    T value = T(0);
    if (inside && !(last_only && is_overwritten(p, code, oh, ow))) {
      value = x[((outer * p.rows.size + ih) * p.cols.size + iw) * C + c];
    }
    y[((outer * h + oh) * w + ow) * C + c] = value;
  });
}

// ---- host functions -----------------------------------------------------------------------------

// Unpooling that sums nothing and pooling by index only move bits: 16-bit types share their code.
template <typename T>
using Moved = std::conditional_t<sizeof(T) == 2, uint16_t, T>;

// Whether the accesses of one thread in channels-last images may be whole words.
template <typename T>
bool whole_lanes(const Pool2d& p, const T* x, const T* y, const uint8_t* indices) {
  return p.C % kLanes<T> == 0 && aligned_16(x, y, indices);
}

// Whether the 2x2 kernels for NCHW take this: whole packs of windows, and whole windows in a row.
template <typename T>
bool whole_rows(const Pool2d& p, const T* x, const T* y, const uint8_t* indices) {
  return !p.channels_last() && p.is_2x2() && p.cols.size == 2 * p.cols.count &&
         p.cols.count % (16 / sizeof(T)) == 0 && aligned_16(x, y, indices);
}

// Threads in a row of `pixels` pixels of channels-last images.
template <typename T>
int64_t row_items(const Pool2d& p, int64_t pixels) {
  FASTSEG_CHECK(pixels * p.C <= std::numeric_limits<int>::max(),
                "max_pool2d: a row of an image must have fewer than 2^31 values, got ",
                pixels * p.C);
  return pixels * ceil_div<int64_t>(p.C, kLanes<T>);
}

std::tuple<Tensor, Tensor> max_pool2d_cuda(const Tensor& image, IntPair kernel, IntPair stride,
                                           IntPair padding, bool ceil_mode, bool packed) {
  const Pool2d p = pool_of_image("max_pool2d", image, kernel, stride, padding, ceil_mode, packed);
  const DeviceGuard guard(image);
  const Tensor x = dense(image, p.layout);
  const int64_t h = p.rows.count, w = p.cols.count;
  Tensor y = empty_image(x, {p.N, p.C, h, w}, x.scalar_type(), p.layout);
  Tensor indices = empty_image(x, {p.N, p.index_channels(), h, w}, ScalarType::Byte, p.layout);
  if (y.numel() == 0) return {y, indices};
  uint8_t* codes = indices.mutable_data_ptr<uint8_t>();
  dispatch_floating(x, "max_pool2d", [&](auto tag) {
    using T = decltype(tag);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const cudaStream_t stream = current_stream(x);
    if (p.channels_last()) {
      const RowGrid g(p.N, h, row_items<T>(p, w));
      const bool square = p.rows.kernel == p.cols.kernel;
      auto* pool = square && p.rows.kernel == 2   ? &pool_channels_last<T, 2>
                   : square && p.rows.kernel == 3 ? &pool_channels_last<T, 3>
                                                  : &pool_channels_last<T, 0>;
      const bool aligned = whole_lanes(p, from, to, codes);
      launch(pool, g.grid, g.block, 0, stream, p, aligned, from, to, codes);
    } else if (whole_rows(p, from, to, codes) && p.rows.size >= 2 * p.rows.count) {
      const RowGrid g(p.N * p.index_channels(), h, w / (16 / sizeof(T)));
      launch(pool_nchw_2x2<T>, g.grid, g.block, 0, stream, p, from, to, codes);
    } else {
      const RowGrid g(p.N * p.index_channels(), h, w);
      launch(pool_nchw<T>, g.grid, g.block, 0, stream, p, from, to, codes);
    }
  });
  return {y, indices};
}

Tensor max_unpool2d_cuda(const Tensor& pooled, const Tensor& pooled_indices, IntPair kernel,
                         IntPair stride, IntPair padding, IntPair output_size, bool accumulate) {
  const Pool2d p =
      pool_of_indices("max_unpool2d", pooled, pooled_indices, output_size, kernel, stride, padding);
  FASTSEG_CHECK(pooled.size(2) == p.rows.count && pooled.size(3) == p.cols.count,
                "max_unpool2d: x and indices must have one height and width, got ", pooled.size(2),
                "x", pooled.size(3), " and ", p.rows.count, "x", p.cols.count);
  const DeviceGuard guard(pooled);
  const Tensor x = dense(pooled, p.layout), indices = dense(pooled_indices, p.layout);
  Tensor out = empty_image(x, {p.N, p.C, p.rows.size, p.cols.size}, x.scalar_type(), p.layout);
  if (out.numel() == 0) return out;
  const uint8_t* codes = indices.const_data_ptr<uint8_t>();
  dispatch_floating(x, "max_unpool2d", [&](auto tag) {
    using T = decltype(tag);
    using M = Moved<T>;
    const M* from = static_cast<const M*>(x.const_data_ptr());
    M* to = static_cast<M*>(out.mutable_data_ptr());
    const cudaStream_t stream = current_stream(x);
    const int64_t H = p.rows.size, W = p.cols.size;
    const bool aligned = p.channels_last() && whole_lanes(p, from, to, codes);
    if (p.channels_last() && p.is_2x2()) {
      const RowGrid g(p.N, ceil_div<int64_t>(H, 2), row_items<M>(p, ceil_div<int64_t>(W, 2)));
      launch(unpool_channels_last_2x2<M>, g.grid, g.block, 0, stream, p, aligned, from, codes, to);
    } else if (whole_rows(p, from, to, codes)) {
      const RowGrid g(p.N * p.C, ceil_div<int64_t>(H, 2), W / 2 / (16 / sizeof(M)));
      launch(unpool_nchw_2x2<M>, g.grid, g.block, 0, stream, p, from, codes, to);
    } else {
      const RowGrid g =
          p.channels_last() ? RowGrid(p.N, H, row_items<M>(p, W)) : RowGrid(p.N * p.C, H, W);
      if (accumulate && p.overlap()) {
        auto* sum = p.channels_last() ? &unpool<T, true, kLanes<T>> : &unpool<T, true, 1>;
        launch(sum, g.grid, g.block, 0, stream, p, aligned, x.const_data_ptr<T>(), codes,
               out.mutable_data_ptr<T>());
      } else {
        auto* last = p.channels_last() ? &unpool<M, false, kLanes<M>> : &unpool<M, false, 1>;
        launch(last, g.grid, g.block, 0, stream, p, aligned, from, codes, to);
      }
    }
  });
  return out;
}

Tensor max_pool2d_by_index_cuda(const Tensor& image, const Tensor& image_indices, IntPair kernel,
                                IntPair stride, IntPair padding, bool last_only) {
  const Pool2d p =
      pool_of_indices("max_pool2d_by_index", image, image_indices, {}, kernel, stride, padding);
  const DeviceGuard guard(image);
  const Tensor x = dense(image, p.layout), indices = dense(image_indices, p.layout);
  const int64_t h = p.rows.count, w = p.cols.count;
  Tensor y = empty_image(x, {p.N, p.C, h, w}, x.scalar_type(), p.layout);
  if (y.numel() == 0) return y;
  const uint8_t* codes = indices.const_data_ptr<uint8_t>();
  dispatch_floating(x, "max_pool2d_by_index", [&](auto tag) {
    using M = Moved<decltype(tag)>;
    const M* from = static_cast<const M*>(x.const_data_ptr());
    M* to = static_cast<M*>(y.mutable_data_ptr());
    const cudaStream_t stream = current_stream(x);
    if (p.channels_last() && p.is_2x2()) {
      const RowGrid g(p.N, h, row_items<M>(p, w));
      const bool aligned = whole_lanes(p, from, to, codes);
      launch(by_index_channels_last_2x2<M>, g.grid, g.block, 0, stream, p, aligned, from, codes,
             to);
    } else if (whole_rows(p, from, to, codes) && p.rows.size >= 2 * p.rows.count) {
      const RowGrid g(p.N * p.C, h, w / (16 / sizeof(M)));
      launch(by_index_nchw_2x2<M>, g.grid, g.block, 0, stream, p, from, codes, to);
    } else {
      const bool channels_last = p.channels_last();
      const RowGrid g(channels_last ? p.N : p.N * p.C, h, channels_last ? w * p.C : w);
      launch(by_index<M>, g.grid, g.block, 0, stream, p, from, codes, last_only, to);
    }
  });
  return y;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cuda));
  m.impl("max_unpool2d", TORCH_BOX(&max_unpool2d_cuda));
  m.impl("max_pool2d_by_index", TORCH_BOX(&max_pool2d_by_index_cuda));
}

}  // namespace fastseg
