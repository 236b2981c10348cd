// Depthwise convolutions (depthwise.inl).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cache.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/run.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

// Output pixels [begin, end) of a line, for which columns [s0, s1) of the kernel lie in the image.
struct DepthwiseSegment {
  int64_t begin, end, s0, s1;
};

#define FASTSEG_KERNEL_FILE "conv_engine/depthwise_kernel.inl"
#include "common/foreach_isa.inl"

// A task of fewer vectors of products takes less than some 10 microseconds.
constexpr int64_t kTaskVectors = 20'000;

template <class Conv>
std::vector<DepthwiseSegment> segments(const Conv& conv) {
  std::vector<DepthwiseSegment> all;
  for (int64_t ox = 0; ox < conv.Wo; ++ox) {
    const int64_t ix = ox * conv.stride_w - conv.pad_w;
    const int64_t left = ceil_div(std::max<int64_t>(-ix, 0), conv.dilation_w);
    const int64_t inside = ceil_div(std::max<int64_t>(conv.W - ix, 0), conv.dilation_w);
    const int64_t s0 = std::min(left, conv.S), s1 = std::clamp(inside, s0, conv.S);
    if (!all.empty() && all.back().s0 == s0 && all.back().s1 == s1) {
      all.back().end = ox + 1;
    } else {
      all.push_back({ox, ox + 1, s0, s1});
    }
  }
  return all;
}

}  // namespace

// A task is some lines of some channels: so many that the rows of the image that several lines of
// output read stay in L2.
template <class Conv>
void run_depthwise(const Conv& given) {
  Conv conv = given;
  conv.stream = false;  // with 4 MB of results and more 10 to 20 % slower past the caches
  using T = typename Conv::Storage;
  const std::vector<DepthwiseSegment> cuts = segments(conv);
  const int64_t lines = conv.N * conv.Ho, threads = torch::stable::get_num_threads();
  const int64_t window = std::min(conv.H, (conv.R - 1) * conv.dilation_h + conv.stride_h);
  const int64_t most = l2_bytes() / 2 / (window * conv.W * static_cast<int64_t>(sizeof(T)));
  const int64_t blocks = ceil_div(conv.panels(), std::max<int64_t>(most / kPanel, 2));
  const int64_t vectors = lines * conv.Wo * conv.R * conv.S * ceil_div(conv.C, kGroup);
  const int64_t wanted = std::clamp<int64_t>(vectors / kTaskVectors, 1, 8 * threads);
  const int64_t parts = std::min(lines, ceil_div(wanted, blocks));
  const auto kernel = FASTSEG_ISA_CALL(DepthwiseKernel<Conv>::run);
  parallel_tasks(parts * blocks, [&](int64_t task) {
    const int64_t part = task % parts, block = task / parts;
    kernel(conv, cuts.data(), static_cast<int64_t>(cuts.size()), part_begin(lines, parts, part),
           part_begin(lines, parts, part + 1), part_begin(conv.panels(), blocks, block) * kPanel,
           std::min(conv.C, part_begin(conv.panels(), blocks, block + 1) * kPanel));
  });
}

template void run_depthwise(const Convolution<float, float>&);
template void run_depthwise(const Convolution<BFloat16, float>&);

}  // namespace conv_engine
}  // namespace fastseg
