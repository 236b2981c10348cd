"""Bilinear resizing of logits, fused with argmax or softmax over the classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], align_corners: bool = False, return_prob: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The labels of resized logits, without the resized logits: memory grows with H * W only.

    Equivalent to ``upsample_argmax_reference``: equal logits give the lowest class, a NaN counts as
    the largest value. On x86 with float32 and float64, the logits compared are those of
    ``F.interpolate`` to the last bit (in contiguous and in channels-last memory, whose roundings
    differ), so the labels are the same. bfloat16 and float16 are resized in float32 and not rounded
    back, so the labels are those of ``logits.float()``.

    Args:
        logits: (N, C, h, w), float32, float64, bfloat16 or float16, C at most 32768.
        size: (H, W) of the result, larger or smaller than (h, w).
        align_corners: as in ``F.interpolate``.
        return_prob: return also the softmax probability of the label.

    Returns:
        labels (N, H, W), uint8 for C <= 256, else int16; with ``return_prob`` a pair of them and
        the probabilities (N, H, W) in float32 (float64 for float64). Not differentiable.

    Raises:
        ValueError: a shape, size or dtype is not as above.
    """
    H, W = _check("upsample_argmax", logits, size)
    if logits.shape[1] > 32768:
        raise ValueError(
            f"upsample_argmax: at most 32768 classes fit int16 labels, got {logits.shape[1]}"
        )
    labels, prob = torch.ops.fastseg.upsample_argmax(
        logits.detach(), H, W, align_corners, return_prob
    )
    return (labels, prob) if return_prob else labels


def upsample_softmax(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Class probabilities of resized logits, without the resized logits.

    Equivalent to ``upsample_softmax_reference``.

    Args:
        logits: (N, C, h, w), float32, float64, bfloat16 or float16.
        size: (H, W) of the result, larger or smaller than (h, w).
        align_corners: as in ``F.interpolate``.

    Returns:
        (N, C, H, W), contiguous, dtype of ``logits``; computed in float32 (float64 for float64).
        Differentiable.

    Raises:
        ValueError: a shape, size or dtype is not as above.
    """
    H, W = _check("upsample_softmax", logits, size)
    return torch.ops.fastseg.upsample_softmax(logits, H, W, align_corners)


def upsample_argmax_reference(
    logits: Tensor, size: tuple[int, int], align_corners: bool = False, return_prob: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """What upsample_argmax means, in plain PyTorch."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    labels = full.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    return (labels, full.softmax(1).amax(1)) if return_prob else labels


def upsample_softmax_reference(
    logits: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """What upsample_softmax means, in plain PyTorch."""
    full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    return full.softmax(1).contiguous()


def _check(op: str, logits: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    if logits.dim() != 4 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"{op}: logits must be floating point (N, C, h, w), "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    if min(logits.shape[1:]) < 1:
        raise ValueError(f"{op}: C, h and w must be at least 1, got {tuple(logits.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size must be (H, W), both at least 1, got {tuple(size)}")
    H, W = size
    return H, W


@torch.library.register_fake("fastseg::upsample_argmax")
def _(logits, H, W, align_corners, return_prob):
    N, C = logits.shape[:2]
    labels = logits.new_empty(N, H, W, dtype=torch.uint8 if C <= 256 else torch.int16)
    prob_dtype = torch.promote_types(logits.dtype, torch.float32)
    return labels, logits.new_empty((N, H, W) if return_prob else (0,), dtype=prob_dtype)


@torch.library.register_fake("fastseg::upsample_softmax")
def _(logits, H, W, align_corners):
    return logits.new_empty(*logits.shape[:2], H, W)


@torch.library.custom_op("fastseg::upsample_softmax_backward", mutates_args=())
def _softmax_gradient(grad: Tensor, probs: Tensor, h: int, w: int, align_corners: bool) -> Tensor:
    """Gradient in the (N, C, h, w) logits. An op because torch's own has no symbolic sizes."""
    full = torch.ops.aten._softmax_backward_data(grad, probs, 1, probs.dtype)
    size = [*probs.shape[:2], h, w]
    return torch.ops.aten.upsample_bilinear2d_backward(
        full, list(probs.shape[2:]), size, align_corners
    )


@_softmax_gradient.register_fake
def _(grad, probs, h, w, align_corners):
    return probs.new_empty(*probs.shape[:2], h, w)


def _softmax_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, _, _, ctx.align_corners = inputs
    ctx.input_size = logits.shape[2:]
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (probs,) = ctx.saved_tensors
    return _softmax_gradient(grad, probs, *ctx.input_size, ctx.align_corners), None, None, None


torch.library.register_autograd(
    "fastseg::upsample_softmax", _softmax_backward, setup_context=_softmax_setup
)
