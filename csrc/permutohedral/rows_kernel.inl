// Rows of channels: from planar data and back, scaled, and multiplied by a matrix.

// rows[k] = matrix rows[k] for rows [begin, end); `matrix` is symmetric, width x width.
template <typename T>
void transform_rows(const T* matrix, int64_t begin, int64_t end, int width, T* rows) {
  std::vector<T> source(static_cast<size_t>(width));
  for (int64_t k = begin; k < end; ++k) {
    T* row = rows + k * width;
    __builtin_memcpy(source.data(), row, static_cast<size_t>(width) * sizeof(T));
    for_each_column_group<T>(width, [&](auto tag, int column) {
      using R = decltype(tag);
      R sum = R::zero();
      for (int m = 0; m < width; ++m) {
        sum.add_scaled(source[static_cast<size_t>(m)],
                       R::load(matrix + static_cast<int64_t>(m) * width + column));
      }
      sum.store(row + column);
    });
  }
}

// rows[p] *= factor[p]
template <typename T>
void scale_rows(T* rows, int points, int width, const T* factor) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    for (int p = 0; p < points; ++p) {
      R row = R::load(rows + p * width + column);
      row.scale(factor[p]);
      row.store(rows + p * width + column);
    }
  });
}

// Rows of `length` consecutive points, padded with `padding` up to `width` channels, from planar
// data: channel c of point i at planes[c * plane + i]. Multiplies by `sign`.
template <typename T>
void load_rows(const T* planes, int64_t plane, int channels, int64_t length, T sign, T padding,
               int width, int stride, T* rows) {
  int64_t i = 0;
  if (width == 1) {
    for (; i < length; ++i) rows[i] = planes[i] * sign;
    return;
  }
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    // Eight planes at a time, as a core keeps the addresses of few pages at hand. The last eight
    // points overlap those before them where the length is not a multiple of 8.
    for (int c = 0; c < width && length >= 8; c += 8) {
      for (i = 0; i < length; i += 8) {
        if (i + 8 > length) i = length - 8;
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
  if (stride == 1) {
    for (; i < length; ++i) planes[i] = rows[i];
    return;
  }
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    for (int c = 0; c < channels && length >= 8; c += 8) {
      for (i = 0; i < length; i += 8) {
        if (i + 8 > length) i = length - 8;
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
