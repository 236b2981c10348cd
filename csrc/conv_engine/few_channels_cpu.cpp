// Convolutions of images of few channels (few_channels.inl).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/few_channels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

#define FASTSEG_KERNEL_FILE "conv_engine/few_channels_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"

template <class Conv, int C, int kStride>
auto* find_kernel() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<typename Conv::Operand, BFloat16>) {
    if (current_isa() == Isa::kAvx512Bf16) {
      return &avx512_bf16::FewChannelsKernel<Conv, C, kStride>::run;
    }
  }
#endif
  return FASTSEG_ISA_CALL(FewChannelsKernel<Conv, C, kStride>::run);
}

template <class Conv, int C, int kStride>
void run_lines(const Conv& conv) {
  const auto kernel = find_kernel<Conv, C, kStride>();
  const int64_t lines = conv.N * conv.Ho;
  const int64_t parts = std::min(lines, 8 * int64_t{torch::stable::get_num_threads()});
  parallel_tasks(parts, [&](int64_t part) {
    kernel(conv, part_begin(lines, parts, part), part_begin(lines, parts, part + 1));
  });
}

}  // namespace

template <class Conv>
void run_few_channels(const Conv& conv) {
  if (conv.C == 1) {
    return conv.stride_w == 1 ? run_lines<Conv, 1, 1>(conv) : run_lines<Conv, 1, 2>(conv);
  }
  return conv.stride_w == 1 ? run_lines<Conv, 3, 1>(conv) : run_lines<Conv, 3, 2>(conv);
}

template void run_few_channels(const Convolution<float, float>&);
template void run_few_channels(const Convolution<BFloat16, float>&);
template void run_few_channels(const Convolution<BFloat16, BFloat16>&);
template void run_few_channels(const WidenedConvolution&);

}  // namespace conv_engine
}  // namespace fastseg
