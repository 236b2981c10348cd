// Implicit-GEMM convolution for compute capability 9.0 (sm_90a): a block computes tiles of 128
// output pixels, in the order of memory, by 64 to 256 output channels, in steps of 64 input
// channels of one tap. One warp fetches both operands by bulk copies, activations in im2col mode,
// through four stages of shared memory; two warpgroups multiply 64 pixels each. A tile skips the
// taps that read only padding for all of its pixels.
#include <algorithm>

#include "common/ptx.cuh"
#include "conv_bn/conv_epilogue.cuh"
#include "conv_bn/conv_wgmma.h"

// wgmma exists for sm_90a alone. Elsewhere the kernel is empty and never launched.
#if defined(FASTSEG_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSEG_SM90A 1
#else
#define FASTSEG_SM90A 0
#endif

namespace fastseg {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPixels = 64 * kConsumers, kStages = 4;
constexpr int kRowBytes = 128, kDepth = kRowBytes / 2;  // of a tile row in one step
// Registers of a thread. All start with 168, what a block of kThreads leaves each.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
// The epilogue passes 32 columns at a time through shared memory, in rows of 40 floats: then pairs
// that 16 lanes write fall into different banks.
constexpr int kSlab = 32, kSlabStride = 40;
constexpr int kStagingBytes = 64 * kSlabStride * 4;  // of a warpgroup

template <int kColumns>
constexpr int kStageBytes = (kPixels + kColumns) * kRowBytes;
template <int kColumns>
constexpr int kSharedBytes = kStages * (kStageBytes<kColumns> + 2 * 8) + kConsumers * kStagingBytes;
static_assert(kSharedBytes<256> <= 227 * 1024);

// What a launch computes: the tiles of all branches, one branch after another.
template <typename T>
struct WgmmaConv {
  int N, C, z_stride, branches, tiles;
  int first_tile[kMaxBranches];
  ConvBranch branch[kMaxBranches];
  ConvEpilogue<T> epilogue;  // without the bias, which is the branch's
  TensorMap x[kMaxBranches], weight[kMaxBranches];
};
static_assert(sizeof(WgmmaConv<Half>) < 4096);

// Which stage is next, and how often all have been used, modulo 2.
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Tile {
  int branch, first_column;
  int64_t first_pixel;
};

template <int kColumns, typename T>
__device__ __forceinline__ Tile tile_at(const WgmmaConv<T>& conv, int number) {
  int b = conv.branches - 1;
  while (number < conv.first_tile[b]) --b;
  const int column_tiles = ceil_div(conv.branch[b].K, kColumns), i = number - conv.first_tile[b];
  return {b, i % column_tiles * kColumns, int64_t{i / column_tiles} * kPixels};
}

// Bit r * cols.taps + s: whether tap (r, s) of some pixel of the tile lies inside the image. All
// lanes of a warp call it.
__device__ __forceinline__ uint64_t tile_taps(const ConvBranch& branch, int N,
                                              int64_t first_pixel) {
  const ConvAxis &rows = branch.rows, &cols = branch.cols;
  const int64_t pixels = int64_t{N} * rows.out * cols.out;
  uint64_t taps = 0;
  for (int i = threadIdx.x % 32; i < kPixels && first_pixel + i < pixels; i += 32) {
    const int64_t line = (first_pixel + i) / cols.out;
    const int col = static_cast<int>(first_pixel + i - line * cols.out);
    const int row = static_cast<int>(line % rows.out);
    uint64_t bit = 1;
    for (int r = 0; r < rows.taps; ++r) {
      const int h = row * rows.stride - rows.padding + r * rows.dilation;
      for (int s = 0; s < cols.taps; ++s, bit <<= 1) {
        const int w = col * cols.stride - cols.padding + s * cols.dilation;
        if (h >= 0 && h < rows.in && w >= 0 && w < cols.in) taps |= bit;
      }
    }
  }
  for (int step = 16; step > 0; step /= 2) taps |= __shfl_xor_sync(0xffffffffu, taps, step);
  return taps;
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    conv_wgmma(const __grid_constant__ WgmmaConv<T> conv) {
#if FASTSEG_SM90A
  FASTSEG_DYNAMIC_SHARED(shared);
  unsigned char* stages = shared;
  unsigned char* staging = shared + kStages * kStageBytes<kColumns>;
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + kConsumers * kStagingBytes);
  uint64_t* empty = full + kStages;
  const int t = threadIdx.x, lane = t % 32, warpgroup = t / kWarpgroup;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers * kWarpgroup / 32);  // a lane of each warp
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const int depth_steps = ceil_div(conv.C, kDepth);
  Ring ring;

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (t >= 32) return;
    for (int number = blockIdx.x; number < conv.tiles; number += gridDim.x) {
      const Tile tile = tile_at<kColumns>(conv, number);
      const ConvBranch& branch = conv.branch[tile.branch];
      const ConvAxis &rows = branch.rows, &cols = branch.cols;
      const uint64_t used = tile_taps(branch, conv.N, tile.first_pixel);
      if (lane != 0) continue;
      const int64_t line = tile.first_pixel / cols.out;
      const int n = static_cast<int>(line / rows.out);
      const int h = static_cast<int>(line % rows.out) * rows.stride - rows.padding;
      const int w =
          static_cast<int>(tile.first_pixel - line * cols.out) * cols.stride - cols.padding;
      const int taps = rows.taps * cols.taps;
      for (int tap = 0; tap < taps; ++tap) {
        if (!(used >> tap & 1)) continue;
        const int down = tap / cols.taps * rows.dilation, right = tap % cols.taps * cols.dilation;
        const int filter_tap = branch.flipped ? taps - 1 - tap : tap;
        for (int step = 0; step < depth_steps; ++step) {
          mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
          uint64_t* barrier = &full[ring.stage];
          unsigned char* a = stages + ring.stage * kStageBytes<kColumns>;
          mbarrier_arrive_expect_tx(barrier, kStageBytes<kColumns>);
          tma_load_im2col(a, conv.x[tile.branch], barrier, step * kDepth, w, h, n, right, down);
          tma_load_3d(a + kPixels * kRowBytes, conv.weight[tile.branch], barrier, step * kDepth,
                      filter_tap, tile.first_column);
          ring.advance();
        }
      }
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int part = warpgroup - 1;
  float* slab = reinterpret_cast<float*>(staging + part * kStagingBytes);
  float acc[kColumns / 2] = {};
  for (int number = blockIdx.x; number < conv.tiles; number += gridDim.x) {
    const Tile tile = tile_at<kColumns>(conv, number);
    const ConvBranch& branch = conv.branch[tile.branch];
    const int steps = __popcll(tile_taps(branch, conv.N, tile.first_pixel)) * depth_steps;
    int last_stage = 0;
    wgmma_fence(acc);
    for (int step = 0; step < steps; ++step) {
      const unsigned char* a = stages + ring.stage * kStageBytes<kColumns>;
      mbarrier_wait(&full[ring.stage], ring.parity);
      wgmma_continue();
#pragma unroll
      for (int k = 0; k < kRowBytes; k += 32) {
        wgmma_m64k16<T, kColumns>(acc, wgmma_operand(a + part * 64 * kRowBytes + k),
                                  wgmma_operand(a + kPixels * kRowBytes + k), step + k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>(acc);  // so the step before has read its stage
      if (step > 0 && lane == 0) mbarrier_arrive(&empty[last_stage]);
      last_stage = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>(acc);
    if (steps > 0 && lane == 0) mbarrier_arrive(&empty[last_stage]);
    if (steps == 0) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0;
    }

    ConvEpilogue<T> epilogue = conv.epilogue;
    epilogue.bias = static_cast<const T*>(branch.bias);
    const int64_t pixels = int64_t{conv.N} * branch.rows.out * branch.cols.out;
    const int row = t % kWarpgroup / 32 * 16 + lane / 4;  // and row + 8
#pragma unroll
    for (int first = 0; first < kColumns; first += kSlab) {
#pragma unroll
      for (int i = 0; i < kSlab / 2; i += 2) {
        const float pair[2] = {acc[first / 2 + i], acc[first / 2 + i + 1]};
        store_vector(slab + (row + i / 2 % 2 * 8) * kSlabStride + i / 4 * 8 + lane % 4 * 2, pair);
      }
      named_barrier_sync(1 + part, kWarpgroup);
      for (int item = t % kWarpgroup; item < 64 * (kSlab / 8); item += kWarpgroup) {
        const int line = item / (kSlab / 8), k = item % (kSlab / 8) * 8;
        const int64_t pixel = tile.first_pixel + part * 64 + line;
        const int channel = tile.first_column + first + k;
        if (pixel >= pixels || channel >= branch.K) continue;
        float values[8];
        load_vector(slab + line * kSlabStride + k, values);
        epilogue.store(values, pixel * conv.z_stride + branch.first_channel + channel, channel,
                       branch.K - channel);
      }
      named_barrier_sync(1 + part, kWarpgroup);
    }
  }
#endif
}

}  // namespace

template <typename T>
void launch_conv_wgmma(const ConvForward& conv, const T* x, const T* residual, T* z,
                       cudaStream_t stream) {
  const int multiprocessors = device_limits().multiprocessors;
  const auto tiles = [&](int b, int columns) {
    const ConvBranch& branch = conv.branch[b];
    const int64_t pixels = int64_t{conv.N} * branch.rows.out * branch.cols.out;
    return static_cast<int>(ceil_div<int64_t>(pixels, kPixels)) * ceil_div(branch.K, columns);
  };
  // A step of a warpgroup reads 64 rows of pixels and `columns` rows of weights from shared memory,
  // which is what a narrow tile waits for.
  const auto cost = [&](int columns) {
    int all = 0;
    for (int b = 0; b < conv.branches; ++b) all += tiles(b, columns);
    return int64_t{ceil_div(all, multiprocessors)} * (64 + columns);
  };
  int columns = 256;
  if (cost(128) < cost(columns)) columns = 128;
  if (cost(64) < cost(columns)) columns = 64;

  WgmmaConv<T> launched{};
  launched.N = conv.N;
  launched.C = conv.C;
  launched.z_stride = conv.z_stride;
  launched.branches = conv.branches;
  launched.epilogue = {nullptr, residual, z, conv.slope, conv.whole != 0};
  for (int b = 0; b < conv.branches; ++b) {
    const ConvBranch& branch = launched.branch[b] = conv.branch[b];
    const ConvAxis &rows = branch.rows, &cols = branch.cols;
    launched.first_tile[b] = launched.tiles;
    launched.tiles += tiles(b, columns);
    const auto high = [](const ConvAxis& a) { return a.padding - (a.taps - 1) * a.dilation; };
    launched.x[b] = tensor_map(x, Im2colBox{conv.N,
                                            rows.in,
                                            cols.in,
                                            conv.C,
                                            conv.x_stride,
                                            {-cols.padding, -rows.padding},
                                            {high(cols), high(rows)},
                                            {cols.stride, rows.stride},
                                            kDepth,
                                            kPixels});
    const int64_t taps = rows.taps * cols.taps;
    launched.weight[b] = tensor_map(
        static_cast<const T*>(branch.weight),
        TiledBox{{conv.C, taps, branch.K}, {conv.C, conv.C * taps}, {kDepth, 1, columns}, true});
  }
  const auto run = [&](void (*kernel)(WgmmaConv<T>), int shared_bytes) {
    launch(kernel, static_cast<unsigned>(std::min(launched.tiles, multiprocessors)), kThreads,
           shared_bytes, stream, launched);
  };
  if (columns == 256) {
    run(conv_wgmma<T, 256>, kSharedBytes<256>);
  } else if (columns == 128) {
    run(conv_wgmma<T, 128>, kSharedBytes<128>);
  } else {
    run(conv_wgmma<T, 64>, kSharedBytes<64>);
  }
}

template void launch_conv_wgmma(const ConvForward&, const Half*, const Half*, Half*, cudaStream_t);
template void launch_conv_wgmma(const ConvForward&, const BFloat16*, const BFloat16*, BFloat16*,
                                cudaStream_t);

}  // namespace fastseg
