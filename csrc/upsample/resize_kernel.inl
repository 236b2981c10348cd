// Output rows of a resize of channels-last images. Bilinear: the two source rows are blended into
// `line` once, of which every output pixel blends two neighbours; plain loops over channels that
// the compiler vectorises.

#include "common/convert.inl"

template <typename T>
void resize_rows(const ResizeImages<T>& r, int64_t begin, int64_t end,
                 typename Accumulate<T>::type* line) {
  using acc = typename Accumulate<T>::type;
  constexpr bool kFused = FASTSEG_ISA_LEVEL >= 1;
  const int64_t C = r.C;
  acc* const second = line + r.cols.in * C;  // a widened row, and later an output pixel
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / r.rows.out, oy = row % r.rows.out;
    T* out = r.out + n * r.out_batch + oy * r.out_row;
    if (r.nearest) {
      const T* from = r.in + n * r.in_batch + nearest(r.rows, oy) * r.in_row;
      for (int64_t ox = 0; ox < r.cols.out; ++ox) {
        std::memcpy(out + ox * r.out_pixel, from + nearest(r.cols, ox) * r.in_pixel, C * sizeof(T));
      }
      continue;
    }
    const Tap<acc> y = r.rows.template tap<acc>(oy, kFused);
    const T* top = r.in + n * r.in_batch + y.i0 * r.in_row;
    const T* bottom = r.in + n * r.in_batch + y.i1 * r.in_row;
    for (int64_t ix = 0; ix < r.cols.in; ++ix) {
      acc* __restrict__ to = line + ix * C;
      if constexpr (std::is_same_v<T, acc>) {
        const acc* __restrict__ a = top + ix * r.in_pixel;
        const acc* __restrict__ b = bottom + ix * r.in_pixel;
        for (int64_t c = 0; c < C; ++c) to[c] = a[c] * y.w0 + b[c] * y.w1;
      } else {
        widen(top + ix * r.in_pixel, to, C);
        widen(bottom + ix * r.in_pixel, second, C);
        for (int64_t c = 0; c < C; ++c) to[c] = to[c] * y.w0 + second[c] * y.w1;
      }
    }
    for (int64_t ox = 0; ox < r.cols.out; ++ox) {
      const Tap<acc> x = r.cols.template tap<acc>(ox, kFused);
      const acc* __restrict__ left = line + x.i0 * C;
      const acc* __restrict__ right = line + x.i1 * C;
      const auto blend = [&](acc* __restrict__ to) {
        for (int64_t c = 0; c < C; ++c) to[c] = left[c] * x.w0 + right[c] * x.w1;
      };
      if constexpr (std::is_same_v<T, acc>) {
        blend(out + ox * r.out_pixel);
      } else {
        blend(second);
        narrow(second, out + ox * r.out_pixel, C);
      }
    }
  }
}
