// Index mathematics of the permutohedral lattice, shared by the CPU and CUDA kernels.
// Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.
//
// A point f in R^d is lifted to d + 1 coordinates that sum to 0, where the lattice vertices of
// remainder r are the integer vectors whose coordinates are all r modulo d + 1. `locate` finds the
// simplex around a point and the point's weight on each of its d + 1 vertices. V is a scalar, or on
// the CPU a GCC vector that holds one coordinate of many points.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/check.h"
#include "common/host_device.h"

namespace fastseg {

constexpr int kMaxFeatures = 16;

// Scale of each lifted feature. It gives the lattice filter unit variance in every feature
// dimension: splat, blur and slice together spread a point by 2/3 (d + 1)^2 per lifted axis.
template <typename T>
FASTSEG_HOST_DEVICE void lattice_scale(int d, T* scale) {
  const T spread = static_cast<T>(std::sqrt(2.0 / 3.0) * (d + 1));
  for (int k = 0; k < d; ++k) {
    scale[k] = static_cast<T>(1.0 / std::sqrt(static_cast<double>((k + 1) * (k + 2))) * spread);
  }
}

// Gain of the slice: the blur taps [1/2 1 1/2] sum to 2, and this undoes the excess.
inline double lattice_gain(int d) { return 1.0 / (1.0 + std::ldexp(1.0, -d)); }

// a * b, rounded: never fused with an addition, so that every device finds the same simplex.
template <typename V>
FASTSEG_HOST_DEVICE V rounded_product(V a, V b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 4) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// Largest lifted coordinate, in units of d + 1, that `locate` rounds correctly.
template <typename T>
constexpr double kLargestCell = sizeof(T) == 4 ? 4194304.0 : 2251799813685248.0;  // 2^22, 2^51

// Largest cell, in both directions, that a lattice of T admits.
template <typename T>
FASTSEG_HOST_DEVICE constexpr double largest_cell() {
  return sizeof(T) == 4 ? kLargestCell<float> : 1 << 30;
}

// Finds the simplex of the point f[0..d). T is the type of one coordinate, V = T or a vector of T.
//   cell[j], j = 0..d: coordinate j of the simplex's remainder-0 vertex, divided by d + 1
//   rank[j], j = 0..d: position of coordinate j when the residuals are sorted, largest first
//   weight[r], r = 0..d: barycentric weight of the vertex of remainder r; they sum to 1
// All results are whole numbers held in V except the weights. The order of the additions is that of
// the published CPU code, so that points on a border fall into the same simplex.
template <int kD, typename T, typename V>
FASTSEG_HOST_DEVICE void locate(int runtime_d, const V* f, const T* scale, V* cell, V* rank,
                                V* weight) {
  constexpr int kMax = kD > 0 ? kD : kMaxFeatures;
  const int d = kD > 0 ? kD : runtime_d;
  const V zero = V(), one = zero + T(1), side = zero + T(d + 1);
  const V inverse = zero + T(1) / T(d + 1);
  const V magic = zero + T(sizeof(T) == 4 ? 12582912.0 : 6755399441055744.0);  // 1.5 * 2^23, 2^52
  V lifted[kMax + 1], residual[kMax + 1];

  V sum = zero;  // of the scaled features above j
  for (int j = d; j > 0; --j) {
    const V t = rounded_product(f[j - 1], zero + scale[j - 1]);
    lifted[j] = sum - rounded_product(zero + T(j), t);
    sum = sum + t;
  }
  lifted[0] = sum;

  V excess = zero;
  for (int j = 0; j <= d; ++j) {
    cell[j] = (rounded_product(inverse, lifted[j]) + magic) - magic;  // round half to even
    residual[j] = lifted[j] - cell[j] * side;
    excess = excess + cell[j];
    rank[j] = zero;
  }
  for (int i = 0; i < d; ++i) {
    for (int j = i + 1; j <= d; ++j) {
      const V below = residual[i] < residual[j] ? one : zero;
      rank[i] = rank[i] + below;
      rank[j] = rank[j] + (one - below);
    }
  }
  // The rounded coordinates sum to excess * (d + 1): move the extreme ones back by one cell.
  for (int j = 0; j <= d; ++j) {
    rank[j] = rank[j] + excess;
    const V step = (rank[j] < zero ? one : zero) - (rank[j] < side ? zero : one);
    rank[j] = rank[j] + step * side;
    cell[j] = cell[j] + step;
    residual[j] = (lifted[j] - cell[j] * side) * inverse;
  }
  // Weight r is the gap between neighbours in the sorted residuals.
  V sorted[kMax + 1];
  for (int k = 0; k <= d; ++k) {
    sorted[k] = zero;
    for (int j = 0; j <= d; ++j) sorted[k] = rank[j] == zero + T(k) ? residual[j] : sorted[k];
  }
  weight[0] = sorted[d] + (one - sorted[0]);
  for (int r = 1; r <= d; ++r) weight[r] = sorted[d - r] - sorted[d + 1 - r];
}

// Vertex keys. Coordinate j of a vertex of remainder r is (d + 1) q_j + r, so (q_1 .. q_d, r) names
// it; q_0 follows because the coordinates sum to 0. The key packs these numbers into bit fields:
// r lowest, then q_1 - low_1, and so on. unit[j] is 1 in field j, and 0 for j = 0.
template <typename Key>
struct KeyFields {
  int d = 0;
  int64_t low[kMaxFeatures + 1] = {};
  int shift[kMaxFeatures + 1] = {};
  Key unit[kMaxFeatures + 1] = {};
  Key all_units = 0;
};

// Bounds of cell[j] = round(lifted[j] / (d + 1)) from bounds of the features.
template <typename T>
FASTSEG_HOST_DEVICE void cell_bounds(int d, const T* low, const T* high, double* cell_low,
                                     double* cell_high) {
  T scale[kMaxFeatures];
  lattice_scale(d, scale);
  double sum_low = 0, sum_high = 0;
  for (int j = d; j >= 0; --j) {
    const double t_low = j > 0 ? static_cast<double>(low[j - 1]) * scale[j - 1] : 0;
    const double t_high = j > 0 ? static_cast<double>(high[j - 1]) * scale[j - 1] : 0;
    cell_low[j] = (sum_low - j * t_high) / (d + 1);
    cell_high[j] = (sum_high - j * t_low) / (d + 1);
    sum_low += t_low;
    sum_high += t_high;
  }
}

// The same, for features that a lattice can hold; others are an error. finite[k]: all values of
// feature k are.
template <typename T>
void checked_cell_bounds(int d, const T* low, const T* high, const char* finite, double* cell_low,
                         double* cell_high) {
  for (int k = 0; k < d; ++k) {
    FASTSEG_CHECK(finite[k], "permutohedral lattice: features must be finite, feature ", k,
                  " has NaN or infinity");
  }
  cell_bounds(d, low, high, cell_low, cell_high);
  for (int j = 0; j <= d; ++j) {
    const double limit = largest_cell<T>();
    FASTSEG_CHECK(std::max(-cell_low[j], cell_high[j]) < limit,
                  "permutohedral lattice: features are too large for their dtype: divide them by "
                  "larger standard deviations (a lifted coordinate reaches ",
                  std::max(-cell_low[j], cell_high[j]), " cells, limit ", limit, ")");
  }
}

// Lays out the key fields. A margin of 3 cells holds simplex corners, blur neighbours and rounding.
// Returns the number of bits.
template <typename Key>
FASTSEG_HOST_DEVICE int make_fields(int d, const double* cell_low, const double* cell_high,
                                    KeyFields<Key>* fields) {
  int bits = 1;
  while ((1 << bits) <= d) ++bits;
  fields->d = d;
  fields->unit[0] = fields->all_units = 0;
  for (int j = 1; j <= d; ++j) {
    fields->low[j] = static_cast<int64_t>(std::floor(cell_low[j])) - 3;
    const int64_t range = static_cast<int64_t>(std::ceil(cell_high[j])) + 3 - fields->low[j];
    fields->shift[j] = bits;
    fields->unit[j] = bits < static_cast<int>(8 * sizeof(Key)) ? Key(1) << bits : Key(0);
    fields->all_units += fields->unit[j];
    int width = 1;
    while (range >> width != 0) ++width;
    bits += width;
  }
  return bits;
}

// The vertex of remainder r + 1 of a simplex, given that of remainder r and the axis whose rank is
// d - r: all coordinates rise by 1 and that axis falls by d + 1.
template <typename Key>
FASTSEG_HOST_DEVICE Key next_in_simplex(const KeyFields<Key>& fields, Key key, int axis) {
  return key + 1 - fields.unit[axis];
}

// The neighbour of a vertex along a blur axis, in the + direction.
template <typename Key>
FASTSEG_HOST_DEVICE Key neighbour(const KeyFields<Key>& fields, Key key, int remainder, int axis) {
  return remainder < fields.d
             ? key + 1 - fields.unit[axis]
             : key - static_cast<Key>(fields.d) + fields.all_units - fields.unit[axis];
}

}  // namespace fastseg
