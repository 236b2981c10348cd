"""A packed 1x1 convolution of a map whose channels are scaled, for inference on the CPU."""

from typing import Any

from torch import Tensor, nn

from ..ops.conv_engine import conv_engine
from .packed import PackedConv2d


class ScaledConv2d(nn.Module):
    """``conv(x * scale, residual)``, the end of a squeeze-and-excitation block (Hu et al. 2018,
    "Squeeze-and-Excitation Networks"): the product is formed where pixels are read, not stored.

    Args:
        conv: a convolution for which :func:`scalable` holds.

    Shapes: x (N, C, H, W) and scale (N, C, 1, 1), in either order, residual (N, K, H, W) or None
    -> (N, K, H, W), channels last. Other shapes are multiplied as torch does.
    """

    def __init__(self, conv: PackedConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Any, scale: Any, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (x, scale)):
            return conv(x * scale, residual)
        if x.shape[2:] == (1, 1):
            x, scale = scale, x
        same = x.dtype == scale.dtype == conv.dtype
        if not same or x.shape[1] != conv.weight.shape[1] or scale.shape != (*x.shape[:2], 1, 1):
            return conv(x * scale, residual)
        packed, shape = conv.prepare(x)
        if packed.strassen or not conv.adds(x, residual):
            return conv(x * scale, residual)
        out = conv.place.image(shape) if conv.place is not None else None
        return conv_engine(x, packed, residual, out, scale)


def scalable(conv: PackedConv2d) -> bool:
    """Whether a scale of its channels can be left to this convolution."""
    options = conv.options
    return (
        conv.groups == 1
        and tuple(conv.weight.shape[2:]) == tuple(options["stride"]) == (1, 1)
        and tuple(options["padding"]) == (0, 0)
    )
