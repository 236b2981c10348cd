"""A transposed convolution prepared for inference on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from ..ops.conv_choice import fast_bfloat16
from ..ops.conv_engine import activate
from ..ops.conv_transposed import PackedConvTransposed, conv_transposed, pack_conv_transposed
from .packed import unsupported_weights


class PackedConvTranspose2d(nn.Module):
    """``activation(bn(conv(x)) + residual)`` for a transposed convolution, without gradients.

    The batch norm is folded into the weights, which are packed at the first call.

    Args:
        conv: one for which :func:`unsupported_transposed` has no objection.
        bn, activation, negative_slope, dtype, residual_last: as for ``PackedConv2d``.
        accuracy: taken for the same reason; a matrix product is exact enough for each of them.

    Shapes: x (N, C, H, W), residual (N, K, Ho, Wo) -> (N, K, Ho, Wo), channels last.

    Raises:
        ValueError: the engine does not compute this convolution.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        conv: nn.ConvTranspose2d,
        bn: nn.BatchNorm2d | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        accuracy: str = "default",
        dtype: torch.dtype = torch.float32,
        residual_last: bool = False,
    ) -> None:
        super().__init__()
        reason = unsupported_transposed(conv, bn)
        if reason:
            raise ValueError(f"PackedConvTranspose2d: {reason}")
        weight, bias = conv.weight.detach(), conv.bias.detach() if conv.bias is not None else None
        if bn is not None:
            weight, bias = (
                t.detach()
                for t in fuse_conv_bn_weights(
                    weight,
                    bias,
                    bn.running_mean,  # type: ignore[arg-type]
                    bn.running_var,  # type: ignore[arg-type]
                    bn.eps,
                    bn.weight,
                    bn.bias,
                    transpose=True,
                )
            )
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.dtype = dtype
        self.out_channels = conv.out_channels
        self.options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "output_padding": conv.output_padding,
            "activation": activation,
            "negative_slope": negative_slope,
            "residual_last": residual_last,
        }
        rounded = dtype == torch.bfloat16 and fast_bfloat16()  # as other matrix products are
        self.products = torch.bfloat16 if rounded else torch.float32
        self.place: Any = None  # where results go, a fastseg.memory_plan.Place
        self._packed: PackedConvTransposed | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() == 3:  # one image without a batch
            return self(x[None], residual)[0]
        if x.dtype != self.dtype:
            x = x.to(self.dtype, memory_format=torch.channels_last)
        packed = self._packed
        if packed is None:
            with torch.inference_mode(False):
                packed = pack_conv_transposed(
                    self.weight, self.bias, **self.options, products=self.products
                )
            self._packed = packed
        shape = (x.shape[0], self.out_channels, *packed.output_size(x.shape[2:]))
        if residual is not None and (residual.shape != shape or residual.dtype != self.dtype):
            return self._add(x, residual)
        out = self.place.image(shape) if self.place is not None else None
        return conv_transposed(x, packed, residual, out)

    def _add(self, x: Tensor, residual: Tensor) -> Tensor:
        """With a residual that broadcasts or decides the dtype."""
        options, kind = self.options, self.options["activation"]
        if options["residual_last"]:
            return self(x) + residual
        plain = pack_conv_transposed(
            self.weight, self.bias, **{**options, "activation": "none"}, products=self.products
        )
        return activate(conv_transposed(x, plain) + residual, kind, options["negative_slope"])

    def extra_repr(self) -> str:
        C, K, R, S = self.weight.shape
        names = ("stride", "padding", "output_padding", "activation")
        return f"{C}, {K}, kernel_size=({R}, {S}), " + ", ".join(
            f"{name}={self.options[name]}" for name in names
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}  # copies pack anew


def unsupported_transposed(conv: nn.Module, bn: nn.Module | None = None) -> str | None:
    """Why the engine does not compute this transposed convolution, or None."""
    reason = unsupported_weights(conv, bn, nn.ConvTranspose2d)
    if reason:
        return reason
    assert isinstance(conv, nn.ConvTranspose2d)
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return "dilation"
    if any(k < s for k, s in zip(conv.kernel_size, conv.stride, strict=True)):
        return "a kernel smaller than its stride"
    return None
