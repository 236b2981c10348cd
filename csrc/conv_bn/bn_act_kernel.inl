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

// Registers of the accumulation type, of the instruction set in hand.
template <typename acc>
struct VectorOf {
  typedef acc type __attribute__((vector_size(FASTSEG_ISA_LEVEL >= 2   ? 64
                                              : FASTSEG_ISA_LEVEL == 1 ? 32
                                                                       : 16)));
};

template <typename V, typename acc>
inline V get(const acc* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename acc>
inline void put(acc* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
// The value of each lane, or the one of all.
template <typename V, bool kPerLane, typename acc>
inline V parameter(const acc* p, int64_t i) {
  if constexpr (kPerLane) return get<V>(p + i);
  return *p - V{};
}

// step(i, V{}) for n elements, a register at a time, then element by element.
template <typename acc, typename Step>
inline void for_each_register(int64_t n, const Step& step) {
  using V = typename VectorOf<acc>::type;
  constexpr int64_t kWidth = sizeof(V) / sizeof(acc);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) step(i, V{});
  for (; i < n; ++i) step(i, acc{});
}

// g = dz * activation'(t). Written out in registers, for GCC makes of a plain loop masked loads of
// dz, which wait for t: 2.4 times as long.
template <typename V, typename acc>
inline V gated(V t, V dz, acc slope) {
  return t <= V{} ? (slope == 0 ? V{} : dz * slope) : dz;
}

// First pass of the backward. With g = dz * activation'(t), per lane: sum_g += g and
// sum_gc += g * (y - mean). With a residual, g is also its gradient and is written to g_out.
template <typename T, bool kPerLane>
void backward_reduce(const T* dz, const T* y, const T* residual, T* g_out,
                     const Affine<typename Accumulate<T>::type>& params, double slope,
                     typename Accumulate<T>::type* sum_g, typename Accumulate<T>::type* sum_gc,
                     int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc y_buffer[kChunk], dz_buffer[kChunk], other[kChunk], g_buffer[kChunk];
  const acc below = static_cast<acc>(slope);
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    const acc *values = fetch(y + at, y_buffer, n), *gradient = fetch(dz + at, dz_buffer, n);
    acc *out_g = sum_g + lane, *out_gc = sum_gc + lane;
    const auto pass = [&](auto with_residual, const acc* added, acc* g_to) {
      for_each_register<acc>(n, [&](int64_t i, auto zero) {
        using V = decltype(zero);
        const V centred = get<V>(values + i) - parameter<V, kPerLane>(p.mean, i);
        V t = centred * parameter<V, kPerLane>(p.scale, i) + parameter<V, kPerLane>(p.shift, i);
        if constexpr (decltype(with_residual)::value) t += get<V>(added + i);
        const V g = gated(t, get<V>(gradient + i), below);
        if constexpr (decltype(with_residual)::value) put(g_to + i, g);
        put(out_g + i, get<V>(out_g + i) + g);
        put(out_gc + i, get<V>(out_gc + i) + g * centred);
      });
    };
    if (residual == nullptr) {
      pass(std::false_type{}, nullptr, nullptr);
    } else {
      acc* g_to = place(g_out + at, g_buffer);
      pass(std::true_type{}, fetch(residual + at, other, n), g_to);
      deliver(g_to, g_out + at, n);
    }
  });
}

// Second pass: dy = g * scale - k1 - (y - mean) * k2. `dz` is g already when there was a residual.
template <typename T, bool kPerLane>
void backward_apply(const T* dz, bool dz_is_g, const T* y, T* dy,
                    const Affine<typename Accumulate<T>::type>& params,
                    const typename Accumulate<T>::type* k1, const typename Accumulate<T>::type* k2,
                    double slope, int64_t size, int64_t width) {
  using acc = typename Accumulate<T>::type;
  acc y_buffer[kChunk], dz_buffer[kChunk], results[kChunk];
  const acc below = dz_is_g ? acc{1} : static_cast<acc>(slope);
  for_each_chunk(size, width, [&](int64_t at, int64_t lane, int64_t n) {
    const Affine<acc> p = params.template at<kPerLane>(lane);
    const acc *values = fetch(y + at, y_buffer, n), *gradient = fetch(dz + at, dz_buffer, n);
    const acc *a = k1 + (kPerLane ? lane : 0), *b = k2 + (kPerLane ? lane : 0);
    acc* out = place(dy + at, results);
    for_each_register<acc>(n, [&](int64_t i, auto zero) {
      using V = decltype(zero);
      const V centred = get<V>(values + i) - parameter<V, kPerLane>(p.mean, i);
      const V scale = parameter<V, kPerLane>(p.scale, i);
      const V t = centred * scale + parameter<V, kPerLane>(p.shift, i);
      const V g = gated(t, get<V>(gradient + i), below);
      put(out + i,
          g * scale - parameter<V, kPerLane>(a, i) - centred * parameter<V, kPerLane>(b, i));
    });
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
