"""Resizing of a network's inner maps on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("bilinear", "nearest")
LEAST_CHANNELS = 8  # below that a pixel fills no vector


class Resize2d(nn.Module):
    """``F.interpolate`` of channels-last maps, into the memory that :attr:`place` gives.

    Args:
        scale_factor: whole factors, or None where each call says the size.
        mode: "bilinear" or "nearest".
        align_corners: as in ``F.interpolate``.

    Shape:
        (N, C, h, w) -> (N, C, H, W), channels last where the input is.
    """

    def __init__(self, scale_factor: Any, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.mode = mode
        self.align_corners = align_corners
        self.place: Any = None  # a fastseg.memory_plan.Place

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        direct = x.dim() == 4 and x.dtype in (torch.float32, torch.bfloat16)
        if not direct or x.stride(1) != 1 or x.shape[1] < LEAST_CHANNELS or x.numel() == 0:
            return F.interpolate(x, size, self.scale_factor, self.mode, self.align_corners)
        wanted: Any = self.scale_factor if size is None else size
        pair = wanted if isinstance(wanted, Sequence) else (wanted, wanted)
        if size is None:
            pair = [int(n * s) for n, s in zip(x.shape[2:], pair, strict=True)]
        N, C = x.shape[:2]
        H, W = pair
        if self.place is not None and self.place.buffers.dtype == x.dtype:
            out = self.place.image((N, C, H, W))
        else:
            out = x.new_empty((N, H, W, C)).permute(0, 3, 1, 2)
        torch.ops.fastseg.resize_out(x, out, bool(self.align_corners), self.mode == "nearest")
        return out

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, scale_factor={self.scale_factor}"


@torch.library.register_fake("fastseg::resize_out")
def _(x, out, align_corners, nearest):
    return None
