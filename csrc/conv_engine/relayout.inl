// Images from NCHW to channels last and back: matrices of (channel, pixel) transposed by way of
// registers, kLanes of each at a time, and rounded to bfloat16 where that is wanted.

// A value of another type; of the same type its bits, which narrow() may not keep.
template <typename From, typename To>
FASTSEG_INLINE void store_as(To* to, Vec v) {
  if constexpr (std::is_same_v<From, BFloat16> && std::is_same_v<To, BFloat16>) {
    *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector((Words)v >> 16, Halves);
  } else {
    store(to, v);
  }
}

template <typename From, typename To>
struct Relayout {
  // to[i * to_step + j] = from[j * step + i] for j below rows and i below columns.
  static void run(const From* from, int64_t step, int64_t rows, int64_t columns, To* to,
                  int64_t to_step) {
    if (rows == 3 && to_step == 3) return interleave_three(from, step, columns, to);
    for (int64_t i = 0; i < columns; i += kLanes) {
      for (int64_t j = 0; j < rows; j += kLanes) {
        const From* source = from + j * step + i;
        To* target = to + i * to_step + j;
        if (j + kLanes <= rows && i + kLanes <= columns) {
          tile(source, step, target, to_step);
        } else {
          part(source, step, std::min<int64_t>(rows - j, kLanes),
               std::min<int64_t>(columns - i, kLanes), target, to_step);
        }
      }
    }
  }

 private:
  static void tile(const From* from, int64_t step, To* to, int64_t to_step) {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) v[j] = load(from + j * step);
    transpose_registers(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_as<From>(to + i * to_step, v[i]);
  }

  static void part(const From* from, int64_t step, int64_t rows, int64_t columns, To* to,
                   int64_t to_step) {
    Vec v[kLanes] = {};
    alignas(64) To line[kLanes];
    for (int64_t j = 0; j < rows; ++j) v[j] = load_part(from + j * step, columns);
    transpose_registers(v);
    for (int64_t i = 0; i < columns; ++i) {
      store_as<From>(line, v[i]);
      std::memcpy(to + i * to_step, line, rows * sizeof(To));
    }
  }

  // Photographs.
  static void interleave_three(const From* from, int64_t step, int64_t columns, To* to) {
    constexpr int64_t kColumns = 64;
    alignas(64) To lines[3][kColumns];
    for (int64_t i = 0; i < columns; i += kColumns, to += 3 * kColumns) {
      const int64_t count = std::min(columns - i, kColumns);
      for (int64_t j = 0; j < 3; ++j) {
        for (int64_t l = 0; l < count; l += kLanes) {
          const From* source = from + j * step + i + l;
          const Vec v = l + kLanes <= count ? load(source) : load_part(source, count - l);
          store_as<From>(lines[j] + l, v);
        }
      }
      for (int64_t l = 0; l < count; ++l) {
        for (int64_t j = 0; j < 3; ++j) to[l * 3 + j] = lines[j][l];
      }
    }
  }
};
