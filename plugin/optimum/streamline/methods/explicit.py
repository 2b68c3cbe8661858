"""Method `explicit`: remove or replace the layers that the recipe names."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from optimum.streamline.editing.correction import check_something_corrected
from optimum.streamline.editing.plan import FITTED, TRAINED, Plan, is_contiguous
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.skipped_sublayers import skipped_of
from optimum.streamline.recipe.quantities import parse_layers
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, MethodInputs, check_attention_stays


class Explicit(Method):
    """Remove or replace the layers that `Recipe.layers` names; no score counts."""

    by_scores = True
    replacements = ("none", *FITTED, *TRAINED)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse missing or invalid layers, and a trained replacement for layers that are not one block."""
        if recipe.pruning.layers is None:
            raise StreamlineError("layers is missing: method explicit needs it, such as 3,7,11-13")
        if recipe.pruning.remove is not None:
            raise StreamlineError(f"remove {recipe.pruning.remove!r}: give remove or layers, not both")
        self.check_replacement(recipe, config)
        total = config.num_hidden_layers
        layers = parse_layers(recipe.pruning.layers, total)
        if recipe.resolved_replacement not in TRAINED and len(layers) == total:
            raise StreamlineError(
                f"layers {recipe.pruning.layers!r}: these are all {total} layers; at least 1 must stay"
            )
        if recipe.resolved_replacement in TRAINED and (not is_contiguous(layers) or len(layers) < 2):
            raise StreamlineError(
                f"layers {recipe.pruning.layers!r}: a replacement needs one block of at least 2 layers, such as 5-9"
            )
        check_attention_stays(recipe, len(layers), total)
        if recipe.resolved_replacement == "linear" and 0 in layers:
            raise StreamlineError(
                f"layers {recipe.pruning.layers!r}: a linear map is folded into the layer before; keep layer 0"
            )
        skipped = tuple(sorted(skipped_of(config)))
        check_something_corrected(replace(self.named_plan(recipe, total), already_skipped=skipped))

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove or replace the named layers."""
        return self.named_plan(recipe, inputs.layers)

    def named_plan(self, recipe: Recipe, total: int) -> Plan:
        """The plan for a model of `total` layers; it needs neither the model nor any text."""
        return Plan(total, parse_layers(recipe.pruning.layers or "", total), recipe.resolved_replacement)
