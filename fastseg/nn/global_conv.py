"""The large separable kernel of GCN (Peng et al. 2017, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.gcn_conv import global_conv2d, global_conv2d_packed, pack_global_conv2d
from .conv_bn import is_plain


class GlobalConv2d(nn.Module):
    """A dense k x k view of a map at the cost of rows and columns: k x 1 then 1 x k, plus 1 x k
    then k x 1; no batch norm, no nonlinearity. See :func:`fastseg.ops.global_conv2d`.

    The children are four plain ``nn.Conv2d``; one that was replaced or has hooks is called.

    Args:
        in_channels: channels of the map.
        out_channels: channels after the first convolution of each branch and of the result.
        kernel_size: k, odd.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H, W).

    Raises:
        ValueError: k is not odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 15) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"GlobalConv2d: kernel_size must be odd, got {kernel_size}")
        C, K, p = in_channels, out_channels, kernel_size // 2
        self.l1 = nn.Conv2d(C, K, (kernel_size, 1), padding=(p, 0))
        self.l2 = nn.Conv2d(K, K, (1, kernel_size), padding=(0, p))
        self.r1 = nn.Conv2d(C, K, (1, kernel_size), padding=(0, p))
        self.r2 = nn.Conv2d(K, K, (kernel_size, 1), padding=(p, 0))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_plain():
            return global_conv2d(x, *self.weights())
        return self.l2(self.l1(x)) + self.r2(self.r1(x))

    def is_plain(self) -> bool:
        """Whether the children do what their class says."""
        convs = (self.l1, self.l2, self.r1, self.r2)
        return all(is_plain(conv, nn.Conv2d) and conv.bias is not None for conv in convs)

    def weights(self) -> list[Tensor]:
        """The arguments of ``global_conv2d`` behind ``x``."""
        convs = (self.l1, self.l2, self.r1, self.r2)
        return [t for conv in convs for t in (conv.weight, conv.bias)]  # type: ignore[misc]

    def unfuse(self) -> UnfusedGlobalConv2d:
        """The same layer as four convolutions, sharing parameters and state-dict keys."""
        return UnfusedGlobalConv2d(self.l1, self.l2, self.r1, self.r2)


class UnfusedGlobalConv2d(nn.Module):
    """``GlobalConv2d`` in plain PyTorch, for exporters, tracing and comparisons."""

    def __init__(self, l1: nn.Module, l2: nn.Module, r1: nn.Module, r2: nn.Module) -> None:
        super().__init__()
        self.l1, self.l2, self.r1, self.r2 = l1, l2, r1, r2

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(self.l1(x)) + self.r2(self.r1(x))


class PackedGlobalConv2d(nn.Module):
    """A ``GlobalConv2d`` for inference on the CPU: weights packed once, no gradients.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H, W), channels last.

    Raises:
        ValueError: a child of the layer is not a plain convolution on the CPU.
    """

    def __init__(self, layer: GlobalConv2d) -> None:
        super().__init__()
        if not packable(layer):
            raise ValueError(
                "PackedGlobalConv2d: the layer must have four plain convolutions on the CPU"
            )
        self.conv = pack_global_conv2d(layer.weights())

    def forward(self, x: Tensor) -> Tensor:
        return global_conv2d_packed(x, self.conv)

    def extra_repr(self) -> str:
        conv = self.conv
        return f"{conv.in_channels}, {conv.out_channels}, kernel_size={conv.kernel_size}"


def packable(layer: nn.Module) -> bool:
    """Whether ``PackedGlobalConv2d`` computes this layer."""
    if type(layer) is not GlobalConv2d or not layer.is_plain():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in layer.weights())
