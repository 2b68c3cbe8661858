"""Registers our backend with transformers' exporters as soon as their table of backends is imported, and not before.

Importing them costs torch, which a process that runs a graph in ONNX Runtime must not load. Knows nothing of engines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLE = "transformers.exporters.auto"
BACKEND = "optimum.exporters.streamline.tensorrt.backend"


class _Registering(Loader):
    """The table's own loader, and afterwards the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(BACKEND)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register_when_needed() -> None:
    """Register now if the table is there, else when it is imported."""
    if TABLE in sys.modules:
        import_module(BACKEND)
    else:
        sys.meta_path.insert(0, _Finder())
