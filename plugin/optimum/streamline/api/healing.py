"""Builds the one recipe that heals a model pruned in memory; the same recipe is saved in its record."""

from __future__ import annotations

from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.explicit import Explicit
from optimum.streamline.pipeline.prepared import names_layers
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe

from .config import StreamlineConfig
from .results import Plan

_HEALING = ("heal", "lora")


def healing_recipe(plan: Plan, pruned_by: Recipe, config: StreamlineConfig | None) -> Recipe:
    """The recipe that the layers were pruned by, with the healing of `config`.

    Args:
        plan: What was done to the layers.
        pruned_by: The recipe it was done by.
        config: Fields that are set over the recipe's; `None` for the recipe as it is.

    Raises:
        StreamlineError: a field of `config` would have pruned otherwise, or nothing is to be trained.
    """
    recipe = pruned_by
    if config is not None:
        recipe = make_recipe({**pruned_by.to_dict(), **config.fields}, "StreamlineConfig")
        if not _prunes_alike(plan, recipe, pruned_by):
            raise StreamlineError(f"heal: {_difference(pruned_by, config)}; prune again, or leave it out")
    if not recipe.resolved_trainings:
        raise StreamlineError("heal 'none': nothing is to be trained; give a StreamlineConfig with heal, such as 'lm'")
    return recipe


def _prunes_alike(plan: Plan, recipe: Recipe, pruned_by: Recipe) -> bool:
    if plan.chosen_on is None and names_layers(recipe):  # no text was read: the recipe may still say which is
        return Explicit().named_plan(recipe, plan.total) == plan.plain()
    return _without_healing(recipe).fingerprint == _without_healing(pruned_by).fingerprint


def _without_healing(recipe: Recipe) -> Recipe:
    fields = {name: value for name, value in recipe.to_dict().items() if not name.startswith(_HEALING)}
    return make_recipe({**fields, "heal": "none"})


def _difference(pruned_by: Recipe, config: StreamlineConfig) -> str:
    before = pruned_by.to_dict()
    for name, value in config.fields.items():
        if not name.startswith(_HEALING) and value != before.get(name, getattr(pruned_by, name)):
            return f"{name} {value!r} is not the {name} that the layers were pruned by"
    return "the config is not the one that the layers were pruned by"
