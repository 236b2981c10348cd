// For which convolutions there is a kernel of few_channels_cpu.cpp.
#pragma once

#include <type_traits>

#include "common/isa.h"
#include "conv_engine/conv_engine.h"

namespace fastseg {
namespace conv_engine {

constexpr int64_t kFewRows = 3;  // of the kernel, at most

template <class Conv>
bool has_few_channels(const Conv& conv) {
  // As a matrix product of bfloat16 AMX has less to do.
  const bool rows = std::is_same_v<typename Conv::Operand, float>
                        ? conv.R <= kFewRows
                        : conv.R == kFewRows && current_isa() < Isa::kAmx;
  return rows && (conv.C == 1 || conv.C == 3) && conv.S == 3 && conv.dilation_h == 1 &&
         conv.dilation_w == 1 && conv.stride_h == conv.stride_w && conv.stride_w <= 2 &&
         conv.x.pixel == conv.C && conv.Wo >= kMaxRows && !conv.residual.data;
}

// Instantiated for all kinds of Convolution.
template <class Conv>
void run_few_channels(const Conv& conv);

}  // namespace conv_engine
}  // namespace fastseg
