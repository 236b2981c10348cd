// k x 1 and 1 x k convolutions by Winograd along their axis (winograd_1d.inl).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/run.h"
#include "conv_engine/winograd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseg {
namespace conv_engine {
namespace {

#define FASTSEG_KERNEL_FILE "conv_engine/winograd_1d_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"

// Lines of one task of the one-dimensional form: three register tiles.
constexpr int64_t kTaskLines = 42;
struct TaskBuffer;  // names the scratch memory of a task

}  // namespace

template <class Conv>
void run_winograd_1d(const Conv& conv) {
  const int64_t lines = conv.N * (conv.S == 1 ? conv.W : conv.H);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(lines, round_up(ceil_div(lines, kTaskLines), threads));
  const int64_t floats =
      FASTSEG_CONV_CALL(Winograd1dKernel<Conv>::scratch_size)(conv, ceil_div(lines, parts));
  const auto kernel = FASTSEG_CONV_CALL(Winograd1dKernel<Conv>::run);
  parallel_tasks(parts, [&](int64_t part) {
    kernel(conv, part_begin(lines, parts, part), part_begin(lines, parts, part + 1),
           scratch<TaskBuffer>(floats));
  });
}

template void run_winograd_1d(const Convolution<float, float>&);
template void run_winograd_1d(const Convolution<BFloat16, float>&);
template void run_winograd_1d(const Convolution<BFloat16, BFloat16>&);

}  // namespace conv_engine
}  // namespace fastseg
