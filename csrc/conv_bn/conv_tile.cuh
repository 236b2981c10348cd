// What the matrix-product kernels of the convolutions share: one block of four warps computes a
// tile of kConvTile rows x kColumns columns, each warp a quarter, through kStages stages of shared
// memory that asynchronous copies fill.
#pragma once

#include "common/cuda.h"
#include "common/ptx.cuh"
#include "conv_bn/conv_gemm.h"

namespace fastseg {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;      // 48 KB: two blocks also on a multiprocessor with 100 KB
constexpr int kStepBytes = 64;  // of each row in one step: 32 16-bit elements or 16 floats
constexpr int kStagingRows = kConvTile / 2;

template <int kColumns>
constexpr int kStageBytes = (kConvTile + kColumns) * kStepBytes;
// Floats; the 8 spread the rows that a warp writes together over the banks.
template <int kColumns>
constexpr int kStagingStride = kColumns + 8;
template <int kColumns>
constexpr int kSharedBytes = kStages * kStageBytes<kColumns>;
static_assert((kStagingRows * (kStagingStride<64> + 1)) * 4 <= kSharedBytes<64>);
static_assert((kStagingRows * (kStagingStride<128> + 1)) * 4 <= kSharedBytes<128>);

// A warp's 64 rows x kColumns / 2 columns of the tile, as mma leaves them.
template <int kColumns>
using Accumulators = float[4][kColumns / 16][4];

// acc += a * b of 32 bytes of each row.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply(Accumulators<kColumns>& acc, uint32_t (&a)[4][4],
                                         uint32_t (&b)[kColumns / 32][4]) {
  if constexpr (std::is_same_v<T, float>) {
    const auto round = [](uint32_t& x) { x = to_tf32(__uint_as_float(x)); };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) round(a[i][k]);
#pragma unroll
      for (int j = 0; j < kColumns / 32; ++j) round(b[j][k]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
      if constexpr (std::is_same_v<T, float>) {
        mma_m16n8k8_tf32(acc[i][j], a[i], b0, b1);
      } else {
        mma_m16n8k16<T>(acc[i][j], a[i], b0, b1);
      }
    }
  }
}

// Runs `steps` steps: copy(stage) starts the copies of the next one, compute(stage) multiplies.
template <int kColumns, typename Copy, typename Compute>
__device__ __forceinline__ void pipeline(unsigned char* shared, int steps, const Copy& copy,
                                         const Compute& compute) {
  const auto stage = [&](int step) { return shared + step % kStages * kStageBytes<kColumns>; };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(stage(step));
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // also: all are done with the stage that is overwritten next
    if (step + kStages - 1 < steps) copy(stage(step + kStages - 1));
    cp_async_commit();
    compute(stage(step));
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The values of this thread in a block's partial tile, 16 bytes at a time.
template <int kColumns, typename Fn>
__device__ __forceinline__ void for_each_partial(float* partials, int block, const Fn& fn) {
  float* mine = partials + int64_t{block} * kConvTile * kColumns + threadIdx.x * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j)
      fn(mine + (i * (kColumns / 16) + j) * kThreads * 4, i, j);
  }
}

template <int kColumns>
__device__ __forceinline__ void give_partial(const StreamK& stream_k, Accumulators<kColumns>& acc) {
  for_each_partial<kColumns>(stream_k.partials, blockIdx.x,
                             [&](float* at, int i, int j) { store_vector(at, acc[i][j]); });
  __syncthreads();
  if (threadIdx.x == 0) store_release(stream_k.flags + blockIdx.x, stream_k.stamp);
}

// Whether this block has the end of the last tile of its steps [begin, end), and then the sums of
// the whole tile in acc: adds what the blocks before this one have of it, in their order. They
// started earlier and gave it first of all, so that this waits for none that waits in turn. Looks
// the part up anew, which costs less than registers for it during the product.
template <int kColumns>
__device__ __forceinline__ bool complete(const StreamK& stream_k, const Schedule& schedule,
                                         int begin, int end, Accumulators<kColumns>& acc) {
  const TilePart part = last_part(schedule, begin, end);
  if (part.end < part.run.steps) {
    give_partial<kColumns>(stream_k, acc);
    return false;
  }
  if (part.begin == 0) return true;
  for (int block = schedule.block_of(part.first_step); block < static_cast<int>(blockIdx.x);
       ++block) {
    if (threadIdx.x == 0) {
      wait_acquire(stream_k.flags + block, stream_k.stamp);
      store_release(stream_k.flags + block, 0);
    }
    __syncthreads();
    for_each_partial<kColumns>(stream_k.partials, block, [&](float* at, int i, int j) {
      float values[4];
      load_vector(at, values);
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[i][j][k] += values[k];
    });
  }
  return true;
}

// Lays the accumulators out in shared memory by rows of kStagingStride, one half of the tile's rows
// after the other: prepare(half) with the writes, then emit(half, staging) once they are there.
template <int kColumns, typename Prepare, typename Emit>
__device__ __forceinline__ void emit_tile(unsigned char* shared, Accumulators<kColumns>& acc,
                                          const Prepare& prepare, const Emit& emit) {
  float* staging = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int half = 0; half < 2; ++half) {
    if (warp / 2 == half) {
      float* corner =
          staging + lane / 4 * kStagingStride<kColumns> + warp % 2 * (kColumns / 2) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float pair[2] = {acc[i][j][2 * r], acc[i][j][2 * r + 1]};
            store_vector(corner + (i * 16 + r * 8) * kStagingStride<kColumns> + j * 8, pair);
          }
        }
      }
    }
    prepare(half);
    __syncthreads();
    emit(half, staging);
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastseg
