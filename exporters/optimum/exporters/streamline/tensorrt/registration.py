"""Register our backend with `transformers.exporters` when its table of backends is imported, and not before.

Importing `transformers.exporters` also imports torch, which a process that only runs an ONNX graph must not load. So an
import hook waits for the table.
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
    """Loads the table with its own loader, and then registers the backend."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(BACKEND)


class _Finder(MetaPathFinder):
    """Wraps the loader of the table of backends; removes itself when the table is imported."""

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
    """Register the backend: now if the table of backends is already imported, otherwise when it is."""
    if TABLE in sys.modules:
        import_module(BACKEND)
    else:
        sys.meta_path.insert(0, _Finder())
