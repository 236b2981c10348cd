"""An optimised network in bfloat16: what is cast, and what stays float32."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ..nn.crfrnn import CRFRNN
from ..nn.packed import PackedConv2d
from ..nn.packed_transposed import PackedConvTranspose2d
from ..nn.pyramid_pooling import PyramidConv2d
from ..nn.resize import Resize2d
from ..ops._layout import in_layout
from .fusion import module_of
from .resizes import resized_labels, resized_probabilities

# Their parameters take inputs of any dtype.
KEPT = (PackedConv2d, PackedConvTranspose2d, nn.modules.batchnorm._BatchNorm, PyramidConv2d, CRFRNN)
RESIZES = (F.interpolate, resized_labels, resized_probabilities)  # and Resize2d


def to_bfloat16(module: nn.Module, widens: bool) -> nn.Module:
    """``module`` with parameters in bfloat16, except where float32 ones cost nothing, behind a cast
    of its floating-point inputs to bfloat16, and before one of its bfloat16 results to float32 if
    it ``widens`` them: where a convolution makes one, by that if it can."""
    for part in module.modules():
        if isinstance(part, KEPT):
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                part._parameters[name] = nn.Parameter(parameter.detach().bfloat16(), False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.bfloat16()
    if isinstance(module, fx.GraphModule):
        _narrow_in_graph(module)  # its pickles lose hooks
    else:
        # Before one that asks for torch's layout.
        module.register_forward_pre_hook(_inputs, prepend=True, with_kwargs=True)
    if widens and isinstance(module, fx.GraphModule):
        _widen_in_graph(module)
    elif widens:
        if isinstance(module, PackedConv2d):
            module.widens = True
        module.register_forward_hook(_outputs)
    return module


def narrowed(value: Any) -> Any:
    """Floating-point tensors, also in tuples, lists and dicts, in bfloat16."""
    return _in_tensors(value, lambda t: _narrow(t) if t.is_floating_point() else t)


def widened(value: Any) -> Any:
    """Tensors in bfloat16, also in tuples, lists and dicts, in float32."""
    return _in_tensors(value, lambda t: _widen(t) if t.dtype == torch.bfloat16 else t)


def _in_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if type(value) is Tensor:  # by tree_map_only 8 us more; stand-ins answer no isinstance
        return change(value)
    return tree_map_only(Tensor, change, value)


def _narrow(t: Tensor) -> Tensor:
    image = t.dim() == 4 and t.dtype == torch.float32 and not t.requires_grad
    if image and t.stride(1) != 1:  # for the convolution behind
        return in_layout(t, torch.channels_last, narrow=True)
    return t.bfloat16()


def _widen(t: Tensor) -> Tensor:
    image = t.dim() == 4 and t.device.type == "cpu" and not t.requires_grad
    return torch.ops.fastseg.widen(t) if image else t.float()


def _narrow_in_graph(traced: fx.GraphModule) -> None:
    graph = traced.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(inputs):
        with graph.inserting_after(inputs[-1]):
            new = graph.call_function(narrowed, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    traced.recompile()


def _widen_in_graph(traced: fx.GraphModule) -> None:
    graph = traced.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = list(_results(output))
    for node in results:
        resizes = node.target in RESIZES or isinstance(module_of(traced, node), Resize2d)
        if resizes and node.args and len(node.users) == 1:
            # The map is cast before it is resized: it is smaller, and nothing is rounded again.
            source: Any = node.args[0]
            with graph.inserting_before(node):
                node.update_arg(0, graph.call_function(widened, (source,)))
    with graph.inserting_before(output):
        output.args = (graph.call_function(widened, output.args),)
    called = [module_of(traced, node) for node in graph.nodes]
    for node, conv in zip(graph.nodes, called, strict=True):
        ends = (widened, dict, OrderedDict) if node in results else (widened,)
        if isinstance(conv, PackedConv2d) and called.count(conv) == 1:
            conv.widens = all(user.target in ends for user in node.users)
    traced.recompile()


def _results(output: fx.Node) -> Iterator[fx.Node]:
    """What a graph returns, also within a dict that it makes."""
    for node in output.all_input_nodes:
        if node.target in (dict, OrderedDict):
            yield from _results(node)
        else:
            yield node


def _inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return narrowed((args, kwargs))


def _outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    return widened(output)
