"""One training step of a convolution, batch norm and activation: by the kernels of a plan, by those
of CUDA or in torch's operators.

Memory: from forward to backward a layer keeps its input and the convolution's output, neither that
of the batch norm nor a mask. Images, packed weights and sums come from the pool of workspaces,
which keeps what is freed, 256 MiB at most, but no array much larger than an image; per thread stays
a buffer for each kind of kernel that ran, the largest for transformed tiles: up to four times the
second-level cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from ._conv_options import Geometry, allows_tf32, output_size
from ._layout import empty_image
from .conv_act import channel_sums
from .conv_bn_autograd import stats_dtype
from .conv_train import TORCH, UNFUSED, TrainingKernels, conv_format, fits_in_place


class StepPlan(NamedTuple):
    """What a training step is once its arguments are checked."""

    geometry: Geometry
    groups: int
    values: int  # per channel
    slope: float
    kernels: TrainingKernels | None


def train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    plan: StepPlan,
) -> Tensor:
    if plan.kernels == UNFUSED:
        norm = (bn_weight, bn_bias, running_mean, running_var)
        z = _train_by_torch(x, weight, bias, norm, residual, momentum, eps, plan)
        _raise_version(running_mean, running_var)
        return z
    inputs = (x, weight, bias, bn_weight, bn_bias, residual)
    options = (*plan.geometry, plan.groups, eps, plan.slope)
    if plan.kernels is None:
        z, _, mean, var = torch.ops.fastseg.conv_bn_act(*inputs, *options, allows_tf32(x))
    elif torch.compiler.is_compiling() or isinstance(momentum, Tensor):
        z, mean, var = TrainingStep.apply(*inputs, (None, None, 0.0), options, plan.kernels)
    else:
        running = (running_mean, running_var, momentum)
        z = TrainingStep.apply(*inputs, running, options, plan.kernels)[0]
        _raise_version(running_mean, running_var)
        return z
    update_running(running_mean, mean, momentum)
    update_running(running_var, var * (plan.values / (plan.values - 1)), momentum)
    return z


def _raise_version(*tensors: Tensor | None) -> None:
    """Says that kernels moved these, which is how folded weights learn of it."""
    if not torch.compiler.is_compiling():
        increment_version([t for t in tensors if t is not None])


def torch_takes(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
) -> bool:
    """Whether torch's batch norm takes these arguments as they are."""
    tensors = (bn_weight, bn_bias, running_mean, running_var)
    return (
        not isinstance(momentum, Tensor)
        and (running_mean is None) == (running_var is None)
        and all(t is None or t.dtype == x.dtype for t in tensors)
    )


def _train_by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    residual: Tensor | None,
    momentum: Any,
    eps: float,
    plan: StepPlan,
) -> Tensor:
    """A step in torch's operators, which keeps no more than the fused one."""
    scale, shift, mean, var = norm
    if not torch.compiler.is_compiling():
        # The graph keeps the running statistics: a later step, which raises their version, would be
        # an error in its backward.
        mean, var = (None if t is None else t.data for t in (mean, var))
    z = F.conv2d(x, weight, bias, *plan.geometry, plan.groups)
    z = torch.batch_norm(z, scale, shift, mean, var, True, momentum, eps, False)
    if residual is not None:
        z = z.add_(residual)
    if plan.slope == 1:
        return z
    return F.relu_(z) if plan.slope == 0 else F.leaky_relu_(z, plan.slope)


def update_running(running: Tensor | None, batch: Tensor, momentum: float | Tensor) -> None:
    """Moves a running statistic, unless None, towards that of a batch."""
    if running is not None:
        if isinstance(momentum, Tensor):
            momentum = momentum.to(running.dtype)
        running.lerp_(batch if batch.dtype == running.dtype else batch.to(running.dtype), momentum)


class TrainingStep(torch.autograd.Function):
    """``activation(batch_norm(conv2d(x, weight, bias)) + residual)`` with the statistics of the
    batch: (z, mean, variance), of which z is differentiable once. ``running``: the running mean and
    variance that it moves, or None, and the momentum; ``options``: stride, padding, dilation,
    groups, eps, slope of the activation."""

    # With setup_context apply() inspects the signature in every call, 60 us.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None, float],
        options: tuple[Sequence[int], Sequence[int], Sequence[int], int, float, float],
        kernels: TrainingKernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tile, *gradient_tiles = kernels
        z, y, mean, var = torch.ops.fastseg.train_step(
            x, weight, bias, bn_weight, bn_bias, residual, *running, *options, tile
        )
        slope = options[-1]
        ctx.options, ctx.gradient_tiles = options, gradient_tiles
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        # Neither z nor a mask: the backward recomputes the sign from y. With no activation the
        # residual is not needed either.
        ctx.with_residual = residual is not None
        ctx.save_for_backward(
            x, weight, y, mean, var, bn_weight, bn_bias, residual if slope != 1 else None
        )
        return z, mean, var

    @staticmethod
    def backward(ctx, dz, *_):
        x, weight, y, mean, var, bn_weight, bn_bias, residual = ctx.saved_tensors
        nothing = (None,) * 3
        if dz is None:
            return *(None,) * 6, *nothing
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained: y goes first
        *geometry, groups, eps, slope = ctx.options
        dy, dbn_weight, dbn_bias, dresidual = torch.ops.fastseg.bn_act_backward(
            dz, y, mean, var, bn_weight, bn_bias, residual, eps, slope
        )
        del y
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if torch.is_grad_enabled():  # for second derivatives, which torch's op has
            dx, dweight, dbias = torch.ops.aten.convolution_backward(
                dy,
                x,
                weight,
                [weight.shape[0]],
                *geometry,
                False,
                [0, 0],
                groups,
                [need_x, need_weight, need_bias],
            )
        else:
            if need_bias:
                dbias = channel_sums(dy)
            step, tiles = (dy, x, weight, *geometry), ctx.gradient_tiles
            in_place = need_x and not torch.compiler.is_compiling()
            if in_place and fits_in_place(dy, x, tiles[0], *geometry[1:]):
                dweight = torch.ops.fastseg.train_conv_backward_in_place(*step, *tiles, need_weight)
                dx = dy
            elif need_x or need_weight:
                dx, dweight = torch.ops.fastseg.train_conv_backward(
                    *step, groups, *tiles, need_x, need_weight
                )
        if residual is None:
            dresidual = dz if ctx.with_residual else None
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias,
            _like(dbn_weight, bn_weight),
            _like(dbn_bias, bn_bias),
            dresidual,
            *nothing,
        )


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    if parameter is None or parameter.dtype == gradient.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)


@torch.library.register_fake("fastseg::train_conv")
def _(x, weight, bias, stride, padding, dilation, groups, tile):
    if tile == TORCH:
        return torch.ops.aten.convolution(
            x, weight, bias, stride, padding, dilation, False, [0, 0], groups
        )
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    return y.contiguous(memory_format=conv_format(x, weight))


@torch.library.register_fake("fastseg::train_step")
def _(x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var, momentum, *options):
    *geometry, groups, _, _, tile = options
    y = torch.ops.fastseg.train_conv(x, weight, bias, *geometry, groups, tile)
    stats = [y.new_empty(y.shape[1], dtype=stats_dtype(y)) for _ in range(2)]
    return torch.empty_like(y), y, *stats


@torch.library.register_fake("fastseg::train_conv_backward_in_place")
def _(dy, x, weight, stride, padding, dilation, input_tile, weight_tile, need_weight):
    return empty_image(weight, weight.shape) if need_weight else x.new_empty(0)


@torch.library.register_fake("fastseg::train_conv_backward")
def _(
    dy, x, weight, stride, padding, dilation, groups, input_tile, weight_tile, need_x, need_weight
):
    return tuple(
        empty_image(t, t.shape) if needed else x.new_empty(0)
        for t, needed in ((x, need_x), (weight, need_weight))
    )
