// Loops of max_pool2d, max_unpool2d and max_pool2d_by_index over a range of output rows. Compiled
// once per instruction set (common/isa.h); plain loops that the compiler vectorises: over the
// channels of a pixel in channels-last images, over the pixels of a row in NCHW.

#include "common/convert.inl"

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

// yes ? a : b on the bits. The compiler would move a load or store to where `yes` holds, and
// control flow or masked access with a stride is not vectorised.
template <size_t kBytes>
struct Unsigned;
template <>
struct Unsigned<1> {
  using type = uint8_t;
};
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};
template <typename T>
inline T choose(bool yes, T a, T b) {
  using Bits = typename Unsigned<sizeof(T)>::type;
  Bits a_bits, b_bits;
  std::memcpy(&a_bits, &a, sizeof(T));
  std::memcpy(&b_bits, &b, sizeof(T));
  const Bits mask = static_cast<Bits>(-static_cast<Bits>(yes));
  const Bits bits = static_cast<Bits>((a_bits & mask) | (b_bits & ~mask));
  T chosen;
  std::memcpy(&chosen, &bits, sizeof(T));
  return chosen;
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

// A tap meets each stride-th column of a row. Split, a row holds these columns together: column
// place * stride + phase at [phase * run + place]. Then all windows of a tap are neighbours; loads
// and stores with a stride would not fill the vector registers. Tap t of window w is in this phase
// at place w + shift.
struct Phase {
  int phase, shift;
};
inline Phase phase_of(const WindowAxis& axis, int tap) {
  const int offset = tap - axis.padding, rest = offset % axis.stride;
  const int phase = rest < 0 ? rest + axis.stride : rest;
  return {phase, (offset - phase) / axis.stride};
}
template <typename T>
inline void split_columns(const T* row, int64_t size, int64_t stride, T* split, int64_t run) {
  if (stride == 2) {
    in_blocks(size / 2, [&](int64_t i) {
      split[i] = row[2 * i];
      split[run + i] = row[2 * i + 1];
    });
    if (size % 2 != 0) split[size / 2] = row[size - 1];
    return;
  }
  for (int64_t phase = 0; phase < stride; ++phase) {
    for (int64_t c = phase, i = phase * run; c < size; c += stride) split[i++] = row[c];
  }
}

// The windows whose tap `tap` lies inside the image, along one axis.
struct Windows {
  int first, end;
};
inline Windows windows_inside(const WindowAxis& axis, int tap) {
  const int before = axis.padding - tap, after = axis.size - 1 + before;
  const int first = before > 0 ? (before + axis.stride - 1) / axis.stride : 0;
  const int end = after < 0 ? 0 : after / axis.stride + 1;
  return {first, end < axis.count ? end : axis.count};
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
          y[c] = choose(take, values[c], y[c]);
          codes[c] = choose(take, tap, codes[c]);
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

// One row of windows of one plane, tap by tap. `split` is space for a row of the image.
template <typename T>
void pool_row(const Pool2d& p, const typename Order<T>::Bits* plane, int oh,
              typename Order<T>::Bits* y, uint8_t* codes, typename Order<T>::Bits* split) {
  const WindowAxis& axis = p.cols;
  const Taps rows = taps_inside(p.rows, oh);
  const auto* band = plane + int64_t{p.rows.start(oh)} * axis.size;
  if (p.is_2x2() && rows.end == 2 && 2 * axis.count <= axis.size) {
    return pool_row_2x2<T>(band, band + axis.size, axis.count, y, codes);
  }
  for (int ow = 0; ow < axis.count; ++ow) {
    const int s = taps_inside(axis, ow).first;
    y[ow] = band[int64_t{rows.first} * axis.size + axis.start(ow) + s];
    codes[ow] = static_cast<uint8_t>(rows.first * axis.kernel + s);
  }
  const int run = (axis.size - 1) / axis.stride + 1;
  for (int r = rows.first; r < rows.end; ++r) {
    split_columns(band + int64_t{r} * axis.size, axis.size, axis.stride, split, run);
    for (int s = 0; s < axis.kernel; ++s) {
      // The first tap of a window meets itself here: it is not larger than the best, and if it is
      // NaN nothing changes.
      const Windows windows = windows_inside(axis, s);
      const auto tap = static_cast<uint8_t>(r * axis.kernel + s);
      const auto* x = split + phase_of(axis, s).phase * run + phase_of(axis, s).shift;
      in_blocks(windows.end - windows.first, [&](int64_t i) {
        const int64_t ow = windows.first + i;
        const bool take = Order<T>::replaces(x[ow], y[ow]);
        y[ow] = choose(take, x[ow], y[ow]);
        codes[ow] = choose(take, tap, codes[ow]);
      });
    }
  }
}

// Rows [begin, end) of all windows: (n, oh) channels last, (n, c, oh) in NCHW with four channels at
// a time if packed. `scratch` holds four rows of codes of an image row or all channels, zeroed,
// `split_values` a row of the image.
template <typename T>
void pool_rows(const Pool2d& p, const T* x_values, T* y_values, uint8_t* indices, uint8_t* scratch,
               T* split_values, int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const typename Order<T>::Bits*>(x_values);
  auto* y = reinterpret_cast<typename Order<T>::Bits*>(y_values);
  auto* split = reinterpret_cast<typename Order<T>::Bits*>(split_values);
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
      pool_row<T>(p, x + outer * plane, oh, y + task * w, index_row, split);
      continue;
    }
    const int64_t n = outer / p.index_channels(), c = outer % p.index_channels() * 4;
    for (int k = 0; k < 4; ++k) {
      uint8_t* codes = scratch + k * w;
      if (c + k < p.C) {
        const int64_t channel = n * p.C + c + k;
        pool_row<T>(p, x + channel * plane, oh, y + (channel * h + oh) * w, codes, split);
      }
      for (int64_t i = 0; i < w; ++i) {
        const int bits = c + k < p.C ? codes[i] << 2 * k : 0;
        index_row[i] = static_cast<uint8_t>(k == 0 ? bits : index_row[i] | bits);
      }
    }
  }
}

// ---- max_unpool2d -------------------------------------------------------------------------------

// `count` values of x as Acc: x itself, or a copy of 16-bit values in `wide`.
template <typename T, typename Acc>
inline const Acc* as_wide(const T* x, Acc* wide, int64_t count) {
  if constexpr (std::is_same_v<T, Acc>) {
    return x;
  } else {
    widen(x, wide, count);
    return wide;
  }
}

// Where the pixels that codes name lie, counted from the corner of their window: -1 for codes that
// name none, or one outside `rows` and `cols`.
class Places {
 public:
  Places() {
    for (int64_t& place : places_) place = -1;
  }
  void set(const Pool2d& p, Taps rows, Taps cols, int64_t pixel) {
    if (rows == rows_ && cols == cols_) return;
    rows_ = rows, cols_ = cols;
    for (int r = 0; r < p.rows.kernel; ++r) {
      for (int s = 0; s < p.cols.kernel; ++s) {
        const bool inside = rows.first <= r && r < rows.end && cols.first <= s && s < cols.end;
        places_[r * p.cols.kernel + s] = inside ? (int64_t{r} * p.cols.size + s) * pixel : -1;
      }
    }
  }
  int64_t operator[](uint8_t code) const { return places_[code]; }

 private:
  Taps rows_{}, cols_{};
  int64_t places_[256];
};

// Rows [top, bottom) of image n (channels last) or plane n * C + c (NCHW), `outer`: window by
// window in row-major order, every value goes where its code says. `buffer` holds, where T is not
// Acc, the channels of a pixel or a row of windows, and the rows in reach of a window and the next.
template <bool accumulate, typename T, typename Acc>
void unpool_band(const Pool2d& p, const T* x, const uint8_t* indices, int64_t outer, int top,
                 int bottom, T* out, Acc* buffer, uint8_t* scratch) {
  constexpr bool in_place = std::is_same_v<T, Acc>;
  const WindowAxis &rows = p.rows, &cols = p.cols;
  const bool channels_last = p.channels_last();
  const int64_t C = channels_last ? p.C : 1, row_size = cols.size * C;
  Acc* const wide = buffer;
  // Of rows from `base` on; up to `cleared` they are zero or in use.
  Acc* sums = buffer + (channels_last ? C : cols.count);
  if constexpr (in_place) sums = out;
  int base = top, cleared = top;
  const auto clear = [&](int end) {
    if (end > bottom) end = bottom;
    if (end <= cleared) return;
    std::memset(sums + (cleared - base) * row_size, 0, (end - cleared) * row_size * sizeof(Acc));
    cleared = end;
  };
  const auto finish = [&](int end) {  // rows before `end`
    clear(end);
    if constexpr (!in_place) {
      if (end <= base) return;
      narrow(sums, out + (base - top) * row_size, (end - base) * row_size);
      std::memmove(sums, sums + (end - base) * row_size, (cleared - end) * row_size * sizeof(Acc));
      base = end;
    }
  };
  const auto put = [sums](int64_t corner, int64_t place, Acc value) {
    if (place < 0) return;
    if constexpr (accumulate) {
      sums[corner + place] += value;
    } else {
      sums[corner + place] = value;
    }
  };
  // Windows whose columns all lie inside.
  const int inner = cols.padding == 0 ? 0 : (cols.padding - 1) / cols.stride + 1;
  const int inner_end = cols.size < cols.kernel - cols.padding
                            ? 0
                            : (cols.size - cols.kernel + cols.padding) / cols.stride + 1;
  Places places;
  for (int oh = rows.first(top); oh <= rows.last(bottom - 1); ++oh) {
    const int start = rows.start(oh);
    const Taps here{start < top ? top - start : 0,
                    start + rows.kernel > bottom ? bottom - start : rows.kernel};
    finish(start);
    clear(start + rows.kernel);
    const int64_t first = (outer * rows.count + oh) * cols.count;
    const uint8_t* row_codes = indices + first * p.index_channels();
    const Acc* row_values = nullptr;
    if (!channels_last) {
      row_codes = p.packed ? unpack_row(p, indices, outer, oh, scratch) : indices + first;
      row_values = as_wide(x + first, wide, cols.count);
    }
    for (int ow = 0, next; ow < cols.count; ow = next) {
      const bool inside = inner <= ow && ow < inner_end;
      next = inside ? std::min(inner_end, cols.count) : ow + 1;
      places.set(p, here, taps_inside(cols, ow), C);
      const int64_t corner = (start - base) * row_size + cols.start(ow) * C, step = cols.stride * C;
      if (!channels_last) {
        for (int w = 0; w < next - ow; ++w) {
          put(corner + w * step, places[row_codes[ow + w]], row_values[ow + w]);
        }
        continue;
      }
      for (int w = 0; w < next - ow; ++w) {
        const uint8_t* codes = row_codes + (ow + w) * p.index_channels();
        if (p.packed) {
          unpack_channels(codes, scratch, p.index_channels());
          codes = scratch;
        }
        const Acc* values = as_wide(x + (first + ow + w) * C, wide, C);
        for (int64_t c = 0; c < C; ++c) put(corner + w * step + c, places[codes[c]], values[c]);
      }
    }
  }
  finish(bottom);
}

// Output row ih of image or plane `outer` where 2x2 windows tile it: written in place, as a buffer
// would cost a second pass.
template <typename T>
void unpool_row_2x2(const Pool2d& p, const T* x, const uint8_t* indices, int64_t outer, int ih,
                    T* __restrict__ row, uint8_t* scratch) {
  const int64_t C = p.channels_last() ? p.C : 1, w = p.cols.count;
  const int64_t window = (outer * p.rows.count + ih / 2) * w;
  const int tap = ih % 2 * 2;
  int64_t done = 0;
  if (ih / 2 >= p.rows.count) {
    // a last row that no window reaches
  } else if (p.channels_last()) {
    for (int64_t ow = 0; ow < w; ++ow) {
      const uint8_t* codes = indices + (window + ow) * p.index_channels();
      if (p.packed) {
        unpack_channels(codes, scratch, p.index_channels());
        codes = scratch;
      }
      const T* values = x + (window + ow) * C;
      for (int s = 0; s < 2; ++s) {
        T* __restrict__ pixel = row + (2 * ow + s) * C;
        in_blocks(C, [&](int64_t c) { pixel[c] = choose(codes[c] == tap + s, values[c], T(0)); });
      }
    }
    done = 2 * w * C;
  } else {
    const uint8_t* codes =
        p.packed ? unpack_row(p, indices, outer, ih / 2, scratch) : indices + window;
    const T* values = x + window;
    in_blocks(w, [&](int64_t ow) {
      row[2 * ow] = choose(codes[ow] == tap, values[ow], T(0));
      row[2 * ow + 1] = choose(codes[ow] == tap + 1, values[ow], T(0));
    });
    done = 2 * w;
  }
  for (int64_t i = done; i < p.cols.size * C; ++i) row[i] = T(0);
}

// Rows [begin, end) of the output: (n, ih) channels last, (n, c, ih) in NCHW.
template <bool accumulate, typename T, typename Acc>
void unpool_rows(const Pool2d& p, const T* x, const uint8_t* indices, T* out, Acc* buffer,
                 uint8_t* scratch, int64_t begin, int64_t end) {
  const int64_t row_size = p.cols.size * (p.channels_last() ? p.C : 1);
  const bool tiled = p.is_2x2() && 2 * p.cols.count <= p.cols.size;
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t outer = task / p.rows.size;  // n, or n * C + c
    const int top = static_cast<int>(task % p.rows.size);
    next = tiled ? task + 1 : std::min(end, (outer + 1) * p.rows.size);
    T* row = out + task * row_size;
    if (tiled) {
      unpool_row_2x2(p, x, indices, outer, top, row, scratch);
    } else {
      const int bottom = top + static_cast<int>(next - task);
      unpool_band<accumulate>(p, x, indices, outer, top, bottom, row, buffer, scratch);
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
      in_blocks(C, [&](int64_t c) { y[c] = choose(codes[c] == tap, values[c], y[c]); });
    }
  }
}

// One row of windows of one plane, tap by tap. `split` is space for a row of the image.
template <typename T>
void by_index_row(const Pool2d& p, const T* plane, int oh, const uint8_t* codes, T* y, T* split) {
  const WindowAxis& axis = p.cols;
  const Taps rows = taps_inside(p.rows, oh);
  const T* band = plane + int64_t{p.rows.start(oh)} * axis.size;
  const int run = (axis.size - 1) / axis.stride + 1;
  for (int ow = 0; ow < axis.count; ++ow) y[ow] = T(0);
  for (int r = rows.first; r < rows.end; ++r) {
    split_columns(band + int64_t{r} * axis.size, axis.size, axis.stride, split, run);
    for (int s = 0; s < axis.kernel; ++s) {
      const Windows windows = windows_inside(axis, s);
      const int tap = r * axis.kernel + s;
      const T* x = split + phase_of(axis, s).phase * run + phase_of(axis, s).shift;
      in_blocks(windows.end - windows.first, [&](int64_t i) {
        const int64_t ow = windows.first + i;
        y[ow] = choose(codes[ow] == tap, x[ow], y[ow]);
      });
    }
  }
}

// Rows [begin, end) of all windows: (n, oh) channels last, (n, c, oh) in NCHW. With last_only, a
// window whose pixel a later window names as well gets 0.
template <typename T>
void by_index_rows(const Pool2d& p, const T* x, const uint8_t* indices, T* y, bool last_only,
                   uint8_t* scratch, T* split, int64_t begin, int64_t end) {
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
      by_index_row(p, image, oh, codes, target, split);
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
