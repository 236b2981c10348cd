// Passes over `size` contiguous elements that fall into lanes: element i belongs to lane i % width.
// In channels-last a lane stands for a channel (width is a multiple of C) and has its own
// parameters (kPerLane); in NCHW all elements lie in one plane, the parameters are scalars and
// lanes only split sums. Work goes in chunks through L1 buffers of the accumulation type, so that
// each step is one short loop the compiler vectorises; memory traffic decides the time.

#include "common/convert.inl"

// fn(at, lane, n) for chunks of at most kChunk elements that start at element `at` in `lane`.
template <typename Fn>
inline void for_each_chunk(int64_t size, int64_t width, const Fn& fn) {
  for (int64_t start = 0; start < size; start += width) {
    const int64_t end = std::min(start + width, size);
    for (int64_t at = start; at < end; at += kChunk) {
      fn(at, at - start, std::min(kChunk, end - at));
    }
  }
}

// The elements as the accumulation type: where they are, or converted into the buffer.
template <typename T, typename acc>
inline const acc* fetch(const T* src, acc* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, acc>) {
    return src;
  } else {
    widen(src, buffer, n);
    return buffer;
  }
}

// Where to compute n results for dst: there, or in the buffer, which deliver() then converts.
template <typename T, typename acc>
inline acc* place(T* dst, acc* buffer) {
  if constexpr (std::is_same_v<T, acc>) {
    return dst;
  } else {
    return buffer;
  }
}
template <typename T, typename acc>
inline void deliver(const acc* results, T* dst, int64_t n) {
  if constexpr (!std::is_same_v<T, acc>) narrow(results, dst, n);
}

// t = (y - mean) * scale + shift
template <bool kPerLane, typename acc>
inline void affine(const acc* __restrict y, const Affine<acc>& p, acc* __restrict t, int64_t n) {
  if constexpr (kPerLane) {
    const acc *mean = p.mean, *scale = p.scale, *shift = p.shift;
    for (int64_t i = 0; i < n; ++i) t[i] = (y[i] - mean[i]) * scale[i] + shift[i];
  } else {
    const acc mean = *p.mean, scale = *p.scale, shift = *p.shift;
    for (int64_t i = 0; i < n; ++i) t[i] = (y[i] - mean) * scale + shift;
  }
}

template <typename acc>
inline void add(const acc* __restrict values, acc* __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) t[i] += values[i];
}

// t <= 0 ? below : above, on bits: of the plain form GCC 12 makes branches for AVX2, which took 15
// times as long.
template <typename acc>
inline acc select(acc t, acc below, acc above) {
  using Bits = std::conditional_t<sizeof(acc) == 4, uint32_t, uint64_t>;
  Bits low, high;
  std::memcpy(&low, &below, sizeof low);
  std::memcpy(&high, &above, sizeof high);
  const Bits mask = t <= 0 ? ~Bits{0} : Bits{0};
  high = (low & mask) | (high & ~mask);
  std::memcpy(&above, &high, sizeof above);
  return above;
}

// Leaky ReLU; slope 0 is ReLU (a product would turn -inf into NaN), slope 1 is the identity.
template <typename acc>
inline void activate(acc* t, acc slope, int64_t n) {
  if (slope == 1) return;
  if (slope == 0) {
    for (int64_t i = 0; i < n; ++i) t[i] = select(t[i], acc{0}, t[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) t[i] = select(t[i], t[i] * slope, t[i]);
  }
}

// t becomes g = dz * activation'(t). dz must be in L1: GCC loads it under a mask that waits for t,
// which from memory made the whole backward 2.4 times slower.
template <typename acc>
inline void gate(const acc* __restrict dz, acc slope, acc* __restrict t, int64_t n) {
  if (slope == 0) {
    for (int64_t i = 0; i < n; ++i) t[i] = select(t[i], acc{0}, dz[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) t[i] = select(t[i], dz[i] * slope, dz[i]);
  }
}

// z = activation(z + residual), in place; residual may be null.
template <typename T>
void add_activate(T* z, const T* residual, double slope, int64_t size) {
  using acc = typename Accumulate<T>::type;
  acc buffer[kChunk], other[kChunk];
  for_each_chunk(size, size, [&](int64_t at, int64_t, int64_t n) {
    acc* t = place(z + at, buffer);
    if constexpr (!std::is_same_v<T, acc>) widen(z + at, t, n);
    if (residual != nullptr) add(fetch(residual + at, other, n), t, n);
    activate(t, static_cast<acc>(slope), n);
    deliver(t, z + at, n);
  });
}

// z = activation((y - mean) * scale + shift + residual)
template <typename T, bool kPerLane>
void normalize(const T* y, const T* residual, T* z,
               const Affine<typename Accumulate<T>::type>& params, double slope, int64_t size,
               int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc buffer[kChunk], other[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    acc* t = place(z + at, buffer);
    affine<kPerLane>(fetch(y + at, other, n), params.template at<kPerLane>(lane), t, n);
    if (residual != nullptr) add(fetch(residual + at, other, n), t, n);
    activate(t, static_cast<acc>(slope), n);
    deliver(t, z + at, n);
  });
}

// Per lane: sum += y.
template <typename T>
void accumulate(const T* y, typename Accumulate<T>::type* sum, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc buffer[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    add(fetch(y + at, buffer, n), sum + lane, n);
  });
}

// Per lane: sum += y - centre and sum_squares += (y - centre)^2.
template <typename T, bool kPerLane>
void accumulate_centred(const T* y, const typename Accumulate<T>::type* centre,
                        typename Accumulate<T>::type* sum,
                        typename Accumulate<T>::type* sum_squares, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc buffer[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const acc* __restrict values = fetch(y + at, buffer, n);
    const acc* __restrict centres = centre + (kPerLane ? lane : 0);
    acc* __restrict out = sum + lane;
    acc* __restrict out_squares = sum_squares + lane;
    for (int64_t i = 0; i < n; ++i) {
      const acc c = values[i] - centres[kPerLane ? i : 0];
      out[i] += c;
      out_squares[i] += c * c;
    }
  });
}

// First pass of the backward. With g = dz * activation'(t), per lane: sum_g += g and
// sum_gc += g * (y - mean). With a residual, g is also its gradient and is written to g_out.
template <typename T, bool kPerLane>
void backward_reduce(const T* dz, const T* y, const T* residual, T* g_out,
                     const Affine<typename Accumulate<T>::type>& params, double slope,
                     typename Accumulate<T>::type* sum_g, typename Accumulate<T>::type* sum_gc,
                     int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc t[kChunk], buffer[kChunk], other[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    const acc* __restrict values = fetch(y + at, buffer, n);
    affine<kPerLane>(values, p, t, n);
    if (residual != nullptr) add(fetch(residual + at, other, n), t, n);
    widen(dz + at, other, n);
    gate(other, static_cast<acc>(slope), t, n);
    const acc* __restrict g = t;
    const acc* __restrict mean = p.mean;
    acc* __restrict out_g = sum_g + lane;
    acc* __restrict out_gc = sum_gc + lane;
    for (int64_t i = 0; i < n; ++i) {
      out_g[i] += g[i];
      out_gc[i] += g[i] * (values[i] - mean[kPerLane ? i : 0]);
    }
    if (g_out != nullptr) narrow(t, g_out + at, n);
  });
}

// Second pass: dy = g * scale - k1 - (y - mean) * k2. `dz` is g already when there was a residual.
template <typename T, bool kPerLane>
void backward_apply(const T* dz, bool dz_is_g, const T* y, T* dy,
                    const Affine<typename Accumulate<T>::type>& params,
                    const typename Accumulate<T>::type* k1, const typename Accumulate<T>::type* k2,
                    double slope, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc t[kChunk], buffer[kChunk], other[kChunk], results[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    const acc* __restrict values = fetch(y + at, buffer, n);
    widen(dz + at, other, n);
    const acc* __restrict g = other;
    if (!dz_is_g) {
      affine<kPerLane>(values, p, t, n);
      gate(g, static_cast<acc>(slope), t, n);
      g = t;
    }
    const acc* __restrict mean = p.mean;
    const acc* __restrict scale = p.scale;
    const acc* __restrict a = k1 + (kPerLane ? lane : 0);
    const acc* __restrict b = k2 + (kPerLane ? lane : 0);
    acc* __restrict out = place(dy + at, results);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = kPerLane ? i : 0;
      out[i] = g[i] * scale[c] - a[c] - (values[i] - mean[c]) * b[c];
    }
    deliver(out, dy + at, n);
  });
}

// Chan et al. 1979, for n channels: joins to mean and m2 (sum of squared deviations) over `count`
// elements `more` elements, given by sums of their deviations from a centre and of the squares.
template <typename acc>
void merge_moments(double* __restrict mean, double* __restrict m2, double count,
                   const acc* __restrict centre, const acc* __restrict sum,
                   const acc* __restrict sum_squares, double more, int64_t n) {
  const double weight = more / (count + more), inverse = 1 / more;
  for (int64_t i = 0; i < n; ++i) {
    const double offset = sum[i] * inverse, rest = sum_squares[i] - sum[i] * offset;
    const double delta = centre[i] - mean[i] + offset;
    mean[i] += delta * weight;
    m2[i] += (rest < 0 ? 0 : rest) + delta * delta * (count * weight);
  }
}
