"""Convolution + activation + residual, for inference behind a batch norm that was folded in."""

from typing import Any

import torch
from torch import Tensor

from ._conv_options import IntPair, allows_tf32, check_convolution, op_arguments, slope_of
from ._layout import empty_image


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """``activation(conv2d(x, weight, bias) + residual)``: ``conv_bn_act`` after ``fold_bn``.

    Arguments, result and errors are those of ``conv_bn_act``.
    """
    check_convolution(
        x, weight, bias, stride, padding, dilation, groups, activation, negative_slope
    )
    return conv_with_epilogue(
        x, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
    )


def fold_bn(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in the dtype of ``weight``, of the convolution that equals ``conv2d`` with
    ``weight`` and ``bias`` followed by batch norm with running statistics. Differentiable.

    Args:
        weight: (C, C_in / groups, kh, kw). All others: (C,); None as in ``conv_bn_act``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(wide) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight
    offset = -running_mean.to(wide) if bias is None else bias.to(wide) - running_mean
    shift = offset * scale
    if bn_bias is not None:
        shift = shift + bn_bias
    folded = weight.to(wide) * scale[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)


def conv_with_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    x, weight, bias, residual, geometry, _ = op_arguments(
        x, weight, bias, residual, stride, padding, dilation
    )
    return torch.ops.fastseg.conv_act(
        x,
        weight,
        bias,
        residual,
        *geometry,
        groups,
        slope_of(activation, negative_slope),
        allows_tf32(x),
    )


def conv_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution in x, weight and bias, those that are needed."""
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # for second derivatives, which torch's op has
        return torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            [weight.shape[0]],
            *ctx.geometry,
            False,
            [0, 0],
            ctx.groups,
            [need_x, need_weight, need_bias],
        )
    dx = dweight = None
    if need_x or need_weight:
        dx, dweight = torch.ops.fastseg.conv_backward(
            dy, x, weight, *ctx.geometry, ctx.groups, need_x, need_weight, ctx.allow_tf32
        )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        channel_sums(dy) if need_bias else None,
    )


def channel_sums(dy: Tensor) -> Tensor:
    """``dy.sum((0, 2, 3))``, on the CPU with the same bits for any number of threads."""
    if dy.device.type != "cpu" or torch.is_grad_enabled():
        return dy.sum((0, 2, 3))
    # The gradient of a weight that meets ones.
    one, shape = dy.new_ones(1, 1, 1, 1), (dy.shape[0], 1, *dy.shape[2:])
    sums = torch.ops.fastseg.conv_weight_gradient(
        dy, one.expand(shape), one.expand(dy.shape[1], 1, 1, 1), [1, 1], [0, 0], [1, 1]
    )
    return sums.flatten()


@torch.library.register_fake("fastseg::conv_backward")
def _(
    dy,
    x,
    weight,
    stride,
    padding,
    dilation,
    groups,
    need_x,
    need_weight,
    allow_tf32=False,
):
    return tuple(
        empty_image(t, t.shape) if needed else x.new_empty(0)
        for t, needed in ((x, need_x), (weight, need_weight))
    )


@torch.library.register_fake("fastseg::conv_weight_gradient")
def _(dy, x, weight, stride, padding, dilation, winograd=False):
    return empty_image(weight, weight.shape)


@torch.library.register_fake("fastseg::conv_act")
def _(
    x, weight, bias, residual, stride, padding, dilation, groups, negative_slope, allow_tf32=False
):
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )


def _conv_act_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, _, *geometry, ctx.groups, ctx.slope, ctx.allow_tf32 = inputs
    ctx.geometry = geometry
    # z > 0 exactly where its pre-activation is, so z serves as the mask; it is alive anyway.
    ctx.save_for_backward(x, weight, output if ctx.slope != 1 else None)


def _conv_act_backward(ctx, dz):
    x, weight, z = ctx.saved_tensors
    g = dz if z is None else torch.ops.aten.leaky_relu_backward(dz, z, ctx.slope, True)
    grads = (None, None, None)
    if any(ctx.needs_input_grad[:3]):
        grads = conv_backward(ctx, g, x, weight)
    return *grads, g if ctx.needs_input_grad[3] else None, *(None,) * 6


torch.library.register_autograd(
    "fastseg::conv_act", _conv_act_backward, setup_context=_conv_act_setup
)
