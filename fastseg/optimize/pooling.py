"""Max pools and unpools in the passes of the convolutions beside them."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ..memory_plan import reads_only
from ..nn.packed import PackedConv2d
from ..nn.packed_pool import PooledConv2d, UnpooledConv2d
from ..nn.pooling import MaxPool2d, MaxUnpool2d
from .fusion import Report, argument, module_of
from .max_pools import Unpool

UNPOOLINGS = (MaxUnpool2d, nn.MaxUnpool2d, Unpool)
WINDOWS = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0)}


def pool_results(traced: fx.GraphModule, report: Report) -> None:
    """A 2x2 max pool of a convolution's result becomes part of that convolution."""
    graph, modules = traced.graph, dict(traced.named_modules())
    for node in list(graph.nodes):
        pool: Any = module_of(traced, node)
        if not isinstance(pool, MaxPool2d) or not _is_2x2(pool) or pool.packed:
            continue
        source: Any = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        conv = module_of(traced, source)
        if not isinstance(conv, PackedConv2d) or not _transformed(conv):
            continue
        if not all(reads_only(user, source, modules) for user in source.users):
            continue  # somebody may change the result before it is pooled
        parts = {u: u.args[1] for u in node.users if u.target is operator.getitem}
        if pool.return_indices and len(parts) != len(node.users):
            continue
        sizes = [u for u in source.users if u.target in (getattr, "size")]
        keep = any(u is not node and u not in sizes for u in source.users)
        indices = pool.return_indices and 1 in parts.values()
        name = f"{source.target}_pooled"
        traced.add_submodule(name, PooledConv2d(conv, pool.ceil_mode, keep, indices))
        with graph.inserting_before(source):
            new = graph.call_module(name, source.args, source.kwargs)
            y, maxima, codes, shape = (
                graph.call_function(operator.getitem, (new, i)) for i in range(4)
            )
        for user in sizes:
            index = user.args[1:] if user.target == "size" else ()
            with graph.inserting_before(user):
                size = graph.call_function(operator.getitem, (shape, *index)) if index else shape
            user.replace_all_uses_with(size)
            graph.erase_node(user)
        if pool.return_indices:
            for user, i in parts.items():
                user.replace_all_uses_with((maxima, codes)[i])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(maxima)
        graph.erase_node(node)
        source.replace_all_uses_with(y)
        graph.erase_node(source)
        for part in (y, maxima, codes, shape):
            if not part.users:
                graph.erase_node(part)
        report.append((str(source.target), "pools its result in the same pass"))


def unpool_inputs(traced: fx.GraphModule, report: Report) -> None:
    """An unpooling of 2x2 windows becomes part of the convolution that alone reads its result."""
    graph, modules = traced.graph, dict(traced.named_modules())
    for node in list(graph.nodes):
        unpool: Any = module_of(traced, node)
        if not isinstance(unpool, MaxUnpool2d | Unpool) or not _is_2x2(unpool):
            continue
        reader: Any = next(iter(node.users), None)
        conv = module_of(traced, reader)
        if not isinstance(conv, PackedConv2d) or not _transformed(conv) or len(node.users) > 1:
            continue
        args: Any = (*node.args, *node.kwargs.values())
        if reader.args[0] is not node or node in reader.args[1:] or reader.kwargs:
            continue
        if len(args) < 2 or [*node.kwargs] not in ([], ["output_size"]):
            continue
        if not all(u is node or reads_only(u, args[0], modules) for u in args[0].users):
            continue
        name = f"{reader.target}_unpooled"
        traced.add_submodule(name, UnpooledConv2d(unpool, conv))
        residual = {"residual": reader.args[1]} if len(reader.args) > 1 else {}
        with graph.inserting_before(reader):
            new = graph.call_module(name, args, residual)
        reader.replace_all_uses_with(new)
        graph.erase_node(reader)
        graph.erase_node(node)
        report.append((str(reader.target), "unpools its input in the same pass"))


def decide_maxima(network: nn.Module) -> list[PackedConv2d]:
    """The convolutions of an optimised network whose results decide where an unpooling puts its
    values: those that the indices come from, or all where that cannot be seen."""
    convs = [m for m in network.modules() if isinstance(m, PackedConv2d)]
    if not isinstance(network, fx.GraphModule):
        return convs
    unseen = {m for m in network.modules() if isinstance(m, UNPOOLINGS)}
    deciding: dict[fx.Node, None] = {}  # a set in order
    for node in network.graph.nodes:
        called = module_of(network, node)
        unpool = called.unpool if isinstance(called, UnpooledConv2d) else called
        if node.target is F.max_unpool2d or isinstance(unpool, UNPOOLINGS):
            deciding[argument(node, 1, "indices")] = None
            unseen -= {unpool}
    if unseen or not deciding:
        return convs
    ahead = list(deciding)
    while ahead:
        sources = [n for n in ahead.pop().all_input_nodes if n not in deciding]
        deciding |= dict.fromkeys(sources)
        ahead += sources
    parts = {m for node in deciding if (part := module_of(network, node)) for m in part.modules()}
    return [conv for conv in convs if conv in parts]


def _is_2x2(module: Any) -> bool:
    options = getattr(module, "options", None) or [getattr(module, name) for name in WINDOWS]
    return all(o in (w, w[0]) for o, w in zip(options, WINDOWS.values(), strict=True))


def _transformed(conv: PackedConv2d) -> bool:
    """Whether the engine may choose Winograd's tiles for it."""
    return tuple(conv.weight.shape[2:]) == (3, 3) and all(
        tuple(conv.options[name]) == (1, 1) for name in ("stride", "dilation")
    )
