// The register tile of 1x1 convolutions: few rows of two panels. Rows are found by strides instead
// of a table, and what the next tile adds to and writes is fetched between the products, a row at a
// time: 28 lines in one go hold up all other misses of L1. Written through the caches: the lines
// are there before they are written, and the next layer finds them there.

constexpr int kWideRows = 6;  // 24 sums + 4 of B + 1 of A in 32 registers
constexpr int kWideVectors = 4;
constexpr int64_t kWideColumns = kWideVectors * kLanes;
static_assert(kWideColumns == 2 * kPanel, "two panels");
constexpr int64_t kWideSums = kWideRows * kWideColumns;
constexpr int kWideSteps = 8;  // of the reduction, between two rows that are fetched
template <class E>
constexpr int64_t kWideStep = kWideSteps * kPerWord<E>;

// Rows of operands: `length` of each, a multiple of kWideStep.
template <class E>
struct WideRun {
  const E* data;
  int64_t row, length;
};

// Rows of output: the columns of the first panel, and `right` values behind them those of the
// second one.
template <typename T>
struct WideRows {
  T* data;  // may be null
  int64_t row, right;

  FASTSEG_MEMBER_INLINE T* at(int r, int v) const {
    constexpr int kHalf = kWideVectors / 2;
    return data + r * row + (v < kHalf ? 0 : right) + v % kHalf * kLanes;
  }
};

// T: of images and operands. Y: of the result.
template <class T, class Y = T>
struct WideTile {
  WideRun<T> runs[2];     // one behind the other; the second may have length 0
  const T *left, *right;  // packed panels
  // What becomes of the sums, arrays of kWideRows x kWideColumns: where there is `to`, that is
  // `from` plus or minus them. `base`, if any, is added, then they go to `sums` or, where that is
  // null, with bias and residual, at least `low` and at most `high`, to y. Of bfloat16 all go to y.
  float *base, *sums, *to;
  const float* from;
  float sign;
  const float* bias;
  WideRows<const T> residual;
  WideRows<Y> y;
  float low, high;
  // What is fetched meanwhile: rows of the next tile, and every few steps `lines` of either place.
  WideRows<const T> next_residual;
  WideRows<const Y> next_y;
  const T* ahead[2];
  int64_t lines;
};

template <class T>
FASTSEG_INLINE void fetch_row(WideRows<const T>& rows) {
  if (!rows.data) return;
  constexpr int kStep = sizeof(float) / sizeof(T);  // vectors in a line
#pragma GCC unroll 4
  for (int v = 0; v < kWideVectors; v += kStep) __builtin_prefetch(rows.at(0, v), 0, 2);
  rows.data += rows.row;
}

// One function for all that becomes of the sums: it is inlined nowhere, as its loop would be.
template <class T, class Y>
__attribute__((noinline)) static void wide_tile(const WideTile<T, Y>& tile) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  const auto each = [](auto&& fn) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int r = 0; r < kWideRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) fn(r, v);
    }
  };
  const auto at = [](auto* sums, int r, int v) __attribute__((always_inline)) {
    return sums + r * kWideColumns + v * kLanes;
  };
  const WideRows<const float> biases{tile.bias, 0, tile.y.right};
  Vec sums[kWideRows][kWideVectors], total[kWideRows][kWideVectors];
  bool has_total = false;
  int64_t terms = 0;  // in the sums, the others are in the total
  if (kFloat && (tile.sums || tile.to)) {
    each([&](int r, int v) __attribute__((always_inline)) { sums[r][v] = Vec{}; });
    for (int r = 0; tile.residual.data && r < kWideRows; ++r) {
      for (int v = 0; v < kWideVectors; ++v) {
        float* base = at(tile.base, r, v);
        store(base, load(base) + load(tile.residual.at(r, v)));
      }
    }
  } else if (tile.residual.data) {
    each([&](int r, int v) __attribute__((always_inline)) {
      sums[r][v] = load(biases.at(0, v)) + load(tile.residual.at(r, v));
    });
  } else {
    each([&](int r, int v) __attribute__((always_inline)) { sums[r][v] = load(biases.at(0, v)); });
  }

  const T *left = tile.left, *right = tile.right;
  const T *ahead = tile.ahead[0], *ahead_too = tile.ahead[1];
  WideRows<const T> residual = tile.next_residual;
  WideRows<const Y> y = tile.next_y;
  int rows_left = kWideRows;
  for (const WideRun<T>& run : tile.runs) {
    int64_t row = run.row;
    const T *a = run.data, *a3 = a + 3 * row;
    for (int64_t d = 0; d < run.length; d += kWideStep<T>, terms += kWideSteps) {
      if (kShortSums<T> && terms == kGemmTerms) {
        add_to_total(sums, total, has_total);
        has_total = true;
        terms = 0;
      }
      constexpr int kRowsAtOnce = sizeof(float) / sizeof(T);  // as many lines
      for (int r = 0; r < kRowsAtOnce && rows_left > 0; ++r, --rows_left) {
        fetch_row(residual);
        fetch_row(y);
      }
      for (int64_t i = 0; i < tile.lines; ++i) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead_too, 0, 2);
        ahead += kLine<T>, ahead_too += kLine<T>;
      }
#pragma GCC unroll 8
      for (int l = 0; l < kWideSteps; ++l) {
        decltype(load_words(left)) columns[kWideVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kWideVectors; ++v) {
          const T* panel = v < 2 ? left : right;
          columns[v] = load_words(panel + (v % 2 * kLanes + l * kPanel) * kPerWord<T>);
        }
        asm("" : "+r"(row));  // as in gemm_tile.inl
#pragma GCC unroll 6
        for (int r = 0; r < kWideRows; ++r) {
          const auto scalar =
              broadcast(load_word((r < 3 ? a : a3) + r % 3 * row + l * kPerWord<T>));
#pragma GCC unroll 4
          for (int v = 0; v < kWideVectors; ++v) {
            sums[r][v] = multiply_add(sums[r][v], scalar, columns[v]);
          }
        }
      }
      a += kWideStep<T>, a3 += kWideStep<T>;
      left += kWideStep<T> * kPanel, right += kWideStep<T> * kPanel;
    }
  }

  if (kShortSums<T> && has_total) {
    each([&](int r, int v) __attribute__((always_inline)) { sums[r][v] += total[r][v]; });
  }
  if (kFloat && tile.to) {
    each([&](int r, int v) __attribute__((always_inline)) {
      store(at(tile.to, r, v), load(at(tile.from, r, v)) + tile.sign * sums[r][v]);
    });
  }
  if (kFloat && tile.base) {
    each([&](int r, int v)
             __attribute__((always_inline)) { sums[r][v] += load(at(tile.base, r, v)); });
  }
  if (kFloat && tile.sums) {
    return each([&](int r, int v)
                    __attribute__((always_inline)) { store(at(tile.sums, r, v), sums[r][v]); });
  }
  if (kFloat && tile.to) {
    each([&](int r, int v) __attribute__((always_inline)) { sums[r][v] += load(biases.at(0, v)); });
  }
  // A maximum for any activation: jumps for each vector cost tiles of 64 terms 8 %.
  const Vec low = Vec{} + tile.low, high = Vec{} + tile.high;
  if (tile.high < __builtin_inff()) {
    each([&](int r, int v)
             __attribute__((always_inline)) { sums[r][v] = at_most(high, sums[r][v]); });
  }
  each([&](int r, int v)
           __attribute__((always_inline)) { store(tile.y.at(r, v), at_least(low, sums[r][v])); });
}

// What a convolution must be to end in such tiles, and the bounds of its activation.
template <class Conv>
bool ends_wide(const Conv& conv) {
  return is_short(conv.activation) && conv.activation != Activation::kLeakyRelu &&
         !(conv.residual.data && conv.residual_last);
}
template <class Tile, class Conv>
void set_bounds(Tile& tile, const Conv& conv) {
  tile.low = conv.activation == Activation::kNone ? -__builtin_inff() : 0.0f;
  tile.high = conv.activation == Activation::kRelu6 ? 6.0f : __builtin_inff();
}

// From one pixel of an image as large as the output to the next one, and whether they follow each
// other.
template <class Conv, typename T>
int64_t flat_pixel(const Conv& conv, const Image<T>& image) {
  return conv.Wo > 1 ? image.pixel : conv.Ho > 1 ? image.row : image.batch;
}
template <class Conv, typename T>
bool is_flat(const Conv& conv, const Image<T>& image) {
  const int64_t pixel = flat_pixel(conv, image);
  return (conv.Ho == 1 || image.row == conv.Wo * pixel) &&
         (conv.N == 1 || image.batch == conv.Ho * conv.Wo * pixel);
}
// The same of all that it reads and of all that it adds to and writes.
template <class Conv>
bool reads_flat(const Conv& conv) {
  return conv.is_pointwise() && conv.Ho == conv.H && conv.Wo == conv.W &&
         (!conv.C2 || conv.summand_is_flat());
}
template <class Conv>
bool writes_flat(const Conv& conv) {
  return is_flat(conv, conv.y) && (!conv.residual.data || is_flat(conv, conv.residual));
}
