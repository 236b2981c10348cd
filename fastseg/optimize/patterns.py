"""Pooling, pyramids and resized scores of a graph in forms of their own."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.packed import PackedConv2d
from ..nn.pooling import MaxPool2d
from ..nn.pyramid_pooling import PyramidConv2d
from ..nn.resize import MODES, Resize2d
from ..ops import max_unpool2d, to_torch_indices, upsample_argmax, upsample_softmax
from .fusion import Fusion, Report, argument, is_plain, module_of, only_user

WINDOW = ("kernel_size", "stride", "padding")
POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
# Layers that map each value of a grid on its own.
POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU)


def reshape_views(fusion: Fusion) -> None:
    """``view`` works on one memory layout, ``reshape`` on any; results here are channels last."""
    for node in fusion.traced.graph.nodes:
        if node.op != "call_method" or any(isinstance(arg, torch.dtype) for arg in node.args):
            continue
        if node.target in ("view", "view_as") and not any(map(fusion.writes, node.users)):
            node.target = str(node.target).replace("view", "reshape")


def pool(traced: fx.GraphModule, report: Report) -> None:
    """Max pools keep one byte per maximum; where an unpooling reads it, so does that."""
    for node in list(traced.graph.nodes):
        options = _pool_options(traced, node)
        if options is None or not _poolable(options):
            continue
        if not options["return_indices"]:
            _call(traced, node, MaxPool2d(**options), (argument(node, 0, "input"),))
            report.append((node.name, "max pool with compact indices"))
            continue
        if any(u.target is not operator.getitem for u in node.users):
            continue
        readers = [r for u in node.users if u.args[1] == 1 for r in u.users]
        window = {name: _pair(options[name]) for name in WINDOW}
        if not readers or any(_unpool_window(traced, r) != window for r in readers):
            continue
        x = argument(node, 0, "input")
        with traced.graph.inserting_before(node):
            size = traced.graph.call_function(getattr, (x, "shape"))
        for reader in readers:
            at = 2 if reader.op == "call_module" else 5
            args = (
                argument(reader, 0, "input"),
                argument(reader, 1, "indices"),
                size,
                argument(reader, at, "output_size"),
            )
            _call(traced, reader, Unpool(**window), args)
        _call(traced, node, MaxPool2d(**options), (x,))
        report.append((node.name, "max pool with compact indices, read by its unpooling"))


def faster_pool(module: nn.Module) -> MaxPool2d | None:
    """The max pool with compact indices that does what ``module`` does, outside of a graph."""
    if not is_plain(module, nn.MaxPool2d):
        return None
    options = _of_module(module)
    return MaxPool2d(**options) if _poolable(options) and not module.return_indices else None


class Unpool(nn.Module):
    """``F.max_unpool2d`` for compact indices of an image of size ``pooled``."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any) -> None:
        super().__init__()
        self.options = (kernel_size, stride, padding)

    def forward(self, x: Tensor, indices: Tensor, pooled: Any, output_size: Any = None) -> Tensor:
        size = output_size
        if size is None:
            size = [
                (n - 1) * s - 2 * p + k
                for n, k, s, p in zip(x.shape[-2:], *map(_pair, self.options), strict=True)
            ]
        if tuple(size[-2:]) == tuple(pooled[-2:]):
            return max_unpool2d(x, indices, *self.options, output_size=size)
        indices = to_torch_indices(indices, pooled, *self.options)
        return F.max_unpool2d(x, indices, *self.options, output_size=output_size)


def spread_single_values(traced: fx.GraphModule, report: Report) -> None:
    """Resizing a map of one pixel, as image pooling does, repeats it."""
    for node in list(traced.graph.nodes):
        resized = _resized(node)
        if resized is None or resized[0] is None or _grid(traced, resized[1]) != 1:
            continue
        size, source, _ = resized
        graph = traced.graph
        with graph.inserting_before(node):
            if isinstance(size, fx.Node):
                size = [graph.call_function(operator.getitem, (size, i)) for i in (0, 1)]
            h, w = _pair(size)
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
            resized = _resized(part)
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


def constants(traced: fx.GraphModule, settings: dict[str, Any], report: Report) -> None:
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


def resize_and_choose(traced: fx.GraphModule, report: Report) -> None:
    """``interpolate(...).argmax(1)`` and ``.softmax(1)`` in one pass."""
    for node in list(traced.graph.nodes):
        resized = _resized(node)
        after = only_user(node)
        if resized is None or after is None:
            continue
        size, source, align_corners = resized
        kind, keepdim = _reduction(traced, after)
        if kind is None:
            continue
        scale = argument(node, 2, "scale_factor")
        function = resized_labels if kind == "argmax" else resized_probabilities
        args = (source, size, scale, align_corners, *((keepdim,) if kind == "argmax" else ()))
        with traced.graph.inserting_before(after):
            new = traced.graph.call_function(function, args)
        after.replace_all_uses_with(new)
        traced.graph.erase_node(after)
        traced.graph.erase_node(node)
        report.append((after.name, f"resize and {kind} in one pass"))


def resize_maps(traced: fx.GraphModule, report: Report) -> None:
    """Resizing by kernels of our own; maps that stay in the graph go where the memory plan says."""
    for node in list(traced.graph.nodes):
        resized = _resized(node, MODES)
        if resized is None:
            continue
        if not node.users:  # one of several results that nobody takes
            traced.graph.erase_node(node)
            continue
        size, source, _ = resized
        scale = argument(node, 2, "scale_factor")
        options = (argument(node, 3, "mode", "nearest"), argument(node, 4, "align_corners"))
        module = Resize2d(None if size is not None else scale, *options)
        _call(traced, node, module, (source,) if size is None else (source, size))
        report.append((node.name, f"{options[0]} resize"))


def resized_labels(
    x: Tensor, size: Any, scale: Any, align_corners: bool, keepdim: bool = False
) -> Tensor:
    """``F.interpolate(x, size, scale, "bilinear", align_corners).argmax(1, keepdim)``."""
    if x.dtype not in (torch.float32, torch.float64) or x.shape[1] > 32768:
        y = F.interpolate(x, size, scale, "bilinear", align_corners or None)
        return y.argmax(1, keepdim)
    labels: Any = upsample_argmax(x, _target(x, size, scale), align_corners)
    labels = labels.long()
    return labels[:, None] if keepdim else labels


def resized_probabilities(x: Tensor, size: Any, scale: Any, align_corners: bool) -> Tensor:
    """``F.interpolate(x, size, scale, "bilinear", align_corners).softmax(1)``."""
    return upsample_softmax(x, _target(x, size, scale), align_corners)


def _target(x: Tensor, size: Any, scale: Any) -> tuple[int, int]:
    if size is not None:
        return _pair(size)
    h, w = (int(n * s) for n, s in zip(x.shape[-2:], _pair(scale), strict=True))
    return h, w


def _pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, list | tuple | torch.Size) else (value, value)
    return first, second


def _call(traced: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple) -> None:
    """Call this module in place of a node."""
    name = str(node.target) if node.op == "call_module" else f"{node.name}_fast"
    while any(other.target == name and other is not node for other in traced.graph.nodes):
        name += "_"
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(name, args)
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def _of_module(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in POOL}


def _pool_options(traced: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """The keyword arguments of the max pool that a node is."""
    module = module_of(traced, node)
    if is_plain(module, nn.MaxPool2d):
        return _of_module(module)
    if node.op != "call_function" or node.target not in (F.max_pool2d, F.max_pool2d_with_indices):
        return None
    defaults = (None, None, 0, 1, False, False)
    options = {
        name: argument(node, i, name, default)
        for i, (name, default) in enumerate(zip(POOL, defaults, strict=True), 1)
    }
    if node.target is F.max_pool2d_with_indices:
        options["return_indices"] = True
    if options["stride"] in (None, []):
        options["stride"] = options["kernel_size"]
    return options


def _unpool_window(traced: fx.GraphModule, node: fx.Node) -> dict[str, tuple] | None:
    module = module_of(traced, node)
    if is_plain(module, nn.MaxUnpool2d):
        kernel, stride, padding = (getattr(module, name) for name in WINDOW)
    elif node.target is F.max_unpool2d:
        kernel, stride = argument(node, 2, "kernel_size"), argument(node, 3, "stride")
        padding = argument(node, 4, "padding", 0)
    else:
        return None
    values = (kernel, kernel if stride is None else stride, padding)
    return dict(zip(WINDOW, map(_pair, values), strict=True))


def _poolable(options: dict[str, Any]) -> bool:
    """Whether :class:`fastseg.nn.MaxPool2d` has these options."""
    pairs = [_pair(options[name]) for name in POOL[:4]]
    if not all(isinstance(n, int) for pair in pairs for n in pair):
        return False
    return pairs[0][0] * pairs[0][1] <= 256 and pairs[3] == (1, 1)


def _resized(node: Any, modes: tuple[str, ...] = ("bilinear",)) -> tuple[Any, fx.Node, bool] | None:
    """Size (None where a whole factor is given), source and align_corners of a resize."""
    if not isinstance(node, fx.Node) or node.target is not F.interpolate:
        return None
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    given = {name: argument(node, i, name) for i, name in enumerate(names)}
    if (given["mode"] or "nearest") not in modes or argument(node, 6, "antialias", False):
        return None
    if given["size"] is None:
        factors = _pair(given["scale_factor"])
        if not all(isinstance(f, int | float) and f >= 1 and f == int(f) for f in factors):
            return None
    return given["size"], given["input"], bool(given["align_corners"])


def _reduction(traced: fx.GraphModule, node: fx.Node) -> tuple[str | None, bool]:
    """ "argmax" or "softmax" if the node is one over the classes, and whether it keeps the axis."""
    module = module_of(traced, node)
    if is_plain(module, nn.Softmax):
        return ("softmax" if module.dim == 1 else None), False  # type: ignore[union-attr]
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name not in ("argmax", "softmax"):
        return None, False
    if argument(node, 1, "dim") != 1 or node.kwargs.get("dtype") is not None:
        return None, False
    return str(name), name == "argmax" and bool(argument(node, 2, "keepdim", False))


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
        h, w = _pair(size)
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
        resized = _resized(node)
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
