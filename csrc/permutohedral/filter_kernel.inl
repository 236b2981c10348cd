// Slice, splat and blur of rows of channels, one tile or range of chains at a time.

// out[p] = in[p] + coefficient * slice_scale[p] * sum_r weight[p][r] * values[vertex(p, r)] for the
// points of a tile, channel by channel; in = null is 0.
template <int kD1, typename T, typename R, typename Stride>
inline void slice_columns(const TileView<T>& tile, const T* values, const T* coefficient,
                          const T* in, T* out, Stride stride) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  const T* scale = tile.slice_scale;
  const R factor = R::load(coefficient);
  for (int p = 0; p < tile.points; ++p, weight += d1, out += stride) {
    const int32_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    R sum = R::zero();
    for (int r = 0; r < d1; ++r) sum.add_scaled(weight[r], R::load(values + vertex[r] * stride));
    if (scale != nullptr) sum.scale(scale[p]);
    R total = R::zero();
    if (in != nullptr) {
      // Energies stream from memory; the hardware prefetcher stops at every page.
      __builtin_prefetch(in + 64 * stride);
      __builtin_prefetch(in + 64 * stride + 16);
      total = R::load(in);
      in += stride;
    }
    total.add_product(factor, sum);
    total.store(out);
  }
}

template <typename T>
void slice_tile(const TileView<T>& tile, const T* values, int width, const T* coefficient,
                const T* in, T* out) {
  if (width == 1) return slice_channel(tile, values, *coefficient, in, out);
  for_each_column_stride<T>(width, [&](auto tag, int column, auto stride) {
    using R = decltype(tag);
    const T *from = in == nullptr ? in : in + column, *v = values + column,
            *c = coefficient + column;
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) return slice_columns<3, T, R>(tile, v, c, from, out + column, stride);
      if (tile.d1 == 6) return slice_columns<6, T, R>(tile, v, c, from, out + column, stride);
    }
    slice_columns<0, T, R>(tile, v, c, from, out + column, stride);
  });
}

// sums[row(p, r)] += weight[p][r] * splat_scale[p] * factor[p] * in[p] for the points p of the tile
// and the vertices r of their simplices; factor = null is 1.
template <int kD1, typename T, typename R, typename Stride>
inline void splat_columns(const TileView<T>& tile, const T* in, const T* factor, T* sums,
                          Stride stride) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1, in += stride) {
    const int32_t* target = tile.simplex_row + tile.point_simplex[p] * d1;
    R row = R::load(in);
    T scale = factor == nullptr ? T(1) : factor[p];
    if (tile.splat_scale != nullptr) scale *= tile.splat_scale[p];
    row.scale(scale);
    for (int r = 0; r < d1; ++r) {
      R sum = R::load(sums + target[r] * stride);
      sum.add_scaled(weight[r], row);
      sum.store(sums + target[r] * stride);
    }
  }
}

template <typename T>
void splat_tile(const TileView<T>& tile, const T* in, const T* factor, int width, T* sums) {
  if (width == 1) return splat_channel(tile, in, factor, sums);
  for_each_column_stride<T>(width, [&](auto tag, int column, auto stride) {
    using R = decltype(tag);
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return splat_columns<3, T, R>(tile, in + column, factor, sums + column, stride);
      }
      if (tile.d1 == 6) {
        return splat_columns<6, T, R>(tile, in + column, factor, sums + column, stride);
      }
    }
    splat_columns<0, T, R>(tile, in + column, factor, sums + column, stride);
  });
}

// values[v] = sums[v] + its extra rows of `sums`, for vertices [begin, end). All of these rows are
// 0 afterwards, ready for the next splat. The two arrays may be one.
template <typename T>
void merge_rows(const int32_t* extra_begin, const int32_t* extra, int64_t begin, int64_t end,
                int width, T* sums, T* values) {
  if (width == 1) return merge_channel(extra_begin, extra, begin, end, sums, values);
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    const auto take = [&](int64_t row) {
      T* from = sums + row * width + column;
      const R sum = R::load(from);
      R::zero().store(from);
      return sum;
    };
    for (int64_t v = begin; v < end; ++v) {
      R sum = take(v);
      for (int64_t k = extra_begin[v]; k < extra_begin[v + 1]; ++k) sum.add(take(extra[k]));
      sum.store(values + v * width + column);
    }
  });
}

// Blurs the chains [begin, end) of one axis in place: v + (previous + next) / 2, from old values.
template <typename T>
void blur_chains(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                 int width, T* values) {
  if (width == 1) return blur_channel(chain_begin, vertex, begin, end, values);
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
