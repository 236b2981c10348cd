// Convolutions in groups: of channels of the image to channels of the result, each group alone.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/tiles.h"

namespace fastseg {
namespace conv_engine {

// Whether each vector of outputs, on every instruction set, reads what the kernels of kGroupedTile
// can spread over its lanes: words of channels of one or two groups, or of more that all fit in a
// vector.
template <typename E>
bool fits_vectors(int64_t groups, int64_t K, int64_t channels) {
  if (channels % kPerWord<E> != 0) return false;
  const int64_t C = channels / kPerWord<E>;
  if (K == 1 && channels == 1) return true;
  for (int64_t lanes = 4; lanes <= kGroup; lanes *= 2) {
    for (int64_t k = 0; k < std::min(groups, lanes) * K; k += lanes) {
      const int64_t spanned = (std::min(groups * K, k + lanes) - 1) / K - k / K + 1;
      if (spanned > 2 && (spanned * C > lanes || groups * C < lanes)) return false;
    }
  }
  return true;
}

// Whether weights (outputs, C, R, S) are those of so many groups, and these of this tile.
template <typename E>
void check_groups(int64_t groups, int64_t outputs, int64_t C, int64_t tile) {
  FASTSEG_CHECK(groups >= 1 && outputs % groups == 0,
                "conv_engine: groups must divide the output channels, got ", groups, " and ",
                outputs);
  FASTSEG_CHECK(tile != kGroupedTile || fits_vectors<E>(groups, outputs / groups, C),
                "conv_engine: tile 7 needs vectors of 16 outputs that read one or two groups or at "
                "most 16 channels, of bfloat16 products 16 pairs, got ",
                outputs / groups, " outputs and ", C, " channels in each of ", groups, " groups");
}

// Packed weights are those of every group, each with its bias behind it, or with kGroupedTile one
// such part of all groups.
template <typename E>
struct PackedGroups {
  int64_t parts, outputs, bias, size;  // outputs of a part, where its bias begins, elements

  PackedGroups(int64_t groups, int64_t all_outputs, int64_t C, int64_t taps, int64_t tile,
               int64_t strassen)
      : parts(tile == kGroupedTile ? 1 : groups),
        outputs(all_outputs / parts),
        bias(packed_size<E>(outputs, C, taps, tile, strassen)),
        size(bias + round_up(outputs, kPanel) * kPerWord<E>) {}
};

// C and K are the channels of one group.
template <class Conv>
struct InGroups : Conv {
  int64_t groups;

  // One of them, given the elements of its packed weights.
  Conv group(int64_t g, int64_t size) const {
    using E = typename Conv::Operand;
    Conv one = *this;
    one.x.data += g * this->C;
    if (one.y.data) one.y.data += g * this->K;
    if (one.residual.data) one.residual.data += g * this->K;
    if (one.x_codes.data) one.x_codes.data += g * this->C;
    if (one.pooled.data) one.pooled.data += g * this->K;
    if (one.codes.data) one.codes.data += g * this->K;
    one.weight += g * size;
    one.bias = reinterpret_cast<const float*>(reinterpret_cast<const E*>(one.bias) + g * size);
    return one;
  }
};

// Instantiated for the kinds of Convolution whose result is stored as x is.
template <class Conv>
void run_grouped(const InGroups<Conv>& conv);
// For float32 products.
template <class Conv>
void run_depthwise(const InGroups<Conv>& conv);

}  // namespace conv_engine
}  // namespace fastseg
