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

// Lines [begin, end) of output, counted over (image, row). `zeros` holds C of them.
template <class Conv, typename T = typename Conv::Storage>
static void narrow_conv(const Conv& conv, int64_t begin, int64_t end, const float* weights,
                        const T* zeros) {
  const int64_t C = conv.C, padded = round_up(C, kLanes), whole = C - C % kLanes;
  const int64_t step = conv.stride_w * conv.x.pixel;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / conv.Ho, oy = line % conv.Ho, top = oy * conv.stride_h - conv.pad_h;
    for (int64_t ox = 0; ox < conv.Wo; ox += kNarrowPixels) {
      const int64_t count = conv.Wo - ox < kNarrowPixels ? conv.Wo - ox : kNarrowPixels;
      const int64_t left = ox * conv.stride_w - conv.pad_w;
      alignas(64) float sums[kNarrowPixels][kNarrowOutputs < kLanes ? kLanes : kNarrowOutputs] = {};
      for (int64_t k = 0; k < conv.K; ++k) {
        Vec acc[kNarrowPixels] = {};
        const float* w = weights + k * conv.R * conv.S * padded;
        for (int64_t r = 0; r < conv.R; ++r) {
          const int64_t iy = top + r * conv.dilation_h;
          for (int64_t s = 0; s < conv.S; ++s, w += padded) {
            if (iy < 0 || iy >= conv.H) continue;
            const int64_t ix = left + s * conv.dilation_w;
            const T* src[kNarrowPixels];
            if (ix >= 0 && ix + (kNarrowPixels - 1) * conv.stride_w < conv.W) {
              const T* first = conv.x.at(n, iy, ix);
#pragma GCC unroll 8
              for (int p = 0; p < kNarrowPixels; ++p) src[p] = first + p * step;
            } else {
              for (int p = 0; p < kNarrowPixels; ++p) {
                const int64_t at = ix + p * conv.stride_w;
                src[p] = at >= 0 && at < conv.W ? conv.x.at(n, iy, at) : zeros;
              }
            }
            for (int64_t c = 0; c < whole; c += kLanes) {
              const Vec weight = load(w + c);
#pragma GCC unroll 8
              for (int p = 0; p < kNarrowPixels; ++p) acc[p] += load(src[p] + c) * weight;
            }
            if (whole < C) {
              const Vec weight = load(w + whole);
#pragma GCC unroll 8
              for (int p = 0; p < kNarrowPixels; ++p) {
                acc[p] += load_part(src[p] + whole, C - whole) * weight;
              }
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
