"""Max pools of a graph that keep one byte per maximum, and the unpools that read it."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.pooling import MaxPool2d
from ..ops import max_unpool2d, to_torch_indices
from .fusion import Report, argument, call_instead, is_plain, module_of, pair

WINDOW = ("kernel_size", "stride", "padding")
POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

READ_BY_UNPOOLING = "max pool with compact indices, read by its unpooling"  # in reports


def pool(traced: fx.GraphModule, report: Report) -> None:
    """Max pools keep one byte per maximum; where an unpooling reads it, so does that."""
    for node in list(traced.graph.nodes):
        options = _pool_options(traced, node)
        if options is None or not _poolable(options):
            continue
        if not options["return_indices"]:
            call_instead(traced, node, MaxPool2d(**options), (argument(node, 0, "input"),))
            report.append((node.name, "max pool with compact indices"))
            continue
        if any(u.target is not operator.getitem for u in node.users):
            continue
        readers = [r for u in node.users if u.args[1] == 1 for r in u.users]
        window = {name: pair(options[name]) for name in WINDOW}
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
            call_instead(traced, reader, Unpool(**window), args)
        call_instead(traced, node, MaxPool2d(**options), (x,))
        report.append((node.name, READ_BY_UNPOOLING))


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
                for n, k, s, p in zip(x.shape[-2:], *map(pair, self.options), strict=True)
            ]
        if tuple(size[-2:]) == tuple(pooled[-2:]):
            return max_unpool2d(x, indices, *self.options, output_size=size)
        indices = to_torch_indices(indices, pooled, *self.options)
        return F.max_unpool2d(x, indices, *self.options, output_size=output_size)


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
    return dict(zip(WINDOW, map(pair, values), strict=True))


def _poolable(options: dict[str, Any]) -> bool:
    """Whether :class:`fastseg.nn.MaxPool2d` has these options."""
    pairs = [pair(options[name]) for name in POOL[:4]]
    if not all(isinstance(n, int) for pair in pairs for n in pair):
        return False
    return pairs[0][0] * pairs[0][1] <= 256 and pairs[3] == (1, 1)
