"""Pyramid pooling (PSPNet, Zhao et al. 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aspp import check_pooled_batch
from .conv_bn import ConvBNReLU2d


class PyramidPooling(nn.Module):
    """A map and its averages over grids of bins: each grid is pooled, reduced by a 1x1 convolution
    with batch norm and ReLU, resized back and concatenated behind the map.

    Args:
        in_channels: channels of the map.
        bins: grid sizes.
        out_channels: channels of each reduced grid; None is ``in_channels // len(bins)``.
        align_corners: of the resizing.

    Shapes: (N, in_channels, H, W) -> (N, in_channels + len(bins) * out_channels, H, W).

    Raises:
        ValueError: in training with a batch of 1 and a bin of 1, whose pooled 1x1 map cannot be
            normalised.
    """

    def __init__(
        self,
        in_channels: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        out_channels: int | None = None,
        *,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.align_corners = align_corners
        channels = out_channels or in_channels // len(self.bins)
        self.branches = nn.ModuleList(ConvBNReLU2d(in_channels, channels, 1) for _ in self.bins)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for size, reduce in zip(self.bins, self.branches, strict=True):
            if size == 1:
                check_pooled_batch("PyramidPooling", x, reduce)
            y = reduce(F.adaptive_avg_pool2d(x, size))  # (N, out_channels, size, size)
            maps.append(
                F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=self.align_corners)
            )
        return torch.cat(maps, 1)
