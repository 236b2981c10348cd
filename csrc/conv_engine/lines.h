// How convolutions in groups share their work out: tasks of some lines of output of some channels,
// and lines cut where the taps that lie in the image change.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cache.h"
#include "common/parallel.h"
#include "conv_engine/groups.h"

namespace fastseg {
namespace conv_engine {

// Output pixels [begin, end) of a line, for which columns [s0, s1) of the kernel lie in the image;
// or a line whose pixels share what they read, columns outside of the image among it.
struct LineSegment {
  int64_t begin, end, s0, s1;
  bool shared;
};

template <class Conv>
std::vector<LineSegment> line_segments(const Conv& conv, bool shared) {
  if (shared) return {{0, conv.Wo, 0, conv.S, true}};
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

// A task of fewer vectors of products takes less than some 10 microseconds.
constexpr int64_t kTaskVectors = 20'000;

// Calls run(first line, last line, first channel, last channel) for every task: so many channels
// that the rows of the image that several lines of output read stay in L2.
template <class Conv, class Run>
void parallel_lines(const Conv& conv, const Run& run) {
  using T = typename Conv::Storage;
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
  parallel_tasks(parts * blocks, [&](int64_t task) {
    const int64_t part = task % parts, block = task / parts;
    run(first_line(part), first_line(part + 1), part_begin(panels, blocks, block) * kPanel,
        std::min(outputs, part_begin(panels, blocks, block + 1) * kPanel));
  });
}

}  // namespace conv_engine
}  // namespace fastseg
