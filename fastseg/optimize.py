"""Make a trained network fast on the CPU: its convolutions by the engine, everything else kept.

A network, or the largest parts of it that ``torch.fx`` can trace, becomes a graph. In it each
convolution takes over the batch norm, the addition and the activation behind it. What does not
trace keeps its own ``forward``, with its children optimised one by one. What the engine does not
compute stays as it is; :func:`explain` says why.
"""

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .memory_plan import plan_memory
from .nn.conv_bn import ConvBNReLU2d
from .nn.packed import PackedConv2d, unsupported

ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
NOTHING = (nn.Dropout, nn.Dropout2d, nn.Identity)  # what they do in evaluation mode


def optimize(
    model: nn.Module, dtype: torch.dtype = torch.float32, accuracy: str = "default"
) -> nn.Module:
    """A copy of ``model`` for inference on the CPU: the same outputs within a tolerance, faster.

    Args:
        model: any ``nn.Module`` in evaluation mode with its parameters on the CPU.
        dtype: precision to compute in: float32.
        accuracy: "default" allows Winograd's F(4, 3), whose error is at most 1e-5 of the largest
            output per layer; "strict" only what rounds no more than torch's own convolution.

    Returns:
        The optimised copy, for calls under ``torch.inference_mode()`` or ``torch.no_grad()``.
        Later changes of the model's weights do not reach it.

    Raises:
        ValueError: the model is in training mode, or an argument has no such value.
    """
    if model.training:
        raise ValueError("optimize: model must be in evaluation mode, call model.eval() first")
    if dtype != torch.float32:
        raise ValueError(f"optimize: dtype must be torch.float32, got {dtype}")
    if accuracy not in ("default", "strict"):
        raise ValueError(f'optimize: accuracy must be "default" or "strict", got {accuracy!r}')
    return _optimize(_inference_form(copy.deepcopy(model)), accuracy).eval()


def explain(model: nn.Module) -> str:
    """What :func:`optimize` did: one line per convolution, with what it runs as or why not."""
    lines = []
    for name, module in model.named_modules():
        if isinstance(module, PackedConv2d):
            lines.append(f"{name}: convolution engine, {module.extra_repr()}")
        elif isinstance(module, nn.Conv2d):
            lines.append(f"{name}: left to torch, {unsupported(module) or 'not called by name'}")
        elif isinstance(module, nn.BatchNorm2d):
            lines.append(f"{name}: left to torch, not behind a convolution of its own")
    return "\n".join(lines)


def _inference_form(module: nn.Module) -> nn.Module:
    """``module`` with every part replaced that has its own form for inference."""
    form = getattr(module, "inference_form", None)
    if form is not None:
        return form()
    for name, child in module.named_children():
        setattr(module, name, _inference_form(child))
    return module


def _optimize(module: nn.Module, accuracy: str) -> nn.Module:
    layer = _Layer.of(module)
    if layer:
        return layer.pack(accuracy)
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()):
        return module
    try:
        traced = fx.GraphModule(module, _Tracer().trace(module), type(module).__name__)
    except Exception:  # a forward may do anything to the proxy of a tensor; then it stays
        for name, child in module.named_children():
            setattr(module, name, _optimize(child, accuracy))
        return module
    _Fusion(traced, accuracy).run()
    plan_memory(traced)
    return traced


class _Tracer(fx.Tracer):
    """Looks into blocks and networks, not into the layers of fastseg.nn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ConvBNReLU2d):
            return True
        if type(m).__module__.startswith("fastseg.nn."):
            return not any(m.children())
        return super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Layer:
    """A convolution that the engine computes, and what of its successors is known so far."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None = None
    activation: str = "none"
    slope: float = 0.0

    @classmethod
    def of(cls, module: nn.Module | None) -> "_Layer | None":
        if isinstance(module, ConvBNReLU2d):
            conv, bn = module.conv, module.bn
            if not unsupported(conv, bn):
                return cls(conv, bn, module.activation, module.negative_slope)
        elif isinstance(module, nn.Conv2d) and not unsupported(module):
            return cls(module)
        return None

    def pack(self, accuracy: str) -> PackedConv2d:
        return PackedConv2d(
            self.conv,
            self.bn,
            activation=self.activation,
            negative_slope=self.slope,
            accuracy=accuracy,
        )


class _Fusion:
    """Rewrites one traced graph."""

    def __init__(self, traced: fx.GraphModule, accuracy: str) -> None:
        self.traced = traced
        self.accuracy = accuracy
        self.position = {node: i for i, node in enumerate(traced.graph.nodes)}

    def run(self) -> None:
        for node in list(self.position):
            module = self.module(node)
            if isinstance(module, NOTHING):
                node.replace_all_uses_with(node.args[0])
                self.traced.graph.erase_node(node)
        for node in list(self.traced.graph.nodes):
            layer = _Layer.of(self.module(node))
            if layer:
                self.fuse(node, layer)
        self.traced.delete_all_unused_submodules()
        self.traced.recompile()

    def fuse(self, node: fx.Node, layer: _Layer) -> None:
        """One packed convolution in place of ``node`` and what may follow it: batch norm, addition
        of an earlier result, activation."""
        chain, args = [node], [*node.args, *node.kwargs.values()]
        after = self.only_user(node)
        bn = self.module(after)
        if (
            after is not None
            and layer.bn is None
            and isinstance(bn, nn.BatchNorm2d)
            and not unsupported(layer.conv, bn)
        ):
            layer.bn = bn
            chain.append(after)
            after = self.only_user(after)
        if layer.activation == "none" and len(args) == 1:
            summand = self.other_summand(after, chain[-1])
            if after is not None and summand and self.position[summand] < self.position[node]:
                args.append(summand)
                chain.append(after)
                after = self.only_user(after)
        if layer.activation == "none":
            layer.activation, layer.slope = self.activation(after)
            if after is not None and layer.activation != "none":
                chain.append(after)
        packed = layer.pack(self.accuracy)
        name = str(node.target)
        while sum(other.target == name for other in self.traced.graph.nodes) > 1:
            name += "_"  # a convolution called several times, each call with its own successors
        self.traced.add_submodule(name, packed)
        graph = self.traced.graph
        with graph.inserting_before(node):
            new = graph.call_module(name, tuple(args))
        self.position[new] = self.position[node]
        chain[-1].replace_all_uses_with(new)
        for old in reversed(chain):
            graph.erase_node(old)

    def module(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        return self.traced.get_submodule(str(node.target))

    @staticmethod
    def only_user(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    @staticmethod
    def other_summand(node: fx.Node | None, one: fx.Node) -> fx.Node | None:
        """The other tensor of an addition."""
        if node is None or node.kwargs or len(node.args) != 2:
            return None
        if node.target not in (ADDITIONS if node.op == "call_function" else ("add", "add_")):
            return None
        others = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not one]
        return others[0] if len(others) == 1 else None

    def activation(self, node: fx.Node | None) -> tuple[str, float]:
        """Name and slope of the activation that ``node`` is; "none" if it is something else."""
        module = self.module(node)
        if node is None:
            return "none", 0.0
        if (
            isinstance(module, nn.ReLU)
            or (node.op == "call_function" and node.target in RELUS)
            or (node.op == "call_method" and node.target in ("relu", "relu_"))
        ):
            return "relu", 0.0
        if isinstance(module, nn.LeakyReLU):
            return "leaky_relu", module.negative_slope
        if node.target is F.leaky_relu:
            slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope")
            return "leaky_relu", 0.01 if slope is None else slope
        return "none", 0.0
