"""Builds the one recipe that heals a model pruned in memory; the same recipe is saved in its record."""

from __future__ import annotations

from collections.abc import Iterable

from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.explicit import Explicit
from optimum.streamline.pipeline.planning import names_layers
from optimum.streamline.recipe.recipe import OPTIONS, Recipe

from .config import StreamlineConfig, given_keys, recipe_of
from .results import Plan


def healing_recipe(plan: Plan, pruned_by: Recipe, config: StreamlineConfig | Recipe | None) -> Recipe:
    """The recipe that the layers were pruned by, with the healing of `config`.

    Args:
        plan: The plan that the model was pruned by.
        pruned_by: The recipe that the model was pruned by.
        config: Options that replace those of the recipe; `None` to keep the recipe as it is.

    Raises:
        StreamlineError: an option of `config` would have pruned otherwise, or nothing is to be trained.
    """
    recipe = pruned_by
    if config is not None:
        given = given_keys(config)
        recipe = pruned_by.with_options(**{key: recipe_of(config).option(key) for key in given})
        if not _prunes_alike(plan, recipe, pruned_by):
            raise StreamlineError(f"heal: {_difference(pruned_by, recipe, given)}; prune again, or leave it out")
    if not recipe.resolved_trainings:
        raise StreamlineError("heal 'none': nothing is to be trained; give a StreamlineConfig with heal, such as 'lm'")
    return recipe


def _prunes_alike(plan: Plan, recipe: Recipe, pruned_by: Recipe) -> bool:
    if plan.chosen_on is None and names_layers(recipe):  # no text was read, so the recipe may name another text
        return Explicit().named_plan(recipe, plan.total) == plan.plain()
    return _without_healing(recipe).fingerprint == _without_healing(pruned_by).fingerprint


def _without_healing(recipe: Recipe) -> Recipe:
    defaults = {key: option.default for key, option in OPTIONS.items() if option.group == "healing"}
    return recipe.with_options(**{**defaults, "heal": "none"})


def _difference(pruned_by: Recipe, recipe: Recipe, keys: Iterable[str]) -> str:
    for key in keys:
        if OPTIONS[key].group != "healing" and recipe.option(key) != pruned_by.option(key):
            name = key.replace("_", "-")
            return f"{name} {recipe.option(key)!r} is not the {name} that the layers were pruned by"
    return "the config is not the one that the layers were pruned by"
