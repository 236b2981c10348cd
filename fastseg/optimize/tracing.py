"""From modules to graphs, where that changes nothing that the module does.

``torch.fx`` runs a ``forward`` once on stand-ins for tensors. What that run does not show it would
lose in silence: hooks, attributes that ``forward`` sets, a look at the type of an argument. Such a
module keeps its own ``forward``, and so does one that looks at values; the reason is kept too. Of a
comparison of sizes the graph assumes one outcome (:func:`assume`) and declines all else.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..nn.conv_bn import ConvBNReLU2d

# What tells one memory layout of the same tensor from another.
STRIDES = frozenset(
    ("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "untyped_storage")
)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
# Layers that return a tensor, of as many dimensions as their input, and functions that return one
# if one of their arguments is one.
LAYERS = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
# Sizes are mostly multiples of what they are divided by, and equal where that matters.
ASSUMED: dict[Any, bool] = {
    operator.eq: True,
    **dict.fromkeys((operator.ne, operator.lt, operator.gt, operator.mod), False),
}
FUNCTIONS = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul, torch.relu)
_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces


class Untraceable(Exception):
    """A module does what a graph cannot do; the text says what."""


class Declined(Exception):
    """Sizes are not as a graph assumes."""


def assume(condition: Any, expected: bool) -> None:
    """What a graph does in place of a branch."""
    if bool(condition) != expected:
        raise Declined


class _Proxy(fx.Proxy):
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance(x, Tensor)`` asks; a network's own question has an answer only where
        ``x`` is the result of a layer."""
        frame: FrameType | None = sys._getframe(1)
        while frame and frame.f_globals.get("__name__") in ("abc", "typing"):
            frame = frame.f_back
        if frame and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return _Proxy
        if self.tracer.makes_tensor(self.node):  # type: ignore[attr-defined]
            return Tensor
        raise Untraceable("its forward looks at the type of a tensor")


def _in_place(operation: Callable) -> Callable:
    """``x += y`` of a tensor changes it; torch.fx would make it ``x = x + y``."""

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _operation in IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class Tracer(fx.Tracer):
    """Looks into blocks and networks; not into torch's layers, the leaves of fastseg.nn, what has
    hooks, and ``opaque`` modules, which do not trace. Where the ``forward`` of the root itself
    compares sizes, as libraries check their inputs, the graph assumes what :data:`ASSUMED` says.

    Attributes:
        culprit: the innermost module whose ``forward`` raised.
    """

    def __init__(
        self, opaque: dict[nn.Module, str] | None = None, known: Collection[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.opaque = {} if opaque is None else opaque
        self.thread = threading.get_ident()
        self.culprit: nn.Module | None = None
        self.proxy_buffer_attributes = True
        self.known = known  # not those of other threads, nor those that a forward makes
        self.autocast = torch.is_autocast_enabled("cpu")
        self.depth = 0  # modules between the root and the one whose forward runs

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Only where nothing has changed yet: a graph that declines is followed by another run."""
        expected = ASSUMED.get(obj.node.target)
        if expected is None or self.depth > 0 or not _is_of_sizes(obj.node):
            return super().to_bool(obj)  # raises
        for node in self.graph.nodes:
            module = self.module_of(node)
            if module in self.opaque or may_write(node, module):
                return super().to_bool(obj)
        self.create_proxy("call_function", assume, (obj, expected), {})
        return expected

    def makes_tensor(self, node: fx.Node) -> bool:
        """Whether a result is a tensor as surely as layers are what their classes say."""
        if node.op == "call_module":
            return type(self.module_of(node)) in LAYERS
        return node.target in FUNCTIONS and any(map(self.makes_tensor, node.all_input_nodes))

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ConvBNReLU2d) or m in self.opaque:
            return True
        if reason := _objection(m):
            self.opaque[m] = reason
            return True
        if type(m).__module__.startswith("fastseg.nn."):
            return not any(m.children())
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        foreign = self.known is not None and m not in self.known
        if foreign or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.depth += 1
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise
        finally:
            self.depth -= 1

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind == "call_method" and target in STRIDES and target not in ("view", "view_as"):
            raise Untraceable(f"its forward looks at the memory layout ({target})")
        if torch.is_autocast_enabled("cpu") != self.autocast:
            raise Untraceable("its forward uses autocast")
        return super().create_node(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), dict) and type(a) is not dict:
            if type(a) is not OrderedDict:
                raise Untraceable(f"its forward makes a {type(a).__name__}")
            items = tuple(a.items())
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Placeholders for the arguments that have no default; the others keep theirs."""
        names = required_arguments(self.root)
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]


def trace(module: nn.Module) -> tuple[fx.GraphModule | None, dict[nn.Module, str]]:
    """The graph of a module, with parts that do not trace as its nodes, and why each does not.

    None is the graph of a module that itself does not trace; then the reasons are of it alone.
    """
    opaque: dict[nn.Module, str] = {}
    if reason := _objection(module):
        return None, {module: reason}
    known = set(module.modules())
    with _LOCK:
        while True:
            tracer = Tracer(opaque, known)
            try:
                required_arguments(module)
                with _attributes_stay(known):
                    graph = tracer.trace(module)
                for node in graph.nodes:
                    node.type = None  # annotations that are strings could not be pickled
                return fx.GraphModule(module, graph, type(module).__name__), opaque
            except Exception as error:
                culprit, reason = tracer.culprit, _reason(error)
            if culprit is None or culprit is module or culprit in opaque:
                return None, {module: reason}
            opaque[culprit] = reason


def assumes(traced: fx.GraphModule) -> bool:
    """Whether a graph may decline inputs."""
    return any(node.target is assume for node in traced.graph.nodes)


def may_write(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node, which calls this module or none, may change its first argument."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") or node.target == "__setitem__"
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    options = node.kwargs.get("inplace", False) or node.kwargs.get("out") is not None
    return node.target in (*IN_PLACE, operator.setitem) or name.endswith("_") or bool(options)


def _is_of_sizes(node: fx.Node) -> bool:
    """Whether a value is worked out from the sizes of tensors alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    sources = node.all_input_nodes
    known = getattr(node.target, "__module__", "") == "_operator"
    return known and bool(sources) and all(map(_is_of_sizes, sources))


def required_arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of ``forward`` that have no default."""
    names = []
    for p in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise Untraceable("its forward takes any number of arguments")
        if p.default is p.empty:
            if p.kind is p.KEYWORD_ONLY:
                raise Untraceable("its forward has a keyword without a default")
            names.append(p.name)
    return names


def has_options(module: nn.Module) -> bool:
    """Whether ``forward`` has arguments that may be left out."""
    return len(inspect.signature(type(module).forward).parameters) > 1 + len(
        required_arguments(module)
    )


def reads_strides(module: nn.Module) -> bool:
    """Whether ``forward``, or what it calls of its own class and file, may look at the memory
    layout of tensors: whether it names a function that does."""
    seen: set[CodeType] = set()
    pending = [type(module).forward]
    while pending:
        function = inspect.unwrap(pending.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = set(_names(code))
        if names & STRIDES:
            return True
        for name in names:
            for called in (getattr(type(module), name, None), function.__globals__.get(name)):
                if inspect.isfunction(called) and not called.__module__.startswith("torch."):
                    pending.append(called)
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def attribute(module: nn.Module, name: str) -> Any:
    """The attribute of this name, which may be one of a part."""
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _objection(module: nn.Module) -> str | None:
    """Why not even to try."""
    if has_hooks(module):
        return "it has hooks"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    if isinstance(error, fx.proxy.TraceError):
        return "its forward looks at values or sizes"
    return f"torch.fx does not trace it ({(str(error) or type(error).__name__).splitlines()[0]})"


@contextmanager
def _attributes_stay(known: Collection[nn.Module]) -> Iterator[None]:
    """Raise where a ``forward`` of this thread sets an attribute of one of these modules."""
    original, thread = nn.Module.__setattr__, threading.get_ident()

    def refuse(self: nn.Module, name: str, value: Tensor | nn.Module) -> None:
        ours = threading.get_ident() == thread and self in known
        if ours and not name.startswith("_tensor_constant"):
            raise Untraceable(f"its forward sets {name}")
        original(self, name, value)

    nn.Module.__setattr__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
