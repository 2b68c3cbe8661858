"""Method `explicit`: remove or replace the layers that the recipe names."""

from __future__ import annotations

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import TRAINED, Plan, is_contiguous
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.layer_counts import parse_layers
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, MethodInputs, check_attention_stays


class Explicit(Method):
    """Remove or replace the layers that `Recipe.layers` names; no score counts."""

    summary = "removes the layers of --layers, such as 3,7,11-13"
    by_scores = True
    replacements = ("none", "linear", *TRAINED)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse missing or invalid layers, and a trained replacement for layers that are not one block."""
        if recipe.layers is None:
            raise StreamlineError("layers is missing: method explicit needs it, such as 3,7,11-13")
        if recipe.remove is not None:
            raise StreamlineError(f"remove {recipe.remove!r}: give remove or layers, not both")
        self.check_replacement(recipe, config)
        total = config.num_hidden_layers
        layers = parse_layers(recipe.layers, total)
        if recipe.stand_in not in TRAINED and len(layers) == total:
            raise StreamlineError(f"layers {recipe.layers!r}: these are all {total} layers; at least 1 must stay")
        if recipe.stand_in in TRAINED and (not is_contiguous(layers) or len(layers) < 2):
            raise StreamlineError(
                f"layers {recipe.layers!r}: a replacement needs one block of at least 2 layers, such as 5-9"
            )
        check_attention_stays(recipe, len(layers), total)
        if recipe.stand_in == "linear" and 0 in layers:
            raise StreamlineError(
                f"layers {recipe.layers!r}: a linear map is folded into the layer before; keep layer 0"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove or replace the named layers."""
        return Plan(inputs.layers, parse_layers(recipe.layers or "", inputs.layers), recipe.stand_in)
