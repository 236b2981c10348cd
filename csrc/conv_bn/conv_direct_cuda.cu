// Implicit-GEMM convolution on tensor cores (compute capability 8.0 and later): a block computes
// 128 output pixels x 128 output channels in steps of 32 input channels of one tap, through four
// stages of shared memory filled by asynchronous copies. Pixels are taken class by class, a class
// being a rectangle in which the same taps lie inside the image, so that a block skips the others
// whole.
#include "common/cuda.h"
#include "common/ptx.cuh"
#include "conv_bn/conv_direct.h"

namespace fastseg {
namespace {

constexpr int kThreads = 256;  // 8 warps: 2 x 4 of 64 pixels x 32 channels
constexpr int kTile = 128, kDepth = 32, kStages = 4;
constexpr int kChunks = kDepth / 8;             // 16-byte chunks of a tile row
constexpr int kTileBytes = kTile * kDepth * 2;  // of A or B in one stage
constexpr int kStagingStride = kTile + 4;       // floats; the 4 spread rows over the banks
constexpr int kSharedBytes = kStages * 2 * kTileBytes;
static_assert(kTile / 2 * kStagingStride * 4 <= kSharedBytes);

// Where chunk `chunk` of a tile row lies: permuted so that the 8 rows of an ldmatrix and the writes
// of a copy fall into different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kDepth * 2 + (chunk ^ (row >> 1 & 3)) * 16;
}

struct Pixel {
  int n, row, col;
};

// Pixel number m in the order of the classes; within one by image, row, column.
__device__ Pixel pixel_at(const DirectConv& conv, int64_t m) {
  for (int i = 0; i < conv.row_segments.count; ++i) {
    const int top = conv.row_segments.begin[i];
    const int height = conv.row_segments.begin[i + 1] - top;
    for (int j = 0; j < conv.col_segments.count; ++j) {
      const int left = conv.col_segments.begin[j];
      const int width = conv.col_segments.begin[j + 1] - left;
      const int64_t size = int64_t{conv.N} * height * width;
      if (m < size) {
        const int within = static_cast<int>(m), line = within / width;
        return {line / height, top + line % height, left + within % width};
      }
      m -= size;
    }
  }
  return {-1, 0, 0};  // beyond the last
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    direct_conv(DirectConv conv, const T* x, const T* weight, const T* bias, const T* residual,
                T* z) {
  FASTSEG_DYNAMIC_SHARED(shared);
  FASTSEG_SHARED(unsigned, used_taps, 2);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, warp_m = warp / 4, warp_n = warp % 4;
  const int64_t first_pixel = int64_t{blockIdx.y} * kTile;
  const int first_channel = blockIdx.x * kTile;
  const int taps = conv.rows.taps * conv.cols.taps;

  // What this thread copies: chunk t % 4 of tile rows t / 4 and t / 4 + 64.
  const int chunk = t % kChunks;
  int64_t image[2];
  int row0[2], col0[2];
  if (t < 2) used_taps[t] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Pixel p = pixel_at(conv, first_pixel + t / kChunks + i * (kTile / 2));
    image[i] = int64_t{p.n} * conv.rows.in * conv.cols.in;
    row0[i] = p.n < 0 ? -(1 << 30) : p.row * conv.rows.stride - conv.rows.padding;
    col0[i] = p.col * conv.cols.stride - conv.cols.padding;
    for (int tap = chunk; tap < taps; tap += kChunks) {
      const int row = row0[i] + tap / conv.cols.taps * conv.rows.dilation;
      const int col = col0[i] + tap % conv.cols.taps * conv.cols.dilation;
      if (row >= 0 && row < conv.rows.in && col >= 0 && col < conv.cols.in) {
        atomicOr(&used_taps[tap / 32], 1u << tap % 32);
      }
    }
  }
  __syncthreads();
  const unsigned masks[2] = {used_taps[0], used_taps[1]};
  const int depth_steps = ceil_div(conv.C, kDepth);
  const int steps = (__popc(masks[0]) + __popc(masks[1])) * depth_steps;

  // The step that is copied next.
  int tap = -1, depth = conv.C;
  const auto next_step = [&] {
    depth += kDepth;
    if (depth < conv.C) return;
    depth = 0;
    do {
      ++tap;
    } while (!((tap < 32 ? masks[0] : masks[1]) >> tap % 32 & 1));
  };
  const auto copy_step = [&](int stage) {
    unsigned char* a = shared + stage * 2 * kTileBytes;
    unsigned char* b = a + kTileBytes;
    const int c = depth + chunk * 8;
    const int down = tap / conv.cols.taps * conv.rows.dilation;
    const int right = tap % conv.cols.taps * conv.cols.dilation;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile_row = t / kChunks + i * (kTile / 2);
      const int row = row0[i] + down, col = col0[i] + right, k = first_channel + tile_row;
      const bool inside = row >= 0 && row < conv.rows.in && col >= 0 && col < conv.cols.in;
      const bool valid_x = inside && c < conv.C, valid_w = k < conv.K && c < conv.C;
      const int64_t pixel = image[i] + int64_t{row} * conv.cols.in + col;
      cp_async_16(a + swizzled(tile_row, chunk), valid_x ? x + pixel * conv.C + c : x, valid_x);
      const int64_t filter = int64_t{k} * taps + tap;
      cp_async_16(b + swizzled(tile_row, chunk), valid_w ? weight + filter * conv.C + c : weight,
                  valid_w);
    }
  };

  float acc[4][4][4] = {};  // [16 pixels][8 channels][fragment]
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      next_step();
      copy_step(stage);
    }
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // also: all are done with the stage that is overwritten next
    if (step + kStages - 1 < steps) {
      next_step();
      copy_step((step + kStages - 1) % kStages);
    }
    cp_async_commit();
    const unsigned char* a = shared + step % kStages * 2 * kTileBytes;
    const unsigned char* b = a + kTileBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a_regs[4][4], b_regs[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_m * 64 + i * 16 + lane % 16;
        ldmatrix_x4(a_regs[i], a + swizzled(row, half * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = warp_n * 32 + j * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b_regs[j], b + swizzled(row, half * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma_m16n8k16<T>(acc[i][j], a_regs[i], b_regs[j / 2][j % 2 * 2],
                          b_regs[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // Through shared memory, 64 pixels at a time, to 16-byte stores.
  float* staging = reinterpret_cast<float*>(shared);
  for (int part = 0; part < 2; ++part) {
    __syncthreads();
    if (warp_m == part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float* at = staging + (i * 16 + lane / 4 + r * 8) * kStagingStride + warp_n * 32 +
                        j * 8 + lane % 4 * 2;
            at[0] = acc[i][j][2 * r];
            at[1] = acc[i][j][2 * r + 1];
          }
        }
      }
    }
    __syncthreads();
    for (int item = t; item < kTile / 2 * (kTile / 8); item += kThreads) {
      const int line = item / (kTile / 8), k = item % (kTile / 8) * 8;
      const Pixel p = pixel_at(conv, first_pixel + part * (kTile / 2) + line);
      if (p.n < 0 || first_channel + k >= conv.K) continue;
      const int64_t at = ((int64_t{p.n} * conv.rows.out + p.row) * conv.cols.out + p.col) * conv.K +
                         first_channel + k;
      T added[8], biases[8], result[8];
      if (residual) load_vector(residual + at, added);
      if (bias) load_vector(bias + first_channel + k, biases);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float value = staging[line * kStagingStride + k + e];
        if (bias) value += static_cast<float>(biases[e]);
        if (residual) value += static_cast<float>(added[e]);
        const float below = conv.slope == 0 ? 0.0f : value * conv.slope;
        result[e] = static_cast<T>(value <= 0 ? below : value);
      }
      store_vector(z + at, result);
    }
  }
}

}  // namespace

template <typename T>
void launch_direct_conv(const DirectConv& conv, const T* x, const T* weight, const T* bias,
                        const T* residual, T* z, cudaStream_t stream) {
  const int64_t pixels = int64_t{conv.N} * conv.rows.out * conv.cols.out;
  const dim3 grid(ceil_div(conv.K, kTile), static_cast<unsigned>(ceil_div<int64_t>(pixels, kTile)));
  launch(direct_conv<T>, grid, kThreads, kSharedBytes, stream, conv, x, weight, bias, residual, z);
}

template void launch_direct_conv(const DirectConv&, const Half*, const Half*, const Half*,
                                 const Half*, Half*, cudaStream_t);
template void launch_direct_conv(const DirectConv&, const BFloat16*, const BFloat16*,
                                 const BFloat16*, const BFloat16*, BFloat16*, cudaStream_t);

}  // namespace fastseg
