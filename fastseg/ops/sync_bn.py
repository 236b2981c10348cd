"""conv_bn_act with the statistics of all processes of a group, each of which has a part of the
batch: the counterpart of SyncBatchNorm for the fused layer.

Forward: convolution with local statistics, one exchange of (count, mean, M2), one pass for batch
norm, residual and activation. Backward: one pass for the sums, their exchange, one pass for the
gradient of the convolution's output. What is exchanged is joined in the order of the ranks, so that
all processes compute the same bits.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._conv_options import IntPair, allows_tf32, check_convolution, op_arguments, slope_of
from .conv_act import conv_backward
from .conv_bn_autograd import stats_dtype
from .conv_step import update_running


def sync_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    process_group: Any = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """``conv_bn_act(..., training=True)`` on the batch that the processes of a group have together;
    every one of them must call it, if with an empty batch.

    Arguments, result and errors are those of ``conv_bn_act``, and ``process_group``; None is all
    processes. Gradients of the parameters are those of the own part, for DistributedDataParallel to
    average.
    """
    check_convolution(
        x, weight, bias, stride, padding, dilation, groups, activation, negative_slope
    )
    x, weight, bias, residual, geometry, _ = op_arguments(
        x, weight, bias, residual, stride, padding, dilation
    )
    z, mean, var, count = _SyncConvBnAct.apply(
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        process_group,
        geometry,
        groups,
        eps,
        slope_of(activation, negative_slope),
        allows_tf32(x),
    )
    update_running(running_mean, mean, momentum)
    update_running(running_var, var * (count / (count - 1)), momentum)
    return z


def merge_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all from those of parts, by the method of Chan et al.

    Args:
        stats: (parts, 2 C + 1): count, C means, C biased variances of each part.

    Returns:
        mean (C,), biased variance (C,), count (1,), the last being at least 1.
    """
    count, mean, var = stats.double().split([1, *[(stats.shape[1] - 1) // 2] * 2], 1)
    total = count.sum(0).clamp(min=1)
    share = count / total
    merged = (share * mean).sum(0)
    spread = (share * (var + (mean - merged).square())).sum(0)
    return merged.to(stats.dtype), spread.to(stats.dtype), total.to(stats.dtype)


def _gathered(mine: Tensor, group: Any) -> Tensor:
    """(processes, elements), in the order of the ranks."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group)
    return torch.stack(parts)


class _SyncConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        group,
        geometry,
        groups,
        eps,
        slope,
        tf32,
    ):
        y, mean, var = torch.ops.fastseg.conv_stats(x, weight, bias, *geometry, groups, tf32)
        own = mean.new_full((1,), y.numel() // y.shape[1])
        mean, var, count = merge_stats(_gathered(torch.cat([own, mean, var]), group))
        z = torch.ops.fastseg.bn_act(y, mean, var, bn_weight, bn_bias, residual, eps, slope)
        ctx.group, ctx.geometry, ctx.groups = group, geometry, groups
        ctx.eps, ctx.slope, ctx.allow_tf32 = eps, slope, tf32
        ctx.with_residual = residual is not None
        ctx.save_for_backward(
            *(x, weight, y, mean, var, count, bn_weight, bn_bias),
            residual if slope != 1 else None,
        )
        ctx.mark_non_differentiable(mean, var, count)
        return z, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, *_):
        x, weight, y, mean, var, count, bn_weight, bn_bias, residual = ctx.saved_tensors
        parameters = (y, mean, var, bn_weight, bn_bias)
        sums, g = torch.ops.fastseg.bn_act_backward_sums(
            dz, *parameters, residual, ctx.eps, ctx.slope
        )
        dbias, dweight = sums[0], sums[1] * torch.rsqrt(var + ctx.eps)
        sums = _gathered(sums.flatten(), ctx.group).double().sum(0).to(sums.dtype).view_as(sums)
        dy = torch.ops.fastseg.bn_act_backward_apply(
            dz if residual is None else g,
            residual is not None,
            *parameters,
            sums,
            count,
            ctx.eps,
            ctx.slope,
        )
        grads = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            grads = conv_backward(ctx, dy, x, weight)
        if residual is not None:
            dresidual = g
        else:
            dresidual = dz if ctx.with_residual else None
        return (
            *grads,
            None if bn_weight is None else dweight.to(bn_weight.dtype),
            None if bn_bias is None else dbias.to(bn_bias.dtype),
            dresidual,
            *(None,) * 6,
        )


# The halves on the CPU: what the passes of csrc/conv_bn/bn_act.cuh compute, in plain PyTorch.


@torch.library.impl("fastseg::conv_stats", "CPU")
def _(x, weight, bias, stride, padding, dilation, groups, allow_tf32=False):
    y = torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    if y.numel() == 0:
        zero = y.new_zeros(y.shape[1], dtype=stats_dtype(y))
        return y, zero, zero.clone()
    var, mean = torch.var_mean(y.to(stats_dtype(y)), (0, 2, 3), correction=0)
    return y, mean, var


@torch.library.impl("fastseg::bn_act", "CPU")
def _(y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    t = _normalized(y, mean, var, bn_weight, bn_bias, residual, eps)
    return torch.empty_like(y).copy_(F.relu(t) if slope == 0 else F.leaky_relu(t, slope))


@torch.library.impl("fastseg::bn_act_backward_sums", "CPU")
def _(dz, y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    g = _gate(dz, _normalized(y, mean, var, bn_weight, bn_bias, residual, eps), slope)
    centred = y.to(mean.dtype) - mean[:, None, None]
    sums = torch.stack([g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))])
    return sums, y.new_empty(0) if residual is None else torch.empty_like(y).copy_(g)


@torch.library.impl("fastseg::bn_act_backward_apply", "CPU")
def _(dz, gated, y, mean, var, bn_weight, bn_bias, sums, count, eps, slope):
    g = dz.to(mean.dtype)
    if not gated:
        g = _gate(dz, _normalized(y, mean, var, bn_weight, bn_bias, None, eps), slope)
    invstd = torch.rsqrt(var + eps)
    scale = invstd if bn_weight is None else invstd * bn_weight.to(invstd.dtype)
    share_g, share_gc = (sums / count)[:, :, None, None]
    centred = y.to(mean.dtype) - mean[:, None, None]
    dy = (g - share_g - centred * invstd.square()[:, None, None] * share_gc) * scale[:, None, None]
    return torch.empty_like(y).copy_(dy)


def _normalized(y, mean, var, bn_weight, bn_bias, residual, eps):
    """The batch norm in the dtype of the statistics, before the activation."""
    scale = torch.rsqrt(var + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(scale.dtype)
    t = (y.to(mean.dtype) - mean[:, None, None]) * scale[:, None, None]
    if bn_bias is not None:
        t = t + bn_bias.to(t.dtype)[:, None, None]
    return t if residual is None else t + residual


def _gate(dz, t, slope):
    g = dz.to(t.dtype)
    return torch.where(t <= 0, g * slope, g)


@torch.library.register_fake("fastseg::conv_stats")
def _(x, weight, bias, stride, padding, dilation, groups, allow_tf32=False):
    y = torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    return y, *(y.new_empty(y.shape[1], dtype=stats_dtype(y)) for _ in range(2))


@torch.library.register_fake("fastseg::bn_act")
def _(y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    return torch.empty_like(y)


@torch.library.register_fake("fastseg::bn_act_backward_sums")
def _(dz, y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    return mean.new_empty(2, y.shape[1]), (
        y.new_empty(0) if residual is None else torch.empty_like(y)
    )


@torch.library.register_fake("fastseg::bn_act_backward_apply")
def _(dz, gated, y, mean, var, bn_weight, bn_bias, sums, count, eps, slope):
    return torch.empty_like(y)
