"""Resizing of a network's maps on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._layout import channels_last, empty_image

MODES = ("bilinear", "nearest")


class Resize2d(nn.Module):
    """``F.interpolate``, for inner maps into the memory that :attr:`place` gives.

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
        if not direct or x.numel() == 0 or x.requires_grad or not x.is_cpu:
            return F.interpolate(x, size, self.scale_factor, self.mode, self.align_corners)
        wanted: Any = self.scale_factor if size is None else size
        pair = wanted if isinstance(wanted, Sequence) else (wanted, wanted)
        if size is None:
            pair = [int(n * s) for n, s in zip(x.shape[2:], pair, strict=True)]
        options = bool(self.align_corners), self.mode == "nearest"
        if self.place is None or self.place.dtype != x.dtype:
            return torch.ops.fastseg.resize(x, *pair, *options)
        out = self.place.image((*x.shape[:2], *pair))
        torch.ops.fastseg.resize_out(channels_last(x), out, *options)
        return out

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, scale_factor={self.scale_factor}"


@torch.library.register_fake("fastseg::resize")
def _(x, H, W, align_corners, nearest):
    return empty_image(x, (*x.shape[:2], H, W))


@torch.library.register_fake("fastseg::resize_out")
def _(x, out, align_corners, nearest):
    return None
