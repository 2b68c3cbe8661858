"""The layers a user names."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..edit import Change, Replacement, apply_plan
from ..errors import StreamlineError
from ..plan import Plan, is_contiguous
from ..recipe import Recipe, parse_layers
from ..scores import Scores


class Explicit:
    """Takes out the layers of `layers`, whatever their scores."""

    summary = "the layers given by --layers, such as 3,7,11-13"

    def check(self, recipe: Recipe, total: int) -> None:
        """Refuse missing or impossible layers, and a replacement for layers with gaps between them."""
        if recipe.layers is None:
            raise StreamlineError("layers is missing: method explicit needs it, such as 3,7,11-13")
        if recipe.remove is not None:
            raise StreamlineError(f"remove {recipe.remove!r}: give remove or layers, not both")
        layers = parse_layers(recipe.layers, total)
        if recipe.replacement == "none" and len(layers) == total:
            raise StreamlineError(f"layers {recipe.layers!r}: these are all {total} layers; at least 1 must stay")
        if recipe.replacement != "none" and (not is_contiguous(layers) or len(layers) < 2):
            raise StreamlineError(
                f"layers {recipe.layers!r}: a replacement needs one block of at least 2 layers, such as 5-9"
            )

    def plan(self, recipe: Recipe, scores: Scores) -> Plan:
        """The layers named."""
        layers = parse_layers(recipe.layers or "", scores.layers)
        return Plan(scores.layers, layers, recipe.replacement)

    def apply(self, model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
        """Remove or replace the layers, in place."""
        return apply_plan(model, plan, replacement)
