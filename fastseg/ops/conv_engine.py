"""The CPU's inference convolution: weights packed once, bias, residual and activation fused.

Which algorithms there are, how accurate, and which one a layer gets: ``conv_choice``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_options import output_size, round_up
from ._layout import channels_last, empty_image
from .conv_choice import GROUPED, LINE, TILES

ACTIVATIONS = {  # in the order of csrc/conv_engine/conv_engine.h
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "leaky_relu": F.leaky_relu,
    "relu6": lambda y, slope: F.relu6(y),
    "hardswish": lambda y, slope: F.hardswish(y),
    "hardsigmoid": lambda y, slope: F.hardsigmoid(y),
    "silu": lambda y, slope: F.silu(y),
    "sigmoid": lambda y, slope: y.sigmoid(),
    "gelu": lambda y, slope: F.gelu(y),
    "gelu_tanh": lambda y, slope: F.gelu(y, approximate="tanh"),
}


@dataclass(frozen=True)
class PackedConv:
    """A convolution with its weights in the form the kernels read. Made by ``pack_conv``."""

    packed: Tensor
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    tile: int
    activation: str
    negative_slope: float
    residual_last: bool = False
    strassen: int = 0
    groups: int = 1

    def options(self) -> tuple:
        """What the ops are told beside the tensors, in the order of their schemas."""
        return (
            *self.kernel_size,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.tile,
            list(ACTIVATIONS).index(self.activation),
            self.negative_slope,
            self.residual_last,
            self.strassen,
            self.groups,
        )


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
    tile: int = 0,
    products: torch.dtype = torch.float32,
    residual_last: bool = False,
    strassen: int = 0,
    groups: int = 1,
) -> PackedConv:
    """Prepare a convolution for ``conv_engine``.

    Args:
        weight: (K, C / groups, R, S) float32 on the CPU. Fold a batch norm in before.
        bias: (K) float32, or None.
        stride, padding, dilation: (vertical, horizontal), in pixels.
        activation: a key of ``ACTIVATIONS``; "leaky_relu" with ``negative_slope``.
        tile: the algorithm, from ``choose_algorithm``; 0 is the matrix product.
        products: what the packed weights and the (transformed) input are rounded to before they
            are multiplied: float32, for images of either dtype, or for bfloat16 images bfloat16;
            see ``choose_algorithm``. Sums are float32.
        residual_last: a residual is added behind the activation instead of before.
        strassen: levels of Strassen's algorithm in the products, from ``choose_algorithm``.
        groups: as in ``torch.nn.functional.conv2d``.

    Returns:
        The packed form: ``TILES[tile][3] ** 2 / 9`` times the memory of a 3x3 weight (4 times for
        F(4, 3)), for the matrix product that of the weight; channels are padded to 16 and 32. A
        level of Strassen's algorithm takes 7/4 of that.

    Raises:
        ValueError: an argument has the wrong shape, dtype or name.
    """
    if weight.dim() != 4 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            "pack_conv: weight must be (K, C, R, S) float32 on the CPU, got "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"pack_conv: bias must have {weight.shape[0]} elements, got {tuple(bias.shape)}"
        )
    if products not in (torch.float32, torch.bfloat16):
        raise ValueError(f"pack_conv: products must be float32 or bfloat16, got {products}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"pack_conv: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}"
        )
    K, C, R, S = weight.shape
    with torch.no_grad():
        bias = bias.detach().float().contiguous() if bias is not None else None
        packed = torch.ops.fastseg.conv_engine_pack(
            weight.detach(), bias, tile, products == torch.bfloat16, strassen, groups
        )
    return PackedConv(
        packed,
        C * groups,
        K,
        (R, S),
        stride,
        padding,
        dilation,
        tile,
        activation,
        negative_slope,
        residual_last,
        strassen,
        groups,
    )


def pack_matrix(matrix: Tensor) -> PackedConv:
    """A product of pixels and (C, K) float32."""
    return pack_conv(matrix.T[..., None, None])


def conv_engine(
    x: Tensor,
    conv: PackedConv,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    widen: bool = False,
) -> Tensor:
    """``activation(conv2d(x, weight, bias) + residual)`` with packed weights, without gradients;
    ``activation(conv2d(x, weight, bias)) + residual`` if packed with ``residual_last``.

    Args:
        x: (N, C, H, W) float32 or bfloat16 on the CPU, best in channels-last memory (else it is
            copied). Of bfloat16 the result is rounded once, to nearest even.
        conv: from ``pack_conv``.
        residual: (N, K, Ho, Wo), dtype of ``x``, to add, or None.
        out: (N, K, Ho, Wo), dtype of ``x``, or float32 where :func:`can_widen`, to write to, with
            channel stride 1: a slice of channels of a larger channels-last tensor makes a
            concatenation free.
        scale: (N, C, 1, 1), dtype of ``x``, by which its channels are multiplied first, or None.
            For 1x1 kernels of one group, without stride, padding and Strassen's algorithm.
        widen: make a float32 result, not rounded, of a bfloat16 ``x``. Where :func:`can_widen`.

    Returns:
        (N, K, Ho, Wo), dtype of ``x`` or float32, channels last; ``out`` if it was given.

    Raises:
        ValueError: shapes or dtypes do not match, or a gradient would be needed.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"conv_engine: x must be (N, {conv.in_channels}, H, W), got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "conv_engine: computes no gradients, call it under torch.no_grad() or use conv_bn_act"
        )
    x = channels_last(x)
    residual = channels_last(residual) if residual is not None else None
    scale = channels_last(scale) if scale is not None else None
    if out is None:
        return torch.ops.fastseg.conv_engine(
            x, conv.packed, residual, conv.out_channels, *conv.options(), scale, widen
        )
    torch.ops.fastseg.conv_engine_out(x, conv.packed, residual, out, *conv.options(), scale)
    return out


def can_widen(conv: PackedConv) -> bool:
    """Whether ``conv_engine`` makes float32 results of bfloat16 images with these weights."""
    products = conv.packed.dtype == torch.bfloat16
    return products and conv.groups == 1 and conv.tile not in (LINE, GROUPED)


def conv_engine_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    groups: int = 1,
) -> Tensor:
    """What ``conv_engine(x, pack_conv(weight, bias, ...), residual)`` means, in plain PyTorch."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is None:
        return activate(y, activation, negative_slope)
    if residual_last:
        return activate(y, activation, negative_slope) + residual
    return activate(y + residual, activation, negative_slope)


def activate(y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of that name, in plain PyTorch."""
    return ACTIVATIONS[activation](y, negative_slope)


@torch.library.register_fake("fastseg::conv_engine_pack")
def _(
    weight: Tensor,
    bias: Tensor | None,
    tile: int,
    bfloat16: bool = False,
    strassen: int = 0,
    groups: int = 1,
) -> Tensor:
    K, C, R, S = weight.shape
    parts = 1 if tile == GROUPED else groups
    K //= parts
    per_word = 2 if bfloat16 else 1
    columns, depth = K, round_up(C, 16 * per_word)
    if tile == 0:
        depth = round_up(C * R * S, 16 * per_word)
    elif tile == GROUPED:
        depth = C * R * S
    elif tile == LINE:
        m = 3 if bfloat16 else 5  # F(m, m)
        columns, depth = -(-R * S // m) * K, (2 * m - 1) * depth
    else:
        depth = TILES[tile][3] ** 2 * depth
    size = round_up(columns, 32) * depth
    if strassen:
        size = size // 4 * 7
    size += round_up(K, 32) * per_word
    return weight.new_empty(parts * size, dtype=torch.bfloat16 if bfloat16 else torch.float32)


@torch.library.register_fake("fastseg::conv_engine")
def _(
    x, packed, residual, out_channels, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h,
    dilation_w, tile, activation, slope, residual_last=False, strassen=0, groups=1, scale=None,
    widen=False,
):  # fmt: skip
    geometry = ((R, S), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    Ho, Wo = output_size(x.shape[2:], *geometry)
    dtype = torch.float32 if widen else x.dtype
    return x.new_empty((x.shape[0], Ho, Wo, out_channels), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.register_fake("fastseg::conv_engine_out")
def _(
    x, packed, residual, out, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile,
    activation, slope, residual_last=False, strassen=0, groups=1, scale=None,
):  # fmt: skip
    return None


@torch.library.register_fake("fastseg::widen")
def _(x):
    return empty_image(x, x.shape, torch.float32)
