"""What a pruning method is, and all that is needed to write one.

A method is a class that derives from `Method`. It needs `summary` and `plan`; everything else has a default:

    from optimum.streamline.methods.base import Method, MethodInputs, Plan, Recipe

    class LastLayers(Method):
        summary = "the last layers"

        def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
            total = inputs.layers
            return Plan(total, tuple(range(total - self.count(recipe, total), total)), recipe.resolved_replacement)

Another distribution registers its class in `pyproject.toml`. `--method` and a recipe then take the name on the left:

    [project.entry-points."optimum_streamline.methods"]
    last-layers = "my_package:LastLayers"

When each part is called. `Method()` is called without arguments, more than once in a run and once in each process of a
distributed run, so keep nothing in `self` from one call to the next. The order in a run:

1. `check(recipe, config)`, before any weight is loaded, and again before `plan` and before `apply`. It must be fast and
   change nothing.
2. `held_out(recipe)`, when text is read.
3. `plan(recipe, inputs)`, once, on the original model. In a distributed run the plan of the main process counts.
4. If the plan has a replacement, it is built, and trained if the recipe says so.
5. `apply(model, plan, edit_inputs)`, once. The model is then healed, saved, and read back.

What may be read of a `Recipe`: `resolved_method`; `pruning.remove` (through `count`); `pruning.layers`;
`resolved_replacement`: `none`, `linear`, or one of `TRAINED`; `resolved_trainings`, in order, empty if nothing is
trained; `calibration.samples`, `length`, `seed` and `device`; and those of `pruning.iterative`, `pruning.protect` and
`pruning.pattern` that `options` names. A method has no options of its own beyond these. `seed` decides all that is
random.

What `plan` returns: `Plan(total, gone, replacement)`, with `total` layers in the original, the removed layers `gone` as
rising 0-based ints, and `recipe.resolved_replacement`. `Plan.skipped` removes single sublayers from layers that stay,
as pairs such as `(3, "attention")`. `Plan.merges` are for methods with an `apply` of their own. Leave `by` and `tried`
empty.

What `apply` may change: the model that it is given, in place, and its config; no file and no global state. The default,
`apply_plan`, does what the plan says and is right for every method that removes layers or sublayers. A method with an
`apply` of its own may change weights before it calls `super().apply`, which then renumbers the layers and the config.
It returns that call's `Change`: `new_layers`, the `PlannedLayer` of each layer of the new model, and `skipped`, the
names of the skipped sublayers by number of the new layer. Set `needs_float` where it reads or writes weights.

Bad input is a `StreamlineError`: one line that names the field, the value and what would be right. Any other exception
is taken for a defect and keeps its traceback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs, apply_plan
from optimum.streamline.editing.linear_map import check_linear
from optimum.streamline.editing.plan import TRAINED, Plan, PlannedLayer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.layer_counts import parse_remove
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows

__all__ = [
    "TRAINED",
    "Change",
    "EditInputs",
    "Method",
    "MethodInputs",
    "Plan",
    "PlannedLayer",
    "Recipe",
    "Scores",
    "StreamlineError",
    "Windows",
    "check_attention_stays",
    "first_choice",
]
"""What a method is written with; other distributions import it from here."""


@dataclass(frozen=True)
class MethodInputs:
    """What a choice is made from; a method that changes `model` to try something changes it back.

    Args:
        model: The original, in evaluation mode on `recipe.device`: in fp32, or as it is stored where it is quantized.
        calibration: The text to choose on: `calibration.ids` are `recipe.calibration.samples` windows of token ids
            `[windows, length]`, on the CPU.
        scores: How much each layer changes the residual stream on that text. `scores.block_influence[i]` is
            1 - E[cos(h_i, h_{i+1})] of layer i, `scores.block_similarity(n)[j]` is E[cos(h_j, h_{j+n})] of the block of
            n layers that begins at layer j, and `scores.block_angle(n)[j]` is its angular distance on last tokens, 0 to
            1; h_i is the input of layer i.
        held_out: As many more windows as `Method.held_out` asked for, to compare plans on; `None` if it asked for none.
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
    """One way to choose layers and make a model shallower; the module's docstring says how to write one.

    One deviation is common to all that choose by text: it is the recipe's `calibration`, not the paper's.
    """

    summary: ClassVar[str] = ""
    """One line on what a third-party method chooses, for the model card; `names.py` has the built-in methods' lines."""
    replacements: ClassVar[tuple[str, ...]] = ("none", "linear")
    """What may stand in for the layers it takes. A trained layer (`TRAINED`) needs one contiguous block, one layer
    longer than `remove`. A linear map needs layer 0 to stay: see `first_choice`."""
    options: ClassVar[tuple[str, ...]] = ()
    """Which of the recipe's fields `iterative`, `protect` and `pattern` it reads; the others are refused."""
    needs_float: ClassVar[str] = ""
    """What it does with weights beside removing whole layers, such as `merges weights`, which quantized weights do not
    allow; empty if nothing. A message puts it after the method's name."""
    by_scores: ClassVar[bool] = False
    """Whether `MethodInputs.scores` are all that it reads, so that they may come from a quantized graph."""
    stepwise: ClassVar[bool] = False
    """Whether healing follows every merge of `Plan.merges`, and not only the last; then `apply` calls
    `EditInputs.after_merge` after each merge but the last."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe this method cannot follow on a model of this config, by one line.

        This one refuses `layers`, a missing or impossible `remove`, and a replacement not in `replacements`. A method
        that refuses more calls `super().check` first. Options not in `options` are refused before it is called.

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
        """Refuse a replacement that is not in `replacements`, or that a model of this config cannot take."""
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
        """The net number of layers to lose, of `total`: the recipe's `remove`, a number or a share, as a number.

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
        """Choose the layers to remove.

        Args:
            recipe: One that `check` has accepted.
            inputs: The model, its calibration text and its scores.

        Returns:
            A plan for `inputs.layers` layers, with `recipe.resolved_replacement` as its replacement.

        Raises:
            StreamlineError: what only weights or text can show, such as a loss that is not finite.
        """

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Change `model`, in place, into what `plan` says.

        Args:
            model: The original. Its weights may be changed.
            plan: What this method's `plan` returned.
            edit_inputs: `calibration`, the windows of `MethodInputs.calibration`; `replacement`, what stands in for the
                removed layers, already trained, or `None`; `after_merge`, for a `stepwise` method.

        Returns:
            The new model's layers, and which of their sublayers are skipped.
        """
        return apply_plan(model, plan, edit_inputs.replacement)


def first_choice(recipe: Recipe) -> int:
    """The first layer that may go: 1 with linear maps, which are folded into the layer before each gap, else 0."""
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
