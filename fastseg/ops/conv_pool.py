"""Packed convolutions between 2x2 max pools with stride 2: the result pooled, or the input
unpooled, in the convolution's own passes, so that the image at full size is not stored for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._conv_options import output_size
from ._layout import channels_last
from .conv_engine import PackedConv, conv_engine
from .max_unpool import max_pool2d, max_unpool2d

EVEN_TILES = (2, 4, 6)  # tiles of Winograd that hold whole windows


def conv_pool2d(
    x: Tensor,
    conv: PackedConv,
    residual: Tensor | None = None,
    *,
    ceil_mode: bool = False,
    keep: bool = True,
    indices: bool = False,
    out: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``y = conv_engine(x, conv, residual)`` and ``max_pool2d(y, 2)``.

    One pass for Winograd tiles of even size without dilation, else one after the other. The maxima
    are those of y to the last bit; y is cut into tiles that hold whole windows, so that it may be
    rounded otherwise than by ``conv_engine``.

    Args:
        x, conv, residual, out: as for ``conv_engine``.
        ceil_mode: keep the windows that hang over the lower and right edge.
        keep: y is wanted too.
        indices: and where in its window each maximum lies.
        pooled: channels-last memory for the maxima, used where it takes one pass.

    Returns:
        y (N, K, H, W) or None, the maxima (N, K, h, w), and their indices, uint8 (N, K, h, w), or
        None; channels last. Not differentiable.
    """
    size = output_size(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    windows = [(n + ceil_mode) // 2 for n in size]
    if conv.tile not in EVEN_TILES or conv.dilation != (1, 1) or min(windows) < 1:
        y = conv_engine(x, conv, residual, out)
        maxima, codes = max_pool2d(y, 2, ceil_mode=ceil_mode)
        return y if keep else None, maxima, codes if indices else None
    N, K = x.shape[0], conv.out_channels
    if keep and out is None:
        out = _image(x, (N, K, *size))
    if pooled is None:
        pooled = _image(x, (N, K, *windows))
    position = _image(x, (N, K, *windows), torch.uint8) if indices else None
    _run(x, None, x.shape[2:], conv, residual, out if keep else None, pooled, position)
    return out if keep else None, pooled, position


def conv_unpool2d(
    x: Tensor,
    indices: Tensor,
    size: Sequence[int],
    conv: PackedConv,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``conv_engine(max_unpool2d(x, indices, 2, output_size=size), conv, residual)``, bit for bit.

    One pass for Winograd tiles, else one after the other.

    Args:
        x: the pooled image (N, C, h, w).
        indices: uint8 indices of ``max_pool2d`` with 2x2 windows, (N, C, h, w).
        size: (H, W) of the image that was pooled.
        conv, residual, out: as for ``conv_engine``.
    """
    H, W = size[-2:]
    fits = all(w in (n // 2, (n + 1) // 2) for w, n in zip(x.shape[2:], (H, W), strict=True))
    if conv.tile not in (1, 3, *EVEN_TILES) or x.shape != indices.shape or not fits:
        return conv_engine(max_unpool2d(x, indices, 2, output_size=(H, W)), conv, residual, out)
    if out is None:
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        out = _image(x, (x.shape[0], conv.out_channels, *output_size((H, W), *geometry)))
    _run(x, channels_last(indices), (H, W), conv, residual, out, None, None)
    return out


def _run(
    x: Tensor,
    x_codes: Tensor | None,
    size: Sequence[int],
    conv: PackedConv,
    residual: Tensor | None,
    *outputs: Tensor | None,
) -> None:
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"conv_engine: x must be (N, {conv.in_channels}, H, W), got {tuple(x.shape)}"
        )
    torch.ops.fastseg.conv_engine_pool(
        channels_last(x),
        x_codes,
        *size,
        conv.packed,
        None if residual is None else channels_last(residual),
        *outputs,
        conv.out_channels,
        *conv.options(),
    )


def _image(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    N, C, H, W = shape
    return x.new_empty((N, H, W, C), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.register_fake("fastseg::conv_engine_pool")
def _(
    x, x_codes, H, W, packed, residual, out, pooled, codes, out_channels, R, S, stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, tile, activation, slope, residual_last=False,
    strassen=0, groups=1,
):  # fmt: skip
    return None
