"""Pooling layers with compact indices: one byte (or two bits) per maximum instead of eight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import max_pool2d, max_unpool2d


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` whose indices are the compact ones of ``fastseg.ops.max_pool2d``.

    Same arguments, values and gradients. With ``return_indices`` the forward gives (values,
    indices) for ``fastseg.nn.MaxUnpool2d``; ``fastseg.ops.to_torch_indices`` converts them for
    PyTorch's. Also without, training keeps one byte per maximum instead of eight.

    Args:
        kernel_size, stride, padding, return_indices, ceil_mode: as in PyTorch; windows have at most
            256 positions (16 x 16).
        dilation: 1.
        packed: keep the indices in two bits; for 2x2 windows, stride 2, no padding.

    Shape:
        (N, C, H, W) or (C, H, W) -> (N, C, h, w) or (C, h, w), in the layout of the input.

    Raises:
        ValueError: a dilation other than 1; in the forward see ``fastseg.ops.max_pool2d``.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        packed: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        if dilation not in (1, (1, 1)):
            raise ValueError(
                f"MaxPool2d: dilation must be 1, got {dilation}; use torch.nn.MaxPool2d"
            )
        self.packed = packed

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, indices = max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.packed
        )
        return (y, indices) if self.return_indices else y


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` for the indices of ``fastseg.nn.MaxPool2d``, packed or not.

    Deterministic, differentiable, in the layout of the input. Differs from PyTorch only for an
    ``output_size`` other than that of the pooled image: see ``fastseg.ops.max_unpool2d``.

    Args:
        kernel_size, stride, padding: those of the pooling.

    Shape:
        (N, C, h, w) or (C, h, w) -> (N, C, H, W) or (C, H, W).
    """

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        return max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )
