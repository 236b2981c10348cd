// What test_conv_engine_amx.py calls: the convolution engine's kernels for AMX, with amx_stand_in.h
// in the place of the instructions, cut into tasks that run one after the other.
#define FASTSEG_AMX_STAND_IN
#include <immintrin.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/strassen.h"
#include "conv_engine/tiles.h"
#include "conv_engine/winograd.h"

namespace fastseg {
namespace conv_engine {
namespace {

namespace gemm {
#define FASTSEG_KERNEL_FILE "conv_engine/gemm_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"
}  // namespace gemm

namespace winograd {
#define FASTSEG_KERNEL_FILE "conv_engine/winograd_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"
}  // namespace winograd

namespace line {
#define FASTSEG_KERNEL_FILE "conv_engine/winograd_1d_kernel.inl"
#define FASTSEG_KERNEL_BF16
#include "common/foreach_isa.inl"
}  // namespace line

using Conv = Convolution<BFloat16, BFloat16>;

// Memory behind which no page is mapped: who reads on ends the process. What was not written is
// NaN, in either type.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), whole = round_up(bytes, page);
    base_ = static_cast<char*>(
        mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    size_ = whole + page;
    mprotect(base_ + whole, page, PROT_NONE);
    std::memset(base_, 0xff, whole);
    data = base_ + whole - bytes;
  }
  ~Guarded() { munmap(base_, size_); }
  char* data;

 private:
  char* base_;
  int64_t size_;
};

void run_gemm(Conv& conv, int64_t tasks, bool panels_first) {
  using Kernel = gemm::amx::GemmKernel<Conv>;
  GemmForm form = Kernel::form(conv, false);
  form.panels_first = panels_first;
  const int64_t parts = std::min(tasks, form.blocks), panel_parts = std::min(tasks, conv.panels());
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part_begin(form.blocks, parts, part);
    const int64_t end = part_begin(form.blocks, parts, part + 1);
    for (int64_t panel = 0; panel < panel_parts; ++panel) {
      const int64_t kept = panels_first ? end - begin : 2;
      const Guarded copies(kept * form.copy * sizeof(BFloat16));
      const Guarded blocks(round_up(kept * Kernel::block_bytes(), 64));
      Kernel::run(conv, form, begin, end, part_begin(conv.panels(), panel_parts, panel),
                  part_begin(conv.panels(), panel_parts, panel + 1),
                  reinterpret_cast<BFloat16*>(copies.data), blocks.data);
    }
  }
}

void run_winograd(Conv& conv, int64_t tile, int64_t tasks) {
  dispatch_tile<BFloat16>(tile, [&](auto pair) {
    using Kernel = winograd::amx::WinogradKernel<decltype(pair), Conv>;
    const TileGrid grid(pair, conv.N, conv.Ho, conv.dilation_h, conv.Wo, conv.dilation_w, false);
    const int64_t parts = std::min(tasks, grid.begin[4]);
    const int64_t panels = conv.panels(), shares = std::min(1 + tasks % 2, panels);
    for (int64_t i = 0; i < parts * shares; ++i) {
      const int64_t part = i / shares, share = i % shares;
      const WinogradTask task{grid.part_begin(parts, part), grid.part_begin(parts, part + 1),
                              part_begin(panels, shares, share),
                              part_begin(panels, shares, share + 1)};
      const Guarded memory(round_up(Kernel::scratch_size(conv, task), 16) * sizeof(float));
      Kernel::run(conv, grid, task, reinterpret_cast<float*>(memory.data));
    }
  });
}

void run_line(Conv& conv, int64_t tasks) {
  using Kernel = line::amx::Winograd1dKernel<Conv>;
  const int64_t lines = conv.N * (conv.S == 1 ? conv.W : conv.H), parts = std::min(tasks, lines);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part_begin(lines, parts, part), end = part_begin(lines, parts, part + 1);
    const Guarded memory(round_up(Kernel::scratch_size(conv, end - begin), 16) * sizeof(float));
    Kernel::run(conv, begin, end, reinterpret_cast<float*>(memory.data));
  }
}

}  // namespace
}  // namespace conv_engine
}  // namespace fastseg

// numbers: N, C, H, W, K, Ho, Wo, R, S, stride, padding, dilation (vertical, horizontal), distances
// of images, rows and pixels of x, y and the residual; C, stride and distances of the other image;
// activation, whether the residual comes last, whether to stream, the tile of the algorithm, tasks,
// whether panels are the outer loop. `size`, `other_size`: elements from x and from the other image
// on. Returns how often tiles were configured, or -1 if they were left open.
extern "C" __attribute__((visibility("default"))) int64_t run(const int64_t* numbers, float slope,
                                                              const void* x, int64_t size,
                                                              const void* other, int64_t other_size,
                                                              const void* weight, const float* bias,
                                                              const void* residual, void* y) {
  using namespace fastseg;
  using namespace fastseg::conv_engine;
  const Guarded image(size * sizeof(BFloat16)), other_image(other_size * sizeof(BFloat16));
  std::memcpy(image.data, x, size * sizeof(BFloat16));
  if (other) std::memcpy(other_image.data, other, other_size * sizeof(BFloat16));
  Conv conv{};
  int64_t* const fields[] = {&conv.N,
                             &conv.C,
                             &conv.H,
                             &conv.W,
                             &conv.K,
                             &conv.Ho,
                             &conv.Wo,
                             &conv.R,
                             &conv.S,
                             &conv.stride_h,
                             &conv.stride_w,
                             &conv.pad_h,
                             &conv.pad_w,
                             &conv.dilation_h,
                             &conv.dilation_w,
                             &conv.x.batch,
                             &conv.x.row,
                             &conv.x.pixel,
                             &conv.y.batch,
                             &conv.y.row,
                             &conv.y.pixel,
                             &conv.residual.batch,
                             &conv.residual.row,
                             &conv.residual.pixel,
                             &conv.C2,
                             &conv.stride2_h,
                             &conv.stride2_w,
                             &conv.x2.batch,
                             &conv.x2.row,
                             &conv.x2.pixel};
  for (int64_t* field : fields) *field = *numbers++;
  conv.activation = static_cast<Activation>(*numbers++);
  conv.residual_last = *numbers++ && residual;
  conv.stream = *numbers++;
  const int64_t tile = *numbers++, tasks = *numbers++, panels_first = *numbers++;
  conv.slope = slope;
  conv.x.data = reinterpret_cast<const BFloat16*>(image.data);
  conv.x2.data = reinterpret_cast<const BFloat16*>(other_image.data);
  conv.y.data = static_cast<BFloat16*>(y);
  conv.residual.data = static_cast<const BFloat16*>(residual);
  conv.weight = static_cast<const BFloat16*>(weight);
  conv.bias = bias;
  auto& state = amx_stand_in::state;
  const int64_t before = state.configured;
  if (tile == 0) {
    run_gemm(conv, tasks, panels_first);
  } else if (tile == kLineTile) {
    run_line(conv, tasks);
  } else {
    run_winograd(conv, tile, tasks);
  }
  return state.config.palette == 0 && state.configured == state.released ? state.configured - before
                                                                         : -1;
}

// What the kernels' sums rest on: C (16 x 16) += A (16 x 32) times B (16 pairs x 16).
extern "C" __attribute__((visibility("default"))) void multiply(const void* a, const void* b,
                                                                float* c) {
  using namespace fastseg;
  TileConfig config;
  for (int i = 0; i < 3; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  tile_configure(config);
  tile_load<0>(c, 64);
  tile_load<1>(a, 64);
  tile_load<2>(b, 64);
  tile_multiply<0, 1, 2>();
  tile_store<0>(c, 64);
  tile_release();
}
