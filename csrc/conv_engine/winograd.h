// Winograd's minimal filtering F(kOut, kTaps) from interpolation points, and the tiles of a dilated
// convolution. Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
//
// The finite points come in pairs +-p, with 0 added where their number is odd; infinity is the
// last. In pairs the even and odd parts of a transform are shared, which halves its arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv_engine/conv_engine.h"

namespace fastseg {
namespace conv_engine {

// Channels that are transformed and summed at a time, of C padded ones: many in short pieces, whose
// transforms are still in L3 when they are read (2048 channels at dilation 12 48.6 ms in pieces of
// 512, 45.4 of 256, 44.2 of 128), up to 512 all of them, whose sums are then made in one go. Sums
// of pieces are more accurate than one long sum, too.
template <typename E>
constexpr int64_t winograd_piece(int64_t C) {
  return C <= 512 ? C : 128 * kPerWord<E>;
}

// Positive points per tile size, chosen for the smallest error of random data (docstring of
// fastseg/ops/conv_choice.py); sums and products of their squares are exact in float32.
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

// The gradient of the weights of F(4, 3).
template <>
struct WinogradPoints<3, 4> {
  static constexpr double kPoints[] = {0.75, 1.5};
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

// kFirst = 1 leaves the point 0 out of F(kOutputs + 1, kTaps), and with it the first output and
// input, which no other product has to do with: the other products are the same.
template <int kOutputs, int kTaps = 3, class Points = WinogradPoints<kOutputs, kTaps>,
          int kFirst = 0>
struct Winograd {
  static constexpr int kOut = kOutputs;
  static constexpr int kKernel = kTaps;
  static constexpr int kIn = kOut + kTaps - 1;
  static constexpr int kProducts = kIn;
  static constexpr int kOffset = 0;            // first input, counted from the first tap
  static constexpr int kZero = (kIn - 1) % 2;  // 1 if the point 0 is used
  static constexpr int kPairs = (kIn - 1) / 2;
  static constexpr int kFirstPower = kFirst;
  static_assert(kFirst == 0 || kZero == 0, "the longer tile must have the point 0");

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
    float power[kPairs][kOut + kFirst] = {};        // p_i^t
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
      for (int t = 0; t < kOut + kFirst; ++t, power *= p[i]) result.power[i][t] = float(power);
    }
    return result;
  }
};

// The one-dimensional form (winograd_1d.inl) of operands E. F(5, 5) loses too much of bfloat16.
template <typename E>
using LineScheme = std::conditional_t<std::is_same_v<E, float>, Winograd<5, 5>, Winograd<3, 3>>;

// Three outputs between zero borders: where the dilation is at least a third of the image, a
// sub-grid has up to three pixels and everything around them is padding. Four multiplications
// instead of the five of F(3, 3). With taps g, pixels d and outputs y, the sums and differences
// p = d0 + d2, m = d2 - d0, e = g0 + g2, f = g2 - g0 give
//   y0 + y2 = g1 p + e d1,   y2 - y0 = g1 m - f d1,   y1 = g1 d1 + (e p + f m) / 2.
// The products (g1 +- e / a)(p +- a d1) / 2 add up to the first, those of (g1 +- f / b)(m -+ b d1)
// to the second, and their differences times a / 2 and b / 2 to y1, if a^2 - b^2 = 2. With a = 2 b
// the error is about the least there is. Of n > 3 pixels F(n, 3) has the fewest: n + 1 products
// would be common eigenvectors of both shifts, each extended by a row and a column so that they
// commute. Only the cyclic shifts do, whose eigenvectors are complex.
struct BorderedThree {
  static constexpr int kOut = 3, kIn = 3, kProducts = 4, kOffset = 1;
  static constexpr double kB = 0.81649658092772603, kA = 2 * kB;  // sqrt(2 / 3)

  static void weight_row(int row, double (&g)[3]) {
    const double side = (row % 2 ? -1 : 1) / (row < 2 ? kA : kB);
    g[0] = row < 2 ? side : -side, g[1] = 1, g[2] = side;
  }
};

// Two of them, g1 d0 + g2 d1 and g0 d0 + g1 d1: a Toeplitz product of three multiplications, exact
// in the coefficients.
struct Bordered {
  static constexpr int kOut = 2, kIn = 2, kProducts = 3, kOffset = 1;

  static void weight_row(int row, double (&g)[3]) {
    constexpr double kRows[3][3] = {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}};
    for (int k = 0; k < 3; ++k) g[k] = kRows[row][k];
  }
};

// One output between zero borders, where only the middle tap sees the image.
struct Single {
  static constexpr int kOut = 1, kIn = 1, kProducts = 1, kOffset = 1;
};

// The two tiles that an axis is cut into, of kOut outputs and of one less. Their products are
// numbered together: those of the short tile begin at kShortFirst and may be among the long one's,
// then both meet the same transformed weights.
template <class LongTile, class ShortTile, int kShortFirst>
struct TilePair {
  using Long = LongTile;
  using Short = ShortTile;
  static constexpr int kOut = Long::kOut;
  static constexpr int kFirst[2] = {0, kShortFirst};
  static constexpr int kCount[2] = {Long::kProducts, Short::kProducts};
  static constexpr int kProducts =
      kCount[0] > kShortFirst + kCount[1] ? kCount[0] : kShortFirst + kCount[1];
  static_assert(Short::kOut == kOut - 1);

  static void weight_row(int row, double (&g)[3]) {
    if constexpr (kProducts > Long::kProducts) {
      if (row >= Long::kProducts) return Short::weight_row(row - kShortFirst, g);
    }
    Long::weight_row(row, g);
  }
};

// F(m, 3) and F(m - 1, 3) without its point 0.
template <int kOut, class Points = WinogradPoints<kOut, 3>>
using WinogradPair = TilePair<Winograd<kOut, 3, Points>, Winograd<kOut - 1, 3, Points, 1>, 1>;

// For sub-grids of up to two and up to three pixels between zero borders.
using BorderedPair = TilePair<Bordered, Single, 0>;
using BorderedTriple = TilePair<BorderedThree, Bordered, BorderedThree::kProducts>;

// The tiles along one axis of a dilated convolution of stride 1. Outputs of equal phase (position
// modulo the dilation) form a dense grid, on which the convolution is not dilated at all; each
// phase is cut into long tiles of `tile` outputs and short ones of one less, so many that the tiles
// end where the phase does if they can; `whole`: into long tiles alone, of which the last may reach
// beyond it. The first phases have one output more than the others.
class TileAxis {
 public:
  TileAxis(int64_t outputs, int64_t dilation, int64_t tile, bool whole)
      : dilation_(dilation), tile_(tile), whole_(whole) {
    const int64_t length = outputs / dilation, longer = outputs % dilation;
    cut(kinds_[0], longer, length + 1);
    cut(kinds_[1], dilation - longer, length);
  }

  // Tiles of a length: 0 for the long, 1 for the short ones.
  int64_t count(int length) const {
    return kinds_[0].phases * kinds_[0].tiles[length] + kinds_[1].phases * kinds_[1].tiles[length];
  }
  // Position of the first output of tile t of that length; the others follow at the distance of
  // the dilation.
  int64_t first(int length, int64_t t) const {
    const int64_t before = kinds_[0].phases * kinds_[0].tiles[length];
    const bool later = t >= before;
    const Phases& p = kinds_[later];
    if (later) t -= before;
    const int64_t phase = t / p.tiles[length], i = t - phase * p.tiles[length];
    const int64_t at = length == 0 ? i * tile_ : p.tiles[0] * tile_ + i * (tile_ - 1);
    return (later ? kinds_[0].phases : 0) + phase + at * dilation_;
  }

 private:
  struct Phases {
    int64_t phases, tiles[2];
  };
  void cut(Phases& p, int64_t phases, int64_t outputs) const {
    const int64_t tiles = ceil_div(outputs, tile_), spare = tiles * tile_ - outputs;
    p.phases = phases;
    p.tiles[1] = whole_ ? 0 : spare < tiles ? spare : tiles;
    p.tiles[0] = tiles - p.tiles[1];
  }

  int64_t dilation_, tile_;
  bool whole_;
  Phases kinds_[2];
};

// What a thread computes on its own: tiles [begin, end) of a grid, the output channels of panels
// [first_panel, last_panel).
struct WinogradTask {
  int64_t begin, end, first_panel, last_panel;

  int64_t tiles() const { return end - begin; }
  // Distance of the tiles in the products.
  int64_t row_size() const { return (last_panel - first_panel) * kPanel + kGroup; }
};

// All tiles of a batch in the order of their shapes. Those that are long along one axis follow each
// other, whichever axis it is.
struct TileGrid {
  // 1 where tiles of a shape are short along the axis.
  static constexpr int kShortY[4] = {0, 0, 1, 1}, kShortX[4] = {1, 0, 0, 1};

  TileAxis y, x;
  int64_t begin[5];   // where the tiles of a shape begin, and their end
  int64_t weight[4];  // products of a tile

  template <class Pair>
  TileGrid(Pair, int64_t N, int64_t Ho, int64_t dilation_h, int64_t Wo, int64_t dilation_w,
           bool whole)
      : y(Ho, dilation_h, Pair::kOut, whole), x(Wo, dilation_w, Pair::kOut, whole), begin{} {
    for (int shape = 0; shape < 4; ++shape) {
      const int short_y = kShortY[shape], short_x = kShortX[shape];
      begin[shape + 1] = begin[shape] + N * y.count(short_y) * x.count(short_x);
      weight[shape] = Pair::kCount[short_y] * Pair::kCount[short_x];
    }
  }

  int64_t products() const { return products_before(4); }
  // Part i of n with about equal products begins at this tile.
  int64_t part_begin(int64_t n, int64_t i) const {
    const int64_t target = products() * i / n;
    int shape = 0;
    while (shape < 3 && products_before(shape + 1) <= target) ++shape;
    const int64_t rest = target - products_before(shape);
    return begin[shape] + ceil_div(rest, weight[shape]);
  }

 private:
  int64_t products_before(int shape) const {
    int64_t sum = 0;
    for (int i = 0; i < shape; ++i) sum += (begin[i + 1] - begin[i]) * weight[i];
    return sum;
  }
};

// Which shapes take part in the product of a point, a bit for each.
template <class Pair>
struct PointShapes {
  uint8_t of[Pair::kProducts * Pair::kProducts] = {};

  constexpr PointShapes() {
    const auto has = [](int length, int product) {
      return product >= Pair::kFirst[length] &&
             product < Pair::kFirst[length] + Pair::kCount[length];
    };
    for (int y = 0; y < Pair::kProducts; ++y) {
      for (int x = 0; x < Pair::kProducts; ++x) {
        for (int shape = 0; shape < 4; ++shape) {
          if (!has(TileGrid::kShortY[shape], y) || !has(TileGrid::kShortX[shape], x)) continue;
          of[y * Pair::kProducts + x] |= static_cast<uint8_t>(1 << shape);
        }
      }
    }
  }
};

}  // namespace conv_engine
}  // namespace fastseg
