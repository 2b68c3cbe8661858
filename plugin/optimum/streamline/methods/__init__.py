"""The pruning methods: one table, one file each."""

from __future__ import annotations

from ..errors import StreamlineError
from ..recipe import Recipe
from .base import Method
from .explicit import Explicit
from .llm_streamline import LLMStreamline
from .shortgpt import ShortGPT

METHODS: dict[str, Method] = {
    "explicit": Explicit(),
    "llm-streamline": LLMStreamline(),
    "shortgpt": ShortGPT(),
}


def method_of(recipe: Recipe, total: int) -> Method:
    """The method a recipe names, after it has checked the recipe against a model of `total` layers.

    Raises:
        StreamlineError: there is no such method, or it cannot follow the recipe.
    """
    if recipe.method_name not in METHODS:
        raise StreamlineError(f"method {recipe.method!r}: unknown; known are {', '.join(METHODS)}")
    if recipe.healing != "none" and recipe.replacement == "none":
        raise StreamlineError(f"heal {recipe.healing!r}: trains a replacement; set replacement to layer or mlp")
    method = METHODS[recipe.method_name]
    method.check(recipe, total)
    return method
