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
#if FASTSEG_ISA_LEVEL >= 1
// Lanes 0..d1-1.
inline __m256i first_lanes(int d1) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(d1), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The same for d1 <= 8, a register per point: the vertices of each simplex are gathered once.
inline void slice_short(const TileView<float>& tile, const float* values, float coefficient,
                        const float* in, float* out) {
  const int d1 = tile.d1;
  alignas(32) float corner[kTilePoints * 8];
  const __m256i mask = first_lanes(d1);
  for (int s = 0; s < tile.simplices; ++s) {
    const int32_t* vertex = tile.simplex_vertex + s * d1;
    _mm256_store_ps(corner + s * 8,
                    _mm256_mask_i32gather_ps(__m256(), values, _mm256_maskload_epi32(vertex, mask),
                                             _mm256_castsi256_ps(mask), 4));
  }
  const float* weight = tile.weight;
  for (int p = 0; p < tile.points; p += 8) {
    __m256 v[8];
    const int count = tile.points - p < 8 ? tile.points - p : 8;
    for (int k = 0; k < 8; ++k) v[k] = __m256();
    for (int k = 0; k < count; ++k, weight += d1) {
      v[k] =
          _mm256_maskload_ps(weight, mask) * _mm256_load_ps(corner + tile.point_simplex[p + k] * 8);
    }
    transpose(v);
    __m256 sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    const __m256i points = first_lanes(count);
    if (tile.slice_scale != nullptr) {
      sum = sum * _mm256_maskload_ps(tile.slice_scale + p, points);
    }
    const __m256 start = in == nullptr ? __m256() : _mm256_maskload_ps(in + p, points);
    _mm256_maskstore_ps(out + p, points, multiply_add(__m256() + coefficient, sum, start));
  }
}
#endif
template <typename T>
void slice_channel(const TileView<T>& tile, const T* values, T coefficient, const T* in, T* out) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (tile.d1 <= 8) return slice_short(tile, values, coefficient, in, out);
  }
#endif
  if (tile.d1 == 3) return slice_scalars<3>(tile, values, coefficient, in, out);
  if (tile.d1 == 6) return slice_scalars<6>(tile, values, coefficient, in, out);
  return slice_scalars<0>(tile, values, coefficient, in, out);
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
// The same for d1 <= 8, a register per point: summed by simplex, then by vertex.
inline void splat_short(const TileView<float>& tile, const float* in, const float* factor,
                        float* sums) {
  const int d1 = tile.d1;
  alignas(32) float corner[kTilePoints * 8];
  for (int s = 0; s < tile.simplices; ++s) _mm256_store_ps(corner + s * 8, __m256());
  const __m256i mask = first_lanes(d1);
  const float* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    float value = in[p];
    if (factor != nullptr) value *= factor[p];
    if (tile.splat_scale != nullptr) value *= tile.splat_scale[p];
    float* target = corner + tile.point_simplex[p] * 8;
    _mm256_store_ps(target, multiply_add(_mm256_maskload_ps(weight, mask), __m256() + value,
                                         _mm256_load_ps(target)));
  }
  for (int s = 0; s < tile.simplices; ++s) {
    const int32_t* row = tile.simplex_row + s * d1;
    for (int r = 0; r < d1; ++r) sums[row[r]] += corner[s * 8 + r];
  }
}
#endif
template <typename T>
void splat_channel(const TileView<T>& tile, const T* in, const T* factor, T* sums) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (tile.d1 <= 8) return splat_short(tile, in, factor, sums);
  }
#endif
  if (tile.d1 == 3) return splat_scalars<3>(tile, in, factor, sums);
  if (tile.d1 == 6) return splat_scalars<6>(tile, in, factor, sums);
  return splat_scalars<0>(tile, in, factor, sums);
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
