"""Averages of one map over grids, which read it once."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..memory_plan import reads_only
from ..nn.packed import PackedConv2d
from ..nn.pyramid_pooling import GridPool2d
from .fusion import Report, argument, is_plain, module_of


def pool_grids(traced: fx.GraphModule, report: Report) -> None:
    """The averages of each map over square grids become one :class:`GridPool2d`."""
    graph, modules = traced.graph, dict(traced.named_modules())
    pools: dict[fx.Node, list[tuple[fx.Node, int]]] = {}  # of each map, with their sizes
    for node in graph.nodes:
        size = _grid_size(traced, node)
        source = argument(node, 0, "input")
        if size is not None and isinstance(source, fx.Node):
            pools.setdefault(source, []).append((node, size))
    for source, grids in pools.items():
        if not all(reads_only(user, source, modules) for user in source.users):
            continue  # somebody may change the map between two of them
        first = grids[0][0]
        name = f"{first.name}_grids"
        traced.add_submodule(name, GridPool2d([size for _, size in grids]))
        with graph.inserting_before(first):
            pooled = graph.call_module(name, (source,))
        for i, (node, _) in enumerate(grids):
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (pooled, i)))
            graph.erase_node(node)
        sizes = ", ".join(str(size) for _, size in grids)
        report.append((name, f"averages over grids of side {sizes}, the map read once"))


def _grid_size(traced: fx.GraphModule, node: fx.Node) -> int | None:
    """The side of the grid that an adaptive average pool makes, if it is a square."""
    module = module_of(traced, node)
    if is_plain(module, nn.AdaptiveAvgPool2d):
        size = module.output_size  # type: ignore[union-attr]
    elif node.target is F.adaptive_avg_pool2d:
        size = argument(node, 1, "output_size")
    elif _is_mean(traced, node):
        size = 1
    else:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height if isinstance(height, int) and height == width else None


def _is_mean(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is the mean of each channel of a convolution's result."""
    if node.target not in (torch.mean, "mean") or node.kwargs.get("dtype") is not None:
        return False
    axes, keeps = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    if not isinstance(axes, list | tuple) or sorted(a % 4 for a in axes) != [2, 3] or not keeps:
        return False
    return isinstance(module_of(traced, argument(node, 0, "input")), PackedConv2d)
