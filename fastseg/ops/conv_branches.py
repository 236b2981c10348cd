"""Convolutions of one map at several dilations, concatenated: atrous spatial pyramid pooling."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_options import allows_tf32, slope_of
from ._layout import empty_image
from .conv_act import conv_act


def conv_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    tail: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """``activation(conv2d(x, weights[i], biases[i], padding="same", dilation=dilations[i]))`` for
    every branch, concatenated, for inference. On CUDA one launch that writes into the result.

    Equivalent to ``conv_branches_reference``. DeepLab v3, Chen et al. 2017, section 3.3.

    Args:
        x: (N, C, H, W), a floating dtype.
        weights: (K_i, C, R_i, S_i) each, odd kernel sizes, dtype of ``x``; batch norm folded in.
        biases: (K_i,) each.
        dilations: of each branch, in pixels.
        tail: (N, K, 1, 1) to append, repeated over the image, as it is.
        activation: "relu", "leaky_relu" or "none".
        negative_slope: of "leaky_relu", at least 0.

    Returns:
        (N, sum of K_i + K, H, W), dtype and layout of ``x``. Not differentiable. Under autocast all
        tensors are cast to the autocast dtype.

    Raises:
        ValueError: the arguments do not fit together, or a gradient would be needed.
    """
    if not len(weights) == len(biases) == len(dilations) > 0:
        raise ValueError(
            "conv_branches: every branch needs a weight, a bias and a dilation, got "
            f"{len(weights)}, {len(biases)} and {len(dilations)}"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, tail = x.to(dtype), None if tail is None else tail.to(dtype)
        weights, biases = ([t.to(dtype) for t in part] for part in (weights, biases))
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"conv_branches: weights must be (K, {x.shape[1]}, R, S) for x {tuple(x.shape)}, "
                f"got {tuple(weight.shape)}"
            )
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0 or dilation < 1:
            raise ValueError(
                "conv_branches: kernel sizes must be odd and dilations at least 1, got "
                f"{tuple(weight.shape[2:])} and {dilation}"
            )
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype or weight.dtype != x.dtype:
            raise ValueError(
                f"conv_branches: weight and bias must be {x.dtype} of equal channels, got "
                f"{tuple(weight.shape)} {weight.dtype} and {tuple(bias.shape)} {bias.dtype}"
            )
    if tail is not None and (tail.shape[0] != x.shape[0] or tail.shape[2:] != (1, 1)):
        raise ValueError(f"conv_branches: tail must be (N, K, 1, 1), got {tuple(tail.shape)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases)):
        raise ValueError("conv_branches: computes no gradients, call it under torch.no_grad()")
    return torch.ops.fastseg.conv_branches(
        x,
        list(weights),
        list(biases),
        list(dilations),
        tail,
        slope_of(activation, negative_slope),
        allows_tf32(x),
    )


def conv_branches_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    tail: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """What conv_branches means, in plain PyTorch."""
    maps = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        y = F.conv2d(x, weight, bias, padding="same", dilation=dilation)
        maps.append(F.leaky_relu(y, slope_of(activation, negative_slope)))
    if tail is not None:
        maps.append(tail.expand(-1, -1, *x.shape[2:]))
    return torch.cat(maps, 1)


@torch.library.register_fake("fastseg::conv_branches")
def _(x, weights, biases, dilations, tail, negative_slope, allow_tf32=False):
    channels = sum(weight.shape[0] for weight in weights)
    if tail is not None:
        channels += tail.shape[1]
    return empty_image(x, (x.shape[0], channels, *x.shape[2:]))


@torch.library.impl("fastseg::conv_branches", "CPU")
def _(x, weights, biases, dilations, tail, negative_slope, allow_tf32=False):
    channels = [weight.shape[0] for weight in weights]
    tail_channels = 0 if tail is None else tail.shape[1]
    z = empty_image(x, (x.shape[0], sum(channels) + tail_channels, *x.shape[2:]))
    options = {"activation": "leaky_relu", "negative_slope": negative_slope}
    for part, weight, bias, dilation in zip(
        z.split([*channels, tail_channels], 1), weights, biases, dilations, strict=False
    ):
        part.copy_(conv_act(x, weight, bias, padding="same", dilation=dilation, **options))
    if tail is not None:
        z[:, -tail_channels:] = tail
    return z
