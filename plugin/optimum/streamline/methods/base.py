"""What a method has to go by when it chooses: the model, the calibration text and the scores of its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs, apply_plan
from optimum.streamline.editing.linear_map import check_linear
from optimum.streamline.editing.plan import TRAINED, Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.layer_counts import parse_remove
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows


@dataclass(frozen=True)
class MethodInputs:
    """What a choice is made from; a method that changes `model` to try something changes it back.

    Args:
        model: The original, in fp32, in evaluation mode.
        calibration: The text to choose on.
        scores: `similarity.measure_scores` of the two.
        held_out: Text to compare plans on, for a method that does.
    """

    model: PreTrainedModel
    calibration: Windows
    scores: Scores
    held_out: Windows | None = None

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return self.scores.layers


class Method(ABC):
    """One way to choose layers and make a model shallower. Its name in `METHODS` is what a recipe calls it.

    One deviation is common to all that choose by text: it is the recipe's `calibration`, not the paper's.
    """

    replacements: ClassVar[tuple[str, ...]] = ("none", "linear")
    """What may stand in for the layers it takes; a trained layer needs one contiguous block."""
    options: ClassVar[tuple[str, ...]] = ()
    """Options of the recipe that only some methods have, and this one has."""
    needs_float: ClassVar[str] = ""
    """What it does with weights beside dropping whole layers, which quantized ones do not allow; empty if nothing."""
    by_scores: ClassVar[bool] = False
    """Whether `Scores` are all that it looks at, wherever they were measured."""
    stepwise: ClassVar[bool] = False
    """Whether healing follows every merge, and not only the last."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe this method cannot follow on a model of this config, by one line.

        Raises:
            StreamlineError: naming the field, the value and what would be right.
        """
        if recipe.pruning.layers is not None:
            raise StreamlineError(
                f"layers {recipe.pruning.layers!r}: method {recipe.resolved_method} chooses its own; "
                "use method explicit"
            )
        self.count(recipe, config.num_hidden_layers)
        self.check_replacement(recipe, config)

    def check_replacement(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a replacement that this method's choice has no place for."""
        if recipe.resolved_replacement not in self.replacements:
            trained = recipe.resolved_replacement in TRAINED
            needs = "one block, as llm-streamline's" if trained else "layers removed whole, as shortgpt's"
            raise StreamlineError(
                f"replacement {recipe.resolved_replacement!r}: method {recipe.resolved_method} takes "
                f"{' or '.join(self.replacements)}; {recipe.resolved_replacement} needs {needs}"
            )
        if recipe.resolved_replacement == "linear":
            check_linear(config)

    def count(self, recipe: Recipe, total: int) -> int:
        """The net number of layers to lose, of `total`.

        Raises:
            StreamlineError: it is not said, or nothing or everything would go.
        """
        if recipe.pruning.remove is None:
            raise StreamlineError("remove is missing: say how many layers, such as 4, or what share, such as 25%")
        return parse_remove(recipe.pruning.remove, total)

    def held_out(self, recipe: Recipe) -> int:
        """How many windows it needs beside the calibration windows, to compare plans on: `MethodInputs.held_out`."""
        return 0

    @abstractmethod
    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Choose the layers."""

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Change `model`, in place, into what `plan` says; returns what was done."""
        return apply_plan(model, plan, edit_inputs.replacement)


def first_choice(recipe: Recipe) -> int:
    """The first layer that may go: a linear map is folded into the layer before each gap, so that layer 0 stays."""
    return int(recipe.resolved_replacement == "linear")


def check_attention_stays(recipe: Recipe, length: int, total: int) -> None:
    """Refuse to replace all of `total` layers by one without attention.

    Args:
        length: How many layers are replaced.

    Raises:
        StreamlineError: nothing would be left to hold the cache.
    """
    if length == total and recipe.resolved_replacement in TRAINED and recipe.resolved_replacement != "layer":
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: no layer with attention would be left of {total}; "
            "replace fewer, or use replacement layer"
        )
