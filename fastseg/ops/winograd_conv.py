"""The 3x3 convolution of training on the CPU: forward and gradient of the input by Winograd's
F(4, 3), whose transform of the weights is part of every call; gradient of the weights by torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._layout import image_layout
from .conv_engine import choose_tile, conv_engine, pack_conv


def training_tile(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    accuracy: str,
) -> int:
    """The tile by which ``winograd_conv2d`` trains this convolution, 0 where torch's is as fast.

    For float32 in channels-last memory, error at most 1e-5 of the largest value in outputs and
    gradients; ``accuracy="strict"`` and every other dtype and layout stay with torch. Transformed
    weights cost as much as some 200 pixels of the convolution.
    """
    served = (
        accuracy == "default"
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and groups == 1
        and weight.shape[2:] == (3, 3)
        and all(p <= 2 * d for p, d in zip(padding, dilation, strict=True))
        and image_layout(x) == torch.channels_last
        and min(weight.shape[:2]) >= 32
    )
    if not served or x.shape[0] * x.shape[2] * x.shape[3] < 1024:
        return 0
    K, C = weight.shape[:2]
    tile = choose_tile(C, K, (3, 3), x.shape[2:], stride, padding, dilation)
    return min(tile, 4)  # F(6, 3) rounds more


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    """``F.conv2d(x, weight, bias, 1, padding, dilation)`` for what ``training_tile`` serves, in
    channels-last memory. Differentiable once in ``x``, ``weight`` and ``bias``."""
    return torch.ops.fastseg.winograd_conv(x, weight, bias, list(padding), list(dilation), tile)


@torch.library.custom_op("fastseg::winograd_conv", mutates_args=())
def _winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    vertical, horizontal = padding
    packed = pack_conv(
        weight,
        bias,
        padding=(vertical, horizontal),
        dilation=(dilation[0], dilation[1]),
        tile=tile,
    )
    return conv_engine(x, packed)


@_winograd_conv.register_fake
def _(x, weight, bias, padding, dilation, tile):
    H, W = (n + 2 * p - 2 * d for n, p, d in zip(x.shape[2:], padding, dilation, strict=True))
    return x.new_empty(x.shape[0], H, W, weight.shape[0]).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, ctx.padding, ctx.dilation, ctx.tile = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = dweight = None
    if need_weight:  # first: torch takes the memory of several maps, dx would lie beside them
        geometry = ([1, 1], ctx.padding, ctx.dilation, False, [0, 0], 1)
        dweight = torch.ops.aten.convolution_backward(
            dy, x, weight, None, *geometry, [False, True, False]
        )[1]
    if need_x:  # the same kind of convolution, turned round
        turned = weight.flip(2, 3).transpose(0, 1)
        padding = [2 * d - p for p, d in zip(ctx.padding, ctx.dilation, strict=True)]
        dx = torch.ops.fastseg.winograd_conv(dy, turned, None, padding, ctx.dilation, ctx.tile)
    return dx, dweight, dy.sum((0, 2, 3)) if need_bias else None, None, None, None


_winograd_conv.register_autograd(_backward, setup_context=_setup_context)
