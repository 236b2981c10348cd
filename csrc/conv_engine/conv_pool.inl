// Max pooling by 2x2 windows with stride 2 on either side of a convolution, so that the image at
// full size is neither written nor read again: a tile of outputs is pooled before it leaves, a tile
// of inputs unpooled as it is loaded. Codes are those of csrc/max_unpool: row * 2 + column.

typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));
typedef Bytes UnalignedBytes __attribute__((aligned(1)));

// kLanes pooled values where their codes name this tap of the window, 0 elsewhere.
template <typename T>
FASTSEG_INLINE Vec unpool(const T* values, const uint8_t* codes, uint32_t tap) {
#if FASTSEG_ISA_LEVEL >= 2
  // Two instructions; the comparison below takes four and 64 channels 10 ms instead of 5.
  if constexpr (std::is_same_v<T, float>) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __mmask16 named = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(tap)));
    return (Vec)_mm512_maskz_loadu_ps(named, values);
  }
#endif
  const Bytes bytes = *reinterpret_cast<const UnalignedBytes*>(codes);
  const Words named = (Words)(__builtin_convertvector(bytes, Words) == tap);
  return (Vec)((Words)load(values) & named);
}

// The pixels of a tile that lies inside the image; every address is a base and strides. The asm
// keeps the compiler from working out the addresses of all pixels and keeping them on the stack.
template <typename T>
struct Window {
  static constexpr int kStep = 1;  // pixels that share a value
  const T* values;
  int64_t row, pixel;  // strides

  const T* values_of(int i, int j) const { return values + i * row + j * pixel; }
  template <int kHeight>
  FASTSEG_MEMBER_INLINE void column(int j, int64_t c, Vec (&d)[kHeight]) const {
    const T* from = values + j * pixel + c;
    asm("" : "+r"(from));
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) d[i] = load(from + i * row);
  }
};

template <typename T>
struct UnpooledWindow {
  static constexpr int kStep = 2;
  const T* values;  // the pooled pixel that the tile begins in
  const uint8_t* codes;
  int64_t row, pixel, code_row, code_pixel;  // strides
  int64_t odd_y, odd_x;                      // 1 where it begins in the second half of that

  const T* values_of(int i, int j) const { return values + i / 2 * row + j / 2 * pixel; }
  template <int kHeight>
  FASTSEG_MEMBER_INLINE void column(int j, int64_t c, Vec (&d)[kHeight]) const {
    const int64_t across = (j + odd_x) / 2;
    // The rows of even and of odd i begin in the same pooled pixel or in neighbours.
    const T* from[2] = {values + across * pixel + c};
    const uint8_t* code[2] = {codes + across * code_pixel + c};
    from[1] = from[0] + odd_y * row;
    code[1] = code[0] + odd_y * code_row;
    asm("" : "+r"(from[0]), "+r"(from[1]), "+r"(code[0]), "+r"(code[1]));
    const uint32_t first = static_cast<uint32_t>(odd_y * 2 + (j + odd_x) % 2);
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
      d[i] = unpool(from[i % 2] + i / 2 * row, code[i % 2] + i / 2 * code_row, first ^ (i % 2 * 2));
    }
  }
};

// Pixels of the input, as transforms read them.
template <typename T>
struct PlainPixel {
  const T* values;

  // Whether a tile of height x width pixels that begins at (y, x) is one window of the image.
  template <class Conv>
  static bool in_window(const Conv& conv, int64_t y, int64_t x, int64_t height, int64_t width) {
    return y >= 0 && y + (height - 1) * conv.dilation_h < conv.H && x >= 0 &&
           x + (width - 1) * conv.dilation_w < conv.W;
  }
  template <class Conv>
  static Window<T> window(const Conv& conv, int64_t n, int64_t y, int64_t x) {
    return {conv.x.at(n, y, x), conv.dilation_h * conv.x.row, conv.dilation_w * conv.x.pixel};
  }

  template <class Conv>
  static PlainPixel at(const Conv& conv, int64_t n, int64_t y, int64_t x) {
    return {conv.x.at(n, y, x)};
  }
  static PlainPixel of(const T* values) { return {values}; }
  FASTSEG_MEMBER_INLINE Vec vector(int64_t c) const { return load(values + c); }
  T value(int64_t c) const { return values[c]; }
};

template <typename T>
struct UnpooledPixel {
  const T* values;  // of its window
  const uint8_t* codes;
  uint32_t tap;  // its own code

  template <class Conv>
  static bool in_window(const Conv& conv, int64_t y, int64_t x, int64_t height, int64_t width) {
    const int64_t y_end = conv.H < 2 * conv.Hp ? conv.H : 2 * conv.Hp;
    const int64_t x_end = conv.W < 2 * conv.Wp ? conv.W : 2 * conv.Wp;
    return conv.dilation_h == 1 && conv.dilation_w == 1 && y >= 0 && y + height <= y_end &&
           x >= 0 && x + width <= x_end;
  }
  template <class Conv>
  static UnpooledWindow<T> window(const Conv& conv, int64_t n, int64_t y, int64_t x) {
    return {conv.x.at(n, y / 2, x / 2),
            conv.x_codes.at(n, y / 2, x / 2),
            conv.x.row,
            conv.x.pixel,
            conv.x_codes.row,
            conv.x_codes.pixel,
            y % 2,
            x % 2};
  }
  template <class Conv>
  static UnpooledPixel at(const Conv& conv, int64_t n, int64_t y, int64_t x) {
    if (y / 2 >= conv.Hp || x / 2 >= conv.Wp) return {conv.x.data, conv.x_codes.data, 4};
    return {conv.x.at(n, y / 2, x / 2), conv.x_codes.at(n, y / 2, x / 2),
            static_cast<uint32_t>(y % 2 * 2 + x % 2)};
  }
  static UnpooledPixel of(const T* zeros) {
    return {zeros, reinterpret_cast<const uint8_t*>(zeros), 4};
  }
  FASTSEG_MEMBER_INLINE Vec vector(int64_t c) const { return unpool(values + c, codes + c, tap); }
  T value(int64_t c) const { return codes[c] == tap ? values[c] : T(0); }
};

// The pixels of any tile, each at an address of its own.
template <class Pixel, int kHeight, int kWidth>
struct Pixels {
  static constexpr int kStep = 1;
  Pixel at[kHeight][kWidth];

  auto values_of(int i, int j) const { return at[i][j].values; }
  FASTSEG_MEMBER_INLINE void column(int j, int64_t c, Vec (&d)[kHeight]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) d[i] = at[i][j].vector(c);
  }
};

// As it will be read again.
template <typename T>
FASTSEG_INLINE Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return (Vec)(__builtin_convertvector(narrow(v), Words) << 16);
  }
}

// The larger of best and v, and its place in the window. The first maximum counts, or the last NaN,
// as in csrc/max_unpool.
FASTSEG_INLINE void take_larger(Vec v, uint32_t tap, Vec& best, Words& code) {
#if FASTSEG_ISA_LEVEL >= 2
  const __m512 value = (__m512)v;
  const auto take = static_cast<__mmask16>(_mm512_cmp_ps_mask(value, (__m512)best, _CMP_GT_OQ) |
                                           _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
  best = (Vec)_mm512_mask_mov_ps((__m512)best, take, value);
  code = (Words)_mm512_mask_set1_epi32((__m512i)code, take, static_cast<int>(tap));
#else
  const Words take = (Words)(v > best) | (Words)(v != v);
  best = take ? v : best;
  code = take ? Words{} + tap : code;
#endif
}

// The maxima of a whole window, its values in the order of their codes; `codes` may be null.
template <typename T>
FASTSEG_INLINE void pool_window(Vec v0, Vec v1, Vec v2, Vec v3, T* to, uint8_t* codes) {
  Vec best = v0;
  Words code{};
  take_larger(v1, 1, best, code);
  take_larger(v2, 2, best, code);
  take_larger(v3, 3, best, code);
  store(to, best);
  if (codes) *reinterpret_cast<UnalignedBytes*>(codes) = __builtin_convertvector(code, Bytes);
}

// Output channels [k, k + columns) of a tile of kOut x kOut pixels whose first lies at (oy, ox),
// even coordinates: no window reaches over a tile.
template <int kOut, class Conv>
static void pool_tile(const Conv& conv, int64_t n, int64_t oy, int64_t ox, int64_t k,
                      int64_t columns, const float (&sums)[kOut][kOut][kPanel]) {
  using T = typename Conv::Storage;
  for (int i = 0; i < kOut && oy + i < conv.Ho; i += 2) {
    for (int j = 0; j < kOut && ox + j < conv.Wo; j += 2) {
      const int64_t wy = (oy + i) / 2, wx = (ox + j) / 2;
      const bool pooled = wy < conv.Hp && wx < conv.Wp;  // an odd border may have no window
      for (int64_t l = 0; l < columns; l += kLanes) {
        const int64_t rest = columns - l < kLanes ? columns - l : kLanes;
        Vec best{};
        Words code{};
        for (uint32_t tap = 0; tap < 4; ++tap) {
          const int r = i + tap / 2, s = j + tap % 2;
          if (oy + r >= conv.Ho || ox + s >= conv.Wo) continue;
          Vec added{};
          if (conv.residual.data) {
            const T* from = conv.residual.at(n, oy + r, ox + s) + k + l;
            added = rest == kLanes ? load(from) : load_part(from, rest);
          }
          const Vec v =
              rounded<T>(finish(conv, load(sums[r][s] + l), load(conv.bias + k + l), added));
          if (conv.y.data) {
            T* y = conv.y.at(n, oy + r, ox + s) + k + l;
            if (rest == kLanes) {
              store_output(conv, v, y);
            } else {
              store_part(y, rest, v);
            }
          }
          if (tap == 0) {
            best = v;
          } else {
            take_larger(v, tap, best, code);
          }
        }
        if (!pooled) continue;
        T* to = conv.pooled.at(n, wy, wx) + k + l;
        if (rest == kLanes) {
          store(to, best);
        } else {
          store_part(to, rest, best);
        }
        if (conv.codes.data) {
          const Bytes bytes = __builtin_convertvector(code, Bytes);
          std::memcpy(conv.codes.at(n, wy, wx) + k + l, &bytes, rest);
        }
      }
    }
  }
}
