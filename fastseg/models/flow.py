"""What a network computes for one image: its layers in order, their shapes, costs and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..nn import ConvBNReLU2d, GlobalConv2d
from .common import BilinearUpsample2d

# What counts between layers; other operations there, such as cropping, only pass a map on.
OPERATIONS = {
    "add": "sum",
    "cat": "concatenation",
    "amax": "maximum",
    "mean": "mean",
    "_adaptive_avg_pool2d": "grid average",
    "max_pool2d_with_indices": "max pool",
    "upsample_bilinear2d": "resize",
    "_softmax": "softmax",
}
# Modules that are one layer to a reader.
NAMES = {
    "CRFRNN": "CRF as a recurrent network",
    "BoundaryRefinement": "boundary refinement",
    "ChainedPooling": "chained pooling",
    "LocalResponseNorm": "LRN",
    "MaxUnpool2d": "max unpool",
    "RCU": "residual unit",
    "RSU": "residual U-block",
    "Up2": "2x upsampling",
}
WHOLE = {"Bottleneck", "BilinearUpsample2d", "ConvBNReLU2d", "GlobalConv2d", *NAMES}


@dataclass
class Layer:
    """One layer, or a chain of layers, of a network as it ran.

    Attributes:
        name: of the module; empty for an operation between modules.
        what: what it computes.
        shape: (C, H, W) of its result.
        parameters: trainable values, counted once where a module runs more than once.
        macs: multiply-accumulates of its convolutions.
        inputs: positions in the list of the layers that it reads; the image is at 0.
        outputs: keys under which the network returns its result.
    """

    name: str
    what: str
    shape: tuple[int, ...] = ()
    parameters: int = 0
    macs: int = 0
    inputs: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def trace(
    model: nn.Module, size: tuple[int, int] = (512, 512), in_channels: int = 3
) -> list[Layer]:
    """Run a network in eval mode on one image of ``size`` = (H, W) pixels and list its layers.

    A chain (``nn.Sequential``) is one entry. The first entry is the image. Build the network under
    ``torch.device("meta")`` to make the run free.
    """
    recorder = _Recorder(model)
    image = torch.empty(1, in_channels, *size, device=next(model.parameters()).device)
    recorder.write(image, recorder.new("", "image"))
    training = model.training
    try:
        with torch.no_grad(), recorder:
            result = model.eval()(image)
    finally:
        model.train(training)
        for handle in recorder.handles:
            handle.remove()
    for key, tensor in (result if isinstance(result, dict) else {"out": result}).items():
        recorder.layers[recorder.writer[id(tensor)]].outputs.append(key)
    return recorder.layers


class _Recorder(TorchDispatchMode):
    """Follows tensors from the layer that wrote them to those that read them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers: list[Layer] = []
        self.writer: dict[int, int] = {}  # id of a tensor -> position of its layer
        self.tensors: list[Tensor] = []  # kept, so that no id is given twice
        self.running: tuple[str, nn.Module] | None = None
        self.current: int | None = None  # position of the running layer, once it computes
        self.counted: set[int] = set()
        self.handles = []
        for name, module in model.named_modules():
            if name and _is_layer(module):
                self.handles.append(module.register_forward_pre_hook(self._enter(name)))
                self.handles.append(module.register_forward_hook(self._leave(name)))
            elif isinstance(module, nn.Conv2d):
                # A fused layer calls the modules in it where they have a hook, so convolutions
                # are seen as such.
                self.handles.append(module.register_forward_hook(lambda *_: None))

    def new(self, name: str, what: str) -> int:
        self.layers.append(Layer(name, what))
        return len(self.layers) - 1

    def write(self, result: Any, layer: int, reshape: bool = True) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.writer[id(tensor)] = layer
                self.tensors.append(tensor)
                if reshape and tensor.dim() == 4 and tensor.is_floating_point():
                    self.layers[layer].shape = tuple(tensor.shape[1:])

    def writers(self, arguments: Any) -> list[int]:
        """Positions of the layers that wrote these tensors, each once."""
        written = (self.writer.get(id(x)) for x in tree_leaves(arguments) if isinstance(x, Tensor))
        return list(dict.fromkeys(i for i in written if i is not None))

    def read(self, arguments: Any, layer: int) -> None:
        known = self.layers[layer].inputs
        known.extend(i for i in self.writers(arguments) if i != layer and i not in known)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self.running is None:
                self.running, self.current = (name, module), None

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if self.running is not None and self.running[0] == name:
                if self.current is not None:
                    self.read(args, self.current)
                    self.write(result, self.current)
                self.running = self.current = None

        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = self.writers((args, kwargs))
        if not read:
            return result
        operation = func._schema.name.partition("::")[2].rstrip("_")
        if self.running is not None:
            if self.current is None:
                self.current = self._start(*self.running)
            layer = self.current
        elif operation in OPERATIONS and not (operation == "add" and len(read) == 1):
            layer = self.new("", OPERATIONS[operation])
        else:
            layer = read[0]
        self.read((args, kwargs), layer)
        if operation == "convolution":
            x, weight, transposed = args[0], args[1], args[6]
            maps = x if transposed else result
            self.layers[layer].macs += maps.numel() * weight[0].numel()
        self.write(result, layer, reshape=operation != "expand")
        return result

    def _start(self, name: str, module: nn.Module) -> int:
        layer = self.new(name, describe(module))
        for p in module.parameters():
            if id(p) not in self.counted:
                self.counted.add(id(p))
                self.layers[layer].parameters += p.numel()
        return layer


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one entry: a layer, or a chain of layers."""
    if type(module).__name__ in WHOLE or not any(module.children()):
        return True
    return isinstance(module, nn.Sequential) and all(map(_is_layer, module))


def describe(module: nn.Module) -> str:
    """A layer in a few words, such as ``"conv 3x3, stride 2 + BN + ReLU"``."""
    name = type(module).__name__
    if isinstance(module, nn.Sequential):
        return _describe_chain(module)
    if isinstance(module, ConvBNReLU2d):
        return describe(module.conv) + " + BN" + (" + ReLU" if module.activation != "none" else "")
    if isinstance(module, GlobalConv2d):
        k = module.l1.kernel_size[0]
        return f"conv {k}x1, 1x{k} + conv 1x{k}, {k}x1"
    if isinstance(module, BilinearUpsample2d):
        return f"{module.stride}x upsampling"
    if isinstance(module, nn.ConvTranspose2d):
        return "deconv" + _window(module)
    if isinstance(module, nn.Conv2d):
        return "conv" + _window(module)
    if name in ("MaxPool2d", "AvgPool2d"):
        return name[:3].lower().replace("avg", "average") + " pool" + _window(module)
    if name == "Bottleneck":
        conv: Any = module.get_submodule("conv2.conv")
        return f"bottleneck, dilation {conv.dilation[0]}" if conv.dilation[0] > 1 else "bottleneck"
    return NAMES.get(name, name)


def _window(module: Any) -> str:
    """Kernel, and stride and dilation where they are not 1."""
    text = f" {_side(module.kernel_size)}x{_side(module.kernel_size, -1)}"
    for key in ("stride", "dilation"):
        value = _side(getattr(module, key, 1))
        text += f", {key} {value}" if value > 1 else ""
    return text


def _side(value: int | tuple[int, ...], axis: int = 0) -> int:
    return value if isinstance(value, int) else value[axis]


def _describe_chain(chain: nn.Sequential) -> str:
    steps: list[str] = []
    for module in chain:
        if isinstance(module, nn.ReLU):
            steps[-1] += " + ReLU"
        elif not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            steps.append(describe(module))
    counted = [(step, len(list(same))) for step, same in groupby(steps)]
    return ", ".join(f"{count} x {step}" if count > 1 else step for step, count in counted)
