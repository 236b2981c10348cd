// Any convolution as a matrix product (gemm_conv.inl), 1x1 ones with fewer multiplications
// (strassen_conv.inl), and those to few channels (narrow_conv.inl). With AVX-512 most 1x1 ones of
// either kind have a tile of their own (wide_tile.inl).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cache.h"
#include "common/counters.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/run.h"
#include "conv_engine/strassen.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

#define FASTSEG_KERNEL_FILE "conv_engine/gemm_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"

// Multiplications of a task, about a tenth of a millisecond.
constexpr int64_t kTaskProducts = 10'000'000;

struct TaskBuffer;  // names the scratch memory of a task

// Weights of at most half of L2 stay there while the blocks of pixels pass by, each once. Larger
// ones pass by in panels, each used by all blocks of a task, which together take a quarter of L2,
// of bfloat16 half (512 -> 2048 channels 4 % faster on a core with 1 MB):
// with 2 MB of weights on a core with 2 MB that took 23.4 instead of 27.4 ms, with 1 MB 11.5
// instead of 11.1.
template <class Conv>
void run_blocks(const Conv& conv) {
  using E = typename Conv::Operand;
  const int64_t threads = torch::stable::get_num_threads();
  GemmForm form = FASTSEG_CONV_CALL(GemmKernel<Conv>::form)(conv, false);
  const int64_t block_bytes = FASTSEG_CONV_CALL(GemmKernel<Conv>::block_bytes)();
  const int64_t columns = conv.panels() * kPanel;
  const int64_t products = ceil_div(conv.pixels(), form.blocks) * conv.depth();  // per column
  form.panels_first = columns * conv.depth() * int64_t{sizeof(E)} > l2_bytes() / 2;
  const int64_t most = form.panels_first ? l2_bytes() / (sizeof(E) == 2 ? 2 : 4) /
                                               (form.operands * static_cast<int64_t>(sizeof(E)))
                                         : kTaskProducts / (products * columns);
  const int64_t tasks = ceil_div(form.blocks, std::max<int64_t>(most, 1));
  const int64_t parts = std::min(form.blocks, round_up(tasks, threads));
  // Few pixels and many channels (pooled maps): share the panels out as well.
  const int64_t panel_parts = std::min(conv.panels(), ceil_div(2 * threads, parts));
  const int64_t kept = form.panels_first ? ceil_div(form.blocks, parts) : 2;  // blocks at a time
  const auto kernel = FASTSEG_CONV_CALL(GemmKernel<Conv>::run);
  parallel_tasks(parts * panel_parts, [&](int64_t task) {
    const int64_t part = task / panel_parts, panel_part = task % panel_parts;
    kernel(conv, form, part_begin(form.blocks, parts, part),
           part_begin(form.blocks, parts, part + 1),
           part_begin(conv.panels(), panel_parts, panel_part),
           part_begin(conv.panels(), panel_parts, panel_part + 1),
           scratch<TaskBuffer, E>(kept * form.copy), scratch<TaskBuffer, char>(kept * block_bytes));
  });
}

// A line of each convolution in turn: all but the first find the image in L1 or L2, and where their
// pixels lie between each other's, these are written in one go. Whether they can be.
template <class Conv>
bool run_lines(const std::vector<Conv>& convs) {
  using E = typename Conv::Operand;
  std::vector<GemmForm> forms;
  int64_t weights = 0, products = 0, copy = 0, most_lines = 0;  // products of a line
  for (const Conv& conv : convs) {
    const GemmForm form = FASTSEG_CONV_CALL(GemmKernel<Conv>::form)(conv, true);
    if (form.rows != GemmForm::kLines) return false;
    forms.push_back(form);
    weights += conv.panels() * kPanel * conv.depth();
    products += conv.Wo * conv.panels() * kPanel * conv.depth();
    copy = std::max(copy, form.copy);
    most_lines = std::max(most_lines, conv.Ho);
  }
  if (weights * int64_t{sizeof(E)} > l2_bytes() / 2) return false;
  const int64_t lines = convs[0].N * most_lines, threads = torch::stable::get_num_threads();
  const int64_t tasks =
      ceil_div(lines, std::max<int64_t>(kTaskProducts / std::max<int64_t>(products, 1), 1));
  const int64_t parts = std::min(lines, round_up(tasks, threads));
  const int64_t block_bytes = FASTSEG_CONV_CALL(GemmKernel<Conv>::block_bytes)();
  const auto kernel = FASTSEG_CONV_CALL(GemmKernel<Conv>::run);
  parallel_tasks(parts, [&](int64_t part) {
    E* copies = scratch<TaskBuffer, E>(2 * copy);
    char* blocks = scratch<TaskBuffer, char>(2 * block_bytes);
    const int64_t end = part_begin(lines, parts, part + 1);
    for (int64_t line = part_begin(lines, parts, part); line < end; ++line) {
      const int64_t n = line / most_lines, y = line % most_lines;
      for (size_t i = 0; i < convs.size(); ++i) {
        if (y >= convs[i].Ho) continue;
        const int64_t begin = (n * convs[i].Ho + y) * forms[i].line_blocks;
        kernel(convs[i], forms[i], begin, begin + forms[i].line_blocks, 0, convs[i].panels(),
               copies, blocks);
      }
    }
  });
  return true;
}

// The pixels and the operands made of them take a quarter of L2, but the weights, which every task
// reads anew, are for two pairs of AVX-512's blocks at least: with one, 2048 channels took 49
// instead of 42 ms on a core with 2 MB. And for three at most, whose sums stay in L1: with eight,
// 256 -> 1024 channels took 2 to 8 % longer.
template <class Conv>
void run_strassen(const Conv& conv) {
  using E = typename Conv::Operand;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pairs = FASTSEG_DOT_CALL(StrassenKernel<Conv>::pairs)(conv);
  const int64_t pair_bytes = FASTSEG_DOT_CALL(StrassenKernel<Conv>::pair_bytes)();
  const int64_t operands = FASTSEG_DOT_CALL(StrassenKernel<Conv>::operands_size)(conv);
  const int64_t pair_rows = ceil_div(conv.pixels(), pairs);
  const int64_t pair_values = operands + pair_rows * (conv.C + conv.C2);
  const int64_t least = ceil_div(4 * kMaxRows, pair_rows), most = least * 3 / 2;
  const int64_t fit = l2_bytes() / 4 / (pair_values * static_cast<int64_t>(sizeof(E)));
  const int64_t tasks = ceil_div(pairs, std::clamp(fit, least, most));
  const int64_t parts = std::min(pairs, round_up(tasks, threads));
  const int64_t panels = conv.panels() / 2;
  const int64_t panel_parts = std::min(panels, ceil_div(2 * threads, parts));
  const int64_t kept = ceil_div(pairs, parts);
  const auto kernel = FASTSEG_DOT_CALL(StrassenKernel<Conv>::run);
  parallel_tasks(parts * panel_parts, [&](int64_t task) {
    const int64_t part = task / panel_parts, panel_part = task % panel_parts;
    const int64_t next = std::min(part + 1, parts - 1);
    kernel(conv, part_begin(pairs, parts, part), part_begin(pairs, parts, part + 1),
           part_begin(pairs, parts, next), part_begin(panels, panel_parts, panel_part),
           part_begin(panels, panel_parts, panel_part + 1), scratch<TaskBuffer, E>(kept * operands),
           scratch<TaskBuffer, char>(kept * pair_bytes));
  });
}

#if defined(__x86_64__)
// 1x1 convolutions by the wide tile, with weights that stay in L2 while the pixels pass by. Short
// tasks: with those of run_blocks 64 channels were cut into four for each of two threads.
template <class Kernel, class Conv>
void run_wide(const Conv& conv) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = ceil_div(conv.pixels(), avx512::kWideRows), pairs = conv.panels() / 2;
  const int64_t products = conv.depth() * conv.K * avx512::kWideRows;  // of a tile's rows
  const int64_t tasks = ceil_div(tiles, std::max<int64_t>(kTaskProducts / 4 / products, 1));
  const int64_t parts = std::min(tiles, round_up(tasks, threads));
  const int64_t pair_parts = std::min(pairs, ceil_div(2 * threads, parts));
  parallel_tasks(parts * pair_parts, [&](int64_t task) {
    const int64_t part = task / pair_parts, pair_part = task % pair_parts;
    Kernel::run(conv, part_begin(tiles, parts, part), part_begin(tiles, parts, part + 1),
                part_begin(pairs, pair_parts, pair_part),
                part_begin(pairs, pair_parts, pair_part + 1));
  });
}

// The same with Strassen's algorithm: eight pairs of blocks read the weights that pass by, or as
// many as leave a quarter of L2 to these.
template <class Conv>
void run_wide_strassen(const Conv& conv) {
  using Kernel = avx512::WideStrassenKernel<Conv>;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pairs = Kernel::pairs(conv), columns = conv.K / Kernel::kColumns;
  const int64_t operands = Kernel::operands_size(conv), copies = Kernel::copy_size(conv);
  const int64_t fit =
      l2_bytes() * 3 / 4 / ((operands + copies) * static_cast<int64_t>(sizeof(float)));
  const int64_t tasks = ceil_div(pairs, std::clamp<int64_t>(fit, 4, 8));
  const int64_t parts = std::min(pairs, round_up(tasks, threads));
  const int64_t column_parts = std::min(columns, ceil_div(2 * threads, parts));
  const int64_t kept = ceil_div(pairs, parts);
  parallel_tasks(parts * column_parts, [&](int64_t task) {
    const int64_t part = task / column_parts, column_part = task % column_parts;
    Kernel::run(conv, part_begin(pairs, parts, part), part_begin(pairs, parts, part + 1),
                part_begin(columns, column_parts, column_part),
                part_begin(columns, column_parts, column_part + 1),
                scratch<TaskBuffer, float>(kept * (operands + copies)),
                scratch<TaskBuffer, char>(kept * Kernel::pair_bytes()));
  });
}
#endif

// Runs a 1x1 convolution by the wide tile if there is one and it fits.
template <class Conv>
bool try_wide(const Conv& conv) {
  if (conv.scale) return false;
#if defined(__x86_64__)
  using E = typename Conv::Operand;
  if constexpr (std::is_same_v<typename Conv::Storage, E>) {
    constexpr bool kFloat = std::is_same_v<E, float>;
    if (kFloat ? current_isa() < Isa::kAvx512 : current_isa() != Isa::kAvx512Bf16) return false;
    if (conv.strassen) {
      if constexpr (kFloat) {
        if (!avx512::WideStrassenKernel<Conv>::fits(conv)) return false;
        FASTSEG_COUNT("conv_engine.wide_strassen");
        run_wide_strassen(conv);
        return true;
      }
      return false;
    }
    using Kernel =
        std::conditional_t<kFloat, avx512::WideKernel<Conv>, avx512_bf16::WideKernel<Conv>>;
    const int64_t weights = conv.panels() * kPanel * conv.depth() * int64_t{sizeof(E)};
    if (weights > l2_bytes() / 2 || !Kernel::fits(conv)) return false;
    if (!kFloat && conv.K < conv.C) return false;  // 256 -> 64 channels took 8 % longer
    FASTSEG_COUNT("conv_engine.wide");
    run_wide<Kernel>(conv);
    return true;
  }
#endif
  return false;
}

// Few outputs of many channels: 64 -> 1 at 320x320 took 33 ms as a matrix product on one core.
template <class Conv>
bool is_narrow(const Conv& conv) {
  return conv.K <= kNarrowOutputs && conv.C >= kGroup && !conv.C2 && !conv.scale;
}

template <class Conv>
void run_narrow(const Conv& conv) {
  using T = typename Conv::Storage;
  const int64_t taps = conv.R * conv.S, weights = conv.K * taps * round_up(conv.C, kGroup);
  std::vector<float> unpacked(weights);
  std::vector<T> zeros(conv.C);
  FASTSEG_CONV_CALL(unpack_narrow<Conv>)(conv, unpacked.data());
  const auto kernel = FASTSEG_CONV_CALL(narrow_conv<Conv>);
  const int64_t lines = conv.N * conv.Ho;
  const int64_t parts = std::min(lines, 8 * int64_t{torch::stable::get_num_threads()});
  parallel_tasks(parts, [&](int64_t part) {
    kernel(conv, part_begin(lines, parts, part), part_begin(lines, parts, part + 1),
           unpacked.data(), zeros.data());
  });
}

}  // namespace

template <class Conv>
void run_gemm(const Conv& conv) {
  if (conv.strassen) {
    FASTSEG_COUNT("conv_engine.strassen");
    if (!try_wide(conv)) run_strassen(conv);
  } else if (is_narrow(conv)) {
    FASTSEG_COUNT("conv_engine.narrow");
    run_narrow(conv);
  } else {
    FASTSEG_COUNT("conv_engine.gemm");
    if (!try_wide(conv)) run_blocks(conv);
  }
}

template <class Conv>
void run_gemms(const std::vector<Conv>& convs) {
  std::vector<Conv> some;
  for (const Conv& conv : convs) {
    if (conv.pixels() > 0) some.push_back(conv);
  }
  if (some.empty()) return;
  if (some.size() > 1 && !is_narrow(some[0]) && run_lines(some)) return;
  for (const Conv& conv : some) run_gemm(conv);
}

template void run_gemm(const Convolution<float, float>&);
template void run_gemm(const Convolution<BFloat16, float>&);
template void run_gemm(const Convolution<BFloat16, BFloat16>&);
template void run_gemm(const WidenedConvolution&);
template void run_gemms(const std::vector<Convolution<float, float>>&);
template void run_gemms(const std::vector<Convolution<BFloat16, float>>&);
template void run_gemms(const std::vector<Convolution<BFloat16, BFloat16>>&);

}  // namespace conv_engine
}  // namespace fastseg
