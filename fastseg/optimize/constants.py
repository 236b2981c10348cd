"""Where bfloat16 is too coarse for a map: channels that are almost constant, and large.

A channel that varies by 0.2 around 226 is what training makes of a layer without need for it; the
next layer takes the constant out again by its bias. bfloat16's step at 226 is 1: each of its pixels
is rounded in the same direction, which no sum averages out. What such a channel adds to the next
layer's sums, as its bias tells, is compared to those of inputs of unit variance. If it is many
times larger, that map stays float32 on its way, and so does the arithmetic of both layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..memory_plan import concatenated, reads_shape
from ..nn.packed import PackedConv2d
from ..nn.pooling import MaxPool2d
from ..ops.conv_engine import activate
from .bfloat16 import narrowed, widened
from .fusion import Report, is_plain, module_of

POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
RESIZES = (F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)

# Times the response to inputs of unit variance. A constant is off by up to 2 ** -9 of itself, that
# is by half of this response from here on. Networks whose features were normalised have up to 2;
# U2-Net-p's weights once 504, alone off by 13 to 29 % of the logits, and 120, off by less than 1 %.
LIMIT = 256.0


def keep_float32(traced: fx.GraphModule, report: Report) -> None:
    """Let the layers between which a large constant passes compute in float32."""
    wide: dict[fx.Node, set[fx.Node]] = {}  # results in float32, and who reads them as they are
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if not isinstance(layer, PackedConv2d) or not isinstance(node.args[0], fx.Node):
            continue
        names = []
        for source, reader, first in _sources(traced, node.args[0], node, 0):
            if constant_part(_packed(traced, source), layer, first) > LIMIT:
                wide.setdefault(source, set()).add(reader)
                wide.setdefault(node, set())
                names.append(str(source.target))
        if names:
            text = f"in float32 from {', '.join(names)} on, whose constants cancel here"
            report.append((str(node.target), text))
    for node, readers in wide.items():
        _packed(traced, node).dtype = torch.float32
        with traced.graph.inserting_before(node):
            summands = [traced.graph.call_function(widened, (t,)) for t in node.args[1:]]
        node.args = (node.args[0], *summands)
        others = [u for u in node.users if u not in readers and not reads_shape(u, node)]
        if others:
            with traced.graph.inserting_after(node):
                narrow = traced.graph.call_function(narrowed, (node,))
            for user in others:
                user.replace_input_with(node, narrow)


def constant_part(producer: PackedConv2d, layer: PackedConv2d, first: int) -> float:
    """The largest contribution of a bias of ``producer``, whose results are the channels from
    ``first`` on of ``layer``'s input, to a sum of ``layer``, in units of that sum's response to
    inputs of unit variance."""
    if producer.bias is None:
        return 0.0
    constant = activate(
        producer.bias, producer.options["activation"], producer.options["negative_slope"]
    )
    weight, groups = layer.weight, layer.groups
    K, C = weight.shape[:2]
    channels = constant.new_zeros(groups * C)
    channels[first : first + len(constant)] = constant
    read = channels.view(groups, C).repeat_interleave(K // groups, 0)  # by each output channel
    sums = weight.sum((2, 3)) * read
    response = weight.square().sum((1, 2, 3)).sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
    return (sums.abs().amax(1) / response).max().item()


def _packed(traced: fx.GraphModule, node: fx.Node) -> PackedConv2d:
    layer = module_of(traced, node)
    assert isinstance(layer, PackedConv2d)
    return layer


def _sources(
    traced: fx.GraphModule, node: fx.Node, reader: fx.Node, first: int
) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """The packed convolutions whose results get to a map without arithmetic but that of resizing
    and pooling; the first node on the way, and at which channel of the map each begins."""
    if isinstance(module_of(traced, node), PackedConv2d):
        yield node, reader, first
    elif sum(not reads_shape(user, node) for user in node.users) == 1:
        for part in _parts(traced, node):
            yield from _sources(traced, part, node, first)
            count = _channels(traced, part)
            if count is None:
                return
            first += count


def _parts(traced: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The maps whose channels, one after the other, are those of ``node``."""
    if parts := concatenated(node):
        return parts
    layer = module_of(traced, node)
    keeps = node.target in RESIZES or is_plain(layer, *POOLS) or isinstance(layer, MaxPool2d)
    source = node.args[0] if keeps and node.args else None
    return [source] if isinstance(source, fx.Node) else []


def _channels(traced: fx.GraphModule, node: fx.Node) -> int | None:
    layer = module_of(traced, node)
    if isinstance(layer, PackedConv2d):
        return layer.weight.shape[0]
    counts = [_channels(traced, part) for part in _parts(traced, node)]
    return sum(c for c in counts if c) if counts and None not in counts else None
