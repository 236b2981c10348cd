// 3x3 convolutions by Winograd (winograd.inl), cut into tasks. Its two translation units
// instantiate it, for they compile for minutes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/cache.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/run.h"
#include "conv_engine/tiles.h"
#include "conv_engine/winograd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

#define FASTSEG_KERNEL_FILE "conv_engine/winograd_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"

struct TaskBuffer;  // names the scratch memory of a task

// Tiles of one task of `points` products: few enough that the transformed tiles and their products
// stay in L2, unless the weights that every task reads anew from L3 are more than twice what it
// writes and reads of those. 64, 128, 256, 512 channels were fastest with 28 to 42, 28 to 42, 97
// and 97 tiles on a core with 2 MB.
template <class Conv>
int64_t task_tiles(const Conv& conv, int64_t points) {
  const int64_t C = conv.channels(), K = conv.panels() * kPanel;
  const int64_t piece = winograd_piece<typename Conv::Operand>(C);
  const int64_t v_bytes = piece * sizeof(typename Conv::Operand);
  const int64_t m_bytes = K * static_cast<int64_t>(sizeof(float));
  const int64_t tile_bytes = points * (piece == C ? std::max(v_bytes, m_bytes) : v_bytes + m_bytes);
  const int64_t cached = l2_bytes() * 3 / 16 / tile_bytes;
  const int64_t amortised = C * K / (C + K) / 2;
  return std::clamp<int64_t>(std::max(cached, amortised), kMaxRows,
                             std::max<int64_t>(kMaxRows, 4 * l2_bytes() / tile_bytes));
}

template <class Pair, class Conv>
void run_pair(const Conv& conv) {
  // A window that is pooled must not reach over two tiles.
  const TileGrid grid(Pair{}, conv.N, conv.Ho, conv.dilation_h, conv.Wo, conv.dilation_w,
                      conv.pooled.data != nullptr);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = task_tiles(conv, grid.weight[0]) * grid.weight[0];
  const int64_t panels = conv.panels();
  int64_t parts = std::min(grid.begin[4], round_up(ceil_div(grid.products(), most), threads));
  int64_t shares = 1;  // of the panels
  // Where each thread would have too few tiles to fill its registers, or where the weights come
  // from memory, more of them share fewer tiles: what they transform twice is less.
  constexpr int64_t kUncached = 16 << 20;  // bytes
  const int64_t weights = grid.weight[0] * conv.channels() * panels * kPanel;
  const bool few = grid.begin[4] < parts * kMaxRows / 2;
  const bool uncached = weights * static_cast<int64_t>(sizeof(typename Conv::Operand)) > kUncached;
  const int64_t filled = ceil_div(grid.begin[4], 2 * kMaxRows);
  if ((few || uncached) && filled <= parts && parts <= threads) {
    shares = parts / filled;
    while (parts % shares != 0 || panels % shares != 0) --shares;
    parts /= shares;
  }
  const auto task_of = [&](int64_t i) {
    const int64_t part = i / shares, share = i % shares;
    return WinogradTask{grid.part_begin(parts, part), grid.part_begin(parts, part + 1),
                        conv_engine::part_begin(panels, shares, share),
                        conv_engine::part_begin(panels, shares, share + 1)};
  };
  WinogradTask largest{0, 0, 0, ceil_div(panels, shares)};
  for (int64_t i = 0; i < parts; ++i) {
    largest.end = std::max(largest.end, task_of(i * shares).tiles());
  }
  const int64_t floats = FASTSEG_CONV_CALL(WinogradKernel<Pair, Conv>::scratch_size)(conv, largest);
  const auto kernel = FASTSEG_CONV_CALL(WinogradKernel<Pair, Conv>::run);
  parallel_tasks(parts * shares,
                 [&](int64_t i) { kernel(conv, grid, task_of(i), scratch<TaskBuffer>(floats)); });
}

// A task is a whole sub-grid, which no other reads and which is transformed before its outputs are
// written.
template <class Pair, class Conv>
void run_pair_in_place(const Conv& conv) {
  const auto sub_grid = [&](int64_t n, int64_t y, int64_t x) {
    Conv sub = conv;
    sub.N = sub.dilation_h = sub.dilation_w = sub.pad_h = sub.pad_w = 1;
    sub.H = sub.Ho = ceil_div(conv.H - y, conv.dilation_h);
    sub.W = sub.Wo = ceil_div(conv.W - x, conv.dilation_w);
    const int64_t row = conv.y.row * conv.dilation_h, pixel = conv.y.pixel * conv.dilation_w;
    sub.y = {conv.y.at(n, y, x), conv.y.batch, row, pixel};
    sub.x = {sub.y.data, conv.y.batch, row, pixel};
    return sub;
  };
  const auto grid_of = [](const Conv& sub) {
    return TileGrid(Pair{}, 1, sub.Ho, 1, sub.Wo, 1, false);
  };
  const auto task_of = [&](const TileGrid& grid) {
    return WinogradTask{0, grid.begin[4], 0, conv.panels()};
  };
  const Conv largest = sub_grid(0, 0, 0);
  const int64_t floats = FASTSEG_CONV_CALL(WinogradKernel<Pair, Conv>::scratch_size)(
      largest, task_of(grid_of(largest)));
  const auto kernel = FASTSEG_CONV_CALL(WinogradKernel<Pair, Conv>::run);
  const int64_t columns = std::min(conv.dilation_w, conv.W);
  const int64_t rows = std::min(conv.dilation_h, conv.H);
  parallel_tasks(conv.N * rows * columns, [&](int64_t task) {
    const int64_t line = task / columns;
    const Conv sub = sub_grid(line / rows, line % rows, task % columns);
    const TileGrid grid = grid_of(sub);
    kernel(sub, grid, task_of(grid), scratch<TaskBuffer>(floats));
  });
}

}  // namespace

template <class Conv>
void run_winograd(const Conv& conv, int64_t tile) {
  dispatch_tile<typename Conv::Operand>(tile, [&](auto pair) { run_pair<decltype(pair)>(conv); });
}

template <class Conv>
void run_winograd_in_place(const Conv& conv, int64_t tile) {
  dispatch_tile<typename Conv::Operand>(
      tile, [&](auto pair) { run_pair_in_place<decltype(pair)>(conv); });
}

}  // namespace conv_engine
}  // namespace fastseg
