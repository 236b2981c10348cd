// Winograd's minimal filtering F(kOut, kTaps) from interpolation points, and the tiles of a dilated
// convolution. Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
//
// The finite points come in pairs +-p, with 0 added where their number is odd; infinity is the
// last. In pairs the even and odd parts of a transform are shared, which halves its arithmetic.
#pragma once

#include <cstdint>

#include "conv_engine/conv_engine.h"

namespace fastseg {
namespace conv_engine {

// Channels that are transformed and summed at a time: V of a task and the weights of a point stay
// in L2, and sums of pieces are more accurate than one long sum.
constexpr int64_t kWinogradPiece = 512;

// Positive points per tile size, chosen for the smallest error of random data (docstring of
// fastseg/ops/conv_engine.py); sums and products of their squares are exact in float32.
template <int kOut, int kTaps>
struct WinogradPoints;
template <>
struct WinogradPoints<2, 3> {
  static constexpr double kPoints[] = {1.0};
};
template <>
struct WinogradPoints<3, 3> {
  static constexpr double kPoints[] = {0.5, 1.25};
};
template <>
struct WinogradPoints<4, 3> {
  static constexpr double kPoints[] = {0.75, 1.5};
};
template <>
struct WinogradPoints<6, 3> {
  static constexpr double kPoints[] = {0.5, 1.0, 2.0};
};

template <>
struct WinogradPoints<5, 5> {
  static constexpr double kPoints[] = {0.25, 0.75, 1.25, 2.0};
};

// For operands rounded to bfloat16: the least error of F(4, 3), since no coefficient of the
// transforms is far from 1.
struct RoundedPoints {
  static constexpr double kPoints[] = {0.70710678118654752, 1.41421356237309505};
};

template <int kOutputs, int kTaps = 3, class Points = WinogradPoints<kOutputs, kTaps>>
struct Winograd {
  static constexpr int kOut = kOutputs;
  static constexpr int kIn = kOut + kTaps - 1;
  static constexpr int kProducts = kIn;
  static constexpr int kOffset = 0;            // first input, counted from the first tap
  static constexpr int kZero = (kIn - 1) % 2;  // 1 if the point 0 is used
  static constexpr int kPairs = (kIn - 1) / 2;

  // Point of row `row` in the order 0 (if kZero), +p0, -p0, +p1, ...; infinity comes last.
  static double point(int row) {
    if (row < kZero) return 0;
    const double p = Points::kPoints[(row - kZero) / 2];
    return (row - kZero) % 2 ? -p : p;
  }

  // Row `row` of the weight transform.
  static void weight_row(int row, double (&g)[kTaps]) {
    for (double& v : g) v = 0;
    if (row == kIn - 1) {
      g[kTaps - 1] = 1;
      return;
    }
    double norm = 1;
    for (int j = 0; j < kIn - 1; ++j) {
      if (j != row) norm *= point(row) - point(j);
    }
    double power = 1 / norm;
    for (int k = 0; k < kTaps; ++k, power *= point(row)) g[k] = power;
  }

  // The constants of the input and output transforms.
  struct Coefficients {
    float polynomial[kPairs + 1][kPairs + 1] = {};  // [i]: prod_{j != i} (y - p_j^2) by power of y;
                                                    // [kPairs]: the product over all j
    float power[kPairs][kOut] = {};                 // p_i^t
  };
  static constexpr Coefficients coefficients() {
    Coefficients result;
    constexpr auto& p = Points::kPoints;
    for (int i = 0; i <= kPairs; ++i) {
      double poly[kPairs + 1] = {1};
      int degree = 0;
      for (int j = 0; j < kPairs; ++j) {
        if (j == i) continue;
        for (int k = ++degree; k > 0; --k) poly[k] = poly[k - 1] - p[j] * p[j] * poly[k];
        poly[0] *= -p[j] * p[j];
      }
      for (int k = 0; k <= degree; ++k) result.polynomial[i][k] = float(poly[k]);
    }
    for (int i = 0; i < kPairs; ++i) {
      double power = 1;
      for (int t = 0; t < kOut; ++t, power *= p[i]) result.power[i][t] = float(power);
    }
    return result;
  }
};

// Two outputs between zero borders: where the dilation is at least half of the image, a sub-grid
// has two pixels and everything around them is padding. With d0, d1 for those and taps g the
// outputs are g1 d0 + g2 d1 and g0 d0 + g1 d1, a Toeplitz product of three multiplications, exact
// in the coefficients.
struct Bordered {
  static constexpr int kOut = 2, kIn = 2, kProducts = 3, kOffset = 1;

  static void weight_row(int row, double (&g)[3]) {
    constexpr double kRows[3][3] = {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}};
    for (int k = 0; k < 3; ++k) g[k] = kRows[row][k];
  }
};

// The tiles along one axis of a dilated convolution of stride 1. Outputs of equal phase (position
// modulo the dilation) form a dense grid, on which the convolution is not dilated at all; each
// phase is cut into tiles of `tile` outputs. The first `long_phases` phases have one output more.
struct TileAxis {
  int64_t dilation, tile, long_phases, long_tiles, short_tiles;

  TileAxis(int64_t outputs, int64_t dilation, int64_t tile)
      : dilation(dilation),
        tile(tile),
        long_phases(outputs % dilation),
        long_tiles(ceil_div(outputs / dilation + 1, tile)),
        short_tiles(ceil_div(outputs / dilation, tile)) {}

  int64_t count() const {
    return long_phases * long_tiles + (dilation - long_phases) * short_tiles;
  }
  // Position of the first output of tile t; the others follow at the distance of the dilation.
  int64_t first(int64_t t) const {
    const int64_t in_long = long_phases * long_tiles;
    if (t < in_long) return t / long_tiles + t % long_tiles * tile * dilation;
    t -= in_long;
    return long_phases + t / short_tiles + t % short_tiles * tile * dilation;
  }
};

}  // namespace conv_engine
}  // namespace fastseg
