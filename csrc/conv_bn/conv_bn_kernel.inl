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

// c = y - mean
template <bool kPerLane, typename T, typename acc>
inline void load_centred(const T* y, const acc* mean, acc* c, int64_t n) {
  widen(y, c, n);
  if constexpr (kPerLane) {
    for (int64_t i = 0; i < n; ++i) c[i] -= mean[i];
  } else {
    const acc m = *mean;
    for (int64_t i = 0; i < n; ++i) c[i] -= m;
  }
}

// t = c * scale + shift
template <bool kPerLane, typename acc>
inline void affine(const acc* __restrict c, const Affine<acc>& p, acc* __restrict t, int64_t n) {
  if constexpr (kPerLane) {
    const acc *scale = p.scale, *shift = p.shift;
    for (int64_t i = 0; i < n; ++i) t[i] = c[i] * scale[i] + shift[i];
  } else {
    const acc scale = *p.scale, shift = *p.shift;
    for (int64_t i = 0; i < n; ++i) t[i] = c[i] * scale + shift;
  }
}

template <typename T, typename acc>
inline void add(const T* src, acc* buffer, acc* t, int64_t n) {
  widen(src, buffer, n);
  for (int64_t i = 0; i < n; ++i) t[i] += buffer[i];
}

// Leaky ReLU; slope 0 is ReLU (a product would turn -inf into NaN), slope 1 is the identity.
template <typename acc>
inline void activate(acc* t, acc slope, int64_t n) {
  if (slope == 1) return;
  if (slope == 0) {
    for (int64_t i = 0; i < n; ++i) t[i] = t[i] <= 0 ? acc{0} : t[i];
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const acc below = t[i] * slope;
      t[i] = t[i] <= 0 ? below : t[i];
    }
  }
}

// g = dz * activation'(t)
template <typename acc>
inline void gate(const acc* __restrict t, acc slope, acc* __restrict g, int64_t n) {
  if (slope == 1) return;
  for (int64_t i = 0; i < n; ++i) {
    const acc below = g[i] * slope;
    g[i] = t[i] <= 0 ? below : g[i];
  }
}

// z = activation(z + residual), in place; residual may be null.
template <typename T>
void add_activate(T* z, const T* residual, double slope, int64_t size) {
  using acc = typename Accumulate<T>::type;
  acc t[kChunk], buffer[kChunk];
  for_each_chunk(size, size, [&](int64_t at, int64_t, int64_t n) {
    widen(z + at, t, n);
    if (residual != nullptr) add(residual + at, buffer, t, n);
    activate(t, static_cast<acc>(slope), n);
    narrow(t, z + at, n);
  });
}

// z = activation((y - mean) * scale + shift + residual)
template <typename T, bool kPerLane>
void normalize(const T* y, const T* residual, T* z,
               const Affine<typename Accumulate<T>::type>& params, double slope, int64_t size,
               int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc c[kChunk], t[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    load_centred<kPerLane>(y + at, p.mean, c, n);
    affine<kPerLane>(c, p, t, n);
    if (residual != nullptr) add(residual + at, c, t, n);
    activate(t, static_cast<acc>(slope), n);
    narrow(t, z + at, n);
  });
}

// Per lane: sum += y.
template <typename T>
void accumulate(const T* y, typename Accumulate<T>::type* sum, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc c[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    widen(y + at, c, n);
    acc* __restrict out = sum + lane;
    for (int64_t i = 0; i < n; ++i) out[i] += c[i];
  });
}

// Per lane: sum += y - centre and sum_squares += (y - centre)^2.
template <typename T, bool kPerLane>
void accumulate_centred(const T* y, const typename Accumulate<T>::type* centre,
                        typename Accumulate<T>::type* sum,
                        typename Accumulate<T>::type* sum_squares, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc c[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    load_centred<kPerLane>(y + at, centre + (kPerLane ? lane : 0), c, n);
    acc* __restrict out = sum + lane, * __restrict out_squares = sum_squares + lane;
    for (int64_t i = 0; i < n; ++i) {
      out[i] += c[i];
      out_squares[i] += c[i] * c[i];
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
  acc c[kChunk], t[kChunk], g[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    load_centred<kPerLane>(y + at, p.mean, c, n);
    affine<kPerLane>(c, p, t, n);
    if (residual != nullptr) add(residual + at, g, t, n);
    widen(dz + at, g, n);
    gate(t, static_cast<acc>(slope), g, n);
    acc* __restrict out_g = sum_g + lane, * __restrict out_gc = sum_gc + lane;
    for (int64_t i = 0; i < n; ++i) {
      out_g[i] += g[i];
      out_gc[i] += g[i] * c[i];
    }
    if (g_out != nullptr) narrow(g, g_out + at, n);
  });
}

// Second pass: dy = g * scale - k1 - (y - mean) * k2. `dz` is g already when there was a residual.
template <typename T, bool kPerLane>
void backward_apply(const T* dz, bool dz_is_g, const T* y, T* dy,
                    const Affine<typename Accumulate<T>::type>& params,
                    const typename Accumulate<T>::type* k1, const typename Accumulate<T>::type* k2,
                    double slope, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc c[kChunk], t[kChunk], g[kChunk];
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    load_centred<kPerLane>(y + at, p.mean, c, n);
    widen(dz + at, g, n);
    if (!dz_is_g) {
      affine<kPerLane>(c, p, t, n);
      gate(t, static_cast<acc>(slope), g, n);
    }
    if constexpr (kPerLane) {
      const acc *a = k1 + lane, *b = k2 + lane;
      for (int64_t i = 0; i < n; ++i) t[i] = g[i] * p.scale[i] - a[i] - c[i] * b[i];
    } else {
      const acc scale = *p.scale, a = *k1, b = *k2;
      for (int64_t i = 0; i < n; ++i) t[i] = g[i] * scale - a - c[i] * b;
    }
    narrow(t, dy + at, n);
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
