"""Layers and batch norms that a graph calls as functions, as the modules they come from."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .fusion import Report, argument, module_of

LINEAR: tuple[str, ...] = ("weight", "bias")
CONV: tuple[str, ...] = ("weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED: tuple[str, ...] = (
    "weight",
    "bias",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "dilation",
)
BATCH_NORM: tuple[str, ...] = (
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)
# What torch.compile makes of the name of a weight.
COMPILED = re.compile(r"L_self_modules_(.+)_parameters_weight_")


def lift(traced: fx.GraphModule, values: Mapping[fx.Node, Tensor], report: Report) -> list[Tensor]:
    """Turn calls of ``conv2d`` and the like into modules, where all their weights are among
    ``values``, the nodes whose values will not change.

    Returns:
        The tensors that the new modules hold.
    """
    used: list[Tensor] = []
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.conv2d:
            names, count = CONV, 2
        elif node.target is torch.conv_transpose2d:
            names, count = TRANSPOSED, 2
        elif node.target is F.linear:
            names, count = LINEAR, 2
        elif node.target is F.batch_norm and isinstance(
            module_of(traced, argument(node, 0, "input")), nn.Conv2d | nn.ConvTranspose2d
        ):
            names, count = BATCH_NORM, 4
        else:
            continue
        given = {n: argument(node, i, n) for i, n in enumerate(names, 1)}
        tensors = {n: values.get(given[n], given[n]) for n in names[:count]}
        if any(isinstance(v, fx.Node) for v in (*tensors.values(), *list(given.values())[count:])):
            if names in (CONV, TRANSPOSED):
                report.append((node.name, "left to torch, its weights are computed"))
            continue
        make: Any = MAKERS[names]
        layer = make(**(given | tensors))
        if layer is None:
            continue
        used += [t for t in tensors.values() if t is not None]
        name = _name(traced, node, given["weight"] or given.get("running_mean"))
        traced.add_submodule(name, layer)
        with graph.inserting_before(node):
            new = graph.call_module(name, (argument(node, 0, "input"),))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in values:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return used


def _conv(
    kind: Any,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    groups: int | None = None,
    **output_padding: Any,  # of transposed ones
) -> nn.Conv2d | nn.ConvTranspose2d:
    first, second, R, S = weight.shape
    groups = groups or 1
    sizes = (second * groups, first) if kind is nn.Conv2d else (first, second * groups)
    conv = kind(
        *sizes,
        (R, S),
        stride=stride or 1,
        padding=padding or 0,
        dilation=dilation or 1,
        groups=groups,
        bias=bias is not None,
        device="meta",
        **{name: value or 0 for name, value in output_padding.items()},
    )
    conv.weight, conv.bias = _frozen(weight), _frozen(bias)
    return conv.eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    K, C = weight.shape
    linear = nn.Linear(C, K, bias is not None, device="meta")
    linear.weight, linear.bias = _frozen(weight), _frozen(bias)  # type: ignore[assignment]
    return linear.eval()


def _batch_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool | None = None,
    momentum: float | None = None,
    eps: float | None = None,
) -> nn.BatchNorm2d | None:
    if running_mean is None or running_var is None or training:
        return None
    eps = 1e-5 if eps is None else eps
    bn = nn.BatchNorm2d(len(running_mean), eps, affine=False, device="meta")
    bn.running_mean, bn.running_var = running_mean.detach(), running_var.detach()
    bn.weight, bn.bias = _frozen(weight), _frozen(bias)  # type: ignore[assignment]
    return bn.eval()


MAKERS = {
    CONV: functools.partial(_conv, nn.Conv2d),
    TRANSPOSED: functools.partial(_conv, nn.ConvTranspose2d),
    LINEAR: _linear,
    BATCH_NORM: _batch_norm,
}


def _frozen(t: Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach(), requires_grad=False)


def _name(traced: fx.GraphModule, node: fx.Node, weight: Any) -> str:
    """A free name that tells where in the network the weight is."""
    found = COMPILED.fullmatch(str(weight.target))
    name = found[1].replace("_modules_", ".") if found else node.name
    while any(n == name or n.startswith(name + ".") for n, _ in traced.named_modules()):
        name += "_"
    return name
