"""Gradients of the batch norm and of the ops that conv_bn_act trains by."""

from typing import Any

import torch
from torch import Tensor

from .conv_act import conv_backward


def stats_dtype(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


@torch.library.register_fake("fastseg::conv_bn_act")
def _(
    x,
    weight,
    bias,
    bn_weight,
    bn_bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    eps,
    slope,
    allow_tf32=False,
):
    y = torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    stats = [y.new_empty(y.shape[1], dtype=stats_dtype(y)) for _ in range(2)]
    return torch.empty_like(y), y, *stats


@torch.library.register_fake("fastseg::bn_act_backward")
def _(dz, y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    dresidual = torch.empty_like(y) if residual is not None else y.new_empty(0)
    return torch.empty_like(y), torch.empty_like(mean), torch.empty_like(var), dresidual


def bn_gradients(
    ctx: Any,
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, bn_weight, bn_bias and the residual."""
    dy, dweight, dbias, dresidual = torch.ops.fastseg.bn_act_backward(
        dz, y, mean, var, bn_weight, bn_bias, residual, ctx.eps, ctx.slope
    )
    if residual is None:
        dresidual = dz if ctx.with_residual else None
    return (
        dy,
        None if bn_weight is None else dweight.to(bn_weight.dtype),
        None if bn_bias is None else dbias.to(bn_bias.dtype),
        dresidual,
    )


def _conv_bn_act_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, bn_weight, bn_bias, residual, *geometry = inputs[:9]
    ctx.geometry = geometry
    ctx.groups, ctx.eps, ctx.slope, ctx.allow_tf32 = inputs[9:]
    _, y, mean, var = output
    ctx.mark_non_differentiable(y, mean, var)
    ctx.set_materialize_grads(False)
    # Neither z nor a mask: the backward recomputes the sign from y. With no activation the
    # residual is not needed either.
    ctx.with_residual = residual is not None
    ctx.save_for_backward(
        x, weight, y, mean, var, bn_weight, bn_bias, residual if ctx.slope != 1 else None
    )


def _conv_bn_act_backward(ctx, dz, *_):
    x, weight, y, mean, var, bn_weight, bn_bias, residual = ctx.saved_tensors
    nothing = (None,) * 13
    if dz is None:
        return nothing
    dy, *rest = bn_gradients(ctx, dz, y, mean, var, bn_weight, bn_bias, residual)
    grads = (None, None, None)
    if any(ctx.needs_input_grad[:3]):
        grads = conv_backward(ctx, dy, x, weight)
    return *grads, *rest, *nothing[6:]


torch.library.register_autograd(
    "fastseg::conv_bn_act", _conv_bn_act_backward, setup_context=_conv_bn_act_setup
)
