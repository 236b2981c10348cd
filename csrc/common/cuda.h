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
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
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

// The grid size for `work` items at `per_block` each, for kernels that loop over what is left.
inline unsigned grid_size(int64_t work, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = ceil_div(work, per_block);
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Sixteen bytes of T, moved by one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

#if defined(FASTSEG_EMULATE)

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
  ~DeviceGuard() {}  // not trivial, so that an unused guard draws no warning
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  const std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(args)...);
  emulation::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
}

template <typename T>
Pack<T> load_128(const T* address) {
  emulation::count_access(address);
  return *reinterpret_cast<const Pack<T>*>(address);
}

template <typename T>
void store_128(T* address, const Pack<T>& pack) {
  emulation::count_access(address);
  *reinterpret_cast<Pack<T>*>(address) = pack;
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

template <typename T>
__device__ __forceinline__ Pack<T> load_128(const T* address) {
  return *reinterpret_cast<const Pack<T>*>(address);
}

template <typename T>
__device__ __forceinline__ void store_128(T* address, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(address) = pack;
}

#define FASTSEG_SHARED(T, name, count) __shared__ T name[count]
#define FASTSEG_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define FASTSEG_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastseg, CUDA, m)

#endif

}  // namespace fastseg
