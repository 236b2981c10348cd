// Window geometry of max_pool2d, max_unpool2d and max_pool2d_by_index, and the checks of their
// arguments: all that the CPU and the CUDA kernels share.
//
// An index says where in its window a maximum lies: row * kernel_width + column, counted from the
// window's corner before clipping to the image, in one uint8 (windows have up to 256 positions).
// 2x2 windows with stride 2 may pack it into 2 bits: byte (n, c / 4, oh, ow) of a tensor
// (N, ceil(C / 4), h, w) holds channels 4 * (c / 4) to 4 * (c / 4) + 3, the lowest bits first. Both
// forms have the layout (NCHW or channels last) of the image they belong to.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/layout.h"

namespace fastseg {

// One axis, rows or columns: `size` pixels and the `count` windows that slide over them.
struct WindowAxis {
  int size, count, kernel, stride, padding;

  // First pixel of a window; negative in the padding.
  FASTSEG_HOST_DEVICE int start(int window) const { return window * stride - padding; }

  // Windows first(pixel) to last(pixel) cover a pixel; none does where first > last.
  FASTSEG_HOST_DEVICE int first(int pixel) const {
    const int behind = pixel + padding - kernel;
    return behind < 0 ? 0 : behind / stride + 1;
  }
  FASTSEG_HOST_DEVICE int last(int pixel) const {
    const int window = (pixel + padding) / stride;
    return window < count ? window : count - 1;
  }
};

// The taps [first, end) of a window that lie inside the image, along one axis.
struct Taps {
  int first, end;
  FASTSEG_HOST_DEVICE int count() const { return end - first; }
  FASTSEG_HOST_DEVICE bool operator==(const Taps& t) const {
    return first == t.first && end == t.end;
  }
};
FASTSEG_HOST_DEVICE Taps taps_inside(const WindowAxis& axis, int window) {
  const int start = axis.start(window), room = axis.size - start;
  return {start < 0 ? -start : 0, room < axis.kernel ? room : axis.kernel};
}

struct Pool2d {
  int64_t N, C;
  WindowAxis rows, cols;
  bool packed;
  MemoryFormat layout;

  FASTSEG_HOST_DEVICE bool channels_last() const { return layout == MemoryFormat::ChannelsLast; }
  bool overlap() const { return rows.kernel > rows.stride || cols.kernel > cols.stride; }
  // 2x2 windows with stride 2 and no padding: the case with kernels of its own.
  bool is_2x2() const {
    const auto two = [](const WindowAxis& a) {
      return a.kernel == 2 && a.stride == 2 && a.padding == 0;
    };
    return two(rows) && two(cols);
  }
  // Channels of the index tensor.
  FASTSEG_HOST_DEVICE int64_t index_channels() const { return packed ? (C + 3) / 4 : C; }
};

// Whether a window after (oh, ow), in row-major order, names the same pixel. code(oh, ow) is the
// index of a window of this channel.
template <typename Code>
FASTSEG_HOST_DEVICE bool is_overwritten(const Pool2d& p, const Code& code, int oh, int ow) {
  const int ih = p.rows.start(oh) + code(oh, ow) / p.cols.kernel;
  const int iw = p.cols.start(ow) + code(oh, ow) % p.cols.kernel;
  for (int a = oh; a <= p.rows.last(ih); ++a) {
    for (int b = a == oh ? ow + 1 : p.cols.first(iw); b <= p.cols.last(iw); ++b) {
      if (code(a, b) == (ih - p.rows.start(a)) * p.cols.kernel + iw - p.cols.start(b)) return true;
    }
  }
  return false;
}

using IntPair = std::vector<int64_t>;  // (height, width)

// Fills in all but the windows' counts, and checks what pooling and unpooling have in common. An
// empty `size` stands for the size of x.
inline Pool2d pool_geometry(const char* op, const Tensor& x, IntPair size, const IntPair& kernel,
                            const IntPair& stride, const IntPair& padding) {
  FASTSEG_CHECK(x.dim() == 4, op, ": x must be (N, C, H, W), got ", x.dim(), " dimensions");
  if (size.empty()) size = {x.size(2), x.size(3)};
  for (const IntPair* pair :
       std::initializer_list<const IntPair*>{&size, &kernel, &stride, &padding}) {
    FASTSEG_CHECK(pair->size() == 2, op, ": sizes must be (height, width), got ", pair->size(),
                  " numbers");
  }
  const auto axis = [&](int a) {
    const int64_t k = kernel[a], s = stride[a], p = padding[a];
    FASTSEG_CHECK(1 <= k && k <= 256 && kernel[0] * kernel[1] <= 256, op,
                  ": kernel_size must have 1 to 256 positions (16x16), got ", kernel[0], "x",
                  kernel[1]);
    FASTSEG_CHECK(1 <= s && s <= 1 << 20, op, ": stride must be positive, got ", s);
    FASTSEG_CHECK(0 <= p && p <= k / 2, op, ": padding must be 0 to half the kernel size ", k,
                  ", got ", p);
    // Half the range, so that window corners and their sums stay in an int.
    FASTSEG_CHECK(1 <= size[a] && size[a] <= std::numeric_limits<int>::max() / 2, op,
                  ": image height and width must be 1 to 2^30, got ", size[a]);
    return WindowAxis{static_cast<int>(size[a]), 0, static_cast<int>(k), static_cast<int>(s),
                      static_cast<int>(p)};
  };
  return Pool2d{x.size(0), x.size(1), axis(0), axis(1), false, image_layout(x)};
}

// Geometry of pooling x. As in PyTorch, with ceil_mode a last window may hang over the edge, but
// not start beyond it.
inline Pool2d pool_of_image(const char* op, const Tensor& x, const IntPair& kernel,
                            const IntPair& stride, const IntPair& padding, bool ceil_mode,
                            bool packed) {
  Pool2d pool = pool_geometry(op, x, {}, kernel, stride, padding);
  for (WindowAxis* a : {&pool.rows, &pool.cols}) {
    const int room = a->size + 2 * a->padding - a->kernel + (ceil_mode ? a->stride - 1 : 0);
    FASTSEG_CHECK(room >= 0, op, ": the window must fit the padded image, got kernel size ",
                  a->kernel, " for ", a->size, " pixels and padding ", a->padding);
    a->count = room / a->stride + 1;
    if (ceil_mode && a->start(a->count - 1) >= a->size) --a->count;
  }
  FASTSEG_CHECK(!packed || pool.is_2x2(), op,
                ": packed indices need kernel_size 2, stride 2 and padding 0");
  pool.packed = packed;
  return pool;
}

// Geometry behind `indices`, for an image of `size` (height, width) with the channels of x.
inline Pool2d pool_of_indices(const char* op, const Tensor& x, const Tensor& indices,
                              const IntPair& size, const IntPair& kernel, const IntPair& stride,
                              const IntPair& padding) {
  Pool2d pool = pool_geometry(op, x, size, kernel, stride, padding);
  FASTSEG_CHECK(indices.scalar_type() == ScalarType::Byte && indices.is_cuda() == x.is_cuda(), op,
                ": indices must be the uint8 indices of max_pool2d on the device of x; convert "
                "PyTorch's with from_torch_indices");
  FASTSEG_CHECK(indices.dim() == 4 && indices.size(0) == pool.N, op,
                ": indices must be (N, C, h, w) with the N of x, ", pool.N, ", got ", indices.dim(),
                " dimensions and N = ", indices.dim() > 0 ? indices.size(0) : 0);
  pool.packed = indices.size(1) != pool.C;
  FASTSEG_CHECK(indices.size(1) == pool.index_channels() && (!pool.packed || pool.is_2x2()), op,
                ": indices must have the channels of x, or a fourth of them if packed (2x2, stride "
                "2), got ",
                indices.size(1), " for ", pool.C);
  pool.rows.count = static_cast<int>(indices.size(2));
  pool.cols.count = static_cast<int>(indices.size(3));
  for (const WindowAxis& a : {pool.rows, pool.cols}) {
    const int64_t covered = int64_t{a.count - 1} * a.stride - 2 * a.padding + a.kernel;
    FASTSEG_CHECK(a.count >= 1 && covered - a.stride < a.size && a.size < covered + a.stride, op,
                  ": ", a.count, " windows belong to an image of ", covered - a.stride + 1, " to ",
                  covered + a.stride - 1, " pixels, got ", a.size);
  }
  return pool;
}

}  // namespace fastseg
