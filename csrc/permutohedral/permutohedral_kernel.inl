// Loops of the permutohedral filter over one tile or one blur chain, once per instruction set.
// A row holds the channels of one point or vertex, padded to a multiple of 8; kernels take rows in
// column groups of up to 32 channels, which stay in registers.

#if FASTSEG_ISA_LEVEL >= 2
using FloatLane = __m512;
using DoubleLane = __m512d;
inline FloatLane multiply_add(FloatLane a, FloatLane b, FloatLane c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif FASTSEG_ISA_LEVEL == 1
using FloatLane = __m256;
using DoubleLane = __m256d;
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
typedef float FloatLane __attribute__((vector_size(16), may_alias));
typedef double DoubleLane __attribute__((vector_size(16), may_alias));
inline FloatLane multiply_add(FloatLane a, FloatLane b, FloatLane c) { return a * b + c; }
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) { return a * b + c; }
#endif
#if FASTSEG_ISA_LEVEL >= 1
inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

typedef int32_t FloatLaneInts __attribute__((vector_size(sizeof(FloatLane))));
typedef int32_t DoubleLaneInts __attribute__((vector_size(sizeof(DoubleLane) / 2)));

template <typename T>
struct LaneOf {
  using type = FloatLane;
  using ints = FloatLaneInts;
};
template <>
struct LaneOf<double> {
  using type = DoubleLane;
  using ints = DoubleLaneInts;
};

// s in every lane. V() + s would cost an addition, since it turns -0 into +0.
template <typename V, typename T>
inline V broadcast(T s) {
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) v[i] = s;
  return v;
}
#if FASTSEG_ISA_LEVEL >= 2
template <>
inline FloatLane broadcast<FloatLane, float>(float s) {
  return _mm512_set1_ps(s);
}
inline __m256 first_half(FloatLane v) { return _mm512_castps512_ps256(v); }
#else
template <typename V>
inline V first_half(V v) {
  return v;
}
#endif

template <typename V, typename T>
inline V load_lane(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
inline void store_lane(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// kEights * 8 consecutive channels in registers: full registers, and a half one where 8 channels
// remain.
template <typename T, int kEights>
struct Row {
  using V = typename LaneOf<T>::type;
  static constexpr int kLanes = sizeof(V) / sizeof(T);
  static constexpr int kFull = kEights * 8 / kLanes;
  static constexpr bool kHalf = kEights * 8 % kLanes != 0;
  static constexpr int kChannels = kEights * 8;
#if FASTSEG_ISA_LEVEL >= 2
  using H = __m256;  // only float rows have a half
#else
  using H = V;
#endif
  V full[kFull > 0 ? kFull : 1];
  H half;

  static Row zero() {
    Row row;
    for (int i = 0; i < kFull; ++i) row.full[i] = V();
    if constexpr (kHalf) row.half = H();
    return row;
  }
  static Row load(const T* p) {
    Row row;
    for (int i = 0; i < kFull; ++i) row.full[i] = load_lane<V>(p + i * kLanes);
    if constexpr (kHalf) row.half = load_lane<H>(p + kFull * kLanes);
    return row;
  }
  void store(T* p) const {
    for (int i = 0; i < kFull; ++i) store_lane(p + i * kLanes, full[i]);
    if constexpr (kHalf) store_lane(p + kFull * kLanes, half);
  }
  // this += s * other
  void add_scaled(T s, const Row& other) {
    const V all = broadcast<V>(s);
    for (int i = 0; i < kFull; ++i) full[i] = multiply_add(all, other.full[i], full[i]);
    if constexpr (kHalf) half = multiply_add(first_half(all), other.half, half);
  }
  void add(const Row& other) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] + other.full[i];
    if constexpr (kHalf) half = half + other.half;
  }
  void scale(T s) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] * s;
    if constexpr (kHalf) half = half * s;
  }
  void raise_to_magnitude(const Row& other) {
    const auto raise = [](auto* top, auto v) {
      const auto magnitude = v < decltype(v)() ? -v : v;
      *top = magnitude > *top ? magnitude : *top;
    };
    for (int i = 0; i < kFull; ++i) raise(&full[i], other.full[i]);
    if constexpr (kHalf) raise(&half, other.half);
  }
  void multiply(const Row& other) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] * other.full[i];
    if constexpr (kHalf) half = half * other.half;
  }
};

// Calls fn(Row type, first column) for the column groups of a row of `width` channels.
template <typename T, typename Fn>
inline __attribute__((always_inline)) void for_each_column_group(int width, Fn&& fn) {
  int column = 0;
  for (; width - column >= 32; column += 32) fn(Row<T, 4>(), column);
  switch (width - column) {
    case 8:
      return fn(Row<T, 1>(), column);
    case 16:
      return fn(Row<T, 2>(), column);
    case 24:
      return fn(Row<T, 3>(), column);
  }
}

// The simplices of n points, n a multiple of 16. features[k * stride + i] is feature k of point i,
// cell[j * stride + i] and so on likewise; see locate().
template <int kD, typename T>
void locate_all(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                int32_t* rank, T* weight) {
  using V = typename LaneOf<T>::type;
  constexpr int kLanes = sizeof(V) / sizeof(T), kMax = (kD > 0 ? kD : kMaxFeatures) + 1;
  using I = typename LaneOf<T>::ints;
  const int d1 = (kD > 0 ? kD : d) + 1;
  for (int i = 0; i < n; i += kLanes) {
    V f[kMax], c[kMax], r[kMax], w[kMax];
    for (int k = 0; k + 1 < d1; ++k) f[k] = load_lane<V>(features + k * stride + i);
    locate<kD, T, V>(d, f, scale, c, r, w);
    for (int j = 0; j < d1; ++j) {
      store_lane(cell + j * stride + i, __builtin_convertvector(c[j], I));
      store_lane(rank + j * stride + i, __builtin_convertvector(r[j], I));
      store_lane(weight + j * stride + i, w[j]);
    }
  }
}
template <typename T>
void locate_points(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                   int32_t* rank, T* weight) {
  if constexpr (sizeof(T) == 4) {
    if (d == 2) return locate_all<2>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 3) return locate_all<3>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 5) return locate_all<5>(d, n, stride, features, scale, cell, rank, weight);
  }
  return locate_all<0>(d, n, stride, features, scale, cell, rank, weight);
}

// Copies the rows of a tile's vertices into `local` and applies the term's label compatibility:
// a factor per channel (diagonal), or a symmetric width x width matrix. Returns the largest
// magnitude.
template <typename T>
T gather_rows(const T* values, int width, int local_stride, const int32_t* vertex, int count,
              const T* diagonal, const T* matrix, T* local) {
  T largest = 0;
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    R top = R::zero();
    for (int k = 0; k < count; ++k) {
      const T* source = values + static_cast<int64_t>(vertex[k]) * width;
      R row = R::zero();
      if (matrix == nullptr) {
        row = R::load(source + column);
        row.multiply(R::load(diagonal + column));
      } else {
        for (int m = 0; m < width; ++m) {
          row.add_scaled(source[m], R::load(matrix + static_cast<int64_t>(m) * width + column));
        }
      }
      row.store(local + static_cast<int64_t>(k) * local_stride + column);
      top.raise_to_magnitude(row);
    }
    T lanes[R::kChannels];
    top.store(lanes);
    for (const T lane : lanes) largest = lane > largest ? lane : largest;
  });
  return largest;
}

// Writes a tile's partial sums to their rows, which follow each other in `values` and `extra`.
template <typename T>
void scatter_rows(const T* local, int width, int local_stride, const int32_t* row, int count,
                  int64_t vertices, T* values, T* extra) {
  for (int k = 0; k < count; ++k) {
    const T* source = local + static_cast<int64_t>(k) * local_stride;
    T* target = row[k] < vertices ? values + static_cast<int64_t>(row[k]) * width
                                  : extra + (row[k] - vertices) * width;
    for_each_column_group<T>(width, [&](auto tag, int column) {
      decltype(tag)::load(source + column).store(target + column);
    });
  }
}

// 2^n p, the end of exp, and x rounded to a whole number, |x| < 2^22.
template <typename V>
inline V round_whole(V x) {
  const V magic = V() + 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}
template <typename V>
inline V scale_by_power(V p, V n) {
  using I = decltype(n > n);
  const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof(V));
  return n > V() - 126.0f ? p * power : V();
}
#if FASTSEG_ISA_LEVEL >= 2
inline __m512 round_whole(__m512 x) { return _mm512_roundscale_ps(x, 8); }
inline __m256 round_whole(__m256 x) { return _mm256_roundscale_ps(x, 8); }
inline __m512 scale_by_power(__m512 p, __m512 n) { return _mm512_scalef_ps(p, n); }
inline __m256 scale_by_power(__m256 p, __m256 n) { return _mm256_scalef_ps(p, n); }
#endif

// exp(x) for x <= 88 to about 1 ulp, 0 below -88: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
template <typename V>
inline V exponential(V x) {
  const V low = V() - 100.0f, clamped = x > low ? x : low;
  const V n = round_whole(clamped * 1.44269504088896341f);
  V r = multiply_add(n, V() - 0.693359375f, clamped);
  r = multiply_add(n, V() + 2.12194440e-4f, r);
  V p = multiply_add(V() + 1.9875691500e-4f, r, V() + 1.3981999507e-3f);
  p = multiply_add(p, r, V() + 8.3334519073e-3f);
  p = multiply_add(p, r, V() + 4.1665795894e-2f);
  p = multiply_add(p, r, V() + 1.6666665459e-1f);
  p = multiply_add(p, r, V() + 5.0000001201e-1f);
  return scale_by_power(multiply_add(p, r * r, r + 1.0f), n);
}

#if FASTSEG_ISA_LEVEL >= 1
inline float max_lanes(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
#endif
#if FASTSEG_ISA_LEVEL >= 2
inline __m256 upper_half(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }
inline float max_lanes(__m512 v) {
  return max_lanes(_mm256_max_ps(_mm512_castps512_ps256(v), upper_half(v)));
}
#elif FASTSEG_ISA_LEVEL == 0
inline float max_lanes(FloatLane v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
#endif

// Largest channel of a row.
template <typename R>
inline float largest_channel(const R& row) {
  float largest = -INFINITY;
  if constexpr (R::kFull > 0) {
    auto top = row.full[0];
    for (int i = 1; i < R::kFull; ++i) top = row.full[i] > top ? row.full[i] : top;
    largest = max_lanes(top);
  }
  if constexpr (R::kHalf) {
    const float half = max_lanes(row.half);
    largest = half > largest ? half : largest;
  }
  return largest;
}

// Adds the channels of a row up to 8 numbers.
template <typename R>
inline void fold_to_eight(const R& row, float* eight) {
#if FASTSEG_ISA_LEVEL >= 2
  __m256 sum = __m256();
  if constexpr (R::kFull > 0) {
    __m512 total = row.full[0];
    for (int i = 1; i < R::kFull; ++i) total = total + row.full[i];
    sum = first_half(total) + upper_half(total);
  }
  if constexpr (R::kHalf) sum = sum + row.half;
  store_lane(eight, sum);
#else
  constexpr int kParts = 8 / R::kLanes;
  for (int k = 0; k < kParts; ++k) {
    auto sum = row.full[k];
    for (int i = k + kParts; i < R::kFull; i += kParts) sum = sum + row.full[i];
    store_lane(eight + k * R::kLanes, sum);
  }
#endif
}

// Soft-max of rows of up to 32 channels in passes over the tile: a point's sum is a long chain of
// dependent shuffles, which would stall the exponentials if each point waited for its own.
template <typename R>
inline void softmax_short_rows(float* rows, int points, int stride, bool bounded, float* inverse) {
  float eights[kTilePoints * 8];
  for (int p = 0; p < points; ++p) {
    R row = R::load(rows + p * stride);
    const float largest = bounded ? 0.0f : largest_channel(row);
    for (int i = 0; i < R::kFull; ++i) row.full[i] = exponential(row.full[i] - largest);
    if constexpr (R::kHalf) row.half = exponential(row.half - largest);
    row.store(rows + p * stride);
    fold_to_eight(row, eights + p * 8);
  }
  for (int p = 0; p < points; ++p) {
    const float* e = eights + p * 8;
    inverse[p] = 1.0f / (((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7])));
  }
}

// Soft-max over the channels of each row: on return it is inverse[p] * rows[p]. The padding is
// -inf and becomes 0. `bounded` promises values of at most 80 with a largest of at least -80.
template <typename T>
void softmax_tile(T* rows, int points, int width, int stride, bool bounded, T* inverse) {
  if constexpr (sizeof(T) == 4) {
    if (width <= 32) {
      return for_each_column_group<T>(width, [&](auto tag, int) {
        softmax_short_rows<decltype(tag)>(rows, points, stride, bounded, inverse);
      });
    }
  }
  for (int p = 0; p < points; ++p, rows += stride) {
    T largest = rows[0], sum = 0;
    for (int l = 1; l < width; ++l) largest = rows[l] > largest ? rows[l] : largest;
    if constexpr (sizeof(T) == 4) {
      for (int l = 0; l < width; l += 8) {
        Row<float, 1> part = Row<float, 1>::load(rows + l);
        for (int i = 0; i < part.kFull; ++i) part.full[i] = exponential(part.full[i] - largest);
        if constexpr (Row<float, 1>::kHalf) part.half = exponential(part.half - largest);
        part.store(rows + l);
      }
    } else {
      for (int l = 0; l < width; ++l) rows[l] = std::exp(rows[l] - largest);
    }
    for (int l = 0; l < width; ++l) sum += rows[l];
    inverse[p] = 1 / sum;
  }
}

// rows[p] *= factor[p]
template <typename T>
void scale_rows(T* rows, int points, int width, int stride, const T* factor) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    for (int p = 0; p < points; ++p) {
      R row = R::load(rows + p * stride + column);
      row.scale(factor[p]);
      row.store(rows + p * stride + column);
    }
  });
}

// out[p] = in[p] + scale[p] * sum_r weight[p][r] * local[vertex(p, r)] for the points of a tile.
template <typename T, typename R, int kD1>
inline void slice_columns(const TileView<T>& tile, const T* local, int stride, const T* in,
                          int in_stride, T* out) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  const T* scale = tile.slice_scale;
  for (int p = 0; p < tile.points; ++p, weight += d1, in += in_stride, out += stride) {
    const uint16_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    // Energies stream from memory; the hardware prefetcher stops at every page.
    __builtin_prefetch(in + 64 * in_stride);
    __builtin_prefetch(in + 64 * in_stride + 16);
    R sum = scale == nullptr ? R::load(in) : R::zero();
    for (int r = 0; r < d1; ++r) sum.add_scaled(weight[r], R::load(local + vertex[r] * stride));
    if (scale != nullptr) {
      R total = R::load(in);
      total.add_scaled(scale[p], sum);
      sum = total;
    }
    sum.store(out);
  }
}
template <typename T>
void slice_tile(const TileView<T>& tile, const T* local, int width, int stride, const T* in,
                int in_stride, T* out) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    const T *from = in + column, *rows = local + column;
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return slice_columns<T, R, 3>(tile, rows, stride, from, in_stride, out + column);
      }
      if (tile.d1 == 6) {
        return slice_columns<T, R, 6>(tile, rows, stride, from, in_stride, out + column);
      }
    }
    slice_columns<T, R, 0>(tile, rows, stride, from, in_stride, out + column);
  });
}

// local[v] = sum over the tile's points p and vertices r of weight[p][r] * scale[p] * factor[p] *
// in[p].
template <typename T, typename R, int kD1>
inline void splat_columns(const TileView<T>& tile, const T* in, const T* factor, int stride,
                          T* local) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  const T* scale = tile.splat_scale;
  for (int k = 0; k < tile.pairs; ++k) R::zero().store(local + k * stride);
  for (int p = 0; p < tile.points; ++p, weight += d1, in += stride) {
    const uint16_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    R row = R::load(in);
    row.scale(scale == nullptr ? factor[p] : factor[p] * scale[p]);
    for (int r = 0; r < d1; ++r) {
      R sum = R::load(local + vertex[r] * stride);
      sum.add_scaled(weight[r], row);
      sum.store(local + vertex[r] * stride);
    }
  }
}
template <typename T>
void splat_tile(const TileView<T>& tile, const T* in, const T* factor, int width, int stride,
                T* local) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return splat_columns<T, R, 3>(tile, in + column, factor, stride, local + column);
      }
      if (tile.d1 == 6) {
        return splat_columns<T, R, 6>(tile, in + column, factor, stride, local + column);
      }
    }
    splat_columns<T, R, 0>(tile, in + column, factor, stride, local + column);
  });
}

// Adds the further partial sums of vertices [begin, end) of the merge list to their first one.
template <typename T>
void merge_rows(const int32_t* vertex, const int32_t* rows_begin, int64_t begin, int64_t end,
                const T* extra, int width, T* values) {
  for (int64_t i = begin; i < end; ++i) {
    T* target = values + static_cast<int64_t>(vertex[i]) * width;
    for_each_column_group<T>(width, [&](auto tag, int column) {
      using R = decltype(tag);
      R sum = R::load(target + column);
      for (int64_t k = rows_begin[i]; k < rows_begin[i + 1]; ++k) {
        sum.add(R::load(extra + k * width + column));
      }
      sum.store(target + column);
    });
  }
}

// Blurs the chains [begin, end) of one axis in place: v + (previous + next) / 2, from old values.
template <typename T>
void blur_chains(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                 int width, T* values) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    T* base = values + column;
    for (int64_t c = begin; c < end; ++c) {
      const int32_t* v = vertex + chain_begin[c];
      const int32_t* last = vertex + chain_begin[c + 1] - 1;
      T* here = base + static_cast<int64_t>(*v) * width;
      R previous = R::zero(), current = R::load(here);
      for (; v < last; ++v) {
        T* there = base + static_cast<int64_t>(v[1]) * width;
        const R next = R::load(there);
        previous.add(next);
        R blurred = current;
        blurred.add_scaled(T(0.5), previous);
        blurred.store(here);
        previous = current;
        current = next;
        here = there;
      }
      R blurred = current;
      blurred.add_scaled(T(0.5), previous);
      blurred.store(here);
    }
  });
}

#if FASTSEG_ISA_LEVEL >= 1
// Transposes 8 x 8 floats.
inline void transpose(__m256 (&v)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// Rows of `length` consecutive points, padded with `padding` up to `width` channels, from planar
// data: channel c of point i at planes[c * plane + i]. Multiplies by `sign`.
template <typename T>
void load_rows(const T* planes, int64_t plane, int channels, int64_t length, T sign, T padding,
               int width, int stride, T* rows) {
  int64_t i = 0;
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= length; i += 8) {
      for (int c = 0; c < width; c += 8) {
        __m256 v[8];
        for (int k = 0; k < 8; ++k) {
          v[k] = c + k < channels ? _mm256_loadu_ps(planes + (c + k) * plane + i) * sign
                                  : __m256() + padding;
        }
        transpose(v);
        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(rows + (i + k) * stride + c, v[k]);
      }
    }
  }
#endif
  for (; i < length; ++i) {
    for (int c = 0; c < width; ++c) {
      rows[i * stride + c] = c < channels ? planes[c * plane + i] * sign : padding;
    }
  }
}

// The inverse of load_rows, without sign and padding.
template <typename T>
void store_rows(const T* rows, int stride, int channels, int64_t length, int64_t plane, T* planes) {
  int64_t i = 0;
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= length; i += 8) {
      for (int c = 0; c < channels; c += 8) {
        __m256 v[8];
        for (int k = 0; k < 8; ++k) v[k] = _mm256_loadu_ps(rows + (i + k) * stride + c);
        transpose(v);
        for (int k = 0; k < 8 && c + k < channels; ++k) {
          _mm256_storeu_ps(planes + (c + k) * plane + i, v[k]);
        }
      }
    }
  }
#endif
  for (; i < length; ++i) {
    for (int c = 0; c < channels; ++c) planes[c * plane + i] = rows[i * stride + c];
  }
}

// Subtracts its largest value from each row of `width` channels, which soft-max does not notice.
// False if there is NaN or +inf, or a row without a finite value.
template <typename T>
bool shift_logits(T* rows, int points, int width) {
  bool valid = true;
  for (int p = 0; p < points; ++p, rows += width) {
    T largest = -static_cast<T>(INFINITY);
    int bad = 0;
    for (int c = 0; c < width; ++c) {
      bad |= !(rows[c] < static_cast<T>(INFINITY));
      largest = rows[c] > largest ? rows[c] : largest;
    }
    valid &= bad == 0 && largest > -static_cast<T>(INFINITY);
    for (int c = 0; c < width; ++c) rows[c] -= largest;
  }
  return valid;
}
