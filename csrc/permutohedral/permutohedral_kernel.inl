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
    const V all = V() + s;
    for (int i = 0; i < kFull; ++i) full[i] = multiply_add(all, other.full[i], full[i]);
    if constexpr (kHalf) half = multiply_add(H() + s, other.half, half);
  }
  void add(const Row& other) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] + other.full[i];
    if constexpr (kHalf) half = half + other.half;
  }
  void scale(T s) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] * s;
    if constexpr (kHalf) half = half * s;
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
// a factor per channel (diagonal), or a symmetric width x width matrix.
template <typename T>
void gather_rows(const T* values, int width, int local_stride, const int32_t* vertex, int count,
                 const T* diagonal, const T* matrix, T* local) {
  for (int k = 0; k < count; ++k) {
    const T* source = values + static_cast<int64_t>(vertex[k]) * width;
    T* target = local + static_cast<int64_t>(k) * local_stride;
    for_each_column_group<T>(width, [&](auto tag, int column) {
      using R = decltype(tag);
      R row = R::zero();
      if (matrix == nullptr) {
        row = R::load(source + column);
        row.multiply(R::load(diagonal + column));
      } else {
        for (int m = 0; m < width; ++m) {
          row.add_scaled(source[m], R::load(matrix + static_cast<int64_t>(m) * width + column));
        }
      }
      row.store(target + column);
    });
  }
}

// Writes a tile's partial sums to their rows.
template <typename T>
void scatter_rows(const T* local, int width, int local_stride, const int32_t* row, int count,
                  T* values) {
  for (int k = 0; k < count; ++k) {
    const T* source = local + static_cast<int64_t>(k) * local_stride;
    T* target = values + static_cast<int64_t>(row[k]) * width;
    for_each_column_group<T>(width, [&](auto tag, int column) {
      decltype(tag)::load(source + column).store(target + column);
    });
  }
}

// out[p] = in[p] + scale[p] * sum_r weight[p][r] * local[vertex(p, r)] for the points of a tile.
template <typename T, typename R, int kD1>
inline void slice_columns(const TileView<T>& tile, const T* local, int stride, const T* in,
                          int in_stride, T* out) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const uint16_t* vertex = tile.group_vertex;
  const uint16_t* point = tile.slot_point;
  const T* weight = tile.weight;
  const T* scale = tile.slice_scale;
  for (int g = 0; g < tile.groups; ++g, vertex += d1) {
    R rows[kD1 > 0 ? kD1 : 1];
    if constexpr (kD1 > 0) {
      for (int r = 0; r < kD1; ++r) rows[r] = R::load(local + vertex[r] * stride);
    }
    for (int i = 0; i < tile.group_size[g]; ++i, ++point, weight += d1) {
      const T* from = in + *point * in_stride;
      R sum = scale == nullptr ? R::load(from) : R::zero();
      if constexpr (kD1 > 0) {
        for (int r = 0; r < kD1; ++r) sum.add_scaled(weight[r], rows[r]);
      } else {
        for (int r = 0; r < d1; ++r) sum.add_scaled(weight[r], R::load(local + vertex[r] * stride));
      }
      if (scale != nullptr) {
        R total = R::load(from);
        total.add_scaled(*scale++, sum);
        sum = total;
      }
      sum.store(out + *point * stride);
    }
  }
}
template <typename T>
void slice_tile(const TileView<T>& tile, const T* local, int width, int stride, const T* in,
                int in_stride, T* out) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    const T* from = in + column;
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return slice_columns<T, R, 3>(tile, local + column, stride, from, in_stride, out + column);
      }
      if (tile.d1 == 6) {
        return slice_columns<T, R, 6>(tile, local + column, stride, from, in_stride, out + column);
      }
    }
    slice_columns<T, R, 0>(tile, local + column, stride, from, in_stride, out + column);
  });
}

// local[v] = sum over the tile's points p and vertices r of weight[p][r] * scale[p] * in[p].
template <typename T, typename R, int kD1>
inline void splat_columns(const TileView<T>& tile, const T* in, int stride, T* local) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const uint16_t* vertex = tile.group_vertex;
  const uint16_t* point = tile.slot_point;
  const T* weight = tile.weight;
  const T* scale = tile.splat_scale;
  for (int k = 0; k < tile.pairs; ++k) R::zero().store(local + k * stride);
  for (int g = 0; g < tile.groups; ++g, vertex += d1) {
    R sums[kD1 > 0 ? kD1 : 1];
    if constexpr (kD1 > 0) {
      for (int r = 0; r < kD1; ++r) sums[r] = R::load(local + vertex[r] * stride);
    }
    for (int i = 0; i < tile.group_size[g]; ++i, ++point, weight += d1) {
      R row = R::load(in + *point * stride);
      if (scale != nullptr) row.scale(*scale++);
      if constexpr (kD1 > 0) {
        for (int r = 0; r < kD1; ++r) sums[r].add_scaled(weight[r], row);
      } else {
        for (int r = 0; r < d1; ++r) {
          R sum = R::load(local + vertex[r] * stride);
          sum.add_scaled(weight[r], row);
          sum.store(local + vertex[r] * stride);
        }
      }
    }
    if constexpr (kD1 > 0) {
      for (int r = 0; r < kD1; ++r) sums[r].store(local + vertex[r] * stride);
    }
  }
}
template <typename T>
void splat_tile(const TileView<T>& tile, const T* in, int width, int stride, T* local) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return splat_columns<T, R, 3>(tile, in + column, stride, local + column);
      }
      if (tile.d1 == 6) {
        return splat_columns<T, R, 6>(tile, in + column, stride, local + column);
      }
    }
    splat_columns<T, R, 0>(tile, in + column, stride, local + column);
  });
}

// Adds the further partial sums of vertices [begin, end) of the merge list to their first one.
template <typename T>
void merge_rows(const int32_t* vertex, const int32_t* rows_begin, int64_t begin, int64_t end,
                int64_t vertices, int width, T* values) {
  for (int64_t i = begin; i < end; ++i) {
    T* target = values + static_cast<int64_t>(vertex[i]) * width;
    const T* extra = values + vertices * width;
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

// exp(x) for x <= 0 to 1 ulp or so; 0 below -87. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
template <typename V>
inline V exp_negative(V x) {
  using I = decltype(x > x);
  const V zero = V();
  const V low = zero - 87.0f;
  const V clamped = x > low ? x : low;
  const V magic = zero + 12582912.0f;
  const V n = multiply_add(clamped, zero + 1.44269504088896341f, magic) - magic;
  V r = multiply_add(n, zero - 0.693359375f, clamped);
  r = multiply_add(n, zero + 2.12194440e-4f, r);
  V p = multiply_add(zero + 1.9875691500e-4f, r, zero + 1.3981999507e-3f);
  p = multiply_add(p, r, zero + 8.3334519073e-3f);
  p = multiply_add(p, r, zero + 4.1665795894e-2f);
  p = multiply_add(p, r, zero + 1.6666665459e-1f);
  p = multiply_add(p, r, zero + 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1.0f);
  const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof(V));
  return x > low ? p * power : zero;
}

#if FASTSEG_ISA_LEVEL >= 1
inline float max_lanes(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_lanes(__m256 v) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
#endif
#if FASTSEG_ISA_LEVEL >= 2
inline __m256 upper_half(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }
inline float max_lanes(__m512 v) {
  return max_lanes(_mm256_max_ps(_mm512_castps512_ps256(v), upper_half(v)));
}
inline float sum_lanes(__m512 v) {
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256(v), upper_half(v)));
}
#elif FASTSEG_ISA_LEVEL == 0
inline float max_lanes(FloatLane v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline float sum_lanes(FloatLane v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

// Soft-max of rows of up to 32 labels, which stay in registers.
template <int kEights>
inline void softmax_short_rows(float* rows, int points, int stride) {
  using R = Row<float, kEights>;
  for (int p = 0; p < points; ++p, rows += stride) {
    R row = R::load(rows);
    float largest = -INFINITY, sum = 0;
    if constexpr (R::kFull > 0) {
      auto top = row.full[0];
      for (int i = 1; i < R::kFull; ++i) top = row.full[i] > top ? row.full[i] : top;
      largest = max_lanes(top);
    }
    if constexpr (R::kHalf) {
      const float half = max_lanes(row.half);
      largest = half > largest ? half : largest;
    }
    for (int i = 0; i < R::kFull; ++i) row.full[i] = exp_negative(row.full[i] - largest);
    if constexpr (R::kHalf) row.half = exp_negative(row.half - largest);
    if constexpr (R::kFull > 0) {
      auto total = row.full[0];
      for (int i = 1; i < R::kFull; ++i) total = total + row.full[i];
      sum = sum_lanes(total);
    }
    if constexpr (R::kHalf) sum += sum_lanes(row.half);
    row.scale(1.0f / sum);
    row.store(rows);
  }
}

// Soft-max over the labels of each row, in place. The padding after them is -inf and becomes 0.
template <typename T>
void softmax_tile(T* rows, int points, int width, int stride) {
  if constexpr (sizeof(T) == 4) {
    switch (width) {
      case 8:
        return softmax_short_rows<1>(rows, points, stride);
      case 16:
        return softmax_short_rows<2>(rows, points, stride);
      case 24:
        return softmax_short_rows<3>(rows, points, stride);
      case 32:
        return softmax_short_rows<4>(rows, points, stride);
    }
  }
  for (int p = 0; p < points; ++p, rows += stride) {
    T largest = rows[0], sum = 0;
    for (int l = 1; l < width; ++l) largest = rows[l] > largest ? rows[l] : largest;
    if constexpr (sizeof(T) == 4) {
      for (int l = 0; l < width; l += 8) {
        Row<float, 1> part = Row<float, 1>::load(rows + l);
        for (int i = 0; i < part.kFull; ++i) part.full[i] = exp_negative(part.full[i] - largest);
        if constexpr (Row<float, 1>::kHalf) part.half = exp_negative(part.half - largest);
        part.store(rows + l);
      }
    } else {
      for (int l = 0; l < width; ++l) rows[l] = std::exp(rows[l] - largest);
    }
    for (int l = 0; l < width; ++l) sum += rows[l];
    for (int l = 0; l < width; ++l) rows[l] /= sum;
  }
}
