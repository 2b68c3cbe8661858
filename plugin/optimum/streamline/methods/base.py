"""What a pruning method is: a choice that is checked before any weight moves, and an edit."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedModel

from ..edit import Change, Replacement
from ..plan import Plan
from ..recipe import Recipe
from ..scores import Scores


class Method(Protocol):
    """One way to choose layers and make a model shallower."""

    summary: str
    """One line for the help text."""

    def check(self, recipe: Recipe, total: int) -> None:
        """Refuse a recipe this method cannot follow on a model of `total` layers.

        Raises:
            StreamlineError: naming the field, the value and what would be right.
        """

    def plan(self, recipe: Recipe, scores: Scores) -> Plan:
        """Choose the layers, from what `scores` say."""

    def apply(self, model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
        """Change `model`, in place, into what `plan` says; returns what was done."""
