"""A convolution prepared for inference on the CPU."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from ..ops._conv_options import output_size
from ..ops.conv_choice import Algorithm, choose_algorithm
from ..ops.conv_engine import PackedConv, activate, can_widen, conv_engine, pack_conv

SIZES = 256  # input shapes of which a layer remembers what they need
UNKNOWN = (
    "PackedConv2d: torch.jit and torch.onnx do not know the operators of optimised networks; use "
    "torch.export, or give them the network itself"
)


class PackedConv2d(nn.Module):
    """``activation(bn(conv(x)) + residual)`` by the convolution engine, without gradients.

    The batch norm is folded into the weights. They are packed at the first call, once for every
    algorithm that the input sizes ask for, and kept: a 3x3 convolution then takes up to eight times
    the memory of the layer, with bfloat16 products up to four, a 1x1 convolution of 256 channels or
    more 2.75 times.

    Args:
        conv: a convolution for which :func:`unsupported` has no objection.
        bn: the batch norm behind it, or None.
        activation: a key of ``ops.conv_engine.ACTIVATIONS``; "leaky_relu" with ``negative_slope``.
        accuracy: see ``ops.conv_choice.choose_algorithm``.
        dtype: float32, or bfloat16 for inputs that are cast to it and results of it.
        residual_last: the residual is added behind the activation.

    Shapes: x (N, C, H, W), residual (N, K, Ho, Wo) -> (N, K, Ho, Wo), channels last.

    Raises:
        ValueError: the engine does not compute this convolution.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        accuracy: str = "default",
        dtype: torch.dtype = torch.float32,
        residual_last: bool = False,
    ) -> None:
        super().__init__()
        reason = unsupported(conv, bn)
        if reason:
            raise ValueError(f"PackedConv2d: {reason}")
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
                )
            )
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.accuracy = accuracy
        self.dtype = dtype
        for name in nn.Conv2d.__constants__:  # which a network may ask its layer for
            setattr(self, name, getattr(conv, name))
        self.options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": _padding(conv),
            "dilation": conv.dilation,
            "activation": activation,
            "negative_slope": negative_slope,
            "residual_last": residual_last,
        }
        self.place: Any = (
            None  # where results go, a fastseg.memory_plan.Place; None is a new tensor
        )
        self.widens = False  # whether results in bfloat16 are wanted in float32, where that is free
        self._packed: dict[Algorithm, PackedConv] = {}
        self._prepared: dict[tuple[int, ...], tuple[PackedConv, tuple[int, ...]]] = {}

    def algorithm(self, x: Tensor) -> Algorithm:
        """The one for an input of this size."""
        K, C, *kernel = self.weight.shape
        size: Any = x.shape[2:]
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            # One program for many sizes: the best for the example of those that have no limits.
            size = [
                max(n.node.hint, 4 * d) if isinstance(n, torch.SymInt) else n
                for n, d in zip(size, self.options["dilation"], strict=True)
            ]
        return choose_algorithm(
            C * self.groups,
            K,
            kernel,
            size,
            *self._geometry(),
            groups=self.groups,
            dtype=self.dtype,
            accuracy=self.accuracy,
        )

    def output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        K, _, *kernel = self.weight.shape
        return x.shape[0], K, *output_size(x.shape[2:], kernel, *self._geometry())

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if x.dim() == 3:  # one image without a batch
            return self(x[None], residual, out)[0]
        if x.dtype != self.dtype:  # also under autocast, behind a layer that is left to torch
            x = x.to(self.dtype, memory_format=torch.channels_last)
        packed, shape = self.prepare(x)
        if residual is not None and not self.adds(x, residual):
            if packed.residual_last:
                return conv_engine(x, packed) + residual
            y = conv_engine(x, replace(packed, activation="none")) + residual
            return activate(y, packed.activation, packed.negative_slope)
        if self.widens and out is None and can_widen(packed):
            return conv_engine(x, packed, residual, widen=True)
        if out is None and self.place is not None:
            out = self.place.image(shape)
        return conv_engine(x, packed, residual, out)

    def __prepare_scriptable__(self) -> Any:
        raise ValueError(UNKNOWN)  # torch.jit.script asks first

    def adds(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the engine adds this residual: it neither broadcasts nor decides the dtype."""
        if residual is None:
            return True
        return residual.dtype == self.dtype and residual.shape == self.prepare(x)[1]

    def prepare(self, x: Tensor) -> tuple[PackedConv, tuple[int, ...]]:
        """The packed weights for an input of this shape and the shape of the result. To choose
        again at every call takes 16 us, as long as a layer of 16 channels on 8x8 pixels."""
        size = tuple(x.shape)
        known = not torch.compiler.is_compiling() and all(type(n) is int for n in size)
        if known and size in self._prepared:
            return self._prepared[size]
        if not known and (torch._C._get_tracing_state() or torch.onnx.is_in_onnx_export()):
            raise ValueError(UNKNOWN)
        key = self.algorithm(x)
        packed = self._packed.get(key)
        if packed is None:
            with torch.inference_mode(False):
                packed = pack_conv(
                    self.weight, self.bias, **self.options, **key._asdict(), groups=self.groups
                )
            self._packed[key] = packed
        prepared = packed, self.output_shape(x)
        if known and len(self._prepared) < SIZES:
            self._prepared[size] = prepared
        return prepared

    def extra_repr(self) -> str:
        K, C, R, S = self.weight.shape
        shown = {
            k: v for k, v in self.options.items() if k not in ("negative_slope", "residual_last")
        }
        if self.groups > 1:
            shown["groups"] = self.groups
        return f"{C * self.groups}, {K}, kernel_size=({R}, {S}), " + ", ".join(
            f"{name}={value}" for name, value in shown.items()
        )

    def _geometry(self) -> list[tuple[int, int]]:
        return [self.options[name] for name in ("stride", "padding", "dilation")]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}, "_prepared": {}}  # copies pack anew


def unsupported(conv: nn.Module, bn: nn.Module | None = None) -> str | None:
    """Why the engine does not compute this convolution with this batch norm, or None."""
    reason = unsupported_weights(conv, bn, nn.Conv2d)
    if reason:
        return reason
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in _spans(conv)):
        return "uneven same padding"
    return None


def unsupported_weights(conv: nn.Module, bn: nn.Module | None, of: type[nn.Module]) -> str | None:
    """Why the engine computes no convolution of this kind with these weights, or None."""
    for module, kind in ((conv, of), (bn, nn.BatchNorm2d)):
        if module is None:
            continue
        if not isinstance(module, kind) or type(module).forward is not kind.forward:
            return f"{type(module).__name__} is not a plain {kind.__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks"
    weight: Any = conv.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"weights are {weight.dtype} on {weight.device}, not float32 on the CPU"
    if isinstance(bn, nn.BatchNorm2d) and (bn.training or bn.running_mean is None):
        return "batch norm of the batch's own statistics"
    return None


def _spans(conv: nn.Conv2d) -> list[tuple[int, int]]:
    return list(zip(conv.dilation, conv.kernel_size, strict=True))


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "same":
        vertical, horizontal = (d * (k - 1) // 2 for d, k in _spans(conv))
        return vertical, horizontal
    if conv.padding == "valid":
        return 0, 0
    return conv.padding  # type: ignore[return-value]
