"""The large separable kernel of GCN (Peng et al. 2017, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalConv2d(nn.Module):
    """A dense k x k view of a map at the cost of rows and columns: k x 1 then 1 x k, plus 1 x k
    then k x 1; no batch norm, no nonlinearity.

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
        return self.l2(self.l1(x)) + self.r2(self.r1(x))
