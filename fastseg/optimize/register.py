"""Make ``torch.compile(model, backend="fastseg")`` known once torch's compiler is loaded.

An installed fastseg is found by its entry point. One that runs from its source tree has none, and
importing the compiler for its sake would take longer than the rest of torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "torch._dynamo.backends.registry"


class _AfterImport(MetaPathFinder):
    """Enters the backend when the compiler's registry is imported, and then leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        loader.exec_module = exec_module
        return spec


def _enter(registry: Any) -> None:
    from .backend import compile_graph

    registry.register_backend(compile_graph, name="fastseg")


def register() -> None:
    if REGISTRY in sys.modules:
        _enter(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _AfterImport())
