// Convolutions as matrix products on tensor cores, seen from the host: the geometry, the order in
// which pixels are taken so that taps that read only padding vanish, and the schedule that gives
// every block the same number of steps (stream-K, Osama et al. 2023, arXiv 2301.03598).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "common/host_device.h"

namespace fastseg {

// One axis of a convolution.
struct ConvAxis {
  int in, out, taps, stride, padding, dilation;
};

// The output positions of an axis, cut where the set of taps that stay inside the image changes.
struct Segments {
  static constexpr int kMax = 8;
  int count;
  int begin[kMax + 1];
};

constexpr int kMaxBranches = 6;  // convolutions of one input in one launch
constexpr int kMaxRuns = 96;
constexpr int kMaxTaps = 64;

// A convolution of the input shared by a launch.
struct ConvBranch {
  const void* weight;    // (K, taps, C)
  const void* bias;      // (K,), or null
  int K, first_channel;  // output channels, and where they begin in z
  int flipped;           // tap t takes filter tap taps - 1 - t, as in the gradient of the input
  ConvAxis rows, cols;
  Segments row_segments, col_segments;
};

// Neighbouring tiles that take the same number of steps each.
struct TileRun {
  uint64_t taps;  // those that are read; of a weight gradient the one that is computed
  int first_step, steps;
  int first_tile, branch;
};

// All tiles in a row make a line of steps, of which block b of `blocks` takes the b-th of equal
// parts. What it has of the tile at its end goes to the workspace if the tile goes on in the next.
struct Schedule {
  int runs, blocks;
  int64_t steps;
  TileRun run[kMaxRuns];

  FASTSEG_HOST_DEVICE int first_step(int64_t block) const {
    return static_cast<int>(block * steps / blocks);
  }
  FASTSEG_HOST_DEVICE int block_of(int64_t step) const {
    return static_cast<int>(((step + 1) * blocks - 1) / steps);
  }
};

// The part of one tile that a block computes: steps [begin, end) of the run's `steps`.
struct TilePart {
  TileRun run;
  int tile;  // of the run
  int begin, end;
  int first_step;  // of the tile
};

// The last part of a block that has steps [begin, end) of the line.
__device__ inline TilePart last_part(const Schedule& schedule, int begin, int end) {
  int r = schedule.runs - 1;
  while (schedule.run[r].first_step >= end) --r;
  const TileRun& run = schedule.run[r];
  const int tile = (end - 1 - run.first_step) / run.steps;
  const int first = run.first_step + tile * run.steps;
  return {run, tile, (begin > first ? begin : first) - first, end - first, first};
}

struct ConvForward {
  int N, C, x_stride, z_stride;  // channels last; elements from one pixel to the next
  float slope;                   // of the activation, 0 is ReLU and 1 none
  int whole;                     // 16-byte accesses to bias, residual and z
  int branches;
  ConvBranch branch[kMaxBranches];
  Schedule schedule;
};

struct ConvWeightGradient {
  int N, C, K, x_stride, dy_stride;
  int whole;
  ConvAxis rows, cols;
  Schedule schedule;  // one run per tap
};
static_assert(sizeof(ConvForward) < 3600 && sizeof(ConvWeightGradient) < 3600);  // of 4 KB

// Number, mean and sum of squared deviations of some values, joined by the method of Chan et al.
template <typename acc>
struct Moments {
  acc n, mean, m2;
  FASTSEG_HOST_DEVICE void merge(const Moments& other) {
    if (other.n == 0) return;
    const acc total = n + other.n, share = other.n / total, delta = other.mean - mean;
    m2 += other.m2 + delta * delta * n * share;
    mean += delta * share;
    n = total;
  }
};

constexpr int kConvTile = 128;  // pixels (of a weight gradient: output channels) of a tile

// Where a launch exchanges parts of tiles: kConvTile * columns floats and one flag per block.
struct StreamK {
  float* partials;
  uint64_t* flags;
  uint64_t stamp;  // what a flag of this launch holds when it is set
};

// A number that no other launch of the process has and that memory does not hold by chance: flags
// then need not be cleared beforehand. In a replayed graph it comes again, so readers clear them.
inline uint64_t launch_stamp() {
  static std::atomic<uint64_t> launches{0};
  uint64_t x = launches.fetch_add(1) * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) | 1;
}

// The positions o in [first, end) at which tap t reads inside the image.
inline void inside_range(const ConvAxis& a, int t, int* first, int* end) {
  const int64_t offset = int64_t{t} * a.dilation - a.padding;
  const int64_t low = offset >= 0 ? 0 : ceil_div<int64_t>(-offset, a.stride);
  const int64_t high = offset >= a.in ? 0 : (a.in - 1 - offset) / a.stride + 1;
  *first = static_cast<int>(std::min<int64_t>(low, a.out));
  *end = static_cast<int>(std::clamp<int64_t>(high, *first, a.out));
}

inline Segments tap_segments(const ConvAxis& a) {
  std::vector<int> cuts{0, a.out};
  for (int t = 0; t < a.taps; ++t) {
    int first, end;
    inside_range(a, t, &first, &end);
    cuts.insert(cuts.end(), {first, end});
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  Segments s{static_cast<int>(cuts.size()) - 1, {0, a.out}};  // too many cuts: none
  if (s.count > Segments::kMax) s.count = 1;
  if (s.count > 1) std::copy(cuts.begin(), cuts.end(), s.begin);
  return s;
}

// The share of an axis' (position, tap) pairs that lie inside the image.
inline double inside_share(const ConvAxis& a) {
  int64_t inside = 0;
  for (int t = 0; t < a.taps; ++t) {
    int first, end;
    inside_range(a, t, &first, &end);
    inside += end - first;
  }
  return static_cast<double>(inside) / (static_cast<double>(a.out) * a.taps);
}

// Appends `tiles` tiles of `steps` steps, each for `columns` column tiles. False if there is no
// room.
inline bool add_run(Schedule& s, int branch, uint64_t taps, int first_tile, int tiles, int steps,
                    int columns) {
  TileRun* last = s.runs > 0 ? &s.run[s.runs - 1] : nullptr;
  if (last == nullptr || last->branch != branch || last->taps != taps) {
    if (s.runs == kMaxRuns) return false;
    s.run[s.runs++] = {taps, static_cast<int>(s.steps), steps, first_tile, branch};
  }
  s.steps += int64_t{tiles} * steps * columns;
  return true;
}

// The taps that read inside the image at some position in segment i.
inline unsigned segment_taps(const ConvAxis& a, const Segments& s, int i) {
  unsigned taps = 0;
  for (int t = 0; t < a.taps; ++t) {
    int first, end;
    inside_range(a, t, &first, &end);
    if (std::max(first, s.begin[i]) < std::min(end, s.begin[i + 1])) taps |= 1u << t;
  }
  return taps;
}

// Appends a branch's tiles of kConvTile pixels in the order of its classes, rectangles in which the
// same taps lie inside the image; `steps_of` taps is what a tile takes. False if there is no room.
template <typename StepsOf>
bool add_branch(Schedule& s, const ConvBranch& b, int branch, int N, int columns,
                const StepsOf& steps_of) {
  int64_t at = 0;     // pixels so far
  uint64_t open = 0;  // taps of the tile that is not full yet
  bool fits = true;
  const auto append = [&](int64_t first_tile, int64_t tiles, uint64_t taps) {
    if (taps == 0) taps = 1;  // nothing but padding: one step of zeros
    fits = fits && add_run(s, branch, taps, static_cast<int>(first_tile), static_cast<int>(tiles),
                           steps_of(taps), columns);
  };
  for (int i = 0; i < b.row_segments.count; ++i) {
    const unsigned down = segment_taps(b.rows, b.row_segments, i);
    for (int j = 0; j < b.col_segments.count; ++j) {
      const unsigned right = segment_taps(b.cols, b.col_segments, j);
      uint64_t taps = 0;
      for (int t = 0; t < b.rows.taps; ++t) {
        if (down >> t & 1) taps |= uint64_t{right} << t * b.cols.taps;
      }
      int64_t left = int64_t{N} * (b.row_segments.begin[i + 1] - b.row_segments.begin[i]) *
                     (b.col_segments.begin[j + 1] - b.col_segments.begin[j]);
      if (at % kConvTile != 0) {
        const int64_t taken = std::min(left, kConvTile - at % kConvTile);
        open |= taps;
        at += taken;
        left -= taken;
        if (at % kConvTile == 0) append(at / kConvTile - 1, 1, open);
      }
      if (left >= kConvTile) append(at / kConvTile, left / kConvTile, taps);
      at += left;
      if (left % kConvTile != 0) open = taps;
    }
  }
  if (at % kConvTile != 0) append(at / kConvTile, 1, open);
  return fits;
}

// z = activation(x * weight + bias + residual) of each branch; residual may be null. `moments`,
// unless null, gets (pixel tiles, K) moments of x * weight + bias, of one branch.
// T is Half, BFloat16, or float computed in TF32. `wide`: 128 output channels a tile, else 64.
template <typename T>
void launch_conv_forward(const ConvForward& conv, bool wide, const StreamK& stream_k, const T* x,
                         const T* residual, Moments<float>* moments, T* z, cudaStream_t stream);

// dweight (K, taps, C) of x and dy; T is Half or BFloat16. `wide`: 128 input channels a tile.
template <typename T>
void launch_conv_weight_gradient(const ConvWeightGradient& conv, bool wide, const StreamK& stream_k,
                                 const T* x, const T* dy, T* dweight, cudaStream_t stream);

}  // namespace fastseg
