"""Convolution, batch norm, addition and activation of a graph as one packed convolution."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..nn.conv_bn import ConvBNReLU2d
from ..nn.packed import PackedConv2d, unsupported
from ..nn.packed_linear import PackedLinear, unsupported_linear
from ..nn.packed_transposed import PackedConvTranspose2d, unsupported_transposed
from .tracing import attribute, has_hooks, may_write

ADDITIONS = (operator.add, operator.iadd, torch.add)
# By the name that the engine has for them; layers, functions, methods.
ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
}
LEAKY_RELUS = (F.leaky_relu, F.leaky_relu_)
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's name of the approximation
# What these layers and functions do in evaluation mode is nothing.
NOTHING = (nn.Dropout, nn.Dropout2d, nn.Identity)
DROPOUTS = (F.dropout, F.dropout2d)
# Whose results share no memory with their arguments.
FRESH = (torch.cat, torch.add, operator.add, operator.mul, torch.mul, F.interpolate, torch.conv2d)
LAYERS = (
    PackedConv2d,
    PackedConvTranspose2d,
    PackedLinear,
    ConvBNReLU2d,
    nn.Conv2d,
    nn.Linear,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
)

Report = list[tuple[str, str]]  # names of parts, and what was done to each or why not


@dataclass
class Layer:
    """A convolution or linear layer that the engine computes, and what of its successors is known
    so far."""

    conv: nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    bn: nn.BatchNorm2d | None = None
    activation: str = "none"
    slope: float = 0.0
    residual_last: bool = False  # a sum is formed behind the activation

    def pack(self, settings: dict[str, Any]) -> PackedConv2d | PackedConvTranspose2d | PackedLinear:
        """``settings``: keyword arguments of PackedConv2d that are the same in a whole network."""
        options = {
            "activation": self.activation,
            "negative_slope": self.slope,
            "residual_last": self.residual_last,
            **settings,
        }
        if isinstance(self.conv, nn.ConvTranspose2d):
            return PackedConvTranspose2d(self.conv, self.bn, **options)
        if isinstance(self.conv, nn.Linear):
            return PackedLinear(self.conv, **options)
        return PackedConv2d(self.conv, self.bn, **options)

    def takes(self, bn: nn.Module) -> bool:
        """Whether this batch norm can be folded in."""
        transposed = isinstance(self.conv, nn.ConvTranspose2d)
        if isinstance(self.conv, nn.Linear):
            return False
        return not (unsupported_transposed if transposed else unsupported)(self.conv, bn)


def as_layer(module: nn.Module | None) -> Layer | None:
    """The convolution or linear layer that ``module`` is, if the engine computes it."""
    if isinstance(module, ConvBNReLU2d):
        conv, bn = module.conv, module.bn
        if not unsupported(conv, bn) and not has_hooks(module):
            return Layer(conv, bn, module.activation, module.negative_slope)
    elif isinstance(module, nn.ConvTranspose2d):
        return None if unsupported_transposed(module) else Layer(module)
    elif isinstance(module, nn.Linear):
        return None if unsupported_linear(module) else Layer(module)
    elif isinstance(module, nn.Conv2d):
        return None if unsupported(module) else Layer(module)
    return None


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a layer does what its class says: one of these classes, without hooks."""
    return module is not None and type(module) in kinds and not has_hooks(module)


def module_of(traced: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node calls."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return traced.get_submodule(str(node.target))


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it is given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, list | tuple | torch.Size) else (value, value)
    return first, second


def call_instead(traced: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple) -> None:
    """Call this module in place of a node."""
    name = str(node.target) if node.op == "call_module" else f"{node.name}_fast"
    while any(other.target == name and other is not node for other in traced.graph.nodes):
        name += "_"
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(name, args)
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


class Fusion:
    """Rewrites a graph: its convolutions become PackedConv2d where the engine computes them."""

    def __init__(self, traced: fx.GraphModule, settings: dict[str, Any], report: Report) -> None:
        self.traced = traced
        self.settings = settings
        self.report = report
        self.position: dict[fx.Node, int] = {}
        self.gone: set[fx.Node] = set()

    def run(self) -> None:
        graph = self.traced.graph
        for node in list(graph.nodes):
            if self.does_nothing(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            if node.op != "call_module" or node in self.gone:
                continue
            module = self.module(node)
            layer = as_layer(module)
            if layer:
                self.fuse(node, layer)
            elif not self.fold(node) and (left := why_left(module)):
                self.report.append((str(node.target), left))

    def fuse(self, node: fx.Node, layer: Layer) -> None:
        """One packed convolution in place of ``node`` and what may follow it: batch norm, addition
        of another result, activation; or the activation first."""
        chain, args = [node], [*node.args, *node.kwargs.values()]
        after = only_user(node)
        bn = self.module(after)
        if (
            after is not None
            and layer.bn is None
            and layer.activation == "none"
            and len(args) == 1
            and isinstance(bn, nn.BatchNorm2d)
            and layer.takes(bn)
        ):
            layer.bn = bn
            chain.append(after)
            after = only_user(after)
        if layer.activation == "none" and len(args) == 1:
            summand = self.summand(after, chain)
            if after is not None and summand is not None:
                args.append(summand)
                chain.append(after)
                after = only_user(after)
        if layer.activation == "none":
            layer.activation, layer.slope = self.activation(after)
            if after is not None and layer.activation != "none":
                chain.append(after)
                after = only_user(after)
        if layer.activation != "none" and len(args) == 1:
            summand = self.summand(after, chain)
            if after is not None and summand is not None:
                args.append(summand)
                chain.append(after)
                layer.residual_last = True
        packed = layer.pack(self.settings)
        name = str(node.target)
        while any(n.target == name and n is not node for n in self.traced.graph.nodes):
            name += "_"  # a convolution called several times, each call with its own successors
        self.traced.add_submodule(name, packed)
        self.report.append((name, f"convolution engine, {packed.extra_repr()}"))
        graph = self.traced.graph
        with graph.inserting_before(chain[-1]):  # where all that it needs is there
            new = graph.call_module(name, tuple(args))
        self.position[new] = self.position[chain[-1]]
        chain[-1].replace_all_uses_with(new)
        for old in reversed(chain):
            graph.erase_node(old)
        self.gone.update(chain)

    def fold(self, node: fx.Node) -> bool:
        """The batch norm into a convolution that is left to torch."""
        after = only_user(node)
        conv: Any = self.module(node)
        bn: Any = self.module(after)
        plain = is_plain(conv, nn.Conv2d, nn.ConvTranspose2d) and is_plain(bn, nn.BatchNorm2d)
        if not plain or after is None or bn.running_mean is None or conv.training or bn.training:
            return False
        if isinstance(conv, nn.ConvTranspose2d) and conv.groups > 1:
            return False  # fuse_conv_bn_eval does not know its weights
        if sum(other.target == node.target for other in self.traced.graph.nodes) > 1:
            return False
        folded = fuse_conv_bn_eval(conv, bn, transpose=isinstance(conv, nn.ConvTranspose2d))
        self.traced.add_submodule(str(node.target), folded)
        self.report.append((str(node.target), f"{why_left(conv)}, with its batch norm folded in"))
        after.replace_all_uses_with(node)
        self.traced.graph.erase_node(after)
        self.gone.add(after)
        return True

    def module(self, node: fx.Node | None) -> nn.Module | None:
        return module_of(self.traced, node)

    def does_nothing(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None and is_plain(module, *NOTHING):
            return isinstance(module, nn.Identity) or not module.training
        return (
            node.op == "call_function"
            and node.target in DROPOUTS
            and argument(node, 2, "training", True) is False
        )

    def summand(self, node: fx.Node | None, chain: list[fx.Node]) -> fx.Node | None:
        """The other tensor of an addition to the result of ``chain``, if it may as well be added
        by the convolution."""
        if node is None or node.kwargs or len(node.args) != 2:
            return None
        if node.target not in (ADDITIONS if node.op == "call_function" else ("add", "add_")):
            return None
        others = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not chain[-1]]
        if len(others) != 1 or not is_tensor(others[0]):
            return None
        other = others[0]
        in_place = node.target in (operator.iadd, "add_") and node.args[0] is other
        if in_place and (
            other.op in ("placeholder", "get_attr")
            or len(other.users) > 1
            or self.root(other) is not other
        ):
            return None  # somebody else sees the sum
        # The convolution now runs where the addition was: nothing may change its input meanwhile.
        first, last = self.position[chain[0]], self.position[node]
        between = [
            n for n in self.traced.graph.nodes if first < self.position[n] < last and n not in chain
        ]
        return None if self.written(chain[0].args, between) else self.laid_out(other)

    def laid_out(self, node: fx.Node) -> fx.Node:
        """A stored map once in the engine's layout, instead of at each call, if nobody else has it,
        who might change it."""
        others = [n for n in self.traced.graph.nodes if n.target == node.target and n is not node]
        if node.op != "get_attr" or others or len(node.users) > 1:
            return node
        stored = attribute(self.traced, str(node.target))
        if stored.dim() != 4 or stored.is_contiguous(memory_format=torch.channels_last):
            return node
        name = f"{node.name}_channels_last"
        if not hasattr(self.traced, name):
            image = stored.detach().contiguous(memory_format=torch.channels_last)
            self.traced.register_buffer(name, image, persistent=False)
        with self.traced.graph.inserting_before(node):
            return self.traced.graph.get_attr(name)

    def written(self, sources: Iterable[Any], nodes: Iterable[fx.Node]) -> bool:
        """Whether one of these nodes may change what is in the memory of the sources."""
        watched = {self.root(source) for source in sources if isinstance(source, fx.Node)}
        return any(self.writes(node) and self.root(node.args[0]) in watched for node in nodes)

    def root(self, node: Any) -> Any:
        """The node whose memory a result may share, as far as the graph shows."""
        while isinstance(node, fx.Node):
            module = self.module(node)
            if isinstance(module, LAYERS) or node.target in FRESH:
                break
            first: Any = node.args[0] if node.args else None
            while isinstance(first, list | tuple):
                first = first[0] if first else None
            if not isinstance(first, fx.Node):
                break
            node = first
        return node

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may change its first argument."""
        return may_write(node, self.module(node))

    def activation(self, node: fx.Node | None) -> tuple[str, float]:
        """Name and slope of the activation that ``node`` is; "none" if it is something else."""
        module = self.module(node)
        if node is None:
            return "none", 0.0
        kind: Any = node.target
        if module is not None:
            kind = type(module) if is_plain(module, type(module)) else None
        if kind in ACTIVATIONS:
            return ACTIVATIONS[kind], 0.0
        if isinstance(module, nn.LeakyReLU) and is_plain(module, nn.LeakyReLU):
            return "leaky_relu", module.negative_slope
        if is_plain(module, nn.GELU):
            return GELUS[module.approximate], 0.0  # type: ignore[union-attr, index]
        if node.op == "call_function" and node.target is F.gelu:
            return GELUS.get(argument(node, 1, "approximate", "none"), "none"), 0.0
        if is_plain(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6):  # type: ignore[union-attr]
            return "relu6", 0.0
        if node.op == "call_function" and node.target in (F.hardtanh, F.hardtanh_):
            bounds = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
            return ("relu6" if bounds == (0, 6) else "none"), 0.0
        if node.op == "call_function" and node.target in LEAKY_RELUS:
            slope = argument(node, 1, "negative_slope", 0.01)
            return ("leaky_relu", slope) if isinstance(slope, float | int) else ("none", 0.0)
        return "none", 0.0


def why_left(module: nn.Module | None) -> str | None:
    """Why a layer stays as it is; None for layers that nobody expects to change."""
    if isinstance(module, nn.Conv2d):
        return f"left to torch, {unsupported(module)}"
    if isinstance(module, ConvBNReLU2d):
        return f"left to torch, {unsupported(module.conv, module.bn) or 'it has hooks'}"
    if isinstance(module, nn.BatchNorm2d):
        return "left to torch, not behind a convolution of its own"
    if isinstance(module, nn.ConvTranspose2d):
        return f"left to torch, {unsupported_transposed(module)}"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"left to torch, {type(module).__name__} is not a Conv2d"
    return None


def is_tensor(node: fx.Node) -> bool:
    """Whether a result is surely a tensor; sizes and what is computed from them are not."""
    if "example_value" in node.meta:
        return isinstance(node.meta["example_value"], torch.Tensor)
    if node.op == "call_module":
        return True
    if node.op == "get_attr":
        module = node.graph.owning_module
        return module is not None and isinstance(attribute(module, str(node.target)), torch.Tensor)
    if node.op == "placeholder":  # the input of a layer
        return any(user.op == "call_module" and user.args[:1] == (node,) for user in node.users)
    if node.op == "call_method":
        return node.target not in ("size", "dim", "numel", "item", "tolist")
    if node.op == "call_function" and node.target is not getattr:
        if getattr(node.target, "__module__", "") in ("_operator", "operator"):
            return any(is_tensor(arg) for arg in node.args if isinstance(arg, fx.Node))
        return True
    return False
