// Tensor maps: what a bulk copy of the tensor memory accelerator (compute capability 9.0) needs to
// know of a tensor in global memory, made on the host and passed to kernels by value as
// `const __grid_constant__ TensorMap`.
#pragma once

#include <array>
#include <string>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"

#if !defined(FASTSEG_EMULATE)
#include <cuda.h>  // types; the functions are asked of the driver at run time
#endif

namespace fastseg {

#if defined(FASTSEG_EMULATE)
using emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A box of a dense tensor of three axes, innermost first. Rows of 128 bytes (box[0] * sizeof(T))
// are swizzled in shared memory: 16-byte chunk c of row r lies at c ^ (r % 8).
struct TiledBox {
  std::array<int64_t, 3> sizes;
  std::array<int64_t, 2> strides;  // of axes 1 and 2, in elements; multiples of 16 bytes
  std::array<int, 3> box;
  bool swizzle;
};

// Pixels of a channels-last image (N, H, W, C). Base pixels run from `low` to (W - 1, H - 1) +
// `high` in steps of `step`, (width, height) each; one copy takes `pixels` of them, also across
// rows and images, and `channels` of each, swizzled as above.
struct Im2colBox {
  int64_t N, H, W, C;
  int64_t stride;  // elements from one pixel to the next, a multiple of 16 bytes
  std::array<int, 2> low, high, step;
  int channels, pixels;
};

#if defined(FASTSEG_EMULATE)

template <typename T>
TensorMap tensor_map(const T* data, const TiledBox& t) {
  return emulation::tiled_map(data, sizeof(T), t.sizes.data(), t.strides.data(), t.box.data(),
                              t.swizzle);
}
template <typename T>
TensorMap tensor_map(const T* data, const Im2colBox& t) {
  const int64_t sizes[] = {t.C, t.W, t.H, t.N};
  return emulation::im2col_map(data, sizeof(T), sizes, t.stride, t.low.data(), t.high.data(),
                               t.step.data(), t.channels, t.pixels);
}

#else

namespace detail {

// A function of the driver, which is not linked: the library must load where there is none.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
             name);
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error(std::string("fastseg: this NVIDIA driver lacks ") + name);
  }
  return reinterpret_cast<Function*>(found);
}

template <typename T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, Half>       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    : std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

inline void check_map(CUresult status) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("fastseg: the driver refused a tensor map, CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  }
}

}  // namespace detail

template <typename T>
TensorMap tensor_map(const T* data, const TiledBox& t) {
  static auto* const encode =
      detail::driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  TensorMap map;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3], ones[3] = {1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    sizes[i] = static_cast<cuuint64_t>(t.sizes[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    if (i < 2) strides[i] = static_cast<cuuint64_t>(t.strides[i]) * sizeof(T);
  }
  detail::check_map(encode(&map, detail::kMapType<T>, 3, const_cast<T*>(data), sizes, strides, box,
                           ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           t.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

template <typename T>
TensorMap tensor_map(const T* data, const Im2colBox& t) {
  static auto* const encode =
      detail::driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  TensorMap map;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[] = {size(t.C), size(t.W), size(t.H), size(t.N)};
  const cuuint64_t strides[] = {size(t.stride) * sizeof(T), size(t.W * t.stride) * sizeof(T),
                                size(t.H * t.W * t.stride) * sizeof(T)};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(t.step[0]),
                              static_cast<cuuint32_t>(t.step[1]), 1};
  detail::check_map(encode(&map, detail::kMapType<T>, 4, const_cast<T*>(data), sizes, strides,
                           t.low.data(), t.high.data(), static_cast<cuuint32_t>(t.channels),
                           static_cast<cuuint32_t>(t.pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

#endif

}  // namespace fastseg
