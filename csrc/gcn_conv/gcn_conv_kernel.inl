// The one-dimensional Winograd kernel of the convolution engine, and the expansion of gradients,
// compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/winograd_transform.inl"
#include "conv_engine/winograd_1d.inl"
#include "conv_engine/kernel_end.inl"
// clang-format on

// Row `row` (counted over all images) of the tap form's transpose: for every pixel the 2 * k * K
// values [direction][tap][channel] of the pixels at distance k / 2 - tap, 0 outside the image.
// Both images are dense and channels last; `out` has a row of columns per pixel.
template <typename T>
void expand_row(const GlobalConv& g, const T* vertical, const T* horizontal, int64_t row, T* out) {
  const int64_t n = row / g.H, y = row % g.H, K = g.K;
  const T* image = vertical + n * g.H * g.W * K;
  const T* line = horizontal + row * g.W * K;
  for (int64_t x = 0; x < g.W; ++x) {
    for (int64_t tap = 0; tap < g.taps; ++tap, out += K) {
      const int64_t at = y + g.reach() - tap;
      const T* src = image + (at * g.W + x) * K;
      const bool inside = at >= 0 && at < g.H;
      for (int64_t k = 0; k < K; ++k) out[k] = inside ? src[k] : T(0);
    }
    for (int64_t tap = 0; tap < g.taps; ++tap, out += K) {
      const int64_t at = x + g.reach() - tap;
      const T* src = line + at * K;
      const bool inside = at >= 0 && at < g.W;
      for (int64_t k = 0; k < K; ++k) out[k] = inside ? src[k] : T(0);
    }
  }
}
