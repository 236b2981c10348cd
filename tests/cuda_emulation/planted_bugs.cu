// Kernels that are right, and the same ones with one bug each (FASTSEG_BUG), for the self-tests of
// the emulator: every kind of bug must be seen.
#include "common/cuda.h"
#include "common/ptx.cuh"

namespace fastseg {
namespace {

// Sums of 256 numbers per block through shared memory and warp shuffles.
__global__ void block_sum(const float* x, float* sums, int bug) {
  FASTSEG_SHARED(float, values, 256);
  FASTSEG_SHARED(float, warp_sums, 8);
  const int t = threadIdx.x;
  values[t] = x[blockIdx.x * 256 + t];
  if (bug != 1) __syncthreads();             // bug 1: a missing barrier
  float sum = values[255 - t + (bug == 2)];  // bug 2: reads one element past the end
  if (bug == 6) values[t + 1] = sum;         // bug 6: writes one element past the end
  const unsigned mask = bug == 3 && t % 32 < 16 ? 0xffffu : 0xffffffffu;  // bug 3: masks differ
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  if (t % 32 == 0 && !(bug == 4 && t == 32)) warp_sums[t / 32] = sum;  // bug 4: one never written
  if (bug == 5 && t == 7) return;  // bug 5: a thread that never comes to the barrier
  __syncthreads();
  if (t == 0) {
    float total = 0;
    for (int i = 0; i < 8; ++i) total += warp_sums[i];
    sums[blockIdx.x] = total;
  }
}

// Sums of 256 numbers per block that come through one stage of shared memory, 128 at a time.
__global__ void staged_sum(const float* x, float* sums, int bug) {
  FASTSEG_SHARED(float, stage, 128);
  FASTSEG_SHARED(float, parts, 256);
  const int t = threadIdx.x;
  float sum = 0;
  for (int half = 0; half < 2; ++half) {
    const int shift = bug == 3 ? 1 : 0;  // bug 3: an address that is not a multiple of 16
    if (t < 32) {
      cp_async_16(stage + (t * 4 + shift) % 128, x + blockIdx.x * 256 + half * 128 + t * 4, true);
    }
    cp_async_commit();
    if (bug != 1) cp_async_wait<0>();  // bug 1: read before the copy is waited for
    if (bug != 2) __syncthreads();     // bug 2: waited for, but only by the thread that copies
    if (t < 128) sum += stage[127 - t];
    if (bug != 4) __syncthreads();  // bug 4: the stage is overwritten while others still read it
  }
  parts[t] = sum;
  __syncthreads();
  if (t != 0) return;
  sums[blockIdx.x] = 0;
  for (int i = 0; i < 128; ++i) sums[blockIdx.x] += parts[i];
}

// Every block adds to one cell.
__global__ void global_sum(const int* x, int* sum, int bug) {
  const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (bug == 1) {
    *sum += value;  // bug 1: not atomic
  } else {
    atomicAdd(sum, value);
  }
}

}  // namespace
}  // namespace fastseg

extern "C" const char* run_planted(const char* name, const void* in, void* out, int blocks,
                                   int bug) {
  static std::string error;
  using namespace fastseg;
  try {
    if (name == std::string("block_sum")) {
      launch(block_sum, blocks, 256, 0, nullptr, static_cast<const float*>(in),
             static_cast<float*>(out), bug);
    } else if (name == std::string("staged_sum")) {
      launch(staged_sum, blocks, 256, 0, nullptr, static_cast<const float*>(in),
             static_cast<float*>(out), bug);
    } else if (name == std::string("global_sum")) {
      launch(global_sum, blocks, 256, 0, nullptr, static_cast<const int*>(in),
             static_cast<int*>(out), bug);
    }
    return "";
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
