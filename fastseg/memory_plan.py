"""Where the results of an optimised network's convolutions go: buffers that are used again.

A fresh tensor of some megabytes is mapped, page-faulted and unmapped anew by every call: that is a
tenth of a network's time. So each result that only the graph itself can see gets a slot of a buffer
set, such that no two results alive at the same time share one; and what feeds a concatenation is
written to its channels of that, where others read it too.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .nn.packed import PackedConv2d
from .nn.packed_linear import PackedLinear
from .nn.packed_pool import PooledConv2d, UnpooledConv2d
from .nn.packed_scaled import ScaledConv2d
from .nn.packed_sum import PackedConvSum2d
from .nn.packed_transposed import PackedConvTranspose2d
from .nn.pooling import MaxPool2d, MaxUnpool2d
from .nn.pyramid_pooling import GridPool2d, PyramidConv2d
from .nn.resize import Resize2d
from .ops._layout import channels_last

# What neither returns a view of its input nor writes to it; the first of these read some channels
# of a concatenation as well as a map of its own.
PACKED = (PackedConv2d, PackedConvSum2d, PackedConvTranspose2d)
STRIDED = (*PACKED, PooledConv2d, UnpooledConv2d, ScaledConv2d, Resize2d)
POOLS = (MaxPool2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MODULES = (*STRIDED, *POOLS, MaxUnpool2d, GridPool2d, PyramidConv2d, PackedLinear)
FUNCTIONS = (
    *(torch.cat, F.interpolate, F.adaptive_avg_pool2d, F.avg_pool2d),
    *(operator.add, torch.add, operator.mul, torch.mul, torch.mean),
)
METHODS = ("mean", "size")


class Buffers(threading.local):
    """One set of flat tensors per thread, so that calls in several threads do not meet."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.flat: dict[int, Tensor] = {}
        self.tapes: dict[tuple, Any] = {}  # fastseg.optimize.replay; they hold views of the above

    def __reduce__(self) -> tuple:
        return Buffers, (self.dtype,)  # copies start empty

    def image(self, slot: int, shape: Sequence[int]) -> Tensor:
        """A channels-last image (N, C, H, W) in this slot, with whatever values it has."""
        N, C, H, W = shape
        flat = self.flat.get(slot)
        if flat is None or flat.numel() < N * C * H * W:
            self.tapes.clear()
            with torch.inference_mode(False):
                flat = self.flat[slot] = torch.empty(N * C * H * W, dtype=self.dtype)
        return flat.as_strided((N, C, H, W), (H * W * C, 1, W * C, C))


class Place:
    """A slot, or ``channels`` from ``offset`` on of the concatenation of ``total`` in it."""

    def __init__(self, buffers: Buffers, slot: int, offset: int = 0, total: int | None = None):
        self.buffers = buffers
        self.dtype = buffers.dtype
        self.slot = slot
        self.offset = offset
        self.total = total

    def image(self, shape: Sequence[int]) -> Tensor:
        N, C, H, W = shape
        if torch.compiler.is_compiling():  # a compiled or exported program has its own memory plan
            return torch.empty((N, H, W, C), dtype=self.dtype).permute(0, 3, 1, 2)
        if self.total is None:
            return self.buffers.image(self.slot, shape)
        whole = self.buffers.image(self.slot, (N, self.total, H, W))
        return whole[:, self.offset : self.offset + C]


@dataclass
class Interval:
    """Results in one slot, from the first that is written to the last that is read."""

    first: int
    last: int
    places: list[Place]

    def extended(self, last: int, place: Place) -> Interval:
        """The same with a further result, written when the last one so far is read."""
        self.last = last
        self.places.append(place)
        return self


class Concat(nn.Module):
    """``torch.cat(parts, 1)`` of maps of which some are in their place already."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, *parts: Tensor) -> Tensor:
        batched = all(part.dim() == 4 for part in parts)
        if not batched or torch.compiler.is_compiling():
            return torch.cat(parts, 1)
        N, _, H, W = parts[0].shape
        total = sum(part.shape[1] for part in parts)
        if any(part.shape[::2] != (N, H) or part.shape[3] != W for part in parts):
            return torch.cat(parts, 1)  # raises, as the sizes do not match
        out = self.place.image((N, total, H, W))
        for part, target in zip(parts, out.split([p.shape[1] for p in parts], 1), strict=True):
            if part.data_ptr() != target.data_ptr():
                target.copy_(channels_last(part))
        return out


def plan_memory(traced: fx.GraphModule, dtype: torch.dtype = torch.float32) -> None:
    """Give those results of this graph's layers that are ``dtype`` their places."""
    graph, modules = traced.graph, dict(traced.named_modules())
    position = {node: i for i, node in enumerate(graph.nodes)}
    buffers = Buffers(dtype)

    def owner(node: fx.Node) -> Any:
        """The module whose ``place`` this result goes to, if it is ``dtype``."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        if not isinstance(source, fx.Node) or source.op != "call_module":
            return None
        module: Any = modules[str(source.target)]
        if isinstance(module, Resize2d | PyramidConv2d):
            return module  # which looks at the dtype itself
        conv = module if isinstance(module, PACKED) else getattr(module, "conv", None)
        if not isinstance(conv, PACKED) or conv.dtype != dtype:
            return None
        if isinstance(module, PooledConv2d):
            index: Any = node.args[1] if source is not node else None
            return {0: conv, 1: module}.get(index)
        return conv if source is node else None

    def written(node: fx.Node) -> int:
        """When the memory of a result is needed first."""
        return position[node.all_input_nodes[0] if node.target is operator.getitem else node]

    def replaced(node: fx.Node) -> fx.Node | None:
        """The summand of a convolution that nobody reads later: the sum takes its place."""
        module = modules.get(str(node.target))
        inputs = 2 if isinstance(module, ScaledConv2d) else 1
        if not isinstance(module, PackedConv2d | ScaledConv2d) or len(node.args) == inputs:
            return None
        *read, summand = cast(tuple[fx.Node, ...], node.args)
        if summand in read:
            return None
        return summand if _last_use(summand, position) == position[node] else None

    def stays_inside(node: fx.Node) -> bool:
        return all(reads_only(user, node, modules) for user in node.users)

    def fits_channels(part: fx.Node, cat: fx.Node) -> bool:
        """Whether a result may lie among the channels of a concatenation."""
        if owner(part) is None or part in placed:
            return False
        readers = [u for u in part.users if u is not cat and not reads_shape(u, part)]
        return all(
            reader.op == "call_module" and isinstance(modules[str(reader.target)], STRIDED)
            for reader in readers
        )

    intervals: list[Interval] = []
    placed: set[fx.Node] = set()
    whole: dict[fx.Node, Interval] = {}  # of the results that have a slot for themselves

    def give(node: fx.Node, place: Place) -> Place:
        owner(node).place = place
        placed.add(node)
        return place

    for cat in list(graph.nodes):
        parts = concatenated(cat)
        channels = [_channels(part, modules, dtype) for part in parts]
        if not parts or None in channels or not stays_inside(cat):
            continue
        inside = [part for part in parts if fits_channels(part, cat)]
        if not inside or len(set(parts)) != len(parts):
            continue
        total, offset, places = sum(c for c in channels if c), 0, [Place(buffers, 0)]
        for part, count in zip(parts, channels, strict=True):
            if part in inside:
                places.append(give(part, Place(buffers, 0, offset, total)))
            offset += count or 0
        name = f"{cat.name}_in_place"
        modules[name] = Concat(places[0])
        traced.add_submodule(name, modules[name])
        with graph.inserting_before(cat):
            new = graph.call_module(name, tuple(parts))
        cat.replace_all_uses_with(new)
        graph.erase_node(cat)
        position[new] = position.pop(cat)
        first = min(written(part) for part in inside)
        last = max(_last_use(n, position) for n in (new, *inside))
        intervals.append(Interval(first, last, places))
    for node in graph.nodes:
        if owner(node) is None or node in placed or not stays_inside(node):
            continue
        place, last = give(node, Place(buffers, 0)), _last_use(node, position)
        summand = replaced(node)
        if summand in whole:
            whole[node] = whole[summand].extended(last, place)
        else:
            whole[node] = Interval(written(node), last, [place])
            intervals.append(whole[node])

    ends: list[int] = []  # of each slot, the last use of what is in it
    for interval in sorted(intervals, key=lambda interval: (interval.first, interval.last)):
        free = [slot for slot, end in enumerate(ends) if end < interval.first]
        slot = max(free, key=ends.__getitem__) if free else len(ends)  # the one still in a cache
        ends[slot:] = [interval.last, *ends[slot + 1 :]]
        for place in interval.places:
            place.slot = slot
    traced.recompile()


def _last_use(node: fx.Node, position: dict[fx.Node, int]) -> int:
    return max((position[user] for user in node.users), default=position[node])


def reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes from ``node`` nothing but its size."""
    if user.op == "call_function":
        return user.target is getattr and user.args[1] == "shape"
    if user.op == "call_method":
        return user.target == "size" or (user.target == "expand_as" and user.args[0] is not node)
    return False


def reads_only(user: fx.Node, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the value of ``node`` is nowhere else once ``user`` has run."""
    if reads_shape(user, node):
        return True
    if user.op == "call_module":
        return isinstance(modules[str(user.target)], (*MODULES, Concat))
    if user.op == "call_method":
        return user.target in METHODS
    return user.op == "call_function" and user.target in FUNCTIONS


def concatenated(node: fx.Node) -> list[fx.Node]:
    """The operands, if ``node`` concatenates channels."""
    if node.op != "call_function" or node.target is not torch.cat:
        return []
    arguments = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts: Any = arguments["tensors"]
    if arguments.get("dim") != 1 or not all(isinstance(part, fx.Node) for part in parts):
        return []
    return list(parts)


def _channels(node: fx.Node, modules: dict[str, nn.Module], dtype: torch.dtype) -> int | None:
    """The number of channels of a map of this dtype, where the network alone tells both, or the
    compiler that made the graph."""
    example = node.meta.get("example_value")
    if isinstance(example, Tensor):
        known = example.dim() == 4 and example.dtype == dtype and type(example.shape[1]) is int
        return example.shape[1] if known else None
    source: Any = node.args[0] if node.args else None
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if isinstance(module, PACKED):
            transposed = isinstance(module, PackedConvTranspose2d)
            K = module.weight.shape[transposed] if module.dtype == dtype else None
            return None if K == 1 and len(node.args) > 1 else K  # the sum may broadcast
        if isinstance(module, UnpooledConv2d | ScaledConv2d):
            return module.conv.weight.shape[0] if module.conv.dtype == dtype else None
    if node.target is operator.getitem and isinstance(source, fx.Node):
        parent: Any = modules.get(str(source.target)) if source.op == "call_module" else None
        pooled = isinstance(parent, PooledConv2d) and parent.conv.dtype == dtype
        return parent.conv.weight.shape[0] if pooled and node.args[1] in (0, 1) else None
    same = (
        (node.op == "call_function" and node.target is F.interpolate)
        or (node.op == "call_method" and node.target in ("expand", "expand_as"))
        or (node.op == "call_module" and isinstance(modules[str(node.target)], (*POOLS, Resize2d)))
    )
    return _channels(source, modules, dtype) if same and isinstance(source, fx.Node) else None
