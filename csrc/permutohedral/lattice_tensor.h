// Lattices as tensors, for the ops that take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/check.h"
#include "common/dispatch.h"
#include "permutohedral/lattice_cpu.h"

namespace fastseg {

// Calls fn with float{} or double{}, the types a lattice is built in.
template <typename Fn>
void dispatch_lattice(const Tensor& x, const char* op, Fn&& fn) {
  if (x.scalar_type() == ScalarType::Float) return fn(float{});
  if (x.scalar_type() == ScalarType::Double) return fn(double{});
  fail_check(op, ": dtype must be float32 or float64, got scalar type ",
             static_cast<int>(x.scalar_type()));
}

// Guards memory: the buffer is one that permutohedral_build made, for these points and this type.
inline void check_lattice(const char* op, const Tensor& lattice, int64_t points,
                          int64_t element_bytes) {
  FASTSEG_CHECK(lattice.scalar_type() == ScalarType::Byte && lattice.is_contiguous() &&
                    lattice.numel() >= static_cast<int64_t>(sizeof(LatticeHeader)),
                op, ": lattice must be a tensor that permutohedral_build returned");
  const auto* header = static_cast<const LatticeHeader*>(lattice.const_data_ptr());
  FASTSEG_CHECK(header->magic == kLatticeMagic && header->bytes == lattice.numel(), op,
                ": lattice must be a tensor that permutohedral_build returned");
  FASTSEG_CHECK(header->element_bytes == element_bytes, op,
                ": lattice and values must have one dtype");
  FASTSEG_CHECK(header->points == points, op, ": the lattice holds ", header->points,
                " points, got values of ", points);
}

// Calls fn(image): one image per thread where there are enough, else all threads on each in turn.
template <typename Fn>
void for_each_image(int64_t batch, Fn&& fn) {
  if (batch > 1 && batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) fn(b);
    });
  } else {
    for (int64_t b = 0; b < batch; ++b) fn(b);
  }
}

}  // namespace fastseg
