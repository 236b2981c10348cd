// A device guard that does nothing, so that a CPU build of torch computes shapes of CUDA tensors,
// gradients included.
#undef TORCH_TARGET_VERSION  // guards are not part of the stable ABI
#include <c10/core/impl/DeviceGuardImplInterface.h>

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
