// Convolutions in groups of few channels, depthwise ones above all (grouped.inl).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cache.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/groups.h"
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
    kOwn,       // depthwise: each lane its own channel
    kOne,       // all the same channel
    kTwo,       // that of one group or of the next
    kPermuted,  // that of one of several, all of whose channels fit in a vector
  } kind;
  int64_t first, second;    // channel of the first lane's group, and from it to that of the second
  uint32_t offset[kGroup];  // of each lane's group, from `first`
};

// Output pixels [begin, end) of a line, for which columns [s0, s1) of the kernel lie in the image;
// or a line whose pixels share what they read, columns outside of the image among it.
struct LineSegment {
  int64_t begin, end, s0, s1;
  bool shared;
};

#define FASTSEG_KERNEL_FILE "conv_engine/grouped_kernel.inl"
#include "common/foreach_isa.inl"

// A task of fewer vectors of products takes less than some 10 microseconds.
constexpr int64_t kTaskVectors = 20'000;

template <class Conv>
std::vector<LaneReads> lane_reads(const Conv& conv, int64_t lanes) {
  const int64_t C = conv.C, K = conv.K, outputs = conv.groups * K, channels = conv.groups * C;
  std::vector<LaneReads> all;
  for (int64_t k = 0; k < outputs; k += lanes) {
    const int64_t end = std::min(outputs, k + lanes), first = k / K, last = (end - 1) / K;
    LaneReads read{};
    read.kind = C == 1 && K == 1                                       ? LaneReads::kOwn
                : first == last                                        ? LaneReads::kOne
                : (last - first + 1) * C <= lanes && channels >= lanes ? LaneReads::kPermuted
                                                                       : LaneReads::kTwo;
    // The last of the image's channels are loaded together with some before them.
    const int64_t back =
        read.kind == LaneReads::kPermuted ? std::max<int64_t>(first * C + lanes - channels, 0) : 0;
    read.first = first * C - back;
    read.second = C;
    for (int64_t l = 0; l < lanes; ++l) {
      read.offset[l] = static_cast<uint32_t>((std::min(k + l, end - 1) / K - first) * C + back);
    }
    all.push_back(read);
  }
  return all;
}

// Kernel rows of three taps, and of depthwise convolutions of five, have loops in which each pixel
// is read once for all of them.
template <class Conv>
bool shares_reads(const Conv& conv) {
  if (conv.stride_w == 2) return conv.S == 3 && conv.dilation_w == 1;
  return conv.stride_w == 1 && (conv.S == 3 || (conv.S == 5 && conv.C == 1 && conv.K == 1));
}

template <class Conv>
std::vector<LineSegment> segments(const Conv& conv) {
  if (shares_reads(conv)) return {{0, conv.Wo, 0, conv.S, true}};
  std::vector<LineSegment> all;
  for (int64_t ox = 0; ox < conv.Wo; ++ox) {
    const int64_t ix = ox * conv.stride_w - conv.pad_w;
    const int64_t left = ceil_div(std::max<int64_t>(-ix, 0), conv.dilation_w);
    const int64_t inside = ceil_div(std::max<int64_t>(conv.W - ix, 0), conv.dilation_w);
    const int64_t s0 = std::min(left, conv.S), s1 = std::clamp(inside, s0, conv.S);
    if (!all.empty() && all.back().s0 == s0 && all.back().s1 == s1) {
      all.back().end = ox + 1;
    } else {
      all.push_back({ox, ox + 1, s0, s1, false});
    }
  }
  return all;
}

}  // namespace

// A task is some lines of some channels: so many that the rows of the image that several lines of
// output read stay in L2.
template <class Conv>
void run_grouped(const InGroups<Conv>& given) {
  InGroups<Conv> conv = given;
  conv.stream = false;  // with 4 MB of results and more 10 to 20 % slower past the caches
  using T = typename Conv::Storage;
  const std::vector<LineSegment> cuts = segments(conv);
  const std::vector<LaneReads> reads =
      lane_reads(conv, FASTSEG_ISA_CALL(GroupedKernel<InGroups<Conv>>::lanes)());
  const int64_t lines = conv.N * conv.Ho, threads = torch::stable::get_num_threads();
  const int64_t outputs = conv.groups * conv.K, panels = ceil_div(outputs, kPanel);
  const int64_t window = std::min(conv.H, (conv.R - 1) * conv.dilation_h + conv.stride_h);
  const int64_t most = l2_bytes() / 2 / (window * conv.W * static_cast<int64_t>(sizeof(T)));
  const int64_t blocks = ceil_div(panels, std::max<int64_t>(most / kPanel, 2));
  const int64_t vectors = lines * conv.Wo * conv.R * conv.S * conv.C * ceil_div(outputs, kGroup);
  const int64_t wanted = std::clamp<int64_t>(vectors / kTaskVectors, 1, 8 * threads);
  // Two lines of an image are computed at once: which two must not depend on the tasks, for both
  // ways do not round the same.
  const int64_t image_pairs = ceil_div(conv.Ho, 2), pairs = conv.N * image_pairs;
  const int64_t parts = std::min(pairs, ceil_div(wanted, blocks));
  const auto first_line = [&](int64_t part) {
    const int64_t pair = part_begin(pairs, parts, part);
    return pair / image_pairs * conv.Ho + pair % image_pairs * 2;
  };
  const auto kernel = FASTSEG_ISA_CALL(GroupedKernel<InGroups<Conv>>::run);
  parallel_tasks(parts * blocks, [&](int64_t task) {
    const int64_t part = task % parts, block = task / parts;
    kernel(conv, reads.data(), cuts.data(), static_cast<int64_t>(cuts.size()), first_line(part),
           first_line(part + 1), part_begin(panels, blocks, block) * kPanel,
           std::min(outputs, part_begin(panels, blocks, block + 1) * kPanel));
  });
}

template void run_grouped(const InGroups<Convolution<float, float>>&);
template void run_grouped(const InGroups<Convolution<BFloat16, float>>&);

}  // namespace conv_engine
}  // namespace fastseg
