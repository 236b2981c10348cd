// A block of output pixels of a resize. Bilinear: a source row is spread along x once, for all the
// output rows that blend it with its neighbour; plain loops that the compiler vectorises.

#include "common/convert.inl"

// Source row `from`, spread along x: pixels [begin, end) of `row`, C channels each. `wide` has room
// for the source row in acc.
template <typename T>
void spread_row(const ResizeImages<T>& r, const T* from, int64_t begin, int64_t end,
                typename Accumulate<T>::type* __restrict__ row,
                typename Accumulate<T>::type* wide) {
  using acc = typename Accumulate<T>::type;
  const int64_t C = r.C;
  const int32_t *left = r.left.data(), *right = r.right.data();
  const acc *w0 = r.w0.data(), *w1 = r.w1.data(), *source = nullptr;
  int64_t pitch = r.in_pixel;
  if constexpr (std::is_same_v<T, acc>) source = from;
  if (source == nullptr || (C == 1 && pitch != 1)) {  // else what is read is dense
    const int64_t first = left[begin], last = right[end - 1],
                  run = pitch == C ? last + 1 - first : 1;
    for (int64_t i = first; i <= last; i += run) widen(from + i * pitch, wide + i * C, run * C);
    source = wide;
    pitch = C;
  }
  if (C == 1) {
    for (int64_t x = begin; x < end; ++x) {
      row[x - begin] = source[left[x]] * w0[x] + source[right[x]] * w1[x];
    }
    return;
  }
  for (int64_t x = begin; x < end; ++x) {
    const acc *a = source + left[x] * pitch, *b = source + right[x] * pitch;
    acc* to = row + (x - begin) * C;
    for (int64_t c = 0; c < C; ++c) to[c] = a[c] * w0[x] + b[c] * w1[x];
  }
}

// out = top * w0 + bottom * w1, n values.
template <typename T>
inline void blend(const typename Accumulate<T>::type* top,
                  const typename Accumulate<T>::type* bottom, typename Accumulate<T>::type w0,
                  typename Accumulate<T>::type w1, T* __restrict__ out, int64_t n) {
  using acc = typename Accumulate<T>::type;
  if constexpr (std::is_same_v<T, acc>) {
    typedef T Line __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
    constexpr int64_t kLine = 64 / sizeof(T);
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
      const Line a = *reinterpret_cast<const Line*>(top + i);
      const Line b = *reinterpret_cast<const Line*>(bottom + i);
      *reinterpret_cast<Line*>(out + i) = a * w0 + b * w1;
    }
    for (; i < n; ++i) out[i] = top[i] * w0 + bottom[i] * w1;
  } else {
    constexpr int64_t kRun = 64;  // in registers
    acc run[kRun];
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t count = std::min(kRun, n - i);
      for (int64_t j = 0; j < count; ++j) run[j] = top[i + j] * w0 + bottom[i + j] * w1;
      narrow(run, out + i, count);
    }
  }
}

inline void stream_line(void* to, const void* line) {
#if FASTSEG_ISA_LEVEL >= 2
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(line));
#elif FASTSEG_ISA_LEVEL == 1
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(to) + i,
                        _mm256_load_si256(static_cast<const __m256i*>(line) + i));
  }
#else
  std::memcpy(to, line, 64);
#endif
}

// n values by fill(first, count, to); if `stream`, whole lines of 64 bytes past the caches.
template <typename T, typename Fill>
__attribute__((always_inline)) inline void write_run(T* out, int64_t n, bool stream, Fill fill) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (!stream) return fill(0, n, out);
  const auto before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));
  int64_t i = std::min(before, n);
  fill(0, i, out);
  for (; i + kLine <= n; i += kLine) {
    alignas(64) T line[kLine];
    fill(i, kLine, line);
    stream_line(out + i, line);
  }
  fill(i, n - i, out + i);
}

// Rows [y_begin, y_end) and columns [x_begin, x_end) of image `image`. `space` holds two spread
// rows of r.block values and a source row.
template <typename T>
void resize_block(const ResizeImages<T>& r, int64_t image, int64_t y_begin, int64_t y_end,
                  int64_t x_begin, int64_t x_end, typename Accumulate<T>::type* space) {
  using acc = typename Accumulate<T>::type;
  constexpr bool kFused = FASTSEG_ISA_LEVEL >= 1;
  const int64_t C = r.C, n = image / r.planes, plane = image % r.planes;
  const T* in = r.in + n * r.in_batch + plane * r.in_plane;
  T* const block = r.out + n * r.out_batch + plane * r.out_plane + x_begin * r.out_pixel;
  const bool dense = r.out_pixel == C;
  const int64_t runs = dense ? 1 : x_end - x_begin, run = dense ? (x_end - x_begin) * C : C;
  acc* const rows[2] = {space, space + r.block};
  int64_t held[2] = {-1, -1};
  const auto hold = [&](int64_t y, int64_t keep) {  // without dropping row `keep`
    for (int slot = 0; slot < 2; ++slot) {
      if (held[slot] == y) return rows[slot];
    }
    const int slot = held[0] == keep ? 1 : 0;
    spread_row(r, in + y * r.in_row, x_begin, x_end, rows[slot], space + 2 * r.block);
    held[slot] = y;
    return rows[slot];
  };
  for (int64_t y = y_begin; y < y_end; ++y) {
    T* out = block + y * r.out_row;
    if (r.copies) {
      const T* from = in + nearest(r.rows, y) * r.in_row;
      if (dense && r.in_pixel == C && r.cols.in == r.cols.out) {
        std::copy_n(from + x_begin * C, run, out);
      } else if (C == 1) {
        for (int64_t x = x_begin; x < x_end; ++x) {
          out[(x - x_begin) * r.out_pixel] = from[r.left[x] * r.in_pixel];
        }
      } else {
        for (int64_t x = x_begin; x < x_end; ++x) {
          const T* pixel = from + r.left[x] * r.in_pixel;
          write_run(out + (x - x_begin) * r.out_pixel, C, r.stream,
                    [pixel](int64_t i, int64_t n, T* to)
                        __attribute__((always_inline)) { std::copy_n(pixel + i, n, to); });
        }
      }
      continue;
    }
    const Tap<acc> tap = r.rows.template tap<acc>(y, kFused);
    const acc *top = hold(tap.i0, tap.i1), *bottom = hold(tap.i1, tap.i0);
    for (int64_t p = 0; p < runs; ++p) {
      const acc *above = top + p * run, *below = bottom + p * run;
      const auto fill =
          [above, below, w0 = tap.w0, w1 = tap.w1](int64_t i, int64_t n, T* to)
              __attribute__((always_inline)) { blend(above + i, below + i, w0, w1, to, n); };
      write_run(out + p * r.out_pixel, run, r.stream, fill);
    }
  }
#if FASTSEG_ISA_LEVEL >= 1
  if (r.stream) _mm_sfence();  // visible to other threads before anything that follows
#endif
}
