"""Remove layers of language models, heal and export them, and measure the result against the original.

Importing this costs nothing: names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum.streamline.api import Artifact, Plan, Report, Scores, StreamlineConfig, Streamliner, Verdict
    from optimum.streamline.checkpoints.loading import load
    from optimum.streamline.errors import StreamlineError
    from optimum.streamline.recipe.healing import Healing
    from optimum.streamline.recipe.recipe import (
        Budget,
        Calibration,
        Evaluation,
        Export,
        Pruning,
        Quantization,
        Recipe,
    )
    from optimum.streamline.runtime.opening import open_runner

__all__ = [
    "Artifact",
    "Budget",
    "Calibration",
    "Evaluation",
    "Export",
    "Healing",
    "Plan",
    "Pruning",
    "Quantization",
    "Recipe",
    "Report",
    "Scores",
    "StreamlineConfig",
    "StreamlineError",
    "Streamliner",
    "Verdict",
    "__version__",
    "load",
    "open_runner",
]

_HOMES = {
    "Artifact": "api",
    "Budget": "recipe.recipe",
    "Calibration": "recipe.recipe",
    "Evaluation": "recipe.recipe",
    "Export": "recipe.recipe",
    "Healing": "recipe.healing",
    "Plan": "api",
    "Pruning": "recipe.recipe",
    "Quantization": "recipe.recipe",
    "Recipe": "recipe.recipe",
    "Report": "api",
    "Scores": "api",
    "StreamlineConfig": "api",
    "StreamlineError": "errors",
    "Streamliner": "api",
    "Verdict": "api",
    "load": "checkpoints.loading",
    "open_runner": "runtime.opening",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("optimum-streamline")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
