"""The shortcut of a residual block that changes its channels, in the product of its other path."""

from __future__ import annotations

from typing import Any

from ..nn.packed import PackedConv2d
from ..nn.packed_sum import PackedConvSum2d, summable
from .fusion import Fusion


def sum_convolutions(fusion: Fusion) -> None:
    """A 1x1 convolution whose result is but added to that of another one becomes part of that."""
    traced, graph = fusion.traced, fusion.traced.graph
    for node in list(graph.nodes):
        first = fusion.module(node)
        if not isinstance(first, PackedConv2d) or len(node.args) != 2 or node.kwargs:
            continue
        shortcut: Any = node.args[1]
        second = fusion.module(shortcut)
        if not isinstance(second, PackedConv2d) or len(shortcut.args) != 1 or shortcut.kwargs:
            continue
        if node.args[0] is shortcut or len(shortcut.users) > 1 or not summable(first, second):
            continue
        nodes = list(graph.nodes)
        between = nodes[nodes.index(shortcut) + 1 : nodes.index(node)]
        if fusion.written(shortcut.args, between):
            continue
        traced.add_submodule(str(node.target), PackedConvSum2d(first, second))
        node.args = (node.args[0], shortcut.args[0])
        graph.erase_node(shortcut)
        fusion.report.append((str(node.target), f"summed with {shortcut.target} in one product"))
