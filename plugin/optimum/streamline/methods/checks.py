"""Checks that several methods make of a recipe."""

from __future__ import annotations

from ..errors import StreamlineError
from ..recipe import Recipe


def refuse_layers(recipe: Recipe, method: str) -> None:
    """Refuse `layers` for a method that chooses its own."""
    if recipe.layers is not None:
        raise StreamlineError(f"layers {recipe.layers!r}: method {method} chooses its own; use method explicit")


def require_remove(recipe: Recipe) -> int | str:
    """How much to remove, which must be said."""
    if recipe.remove is None:
        raise StreamlineError("remove is missing: say how many layers, such as 4, or what share, such as 25%")
    return recipe.remove
