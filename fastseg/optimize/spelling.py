"""One spelling of what networks write in several ways, for the rewriting of graphs behind."""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn.packed import PackedConv2d
from ..nn.packed_linear import PackedLinear
from ..nn.packed_transposed import PackedConvTranspose2d
from ..nn.resize import MODES
from .fusion import Fusion, argument, is_plain, module_of, only_user
from .tracing import LAYERS

UPSAMPLES = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)


def respell(traced: fx.GraphModule) -> None:
    """Layers that resize, paddings of convolutions, sums of stacks, and numbers of dimensions."""
    for node in traced.graph.nodes:
        _dimensions(traced, node)
    for node in list(traced.graph.nodes):
        for rule in (_upsample, _stack, _padding):
            new = rule(traced, node)
            if new is not None:
                sources = node.all_input_nodes
                node.replace_all_uses_with(new)
                traced.graph.erase_node(node)
                for source in sources:
                    if not source.users and source.op != "placeholder":
                        traced.graph.erase_node(source)
                break


def _dimensions(traced: fx.GraphModule, node: fx.Node) -> None:
    """Read from the input of a layer, which has as many: then nobody reads the result twice."""
    asks = node.target is getattr and node.args[1] == "ndim"
    if not asks and not (node.op == "call_method" and node.target == "dim"):
        return
    source: Any = node.args[0]
    while is_plain(module_of(traced, source), *LAYERS) and source.args:
        source = source.args[0]
    if isinstance(source, fx.Node):
        node.update_arg(0, source)


def reshape_views(fusion: Fusion) -> None:
    """``view`` works on one memory layout, ``reshape`` on any; results here are channels last."""
    for node in fusion.traced.graph.nodes:
        if node.op != "call_method" or any(isinstance(arg, torch.dtype) for arg in node.args):
            continue
        if node.target in ("view", "view_as") and not any(map(fusion.writes, node.users)):
            node.target = str(node.target).replace("view", "reshape")


def skip_contiguous(fusion: Fusion) -> None:
    """No copies to torch's layout for those who read any, and make another where they need it."""
    graph = fusion.traced.graph
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target != "contiguous" or len(node.args) != 1:
            continue
        readers = list(node.users)
        if node.kwargs or not readers or not all(_reads_any_layout(fusion, n) for n in readers):
            continue
        nodes = list(graph.nodes)
        last = max(nodes.index(reader) for reader in readers)
        if not fusion.written(node.args, nodes[nodes.index(node) : last]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _reads_any_layout(fusion: Fusion, node: fx.Node) -> bool:
    return isinstance(fusion.module(node), (PackedConv2d, PackedConvTranspose2d, PackedLinear))


def _upsample(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """``nn.Upsample`` as the function that it calls."""
    layer: Any = module_of(traced, node)
    if not is_plain(layer, *UPSAMPLES) or layer.mode not in MODES:
        return None
    options = (layer.size, layer.scale_factor, layer.mode, layer.align_corners)
    with traced.graph.inserting_before(node):
        return traced.graph.call_function(
            F.interpolate, (argument(node, 0, "input"), *options, layer.recompute_scale_factor)
        )


def _stack(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """``torch.stack(maps).sum(0)`` as additions, which write no stack."""
    stack: Any = node.args[0] if node.args else None
    if node.target not in (torch.sum, "sum") or not isinstance(stack, fx.Node):
        return None
    if stack.target is not torch.stack or only_user(stack) is not node:
        return None
    maps: Any = argument(stack, 0, "tensors")
    if argument(stack, 1, "dim", 0) != 0 or argument(node, 1, "dim") not in (0, [0], (0,)):
        return None
    if len(node.args) + len(node.kwargs) > 2 or not isinstance(maps, list | tuple):
        return None
    with traced.graph.inserting_before(node):
        total = functools.reduce(
            lambda a, b: traced.graph.call_function(operator.add, (a, b)), maps
        )
    return total if isinstance(total, fx.Node) and total is not maps[0] else None


def _padding(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A convolution of a map with zeros around it as one with that padding."""
    conv: Any = module_of(traced, node)
    pad = argument(node, 0, "input")
    if not is_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return None
    if isinstance(conv.padding, str) or not isinstance(pad, fx.Node) or len(pad.users) > 1:
        return None
    widths = _zeros_around(traced, pad)
    if widths is None or widths[0] != widths[1] or widths[2] != widths[3]:
        return None
    padded = copy.copy(conv)
    padded.padding = (conv.padding[0] + widths[2], conv.padding[1] + widths[0])
    name = f"{node.target}_padded"
    while hasattr(traced, name):
        name += "_"
    traced.add_submodule(name, padded)
    with traced.graph.inserting_before(node):
        return traced.graph.call_module(name, (argument(pad, 0, "input"),))


def _zeros_around(traced: fx.GraphModule, node: fx.Node) -> list[int] | None:
    """Left, right, above and below, if that is what a node adds to a map."""
    layer: Any = module_of(traced, node)
    if is_plain(layer, nn.ZeroPad2d):
        widths, mode, value = layer.padding, "constant", 0.0
    elif node.target is F.pad:
        widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
        value = argument(node, 3, "value") or 0.0
    else:
        return None
    known = isinstance(widths, list | tuple) and all(type(w) is int and w >= 0 for w in widths)
    return list(widths) if known and len(widths) == 4 and mode == "constant" and not value else None
