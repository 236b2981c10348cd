// The algorithms by their number, `tile`: which there are, for which convolutions, and the size of
// their packed weights.
#pragma once

#include <type_traits>

#include "common/check.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/strassen.h"
#include "conv_engine/winograd.h"

namespace fastseg {
namespace conv_engine {

// The number of the one-dimensional form among the tiles.
constexpr int64_t kLineTile = 5;
// And that of the kernels that have several groups side by side in the lanes of a vector
// (grouped.inl, depthwise.inl); all others compute one group after the other.
constexpr int64_t kGroupedTile = 7;

// Calls fn with the pair of tiles of that number for operands E: the one list of square Winograd
// kernels.
template <typename E, typename Fn>
void dispatch_tile(int64_t tile, Fn&& fn) {
  constexpr bool kRounded = std::is_same_v<E, BFloat16>;
  switch (tile) {
    case 1:
      return fn(BorderedPair{});
    case 2:
      return fn(WinogradPair<2>{});
    case 3:
      return fn(BorderedTriple{});
    case 4:
      return fn(std::conditional_t<kRounded, WinogradPair<4, RoundedPoints>, WinogradPair<4>>{});
    case 6:
      if constexpr (!kRounded) return fn(WinogradPair<6>{});
      [[fallthrough]];
    default:
      fail_check(
          "conv_engine: tile must be 0 (GEMM), 1, 3 (bordered), 2, 4, 6 (Winograd), 5 "
          "(Winograd along one axis) or 7 (groups side by side), 6 not of bfloat16 products, got ",
          tile);
  }
}

// Elements of packed weights, without the bias behind them.
template <typename E>
int64_t packed_size(int64_t K, int64_t C, int64_t taps, int64_t tile, int64_t strassen) {
  if (strassen) return packed_size<E>(K, C, taps, tile, 0) / 4 * kStrassenProducts;
  if (tile == 0) return round_up(K, kPanel) * round_up(C * taps, kLine<E>);
  if (tile == kGroupedTile) return round_up(K, kPanel) * taps * C;
  if (tile == kLineTile) {
    using Scheme = LineScheme<E>;
    return round_up(ceil_div(taps, Scheme::kKernel) * K, kPanel) * Scheme::kProducts *
           round_up(C, kLine<E>);
  }
  int64_t points = 0;
  dispatch_tile<E>(tile, [&](auto pair) { points = pair.kProducts * pair.kProducts; });
  return round_up(K, kPanel) * points * round_up(C, kLine<E>);
}

// Whether the kernels of this tile compute such a convolution.
template <typename E>
void check_tile(int64_t tile, int64_t K, int64_t C, int64_t R, int64_t S, int64_t strassen) {
  FASTSEG_CHECK(strassen == 0 || strassen == 1, "conv_engine: strassen must be 0 or 1 level, got ",
                strassen);
  FASTSEG_CHECK(
      !strassen || (tile == 0 && R * S == 1 && C % (2 * kGroup) == 0 && K % (2 * kPanel) == 0),
      "conv_engine: strassen needs a 1x1 kernel with input channels in multiples of 32 and output "
      "channels of 64, got tile ",
      tile, ", a ", R, "x", S, " kernel, ", C, " and ", K, " channels");
  if (tile == kLineTile) {
    FASTSEG_CHECK(R == 1 || S == 1, "conv_engine: tile 5 needs a k x 1 or 1 x k kernel, got ", R,
                  "x", S);
  } else {
    FASTSEG_CHECK(tile == 0 || tile == kGroupedTile || (R == 3 && S == 3),
                  "conv_engine: Winograd tiles need a 3x3 kernel, got ", R, "x", S);
  }
}

}  // namespace conv_engine
}  // namespace fastseg
