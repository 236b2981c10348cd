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

// Running sums over blocks of 256 numbers: each block waits for that of the one before it.
__global__ void relayed_sum(const float* x, float* sums, uint64_t* flags, int bug) {
  constexpr uint64_t kSet = 7;
  FASTSEG_SHARED(float, values, 256);
  const int t = threadIdx.x, block = static_cast<int>(blockIdx.x);
  values[t] = x[block * 256 + t];
  __syncthreads();
  if (t != 0) return;
  float sum = 0;
  for (int i = 0; i < 256; ++i) sum += values[i];
  if (block > 0) {
    if (bug != 2) wait_acquire(flags + block - 1, kSet);  // bug 2: not waited for
    if (bug != 1) store_release(flags + block - 1, 0);    // bug 1: stands in the next launch
    sum += sums[block - 1];
  }
  if (bug == 3) store_release(flags + block, kSet);  // bug 3: set before the sum is there
  sums[block] = sum;
  if (bug != 3 && block + 1 < static_cast<int>(gridDim.x)) store_release(flags + block, kSet);
}

// 64x64 products of 64x128 matrices through two stages of shared memory: one thread of warp 4 loads
// boxes of 64x64, warps 0 to 3 multiply. out = x * x^T, by way of shared memory and a bulk store.
__global__ void pipelined_product(const __grid_constant__ TensorMap in,
                                  const __grid_constant__ TensorMap out, int steps, int bug) {
  FASTSEG_DYNAMIC_SHARED(shared);
  FASTSEG_SHARED(uint64_t, barriers, 4);
  constexpr int kBytes = 64 * 64 * 2, kStages = 2;
  uint64_t *full = barriers, *empty = barriers + kStages;
  const int t = threadIdx.x, lane = t % 32;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 4);
    }
    if (bug != 1) fence_mbarrier_init();  // bug 1: barriers that bulk copies may not see
  }
  __syncthreads();
  float acc[32];
  if (t == 128) {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      // bug 2: starts with the phase that nobody ends
      mbarrier_wait(&empty[stage], bug == 2 ? round & 1 : (round & 1) ^ 1);
      mbarrier_arrive_expect_tx(&full[stage], bug == 3 ? kBytes / 2 : kBytes);  // bug 3: few bytes
      tma_load_3d(shared + stage * kBytes, in, &full[stage], step * 64, 0, 0);
    }
  } else if (t < 128) {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      // bug 4: waits for the phase before
      mbarrier_wait(&full[stage], (step / kStages & 1) ^ (bug == 4));
      if (bug != 5) wgmma_fence(acc);  // bug 5: registers not fenced
      for (int k = 0; k < 4; ++k) {
        const uint64_t operand = wgmma_operand(shared + stage * kBytes + k * 32);
        wgmma_m64k16<Half, 64>(acc, operand, operand, step + k > 0);
      }
      wgmma_commit();
      const auto release = [&] {
        if (lane == 0) mbarrier_arrive(&empty[stage]);
      };
      if (bug == 6) release();  // bug 6: the stage is given back before the product has read it
      if (bug != 7) wgmma_wait<0>(acc);  // bug 7: results are read before they are there
      if (bug != 6) release();
    }
    float* staging = reinterpret_cast<float*>(shared + kStages * kBytes);
    for (int i = 0; i < 32; ++i) {
      const int row = t / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
      staging[row * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
    }
    if (bug != 8) fence_proxy_async();  // bug 8: plain stores that the bulk store may not see
    named_barrier_sync(1, 128);
    if (t == 0) {
      tma_store_3d(out, staging, 0, 0, 0);
      tma_store_commit();
      if (bug != 9) tma_store_wait<0>();  // bug 9: ends before shared memory was read
    }
  }
}

void launch_pipelined_product(const void* in, void* out, int bug) {
  constexpr int kSteps = 5, kColumns = kSteps * 64;
  std::vector<Half> x(64 * kColumns);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<Half>(static_cast<const float*>(in)[i % 1024] - 8);
  }
  const TensorMap from = tensor_map(
      x.data(), TiledBox{{kColumns, 64, 1}, {kColumns, kColumns * 64}, {64, 64, 1}, true});
  std::vector<float> product(64 * 64);
  const TensorMap to =
      tensor_map(product.data(), TiledBox{{64, 64, 1}, {64, 4096}, {64, 64, 1}, false});
  launch(pipelined_product, 1, 160, 2 * 64 * 64 * 2 + 64 * 64 * 4, nullptr, from, to, kSteps, bug);
  for (int b = 0; b < 4; ++b) {  // four sums stand for the whole
    float sum = 0;
    for (int i = b; i < 64 * 64; i += 4) sum += product[i] * static_cast<float>(i % 7);
    static_cast<float*>(out)[b] = sum;
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
    } else if (name == std::string("relayed_sum")) {
      std::vector<uint64_t> flags(blocks);
      for (int replay = 0; replay < 2; ++replay) {
        launch(relayed_sum, blocks, 256, 0, nullptr, static_cast<const float*>(in),
               static_cast<float*>(out), flags.data(), bug);
      }
    } else if (name == std::string("pipelined_product")) {
      launch_pipelined_product(in, out, bug);
    }
    return "";
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
