"""Pyramid pooling (PSPNet, Zhao et al. 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv_engine import PackedConv, conv_engine, pack_matrix
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

    def grids(self, x: Tensor) -> list[Tensor]:
        """The reduced grids before resizing, (N, out_channels, bin, bin) each."""
        grids = []
        for size, reduce in zip(self.bins, self.branches, strict=True):
            if size == 1:
                check_pooled_batch("PyramidPooling", x, reduce)
            grids.append(reduce(F.adaptive_avg_pool2d(x, size)))
        return grids

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        maps = [
            F.interpolate(grid, size, mode="bilinear", align_corners=self.align_corners)
            for grid in self.grids(x)
        ]
        return torch.cat([x, *maps], 1)


class GridPool2d(nn.Module):
    """``F.adaptive_avg_pool2d`` to several square grids, which reads the map once.

    Args:
        bins: grid sizes.

    Shapes: (N, C, H, W) -> for each grid (N, C, bin, bin), channels last where the map is.
    """

    def __init__(self, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(bins)

    def forward(self, x: Tensor) -> list[Tensor]:
        direct = x.dim() == 4 and x.dtype in (torch.float32, torch.bfloat16) and x.is_cpu
        if not direct or x.stride(1) != 1 or x.requires_grad:
            return [F.adaptive_avg_pool2d(x, b) for b in self.bins]
        cells = torch.ops.fastseg.grid_pool(x, self.bins)  # (N, cells of all grids, C)
        grids = cells.split([b * b for b in self.bins], 1)
        return [
            grid.unflatten(1, (b, b)).permute(0, 3, 1, 2)
            for b, grid in zip(self.bins, grids, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{self.bins}"


class PyramidConv2d(nn.Module):
    """The convolution of resized and concatenated grids, without resizing or concatenating them.

    Resizing is linear, so each tap of the convolution applies to the few values of a grid, and the
    results are spread over the map, first from line to line, then along the lines: for PSPNet's
    head a 3x3 convolution over 2048 channels and 60 x 60 pixels becomes one over 50. Equivalent, up
    to rounding, to::

        maps = [F.interpolate(g, size, mode="bilinear", align_corners=...) for g in grids]
        F.conv2d(torch.cat(maps, 1), weight, padding=k // 2)

    Args:
        weight: (O, C, k, k), k odd; C is split equally among the grids.
        bins: grid sizes.
        align_corners: of the resizing.

    Shapes: grids of (N, C / len(bins), bin, bin) and size (H, W) -> (N, O, H, W).
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bins: Sequence[int], align_corners: bool = True) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.out_channels, _, self.kernel_size, _ = weight.shape
        weight = pyramid_weight(weight.detach(), len(bins)).contiguous()
        self.register_buffer("weight", weight, persistent=False)
        self.place: Any = None  # a fastseg.memory_plan.Place
        self._packed: dict[int, PackedConv] = {}

    def forward(self, grids: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        dtype = grids[0].dtype  # the grids are small: a lower precision would save nothing
        grids = [grid.to(self.weight.dtype) for grid in grids]
        if not self.weight.is_cpu or any(grid.requires_grad for grid in grids):
            y = pyramid_conv(grids, self.weight, self.kernel_size, size, self.align_corners)
            return y.to(dtype)
        values = [self._values(i, grid) for i, grid in enumerate(grids)]
        shape = (values[0].shape[0], self.out_channels, *size)
        if self.place is not None and self.place.dtype == dtype == self.weight.dtype:
            out = self.place.image(shape)
        else:
            out = torch.empty(shape, dtype=self.weight.dtype, memory_format=torch.channels_last)
        torch.ops.fastseg.pyramid_spread_out(values, out, self.kernel_size, self.align_corners)
        return out.to(dtype)

    def _values(self, i: int, grid: Tensor) -> Tensor:
        """What each cell of a grid contributes to each tap and output, (N, bin, bin, k * k * O)."""
        if self.weight.dtype != torch.float32:
            return F.linear(grid.movedim(1, 3), self.weight[i])
        if i not in self._packed:
            with torch.inference_mode(False):
                self._packed[i] = pack_matrix(self.weight[i].T)
        return conv_engine(grid, self._packed[i]).movedim(1, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # copies pack anew


@torch.library.register_fake("fastseg::grid_pool")
def _(x, bins):
    return x.new_empty(x.shape[0], sum(b * b for b in bins), x.shape[1])


@torch.library.register_fake("fastseg::pyramid_spread_out")
def _(values, out, k, align_corners):
    return None


def pyramid_weight(weight: Tensor, grids: int) -> Tensor:
    """(O, C, k, k) as one matrix per grid, (grids, k * k * O, C / grids)."""
    O, C, k, _ = weight.shape
    return weight.view(O, grids, C // grids, k * k).permute(1, 3, 0, 2).flatten(1, 2)


def pyramid_conv(
    grids: Sequence[Tensor],
    weight: Tensor,
    k: int,
    size: Sequence[int],
    align_corners: bool,
) -> Tensor:
    """:class:`PyramidConv2d` in plain PyTorch; ``weight`` is from :func:`pyramid_weight`."""
    H, W = size
    lines, columns = [], []
    for grid, w in zip(grids, weight, strict=True):
        (N, _, b, _), O = grid.shape, w.shape[0] // k**2
        values = F.linear(grid.movedim(1, 3), w).view(N, b, b, k, k, O)
        values = values.permute(0, 3, 1, 4, 2, 5).reshape(N, k * b, k * b * O)  # (tap, cell) twice
        rows = _taps(H, b, k, align_corners, grid).view(H, k * b)
        lines.append((rows @ values).view(N, H, k * b, O))
        columns.append(_taps(W, b, k, align_corners, grid).view(W, k * b))
    y = torch.cat(columns, 1) @ torch.cat(lines, 2)  # (N, H, W, O)
    return y.movedim(3, 1)


def _taps(n: int, bins: int, k: int, align_corners: bool, like: Tensor) -> Tensor:
    """(n, k, bins): what each of ``bins`` values contributes to each of n pixels when resized and
    then seen by each tap of a convolution, which sees zeros outside."""
    one = torch.eye(bins, dtype=like.dtype, device=like.device)
    resized = F.interpolate(one[None], n, mode="linear", align_corners=align_corners)
    padded = F.pad(resized[0].T, (0, 0, k // 2, k // 2))
    return torch.stack([padded[tap : tap + n] for tap in range(k)], 1)
