"""A linear layer prepared for inference on the CPU."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..ops.conv_engine import activate, conv_engine
from .packed import PackedConv2d, unsupported_weights


class PackedLinear(nn.Module):
    """``activation(linear(x) + residual)`` as a 1x1 convolution by the engine, without gradients.

    Args:
        linear: a layer for which :func:`unsupported_linear` has no objection.
        options: keyword arguments of ``PackedConv2d``.

    Shapes: x (..., C), residual (..., K) -> (..., K).

    Raises:
        ValueError: the engine does not compute this layer, or x has another number of features.
    """

    def __init__(self, linear: nn.Linear, **options: Any) -> None:
        super().__init__()
        reason = unsupported_linear(linear)
        if reason:
            raise ValueError(f"PackedLinear: {reason}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        K, C = linear.weight.shape
        conv = nn.Conv2d(C, K, 1, bias=False, device="meta").eval()
        conv.weight = nn.Parameter(linear.weight.detach()[..., None, None], requires_grad=False)
        conv.bias = linear.bias
        self.conv = PackedConv2d(conv, **options)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight[..., 0, 0]

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"PackedLinear: x must be (..., {self.in_features}), got {tuple(x.shape)}"
            )
        conv, image = self.conv, as_image(x).to(self.conv.dtype)
        shape = (*x.shape[:-1], self.out_features)
        if residual is None or residual.shape == shape:
            y = conv(image, None if residual is None else as_image(residual))
            return y.permute(0, 2, 3, 1).reshape(shape)
        packed, _ = conv.prepare(image)  # one of the two broadcasts
        plain = packed if packed.residual_last else replace(packed, activation="none")
        y = conv_engine(image, plain).permute(0, 2, 3, 1).reshape(shape) + residual
        return y if packed.residual_last else activate(y, packed.activation, packed.negative_slope)

    def extra_repr(self) -> str:
        activation = self.conv.options["activation"]
        return f"{self.in_features}, {self.out_features}, activation={activation}"


def as_image(x: Tensor) -> Tensor:
    """(..., C) as an image of C channels: a view, but of more than three further dimensions."""
    if x.numel() == 0:  # also where it is not the batch that is empty
        return x.new_empty(0, x.shape[-1], 1, 1)
    while x.dim() < 4:
        x = x[None]
    x = x.flatten(1, -3) if x.dim() > 4 else x
    return x.permute(0, 3, 1, 2)


def unsupported_linear(linear: nn.Module) -> str | None:
    """Why the engine does not compute this layer, or None."""
    return unsupported_weights(linear, None, nn.Linear)
