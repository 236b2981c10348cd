"""The memory layout an op keeps, as the kernels decide it (csrc/common/layout.h)."""

import torch
from torch import Tensor


def image_layout(x: Tensor) -> torch.memory_format:
    """channels_last where a pixel's channels are neighbours and ``x`` is not plain NCHW too."""
    channels_last = not x.is_contiguous() and x.stride(1) == 1 and x.size(1) > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(x: Tensor, size: tuple, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised image with the device and layout, and by default the dtype, of ``x``."""
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=image_layout(x))
