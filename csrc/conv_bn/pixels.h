// Images between the layouts that torch has and the one that the engine reads.
#pragma once

#include "common/layout.h"

namespace fastseg {

// t with channel stride 1: itself or a channels-last copy.
Tensor pixels_of(const Tensor& t);

// Dense channels-last pixels in that layout: themselves or a copy.
Tensor in_layout(const Tensor& pixels, MemoryFormat layout);

}  // namespace fastseg
