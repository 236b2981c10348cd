// Slice, splat and blur of a single channel, which is not padded: a register holds the weights of a
// point instead of its channels.

template <int kD1, typename T>
inline void slice_scalars(const TileView<T>& tile, const T* values, T coefficient, const T* in,
                          T* out) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    const int32_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    T sum = 0;
    for (int r = 0; r < d1; ++r) sum += weight[r] * values[vertex[r]];
    if (tile.slice_scale != nullptr) sum *= tile.slice_scale[p];
    out[p] = (in == nullptr ? T(0) : in[p]) + coefficient * sum;
  }
}

template <int kD1, typename T>
inline void splat_scalars(const TileView<T>& tile, const T* in, const T* factor, T* sums) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    const int32_t* target = tile.simplex_row + tile.point_simplex[p] * d1;
    T value = in[p];
    if (factor != nullptr) value *= factor[p];
    if (tile.splat_scale != nullptr) value *= tile.splat_scale[p];
    for (int r = 0; r < d1; ++r) sums[target[r]] += weight[r] * value;
  }
}

#if FASTSEG_ISA_LEVEL >= 1
// Up to kCorners corners of a simplex in a register of floats, 4 or 8. Where a point has fewer
// weights, the lanes behind them hold those of the next point, times corners that are 0 or ignored.
template <int kCorners>
struct Corners;
template <>
struct Corners<4> {
  using V = __m128;
  static V gather(const float* values, const int32_t* vertex, int d1) {
    const __m128i lanes = _mm_cmpgt_epi32(_mm_set1_epi32(d1), _mm_setr_epi32(0, 1, 2, 3));
    const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(vertex));
    return _mm_mask_i32gather_ps(V(), values, at, _mm_castsi128_ps(lanes), 4);
  }
  static V load(const float* p) { return _mm_loadu_ps(p); }
  static V all(const float* p) { return _mm_broadcast_ss(p); }
  static V multiply_add(V a, V b, V c) { return _mm_fmadd_ps(a, b, c); }
  static V mask(V a, const int32_t* p) {
    return _mm_and_ps(a, all(reinterpret_cast<const float*>(p)));
  }
};
template <>
struct Corners<8> {
  using V = __m256;
  static V gather(const float* values, const int32_t* vertex, int d1) {
    const __m256i lanes =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(d1), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(vertex));
    return _mm256_mask_i32gather_ps(V(), values, at, _mm256_castsi256_ps(lanes), 4);
  }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V all(const float* p) { return _mm256_broadcast_ss(p); }
  static V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V mask(V a, const int32_t* p) {
    return _mm256_and_ps(a, all(reinterpret_cast<const float*>(p)));
  }
};

// Lane k: the sum of the lower half of v[k] for k < 4, of the upper half of v[k - 4] from there on.
inline __m256 sum_of_half_lanes(const __m256* v) {
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  return _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
}
// Lane k: the sum of v[k].
inline __m256 sum_of_lanes(const __m256* v) {
  const __m256 a = sum_of_half_lanes(v), b = sum_of_half_lanes(v + 4);
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}
inline __m256 load_halves(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}

// slice_scalars for d1 <= kCorners: the corners of each simplex are gathered once.
template <int kD1, int kCorners>
inline void slice_short(const TileView<float>& tile, const float* values, float coefficient,
                        const float* in, float* out) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1, points = tile.points;
  alignas(32) float corner[kTilePoints * kCorners];
  for (int64_t s = 0; s < tile.simplices; ++s) {
    const auto v = Corners<kCorners>::gather(values, tile.simplex_vertex + s * d1, d1);
    __builtin_memcpy(corner + s * kCorners, &v, sizeof(v));
  }
  const __m256 factor = _mm256_set1_ps(coefficient);
  const auto slice_points = [&](int p, auto count) {  // 8 or fewer
    const float* weight = tile.weight + static_cast<int64_t>(p) * d1;
    const uint16_t* simplex = tile.point_simplex + p;
    const auto weight_of = [&](int k) { return weight + (k < count ? k : 0) * d1; };
    const auto corner_of = [&](int k) {
      return corner + static_cast<size_t>(simplex[k < count ? k : 0]) * kCorners;
    };
    __m256 v[kCorners], sum;
    if constexpr (kCorners == 8) {
      for (int k = 0; k < 8; ++k)
        v[k] = _mm256_loadu_ps(weight_of(k)) * _mm256_load_ps(corner_of(k));
      sum = sum_of_lanes(v);
    } else {
      for (int k = 0; k < 4; ++k) {
        v[k] = load_halves(weight_of(k), weight_of(k + 4)) *
               load_halves(corner_of(k), corner_of(k + 4));
      }
      sum = sum_of_half_lanes(v);
    }
    const __m256i lanes =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    if (tile.slice_scale != nullptr) sum = sum * _mm256_maskload_ps(tile.slice_scale + p, lanes);
    const __m256 start = in == nullptr ? __m256() : _mm256_maskload_ps(in + p, lanes);
    _mm256_maskstore_ps(out + p, lanes, multiply_add(factor, sum, start));
  };
  int p = 0;
  for (; p + 8 <= points; p += 8) slice_points(p, std::integral_constant<int, 8>());
  if (p < points) slice_points(p, points - p);
}

// splat_scalars for d1 <= kCorners: summed by simplex, then by vertex. Neighbours often share a
// simplex, whose sum then stays in its register, since to read back what was just written takes
// longer than the addition; and two halves of the tile take turns, as each one waits for the last.
template <int kD1, int kCorners>
inline void splat_short(const TileView<float>& tile, const float* in, const float* factor,
                        float* sums) {
  using C = Corners<kCorners>;
  using V = typename C::V;
  const int64_t d1 = kD1 > 0 ? kD1 : tile.d1, points = tile.points, simplices = tile.simplices;
  float scaled[kTilePoints];
  for (const float* scale : {factor, tile.splat_scale}) {
    if (scale == nullptr) continue;
    for (int64_t p = 0; p < points; ++p) scaled[p] = in[p] * scale[p];
    in = scaled;
  }
  const uint16_t* simplex = tile.point_simplex;
  int32_t same[kTilePoints];    // all bits, if a point's simplex is that of the point before
  uint16_t start[kTilePoints];  // one that stays 0 then, else its own simplex
  for (int64_t p = 0; p < points; ++p) {
    const bool equal = simplex[p] == simplex[p - 1];
    same[p] = -static_cast<int32_t>(equal);
    start[p] = equal ? static_cast<uint16_t>(kTilePoints) : simplex[p];
  }
  alignas(32) float corner[2][(kTilePoints + 1) * kCorners];
  for (auto& part : corner) {
    __builtin_memset(part, 0, static_cast<size_t>(simplices) * sizeof(V));
    __builtin_memset(part + kTilePoints * kCorners, 0, sizeof(V));
  }
  const auto add = [&](float* part, int64_t p, V& sum) {
    const auto at = [&](uint16_t s) { return part + static_cast<size_t>(s) * kCorners; };
    sum = C::multiply_add(C::load(tile.weight + p * d1), C::all(in + p), C::load(at(start[p]))) +
          C::mask(sum, same + p);
    __builtin_memcpy(at(simplex[p]), &sum, sizeof(V));
  };
  const int64_t half = points / 2;
  V first = V(), second = V();  // no matter what the first points' simplices are compared with
  for (int64_t p = 0; p < half; ++p) {
    add(corner[0], p, first);
    add(corner[1], half + p, second);
  }
  if (points % 2 != 0) add(corner[1], points - 1, second);

  const auto add_to_vertices = [&](int64_t s) {
    const int32_t* row = tile.simplex_row + s * d1;
    const V both = C::load(corner[0] + s * kCorners) + C::load(corner[1] + s * kCorners);
    float part[kCorners];
    __builtin_memcpy(part, &both, sizeof(V));
    for (int64_t r = 0; r < d1; ++r) sums[row[r]] += part[r];
  };
  for (int64_t s = 0; s < simplices / 2; ++s) {
    add_to_vertices(s);
    add_to_vertices(simplices / 2 + s);
  }
  if (simplices % 2 != 0) add_to_vertices(simplices - 1);
}
#endif

template <typename T>
void slice_channel(const TileView<T>& tile, const T* values, T coefficient, const T* in, T* out) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (tile.d1 == 3) return slice_short<3, 4>(tile, values, coefficient, in, out);
    if (tile.d1 == 6) return slice_short<6, 8>(tile, values, coefficient, in, out);
    if (tile.d1 <= 8) return slice_short<0, 8>(tile, values, coefficient, in, out);
  }
#endif
  if (tile.d1 == 3) return slice_scalars<3>(tile, values, coefficient, in, out);
  if (tile.d1 == 6) return slice_scalars<6>(tile, values, coefficient, in, out);
  return slice_scalars<0>(tile, values, coefficient, in, out);
}

template <typename T>
void splat_channel(const TileView<T>& tile, const T* in, const T* factor, T* sums) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (tile.d1 == 3) return splat_short<3, 4>(tile, in, factor, sums);
    if (tile.d1 == 6) return splat_short<6, 8>(tile, in, factor, sums);
    if (tile.d1 <= 8) return splat_short<0, 8>(tile, in, factor, sums);
  }
#endif
  if (tile.d1 == 3) return splat_scalars<3>(tile, in, factor, sums);
  if (tile.d1 == 6) return splat_scalars<6>(tile, in, factor, sums);
  return splat_scalars<0>(tile, in, factor, sums);
}

template <typename T>
void merge_channel(const int32_t* extra_begin, const int32_t* extra, int64_t begin, int64_t end,
                   T* sums, T* values) {
  for (int64_t v = begin; v < end; ++v) {
    T sum = sums[v];
    sums[v] = 0;
    for (int64_t k = extra_begin[v]; k < extra_begin[v + 1]; ++k) {
      sum += sums[extra[k]];
      sums[extra[k]] = 0;
    }
    values[v] = sum;
  }
}

template <typename T>
void blur_channel(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                  T* values) {
  for (int64_t c = begin; c < end; ++c) {
    const int32_t* last = vertex + chain_begin[c + 1] - 1;
    T previous = 0, current = values[vertex[chain_begin[c]]];
    for (const int32_t* v = vertex + chain_begin[c]; v < last; ++v) {
      const T next = values[v[1]];
      values[*v] = current + T(0.5) * (previous + next);
      previous = current;
      current = next;
    }
    values[*last] = current + T(0.5) * previous;
  }
}
