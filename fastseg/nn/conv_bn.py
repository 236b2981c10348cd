"""Convolution + batch norm + activation as one layer."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._conv_options import ACTIVATIONS
from ..ops._kept import may_keep
from ..ops._layout import image_layout
from ..ops.conv_act import conv_act, fold_bn
from ..ops.conv_bn import conv_bn_act
from ..ops.sync_bn import sync_conv_bn_act
from .packed import SIZES, PackedConv2d, unsupported

# Multiply-adds below which a layer by itself is left to torch: at 0.6 million (16 channels, 16x16)
# its checks cost more than the convolution gains, at 9 million (64x64) NCHW input still loses by
# its two conversions of the layout, at 156 million (64 channels, 65x65) every layout gains.
SMALLEST_PACKED = 30_000_000


@dataclass
class _Folded:
    """Folded weights, what they were made of, and what is made of them."""

    sources: list[Tensor]
    state: tuple
    weight: Tensor
    bias: Tensor
    packed: PackedConv2d | None = None
    options: tuple = ()  # of the packed form
    # Of input shapes the result's where the packed form computes it, None where torch does.
    shapes: dict[tuple[int, ...], tuple[int, ...] | None] = field(default_factory=dict)


class ConvBNReLU2d(nn.Module):
    """``activation(bn(conv(x)) + residual)``, fused; see :func:`fastseg.ops.conv_bn_act`.

    The children are a plain ``nn.Conv2d`` and ``nn.BatchNorm2d``, so the state dict has the usual
    keys (``conv.weight``, ``bn.weight``, ``bn.running_mean``, ...), batch norm can be frozen by
    ``layer.bn.eval()`` and replaced, also by ``SyncBatchNorm.convert_sync_batchnorm`` (which then
    runs unfused in training; :func:`fastseg.nn.convert_sync_batchnorm` keeps the layer fused).

    With ``bn`` in evaluation mode it is folded into the convolution. The folded weights are kept
    until a parameter or buffer changes, unless a gradient in them is wanted.

    On the CPU, in float32 and without gradients (``torch.no_grad()``, ``torch.inference_mode()``),
    what Winograd's transforms make faster (3x3 of stride 1, long k x 1) then runs on the packed
    convolution of :func:`fastseg.optimize`, which keeps its form of the weights too: about four
    times the memory of a 3x3 convolution. Results keep the layout of the input. Autocast,
    compilers, dispatch modes and function transforms get torch's convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            ``nn.Conv2d``.
        eps, momentum: as in ``nn.BatchNorm2d``.
        activation: "relu", "leaky_relu" or "none".
        negative_slope: of "leaky_relu", at least 0.
        accuracy: "default" or "strict" training, see :func:`fastseg.ops.conv_bn_act`; with
            "strict" inference is torch's convolution too.

    Shapes: x (N, in_channels, H, W) and residual, if any, like the result
    (N, out_channels, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "relu",
        negative_slope: float = 0.01,
        accuracy: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"ConvBNReLU2d: activation must be one of {ACTIVATIONS}, got {activation}"
            )
        if negative_slope < 0:
            raise ValueError(
                f"ConvBNReLU2d: negative_slope must be at least 0, got {negative_slope}"
            )
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.activation = activation
        self.negative_slope = negative_slope
        self.accuracy = accuracy
        self.synchronized = False  # statistics of all processes, see convert_sync_batchnorm
        self.process_group: Any = None
        self._folded: _Folded | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn = self.conv, self.bn
        plain = is_plain(conv, nn.Conv2d) and is_plain(bn, nn.BatchNorm2d)
        # Compilers for the CPU fold and fuse what they know.
        known = torch.compiler.is_compiling() and x.device.type == "cpu" and not bn.training
        if known or not plain:
            return _unfused(self, x, residual)
        if bn.training or bn.running_mean is None:
            update = bn.training and bn.track_running_stats
            fused: Any = conv_bn_act
            options: dict[str, Any] = {"training": True, "accuracy": self.accuracy}
            if self.synchronized and bn.training and _several_processes(self.process_group):
                fused, options = sync_conv_bn_act, {"process_group": self.process_group}
            return fused(
                x,
                conv.weight,
                conv.bias,
                bn.weight,
                bn.bias,
                bn.running_mean if update else None,
                bn.running_var if update else None,
                residual,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
                momentum=_count_batch(bn) if update else 0.0,
                eps=bn.eps,
                activation=self.activation,
                negative_slope=self.negative_slope,
                **options,
            )
        weight, bias = self.folded(x)
        packed = self._packed(x, residual, weight)
        if packed is not None:
            return packed.forward(x, residual).contiguous(memory_format=image_layout(x))
        return conv_act(
            x,
            weight,
            bias,
            residual,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def unfuse(self) -> "UnfusedConvBNReLU2d":
        """The same layer in plain PyTorch modules, sharing parameters and state-dict keys."""
        return UnfusedConvBNReLU2d(self.conv, self.bn, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation!r}{slope}"

    @property
    def folds(self) -> bool:
        """Whether the layer runs as one convolution: its parts are plain and bn in evaluation."""
        conv, bn = self.conv, self.bn
        plain = is_plain(conv, nn.Conv2d) and is_plain(bn, nn.BatchNorm2d)
        return plain and not bn.training and bn.running_mean is not None

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and bias that the layer then has for an input like x, in the dtype it computes
        in; from the cache where nothing changed since."""
        conv, bn = self.conv, self.bn
        sources = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        tensors = [t for t in sources if t is not None]
        if (
            torch.compiler.is_compiling()  # the graph keeps the parameters as its inputs
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            or any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors)
        ):
            return fold_bn(*sources, bn.eps)  # type: ignore[arg-type]
        dtype = conv.weight.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        # On CUDA in the layout that the kernels read, so that no call has to convert it.
        layout = image_layout(x) if x.is_cuda else torch.preserve_format
        # Versions tell of changes in place, addresses of `.data = `, as in Module.to().
        state = (bn.eps, dtype, layout, *((t._version, t.data_ptr()) for t in tensors))
        folded = self._folded
        if (
            folded is None
            or folded.state != state
            or any(t is not source for t, source in zip(tensors, folded.sources, strict=True))
        ):
            # Ordinary tensors also inside inference_mode, for use outside of it later.
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = fold_bn(*sources, bn.eps)  # type: ignore[arg-type]
                weight = weight.to(dtype, memory_format=layout)
                folded = _Folded(tensors, state, weight, bias.to(dtype))
            if may_keep(folded.bias):
                self._folded = folded
        return folded.weight, folded.bias

    def _packed(self, x: Tensor, residual: Tensor | None, weight: Tensor) -> PackedConv2d | None:
        """The packed form of the folded ``weight``, or None where torch's convolution is to run."""
        conv, kept = self.conv, self._folded
        if (
            self.accuracy != "default"
            or kept is None
            or kept.weight is not weight  # not one that is kept
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or any(
                type(t) not in (Tensor, nn.Parameter) or t.dtype != torch.float32 or not t.is_cpu
                for t in (x, weight, *([] if residual is None else [residual]))
            )
            or x.dim() != 4
            or x.shape[1] != conv.in_channels
            or _observed()
        ):
            return None
        options = (conv.stride, conv.padding, conv.dilation, self.activation, self.negative_slope)
        packed = kept.packed
        if packed is None or kept.options != options:
            if unsupported(conv, self.bn):
                return None
            with torch.inference_mode(False), torch.no_grad():
                packed = PackedConv2d(
                    conv, self.bn, activation=self.activation, negative_slope=self.negative_slope
                )
                packed.weight, packed.bias = kept.weight, kept.bias  # no second copy
            kept.packed, kept.options = packed, options
            kept.shapes.clear()
        size = tuple(x.shape)
        shape: tuple[int, ...] | None = kept.shapes.get(size, ())
        if shape == ():
            if len(kept.shapes) >= SIZES:
                kept.shapes.clear()
            # Its matrix product is on a par with torch's: that does not repay the memory.
            shape = packed.output_shape(x) if packed.algorithm(x).tile else None
            if shape is not None and math.prod(shape) * weight[0].numel() < SMALLEST_PACKED:
                shape = None
            kept.shapes[size] = shape
        if shape is None or (residual is not None and residual.shape != shape):
            return None
        return packed

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_folded": None}  # copies and pickles fold anew


class UnfusedConvBNReLU2d(nn.Module):
    """``activation(bn(conv(x)) + residual)`` in plain PyTorch, for exporters and comparisons."""

    def __init__(
        self, conv: nn.Module, bn: nn.Module, activation: str, negative_slope: float
    ) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _unfused(self, x, residual)


def _unfused(
    layer: "ConvBNReLU2d | UnfusedConvBNReLU2d", x: Tensor, residual: Tensor | None
) -> Tensor:
    z = layer.bn(layer.conv(x))
    if residual is not None:
        z = z + residual
    if layer.activation == "relu":
        return F.relu(z)
    return F.leaky_relu(z, layer.negative_slope) if layer.activation == "leaky_relu" else z


def _observed() -> bool:
    """Whether somebody follows the operators of this call: a tracer, a dispatch mode or a
    function transform."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def is_plain(child: nn.Module, kind: type) -> bool:
    """Whether `child` does what its class says: the class itself, and no hooks to be called."""
    return (
        type(child) is kind
        and not child._forward_pre_hooks
        and not child._forward_hooks
        and not child._backward_pre_hooks
        and not child._backward_hooks
        and getattr(child, "padding_mode", "zeros") == "zeros"
    )


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Lets every batch norm in ``module`` take, in training, the statistics of the batches of all
    processes of ``process_group`` (None: all), like ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    ConvBNReLU2d layers stay fused and keep their parameters; other batch norms become
    ``nn.SyncBatchNorm``, which needs CUDA. Call it before DistributedDataParallel.

    Returns:
        ``module``, changed in place, or what replaces it if it is a batch norm itself.
    """
    if isinstance(module, ConvBNReLU2d) and is_plain(module.bn, nn.BatchNorm2d):
        module.synchronized, module.process_group = True, process_group
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def _several_processes(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _count_batch(bn: nn.BatchNorm2d) -> float | Tensor:
    """Counts one more batch; the weight of this batch in the running statistics."""
    count = bn.num_batches_tracked
    if count is not None:
        count.add_(1)
    if bn.momentum is None and count is not None:
        return 1.0 / count  # the plain average of all batches
    return bn.momentum or 0.0
