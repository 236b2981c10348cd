// Sums of outer products, and what packs their factors; compiled once per instruction set.
// clang-format off: each builds on the ones before
#include "common/convert.inl"
#include "conv_engine/kernel_begin.inl"
#include "conv_engine/winograd_transform.inl"
// clang-format on

// float64 beside the vectors of the engine.
typedef double Vec64 __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef Vec64 UnalignedVec64 __attribute__((aligned(sizeof(double))));

FASTSEG_INLINE Vec64 load(const double* p) { return *reinterpret_cast<const UnalignedVec64*>(p); }
FASTSEG_INLINE void store(double* p, Vec64 v) { *reinterpret_cast<UnalignedVec64*>(p) = v; }
FASTSEG_INLINE double load_word(const double* p) { return *p; }
FASTSEG_INLINE Vec64 broadcast(double a) { return a - Vec64{}; }
FASTSEG_INLINE Vec64 multiply_add(Vec64 sum, Vec64 a, Vec64 b) { return sum + a * b; }

template <typename S>
constexpr int64_t kWidth = kLanes * sizeof(float) / sizeof(S);

// sums[r][column] (+)= the sum of a[i * a_step + r] * b[i * kPanel + column] over i < depth.
template <int R, int V, typename S>
FASTSEG_INLINE void outer_registers(const S* a, int64_t a_step, const S* b, int64_t depth, S* sums,
                                    int64_t row, bool add) {
  using Vector = decltype(load(b));
  Vector acc[R][V] = {};
  for (int64_t i = 0; i < depth; ++i, a += a_step, b += kPanel) {
    Vector panel[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) panel[v] = load(b + v * kWidth<S>);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const Vector scalar = broadcast(load_word(a + r));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(acc[r][v], scalar, panel[v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      S* to = sums + r * row + v * kWidth<S>;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <int V, int R, typename S>
FASTSEG_INLINE void outer_rows(int64_t rows, const S* a, int64_t a_step, const S* b, int64_t depth,
                               S* sums, int64_t row, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return outer_registers<R, V>(a, a_step, b, depth, sums, row, add);
    outer_rows<V, R - 1>(rows, a, a_step, b, depth, sums, row, add);
  }
}

// The same of `rows` rows and the wanted `columns` of a panel.
template <typename S>
static void outer_tiles(int64_t rows, int64_t columns, const S* a, int64_t a_step, const S* b,
                        int64_t depth, S* sums, int64_t row, bool add) {
  const int64_t blocks = ceil_div(rows, kRows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = part_begin(rows, blocks, i);
    const int64_t count = part_begin(rows, blocks, i + 1) - first;
    for (int64_t k = 0; k < columns; k += 2 * kWidth<S>) {
      S* to = sums + first * row + k;
      if (columns - k > kWidth<S>) {
        outer_rows<2, kRows>(count, a + first, a_step, b + k, depth, to, row, add);
      } else {
        outer_rows<1, kRows>(count, a + first, a_step, b + k, depth, to, row, add);
      }
    }
  }
}

template <typename T>
struct WeightGradientKernel {
  using S = typename Accumulate<T>::type;
  using Gradient = WeightGradient<T>;

  // Rows [begin, end) and panels [first_panel, last_panel) of a plane over one slab, to sums with
  // `row` of them from one row to the next; a and b take a piece of the slab.
  static void sum_slab(const Gradient& g, int64_t slab, int64_t plane, int64_t begin, int64_t end,
                       int64_t first_panel, int64_t last_panel, S* a, S* b, S* sums, int64_t row) {
    const int64_t first = slab * g.slab, rest = g.positions - first;
    const int64_t last = first + (rest < g.slab ? rest : g.slab);
    const int64_t step = g.a_step(end - begin);
    bool add = false;
    for (int64_t p = first; p < last;) {
      const int64_t count =
          pack_taps(g, plane, &p, last, begin, end, first_panel, last_panel, a, step, b);
      if (count == 0) break;
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        outer_tiles(end - begin, panel_columns(g, panel), a, step,
                    b + (panel - first_panel) * kPanelStep, count,
                    sums + (panel - first_panel) * kPanel, row, add);
      }
      add = true;
    }
    if (add) return;
    for (int64_t r = 0; r < end - begin; ++r) {
      std::memset(sums + r * row, 0, (last_panel - first_panel) * kPanel * sizeof(S));
    }
  }

  // Tiles [begin, begin + count) of the chunk that starts at `chunk`, of x or of dy, to the planes
  // of their points.
  static void pack_tiles(const Gradient& g, int64_t chunk, int64_t begin, int64_t count,
                         const float* zeros, bool of_x, float* to) {
    const auto corner = [&](int64_t tile) {
      const int64_t in_x = g.tiles_x.count(0), in_y = g.tiles_y.count(0), row = tile / in_x;
      const int64_t n = row / in_y;
      return std::array{n, g.tiles_y.first(0, row - n * in_y),
                        g.tiles_x.first(0, tile - row * in_x)};
    };
    for (int64_t i = begin; i < begin + count; ++i) {
      const auto [n, y, x] = corner(chunk + i);
      if (of_x) {
        const float* src[kIn][kIn];
        gather(g.x, g.H, g.W, n, y - g.pad_h, x - g.pad_w, g, zeros, src);
        transform(src, g.C, to + i * g.a_step(g.C), g.a_plane, kPanel);
      } else {
        const float* src[kOut][kOut];
        gather(g.dy, g.Ho, g.Wo, n, y, x, g, zeros, src);
        transform(src, g.K, to + i * kPanel, g.b_plane, g.chunk * kPanel);
      }
    }
  }

  // Adds the products of `count` tiles to rows [begin, end), one panel of a plane.
  static void multiply_tiles(const Gradient& g, int64_t plane, int64_t panel, int64_t begin,
                             int64_t end, int64_t count, bool add, const S* a, const S* b,
                             S* sums) {
    const int64_t row = g.panels() * kPanel;
    outer_tiles(end - begin, panel_columns(g, panel), a + plane * g.a_plane + begin, g.a_step(g.C),
                b + plane * g.b_plane + panel * g.chunk * kPanel, count,
                sums + (plane * g.C + begin) * row + panel * kPanel, row, add);
  }

  // Rows [begin, end) of a plane: adds the slabs, first to last, and writes the gradient.
  static void finish_slabs(const Gradient& g, int64_t plane, int64_t begin, int64_t end, S* sums) {
    const int64_t width = g.panels() * kPanel, size = g.sums();
    sums += (plane * g.rows() + begin) * width;
    for (int64_t slab = 1; slab < g.slabs; ++slab) {
      const S* more = sums + slab * size;
      for (int64_t i = 0; i < (end - begin) * width; ++i) sums[i] += more[i];
    }
    finish_taps(g, plane, begin, end, 0, g.panels(), sums, width);
  }

  // Sums of rows [begin, end) and panels [first_panel, last_panel) of a plane to the gradient.
  static void finish_taps(const Gradient& g, int64_t plane, int64_t begin, int64_t end,
                          int64_t first_panel, int64_t last_panel, const S* sums, int64_t row) {
    const int64_t first = first_panel * kPanel, last = last_panel * kPanel;
    const int64_t columns = (last < g.K ? last : g.K) - first;
    const auto to = [&](int64_t r) {
      const int64_t tap = plane * g.run + r / g.C;
      return g.tap(tap / g.S, tap % g.S) + r % g.C * g.dw_c + first * g.dw_k;
    };
    for (int64_t r0 = begin; r0 < end; r0 += kFinishedRows, sums += kFinishedRows * row) {
      const int64_t count = end - r0 < kFinishedRows ? end - r0 : kFinishedRows;
      if (g.dw_k == 1) {
        for (int64_t r = 0; r < count; ++r) narrow(sums + r * row, to(r0 + r), columns);
        continue;
      }
      T* rows[kFinishedRows];
      for (int64_t r = 0; r < count; ++r) rows[r] = to(r0 + r);
      for (int64_t k = 0; k < columns; ++k) {
        for (int64_t r = 0; r < count; ++r) {
          rows[r][k * g.dw_k] = static_cast<T>(sums[r * row + k]);
        }
      }
    }
  }

  // Channels [begin, end) of x: the sums of all points to the gradient.
  static void finish_tiles(const Gradient& g, int64_t begin, int64_t end, const float* sums) {
    float powers[3][kIn];  // of a point, over the norm of its weight transform
    for (int i = 0; i < kIn; ++i) {
      double row[kOut];
      Scheme::weight_row(i, row);
      const bool infinite = i == kIn - 1;
      const double point = infinite ? 0 : Scheme::point(i);
      double power = row[0];
      for (int t = 0; t < 3; ++t, power *= point) {
        powers[t][i] = static_cast<float>(infinite ? t == 2 : power);
      }
    }
    const int64_t width = g.panels() * kPanel, plane = g.C * width;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t k = 0; k < g.K; k += kLanes) {
        Vec half[3][kIn];
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) {
#pragma GCC unroll 4
          for (int r = 0; r < 3; ++r) half[r][j] = Vec{};
#pragma GCC unroll 8
          for (int i = 0; i < kIn; ++i) {
            const Vec m = load(sums + (i * kIn + j) * plane + c * width + k);
#pragma GCC unroll 4
            for (int r = 0; r < 3; ++r) half[r][j] += powers[r][i] * m;
          }
        }
        for (int r = 0; r < 3; ++r) {
          for (int s = 0; s < 3; ++s) {
            Vec sum{};
#pragma GCC unroll 8
            for (int j = 0; j < kIn; ++j) sum += powers[s][j] * half[r][j];
            T* to = g.tap(r, s) + c * g.dw_c + k * g.dw_k;
            for (int l = 0; l < kLanes && k + l < g.K; ++l) to[l * g.dw_k] = static_cast<T>(sum[l]);
          }
        }
      }
    }
  }

 private:
  // Four outputs, three taps: the roles of the weights and the outputs of F(4, 3) exchanged.
  using Scheme = Winograd<3, 4>;
  static constexpr int kOut = 4, kIn = Scheme::kIn;

  static int64_t panel_columns(const Gradient& g, int64_t panel) {
    return g.K - panel * kPanel < kPanel ? g.K - panel * kPanel : kPanel;
  }

  // Rows [begin, end) of the pixels of x under a plane, all of them where the plane has several
  // taps, and panels of dy, of the output pixels from *position on: up to kPiece of them before
  // `last`, those whose tap lies inside of the image. Returns how many; *position is the next one.
  static int64_t pack_taps(const Gradient& g, int64_t plane, int64_t* position, int64_t last,
                           int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel,
                           S* a, int64_t step, S* b) {
    const int64_t r = plane * g.run / g.S, s = plane * g.run % g.S;
    int64_t p = *position, line = p / g.Wo, ox = p - line * g.Wo;
    int64_t n = line / g.Ho, oy = line - n * g.Ho, count = 0;
    for (; p < last && count < kPiece; ++p) {
      const int64_t y = oy * g.stride_h - g.pad_h + r * g.dilation_h;
      const int64_t x = ox * g.stride_w - g.pad_w + s * g.dilation_w;
      bool inside = true;
      if (g.run > 1) {
        const int64_t length = g.run < g.S ? g.run : g.S;  // all of a kernel row
        for (int64_t i = 0; i * length < g.run; ++i) {
          pack_run(g, n, y + i * g.dilation_h, x, length, a + i * length * g.C);
        }
      } else {
        inside = y >= 0 && y < g.H && x >= 0 && x < g.W;
        if (inside) widen(g.x.at(n, y, x) + begin, a, end - begin);
      }
      if (inside) {
        pack_columns(g, g.dy.at(n, oy, ox), first_panel, last_panel, b + count * kPanel);
        a += step;
        ++count;
      }
      if (++ox == g.Wo) {
        ox = 0;
        if (++oy == g.Ho) oy = 0, ++n;
      }
    }
    *position = p;
    return count;
  }

  // The channels of a pixel of dy to panels [first, last).
  FASTSEG_INLINE void pack_columns(const Gradient& g, const T* pixel, int64_t first, int64_t last,
                                   S* to) {
    for (int64_t panel = first; panel < last; ++panel, to += kPanelStep) {
      const T* from = pixel + panel * kPanel;
      const int64_t columns = panel_columns(g, panel);
      if (columns == kPanel) {  // a constant number: no call
        widen(from, to, kPanel);
      } else {
        widen(from, to, columns);
        for (int64_t j = columns; j < kPanel; ++j) to[j] = 0;
      }
    }
  }

  // `length` pixels x, x + 1, ..., zeros where they are outside of the image.
  static void pack_run(const Gradient& g, int64_t n, int64_t y, int64_t x, int64_t length, S* to) {
    int64_t left = 0, right = length;  // pixels [left, right) are inside
    if (x < 0) left = -x < right ? -x : right;
    if (x + right > g.W) right = g.W - x > left ? g.W - x : left;
    if (y < 0 || y >= g.H) left = right = 0;
    if (left > 0) std::memset(to, 0, left * g.C * sizeof(S));
    if (left < right) widen(g.x.at(n, y, x + left), to + left * g.C, (right - left) * g.C);
    if (right < length) std::memset(to + right * g.C, 0, (length - right) * g.C * sizeof(S));
  }

  // Where the pixels of a tile with its first one at (y, x) lie, those outside of the image at
  // `zeros`.
  template <int kSize>
  static void gather(const Image<const T>& image, int64_t H, int64_t W, int64_t n, int64_t y0,
                     int64_t x0, const Gradient& g, const float* zeros,
                     const float* (&src)[kSize][kSize]) {
    if constexpr (std::is_same_v<T, float>) {
      for (int i = 0; i < kSize; ++i) {
        for (int j = 0; j < kSize; ++j) {
          const int64_t y = y0 + i * g.dilation_h, x = x0 + j * g.dilation_w;
          const bool inside = y >= 0 && y < H && x >= 0 && x < W;
          src[i][j] = inside ? image.at(n, y, x) : zeros;
        }
      }
    }
  }

  FASTSEG_INLINE void transform_axis(const Vec (&d)[kIn], Vec (&v)[kIn]) {
    input_transform(Scheme{}, d, v);
  }
  // The polynomial with these coefficients at all points.
  FASTSEG_INLINE void transform_axis(const Vec (&d)[kOut], Vec (&v)[kIn]) {
    constexpr auto& p = WinogradPoints<3, 4>::kPoints;
    v[0] = d[0];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const float point = static_cast<float>(p[i]), square = static_cast<float>(p[i] * p[i]);
      const Vec even = d[0] + d[2] * square, odd = (d[1] + d[3] * square) * point;
      v[1 + 2 * i] = even + odd;
      v[2 + 2 * i] = even - odd;
    }
    v[kIn - 1] = d[3];
  }

  // All channels of a tile; kPanel of them lie `panel` apart.
  template <int kSize>
  static void transform(const float* const (&src)[kSize][kSize], int64_t channels, float* to,
                        int64_t plane, int64_t panel) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec columns[kIn][kSize];
#pragma GCC unroll 8
      for (int j = 0; j < kSize; ++j) {
        Vec d[kSize], v[kIn];
        if (c + kLanes <= channels) {
#pragma GCC unroll 8
          for (int i = 0; i < kSize; ++i) d[i] = load(src[i][j] + c);
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kSize; ++i) d[i] = load_part(src[i][j] + c, channels - c);
        }
        transform_axis(d, v);
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) columns[i][j] = v[i];
      }
      float* dst = to + c / kPanel * panel + c % kPanel;
#pragma GCC unroll 8
      for (int i = 0; i < kIn; ++i) {
        Vec v[kIn];
        transform_axis(columns[i], v);
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) store(dst + (i * kIn + j) * plane, v[j]);
      }
    }
  }
};
#include "conv_engine/kernel_end.inl"
