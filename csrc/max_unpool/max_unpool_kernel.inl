// Loops of max_pool2d, max_unpool2d and max_pool2d_by_index over a range of output rows. Compiled
// once per instruction set (common/isa.h); plain loops that the compiler vectorises: over the
// channels of a pixel in channels-last images, over the pixels of a row in NCHW.

// one(i) for i in [0, count), in vectors. Blocks of 64 fill the registers where bytes go with wider
// values, blocks of 16 serve short rows; the last block overlaps the one before instead of leaving
// a scalar tail. So one(i) must not depend on one(j), and running it twice must change nothing.
template <int kBlock, typename One>
inline void in_blocks_of(int64_t count, const One& one) {
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t begin = i + kBlock <= count ? i : count - kBlock;
#pragma GCC ivdep
    for (int64_t k = begin; k < begin + kBlock; ++k) one(k);
  }
}
template <typename One>
inline void in_blocks(int64_t count, const One& one) {
  if (count >= 64) return in_blocks_of<64>(count, one);
  if (count >= 16) return in_blocks_of<16>(count, one);
  for (int64_t i = 0; i < count; ++i) one(i);
}

// How values of T are compared: as themselves, or for 16-bit types as integers in the same order.
template <typename T>
struct Order {
  using Bits = T;
  using Code = decltype(sizeof(T) == 8 ? int64_t{} : int32_t{});
  static bool replaces(T value, T best) { return (value > best) | (value != value); }
};

// PyTorch's rule (a later value replaces the best if it is larger or NaN) on the bits of a 16-bit
// float. kInfinity is the bit pattern of infinity; NaN maps to 0x7fff, above everything; both zeros
// map to 0.
template <typename T, int kInfinity>
struct Order16 {
  using Bits = uint16_t;
  using Code = int16_t;
  static int16_t rank(uint16_t bits) {
    const int16_t magnitude = bits & 0x7fff;
    const int16_t sign = static_cast<int16_t>(bits) >> 15;  // 0 or -1
    const int16_t value = static_cast<int16_t>((magnitude ^ sign) - sign);
    const int16_t nan = static_cast<int16_t>(-(magnitude > kInfinity));  // a mask: `?:` is not
    return static_cast<int16_t>((value & ~nan) | (nan & 0x7fff));        // vectorised here
  }
  static bool replaces(uint16_t value, uint16_t best) {
    const int16_t v = rank(value);
    return (v > rank(best)) | (v == 0x7fff);
  }
};
template <>
struct Order<Half> : Order16<Half, 0x7c00> {};
template <>
struct Order<BFloat16> : Order16<BFloat16, 0x7f80> {};

// Four 2-bit codes of neighbouring channels to a byte and back, `count` bytes.
inline void pack_channels(const uint8_t* __restrict__ codes, uint8_t* __restrict__ bytes,
                          int64_t count) {
  in_blocks(count, [&](int64_t i) {
    uint32_t four;
    __builtin_memcpy(&four, codes + 4 * i, 4);
    bytes[i] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
  });
}
inline void unpack_channels(const uint8_t* __restrict__ bytes, uint8_t* __restrict__ codes,
                            int64_t count) {
  in_blocks(count, [&](int64_t i) {
    const uint32_t b = bytes[i];
    const uint32_t four = (b & 0x03) | (b & 0x0c) << 6 | (b & 0x30) << 12 | (b & 0xc0) << 18;
    __builtin_memcpy(codes + 4 * i, &four, 4);
  });
}

// The codes of row oh of plane `outer` = n * C + c, NCHW; they are put into `codes`.
inline const uint8_t* unpack_row(const Pool2d& p, const uint8_t* indices, int64_t outer, int oh,
                                 uint8_t* codes) {
  const int64_t group = outer / p.C * p.index_channels() + outer % p.C / 4;
  const uint8_t* bytes = indices + (group * p.rows.count + oh) * p.cols.count;
  const int shift = 2 * static_cast<int>(outer % p.C % 4);
  in_blocks(p.cols.count, [&](int64_t i) { codes[i] = bytes[i] >> shift & 3; });
  return codes;
}

// ---- max_pool2d ---------------------------------------------------------------------------------

// One window of all channels, tap by tap: reading all channels of a pixel before the next follows
// the order in memory (blocks of channels through all taps were three times slower from DRAM). The
// running best lives in y, which stays in the first-level cache.
template <typename T>
void pool_pixel(const typename Order<T>::Bits* __restrict__ x, int64_t row_stride, int64_t C,
                Taps rows, Taps cols, int width, typename Order<T>::Bits* __restrict__ y,
                uint8_t* __restrict__ codes) {
  for (int r = rows.first; r < rows.end; ++r) {
    for (int s = cols.first; s < cols.end; ++s) {
      const auto* __restrict__ values = x + r * row_stride + s * C;
      const auto tap = static_cast<uint8_t>(r * width + s);
      if (r == rows.first && s == cols.first) {
        in_blocks(C, [&](int64_t c) { y[c] = values[c], codes[c] = tap; });
      } else {
        in_blocks(C, [&](int64_t c) {
          const bool take = Order<T>::replaces(values[c], y[c]);
          y[c] = take ? values[c] : y[c];
          codes[c] = take ? tap : codes[c];
        });
      }
    }
  }
}

// One row of windows, channels last. `scratch` holds C codes, rounded up to four, the rest zero.
template <typename T>
void pool_row_channels_last(const Pool2d& p, const typename Order<T>::Bits* image, int oh,
                            typename Order<T>::Bits* y, uint8_t* indices, uint8_t* scratch) {
  const int64_t C = p.C, row_stride = p.cols.size * C;
  const Taps rows = taps_inside(p.rows, oh);
  const auto* band = image + p.rows.start(oh) * row_stride;
  for (int ow = 0; ow < p.cols.count; ++ow) {
    uint8_t* codes = p.packed ? scratch : indices;
    pool_pixel<T>(band + p.cols.start(ow) * C, row_stride, C, rows, taps_inside(p.cols, ow),
                  p.cols.kernel, y, codes);
    if (p.packed) pack_channels(codes, indices, p.index_channels());
    y += C;
    indices += p.index_channels();
  }
}

// One row of 2x2 windows of one plane.
template <typename T>
void pool_row_2x2(const typename Order<T>::Bits* __restrict__ top,
                  const typename Order<T>::Bits* __restrict__ bottom, int count,
                  typename Order<T>::Bits* __restrict__ y, uint8_t* __restrict__ codes) {
  in_blocks(count, [&](int64_t ow) {
    auto best = top[2 * ow];
    typename Order<T>::Code code = 0;
    const auto consider = [&](auto value, int tap) {
      const bool take = Order<T>::replaces(value, best);
      best = take ? value : best;
      code = take ? tap : code;
    };
    consider(top[2 * ow + 1], 1);
    consider(bottom[2 * ow], 2);
    consider(bottom[2 * ow + 1], 3);
    y[ow] = best;
    codes[ow] = static_cast<uint8_t>(code);
  });
}

// The tap of one column, for windows [first, end) of a row; kStride 0 stands for any stride.
template <typename T, int kStride>
void pool_tap(const typename Order<T>::Bits* __restrict__ x, int any_stride, int first, int end,
              uint8_t tap, typename Order<T>::Bits* __restrict__ y, uint8_t* __restrict__ codes) {
  const int64_t stride = kStride ? kStride : any_stride;
  for (int64_t ow = first; ow < end; ++ow) {
    const auto value = x[ow * stride];
    const bool take = Order<T>::replaces(value, y[ow]);
    y[ow] = take ? value : y[ow];
    codes[ow] = take ? tap : codes[ow];
  }
}

// One row of windows of one plane.
template <typename T>
void pool_row(const Pool2d& p, const typename Order<T>::Bits* plane, int oh,
              typename Order<T>::Bits* y, uint8_t* codes) {
  const WindowAxis& axis = p.cols;
  const Taps rows = taps_inside(p.rows, oh);
  const auto* band = plane + int64_t{p.rows.start(oh)} * axis.size;
  int begin = 0;
  if (p.is_2x2() && rows.end == 2) {
    begin = axis.size / 2 < axis.count ? axis.size / 2 : axis.count;
    pool_row_2x2<T>(band, band + axis.size, begin, y, codes);
  }
  for (int ow = begin; ow < axis.count; ++ow) {
    const int s = taps_inside(axis, ow).first;
    y[ow] = band[int64_t{rows.first} * axis.size + axis.start(ow) + s];
    codes[ow] = static_cast<uint8_t>(rows.first * axis.kernel + s);
  }
  for (int r = rows.first; r < rows.end && begin < axis.count; ++r) {
    for (int s = 0; s < axis.kernel; ++s) {
      // Windows whose tap s lies inside the image. The first tap of a window meets itself here: it
      // is not larger than the best, and if it is NaN nothing changes.
      const int before = axis.padding - s, after = axis.size - 1 + axis.padding - s;
      int first = before > 0 ? (before + axis.stride - 1) / axis.stride : 0;
      int end = after < 0 ? 0 : after / axis.stride + 1;
      first = first < begin ? begin : first;
      end = end > axis.count ? axis.count : end;
      const auto* x = band + int64_t{r} * axis.size + s - axis.padding;
      const auto tap = static_cast<uint8_t>(r * axis.kernel + s);
      if (axis.stride == 1) {
        pool_tap<T, 1>(x, 1, first, end, tap, y, codes);
      } else if (axis.stride == 2) {
        pool_tap<T, 2>(x, 2, first, end, tap, y, codes);
      } else {
        pool_tap<T, 0>(x, axis.stride, first, end, tap, y, codes);
      }
    }
  }
}

// Rows [begin, end) of all windows: (n, oh) channels last, (n, c, oh) in NCHW with four channels at
// a time if packed. `scratch` holds four rows of codes of an image row or all channels, zeroed.
template <typename T>
void pool_rows(const Pool2d& p, const T* x_values, T* y_values, uint8_t* indices, uint8_t* scratch,
               int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const typename Order<T>::Bits*>(x_values);
  auto* y = reinterpret_cast<typename Order<T>::Bits*>(y_values);
  const int64_t h = p.rows.count, w = p.cols.count, plane = int64_t{p.rows.size} * p.cols.size;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t outer = task / h;
    const int oh = static_cast<int>(task % h);
    if (p.channels_last()) {
      pool_row_channels_last<T>(p, x + outer * plane * p.C, oh, y + task * w * p.C,
                                indices + task * w * p.index_channels(), scratch);
      continue;
    }
    uint8_t* index_row = indices + task * w;
    if (!p.packed) {
      pool_row<T>(p, x + outer * plane, oh, y + task * w, index_row);
      continue;
    }
    const int64_t n = outer / p.index_channels(), c = outer % p.index_channels() * 4;
    for (int k = 0; k < 4; ++k) {
      uint8_t* codes = scratch + k * w;
      if (c + k < p.C) {
        const int64_t channel = n * p.C + c + k;
        pool_row<T>(p, x + channel * plane, oh, y + (channel * h + oh) * w, codes);
      }
      for (int64_t i = 0; i < w; ++i) {
        const int bits = c + k < p.C ? codes[i] << 2 * k : 0;
        index_row[i] = static_cast<uint8_t>(k == 0 ? bits : index_row[i] | bits);
      }
    }
  }
}

// ---- max_unpool2d -------------------------------------------------------------------------------

template <Meet kMeet, typename Acc, typename T>
inline Acc meet(bool named, T x, Acc old) {
  const Acc value = static_cast<Acc>(x);
  if constexpr (kMeet == Meet::kSum) return named ? old + value : old;
  return named ? value : kMeet == Meet::kLast ? old : Acc(0);
}

// One window of all channels: tap `tap` and the `width` - 1 after it, `C` values each, in `out`.
template <Meet kMeet, typename T, typename Acc>
void unpool_pixel(const T* __restrict__ x, const uint8_t* __restrict__ codes, int64_t C, int tap,
                  int width, Acc* __restrict__ out) {
  for (int s = 0; s < width; ++s, ++tap, out += C) {
    const auto one = [&](int64_t c) { out[c] = meet<kMeet>(codes[c] == tap, x[c], out[c]); };
    if constexpr (kMeet == Meet::kSum) {
      for (int64_t c = 0; c < C; ++c) one(c);
    } else {
      in_blocks(C, one);
    }
  }
}

// `count` windows of one row of a plane.
template <Meet kMeet, typename T, typename Acc>
void unpool_windows(const T* __restrict__ x, const uint8_t* __restrict__ codes, int count, int tap,
                    const WindowAxis& axis, Acc* __restrict__ out) {
  if (kMeet == Meet::kNever && axis.kernel == 2 && axis.stride == 2) {
    return in_blocks(count, [&](int64_t ow) {
      out[2 * ow] = meet<kMeet>(codes[ow] == tap, x[ow], Acc(0));
      out[2 * ow + 1] = meet<kMeet>(codes[ow] == tap + 1, x[ow], Acc(0));
    });
  }
  for (int ow = 0; ow < count; ++ow, out += axis.stride) {
    const unsigned s = static_cast<unsigned>(codes[ow] - tap);
    const bool named = s < static_cast<unsigned>(axis.kernel);  // without a branch: it is random
    Acc& pixel = out[named ? s : 0];
    pixel = meet<kMeet == Meet::kNever ? Meet::kLast : kMeet>(named, x[ow], pixel);
  }
}

// Output row ih of image or plane `outer`, windows [ow0, ow1): `target` is where window ow0 begins.
template <Meet kMeet, typename T, typename Acc>
void unpool_row(const Pool2d& p, const T* x, const uint8_t* indices, int64_t outer, int ih, int ow0,
                int ow1, Acc* target, uint8_t* scratch) {
  const int64_t h = p.rows.count, w = p.cols.count;
  for (int oh = p.rows.first(ih); oh <= p.rows.last(ih) && ow0 < ow1; ++oh) {
    const int tap = (ih - p.rows.start(oh)) * p.cols.kernel;
    const int64_t row = (outer * h + oh) * w;
    if (p.channels_last()) {
      Acc* pixel = target;
      for (int64_t ow = ow0; ow < ow1; ++ow, pixel += p.cols.stride * p.C) {
        const uint8_t* codes = indices + (row + ow) * p.index_channels();
        if (p.packed) {
          unpack_channels(codes, scratch, p.index_channels());
          codes = scratch;
        }
        unpool_pixel<kMeet>(x + (row + ow) * p.C, codes, p.C, tap, p.cols.kernel, pixel);
      }
    } else {
      const uint8_t* codes = indices + row + ow0;
      if (p.packed) codes = unpack_row(p, indices, outer, oh, scratch) + ow0;
      unpool_windows<kMeet>(x + row + ow0, codes, ow1 - ow0, tap, p.cols, target);
    }
  }
}

// Rows [begin, end) of the output: (n, ih) channels last, (n, c, ih) in NCHW.
template <Meet kMeet, typename T, typename Acc>
void unpool_rows(const Pool2d& p, const T* x, const uint8_t* indices, T* out, int piece,
                 Acc* buffer, uint8_t* scratch, int64_t begin, int64_t end) {
  const WindowAxis& cols = p.cols;
  const int64_t C = p.channels_last() ? p.C : 1;
  const int margin = cols.kernel - 1;
  // Windows that tile the row are written in place; a buffer would cost a second pass.
  const bool in_place = cols.kernel == cols.stride && cols.padding == 0 &&
                        cols.count * cols.kernel <= cols.size &&
                        (p.channels_last() || cols.kernel == 2);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t outer = task / p.rows.size;  // n, or n * C + c
    const int ih = static_cast<int>(task % p.rows.size);
    T* row = out + task * cols.size * C;
    if constexpr (kMeet == Meet::kNever) {
      if (in_place) {
        const int64_t tiled = p.rows.first(ih) <= p.rows.last(ih) ? cols.count * cols.kernel : 0;
        unpool_row<kMeet>(p, x, indices, outer, ih, 0, cols.count, row, scratch);
        for (int64_t i = tiled * C; i < cols.size * C; ++i) row[i] = T(0);
        continue;
      }
    }
    // Else the row is built in pieces of `piece` columns in `buffer`, which holds as many pixels
    // and a margin of kernel - 1 on both sides for windows that hang over.
    for (int i0 = 0; i0 < cols.size; i0 += piece) {
      const int i1 = cols.size - i0 < piece ? cols.size : i0 + piece;
      const int ow0 = cols.first(i0), ow1 = cols.last(i1 - 1) + 1;
      for (int64_t i = 0; i < (i1 - i0 + 2 * margin) * C; ++i) buffer[i] = Acc(0);
      unpool_row<kMeet>(p, x, indices, outer, ih, ow0, ow1,
                        buffer + (cols.start(ow0) - i0 + margin) * C, scratch);
      for (int64_t i = 0; i < (i1 - i0) * C; ++i) {
        row[i0 * C + i] = static_cast<T>(buffer[margin * C + i]);
      }
    }
  }
}

// ---- max_pool2d_by_index ------------------------------------------------------------------------

// One window of all channels: y[c] = the value its code names, 0 if that lies outside.
template <typename T>
void by_index_pixel(const T* __restrict__ x, int64_t row_stride, int64_t C, Taps rows, Taps cols,
                    int width, const uint8_t* __restrict__ codes, T* __restrict__ y) {
  for (int64_t c = 0; c < C; ++c) y[c] = T(0);
  for (int r = rows.first; r < rows.end; ++r) {
    for (int s = cols.first; s < cols.end; ++s) {
      const T* __restrict__ values = x + r * row_stride + s * C;
      const int tap = r * width + s;
      for (int64_t c = 0; c < C; ++c) y[c] = codes[c] == tap ? values[c] : y[c];
    }
  }
}

// One row of 2x2 windows of one plane.
template <typename T>
void by_index_row_2x2(const T* __restrict__ top, const T* __restrict__ bottom, int count,
                      const uint8_t* __restrict__ codes, T* __restrict__ y) {
  for (int ow = 0; ow < count; ++ow) {
    const T a = codes[ow] == 1 ? top[2 * ow + 1] : codes[ow] == 0 ? top[2 * ow] : T(0);
    const T b = codes[ow] == 2 ? bottom[2 * ow] : a;
    y[ow] = codes[ow] == 3 ? bottom[2 * ow + 1] : b;
  }
}

// One row of windows of one plane, any windows.
template <typename T>
void by_index_row(const Pool2d& p, const T* plane, int oh, const uint8_t* codes, T* y) {
  for (int ow = 0; ow < p.cols.count; ++ow) {
    const int r = codes[ow] / p.cols.kernel, s = codes[ow] % p.cols.kernel;
    const int ih = p.rows.start(oh) + r, iw = p.cols.start(ow) + s;
    const bool inside =
        r < p.rows.kernel && ih >= 0 && ih < p.rows.size && iw >= 0 && iw < p.cols.size;
    y[ow] = inside ? plane[int64_t{ih} * p.cols.size + iw] : T(0);
  }
}

// Rows [begin, end) of all windows: (n, oh) channels last, (n, c, oh) in NCHW. With last_only, a
// window whose pixel a later window names as well gets 0.
template <typename T>
void by_index_rows(const Pool2d& p, const T* x, const uint8_t* indices, T* y, bool last_only,
                   uint8_t* scratch, int64_t begin, int64_t end) {
  const bool channels_last = p.channels_last();
  const int64_t C = channels_last ? p.C : 1, h = p.rows.count, w = p.cols.count;
  const int64_t width = p.cols.size, plane = p.rows.size * width;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t outer = task / h;  // n, or n * C + c
    const int oh = static_cast<int>(task % h);
    const Taps rows = taps_inside(p.rows, oh);
    const T* image = x + outer * plane * C;
    T* target = y + task * w * C;
    if (channels_last) {
      for (int ow = 0; ow < w; ++ow) {
        const uint8_t* codes = indices + (task * w + ow) * p.index_channels();
        if (p.packed) {
          unpack_channels(codes, scratch, p.index_channels());
          codes = scratch;
        }
        const T* corner = image + (p.rows.start(oh) * width + p.cols.start(ow)) * C;
        by_index_pixel(corner, width * C, C, rows, taps_inside(p.cols, ow), p.cols.kernel, codes,
                       target + ow * C);
      }
    } else {
      const uint8_t* codes = indices + task * w;
      if (p.packed) codes = unpack_row(p, indices, outer, oh, scratch);
      if (p.is_2x2() && rows.end == 2 && 2 * w <= width) {
        const T* top = image + 2 * oh * width;
        by_index_row_2x2(top, top + width, static_cast<int>(w), codes, target);
      } else {
        by_index_row(p, image, oh, codes, target);
      }
    }
    if (last_only && p.overlap()) {
      const uint8_t* codes = indices + outer * h * w * C;
      for (int64_t i = 0; i < w * C; ++i) {
        const auto code = [&](int a, int b) { return codes[(a * w + b) * C + i % C]; };
        if (is_overwritten(p, code, oh, static_cast<int>(i / C))) target[i] = T(0);
      }
    }
  }
}
