// Depthwise convolutions (depthwise.inl).
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "conv_engine/groups.h"
#include "conv_engine/lines.h"
#include "conv_engine/run.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

#define FASTSEG_KERNEL_FILE "conv_engine/depthwise_kernel.inl"
#include "common/foreach_isa.inl"

}  // namespace

template <class Conv>
void run_depthwise(const InGroups<Conv>& conv) {
  // Kernels with loops of their own, in which each pixel is read once per kernel row.
  const bool shared = conv.stride_w == 1 ? conv.S == 3 || conv.S == 5 || conv.S == 7
                                         : conv.stride_w == 2 && conv.dilation_w == 1 &&
                                               (conv.S == 3 || conv.S == 5);
  const std::vector<LineSegment> segments = line_segments(conv, shared);
  const auto kernel = FASTSEG_ISA_CALL(DepthwiseKernel<InGroups<Conv>>::run);
  parallel_lines(conv, [&](int64_t begin, int64_t end, int64_t k, int64_t k_end) {
    kernel(conv, segments, begin, end, k, k_end);
  });
}

template void run_depthwise(const InGroups<Convolution<float, float>>&);
template void run_depthwise(const InGroups<Convolution<BFloat16, float>>&);

}  // namespace conv_engine
}  // namespace fastseg
