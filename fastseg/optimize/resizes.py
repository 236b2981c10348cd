"""Resized maps and scores of a graph by kernels of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.resize import MODES, Resize2d
from ..ops import upsample_argmax, upsample_softmax
from .fusion import Report, argument, call_instead, is_plain, module_of, only_user, pair


def resize_and_choose(traced: fx.GraphModule, report: Report) -> None:
    """``interpolate(...).argmax(1)`` and ``.softmax(1)`` in one pass."""
    for node in list(traced.graph.nodes):
        resized = resize_of(node)
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
        resized = resize_of(node, MODES)
        if resized is None:
            continue
        if not node.users:  # one of several results that nobody takes
            traced.graph.erase_node(node)
            continue
        size, source, _ = resized
        scale = argument(node, 2, "scale_factor")
        options = (argument(node, 3, "mode", "nearest"), argument(node, 4, "align_corners"))
        module = Resize2d(None if size is not None else scale, *options)
        call_instead(traced, node, module, (source,) if size is None else (source, size))
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
        return pair(size)
    h, w = (int(n * s) for n, s in zip(x.shape[-2:], pair(scale), strict=True))
    return h, w


def resize_of(
    node: Any, modes: tuple[str, ...] = ("bilinear",)
) -> tuple[Any, fx.Node, bool] | None:
    """Size (None where a whole factor is given), source and align_corners of a resize."""
    if not isinstance(node, fx.Node) or node.target is not F.interpolate:
        return None
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    given = {name: argument(node, i, name) for i, name in enumerate(names)}
    if (given["mode"] or "nearest") not in modes or argument(node, 6, "antialias", False):
        return None
    if given["size"] is None:
        factors = pair(given["scale_factor"])
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
