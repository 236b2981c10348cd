// Implicit-GEMM convolution for compute capability 9.0 (sm_90a): tiles of 128 output pixels, in the
// order of memory, by 64 to 256 output channels, in steps of 64 input channels under one tap. One
// warp fetches both operands by bulk copies, activations in im2col mode, through four stages of
// shared memory; two warpgroups multiply 64 pixels each. A tile skips the rows of the filter that
// read only padding for all of its pixels. Steps are shared out equally, as in conv_forward.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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
static_assert(kPixels == kConvTile);
constexpr int kRowBytes = 128, kDepth = kRowBytes / 2;  // of a tile row in one step
// Registers of a thread: as many as a block of kThreads can have at the start, then what warpgroups
// give and take. Only what the block started with can be taken; for more they would wait forever.
constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * kStartRegisters);
// Columns whose biases and residuals are loaded before any of them is stored, so that a tile waits
// for memory once or twice.
template <int kColumns>
constexpr int kBatch = std::min(kColumns, 128);
// For statistics, 32 columns at a time go through shared memory, in rows of 40 floats: then pairs
// that 16 lanes write fall into different banks.
constexpr int kSlab = 32, kSlabStride = 40;
constexpr int kStagingBytes = 64 * kSlabStride * 4;  // of a warpgroup

template <int kColumns>
constexpr int kStageBytes = (kPixels + kColumns) * kRowBytes;
template <int kColumns>
constexpr int kSharedBytes = kStages * (kStageBytes<kColumns> + 2 * 8) + kConsumers * kStagingBytes;
static_assert(kSharedBytes<256> <= 227 * 1024);

// What a launch computes.
template <typename T>
struct WgmmaConv {
  int C, z_stride;
  int64_t pixels;  // of each branch
  Schedule schedule;
  ConvBranch branch[kMaxBranches];
  ConvEpilogue<T> epilogue;  // without the bias, which is the branch's
  Moments<float>* moments;   // as in conv_gemm.h, if kMoments
  TensorMap x[kMaxBranches], weight[kMaxBranches];
};

// Which stage is next, and how often all have been used, modulo 2.
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Calls fn(part, branch, row tile, first column) for each part of a tile that this block computes;
// backwards, so that what the next block waits for comes first.
template <int kColumns, typename T, typename Fn>
__device__ __forceinline__ void for_each_part(const WgmmaConv<T>& conv, const Fn& fn) {
  const int begin = conv.schedule.first_step(blockIdx.x);
  for (int end = conv.schedule.first_step(blockIdx.x + 1); end > begin;) {
    const TilePart part = last_part(conv.schedule, begin, end);
    end = part.first_step + part.begin;
    const ConvBranch& branch = conv.branch[part.run.branch];
    const int column_tiles = ceil_div(branch.K, kColumns);
    fn(part, branch, part.run.first_tile + part.tile / column_tiles,
       part.tile % column_tiles * kColumns);
  }
}

// Where the accumulators of consumer thread t of a block lie, four at a time.
template <int kColumns>
__device__ __forceinline__ float* partial_of(const StreamK& stream_k, int block, int t) {
  return stream_k.partials + (int64_t{block} * kColumns * kPixels) + t * 4;
}
constexpr int kAllConsumers = 1 + kConsumers;  // named barrier; each warpgroup has its own before
constexpr int kPartialStep = kConsumers * kWarpgroup * 4;

// The moments of a column of the slab over its first `pixels` rows, in the lanes below 8 of each
// warp, which has 8 columns: four lanes take every fourth row each.
__device__ __forceinline__ Moments<float> column_moments(const float* slab, int column, int lane,
                                                         int pixels) {
  const int first = lane / 8, count = max(pixels - first + 3, 0) / 4;
  const float* at = slab + first * kSlabStride + column;
  Moments<float> own{static_cast<float>(count), 0, 0};
  for (int i = 0; i < count; ++i) own.mean += at[i * 4 * kSlabStride];
  if (count > 0) own.mean /= own.n;
  for (int i = 0; i < count; ++i) {
    const float delta = at[i * 4 * kSlabStride] - own.mean;
    own.m2 += delta * delta;
  }
#pragma unroll
  for (int step = 16; step >= 8; step /= 2) {
    const Moments<float> other{__shfl_down_sync(0xffffffffu, own.n, step),
                               __shfl_down_sync(0xffffffffu, own.mean, step),
                               __shfl_down_sync(0xffffffffu, own.m2, step)};
    own.merge(other);
  }
  return own;
}

// Each lane of a quad has 2 of 8 neighbouring columns in each of 4 blocks, at acc[4 * block]; it
// gets the 8 columns of block lane % 4: a transpose in two exchanges of half of the values.
__device__ __forceinline__ void gather_in_quad(const float* acc, int lane, float (&values)[8]) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float from[2][2];  // of blocks 2 * m + odd: [m][lane the columns are of, modulo 2]
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float low = acc[8 * m + e], high = acc[8 * m + 4 + e];
      const float got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      from[m][0] = odd ? got : low;
      from[m][1] = odd ? high : got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float got = __shfl_xor_sync(0xffffffffu, upper ? from[0][i] : from[1][i], 2);
      values[2 * i + e] = upper ? got : from[0][i];
      values[4 + 2 * i + e] = upper ? from[1][i] : got;
    }
  }
}

template <typename T, int kColumns, bool kMoments>
__global__ void __launch_bounds__(kThreads, 1)
    conv_wgmma(const __grid_constant__ WgmmaConv<T> conv, StreamK stream_k) {
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
  Ring ring;

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (t != 0) return;
    for_each_part<kColumns>(conv, [&](const TilePart& part, const ConvBranch& branch, int row_tile,
                                      int first_column) {
      const ConvAxis &rows = branch.rows, &cols = branch.cols;
      const int64_t first_pixel = int64_t{row_tile} * kPixels, line = first_pixel / cols.out;
      const int n = static_cast<int>(line / rows.out);
      const int h = static_cast<int>(line % rows.out) * rows.stride - rows.padding;
      const int w = static_cast<int>(first_pixel - line * cols.out) * cols.stride - cols.padding;
      // Under the taps left in `rest`, then kDepth channels further on.
      const int taps = rows.taps * cols.taps, tap_count = __popcll(part.run.taps);
      int c = part.begin / tap_count * kDepth;
      uint64_t rest = part.run.taps;
      for (int skip = part.begin % tap_count; skip > 0; --skip) rest &= rest - 1;
      for (int step = part.begin; step < part.end; ++step) {
        const int tap = 63 - __clzll(static_cast<long long>(rest & (~rest + 1)));
        mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
        uint64_t* barrier = &full[ring.stage];
        unsigned char* a = stages + ring.stage * kStageBytes<kColumns>;
        mbarrier_arrive_expect_tx(barrier, kStageBytes<kColumns>);
        tma_load_im2col(a, conv.x[part.run.branch], barrier, c, w, h, n,
                        tap % cols.taps * cols.dilation, tap / cols.taps * rows.dilation);
        tma_load_3d(a + kPixels * kRowBytes, conv.weight[part.run.branch], barrier, c,
                    branch.flipped ? taps - 1 - tap : tap, first_column);
        ring.advance();
        rest &= rest - 1;
        if (rest == 0) {
          rest = part.run.taps;
          c += kDepth;
        }
      }
    });
    return;
  }

  take_registers<kConsumerRegisters>();
  const int half = warpgroup - 1;  // of the tile's pixels
  float* slab = reinterpret_cast<float*>(staging + half * kStagingBytes);
  float acc[kColumns / 2] = {};
  for_each_part<kColumns>(conv, [&](const TilePart& part, const ConvBranch& branch, int row_tile,
                                    int first_column) {
    int last_stage = 0;
    wgmma_fence(acc);
    for (int step = part.begin; step < part.end; ++step) {
      const unsigned char* a = stages + ring.stage * kStageBytes<kColumns>;
      mbarrier_wait(&full[ring.stage], ring.parity);
      wgmma_continue();
#pragma unroll
      for (int k = 0; k < kRowBytes; k += 32) {
        wgmma_m64k16<T, kColumns>(acc, wgmma_operand(a + half * 64 * kRowBytes + k),
                                  wgmma_operand(a + kPixels * kRowBytes + k),
                                  step > part.begin || k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>(acc);  // so the step before has read its stage
      if (step > part.begin && lane == 0) mbarrier_arrive(&empty[last_stage]);
      last_stage = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>(acc);
    if (lane == 0) mbarrier_arrive(&empty[last_stage]);

    const int consumer = t - kWarpgroup;
    if (part.end < part.run.steps) {  // the next block adds this to its part of the tile
      float* at = partial_of<kColumns>(stream_k, blockIdx.x, consumer);
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4, at += kPartialStep) {
        const float four[4] = {acc[i], acc[i + 1], acc[i + 2], acc[i + 3]};
        store_vector(at, four);
      }
      named_barrier_sync(kAllConsumers, kConsumers * kWarpgroup);
      if (consumer == 0) store_release(stream_k.flags + blockIdx.x, stream_k.stamp);
      return;
    }
    if (part.begin > 0) {
      for (int block = conv.schedule.block_of(part.first_step);
           block < static_cast<int>(blockIdx.x); ++block) {
        if (consumer == 0) {
          wait_acquire(stream_k.flags + block, stream_k.stamp);
          store_release(stream_k.flags + block, 0);
        }
        named_barrier_sync(kAllConsumers, kConsumers * kWarpgroup);
        const float* at = partial_of<kColumns>(stream_k, block, consumer);
#pragma unroll
        for (int i = 0; i < kColumns / 2; i += 4, at += kPartialStep) {
          float four[4];
          load_vector(at, four);
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[i + k] += four[k];
        }
      }
    }

    ConvEpilogue<T> epilogue = conv.epilogue;
    epilogue.bias = static_cast<const T*>(branch.bias);
    const int warp = t % kWarpgroup / 32, row = warp * 16 + lane / 4;  // and row + 8
    const int64_t first_pixel = int64_t{row_tile} * kPixels + half * 64;
    const int pixels = static_cast<int>(min(conv.pixels - first_pixel, int64_t{64}));  // maybe < 0
    if constexpr (kMoments) {
#pragma unroll
      for (int first = 0; first < kColumns; first += kSlab) {
#pragma unroll
        for (int i = 0; i < kSlab / 2; i += 2) {
          const float pair[2] = {acc[first / 2 + i], acc[first / 2 + i + 1]};
          store_vector(slab + (row + i / 2 % 2 * 8) * kSlabStride + i / 4 * 8 + lane % 4 * 2, pair);
        }
        named_barrier_sync(1 + half, kWarpgroup);
        const int column = warp * 8 + lane % 8, channel = first_column + first + column;
        Moments<float> own = column_moments(slab, column, lane, pixels);
        if (lane < 8 && channel < branch.K) {
          if (epilogue.bias) own.mean += static_cast<float>(epilogue.bias[channel]);
          conv.moments[(int64_t{row_tile} * kConsumers + half) * branch.K + channel] = own;
        }
        named_barrier_sync(1 + half, kWarpgroup);
      }
    }
#pragma unroll
    for (int first = 0; first < kColumns; first += kBatch<kColumns>) {
      // A quad of lanes has the same rows; each gets 8 neighbouring columns of every 32.
      T biases[kBatch<kColumns> / 32][8], residuals[kBatch<kColumns> / 32][2][8];
      const int column = first_column + first + lane % 4 * 8;
      const int64_t at = (first_pixel + row) * conv.z_stride + branch.first_channel + column;
      const auto inside = [&](int group, int h) {
        return column + 32 * group < branch.K && row + 8 * h < pixels;
      };
      const auto place = [&](int group, int h) { return at + 8 * h * conv.z_stride + 32 * group; };
#pragma unroll
      for (int group = 0; group < kBatch<kColumns> / 32; ++group) {
        if (epilogue.bias && inside(group, 0)) {
          load_vector(epilogue.bias + column + 32 * group, biases[group]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (epilogue.residual && inside(group, h)) {
            load_vector(epilogue.residual + place(group, h), residuals[group][h]);
          }
        }
      }
#pragma unroll
      for (int group = 0; group < kBatch<kColumns> / 32; ++group) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float values[8];
          T result[8];
          gather_in_quad(acc + first / 2 + group * 16 + h * 2, lane, values);
          epilogue.finish(values, biases[group], residuals[group][h], result);
          if (inside(group, h)) store_vector(epilogue.z + place(group, h), result);
        }
      }
    }
  });
#endif
}

// Appends a branch's tiles in the order of memory. A tile takes the rows of the filter that some of
// its pixels need, or all if `alike`. False if there is no room.
bool add_linear_branch(Schedule& s, const ConvBranch& b, int branch, int N, int columns,
                       int depth_steps, bool alike) {
  const auto line_taps = [&](int line) {
    const Segments one{1, {line, line + 1}};
    return segment_taps(b.rows, one, 0);
  };
  const unsigned right = segment_taps(b.cols, {1, {0, b.cols.out}}, 0);
  const unsigned all = segment_taps(b.rows, {1, {0, b.rows.out}}, 0);
  std::vector<unsigned> lines(static_cast<size_t>(b.rows.out), all);
  for (int line = 0; line < b.rows.out && !alike; ++line) lines[line] = line_taps(line);
  const int64_t pixels = int64_t{N} * b.rows.out * b.cols.out;
  for (int64_t first = 0; first < pixels; first += kPixels) {
    const int64_t last = std::min(first + kPixels, pixels) - 1;
    unsigned down = 0;
    for (int64_t line = first / b.cols.out; line <= last / b.cols.out && down != all; ++line) {
      down |= lines[static_cast<size_t>(line % b.rows.out)];
    }
    uint64_t taps = 0;
    for (int t = 0; t < b.rows.taps; ++t) {
      if (down >> t & 1) taps |= uint64_t{right} << t * b.cols.taps;
    }
    if (taps == 0) taps = 1;  // nothing but padding: one step of zeros
    if (!add_run(s, branch, taps, static_cast<int>(first / kPixels), 1,
                 __builtin_popcountll(taps) * depth_steps, ceil_div(b.K, columns))) {
      return false;
    }
  }
  return true;
}

}  // namespace

WgmmaPlan plan_conv_wgmma(const ConvForward& conv, bool moments) {
  // Microseconds of a block: to start; then by columns, those of a step, of what follows a tile's
  // sums, of their moments, and of adding the part of a tile that another block has.
  constexpr double kStart = 7.5;
  struct Cost {
    int columns;
    double step, tile, moments, part;
  };
  constexpr Cost kCosts[] = {
      {256, 0.725, 4, 7, 3.5}, {128, 0.42, 2.3, 3.5, 2}, {64, 0.33, 1.5, 2, 1.3}};
  const int most = device_limits().multiprocessors;
  WgmmaPlan best{256, 1, std::numeric_limits<double>::infinity()};
  for (const Cost& cost : kCosts) {
    double tiles = 0, steps = 0;
    for (int i = 0; i < conv.branches; ++i) {
      const ConvBranch& b = conv.branch[i];
      const int64_t pixels = int64_t{conv.N} * b.rows.out * b.cols.out;
      const double own =
          static_cast<double>(ceil_div<int64_t>(pixels, kPixels)) * ceil_div(b.K, cost.columns);
      tiles += own;
      steps += own * b.rows.taps * b.cols.taps * inside_share(b.rows) * ceil_div(conv.C, kDepth);
    }
    const double tile = cost.tile + (moments ? cost.moments : 0);
    const auto consider = [&](double blocks, double tiles_of_block, double parts) {
      const double us =
          kStart + steps / blocks * cost.step + tiles_of_block * tile + parts * cost.part;
      if (us < best.us) best = {cost.columns, static_cast<int>(blocks), us};
    };
    if (tiles > most) {
      consider(most, tiles / most, 1);
    } else {
      for (int parts = 1; parts * tiles <= most; ++parts) consider(parts * tiles, 1, parts - 1);
      consider(most, 1, std::ceil(most / tiles));
    }
  }
  return best;
}

void schedule_conv_wgmma(ConvForward& conv, const WgmmaPlan& plan) {
  for (const bool alike : {false, true}) {
    conv.schedule = {};
    bool fits = true;
    for (int b = 0; b < conv.branches; ++b) {
      fits = fits && add_linear_branch(conv.schedule, conv.branch[b], b, conv.N, plan.columns,
                                       ceil_div(conv.C, kDepth), alike);
    }
    if (fits) break;
  }
  conv.schedule.blocks =
      static_cast<int>(std::min<int64_t>(plan.blocks, std::max<int64_t>(conv.schedule.steps, 1)));
}

template <typename T>
void launch_conv_wgmma(const ConvForward& conv, int columns, const StreamK& stream_k, const T* x,
                       const T* residual, Moments<float>* moments, T* z, cudaStream_t stream) {
  WgmmaConv<T> launched{};
  launched.C = conv.C;
  launched.z_stride = conv.z_stride;
  launched.pixels = int64_t{conv.N} * conv.branch[0].rows.out * conv.branch[0].cols.out;
  launched.schedule = conv.schedule;
  launched.epilogue = {nullptr, residual, z, conv.slope, conv.whole != 0};
  launched.moments = moments;
  for (int b = 0; b < conv.branches; ++b) {
    const ConvBranch& branch = launched.branch[b] = conv.branch[b];
    const ConvAxis &rows = branch.rows, &cols = branch.cols;
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
  const auto run = [&](void (*kernel)(WgmmaConv<T>, StreamK), int shared_bytes) {
    launch(kernel, static_cast<unsigned>(conv.schedule.blocks), kThreads, shared_bytes, stream,
           launched, stream_k);
  };
  const auto run_columns = [&](auto of) {
    constexpr int kColumns = decltype(of)::value;
    moments != nullptr ? run(conv_wgmma<T, kColumns, true>, kSharedBytes<kColumns>)
                       : run(conv_wgmma<T, kColumns, false>, kSharedBytes<kColumns>);
  };
  if (columns == 256) {
    run_columns(std::integral_constant<int, 256>{});
  } else if (columns == 128) {
    run_columns(std::integral_constant<int, 128>{});
  } else {
    run_columns(std::integral_constant<int, 64>{});
  }
}

#define FASTSEG_INSTANTIATE(T)                                                                 \
  template void launch_conv_wgmma(const ConvForward&, int, const StreamK&, const T*, const T*, \
                                  Moments<float>*, T*, cudaStream_t);
FASTSEG_INSTANTIATE(Half)
FASTSEG_INSTANTIATE(BFloat16)
#undef FASTSEG_INSTANTIATE

}  // namespace fastseg
