// Convolutions to few channels, such as the scores of one class: a matrix product would compute a
// whole panel of 32. Here lanes are input channels, so that each output is one sum over registers.

constexpr int kNarrowPixels = 8;  // side by side: enough sums in flight, weights loaded once

// Weights [k][tap][channels, whole vectors] from the packed form of the matrix product.
template <class Conv>
static void unpack_narrow(const Conv& conv, float* weights) {
  using E = typename Conv::Operand;
  const int64_t taps = conv.R * conv.S, padded = round_up(conv.C, kLanes);
  for (int64_t k = 0; k < conv.K; ++k) {
    for (int64_t tap = 0; tap < taps; ++tap, weights += padded) {
      for (int64_t c = 0; c < padded; ++c) {
        const int64_t d = tap * conv.C + c, word = d / kPerWord<E>;
        weights[c] = c < conv.C
                         ? static_cast<float>(
                               conv.weight[(word * kPanel + k) * kPerWord<E> + d % kPerWord<E>])
                         : 0.0f;
      }
    }
  }
}

FASTSEG_INLINE float horizontal_sum(Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)v);
#else
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
#endif
}

// Lines [begin, end) of output, counted over (image, row). `sources` takes the inputs of
// kNarrowPixels pixels, `zeros` holds C of them.
template <class Conv, typename T = typename Conv::Storage>
static void narrow_conv(const Conv& conv, int64_t begin, int64_t end, const float* weights,
                        const T* zeros, const T** sources) {
  const int64_t taps = conv.R * conv.S, padded = round_up(conv.C, kLanes);
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / conv.Ho, oy = line % conv.Ho;
    for (int64_t ox = 0; ox < conv.Wo; ox += kNarrowPixels) {
      const int64_t count = conv.Wo - ox < kNarrowPixels ? conv.Wo - ox : kNarrowPixels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t iy = oy * conv.stride_h - conv.pad_h + tap / conv.S * conv.dilation_h;
        for (int64_t p = 0; p < kNarrowPixels; ++p) {
          const int64_t ix = (ox + p) * conv.stride_w - conv.pad_w + tap % conv.S * conv.dilation_w;
          const bool inside = p < count && iy >= 0 && iy < conv.H && ix >= 0 && ix < conv.W;
          sources[tap * kNarrowPixels + p] = inside ? conv.x.at(n, iy, ix) : zeros;
        }
      }
      alignas(64) float sums[kNarrowPixels][kNarrowOutputs < kLanes ? kLanes : kNarrowOutputs] = {};
      const float* w = weights;
      for (int64_t k = 0; k < conv.K; ++k) {
        Vec acc[kNarrowPixels] = {};
        for (int64_t tap = 0; tap < taps; ++tap, w += padded) {
          const T* const* src = sources + tap * kNarrowPixels;
          int64_t c = 0;
          for (; c + kLanes <= conv.C; c += kLanes) {
            const Vec weight = load(w + c);
#pragma GCC unroll 8
            for (int p = 0; p < kNarrowPixels; ++p) acc[p] += load(src[p] + c) * weight;
          }
          if (c < conv.C) {
            const Vec weight = load(w + c);
#pragma GCC unroll 8
            for (int p = 0; p < kNarrowPixels; ++p) {
              acc[p] += load_part(src[p] + c, conv.C - c) * weight;
            }
          }
        }
        for (int p = 0; p < kNarrowPixels; ++p) sums[p][k] = horizontal_sum(acc[p]);
      }
      for (int64_t p = 0; p < count; ++p) {
        finish_pixel(conv, 0, conv.K, sums[p], conv.y.at(n, oy, ox + p),
                     conv.residual.data ? conv.residual.at(n, oy, ox + p) : nullptr);
      }
    }
  }
}
