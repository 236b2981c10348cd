// Tensors as the images of the engine's kernels.
#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "conv_engine/conv_engine.h"

namespace fastseg {
namespace conv_engine {

template <typename T>
void check_image(const Tensor& t, const char* name) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  FASTSEG_CHECK(t.dim() == 4 &&
                    t.scalar_type() == (kFloat ? ScalarType::Float : ScalarType::BFloat16) &&
                    (t.stride(1) == 1 || t.size(1) == 1),
                "conv_engine: ", name, " must be a ", kFloat ? "float32" : "bfloat16",
                " image (N, C, H, W), channels last");
}

template <typename T>
Image<const T> input_image(const Tensor& t, const char* name) {
  check_image<T>(t, name);
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(2), t.stride(3)};
}

template <typename T>
Image<T> output_image(const Tensor& t, const char* name) {
  check_image<T>(t, name);
  return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(2), t.stride(3)};
}

// From this size on outputs are written past the caches: nobody would find them there anyway.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

// Whether an output of so many elements is, given that its pixels are whole lines.
template <typename T>
bool is_streamed(int64_t elements, const Image<T>& y) {
  return elements * int64_t{sizeof(T)} >= kStreamBytes && y.pixel % kLine<T> == 0 &&
         y.row % kLine<T> == 0 && y.batch % kLine<T> == 0 &&
         reinterpret_cast<uintptr_t>(y.data) % 64 == 0;
}

}  // namespace conv_engine
}  // namespace fastseg
