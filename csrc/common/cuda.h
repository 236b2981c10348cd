// What a CUDA kernel file includes: launches, the current stream and device, 128-bit accesses,
// shared memory and registration. With FASTSEG_EMULATE the same source compiles for g++ and runs on
// CPU tensors (tests/cuda_emulation).
#pragma once

#if defined(FASTSEG_EMULATE)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#if !defined(FASTSEG_EMULATE)
// In libtorch_cuda, which a CPU-only torch lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastseg {

template <typename T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

#if defined(FASTSEG_EMULATE)
using emulation::load_word;
using emulation::store_word;
#else
template <typename W>
__device__ __forceinline__ W load_word(const W* address) {
  return *address;
}
template <typename W>
__device__ __forceinline__ void store_word(W* address, W word) {
  *address = word;
}
#endif

// For __launch_bounds__: `blocks` of a multiprocessor, but one less from compute capability 10.0
// on, where the compiler needs a few registers more and would spill them.
constexpr __host__ __device__ int resident_blocks(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return blocks - 1;
#else
  return blocks;
#endif
}

// kCount neighbours of T moved together, by the widest accesses that fit (128 bits at most). The
// address must be a multiple of kCount * sizeof(T) bytes, or of 16 where that is less.
template <size_t kBytes>
using Word = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t,
                                          std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

template <typename T, int kCount>
__device__ __forceinline__ void load_vector(const T* from, T (&to)[kCount]) {
  using W = Word<kCount * sizeof(T)>;
  static_assert(kCount * sizeof(T) % sizeof(W) == 0);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T) / sizeof(W)); ++i) {
    const W word = load_word(reinterpret_cast<const W*>(from) + i);
    memcpy(reinterpret_cast<char*>(to) + i * sizeof(W), &word, sizeof(W));
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const T (&from)[kCount]) {
  using W = Word<kCount * sizeof(T)>;
  static_assert(kCount * sizeof(T) % sizeof(W) == 0);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T) / sizeof(W)); ++i) {
    W word;
    memcpy(&word, reinterpret_cast<const char*>(from) + i * sizeof(W), sizeof(W));
    store_word(reinterpret_cast<W*>(to) + i, word);
  }
}

// The same where only the first `count` of them exist (all do if `whole`), at any address unless
// `whole`. Elements that do not exist load as 0.
template <typename T, int kCount>
__device__ __forceinline__ void load_vector(const T* from, int count, bool whole, T (&to)[kCount]) {
  if (whole) return load_vector(from, to);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = i < count ? from[i] : T(0);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_vector(T* to, int count, bool whole,
                                             const T (&from)[kCount]) {
  if (whole) return store_vector(to, from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) to[i] = from[i];
  }
}

// Whether all of these may be accessed in 16-byte words.
template <typename... T>
bool aligned_16(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Work in `outers` x `rows` x `items`: images (or planes), rows of one, what a row holds. The grid
// covers it without a division; for_each_in_rows loops over what exceeds the grid's limits.
struct RowGrid {
  dim3 grid, block;
  RowGrid(int64_t outers, int64_t rows, int64_t items) {
    constexpr unsigned kThreads = 256;
    unsigned width = 32;
    while (width < kThreads && width < items) width *= 2;
    const auto blocks = [](int64_t work, unsigned each, int64_t most) {
      const int64_t count = ceil_div<int64_t>(work, each);
      return static_cast<unsigned>(count < most ? count : most);
    };
    block = dim3(width, kThreads / width);
    grid = dim3(blocks(items, width, 0x7fffffff), blocks(rows, block.y, 65535),
                blocks(outers, 1, 65535));
  }
};

template <typename Fn>
__device__ __forceinline__ void for_each_in_rows(int64_t outers, int rows, int items, Fn&& fn) {
  for (int64_t outer = blockIdx.z; outer < outers; outer += gridDim.z) {
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows;
         row += gridDim.y * blockDim.y) {
      for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items;
           item += int64_t{gridDim.x} * blockDim.x) {
        fn(outer, row, static_cast<int>(item));
      }
    }
  }
}

struct DeviceLimits {
  int multiprocessors, major;  // major: of the compute capability
};

#if defined(FASTSEG_EMULATE)

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

inline bool is_capturing(cudaStream_t) { return emulation::capturing; }

inline DeviceLimits device_limits() {
  return {emulation::multiprocessors, emulation::compute_capability_major};
}

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
  ~DeviceGuard() {}  // not trivial, so that an unused guard draws no warning
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  const std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(args)...);
  emulation::submit(
      [=] { emulation::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, copies); }); });
}

#define FASTSEG_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastseg_emulated, CPU, m)

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " +
                           cudaGetErrorString(status));
}

// The stream PyTorch is using on x's device.
inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("fastseg: CUDA kernels need a PyTorch built with CUDA");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether the stream is recording a CUDA graph, so that nothing may wait for it.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "stream capture query");
  return status != cudaStreamCaptureStatusNone;
}

// Of the current device; asked once for each that a thread turns to.
inline DeviceLimits device_limits() {
  thread_local int known = -1;
  thread_local DeviceLimits limits;
  int device;
  check_cuda(cudaGetDevice(&device), "device query");
  if (device != known) {
    check_cuda(
        cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "device query");
    check_cuda(cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device),
               "device query");
    known = device;
  }
  return limits;
}

// Makes x's device the current one for the guard's lifetime.
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor& x)
      : torch::stable::accelerator::DeviceGuard(x.get_device_index()) {}
};

// Every kernel of the project starts here: kernel(args...) on `grid` blocks of `block` threads.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have unasked
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory request");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "kernel launch");
}

#define FASTSEG_SHARED(T, name, count) __shared__ T name[count]
#define FASTSEG_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define FASTSEG_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastseg, CUDA, m)

#endif

// x on the host. Waits for the stream, which must not be capturing.
inline torch::stable::Tensor copy_to_host(const torch::stable::Tensor& x, cudaStream_t stream) {
  if (is_capturing(stream)) throw std::runtime_error("fastseg: a captured graph cannot wait");
  return torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace fastseg
