// The gradient of a convolution's weights on the CPU, the same bits for any number of threads:
//   dW[k][c][tap] = sum over output pixels p of dy[p][k] * x[the pixel of p under tap][c].
// Both factors are packed, a piece of the positions p at a time:
//   a: [plane][position][a_step], rows; a plane per tap, or per kernel row whose pixels lie side by
//      side, or one for a whole kernel over few channels; a row per channel of x and tap of the
//      plane. Positions whose tap lies outside of the image are left out.
//   b: [plane][panel][position][kPanel], channels of dy; one plane for all taps
//   sums: [plane][row][panels * kPanel]
// A task packs and sums some rows and panels of a plane by itself. Where those are too few tasks,
// positions are cut into slabs, whose number depends on the shapes alone and which are added in
// their order.
// For 3x3 kernels also by Winograd's F(3, 4) along both axes (Lavin and Gray 2016, section 4): the
// positions are tiles of 4x4 outputs, the planes the 36 points of their transforms; a quarter of
// the multiplications. The points are those of F(4, 3). Tiles come in chunks: threads first
// transform both factors of a chunk, then share the elements of the gradient, so that each is one
// sum in one order.
#include "conv_bn/conv_weight_gradient.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/counters.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "conv_bn/pixels.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/winograd.h"

namespace fastseg {
namespace {

using namespace conv_engine;  // NOLINT: the kernels' own namespace

// Positions that are summed in registers: a panel of them stays in L1.
constexpr int64_t kPiece = 192;
// Distance of panels: a multiple of 4 KB would put a position's channels into one cache set.
constexpr int64_t kPanelStep = (kPiece + 1) * kPanel;
constexpr int64_t kFinishedRows = 16;  // written at a time

template <typename T>
struct WeightGradient {
  TileAxis tiles_y, tiles_x;  // of Winograd's 4x4 outputs
  int64_t N, C, H, W;         // x
  int64_t K, Ho, Wo;          // dy
  int64_t R, S;               // kernel
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Image<const T> x, dy;
  T* dw;
  int64_t dw_k, dw_c, dw_r, dw_s;  // strides
  bool turned;                     // taps are counted from the other end
  int64_t positions, planes;
  int64_t run;               // taps of a plane
  int64_t slab, slabs;       // positions of one, how many
  int64_t chunk;             // tiles of one
  int64_t a_plane, b_plane;  // of a chunk

  int64_t panels() const { return ceil_div(K, kPanel); }
  int64_t rows() const { return run * C; }
  int64_t image_bytes() const { return N * H * W * C * static_cast<int64_t>(sizeof(T)); }
  int64_t sums() const { return planes * rows() * panels() * kPanel; }
  // Distance of positions in a: were it a power of two, few cache sets would take all of them.
  static int64_t a_step(int64_t rows) {
    const int64_t vectors = round_up(rows, kGroup);
    return vectors % kPanel == 0 ? vectors + kGroup : vectors;
  }
  T* tap(int64_t r, int64_t s) const {
    return dw + (turned ? R - 1 - r : r) * dw_r + (turned ? S - 1 - s : s) * dw_s;
  }

  // x and dy change places: a convolution of dy, turned round, with x as the gradient.
  void exchange() {
    std::swap(x, dy);
    std::swap(C, K), std::swap(H, Ho), std::swap(W, Wo);
    std::swap(dw_c, dw_k);
    pad_h = (R - 1) * dilation_h - pad_h;
    pad_w = (S - 1) * dilation_w - pad_w;
    turned = !turned;
  }
};

#define FASTSEG_KERNEL_FILE "conv_bn/conv_weight_gradient_kernel.inl"
#include "common/foreach_isa.inl"

struct PackBuffer;  // names scratch memory

template <typename T>
void run_direct(WeightGradient<T> g) {
  using Sum = typename Accumulate<T>::type;
  constexpr int64_t kLongRun = 512;               // copied as fast as any longer one
  constexpr int64_t kMostSums = 2 * 1024 * 1024;  // of all slabs
  constexpr int64_t kTasks = 45;
  constexpr int64_t kSlabPositions = 4 * kPiece, kFewestSlabs = 8;
  // What is packed of a task, and its sums if there is one slab, stay in L2.
  constexpr int64_t kTaskPanels = 16, kTaskRows = 256, kFewestRows = 4 * kMaxRows;
  const bool unit_stride = g.stride_h == 1 && g.stride_w == 1;
  if (unit_stride && g.K < g.C) g.exchange();  // packing a costs `planes` times more
  const bool neighbours = g.dilation_w == 1 && g.x.pixel == g.C && g.S * g.C <= kLongRun;
  g.run = !neighbours ? 1 : g.R * g.S * g.C <= kLongRun ? g.R * g.S : g.S;
  g.planes = g.R * g.S / g.run;
  g.positions = g.N * g.Ho * g.Wo;
  // Parts of the panels and of the rows, which do not change sums; a run is packed whole.
  const int64_t panel_parts = ceil_div(g.panels(), kTaskPanels);
  const int64_t most_parts = g.run > 1 ? 1 : ceil_div(g.rows(), kFewestRows);
  const int64_t wanted = g.planes * panel_parts * most_parts >= kTasks
                             ? 1
                             : std::min({ceil_div(kTasks, g.planes), kMostSums / g.sums(),
                                         std::max(kFewestSlabs, g.positions / kSlabPositions)});
  g.slab = round_up(ceil_div(g.positions, std::max<int64_t>(wanted, 1)), kPiece);
  g.slabs = ceil_div(g.positions, g.slab);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = g.slabs * g.planes * panel_parts;
  const int64_t parts =
      std::min(most_parts, std::max(ceil_div(8 * threads, units), ceil_div(g.rows(), kTaskRows)));
  const int64_t rows = ceil_div(g.rows(), parts), a_size = kPiece * g.a_step(rows);
  const int64_t b_size = std::min(kTaskPanels, g.panels()) * kPanelStep;
  const bool alone = g.slabs == 1;  // a task has all of its sums
  const int64_t sums_row = std::min(kTaskPanels, g.panels()) * kPanel + kGroup;
  Workspace<Sum> sums(alone ? 0 : g.slabs * g.sums());
  const auto tasks = [&](int phase) {
    return phase == 0 ? units * parts : g.planes * ceil_div(g.rows(), kFinishedRows);
  };
  parallel_phases(alone ? 1 : 2, tasks, [&](int phase, int64_t task) {
    if (phase == 0) {
      const int64_t part = task % parts, panel_part = task / parts % panel_parts;
      const int64_t slab = task / parts / panel_parts / g.planes;
      const int64_t plane = task / parts / panel_parts % g.planes;
      const int64_t begin = part_begin(g.rows(), parts, part),
                    end = part_begin(g.rows(), parts, part + 1);
      const int64_t first = part_begin(g.panels(), panel_parts, panel_part),
                    last = part_begin(g.panels(), panel_parts, panel_part + 1);
      Sum* a = scratch<PackBuffer, Sum>(a_size + b_size + (alone ? rows * sums_row : 0));
      const int64_t row = alone ? sums_row : g.panels() * kPanel;
      Sum* to =
          alone ? a + a_size + b_size
                : sums.data() + slab * g.sums() + (plane * g.rows() + begin) * row + first * kPanel;
      FASTSEG_ISA_CALL(WeightGradientKernel<T>::sum_slab)(g, slab, plane, begin, end, first, last,
                                                          a, a + a_size, to, row);
      if (alone) {
        FASTSEG_ISA_CALL(WeightGradientKernel<T>::finish_taps)(g, plane, begin, end, first, last,
                                                               to, row);
      }
    } else {
      const int64_t blocks = ceil_div(g.rows(), kFinishedRows),
                    begin = task % blocks * kFinishedRows;
      FASTSEG_ISA_CALL(WeightGradientKernel<T>::finish_slabs)(
          g, task / blocks, begin, std::min(begin + kFinishedRows, g.rows()), sums.data());
    }
  });
  sums.release_beyond(g.image_bytes());
}

void run_winograd(WeightGradient<float> g) {
  constexpr int64_t kChunk = 96;       // their transforms are nine times as large as they
  constexpr int64_t kPackedTiles = 8;  // of a task
  g.run = 1;
  g.planes = 36;
  g.positions = g.N * g.tiles_y.count(0) * g.tiles_x.count(0);
  g.chunk = std::min(kChunk, g.positions);
  g.a_plane = g.chunk * g.a_step(g.C) + kGroup;
  g.b_plane = g.chunk * g.panels() * kPanel + kGroup;
  const int64_t a_size = g.planes * g.a_plane, b_size = g.planes * g.b_plane;
  Workspace<float> memory(a_size + b_size + g.sums());
  float *const a = memory.data(), *const b = a + a_size, *const sums = b + b_size;
  const std::vector<float> zeros(round_up(std::max(g.C, g.K), kGroup));

  const int64_t chunks = ceil_div(g.positions, g.chunk), units = g.planes * g.panels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(4 * threads, units), 1, ceil_div(g.C, kMaxRows));
  const auto count_of = [&](int phase) {
    return std::min(g.chunk, g.positions - phase / 2 * g.chunk);
  };
  const auto tasks = [&](int phase) {
    if (phase == 2 * chunks) return ceil_div(g.C, kFinishedRows);
    return phase % 2 == 1 ? units * parts : 2 * ceil_div(count_of(phase), kPackedTiles);
  };
  parallel_phases(static_cast<int>(2 * chunks + 1), tasks, [&](int phase, int64_t task) {
    if (phase == 2 * chunks) {
      const int64_t begin = task * kFinishedRows;
      FASTSEG_ISA_CALL(WeightGradientKernel<float>::finish_tiles)(
          g, begin, std::min(begin + kFinishedRows, g.C), sums);
    } else if (phase % 2 == 1) {
      const int64_t part = task % parts, panel = task / parts % g.panels();
      FASTSEG_ISA_CALL(WeightGradientKernel<float>::multiply_tiles)(
          g, task / parts / g.panels(), panel, part_begin(g.C, parts, part),
          part_begin(g.C, parts, part + 1), count_of(phase), phase > 1, a, b, sums);
    } else {
      const int64_t blocks = ceil_div(count_of(phase), kPackedTiles);
      const int64_t begin = task % blocks * kPackedTiles;
      FASTSEG_ISA_CALL(WeightGradientKernel<float>::pack_tiles)(
          g, phase / 2 * g.chunk, begin, std::min(kPackedTiles, count_of(phase) - begin),
          zeros.data(), task < blocks, task < blocks ? a : b);
    }
  });
  memory.release_beyond(g.image_bytes());
}

void check(const Tensor& dy, const Tensor& x, const Tensor& weight, const IntList& stride,
           const IntList& padding, const IntList& dilation, bool winograd) {
  const auto type = x.scalar_type();
  FASTSEG_CHECK(dy.dim() == 4 && x.dim() == 4 && weight.dim() == 4 && dy.scalar_type() == type &&
                    weight.scalar_type() == type,
                "conv_weight_gradient: dy, x and weight must be (N, K, Ho, Wo), (N, C, H, W) and "
                "(K, C, R, S) of one dtype");
  FASTSEG_CHECK(
      stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
      "conv_weight_gradient: stride, padding and dilation must be (vertical, horizontal)");
  FASTSEG_CHECK(
      dy.size(0) == x.size(0) && weight.size(0) == dy.size(1) && weight.size(1) == x.size(1),
      "conv_weight_gradient: dy, x and weight do not belong to one convolution");
  for (int axis = 0; axis < 2; ++axis) {
    FASTSEG_CHECK(stride[axis] >= 1 && dilation[axis] >= 1,
                  "conv_weight_gradient: stride and dilation must be positive, got ", stride[axis],
                  " and ", dilation[axis]);
  }
  FASTSEG_CHECK(!winograd || (type == ScalarType::Float && weight.size(2) == 3 &&
                              weight.size(3) == 3 && stride[0] == 1 && stride[1] == 1),
                "conv_weight_gradient: Winograd needs float32, a 3x3 kernel and stride 1");
}

}  // namespace

Tensor conv_weight_gradient_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                const IntList& stride, const IntList& padding,
                                const IntList& dilation, bool winograd) {
  check(dy, x, weight, stride, padding, dilation, winograd);
  Tensor dw = empty_image(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
                          weight.scalar_type(), image_layout(weight));
  if (dw.numel() == 0) return dw;
  if (dy.numel() == 0) return torch::stable::zero_(dw);
  if (winograd) {
    FASTSEG_COUNT("conv_weight_gradient.winograd");
  } else {
    FASTSEG_COUNT("conv_weight_gradient.direct");
  }
  const Tensor dy_pixels = pixels_of(dy), x_pixels = pixels_of(x);
  dispatch_floating(x, "conv_weight_gradient", [&](auto tag) {
    using T = decltype(tag);
    const auto image = [](const Tensor& t) {
      return Image<const T>{t.const_data_ptr<T>(), t.stride(0), t.stride(2), t.stride(3)};
    };
    constexpr int64_t kTile = 4;
    WeightGradient<T> g{TileAxis(dy.size(2), dilation[0], kTile, true),
                        TileAxis(dy.size(3), dilation[1], kTile, true)};
    g.N = x.size(0), g.C = x.size(1), g.H = x.size(2), g.W = x.size(3);
    g.K = dy.size(1), g.Ho = dy.size(2), g.Wo = dy.size(3);
    g.R = weight.size(2), g.S = weight.size(3);
    g.stride_h = stride[0], g.stride_w = stride[1];
    g.pad_h = padding[0], g.pad_w = padding[1];
    g.dilation_h = dilation[0], g.dilation_w = dilation[1];
    g.x = image(x_pixels), g.dy = image(dy_pixels);
    g.dw = dw.mutable_data_ptr<T>();
    g.dw_k = dw.stride(0), g.dw_c = dw.stride(1), g.dw_r = dw.stride(2), g.dw_s = dw.stride(3);
    if constexpr (std::is_same_v<T, float>) {
      if (winograd) return run_winograd(g);
    }
    run_direct(g);
  });
  return dw;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "conv_weight_gradient(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool winograd=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("conv_weight_gradient", TORCH_BOX(&conv_weight_gradient_cpu));
}

}  // namespace fastseg
