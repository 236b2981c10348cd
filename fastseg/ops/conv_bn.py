"""Convolution + batch norm + activation + residual: what segmentation networks are made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import empty_image
from .winograd_conv import training_tile, winograd_conv2d

IntPair = int | tuple[int, ...]  # one number, or (height, width)

ACTIVATIONS = ("relu", "leaky_relu", "none")


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    accuracy: str = "default",
) -> Tensor:
    """``activation(batch_norm(conv2d(x, weight, bias)) + residual)`` with one pass after the
    convolution (inference: the batch norm is folded into the weights).

    Equivalent to ``conv_bn_act_reference``. Ioffe and Szegedy 2015; dilation: Yu and Koltun 2016.

    Args:
        x: (N, C_in, H, W), float32, float64, bfloat16 or float16, contiguous or channels-last.
        weight: (C, C_in / groups, kh, kw), dtype of ``x``.
        bias: (C,) or None, dtype of ``x``.
        bn_weight, bn_bias: (C,) scale and shift of the batch norm; None is 1 and 0.
        running_mean, running_var: (C,). Used if not ``training``; in training, updated in place
            unless None.
        residual: shape and dtype of the result, added before the activation.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, padding "same" and
            "valid" included.
        training: normalise by the statistics of this batch.
        momentum: weight of this batch in the running statistics; a 0-d tensor is allowed.
        eps: added to the variance.
        activation: "relu", "leaky_relu" or "none".
        negative_slope: of "leaky_relu", at least 0.
        accuracy: "default" lets training on the CPU in float32 use Winograd's F(4, 3) for 3x3
            kernels of channels-last input, with an error of at most 1e-5 of the largest value in
            the convolution and its gradients; "strict" always takes torch's convolution.

    Returns:
        (N, C, H', W') in the dtype and memory format that conv2d gives. Differentiable in ``x``,
        the weights, biases and ``residual``. Under autocast, ``x``, ``weight``, ``bias`` and
        ``residual`` are cast to the autocast dtype; statistics are taken in float32 (float64 for
        float64 inputs). On CUDA, float32 may be computed in TF32 where
        ``torch.backends.cudnn.allow_tf32`` is set, and channels-last inputs get our convolution
        where it is expected to be faster than cuDNN's.

    Raises:
        ValueError: shapes, dtypes or options do not fit together, or one value per channel in
            training.
    """
    _check(x, weight, bias, stride, padding, dilation, groups, activation, negative_slope)
    if accuracy not in ("default", "strict"):
        raise ValueError(f'conv_bn_act: accuracy must be "default" or "strict", got {accuracy!r}')
    C = weight.shape[0]
    for name, value in (
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if value is not None and value.shape != (C,):
            raise ValueError(
                f"conv_bn_act: {name} must have shape ({C},), got {tuple(value.shape)}"
            )
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "conv_bn_act: running_mean and running_var must be given unless training"
            )
        folded = fold_bn(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
        return _conv_act(
            x, *folded, residual, stride, padding, dilation, groups, activation, negative_slope
        )
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    x, pads = _explicit_padding(x, weight, padding, dilation)
    geometry = (_pair(stride), pads, _pair(dilation))
    H, W = _output_size(x, weight, *geometry)
    _check_residual(residual, x, (x.shape[0], C, H, W))
    count = x.shape[0] * H * W
    if count == 1:
        raise ValueError(
            "conv_bn_act: training needs more than 1 value per channel, "
            f"got an output of {(x.shape[0], C, H, W)}"
        )
    if count == 0:  # nothing to take statistics of
        return F.conv2d(x, weight, bias, *geometry, groups)
    slope = _slope(activation, negative_slope)
    tile = training_tile(x, weight, *geometry, groups, accuracy)
    if tile:
        y = winograd_conv2d(x, weight, bias, *geometry[1:], tile)
        z, mean, var = torch.ops.fastseg.bn_act_stats(y, bn_weight, bn_bias, residual, eps, slope)
    else:
        z, _, mean, var = torch.ops.fastseg.conv_bn_act(
            x,
            weight,
            bias,
            bn_weight,
            bn_bias,
            residual,
            *geometry,
            groups,
            eps,
            slope,
            _allow_tf32(x),
        )
    update_running(running_mean, mean, momentum)
    update_running(running_var, var * (count / (count - 1)), momentum)
    return z


@torch.no_grad()
def update_running(running: Tensor | None, batch: Tensor, momentum: float | Tensor) -> None:
    """Moves a running statistic, unless None, towards that of a batch."""
    if running is not None:
        if isinstance(momentum, Tensor):
            momentum = momentum.to(running.dtype)
        running.lerp_(batch.to(running.dtype), momentum)


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
    _check(x, weight, bias, stride, padding, dilation, groups, activation, negative_slope)
    return _conv_act(
        x, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
    )


def conv_bn_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """What conv_bn_act means, in plain PyTorch."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return F.leaky_relu(z, _slope(activation, negative_slope)) if activation != "none" else z


def _conv_act(
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
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    x, pads = _explicit_padding(x, weight, padding, dilation)
    geometry = (_pair(stride), pads, _pair(dilation))
    if residual is not None:
        size = _output_size(x, weight, *geometry)
        _check_residual(residual, x, (x.shape[0], weight.shape[0], *size))
    return torch.ops.fastseg.conv_act(
        x,
        weight,
        bias,
        residual,
        *geometry,
        groups,
        _slope(activation, negative_slope),
        _allow_tf32(x),
    )


def _pair(value: IntPair) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _slope(activation: str, negative_slope: float) -> float:
    """The activation as one number for the kernels: f(t) = t if t > 0 else slope * t."""
    return {"relu": 0.0, "none": 1.0}.get(activation, negative_slope)


def _allow_tf32(x: Tensor) -> bool:
    """Whether our CUDA kernels may compute float32 in TF32, as cuDNN would."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "conv_bn_act: x and weight must have 4 dimensions (N, C, H, W), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    C = weight.shape[0]
    if groups < 1 or x.shape[1] != groups * weight.shape[1] or C % groups:
        raise ValueError(
            "conv_bn_act: channels must be C_in = groups * weight.shape[1] and groups must divide "
            f"C, got C_in = {x.shape[1]}, weight {tuple(weight.shape)}, groups {groups}"
        )
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"conv_bn_act: bias must have shape ({C},), got {tuple(bias.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"conv_bn_act: x must be floating point, got {x.dtype}")
    if not torch.is_autocast_enabled(x.device.type) and weight.dtype != x.dtype:
        raise ValueError(
            f"conv_bn_act: x and weight must have one dtype, got {x.dtype} and {weight.dtype}"
        )
    for name, value, least in (("stride", stride, 1), ("dilation", dilation, 1)):
        if min(_pair(value)) < least:
            raise ValueError(f"conv_bn_act: {name} must be at least {least}, got {value}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'conv_bn_act: padding must be "same", "valid" or int, got {padding}')
        if padding == "same" and max(_pair(stride)) > 1:
            raise ValueError(f'conv_bn_act: padding "same" needs stride 1, got {stride}')
    elif min(_pair(padding)) < 0:
        raise ValueError(f"conv_bn_act: padding must not be negative, got {padding}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_bn_act: activation must be one of {ACTIVATIONS}, got {activation}")
    if negative_slope < 0:
        raise ValueError(f"conv_bn_act: negative_slope must be at least 0, got {negative_slope}")


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Casts to the autocast dtype where autocast is on, like torch's convolutions."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    return (
        x.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if residual is None else residual.to(dtype),
    )


def _explicit_padding(
    x: Tensor, weight: Tensor, padding: IntPair | str, dilation: IntPair
) -> tuple[Tensor, tuple[int, int]]:
    """Padding as (height, width); what "same" adds on one side only is padded to x here."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        return x, _pair(padding)  # type: ignore[arg-type]
    d = _pair(dilation)
    total_h, total_w = d[0] * (weight.shape[2] - 1), d[1] * (weight.shape[3] - 1)
    if total_h % 2 or total_w % 2:
        x = F.pad(x, (0, total_w % 2, 0, total_h % 2))
    return x, (total_h // 2, total_w // 2)


def _output_size(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    H, W = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    )
    if H < 1 or W < 1:
        raise ValueError(
            "conv_bn_act: the dilated kernel must fit into the padded input, "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    return H, W


def _check_residual(residual: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"conv_bn_act: residual must be {shape} {x.dtype} like the result, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def _stats_dtype(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _conv_backward(
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
        dy.sum((0, 2, 3)) if need_bias else None,
    )


# fastseg::conv_act


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
        grads = _conv_backward(ctx, g, x, weight)
    return *grads, g if ctx.needs_input_grad[3] else None, *(None,) * 6


torch.library.register_autograd(
    "fastseg::conv_act", _conv_act_backward, setup_context=_conv_act_setup
)


# fastseg::conv_bn_act


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
    stats = [y.new_empty(y.shape[1], dtype=_stats_dtype(y)) for _ in range(2)]
    return torch.empty_like(y), y, *stats


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


@torch.library.register_fake("fastseg::bn_act_backward")
def _(dz, y, mean, var, bn_weight, bn_bias, residual, eps, slope):
    dresidual = torch.empty_like(y) if residual is not None else y.new_empty(0)
    return torch.empty_like(y), torch.empty_like(mean), torch.empty_like(var), dresidual


def _bn_gradients(
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
    dy, *rest = _bn_gradients(ctx, dz, y, mean, var, bn_weight, bn_bias, residual)
    grads = (None, None, None)
    if any(ctx.needs_input_grad[:3]):
        grads = _conv_backward(ctx, dy, x, weight)
    return *grads, *rest, *nothing[6:]


torch.library.register_autograd(
    "fastseg::conv_bn_act", _conv_bn_act_backward, setup_context=_conv_bn_act_setup
)


# fastseg::bn_act_stats: fastseg::conv_bn_act without its convolution


@torch.library.register_fake("fastseg::bn_act_stats")
def _(y, bn_weight, bn_bias, residual, eps, slope):
    stats = [y.new_empty(y.shape[1], dtype=_stats_dtype(y)) for _ in range(2)]
    return torch.empty_like(y), *stats


def _bn_act_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    y, bn_weight, bn_bias, residual, ctx.eps, ctx.slope = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.with_residual = residual is not None
    ctx.save_for_backward(y, mean, var, bn_weight, bn_bias, residual if ctx.slope != 1 else None)


def _bn_act_backward(ctx, dz, *_):
    y, mean, var, bn_weight, bn_bias, residual = ctx.saved_tensors
    if dz is None:
        return (None,) * 6
    return *_bn_gradients(ctx, dz, y, mean, var, bn_weight, bn_bias, residual), None, None


torch.library.register_autograd(
    "fastseg::bn_act_stats", _bn_act_backward, setup_context=_bn_act_setup
)
