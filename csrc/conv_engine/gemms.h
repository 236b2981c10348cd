// Several matrix products at a time (gemm_cpu.cpp).
#pragma once

#include <vector>

namespace fastseg {
namespace conv_engine {

// Convolutions of one image whose results none of them reads; each as run_gemm does. Instantiated
// for the three kinds of Convolution.
template <class Conv>
void run_gemms(const std::vector<Conv>& convs);

}  // namespace conv_engine
}  // namespace fastseg
