// The register tiles everything else feeds: rows x kPanel products.
//   a: packed as [depth / kLine][stride][kLine], one cache line per row and group of the reduction,
//      of which `rows` are wanted, or rows of an image where they lie
//   b: [depth / kPerWord][kPanel][kPerWord]
//   out.start(r, column): what the sums of row r, columns [column, column + kLanes) start from
//   out.finish(r, column, Vec): takes the finished sums

// What to fetch into L2 meanwhile: two lines in each of the first `steps` of every kGroup words of
// the reduction. Where weights stream from L3 that takes 512 channels from 17.4 to 15.5 ms.
template <typename E>
struct Ahead {
  const E* lines;
  int64_t steps;
};

// Products in one sum of a convolution's matrix product, which then goes to a total: one sum of
// 5000 has an error of 4e-6, beyond that of torch's convolution. Beside the rounding of bfloat16
// operands it does not matter.
constexpr int64_t kGemmTerms = 128;
template <class E>
constexpr bool kShortSums = std::is_same_v<E, float>;

// Sums in registers begin anew. `more`: the total is not their first.
template <int R, int V>
FASTSEG_INLINE void add_to_total(Vec (&sums)[R][V], Vec (&total)[R][V], bool more) {
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      total[r][v] = more ? total[r][v] + sums[r][v] : sums[r][v];
      sums[r][v] = Vec{};
    }
  }
}

// R rows by V vectors, all accumulators in registers. One scalar of A feeds V multiply-adds from a
// broadcast register; an operand broadcast from memory would double the loads, of which Zen 5 and
// Golden Cove do two a cycle. After every `terms` products the sums go to a total: what is rounded
// in one long sum is most of the error of Winograd's algorithm.
template <int R, int V, class E, class Rows>
FASTSEG_INLINE void gemm_registers(const E* a, int64_t stride, const E* b, Ahead<E> ahead,
                                   int64_t depth, int64_t terms, int64_t column, const Rows& out) {
  Vec acc[R][V], total[R][V];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = out.start(r, column + v * kLanes);
  }
  int64_t stop = terms;
  for (int64_t d = 0; d < depth; d += kLine<E>, a += stride * kLine<E>) {
    if (kShortSums<E> && d == stop) {
      add_to_total(acc, total, stop > terms);
      stop += terms;
    }
#pragma GCC unroll 4
    for (int l = 0; l < kGroup; ++l, b += kPanel * kPerWord<E>) {
      if (l < ahead.steps) {
        __builtin_prefetch(ahead.lines, 0, 2);
        __builtin_prefetch(ahead.lines + kLine<E>, 0, 2);
        ahead.lines += 2 * kLine<E>;
      }
      decltype(load_words(b)) panel[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) panel[v] = load_words(b + v * kLanes * kPerWord<E>);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const auto scalar = broadcast(load_word(a + r * kLine<E> + l * kPerWord<E>));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(acc[r][v], scalar, panel[v]);
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (kShortSums<E> && depth > terms) acc[r][v] += total[r][v];
      out.finish(r, column + v * kLanes, acc[r][v]);
    }
  }
}

// What the rows of a tile read where it lies. The reduction of row r consists of runs_h x runs_w
// runs of `length` operands side by side; the first begins at data + r * row.
template <typename E>
struct Patch {
  const E* data;
  int64_t row, run_h, run_w;  // strides
  int64_t runs_h, runs_w, length;
  int64_t height = 0;           // rows of the tiles of AMX, see amx_tile.inl
  const Patch* then = nullptr;  // the reduction goes on with this one

  int64_t terms() const { return runs_h * runs_w * length + (then ? then->terms() : 0); }
};

// What the core reads next, fetched meanwhile: from data + h * run on for every row of runs, a line
// for each step; from `then` on in the steps of the second patch.
struct NextRuns {
  const char* data;
  int64_t run;
  const char* then = nullptr;
};

// The same of a patch. Three rows share an address register: with one for each there were not
// enough.
template <int R, int V, class E, class Rows>
FASTSEG_INLINE void patch_registers(const Patch<E>& first, const E* b, const NextRuns& ahead,
                                    int64_t column, const Rows& rows) {
  const Rows out = rows;
  Vec acc[R][V], total[R][V];
  bool has_total = false;
  int64_t terms = 0;  // words in acc, the others are in the total
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = out.start(r, column + v * kLanes);
  }
  int64_t row;
  const char* fetch;
  const auto step = [&](const E* const* a, int l) __attribute__((always_inline)) {
    decltype(load_words(b)) panel[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) panel[v] = load_words(b + v * kLanes * kPerWord<E>);
    __builtin_prefetch(fetch, 0, 2);
    fetch += 64;
    asm("" : "+r"(row));  // else row + l of every l takes an address register of its own
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const auto scalar = broadcast(load_word(a[r / 3] + r % 3 * row + l * kPerWord<E>));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(acc[r][v], scalar, panel[v]);
    }
    b += kPanel * kPerWord<E>;
  };
  for (const Patch<E>* patch = &first; patch; patch = patch->then) {
    row = patch->row;
    for (int64_t h = 0; h < patch->runs_h; ++h) {
      fetch = patch == &first ? ahead.data + h * ahead.run : ahead.then;
      for (int64_t w = 0; w < patch->runs_w; ++w) {
        const E* a[(R + 2) / 3];
#pragma GCC unroll 5
        for (int i = 0; i < (R + 2) / 3; ++i) {
          a[i] = patch->data + h * patch->run_h + w * patch->run_w + 3 * i * patch->row;
        }
        constexpr int kUnroll = 4;
        int64_t d = kUnroll * kPerWord<E>;
        for (; d <= patch->length; d += kUnroll * kPerWord<E>, terms += kUnroll) {
          if (kShortSums<E> && terms == kGemmTerms) {
            add_to_total(acc, total, has_total);
            has_total = true;
            terms = 0;
          }
#pragma GCC unroll 4
          for (int l = 0; l < kUnroll; ++l) step(a, l);
#pragma GCC unroll 5
          for (int i = 0; i < (R + 2) / 3; ++i) a[i] += kUnroll * kPerWord<E>;
        }
        for (d -= kUnroll * kPerWord<E>; d < patch->length; d += kPerWord<E>) {
          step(a, 0);
#pragma GCC unroll 5
          for (int i = 0; i < (R + 2) / 3; ++i) a[i] += kPerWord<E>;
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (has_total) acc[r][v] += total[r][v];
      out.finish(r, column + v * kLanes, acc[r][v]);
    }
  }
}

template <int V, int R, class E, class Rows>
FASTSEG_INLINE void patch_rows(int64_t rows, const Patch<E>& patch, const E* b,
                               const NextRuns& ahead, int64_t column, const Rows& out) {
  if constexpr (R > 0) {
    if (rows == R) return patch_registers<R, V>(patch, b, ahead, column, out);
    patch_rows<V, R - 1>(rows, patch, b, ahead, column, out);
  }
}

template <class E, class Rows>
static void patch_tile(int64_t rows, int64_t columns, const Patch<E>& patch, const E* b,
                       const NextRuns& ahead, const Rows& out) {
  for (int64_t k = 0; k < columns; k += 2 * kLanes) {
    if (columns - k > kLanes) {
      patch_rows<2, kRows>(rows, patch, b + k * kPerWord<E>, ahead, k, out);
    } else {
      patch_rows<1, kRows>(rows, patch, b + k * kPerWord<E>, ahead, k, out);
    }
  }
}

template <int V, int R, class E, class Rows>
FASTSEG_INLINE void gemm_rows(int64_t rows, int64_t stride, const E* a, const E* b, Ahead<E> ahead,
                              int64_t depth, int64_t terms, int64_t column, const Rows& out) {
  if constexpr (R > 0) {
    if (rows == R) return gemm_registers<R, V>(a, stride, b, ahead, depth, terms, column, out);
    gemm_rows<V, R - 1>(rows, stride, a, b, ahead, depth, terms, column, out);
  }
}

// `columns` of the panel are wanted; those behind are left alone or are zeros.
template <class E, class Rows>
static void gemm_tile(int64_t rows, int64_t stride, int64_t columns, const E* a, const E* b,
                      Ahead<E> ahead, int64_t depth, int64_t terms, const Rows& out) {
  for (int64_t k = 0; k < columns; k += 2 * kLanes) {
    if (columns - k > kLanes) {
      gemm_rows<2, kRows>(rows, stride, a, b + k * kPerWord<E>, ahead, depth, terms, k, out);
    } else {
      gemm_rows<1, kRows>(rows, stride, a, b + k * kPerWord<E>, ahead, depth, terms, k, out);
    }
  }
}

// Plain sums, row r at out + r * stride. Added are, where `base` is not null, a tile of sums and,
// with `add`, what is there.
struct StoreTile {
  float* out;
  bool add = false;
  int64_t stride = kPanel;
  const float* base = nullptr;  // kRows x kPanel
  static constexpr bool add_first = false;
  // As of output pixels, of which these sums have none.
  FASTSEG_MEMBER_INLINE Vec biases(int64_t) const { return Vec{}; }
  FASTSEG_MEMBER_INLINE Vec residual(int, int64_t) const { return Vec{}; }
  // Where the sums lie in L3, their lines come in the time of the products: 1 to 5 %.
  FASTSEG_MEMBER_INLINE Vec start(int r, int64_t column) const {
    __builtin_prefetch(out + r * stride + column, 1, 2);
    return Vec{};
  }
  FASTSEG_MEMBER_INLINE void finish(int r, int64_t column, Vec v) const {
    float* to = out + r * stride + column;
    if (base) v += load(base + r * kPanel + column);
    store(to, add ? v + load(to) : v);
  }
};
