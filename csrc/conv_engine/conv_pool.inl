// Max pooling by 2x2 windows with stride 2 on either side of a convolution, so that the image at
// full size is neither written nor read again: a tile of outputs is pooled before it leaves, a tile
// of inputs unpooled as it is loaded. Codes are those of csrc/max_unpool: row * 2 + column.

typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));
typedef Bytes UnalignedBytes __attribute__((aligned(1)));

// Pixels of the input, as transforms read them.
template <typename T>
struct PlainPixel {
  const T* values;

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
  static UnpooledPixel at(const Conv& conv, int64_t n, int64_t y, int64_t x) {
    if (y / 2 >= conv.Hp || x / 2 >= conv.Wp) return {conv.x.data, conv.x_codes.data, 4};
    return {conv.x.at(n, y / 2, x / 2), conv.x_codes.at(n, y / 2, x / 2),
            static_cast<uint32_t>(y % 2 * 2 + x % 2)};
  }
  static UnpooledPixel of(const T* zeros) {
    return {zeros, reinterpret_cast<const uint8_t*>(zeros), 4};
  }
  FASTSEG_MEMBER_INLINE Vec vector(int64_t c) const {
#if FASTSEG_ISA_LEVEL >= 2
    // Two instructions; the comparison below takes four and 64 channels 10 ms instead of 5.
    if constexpr (std::is_same_v<T, float>) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + c));
      const __mmask16 named = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(tap)));
      return (Vec)_mm512_maskz_loadu_ps(named, values + c);
    }
#endif
    const Bytes bytes = *reinterpret_cast<const UnalignedBytes*>(codes + c);
    const Words named = (Words)(__builtin_convertvector(bytes, Words) == tap);
    return (Vec)((Words)load(values + c) & named);
  }
  T value(int64_t c) const { return codes[c] == tap ? values[c] : T(0); }
};

// The pixels of a tile that lies inside the image, and those of any tile.
template <typename T>
struct Window {
  const T* values;
  int64_t row, pixel;  // strides

  template <int kHeight>
  FASTSEG_MEMBER_INLINE void column(int j, int64_t c, Vec (&d)[kHeight]) const {
    const T* from = values + j * pixel + c;
    asm("" : "+r"(from));  // else the address of every pixel is worked out and kept on the stack
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) d[i] = load(from + i * row);
  }
};

template <class Pixel, int kHeight, int kWidth>
struct Pixels {
  Pixel at[kHeight][kWidth];

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

// Output channels [k, k + columns) of a tile of kOut x kOut pixels whose first lies at (oy, ox),
// even coordinates: no window reaches over a tile. As in csrc/max_unpool the first maximum counts,
// or the last NaN.
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
          const Words take = tap == 0 ? ~Words{} : (Words)(v > best) | (Words)(v != v);
          best = take ? v : best;
          code = take ? Words{} + tap : code;
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
