// Kernels that are right, and the same ones with one bug each (FASTSEG_BUG), for the self-tests of
// the emulator: every kind of bug must be seen.
#include "common/cuda.h"

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
