// One tile of one band of output rows: each source row is interpolated along x once, for all
// channels, into a buffer that stays in L1 or L2; an output row blends two such rows and reduces
// over channels in registers. With kFour the source row is only spread along x and the four
// neighbours are blended by products of weights, as PyTorch does for channels-last tensors.

#include "common/convert.inl"

#if FASTSEG_ISA_LEVEL >= 2
constexpr int kBytes = 64;
#elif FASTSEG_ISA_LEVEL == 1
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kTorchBytes = 32;  // vectors of PyTorch's kernel, on AVX-512 machines too
constexpr bool kFused = FASTSEG_ISA_LEVEL >= 1;

// Vectors of the instruction set in hand, of integers and of labels with as many lanes.
template <typename acc>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kCount = kBytes / 4;
  typedef float Vec __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  static constexpr int kCount = kBytes / 8;
  typedef double Vec __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kBytes), aligned(8), may_alias));
};
template <typename Label, int kCount>
struct LabelLanes {
  typedef Label Vec
      __attribute__((vector_size(kCount * sizeof(Label)), aligned(sizeof(Label)), may_alias));
};
template <typename acc>
using Vec = typename Lanes<acc>::Vec;
template <typename acc>
using Int = typename Lanes<acc>::Int;

template <typename acc>
FASTSEG_INLINE Vec<acc> load(const acc* p) {
  return *reinterpret_cast<const Vec<acc>*>(p);
}
template <typename acc>
FASTSEG_INLINE void store(acc* p, Vec<acc> v) {
  *reinterpret_cast<Vec<acc>*>(p) = v;
}

// a * b + c, rounded once where PyTorch's build for this instruction set does.
FASTSEG_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
FASTSEG_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// p[index[lane]] for every lane. `near`: all indices are below the number of lanes, so that one
// load and a permutation do (one output vector per 2 cycles instead of one per lane).
FASTSEG_INLINE Vec<float> spread(const float* p, Int<float> index, bool near) {
#if FASTSEG_ISA_LEVEL >= 2
  if (near) return (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)load(p));
#elif FASTSEG_ISA_LEVEL == 1
  if (near) return (Vec<float>)_mm256_permutevar8x32_ps((__m256)load(p), (__m256i)index);
#endif
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::kCount; ++i) v[i] = p[index[i]];
  return v;
}
FASTSEG_INLINE Vec<double> spread(const double* p, Int<double> index, bool) {
  Vec<double> v;
  for (int i = 0; i < Lanes<double>::kCount; ++i) v[i] = p[index[i]];
  return v;
}

// e^x for x <= 0 (or NaN), to about one unit in the last place; 0 where that is not a normal
// number.
FASTSEG_INLINE Vec<float> exponential(Vec<float> x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const Vec<float> zero = {};
  Vec<float> r = multiply_add(n, zero - 0.693359375f, x);  // ln 2 in two parts
  r = multiply_add(n, zero + 2.12194440e-4f, r);           // |r| <= ln(2) / 2
  Vec<float> p = zero + 1.0f / 5040;                       // Taylor; the next term is 5e-9
  p = multiply_add(p, r, zero + 1.0f / 720);
  p = multiply_add(p, r, zero + 1.0f / 120);
  p = multiply_add(p, r, zero + 1.0f / 24);
  p = multiply_add(p, r, zero + 1.0f / 6);
  p = multiply_add(p, r, zero + 0.5f);
  p = multiply_add(p, r, zero + 1.0f);
  p = multiply_add(p, r, zero + 1.0f);
  // The integer n sits in the low bits of `shifted`; it becomes the exponent of 2^n.
  const Vec<float> power = (Vec<float>)(((Int<float>)shifted + 127) << 23);
  return x < -87.0f ? zero : p * power;
}
FASTSEG_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::kCount; ++i) x[i] = std::exp(x[i]);
  return x;
}

// A tile's workspace and its columns; see upsample_cpu.cpp for the sizes.
template <typename acc>
struct Tile {
  Int<acc>* index0;        // [tile / lanes] left and right neighbours, counted from
  Int<acc>* index1;        // `base` of the vector
  int64_t* base;           // [tile / lanes] counted from `first`
  acc *w0, *w1;            // [tile] their weights
  acc* segment;            // the source columns the tile reads, of one row and channel
  acc* rows[2];            // [C][1 or 2][tile] source rows, interpolated or spread along x
  int64_t first, columns;  // of the segment
  bool near;
};

template <typename acc>
void fill_columns(Tile<acc>& t, const ResizeAxis& axis, int64_t begin, int64_t tile) {
  constexpr int L = Lanes<acc>::kCount;
  const auto tap_at = [&](int64_t i) {  // lanes past the image repeat its last column
    return axis.tap<acc>(std::min(begin + i, axis.out - 1), kFused);
  };
  t.first = tap_at(0).i0;
  t.columns = tap_at(tile - 1).i1 - t.first + 1;
  t.near = true;
  for (int64_t x = 0; x < tile; x += L) {
    const int64_t base = tap_at(x).i0;
    Int<acc> index0, index1;
    for (int i = 0; i < L; ++i) {
      const Tap<acc> tap = tap_at(x + i);
      index0[i] = tap.i0 - base;
      index1[i] = tap.i1 - base;
      t.w0[x + i] = tap.w0;
      t.w1[x + i] = tap.w1;
    }
    t.index0[x / L] = index0;
    t.index1[x / L] = index1;
    t.base[x / L] = base - t.first;
    t.near = t.near && index1[L - 1] < L;
  }
}

// Brings source row y of all channels into t.rows[slot]; returns whether all of it is finite.
template <typename T, bool kFour>
bool fill_row(const Tile<typename Accumulate<T>::type>& t, const T* image, const Resize& r,
              int64_t y, int slot, int64_t tile) {
  using acc = typename Accumulate<T>::type;
  constexpr int L = Lanes<acc>::kCount;
  Int<acc> infinite = {};
  for (int64_t c = 0; c < r.C; ++c) {
    if (r.channels_last) {
      const T* source = image + (y * r.cols.in + t.first) * r.C + c;
      for (int64_t x = 0; x < t.columns; ++x) t.segment[x] = static_cast<acc>(source[x * r.C]);
    } else {
      widen(image + (c * r.rows.in + y) * r.cols.in + t.first, t.segment, t.columns);
    }
    acc* row = t.rows[slot] + c * tile * (kFour ? 2 : 1);
    for (int64_t x = 0; x < tile; x += L) {
      const acc* source = t.segment + t.base[x / L];
      const Vec<acc> left = spread(source, t.index0[x / L], t.near);
      const Vec<acc> right = spread(source, t.index1[x / L], t.near);
      infinite |= (left - left != 0) | (right - right != 0);
      if constexpr (kFour) {
        store(row + x, left);
        store(row + tile + x, right);
      } else {
        store(row + x, multiply_add(left, load(t.w0 + x), right * load(t.w1 + x)));
      }
    }
  }
  bool finite = true;
  for (int i = 0; i < L; ++i) finite = finite && infinite[i] == 0;
  return finite;
}

// The resized logits of an output row, kVectors vectors at column x at a time.
template <typename acc, bool kFour, int kVectors>
struct Blend {
  const acc *top, *bottom;
  int64_t tile;
  // PyTorch's channels-last kernel adds the products in one order in its vector loop over channels
  // and in another in the loop over the rest.
  int64_t whole_vectors;
  Vec<acc> w[kVectors][kFour ? 4 : 2];

  FASTSEG_INLINE Blend(const Tile<acc>& t, int top_slot, int bottom_slot, const Tap<acc>& row,
                       int64_t x, int64_t C, int64_t tile)
      : top(t.rows[top_slot] + x),
        bottom(t.rows[bottom_slot] + x),
        tile(tile),
        whole_vectors(C - C % (kTorchBytes / sizeof(acc))) {
    constexpr int L = Lanes<acc>::kCount;
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kFour) {
        const Vec<acc> left = load(t.w0 + x + v * L), right = load(t.w1 + x + v * L);
        w[v][0] = left * row.w0;
        w[v][1] = right * row.w0;
        w[v][2] = left * row.w1;
        w[v][3] = right * row.w1;
      } else {
        w[v][0] = Vec<acc>{} + row.w0;
        w[v][1] = Vec<acc>{} + row.w1;
      }
    }
  }

  FASTSEG_INLINE Vec<acc> at(int64_t c, int v) const {
    const int64_t i = c * tile * (kFour ? 2 : 1) + v * Lanes<acc>::kCount;
    if constexpr (kFour) {
      const Vec<acc> p0 = load(top + i), p1 = load(top + i + tile);
      const Vec<acc> p2 = load(bottom + i), p3 = load(bottom + i + tile);
      const Vec<acc>* k = w[v];
      if (c < whole_vectors) {
        return multiply_add(p0, k[0], multiply_add(p1, k[1], multiply_add(p3, k[3], p2 * k[2])));
      }
      return multiply_add(p3, k[3], multiply_add(p2, k[2], multiply_add(p0, k[0], p1 * k[1])));
    } else {
      return multiply_add(load(top + i), w[v][0], load(bottom + i) * w[v][1]);
    }
  }
};

// Labels (and, if wanted, the top probability) of columns x to x + kVectors vectors. A NaN is
// larger than all numbers and the first of equals wins, as in torch.argmax.
template <typename acc, bool kFour, int kVectors, bool kNan, typename Store>
FASTSEG_INLINE void argmax_columns(const Blend<acc, kFour, kVectors>& logits, int64_t C,
                                   bool with_prob, const Store& store_result) {
  Vec<acc> best[kVectors];
  Int<acc> label[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) best[v] = logits.at(0, v);
  for (int64_t c = 1; c < C; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<acc> value = logits.at(c, v);
      const Int<acc> channel = Int<acc>{} + static_cast<decltype(label[0][0] + 0)>(c);
      if constexpr (kNan) {
        const Int<acc> above = ((value > best[v]) | (value != value)) & (best[v] == best[v]);
        label[v] = above ? channel : label[v];
        best[v] = above ? value : best[v];
      } else {
        label[v] = value > best[v] ? channel : label[v];
        best[v] = value > best[v] ? value : best[v];
      }
    }
  }
  Vec<acc> sum[kVectors] = {};
  if (with_prob) {
    for (int64_t c = 0; c < C; ++c) {
      for (int v = 0; v < kVectors; ++v) sum[v] += exponential(logits.at(c, v) - best[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store_result(v, label[v], 1 / sum[v]);
}

// Fills labels (uint8 or int16) and probs of an output row from column 0 of the tile on; whole
// vectors, so both must have room for `tile` elements. probs may be null.
template <typename acc, bool kFour, typename Label>
void argmax_row(const Tile<acc>& t, int top, int bottom, const Tap<acc>& row, int64_t C,
                int64_t tile, bool finite, Label* labels, acc* probs) {
  constexpr int L = Lanes<acc>::kCount;
  using Labels = typename LabelLanes<Label, L>::Vec;
  for (int64_t x = 0; x < tile; x += L * kTileVectors) {
    const Blend<acc, kFour, kTileVectors> logits(t, top, bottom, row, x, C, tile);
    const auto store_result = [&](int v, Int<acc> label, Vec<acc> prob) {
      *reinterpret_cast<Labels*>(labels + x + v * L) = __builtin_convertvector(label, Labels);
      if (probs != nullptr) store(probs + x + v * L, prob);
    };
    if (finite) {
      argmax_columns<acc, kFour, kTileVectors, false>(logits, C, probs != nullptr, store_result);
    } else {
      argmax_columns<acc, kFour, kTileVectors, true>(logits, C, probs != nullptr, store_result);
    }
  }
}

// The softmax of an output row into exps [C][tile], but for the factors [tile].
template <typename acc, bool kFour>
void softmax_row(const Tile<acc>& t, int top, int bottom, const Tap<acc>& row, int64_t C,
                 int64_t tile, acc* exps, acc* factors) {
  constexpr int L = Lanes<acc>::kCount;
  for (int64_t x = 0; x < tile; x += L) {
    const Blend<acc, kFour, 1> logits(t, top, bottom, row, x, C, tile);
    Vec<acc> best = logits.at(0, 0), sum = {};
    for (int64_t c = 1; c < C; ++c) {
      const Vec<acc> value = logits.at(c, 0);
      best = value > best ? value : best;
    }
    for (int64_t c = 0; c < C; ++c) {
      const Vec<acc> e = exponential(logits.at(c, 0) - best);
      store(exps + c * tile + x, e);
      sum += e;
    }
    store(factors + x, 1 / sum);
  }
}

// Runs the task: rows [y_begin, y_end) and columns [x_begin, x_begin + tile) of image n.
template <typename T, bool kFour>
void upsample_tile(const Resize& r, const Outputs<T>& out, const T* logits, int64_t n,
                   int64_t y_begin, int64_t y_end, int64_t x_begin, int64_t tile, float* scratch) {
  using acc = typename Accumulate<T>::type;
  constexpr int L = Lanes<acc>::kCount;
  acc* next = reinterpret_cast<acc*>(scratch);
  const auto take = [&](int64_t count) {
    acc* taken = next;
    next += (count + 15) / 16 * 16;
    return taken;
  };
  Tile<acc> t;
  t.index0 = reinterpret_cast<Int<acc>*>(take(tile));
  t.index1 = reinterpret_cast<Int<acc>*>(take(tile));
  t.base = reinterpret_cast<int64_t*>(take(2 * tile / L));
  t.w0 = take(tile);
  t.w1 = take(tile);
  for (auto& row : t.rows) row = take(r.C * tile * (kFour ? 2 : 1));
  acc *exps = take(r.C * tile), *factors = take(tile);
  fill_columns(t, r.cols, x_begin, tile);
  t.segment = take(t.columns + L);

  const int64_t W = r.cols.out, columns = std::min(tile, W - x_begin);
  const T* image = logits + n * r.C * r.rows.in * r.cols.in;
  int64_t held[2] = {-1, -1};
  bool finite[2] = {true, true};
  const auto hold = [&](int64_t y, int64_t keep) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held[slot] == y) return slot;
    }
    const int slot = held[0] == keep ? 1 : 0;
    finite[slot] = fill_row<T, kFour>(t, image, r, y, slot, tile);
    held[slot] = y;
    return slot;
  };
  for (int64_t y = y_begin; y < y_end; ++y) {
    const Tap<acc> row = r.rows.tap<acc>(y, kFused);
    const int top = hold(row.i0, row.i1), bottom = hold(row.i1, row.i0);
    if (out.probs != nullptr) {
      softmax_row<acc, kFour>(t, top, bottom, row, r.C, tile, exps, factors);
      for (int64_t c = 0; c < r.C; ++c) {
        acc* e = exps + c * tile;
        for (int64_t x = 0; x < columns; ++x) e[x] *= factors[x];
        narrow(e, out.probs + ((n * r.C + c) * r.rows.out + y) * W + x_begin, columns);
      }
      continue;
    }
    // Whole tiles are written in place, the last one by way of the workspace.
    const bool whole = columns == tile, numbers = finite[0] && finite[1];
    const int64_t at = (n * r.rows.out + y) * W + x_begin;
    acc* prob = out.top_prob == nullptr ? nullptr : whole ? out.top_prob + at : factors;
    const auto labels_to = [&](auto* labels) {
      auto* label = whole ? labels + at : reinterpret_cast<decltype(labels)>(exps);
      argmax_row<acc, kFour>(t, top, bottom, row, r.C, tile, numbers, label, prob);
      if (!whole) std::copy(label, label + columns, labels + at);
    };
    if (out.labels8 != nullptr) {
      labels_to(out.labels8);
    } else {
      labels_to(out.labels16);
    }
    if (prob == factors) std::copy(factors, factors + columns, out.top_prob + at);
  }
}
