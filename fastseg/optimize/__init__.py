"""Make a trained network fast on the CPU: its convolutions by the engine, everything else kept.

A network, or the largest parts of it that ``torch.fx`` can trace (:mod:`.tracing`), becomes a
graph. In it each convolution or linear layer takes over the batch norm, the addition and the
activation behind it (:mod:`.fusion`), and with it a shortcut's (:mod:`.sums`); pools, pyramids and
resized scores get their own forms (:mod:`.max_pools`, :mod:`.pyramids`, :mod:`.resizes`); and
results go to buffers that are used again (:mod:`fastseg.memory_plan`), so that the calls of
operators can be repeated as they were (:mod:`.replay`). What does not trace keeps its own
``forward``, with its children optimised one by one. What the engine does not compute stays as it
is; :func:`explain` says why.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..nn.global_conv import GlobalConv2d, PackedGlobalConv2d, packable
from ..nn.packed import SIZES
from .bfloat16 import to_bfloat16
from .fusion import Report, as_layer, why_left
from .graph import optimize_graph
from .max_pools import READ_BY_UNPOOLING, faster_pool
from .pooling import decide_maxima
from .replay import Replayed, buffers_of
from .rounding import decide_rounded
from .tracing import (
    Declined,
    assumes,
    attribute,
    has_options,
    reads_strides,
    required_arguments,
    trace,
)

__all__ = ["explain", "optimize"]

ACCURACIES = ("strict", "default", "fast")
# Torch's modules that read the weights of their parts.
ATTENTION = (nn.MultiheadAttention.__module__, nn.Transformer.__module__)
NOTES = "fastseg_notes"  # what was done to a part and what not, as (name, text)


def optimize(
    model: nn.Module, dtype: torch.dtype | None = None, accuracy: str = "default"
) -> nn.Module:
    """A copy of ``model`` for inference on the CPU: the same outputs within a tolerance, faster.

    Results may be in channels-last memory, as torch's own are for a network in that layout. The
    copy can be called from several threads, copied and pickled, compiled by ``torch.compile`` and
    recorded by ``torch.export`` (of sizes that are dynamic there, the example's decide on the
    algorithms), not by ``torch.onnx`` or ``torch.jit``. It is not for training and not for
    exchange: its ``state_dict()`` holds only what was left to torch; save the model's own.

    Args:
        model: any ``nn.Module`` in evaluation mode. It is not changed. What cannot be optimised
            stays as it is in the copy; :func:`explain` says what and why.
        dtype: precision to compute in, float32 or bfloat16. In bfloat16 results of layers are
            rounded as by ``model.bfloat16()``, but float32 weights are not where a layer can use
            them, nor is a last convolution of bfloat16 products, a last resize or a map that it is
            too coarse for (:mod:`.constants`); floating-point inputs are cast, results are float32.
            None is float32, but for a model whose parameters are all bfloat16 that, and then
            results are its own.
        accuracy: "default" allows Winograd's F(6, 3), whose error is at most 1e-5 of the largest
            output per layer, in layers before a maximum that is unpooled to its place F(4, 3);
            "strict" only what rounds no more than torch's own convolution; "fast" is the default
            but for bfloat16 on some processors, see :mod:`fastseg.ops.conv_choice`, where the
            default transforms fewer layers of some networks (:mod:`.rounding`).

    Returns:
        The optimised copy. Its parameters want no gradients; inputs that do raise ValueError.
        Later changes of the model's weights do not reach it.

    Raises:
        ValueError: the model is no module or in training mode, or an argument has no such value.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"optimize: model must be an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("optimize: model must be in evaluation mode, call model.eval() first")
    own = {parameter.dtype for parameter in model.parameters()}
    widens = dtype is not None  # bfloat16 results
    if dtype is None:
        dtype = torch.bfloat16 if own == {torch.bfloat16} else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"optimize: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if accuracy not in ACCURACIES:
        raise ValueError(f"optimize: accuracy must be one of {ACCURACIES}, got {accuracy!r}")
    report: Report = []
    settings = {"accuracy": accuracy, "dtype": dtype}
    model = copy.deepcopy(model)
    for parameter in model.parameters():  # a ScriptModule has no requires_grad_
        parameter.requires_grad_(False)
    form = _inference_form(model, settings, report, "")
    fast = _optimize(form.float() if dtype == torch.bfloat16 else form, settings, report, "")
    if dtype == torch.bfloat16:
        fast = _each(fast, lambda part: to_bfloat16(part, widens))
    unpools = any(isinstance(m, nn.MaxUnpool2d) for m in model.modules())
    unpools = unpools or any(text == READ_BY_UNPOOLING for _, text in report)
    decide, less = (decide_maxima, "maxima") if unpools else (decide_rounded, "strict")
    for part in (fast.traced, fast.own) if isinstance(fast, Part) else (fast,):
        for conv in decide(part) if accuracy == "default" else ():
            conv.accuracy = less
    if isinstance(fast, fx.GraphModule):
        fast.meta[NOTES] = report  # which its copies keep; its pickles keep the attribute
        vars(fast)[NOTES] = report
    fast = _each(fast, _replayed)
    vars(fast)[NOTES] = report
    return fast


def _each(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A network changed, or both of its forms."""
    if not isinstance(module, Part):
        return change(module)
    module.traced, module.own = change(module.traced), change(module.own)
    return module


def _replayed(module: nn.Module) -> nn.Module:
    buffers = buffers_of(module) if isinstance(module, fx.GraphModule) else None
    return module if buffers is None else Replayed(module, buffers)  # type: ignore[arg-type]


def explain(model: nn.Module) -> str:
    """What :func:`optimize` did to a network, or would do: a line for each convolution, with what
    it runs as or why not, for each other change, and for each module that keeps its ``forward``."""
    notes = _notes(model)
    if notes is None:
        notes = _notes(optimize(model)) or []
    return "\n".join(f"{name or 'the model'}: {text}" for name, text in notes)


def _notes(model: nn.Module) -> Report | None:
    return vars(model).get(NOTES) or getattr(model, "meta", {}).get(NOTES)


class Part(nn.Module):
    """A module that runs as a graph where it is called with the arguments that it needs, of sizes
    that the graph does not decline, and is itself for all else: options, indexing, attributes.

    Args:
        traced: what runs.
        own: the module.
    """

    def __init__(self, traced: fx.GraphModule, own: nn.Module) -> None:
        super().__init__()
        self.arguments = required_arguments(own)
        parameters = inspect.signature(type(own).forward).parameters
        self.names = list(parameters)[1:]
        self.optional = {name for name, p in parameters.items() if p.default is None}
        self.assumes = assumes(traced)
        self.declined: set[tuple] = set()  # shapes
        self.traced: nn.Module = traced
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        needed = self.needed(args, kwargs)
        if needed is None or (self.assumes and torch.compiler.is_compiling()):
            return self.own(*args, **kwargs)
        if not self.assumes:
            return self.traced(*needed)
        shapes = tuple(t.shape for t in tree_leaves(needed) if isinstance(t, Tensor))
        if shapes not in self.declined:
            try:
                return self.traced(*needed)
            except Declined:
                if len(self.declined) < SIZES:
                    self.declined.add(shapes)
        return self.own(*args, **kwargs)

    def needed(self, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The arguments of the graph, if there are no others but None."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            return None  # too many, or one of them twice
        left = {k for k, v in given.items() if v is not None or k not in self.optional}
        return [given[name] for name in self.arguments] if left == set(self.arguments) else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "own":
                raise
            return getattr(self.own, name)

    def __getitem__(self, index: Any) -> nn.Module:
        return self.own[index]  # type: ignore[index]

    def __iter__(self) -> Any:
        return iter(self.own)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.own)  # type: ignore[arg-type]


def _inference_form(
    module: nn.Module, settings: dict[str, Any], report: Report, name: str
) -> nn.Module:
    """``module`` with every part replaced that has its own form for inference."""
    if isinstance(module, GlobalConv2d):
        exact = settings["accuracy"] != "default" or settings["dtype"] != torch.float32
        if exact or not packable(module):  # then its convolutions are packed one by one
            return module.unfuse()
        packed = PackedGlobalConv2d(module)
        report.append((name, f"fused large kernel, {packed.extra_repr()}"))
        return packed
    form = getattr(module, "inference_form", None)
    if form is not None:
        return form()
    for child_name, child in module.named_children():
        new = _inference_form(child, settings, report, _join(name, child_name))
        if new is not child:
            setattr(module, child_name, new)
    return module


def _optimize(module: nn.Module, settings: dict[str, Any], report: Report, name: str) -> nn.Module:
    """``module``, whose name is this, in its fast form."""
    layer = as_layer(module)
    if layer:
        packed = layer.pack(settings)
        report.append((name, f"convolution engine, {packed.extra_repr()}"))
        return packed
    pool = faster_pool(module)
    if pool:
        report.append((name, "max pool with compact indices"))
        return pool
    if left := why_left(module):
        report.append((name, left))
        return module
    origin = type(module).__module__
    alone = not list(module.children())
    if origin in ATTENTION or (origin.startswith("torch.nn.") and alone):
        return module
    if isinstance(module, Part):  # of a module that a graph holds too
        return module
    if isinstance(module, torch.jit.ScriptModule):
        report.append((name, "stays as it is, it is a TorchScript module"))
        return module
    before = len(report)
    traced, reasons = trace(module)
    if traced is None:
        return _keep(module, reasons[module], settings, report, name)
    for part_name in {str(n.target): None for n in traced.graph.nodes if n.op == "call_module"}:
        part = traced.get_submodule(part_name)
        deeper = part in reasons or list(part.children())
        if deeper and not as_layer(part) and not why_left(part):
            new = _optimize(part, settings, report, _join(name, part_name))
            if new is not part:
                traced.set_submodule(part_name, new)
    weights = {
        n: attribute(traced, str(n.target)) for n in traced.graph.nodes if n.op == "get_attr"
    }
    notes, _ = optimize_graph(traced, settings, weights)
    report += [(_join(name, part_name), text) for part_name, text in notes]
    if len(report) == before and not assumes(traced):
        return module  # nothing to gain
    if len(report) == before and not reads_strides(module):  # which a graph does not
        return _keep(module, "its forward compares sizes", settings, report, name)
    if assumes(traced):
        report.append((name, "a graph, its forward for sizes that this treats otherwise"))
    if assumes(traced) or (name and has_options(module)):  # called with them, as decoders' blocks
        module = _optimize_children(module, settings, [], name)
    whole = not (name or has_options(module) or assumes(traced))
    return traced if whole else Part(traced, module)


def _keep(
    module: nn.Module, reason: str, settings: dict[str, Any], report: Report, name: str
) -> nn.Module:
    """A module with its own ``forward``, and this reason for it."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        report.append((name, f"keeps its forward, {reason}"))
    return _optimize_children(module, settings, report, name)


def _optimize_children(
    module: nn.Module, settings: dict[str, Any], report: Report, name: str
) -> nn.Module:
    """A module that keeps its ``forward``."""
    if reads_strides(module):
        report.append((name, "its parts stay too: its forward depends on the memory layout"))
        module.register_forward_pre_hook(torch_layout, with_kwargs=True)
        return module
    done: dict[nn.Module, nn.Module] = {}
    for child_name, child in list(module._modules.items()):
        if child is None:
            continue
        if child not in done:
            done[child] = _optimize(child, settings, report, _join(name, child_name))
        if done[child] is not child:
            setattr(module, child_name, done[child])
    return module


def torch_layout(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """A hook: all arguments in the memory layout that torch makes by default."""
    return tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
