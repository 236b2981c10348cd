// 3x3 convolutions of bfloat16 images by Winograd.
#include "conv_engine/winograd_unit.inl"

namespace fastseg {
namespace conv_engine {

template void run_winograd(const Convolution<BFloat16, float>&, int64_t);
template void run_winograd_in_place(const Convolution<BFloat16, float>&, int64_t);
template void run_winograd(const Convolution<BFloat16, BFloat16>&, int64_t);

}  // namespace conv_engine
}  // namespace fastseg
