"""``torch.compile(model, backend="fastseg")``: the same on the compiler's graph."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ops._layout import in_layout
from .graph import optimize_graph
from .tracing import attribute

LOG = logging.getLogger("fastseg")
WEIGHTS = (Tensor, nn.Parameter)


def compile_graph(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of ``torch.compile``: the compiler's graph with its convolutions by the engine.

    Weights may change between calls; they are then packed anew. Where gradients are wanted the
    graph runs as it is. What was done and what not is logged by the logger "fastseg" at INFO.
    """
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in example_inputs
    ):
        LOG.info("left to torch: gradients are wanted; compile and call under torch.no_grad()")
        return graph.forward
    return CompiledGraph(graph, example_inputs)


class CompiledGraph:
    """The optimised graph, made again when a weight that it holds has changed."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.graph = graph
        self.lock = threading.Lock()
        self.held: list[tuple[int | None, Tensor, tuple]] = []  # number of the input, tensor, state
        self.run = self.build(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        run = self.run
        if self.changed(inputs):
            with self.lock:
                if self.changed(inputs):
                    self.run = self.build(inputs)
                run = self.run
        return run(*inputs)

    def build(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        traced = fx.GraphModule(self.graph, copy.deepcopy(self.graph.graph))
        nodes = [node for node in traced.graph.nodes if node.op == "placeholder"]
        values = {n: t for n, t in zip(nodes, inputs, strict=True) if _is_weight(t)}
        # Where torch._inductor.config.freezing is set, weights are not inputs.
        attributes = (n for n in traced.graph.nodes if n.op == "get_attr")
        frozen = {n: attribute(traced, str(n.target)) for n in attributes}
        frozen = {n: t for n, t in frozen.items() if type(t) in WEIGHTS and not t.is_inference()}
        values |= frozen
        _restore_layout(traced.graph)
        report, held = optimize_graph(traced, {}, values)
        ours = {id(t) for t in held}
        places = [*enumerate(inputs), *((None, t) for t in frozen.values())]
        self.held = [(i, t, _state(t)) for i, t in places if id(t) in ours]
        for name, text in report:
            LOG.info("%s: %s", name, text)
        return traced.forward

    def changed(self, inputs: Sequence[Any]) -> bool:
        return any(
            (i is not None and inputs[i] is not t) or _state(t) != state
            for i, t, state in self.held
        )


def _restore_layout(graph: fx.Graph) -> None:
    """Results that leave the graph get the memory layout that the code behind it was promised."""
    output = next(reversed(graph.nodes))
    with graph.inserting_before(output):
        for node in output.all_input_nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.dim() == 4 and value.is_contiguous():
                output.replace_input_with(
                    node, graph.call_function(in_layout, (node, torch.contiguous_format))
                )


def _is_weight(value: Any) -> bool:
    if type(value) not in WEIGHTS or value.is_inference():
        return False
    return isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _state(t: Tensor) -> tuple[int, int]:
    """Changes in place change the version, ``.data = `` the address."""
    return t._version, t.data_ptr()
