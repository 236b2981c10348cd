"""The convolution of training on the CPU in float32, by the convolution engine: its packing of the
weights is part of every call. The same bits for any number of threads."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_options import output_size
from ._layout import image_layout
from .conv_act import channel_sums
from .conv_choice import choose_tile
from .conv_engine import channels_last, conv_engine, pack_conv


def training_tile(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    accuracy: str,
) -> int | None:
    """The algorithm by which ``train_conv2d`` computes this convolution: the tile of Winograd's for
    3x3 kernels, with an error of at most 1e-5 of the largest value in outputs and gradients; 0 for
    the matrix product, where that is as fast or ``accuracy`` is "strict". None where torch's
    convolution trains: for other dtypes, devices and in groups, and instead of the matrix product
    for NCHW images, whose conversions would take as long (64 to 64 channels: step 41 instead of
    17 ms).

    Transformed weights cost as much as some 200 pixels of the convolution.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or groups != 1:
        return None
    winograd = (
        accuracy == "default"
        and weight.shape[2:] == (3, 3)
        and all(p <= 2 * d for p, d in zip(padding, dilation, strict=True))
        and min(weight.shape[:2]) >= 32
        and x.shape[0] * x.shape[2] * x.shape[3] >= 1024
    )
    tile = 0
    if winograd:
        K, C = weight.shape[:2]
        tile = choose_tile(C, K, (3, 3), x.shape[2:], stride, padding, dilation)
    if tile == 0 and _format(x, weight) != torch.channels_last:
        return None
    return min(tile, 4)  # F(6, 3) rounds more


def train_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation)`` for what ``training_tile`` serves,
    in the memory format that conv2d gives. Differentiable once in ``x``, ``weight``, ``bias``."""
    return torch.ops.fastseg.train_conv(
        x, weight, bias, list(stride), list(padding), list(dilation), tile
    )


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """conv2d gives channels last if the input or the weight is."""
    for t in (x, weight):
        if t.shape[1] > 1 and t.stride(1) == 1 and t.stride(3) >= t.shape[1]:
            return torch.channels_last
    return torch.contiguous_format


@torch.library.custom_op("fastseg::train_conv", mutates_args=())
def _train_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    packed = pack_conv(
        weight,
        bias,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        tile=tile,
    )
    return conv_engine(x, packed).contiguous(memory_format=_format(x, weight))


@_train_conv.register_fake
def _(x, weight, bias, stride, padding, dilation, tile):
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    return y.contiguous(memory_format=_format(x, weight))


@torch.library.custom_op("fastseg::train_conv_input_gradient", mutates_args=())
def _input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    """The gradient of ``x``: for each phase of the input modulo the stride the convolution of dy
    with the taps that meet it, turned round."""
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dy = channels_last(dy)
    axes = [
        _phases(*axis)
        for axis in zip(
            x.shape[2:], dy.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    for rows, taps_y, (top, bottom), step_y in axes[0]:
        for columns, taps_x, (left, right), step_x in axes[1]:
            out = dx[:, :, rows, columns]
            turned = weight[:, :, taps_y, taps_x].flip(2, 3).transpose(0, 1)
            if out.numel() == 0 or turned.numel() == 0:
                out.zero_()
                continue
            source, pads = dy, (top, left)
            if (top, left) != (bottom, right) or min(pads) < 0:
                source, pads = F.pad(dy, (left, right, top, bottom)), (0, 0)
            packed = pack_conv(turned, padding=pads, dilation=(step_y, step_x), tile=tile)
            conv_engine(source, packed, out=out)
    return dx.contiguous(memory_format=image_layout(x))


def _phases(size: int, out: int, taps: int, stride: int, padding: int, dilation: int) -> list:
    """Along one axis, for each phase: its positions in x, its taps, the padding of dy before and
    behind, and the distance of the taps on dy.

    Position ``phase + stride * j`` meets tap r at ``(phase + padding - r * dilation) / stride + j``
    of dy, where that is whole: for every ``period``-th tap from ``first`` on.
    """
    period = stride // math.gcd(stride, dilation)
    phases = []
    for phase in range(stride):
        first = next(
            (r for r in range(period) if (phase + padding - r * dilation) % stride == 0), taps
        )
        count = len(range(first, taps, period))
        step = period * dilation // stride
        begin = (phase + padding - first * dilation) // stride
        positions = len(range(phase, size, stride))
        pads = ((count - 1) * step - begin, positions + begin - out)
        phases.append((slice(phase, None, stride), slice(first, None, period), pads, step))
    return phases


@_input_gradient.register_fake
def _(dy, x, weight, stride, padding, dilation, tile):
    return torch.empty_like(x).contiguous(memory_format=image_layout(x))


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, *ctx.geometry, ctx.tile = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    nothing = (None,) * 4
    if torch.is_grad_enabled():  # for second derivatives, which torch's op has
        grads = torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            [weight.shape[0]],
            *ctx.geometry,
            False,
            [0, 0],
            1,
            [need_x, need_weight, need_bias],
        )
        return *grads, *nothing
    dx = dweight = None
    if need_weight:  # first: dx would lie beside its scratch memory
        dweight = torch.ops.fastseg.conv_weight_gradient(
            dy, x, weight, *ctx.geometry, ctx.tile != 0
        )
    if need_x:
        dx = torch.ops.fastseg.train_conv_input_gradient(dy, x, weight, *ctx.geometry, ctx.tile)
    return dx, dweight, channel_sums(dy) if need_bias else None, *nothing


_train_conv.register_autograd(_backward, setup_context=_setup_context)
