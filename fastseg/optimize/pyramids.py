"""Grids and single pixels of a graph that are convolved before they are resized."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.packed import PackedConv2d
from ..nn.pyramid_pooling import PyramidConv2d
from .fusion import Report, argument, is_plain, module_of, pair
from .resizes import resize_of

# Layers that map each value of a grid on its own.
POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU)


def spread_single_values(traced: fx.GraphModule, report: Report) -> None:
    """Resizing a map of one pixel, as image pooling does, repeats it."""
    for node in list(traced.graph.nodes):
        resized = resize_of(node)
        if resized is None or resized[0] is None or _grid(traced, resized[1]) != 1:
            continue
        size, source, _ = resized
        graph = traced.graph
        with graph.inserting_before(node):
            if isinstance(size, fx.Node):
                size = [graph.call_function(operator.getitem, (size, i)) for i in (0, 1)]
            h, w = pair(size)
            new = graph.call_method("expand", (source, -1, -1, h, w))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        report.append((node.name, "resized from one pixel, repeats it"))


def pyramid(traced: fx.GraphModule, settings: dict[str, Any], report: Report) -> None:
    """A convolution of a map and resized grids, concatenated: the grids are convolved as they are,
    and the results spread over the map (:class:`fastseg.nn.PyramidConv2d`)."""
    for node in list(traced.graph.nodes):
        packed = module_of(traced, node)
        if not isinstance(packed, PackedConv2d) or len(node.args) != 1 or node.kwargs:
            continue
        if packed.groups > 1:
            continue
        parts = _concatenated(node.args[0])
        channels = [_channels(traced, part) for part in parts]
        grids: list[tuple[int, fx.Node, int]] = []  # position, grid, its size
        corners = set()
        for i, part in enumerate(parts):
            resized = resize_of(part)
            if resized and (b := _grid(traced, resized[1])):
                grids.append((i, resized[1], b))
                corners.add(resized[2])
        if not _splits(packed, parts, channels, grids, corners):
            continue
        _, C, k, _ = packed.weight.shape
        widths = _all_channels(traced, parts, C)
        if widths is None:
            continue
        columns = packed.weight.split(widths, 1)
        at = {i for i, *_ in grids}
        local = [i for i in range(len(parts)) if i not in at]

        def slices(which: list[int]) -> Tensor:
            return torch.cat([columns[i] for i in which], 1)  # noqa: B023

        conv = nn.Conv2d(1, 1, k, padding=k // 2, device="meta")
        conv.weight = nn.Parameter(slices(local), requires_grad=False)
        conv.bias = None if packed.bias is None else nn.Parameter(packed.bias, requires_grad=False)
        activation = {n: packed.options[n] for n in ("activation", "negative_slope")}
        spread = PyramidConv2d(
            slices([i for i, *_ in grids]), [b for *_, b in grids], corners.pop()
        )
        graph = traced.graph
        name = f"{node.target}_grids"
        traced.add_submodule(name, spread)
        with graph.inserting_before(node):
            whole = _concatenate(graph, [parts[i] for i in local])
            shape = graph.call_function(getattr, (whole, "shape"))
            size = graph.call_function(operator.getitem, (shape, slice(-2, None)))
            residual = graph.call_module(name, ([grid for _, grid, _ in grids], size))
        concatenation = node.args[0]
        node.args = (whole, residual)
        for unused in (concatenation, *(parts[i] for i in at)):
            if isinstance(unused, fx.Node) and not unused.users:
                graph.erase_node(unused)
        traced.add_submodule(str(node.target), PackedConv2d(conv, **activation, **settings))
        report.append((str(node.target), f"{len(grids)} grids convolved at their own size"))


def convolve_pixels(traced: fx.GraphModule, settings: dict[str, Any], report: Report) -> None:
    """A 1x1 convolution of maps of which some are one pixel, repeated: image pooling. What it makes
    of that pixel is a bias of the image, neither repeated in memory nor convolved at each pixel."""
    for node in list(traced.graph.nodes):
        packed = module_of(traced, node)
        if not isinstance(packed, PackedConv2d) or len(node.args) != 1 or node.kwargs:
            continue
        if not _is_pointwise(packed) or packed.groups > 1:
            continue
        parts = _concatenated(node.args[0])
        repeated = [i for i, part in enumerate(parts) if _repeats(traced, part)]
        channels = _all_channels(traced, parts, packed.weight.shape[1])
        if not 0 < len(repeated) < len(parts) or channels is None:
            continue
        columns = packed.weight.split(channels, 1)
        local = [i for i in range(len(parts)) if i not in repeated]

        def layer(which: list[int], bias: Tensor | None, **activation: Any) -> PackedConv2d:
            conv = nn.Conv2d(1, 1, 1, device="meta")
            weight = torch.cat([columns[i] for i in which], 1)  # noqa: B023
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            return PackedConv2d(conv, **activation, **settings)

        graph, name = traced.graph, f"{node.target}_pooled"
        traced.add_submodule(name, layer(repeated, None))
        activation = {n: packed.options[n] for n in ("activation", "negative_slope")}
        traced.add_submodule(str(node.target), layer(local, packed.bias, **activation))
        with graph.inserting_before(node):
            whole = _concatenate(graph, [parts[i] for i in local])
            pixel = _concatenate(graph, [parts[i].args[0] for i in repeated])
            shape = graph.call_function(getattr, (whole, "shape"))
            size = [graph.call_function(operator.getitem, (shape, i)) for i in (2, 3)]
            bias = graph.call_module(name, (pixel,))
            bias = graph.call_method("expand", (bias, -1, -1, *size))
        concatenation = node.args[0]
        node.args = (whole, bias)
        for unused in dict.fromkeys((concatenation, *(parts[i] for i in repeated))):
            if not unused.users:
                graph.erase_node(unused)
        report.append((str(node.target), "image pooling is a bias of the image"))


def _repeats(traced: fx.GraphModule, part: fx.Node) -> bool:
    """Whether a map is one pixel, repeated. A single channel may be repeated as well."""
    if part.op != "call_method" or part.target not in ("expand", "expand_as"):
        return False
    return _grid(traced, part.args[0]) == 1 and (_channels(traced, part.args[0]) or 1) > 1


def _concatenated(node: Any) -> list[fx.Node]:
    """The maps that a node concatenates along the channels for one reader; else nothing."""
    if not isinstance(node, fx.Node) or node.target is not torch.cat or len(node.users) != 1:
        return []
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if dim != 1 or not isinstance(parts, list | tuple):
        return []
    return list(parts) if all(isinstance(part, fx.Node) for part in parts) else []


def _concatenate(graph: fx.Graph, maps: list[Any]) -> Any:
    return graph.call_function(torch.cat, (maps, 1)) if len(maps) > 1 else maps[0]


def _splits(
    packed: PackedConv2d,
    parts: list[fx.Node],
    channels: list[int | None],
    grids: list[tuple[int, fx.Node, int]],
    corners: set[bool],
) -> bool:
    """Whether a convolution of these parts can take the grids as they are, and gains by it."""
    k = packed.weight.shape[2]
    same = {"stride": (1, 1), "padding": (k // 2, k // 2), "dilation": (1, 1)}
    if k % 2 == 0 or packed.weight.shape[3] != k or not 0 < len(grids) < len(parts):
        return False
    if any(tuple(packed.options[name]) != value for name, value in same.items()):
        return False
    widths = {channels[i] for i, *_ in grids}
    if len(corners) != 1 or len(widths) != 1 or None in widths:
        return False
    cells = sum(b * b for *_, b in grids)
    return any(b > 1 for *_, b in grids) and 4 * cells < len(grids) * (widths.pop() or 0)


def _grid(traced: fx.GraphModule, node: Any) -> int | None:
    """Side of a map whose size does not depend on the image, as adaptive pooling makes it."""
    if not isinstance(node, fx.Node):
        return None
    module = module_of(traced, node)
    if is_plain(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d:
        size: Any = module.output_size if module else argument(node, 1, "output_size")
        h, w = pair(size)
        return h if isinstance(h, int) and h == w else None
    if node.target in (torch.mean, "mean") and argument(node, 2, "keepdim", False):
        axes = argument(node, 1, "dim")
        return (
            1 if isinstance(axes, list | tuple) and sorted(a % 4 for a in axes) == [2, 3] else None
        )
    if isinstance(module, PackedConv2d):
        keeps = len(node.args) == 1 and _is_pointwise(module)
    else:
        keeps = is_plain(module, *POINTWISE) or node.target in (F.relu, torch.relu, "relu", "relu_")
    return _grid(traced, node.args[0]) if keeps else None


def _is_pointwise(packed: PackedConv2d) -> bool:
    """Whether a convolution maps each pixel on its own."""
    same = (("stride", (1, 1)), ("padding", (0, 0)))
    return tuple(packed.weight.shape[2:]) == (1, 1) and all(
        tuple(packed.options[name]) == value for name, value in same
    )


def _channels(traced: fx.GraphModule, node: Any) -> int | None:
    """Channels of a map, where a convolution on the way to it tells."""
    while isinstance(node, fx.Node):
        module = module_of(traced, node)
        if isinstance(module, PackedConv2d):
            return module.weight.shape[0]
        resized = resize_of(node)
        if resized is None and not is_plain(module, *POINTWISE) and not _repeats(traced, node):
            return None
        node = resized[1] if resized else node.args[0]
    return None


def _all_channels(traced: fx.GraphModule, parts: list[fx.Node], total: int) -> list[int] | None:
    """Channels of maps that have so many together, if they are known of all but one."""
    channels = [_channels(traced, part) for part in parts]
    known = [c for c in channels if c is not None]
    if len(known) < len(parts) - 1:
        return None
    return [total - sum(known) if c is None else c for c in channels]
