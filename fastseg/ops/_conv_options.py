"""Arguments of the convolutions with an epilogue: checked, and in the form that the ops take."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | tuple[int, ...]  # one number, or (height, width)
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation

ACTIVATIONS = ("relu", "leaky_relu", "none")


def pair(value: IntPair) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution of an input (H, W)."""
    Ho, Wo = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return Ho, Wo


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def slope_of(activation: str, negative_slope: float) -> float:
    """The activation as one number for the kernels: f(t) = t if t > 0 else slope * t."""
    return {"relu": 0.0, "none": 1.0}.get(activation, negative_slope)


def allows_tf32(x: Tensor) -> bool:
    """Whether our CUDA kernels may compute float32 in TF32, as cuDNN would."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def check_convolution(
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
        if min(pair(value)) < least:
            raise ValueError(f"conv_bn_act: {name} must be at least {least}, got {value}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'conv_bn_act: padding must be "same", "valid" or int, got {padding}')
        if padding == "same" and max(pair(stride)) > 1:
            raise ValueError(f'conv_bn_act: padding "same" needs stride 1, got {stride}')
    elif min(pair(padding)) < 0:
        raise ValueError(f"conv_bn_act: padding must not be negative, got {padding}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_bn_act: activation must be one of {ACTIVATIONS}, got {activation}")
    if negative_slope < 0:
        raise ValueError(f"conv_bn_act: negative_slope must be at least 0, got {negative_slope}")


def op_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Geometry, tuple[int, ...]]:
    """The tensors as the ops take them, cast by autocast and with explicit padding; the geometry;
    and the shape of the result, which the residual has too."""
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    x, pads = _explicit_padding(x, weight, padding, dilation)
    geometry = (pair(stride), pads, pair(dilation))
    Ho, Wo = output_size(x.shape[2:], weight.shape[2:], *geometry)
    if Ho < 1 or Wo < 1:
        raise ValueError(
            "conv_bn_act: the dilated kernel must fit into the padded input, "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    shape = (x.shape[0], weight.shape[0], Ho, Wo)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"conv_bn_act: residual must be {shape} {x.dtype} like the result, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    return x, weight, bias, residual, geometry, shape


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
        return x, pair(padding)  # type: ignore[arg-type]
    d = pair(dilation)
    total_h, total_w = d[0] * (weight.shape[2] - 1), d[1] * (weight.shape[3] - 1)
    if total_h % 2 or total_w % 2:
        x = F.pad(x, (0, total_w % 2, 0, total_h % 2))
    return x, (total_h // 2, total_w // 2)
