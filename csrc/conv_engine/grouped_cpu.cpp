// Convolutions in groups of few channels (grouped.inl).
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/groups.h"
#include "conv_engine/lines.h"
#include "conv_engine/run.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

// What the lanes of a vector of outputs read of a pixel: channels of their groups.
struct LaneReads {
  enum Kind {
    kOne,       // all the same channel
    kTwo,       // that of one group or of the next
    kPermuted,  // that of one of several, all of whose channels fit in a vector
  } kind;
  int64_t first, second;    // channel of the first lane's group, and from it to that of the second
  uint32_t offset[kGroup];  // words from `first` to each lane's group
};

#define FASTSEG_KERNEL_FILE "conv_engine/grouped_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"

template <class Conv>
std::vector<LaneReads> lane_reads(const Conv& conv, int64_t lanes) {
  constexpr int64_t kChannels = kPerWord<typename Conv::Operand>;
  const int64_t C = conv.C / kChannels, channels = conv.groups * C;  // counted in words
  const int64_t K = conv.K, outputs = conv.groups * K;
  std::vector<LaneReads> all;
  for (int64_t k = 0; k < outputs; k += lanes) {
    const int64_t end = std::min(outputs, k + lanes), first = k / K, last = (end - 1) / K;
    LaneReads read{};
    read.kind = first == last                                          ? LaneReads::kOne
                : (last - first + 1) * C <= lanes && channels >= lanes ? LaneReads::kPermuted
                                                                       : LaneReads::kTwo;
    // The last words of a pixel are loaded together with some before them.
    const int64_t back =
        read.kind == LaneReads::kPermuted ? std::max<int64_t>(first * C + lanes - channels, 0) : 0;
    read.first = (first * C - back) * kChannels;
    read.second = conv.C;
    for (int64_t l = 0; l < lanes; ++l) {
      read.offset[l] = static_cast<uint32_t>((std::min(k + l, end - 1) / K - first) * C + back);
    }
    all.push_back(read);
  }
  return all;
}

}  // namespace

template <class Conv>
void run_grouped(const InGroups<Conv>& conv) {
  // Kernel rows of three taps have loops in which each pixel is read once for all of them.
  const bool shared =
      conv.S == 3 && (conv.stride_w == 1 || (conv.stride_w == 2 && conv.dilation_w == 1));
  const std::vector<LineSegment> segments = line_segments(conv, shared);
  const std::vector<LaneReads> reads =
      lane_reads(conv, FASTSEG_CONV_CALL(GroupedKernel<InGroups<Conv>>::lanes)());
  const auto kernel = FASTSEG_CONV_CALL(GroupedKernel<InGroups<Conv>>::run);
  parallel_lines(conv, [&](int64_t begin, int64_t end, int64_t k, int64_t k_end) {
    kernel(conv, reads, segments, begin, end, k, k_end);
  });
}

template void run_grouped(const InGroups<Convolution<float, float>>&);
template void run_grouped(const InGroups<Convolution<BFloat16, float>>&);
template void run_grouped(const InGroups<Convolution<BFloat16, BFloat16>>&);

}  // namespace conv_engine
}  // namespace fastseg
