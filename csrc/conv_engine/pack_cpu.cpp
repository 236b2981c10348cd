// Weights of a convolution to the form that its kernel reads, once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/groups.h"
#include "conv_engine/pack.h"
#include "conv_engine/strassen.h"
#include "conv_engine/tiles.h"
#include "conv_engine/winograd.h"

namespace fastseg {
namespace conv_engine {
namespace {

// The rows of the weight transform of a pair of tiles.
struct WeightTransform {
  static constexpr int kMost = 8;
  int products;
  double row[kMost][3];

  template <class Pair>
  explicit WeightTransform(Pair) : products(Pair::kProducts) {
    static_assert(Pair::kProducts <= kMost);
    for (int i = 0; i < products; ++i) Pair::weight_row(i, row[i]);
  }
};

#define FASTSEG_KERNEL_FILE "conv_engine/pack_kernel.inl"
#include "common/foreach_isa.inl"

// Where element d of a column's reduction lies in its packed panel.
template <typename E>
int64_t panel_index(int64_t d, int64_t column) {
  return (d / kPerWord<E> * kPanel + column % kPanel) * kPerWord<E> + d % kPerWord<E>;
}

// taps: the length of the k x 1 or 1 x k kernel.
template <typename E>
void pack_winograd_1d(const float* weight, int64_t K, int64_t C, int64_t taps, E* packed) {
  const auto pack = FASTSEG_ISA_CALL(pack_winograd_line<E>);
  parallel_tasks(ceil_div(C, kLine<E>),
                 [&](int64_t line) { pack(weight, K, C, taps, line * kLine<E>, packed); });
}

template <typename E>
void pack_winograd(const Weights& weights, const WeightTransform& transform, E* packed) {
  const auto pack = FASTSEG_ISA_CALL(pack_winograd_panel<E>);
  const int64_t groups = ceil_div(weights.C, kLine<E>);
  parallel_tasks(ceil_div(weights.K, kPanel) * groups, [&](int64_t task) {
    pack(weights, transform, task / groups, task % groups * kLine<E>, packed);
  });
}

void pack_gemm(const Weights& weights, float* packed) {
  const int64_t depth = round_up(weights.C * weights.taps(), kGroup);
  parallel_tasks(ceil_div(weights.K, kPanel), [&](int64_t panel) {
    FASTSEG_ISA_CALL(pack_panel)(weights, panel, depth, packed + panel * depth * kPanel);
  });
}

// Contiguous weights.
void pack_gemm(const Weights& weights, BFloat16* packed) {
  const int64_t C = weights.C, K = weights.K, taps = weights.taps();
  const int64_t depth = round_up(C * taps, kLine<BFloat16>);
  parallel_tasks(ceil_div(K, kPanel), [&](int64_t panel) {
    BFloat16* dst = packed + panel * depth * kPanel;
    std::memset(static_cast<void*>(dst), 0, depth * kPanel * sizeof *dst);
    for (int64_t k = panel * kPanel; k < std::min(K, (panel + 1) * kPanel); ++k) {
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          dst[panel_index<BFloat16>(tap * C + c, k)] = static_cast<BFloat16>(weights.at(k, c)[tap]);
        }
      }
    }
  });
}

// See strassen_conv.inl for the form.
template <typename E>
void pack_strassen(const float* weight, int64_t K, int64_t C, E* packed) {
  const int64_t half = C / 2;
  parallel_tasks(K / (2 * kPanel), [&](int64_t pair) {
    E* dst = packed + pair * kStrassenProducts * half * kPanel;
    for (int64_t c = 0; c < half; ++c) {
      for (int64_t k = 0; k < kPanel; ++k) {
        const float* left = weight + (2 * pair * kPanel + k) * C + c;
        const float* right = left + kPanel * C;
        double operands[kStrassenProducts];
        strassen_weights(left[0], right[0], left[half], right[half], operands);
        for (int i = 0; i < kStrassenProducts; ++i) {
          dst[i * half * kPanel + panel_index<E>(c, k)] =
              static_cast<E>(static_cast<float>(operands[i]));
        }
      }
    }
  });
}

// weight (K, C, R, S), K the outputs of all groups -> [tap][word of C][K], whole panels.
template <typename E>
void pack_grouped(const float* weight, int64_t K, int64_t C, int64_t taps, E* packed) {
  const int64_t columns = round_up(K, kPanel);
  for (int64_t i = 0; i < taps * C; i += kPerWord<E>) {
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t c = i % C; c < i % C + kPerWord<E>; ++c) {
        *packed++ = E(k < K ? weight[(k * C + c) * taps + i / C] : 0.0f);
      }
    }
  }
}

void pack_bias(const float* bias, int64_t K, float* packed) {
  if (bias != nullptr) std::copy_n(bias, K, packed);
  std::fill(packed + (bias != nullptr ? K : 0), packed + round_up(K, kPanel), 0.0f);
}

// Whether weights are read by their strides, as pack_weight does for most forms.
template <typename E>
bool reads_strides(int64_t tile, int64_t strassen) {
  return std::is_same_v<E, float> && !strassen && tile != kGroupedTile && tile != kLineTile;
}

template <typename E>
void pack_weight(const Weights& weights, int64_t tile, int64_t strassen, E* packed) {
  const int64_t K = weights.K, C = weights.C, taps = weights.taps();
  if (strassen) {
    pack_strassen(weights.data, K, C, packed);
  } else if (tile == 0) {
    pack_gemm(weights, packed);
  } else if (tile == kGroupedTile) {
    pack_grouped(weights.data, K, C, taps, packed);
  } else if (tile == kLineTile) {
    pack_winograd_1d(weights.data, K, C, taps, packed);
  } else {
    dispatch_tile<E>(tile,
                     [&](auto pair) { pack_winograd(weights, WeightTransform(pair), packed); });
  }
}

// weight (K, C, R, S), bias (K) -> the engine's own form, one flat tensor: for each group, or with
// kGroupedTile for all at once, weights and then the bias, which is float32 in any case.
template <typename E>
Tensor pack(const Tensor& any, const std::optional<Tensor>& bias, int64_t tile, int64_t strassen,
            int64_t groups) {
  FASTSEG_CHECK(any.dim() == 4 && any.scalar_type() == ScalarType::Float,
                "conv_engine_pack: weight must be a float32 tensor (K, C, R, S)");
  const Tensor weight = reads_strides<E>(tile, strassen) ? any : torch::stable::contiguous(any);
  const int64_t outputs = weight.size(0), C = weight.size(1);
  const int64_t taps = weight.size(2) * weight.size(3);
  check_groups<E>(groups, outputs, C, tile);
  check_tile<E>(tile, outputs / groups, C, weight.size(2), weight.size(3), strassen);
  FASTSEG_CHECK(!bias || (bias->numel() == outputs && bias->is_contiguous() &&
                          bias->scalar_type() == ScalarType::Float),
                "conv_engine_pack: bias must be a contiguous float32 tensor of ", outputs,
                " elements");
  const PackedGroups<E> layout(groups, outputs, C, taps, tile, strassen);
  const int64_t K = layout.outputs;
  const Tensor packed =
      torch::stable::new_empty(weight, {layout.parts * layout.size},
                               std::is_same_v<E, float> ? ScalarType::Float : ScalarType::BFloat16);
  E* dst = packed.mutable_data_ptr<E>();
  Weights weights{weight.const_data_ptr<float>(),
                  K,
                  C,
                  weight.size(2),
                  weight.size(3),
                  weight.stride(0),
                  weight.stride(1),
                  weight.stride(2),
                  weight.stride(3)};
  for (int64_t i = 0; i < layout.parts; ++i, dst += layout.size) {
    pack_weight(weights, tile, strassen, dst);
    pack_bias(bias ? bias->const_data_ptr<float>() + i * K : nullptr, K,
              reinterpret_cast<float*>(dst + layout.bias));
    weights.data += K * weight.stride(0);
  }
  return packed;
}

Tensor conv_engine_pack(const Tensor& weight, const std::optional<Tensor>& bias, int64_t tile,
                        bool bfloat16, int64_t strassen, int64_t groups) {
  return bfloat16 ? pack<BFloat16>(weight, bias, tile, strassen, groups)
                  : pack<float>(weight, bias, tile, strassen, groups);
}

}  // namespace

int64_t packed_floats(const Weights& weights, int64_t tile) {
  return packed_size<float>(weights.K, weights.C, weights.taps(), tile, 0) +
         round_up(weights.K, kPanel);
}

void pack_weights(const Weights& weights, const float* bias, int64_t tile, float* packed) {
  pack_weight(weights, tile, 0, packed);
  pack_bias(bias, weights.K, packed + packed_floats(weights, tile) - round_up(weights.K, kPanel));
}

}  // namespace conv_engine

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "conv_engine_pack(Tensor weight, Tensor? bias, int tile, bool bfloat16=False, "
      "int strassen=0, int groups=1) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("conv_engine_pack", TORCH_BOX(&conv_engine::conv_engine_pack));
}

}  // namespace fastseg
