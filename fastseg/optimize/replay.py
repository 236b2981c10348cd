"""The operator calls of an optimised network, recorded once per input shape and then repeated.

U2-Net-p calls some 170 operators through 200 modules. Their inner maps lie in buffers that stay
(:mod:`fastseg.memory_plan`), so that every call with inputs of one shape passes the same tensors,
options and views to the same operators: the modules need to find them but once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ..memory_plan import MODULES, Buffers, Concat
from .tracing import has_hooks

SHAPES = 8  # of which each thread keeps the calls
KINDS = (*MODULES, Concat)  # which compute what their arguments' shapes say, and nothing else
PLAIN = (Tensor, int, float, bool, str, type(None))


class Replayed(nn.Module):
    """A graph that is run by its modules at first and by a :class:`Tape` from the third call with
    inputs of one shape on. Children, parameters and buffers are those of the graph.

    Args:
        network: a graph for which :func:`buffers_of` has an answer.
        memory: that answer.
    """

    def __init__(self, network: fx.GraphModule, memory: Buffers) -> None:
        super().__init__()
        self.training = network.training
        self.held = (network,)  # not a child of its own
        self.memory = memory
        self.__setstate__(self.__dict__)

    @property
    def graph(self) -> fx.Graph:
        return self.held[0].graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (network,) = self.held
        if torch.compiler.is_compiling() or kwargs or not _replayable(args):
            return network(*args, **kwargs)
        inputs = ((x.shape, x.stride(), x.dtype, x.device) for x in args)
        key = (torch.is_inference_mode_enabled(), *inputs)
        tapes = self.memory.tapes
        if key not in tapes:  # buffers may have to grow first, and weights to be packed
            result = network(*args)
            while len(tapes) >= SHAPES:
                del tapes[next(iter(tapes))]
            tapes[key] = None
            return result
        tape = tapes[key]
        if tape is not None and tape.is_of(self):
            return tape(args)
        if tape is None and not _any_hooks(self):
            recorder = Recorder(args)
            with recorder:
                result = network(*args)
            tapes[key] = recorder.tape(result, self)
            return result
        return network(*args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = self.held[0].__dict__[name]


def buffers_of(network: fx.GraphModule) -> Buffers | None:
    """Where the results of a graph lie, if all that it calls depends on shapes alone."""
    modules = dict(network.named_modules())
    called = [modules[str(n.target)] for n in network.graph.nodes if n.op == "call_module"]
    others = [n for n in network.graph.nodes if n.op not in ("call_module", "placeholder")]
    if not all(type(m) in KINDS for m in called) or not all(map(_is_operator, others)):
        return None
    places = (getattr(m, "place", None) for m in called)
    return next((place.buffers for place in places if place is not None), None)


def _is_operator(node: fx.Node) -> bool:
    if node.op == "call_function":
        name = getattr(node.target, "__module__", None) or ""
        known = ("torch", "_operator", "builtins", "collections", "fastseg")
        return name.partition(".")[0] in known or isinstance(node.target, type(torch.conv2d))
    return node.op == "output" or (node.op == "call_method" and node.target != "numpy")


def _replayable(inputs: Sequence[Any]) -> bool:
    """Whether these are different plain tensors, and nobody watches or changes what is called."""
    return (
        all(type(x) is Tensor for x in inputs)
        and len({id(x) for x in inputs}) == len(inputs)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
    )


def _any_hooks(module: nn.Module) -> bool:
    return _has_any_global_hook() or any(has_hooks(m) for m in module.modules() if m is not module)


class Tape:
    """Calls of operators with the tensors that are always the same, and gaps for the others: inputs
    and results that are made anew. Made by :class:`Recorder`."""

    def __init__(self, steps: list[tuple], slots: int, results: tuple, owner: nn.Module) -> None:
        self.steps = steps
        self.slots = slots
        self.results = results
        self.children = [
            (m._modules, name, child) for m in owner.modules() for name, child in m._modules.items()
        ]
        self.handles = RemovableHandle.next_id

    def is_of(self, owner: nn.Module) -> bool:
        """Whether it still does what its owner would: no layer was replaced, none got hooks."""
        if self.handles != RemovableHandle.next_id:  # a hook, of whatever
            if _any_hooks(owner):
                return False
            self.handles = RemovableHandle.next_id
        return all(parent.get(name) is child for parent, name, child in self.children)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        values: list[Any] = [*inputs, *[None] * (self.slots - len(inputs))]
        for call, args, gaps, made, done in self.steps:
            result = call(*_filled(args, gaps, values)) if gaps else call(*args)
            if made:
                leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
                for i, slot in made:
                    values[slot] = leaves[i]
            for slot in done:
                values[slot] = None
        leaves, gaps, form = self.results
        return tree_unflatten(_filled(leaves, gaps, values), form)


def _filled(args: list[Any], gaps: list[tuple[int, int]], values: list[Any]) -> list[Any]:
    args = args.copy()
    for i, slot in gaps:
        args[i] = values[slot]
    return args


class Recorder(TorchDispatchMode):
    """Sees every call of an operator in the meantime. A result is either a view of what is always
    the same, such as a place in a buffer, and then is that too, or gets a slot."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.made = list(inputs)  # by slot; alive, so that each address is one tensor
        self.slots = {id(x): i for i, x in enumerate(inputs)}
        self.calls: list[tuple] = []
        self.repeatable = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiled code gets here; to make sure of that torch would load its compiler, for a
        second or two."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fixed = {t.untyped_storage()._cdata for t in given if id(t) not in self.slots}
        fresh = []
        for i, t in enumerate(tree_leaves(result)):
            if not isinstance(t, Tensor):
                self.repeatable &= t is None  # else a value that the code behind may look at
            elif id(t) not in self.slots and t.untyped_storage()._cdata not in fixed:
                self.slots[id(t)] = len(self.made)
                fresh.append((i, len(self.made)))
                self.made.append(t)
        if fresh or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, fresh))
        return result

    def tape(self, result: Any, owner: nn.Module) -> Tape | None:
        """The calls that change something or lead to the result; None if they would not do."""
        leaves, form = tree_flatten(result)
        if not self.repeatable or not all(isinstance(leaf, PLAIN) for leaf in leaves):
            return None
        needed = {slot for _, slot in self._gaps(leaves)}
        steps: list[tuple] = []
        for func, args, kwargs, fresh in reversed(self.calls):
            if not func._schema.is_mutable and not any(slot in needed for _, slot in fresh):
                continue
            flat, shape = tree_flatten((args, kwargs))
            gaps = self._gaps(flat)
            call: Callable = func
            if kwargs or len(flat) != len(args) or not all(isinstance(a, PLAIN) for a in args):
                call = functools.partial(_call_tree, func, shape)
            used = {slot for _, slot in (*gaps, *fresh)}
            steps.append((call, flat, gaps, fresh, sorted(used - needed)))  # read here at last
            needed |= used
        return Tape(steps[::-1], len(self.made), (leaves, self._gaps(leaves), form), owner)

    def _gaps(self, leaves: list[Any]) -> list[tuple[int, int]]:
        return [(i, self.slots[id(t)]) for i, t in enumerate(leaves) if id(t) in self.slots]


def _call_tree(func: Callable, shape: Any, *leaves: Any) -> Any:
    args, kwargs = tree_unflatten(leaves, shape)
    return func(*args, **kwargs)
