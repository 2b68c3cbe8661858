"""Prune, replace and heal the layers of language models, and prove what it cost.

Importing this costs nothing: names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load
    from .errors import StreamlineError
    from .runner import open_runner
    from .streamliner import StreamlineConfig, Streamliner

__all__ = ["StreamlineConfig", "StreamlineError", "Streamliner", "__version__", "load", "open_runner"]

_HOMES = {
    "StreamlineConfig": "streamliner",
    "StreamlineError": "errors",
    "Streamliner": "streamliner",
    "load": "checkpoint",
    "open_runner": "runner",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("optimum-streamline")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
