// Matrices of float32 transposed by way of registers.

// The first halves of a and b, alternately, and the second ones.
FASTSEG_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    (*low)[i] = i % 2 ? b[i / 2] : a[i / 2];
    (*high)[i] = i % 2 ? b[(kLanes + i) / 2] : a[(kLanes + i) / 2];
  }
#else
  typedef int Lanes __attribute__((vector_size(kLanes * sizeof(int))));
  Lanes from_low, from_high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    from_low[i] = i / 2 + i % 2 * kLanes;
    from_high[i] = from_low[i] + kLanes / 2;
  }
  *low = __builtin_shuffle(a, b, from_low);
  *high = __builtin_shuffle(a, b, from_high);
#endif
}

// v[i][j] becomes v[j][i].
FASTSEG_INLINE void transpose_registers(Vec (&v)[kLanes]) {
  Vec next[kLanes];
#pragma GCC unroll 4
  for (int size = 1; size < kLanes; size *= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes / 2; ++j) {
      interleave(v[j], v[j + kLanes / 2], &next[2 * j], &next[2 * j + 1]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) v[j] = next[j];
  }
}

// to[i * to_step + j] = from[j * step + i] for i and j below kLanes.
FASTSEG_INLINE void transpose_tile(const float* from, int64_t step, float* to, int64_t to_step) {
  Vec v[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) v[j] = load(from + j * step);
  transpose_registers(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_step, v[i]);
}

// to[i * to_step + j] = from[j * step + i] for j below rows and i below columns.
static inline void transpose(const float* from, int64_t step, int64_t rows, int64_t columns,
                             float* to, int64_t to_step) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole_columns; i += kLanes) {
    for (int64_t j = 0; j < whole_rows; j += kLanes) {
      transpose_tile(from + j * step + i, step, to + i * to_step + j, to_step);
    }
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = i < whole_columns ? whole_rows : 0; j < rows; ++j) {
      to[i * to_step + j] = from[j * step + i];
    }
  }
}
