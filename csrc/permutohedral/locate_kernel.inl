// Construction of the lattice: simplices of points, and keys of those.

// The simplices of n points, n a multiple of 16. features[k * stride + i] is feature k of point i,
// cell[j * stride + i] and so on likewise; see locate().
template <int kD, typename T>
void locate_all(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                int32_t* rank, T* weight) {
  using V = typename LaneOf<T>::type;
  constexpr int kLanes = sizeof(V) / sizeof(T), kMax = (kD > 0 ? kD : kMaxFeatures) + 1;
  using I = typename LaneOf<T>::ints;
  const int d1 = (kD > 0 ? kD : d) + 1;
  for (int i = 0; i < n; i += kLanes) {
    V f[kMax], c[kMax], r[kMax], w[kMax];
    for (int k = 0; k + 1 < d1; ++k) f[k] = load_lane<V>(features + k * stride + i);
    locate<kD, T, V>(d, f, scale, c, r, w);
    for (int j = 0; j < d1; ++j) {
      store_lane(cell + j * stride + i, __builtin_convertvector(c[j], I));
      store_lane(rank + j * stride + i, __builtin_convertvector(r[j], I));
      store_lane(weight + j * stride + i, w[j]);
    }
  }
}
template <typename T>
void locate_points(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                   int32_t* rank, T* weight) {
  if constexpr (sizeof(T) == 4) {
    if (d == 2) return locate_all<2>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 3) return locate_all<3>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 5) return locate_all<5>(d, n, stride, features, scale, cell, rank, weight);
  }
  return locate_all<0>(d, n, stride, features, scale, cell, rank, weight);
}

// Smallest and largest of n values; false if NaN or infinity is among them.
template <typename T>
bool value_range(const T* values, int64_t n, T* low, T* high) {
  constexpr int kLanes = 32;
  T least[kLanes], most[kLanes], finite[kLanes];  // finite: 0, or NaN
  for (int k = 0; k < kLanes; ++k) {
    least[k] = most[k] = values[0];
    finite[k] = 0;
  }
  const auto visit = [&](int k, T v) {
    least[k] = v < least[k] ? v : least[k];
    most[k] = v > most[k] ? v : most[k];
    finite[k] += v * 0;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) visit(k, values[i + k]);
  }
  for (; i < n; ++i) visit(0, values[i]);
  T sum = 0;
  for (int k = 0; k < kLanes; ++k) {
    least[0] = least[k] < least[0] ? least[k] : least[0];
    most[0] = most[k] > most[0] ? most[k] : most[0];
    sum += finite[k];
  }
  *low = least[0];
  *high = most[0];
  return sum == 0;
}

// For n points, n a multiple of 16, with the cells and ranks of locate_points: the key of the
// remainder-0 vertex, and a number for the order of the ranks. It holds ranks 1..d-1 and which of
// the other two coordinates is larger: at most 63 bits.
template <typename Key>
void pack_simplices(const KeyFields<Key>& fields, int n, int stride, const int32_t* cell,
                    const int32_t* rank, Key* key, uint64_t* order) {
  const int d = fields.d;
  constexpr int kBlock = 16;
  for (int i = 0; i < n; i += kBlock, cell += kBlock, rank += kBlock) {
    Key k[kBlock] = {};
    uint64_t o[kBlock];
    for (int p = 0; p < kBlock; ++p) o[p] = rank[d * stride + p] > rank[p] ? 1 : 0;
    for (int j = 1; j <= d; ++j) {
      const auto low = static_cast<int32_t>(fields.low[j]);
      const int shift = fields.shift[j];
      const int32_t* c = cell + j * stride;
      for (int p = 0; p < kBlock; ++p) {
        k[p] += static_cast<Key>(static_cast<uint32_t>(c[p] - low)) << shift;
      }
    }
    for (int j = 1; j < d; ++j) {
      const int32_t* r = rank + j * stride;
      if (d < 16) {
        for (int p = 0; p < kBlock; ++p) o[p] = o[p] << 4 | static_cast<uint32_t>(r[p]);
      } else {
        for (int p = 0; p < kBlock; ++p) o[p] = o[p] * 17 + static_cast<uint32_t>(r[p]);
      }
    }
    __builtin_memcpy(key + i, k, sizeof(k));
    __builtin_memcpy(order + i, o, sizeof(o));
  }
}
