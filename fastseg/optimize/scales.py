"""Scales of channels, by the convolution behind them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..nn.packed import PackedConv2d
from ..nn.packed_scaled import ScaledConv2d, scalable
from .fusion import Fusion

PRODUCTS = (operator.mul, torch.mul)


def scale_inputs(fusion: Fusion) -> None:
    """A product that a 1x1 convolution alone reads becomes part of that, which stores it nowhere
    where it is one of a map and of a value for each of its channels."""
    traced, graph = fusion.traced, fusion.traced.graph
    for node in list(graph.nodes):
        conv = fusion.module(node)
        if not isinstance(conv, PackedConv2d) or not node.args or node.kwargs:
            continue
        product = node.args[0]
        if not isinstance(product, fx.Node) or product.target not in PRODUCTS or product.kwargs:
            continue
        factors = product.args
        two = len(factors) == 2 and all(isinstance(factor, fx.Node) for factor in factors)
        if not two or len(product.users) > 1 or product in node.args[1:] or not scalable(conv):
            continue
        nodes = list(graph.nodes)
        if fusion.written(factors, nodes[nodes.index(product) + 1 : nodes.index(node)]):
            continue
        traced.add_submodule(str(node.target), ScaledConv2d(conv))
        node.args = (*factors, *node.args[1:])
        graph.erase_node(product)
        fusion.report.append((str(node.target), "scales its input by channels"))
