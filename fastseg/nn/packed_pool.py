"""Packed convolutions that pool their result or unpool their input, for inference on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv_pool import conv_pool2d, conv_unpool2d
from ..ops.max_unpool import max_pool2d
from .packed import PackedConv2d


class PooledConv2d(nn.Module):
    """A packed convolution and the 2x2 max pool behind it, in one pass over memory.

    Args:
        conv: the convolution.
        ceil_mode: keep the windows that hang over the lower and right edge.
        keep: somebody else reads the result of the convolution.
        indices: and somebody where in its window each maximum lies.

    Shapes: x (N, C, H, W), residual (N, K, Ho, Wo) -> (N, K, Ho, Wo) or None, the maxima
    (N, K, h, w), their uint8 indices (N, K, h, w) or None; and the shape of the first.
    """

    def __init__(self, conv: PackedConv2d, ceil_mode: bool, keep: bool, indices: bool) -> None:
        super().__init__()
        self.conv = conv
        self.ceil_mode = ceil_mode
        self.keep = keep
        self.indices = indices
        self.place: Any = None  # of the maxima; that of the convolution has its own result

    def forward(
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, tuple[int, ...]]:
        conv = self.conv
        if x.dim() != 4 or not conv.adds(x, residual):
            y = conv(x, residual)
            maxima, codes = max_pool2d(y, 2, ceil_mode=self.ceil_mode)
            return y if self.keep else None, maxima, codes if self.indices else None, y.shape
        x = x.to(conv.dtype, memory_format=torch.channels_last) if x.dtype != conv.dtype else x
        packed, shape = conv.prepare(x)
        h, w = ((n + self.ceil_mode) // 2 for n in shape[2:])
        results = conv_pool2d(
            x,
            packed,
            residual,
            ceil_mode=self.ceil_mode,
            keep=self.keep,
            indices=self.indices,
            out=conv.place.image(shape) if self.keep and conv.place is not None else None,
            pooled=self.place.image((*shape[:2], h, w)) if self.place is not None else None,
        )
        return *results, shape


class UnpooledConv2d(nn.Module):
    """An unpooling of 2x2 windows and the packed convolution behind it, in one pass over memory.

    Args:
        unpool: called with the pooled map, its indices and sizes, the last of which may be the
            output size (None: two pixels per window) and the one before, if any, the size that
            was pooled.
        conv: the convolution.

    Shapes: x (N, C, h, w), indices (N, C, h, w) uint8, residual (N, K, Ho, Wo) -> (N, K, Ho, Wo).
    """

    def __init__(self, unpool: nn.Module, conv: PackedConv2d) -> None:
        super().__init__()
        self.unpool = unpool
        self.conv = conv

    def forward(
        self, x: Tensor, indices: Tensor, *sizes: Any, residual: Tensor | None = None
    ) -> Tensor:
        conv = self.conv
        given = [size for size in sizes if size is not None]
        size = tuple(given[-1][-2:]) if sizes and sizes[-1] is not None else None
        if size is None:
            size = tuple(2 * n for n in x.shape[-2:])
        direct = x.dim() == 4 and x.dtype == conv.dtype and x.shape == indices.shape
        if not direct or any(tuple(s[-2:]) != size for s in given):
            return conv(self.unpool(x, indices, *sizes), residual)
        whole = x.new_empty((*x.shape[:2], *size), device="meta")
        packed, shape = conv.prepare(whole)
        if not conv.adds(whole, residual):
            return conv(self.unpool(x, indices, *sizes), residual)
        out = conv.place.image(shape) if conv.place is not None else None
        return conv_unpool2d(x, indices, size, packed, residual, out)
