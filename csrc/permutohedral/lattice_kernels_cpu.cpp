// Compiles the tile kernels once per instruction set and hands out those in use.
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "permutohedral/lattice_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

// GCC warns of its own _mm512_cast* headers, and of vector types in functions that it inlines.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#define FASTSEG_KERNEL_FILE "permutohedral/permutohedral_kernel.inl"
#include "common/foreach_isa.inl"

#define FASTSEG_LATTICE_KERNELS(isa) \
  {&isa::locate_points<T>,           \
   &isa::value_range<T>,             \
   &isa::pack_simplices<uint64_t>,   \
   &isa::pack_simplices<WideKey>,    \
   &isa::slice_tile<T>,              \
   &isa::splat_tile<T>,              \
   &isa::merge_rows<T>,              \
   &isa::blur_chains<T>,             \
   &isa::transform_rows<T>,          \
   &isa::softmax_tile<T>,            \
   &isa::logistic<T>,                \
   &isa::scale_rows<T>,              \
   &isa::load_rows<T>,               \
   &isa::store_rows<T>,              \
   &isa::shift_logits<T>}

}  // namespace

template <typename T>
const LatticeKernels<T>& lattice_kernels() {
  static const LatticeKernels<T> baseline_kernels = FASTSEG_LATTICE_KERNELS(baseline);
#if defined(__x86_64__)
  static const LatticeKernels<T> avx2_kernels = FASTSEG_LATTICE_KERNELS(avx2);
  static const LatticeKernels<T> avx512_kernels = FASTSEG_LATTICE_KERNELS(avx512);
  if (current_isa() >= Isa::kAvx512) return avx512_kernels;
  if (current_isa() >= Isa::kAvx2) return avx2_kernels;
#endif
  return baseline_kernels;
}

template const LatticeKernels<float>& lattice_kernels<float>();
template const LatticeKernels<double>& lattice_kernels<double>();

}  // namespace fastseg
