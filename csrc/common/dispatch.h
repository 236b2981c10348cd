// dispatch_floating: the one list of dtypes that kernels support.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/check.h"

namespace fastseg {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls fn(T{}) with the C++ type of x's dtype. `op` names the caller in the error.
template <typename Fn>
void dispatch_floating(const Tensor& x, const char* op, Fn&& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Double:
      return fn(double{});
    case ScalarType::Half:
      return fn(Half{});
    case ScalarType::BFloat16:
      return fn(BFloat16{});
    default:
      fail_check(op, ": dtype must be float32, float64, float16 or bfloat16, got scalar type ",
                 static_cast<int>(x.scalar_type()));
  }
}

// The type sums of T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

}  // namespace fastseg
