"""Convolution + batch norm + activation + residual: what segmentation networks are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv_bn_autograd as _autograd  # noqa: F401  registers fakes and gradients
from ._conv_options import IntPair, check_convolution, op_arguments, slope_of
from .conv_act import conv_with_epilogue, fold_bn
from .conv_step import StepPlan, torch_takes, train
from .conv_train import TORCH, UNFUSED, TrainingKernels, training_kernels

# By the signature of calls that were checked.
_plans: dict[tuple, StepPlan] = {}
MOST_PLANS = 4096


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
        accuracy: "default" lets training on the CPU use Winograd's F(4, 3) for 3x3 kernels, with an
            error of at most 1e-5 of the largest value in the convolution and its gradients in
            float32; "strict" takes what rounds no more than torch's convolution.

    Returns:
        (N, C, H', W') in the dtype and memory format that conv2d gives. Differentiable in ``x``,
        the weights, biases and ``residual``. Under autocast, ``x``, ``weight``, ``bias`` and
        ``residual`` are cast to the autocast dtype; statistics are taken in float32 (float64 for
        float64 inputs). On CUDA, float32 may be computed in TF32 where
        ``torch.backends.cudnn.allow_tf32`` is set, and channels-last inputs get our convolution
        where it is expected to be faster than cuDNN's.
        On the CPU the engine of ``conv_engine`` or torch computes the convolution and each of its
        gradients, whichever is expected to be faster (``conv_train.training_kernels``). What the
        engine computes, and the batch norm, has the same bits for any number of threads; torch's
        gradient of the weight may not. With ``torch.use_deterministic_algorithms(True)`` the engine
        computes all that it can: float32 and bfloat16 with one group, the gradient of the weight in
        any dtype. Convolutions in groups, and those of float64 and float16 but for that gradient,
        are torch's in any case, whose bits may depend on the number of threads; without that flag
        so are small float32 layers, batch norm included.

    Raises:
        ValueError: shapes, dtypes or options do not fit together, or one value per channel in
            training.
    """
    tensors = (x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual)
    signature = None
    if (
        training
        and type(x) is Tensor
        and x.is_cpu
        and list not in (type(stride), type(padding), type(dilation))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        # Behind the convolution of another layer, whose data filled the caches, the checks and
        # choices below take 0.1 ms.
        signature = (
            *[None if t is None else (t.shape, t.dtype) for t in tensors],
            *(x.stride(), weight.stride()),
            *(stride, padding, dilation, groups, activation, negative_slope, accuracy),
            isinstance(momentum, Tensor),
            torch.are_deterministic_algorithms_enabled(),
        )
        plan = _plans.get(signature)
        if plan is not None:
            return train(*tensors, momentum, eps, plan)
    check_convolution(
        x, weight, bias, stride, padding, dilation, groups, activation, negative_slope
    )
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
        return conv_with_epilogue(
            x, *folded, residual, stride, padding, dilation, groups, activation, negative_slope
        )
    x, weight, bias, residual, geometry, shape = op_arguments(
        x, weight, bias, residual, stride, padding, dilation
    )
    count = shape[0] * shape[2] * shape[3]
    if count == 1:
        raise ValueError(
            f"conv_bn_act: training needs more than 1 value per channel, got an output of {shape}"
        )
    if count == 0:  # nothing to take statistics of
        return F.conv2d(x, weight, bias, *geometry, groups)
    kernels = training_kernels(x, weight, *geometry, groups, accuracy)
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if kernels == UNFUSED and not torch_takes(x, *norm, momentum):
        kernels = TrainingKernels(TORCH, TORCH, TORCH)
    plan = StepPlan(geometry, groups, count, slope_of(activation, negative_slope), kernels)
    if signature is not None and not isinstance(padding, str):
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[signature] = plan
    return train(x, weight, bias, *norm, residual, momentum, eps, plan)


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
    return F.leaky_relu(z, slope_of(activation, negative_slope)) if activation != "none" else z
