"""The sum of two 1x1 convolutions as one matrix product over the channels of both images: the
shortcut of a residual block that changes its channels is neither written nor read again."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_options import output_size
from ._layout import channels_last
from .conv_engine import PackedConv, activate, pack_conv

Pair = tuple[int, int]


@dataclass(frozen=True)
class PackedConvSum:
    """Two 1x1 convolutions in the form the kernels read. Made by ``pack_conv_sum``."""

    conv: PackedConv  # of the channels of both; with the stride of the first
    channels: Pair
    stride: Pair  # of the second


def pack_conv_sum(
    weight: Tensor,
    other: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    other_stride: Pair = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
    products: torch.dtype = torch.float32,
    strassen: int = 0,
) -> PackedConvSum:
    """Prepare the sum of two 1x1 convolutions for ``conv_sum``.

    Args:
        weight, other: (K, C, 1, 1) and (K, C2, 1, 1) float32 on the CPU, batch norms folded in.
        bias: (K) float32, the sum of both, or None.
        stride, other_stride: (vertical, horizontal) of either convolution, in pixels.
        activation, negative_slope, products, strassen: as for ``pack_conv``; Strassen's algorithm
            and bfloat16 products need multiples of 32 channels in both.

    Raises:
        ValueError: an argument has the wrong shape, dtype or name.
    """
    shapes = [tuple(w.shape) for w in (weight, other)]
    for shape in shapes:
        if shape[:1] + shape[2:] != (weight.shape[0], 1, 1):
            raise ValueError(
                f"pack_conv_sum: weights must be (K, C, 1, 1) and (K, C2, 1, 1), got {shapes[0]} "
                f"and {shapes[1]}"
            )
    parts = [weight, other]
    if strassen:  # each half of the reduction is half of the channels of both images
        parts = [half for i in (0, 1) for half in (weight.chunk(2, 1)[i], other.chunk(2, 1)[i])]
    conv = pack_conv(
        torch.cat(parts, 1),
        bias,
        stride=stride,
        activation=activation,
        negative_slope=negative_slope,
        products=products,
        strassen=strassen,
    )
    return PackedConvSum(conv, (weight.shape[1], other.shape[1]), other_stride)


def conv_sum(x: Tensor, other: Tensor, packed: PackedConvSum, out: Tensor | None = None) -> Tensor:
    """``activation(conv2d(x, weight) + conv2d(other, other_weight) + bias)`` with packed weights,
    without gradients.

    Args:
        x: (N, C, H, W) float32 or bfloat16 on the CPU, best in channels-last memory (else it is
            copied).
        other: (N, C2, H2, W2) of its dtype, such that both results are (Ho, Wo).
        packed: from ``pack_conv_sum``.
        out: (N, K, Ho, Wo), dtype of ``x``, to write to, with channel stride 1, or None.

    Returns:
        (N, K, Ho, Wo), dtype of ``x``, channels last; ``out`` if it was given.

    Raises:
        ValueError: shapes or dtypes do not match, or a gradient would be needed.
    """
    conv = packed.conv
    for name, t, C in (("x", x, packed.channels[0]), ("other", other, packed.channels[1])):
        if t.dim() != 4 or t.shape[1] != C:
            raise ValueError(f"conv_sum: {name} must be (N, {C}, H, W), got {tuple(t.shape)}")
        if torch.is_grad_enabled() and t.requires_grad:
            raise ValueError("conv_sum: computes no gradients, call it under torch.no_grad()")
    x, other = channels_last(x), channels_last(other)
    if out is None:
        size = output_size(x.shape[2:], (1, 1), conv.stride, (0, 0), (1, 1))
        out = x.new_empty(x.shape[0], *size, conv.out_channels).permute(0, 3, 1, 2)
    options = conv.options()[:-1]  # one group
    torch.ops.fastseg.conv_engine_sum(x, other, *packed.stride, conv.packed, out, *options)
    return out


def conv_sum_reference(
    x: Tensor,
    other: Tensor,
    weight: Tensor,
    other_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    other_stride: Pair = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """What ``conv_sum(x, other, pack_conv_sum(weight, other_weight, ...))`` means, in plain
    PyTorch."""
    y = F.conv2d(x, weight, bias, stride) + F.conv2d(other, other_weight, None, other_stride)
    return activate(y, activation, negative_slope)


@torch.library.register_fake("fastseg::conv_engine_sum")
def _(
    x, other, other_stride_h, other_stride_w, packed, out, R, S, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, tile, activation, slope, residual_last=False, strassen=0,
):  # fmt: skip
    return None
