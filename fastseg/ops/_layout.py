"""The memory layout an op keeps, as the kernels decide it (csrc/common/layout.h), and copies of
images in another."""

import torch
from torch import Tensor


def image_layout(x: Tensor) -> torch.memory_format:
    """channels_last where a pixel's channels are neighbours and ``x`` is not plain NCHW too."""
    channels_last = not x.is_contiguous() and x.stride(1) == 1 and x.size(1) > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(x: Tensor, size: tuple, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised image with the device and layout, and by default the dtype, of ``x``."""
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=image_layout(x))


def channels_last(x: Tensor) -> Tensor:
    """x with channel stride 1: itself where it has that, be it a slice of something larger."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return in_layout(x, torch.channels_last)


def in_layout(x: Tensor, layout: torch.memory_format, narrow: bool = False) -> Tensor:
    """x (N, C, H, W) in this layout, without gradients; with ``narrow`` in bfloat16."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        if narrow or not x.is_contiguous(memory_format=layout):
            return torch.ops.fastseg.relayout(x, layout == torch.channels_last, narrow)
        return x
    x = x.contiguous(memory_format=layout)
    return x.bfloat16() if narrow else x


@torch.library.register_fake("fastseg::relayout")
def _(x: Tensor, channels_last: bool, narrow: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if narrow else x.dtype
    return torch.empty_like(x, dtype=dtype, memory_format=layout)
