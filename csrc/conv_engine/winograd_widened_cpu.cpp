// 3x3 convolutions of bfloat16 images by Winograd whose result is float32.
#include "conv_engine/winograd_unit.inl"

namespace fastseg {
namespace conv_engine {

template void run_winograd(const WidenedConvolution&, int64_t);

}  // namespace conv_engine
}  // namespace fastseg
