"""The base class of pruning methods, and how to write one.

A method is a class that derives from `Method`. It must define `summary` and `plan`; all else has a default:

    from optimum.streamline.methods.base import Method, MethodInputs, Plan, Recipe

    class LastLayers(Method):
        summary = "the last layers"

        def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
            total = inputs.layers
            return Plan(total, tuple(range(total - self.count(recipe, total), total)), recipe.resolved_replacement)

A package registers its method in its `pyproject.toml`. `--method` and recipes then take the name on the left:

    [project.entry-points."optimum_streamline.methods"]
    last-layers = "my_package:LastLayers"

The order of the calls. A run makes several instances, and a distributed run makes some in each process, by `Method()`
without arguments. So keep nothing in `self` from one call to the next. A run calls:

1. `check(recipe, config)`, before any weight is loaded, and again before `plan` and before `apply`. It must be fast and
   change nothing.
2. `held_out(recipe)`, when the calibration text is read.
3. `plan(recipe, inputs)`, once, on the original model. All processes of a distributed run use the plan of the main one.
4. If the plan has a replacement, the run builds it, and trains it if the recipe says so.
5. `apply(model, plan, edit_inputs)`, once. Then the run heals the model, saves it, and reads it back.

The parts of a `Recipe` that a method may read:

- `resolved_method`, `pruning.layers`, and `pruning.remove` through `count`;
- `resolved_replacement`: `none`, `linear`, `corrected`, or one of `TRAINED`;
- `resolved_trainings`: the trainings in order, empty without healing;
- `calibration.samples`, `length`, `device`, and `seed`, from which all random numbers must come;
- `pruning.iterative`, `pruning.protect`, `pruning.pattern` and `pruning.packed`, if `Method.options` names them.

A method cannot add options.

`plan` returns `Plan(total, removed, replacement)`: the number of layers of the original, the numbers of the removed
layers as rising 0-based ints, and `recipe.resolved_replacement`. `Plan.skipped` names single sublayers to remove from
layers that stay, as pairs such as `(3, "attention")`. With `packs=True`, the sublayers that are left are arranged in as
few layers as possible; `packed_plan` makes such a plan of removed sublayers. `Plan.merges` is for methods with their
own `apply`. Leave `chosen_by` and `tried` empty.

`apply` may change the model, in place, and the model's config, but no file and no global state. The default does what
the plan says (`apply_plan`). It fits every method that removes layers or sublayers. A method with its own `apply` may
change weights, and then calls `super().apply`, which renumbers the layers and updates the config. It returns the
`Change` of that call: `new_layers`, one `PlannedLayer` for each layer of the new model, and `skipped`, the names of the
skipped sublayers by the number of the new layer. If it reads or writes weights, set `needs_float`.

For bad input, raise a `StreamlineError` with one line that names the field, its value and what would be right. Any
other exception counts as a defect, and the user sees its traceback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs, apply_plan
from optimum.streamline.editing.correction import check_corrected
from optimum.streamline.editing.linear_map import check_linear
from optimum.streamline.editing.plan import FITTED, TRAINED, Plan, PlannedLayer, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.quantities import parse_remove
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
    "packed_plan",
]
"""The names that a method needs. Third-party methods import them from here."""


@dataclass(frozen=True)
class MethodInputs:
    """The inputs of `Method.plan`. A method may change `model` to try something, but must undo the change.

    Args:
        model: The original, in evaluation mode on `recipe.device`: in fp32, or quantized.
        calibration: The calibration text: `calibration.ids` has the token ids of `recipe.calibration.samples` windows,
            `[windows, length]`, on the CPU.
        scores: How much each layer changes the residual stream on that text. `scores.block_influence[i]` is
            1 - E[cos(h_i, h_{i+1})] of layer i, `scores.block_similarity(n)[j]` is E[cos(h_j, h_{j+n})] of the block of
            n layers that begins at layer j, and `scores.block_angle(n)[j]` is the angular distance between the input
            and the output of that block on last tokens, 0 to 1. h_i is the input of layer i.
        held_out: The windows that `Method.held_out` asked for, to compare plans on; `None` if it asked for none.
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
    """A pruning method: it chooses layers and edits the model. The module's docstring says how to write one.

    All methods that need text use the recipe's calibration text, not the text of their paper.
    """

    summary: ClassVar[str] = ""
    """One line on what a third-party method chooses, for the model card. `names.py` has the lines of our methods."""
    replacements: ClassVar[tuple[str, ...]] = ("none", *FITTED)
    """The replacements that the method supports. A trained one (`TRAINED`) needs one block, one layer longer than
    `remove`. A linear map needs layer 0 to stay: see `first_choice`."""
    options: ClassVar[tuple[str, ...]] = ()
    """The options among `iterative`, `protect`, `pattern` and `packed` that the method reads. Others are refused."""
    needs_float: ClassVar[str] = ""
    """Why the method cannot prune quantized weights, such as `merges weights`; empty if it can. It completes an error
    message that begins with the method's name."""
    by_scores: ClassVar[bool] = False
    """Whether the method reads nothing but `MethodInputs.scores`. Then the scores may come from a quantized graph."""
    stepwise: ClassVar[bool] = False
    """Whether healing follows every merge of `Plan.merges`. Then `apply` must call `EditInputs.after_merge` after each
    merge but the last; the healing at the end follows the last."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe that this method does not support on a model with this config.

        The default refuses `layers`, a missing or impossible `remove`, and a replacement that is not in `replacements`.
        A method that refuses more calls `super().check` first. Options that are not in `options` are refused before.

        Raises:
            StreamlineError: the message names the field, its value and what would be right.
        """
        if recipe.pruning.layers is not None:
            raise StreamlineError(
                f"layers {recipe.pruning.layers!r}: method {recipe.resolved_method} chooses the layers itself; "
                "use method explicit"
            )
        self.count(recipe, config.num_hidden_layers)
        self.check_replacement(recipe, config)

    def check_replacement(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a replacement that this method or a model with this config does not support."""
        if recipe.resolved_replacement not in self.replacements:
            trained = recipe.resolved_replacement in TRAINED
            needs = "a method that removes one block" if trained else "another method"
            example = "llm-streamline" if trained else "shortgpt"
            raise StreamlineError(
                f"replacement {recipe.resolved_replacement!r}: method {recipe.resolved_method} supports "
                f"{' or '.join(self.replacements)}; {recipe.resolved_replacement} needs {needs}, such as {example}"
            )
        if recipe.resolved_replacement == "linear":
            check_linear(config)
        if recipe.resolved_replacement == "corrected":
            check_corrected(config)

    def count(self, recipe: Recipe, total: int) -> int:
        """The number of layers that the model loses: the recipe's `remove`, which may be a share, as a number.

        Args:
            recipe: The recipe.
            total: The number of layers of the original.

        Raises:
            StreamlineError: `remove` is missing, or no layer or every layer would be removed.
        """
        if recipe.pruning.remove is None:
            raise StreamlineError("remove is missing: give a number of layers, such as 4, or a share, such as 25%")
        return parse_remove(recipe.pruning.remove, total)

    def may_pack(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Whether a plan of this method may have `Plan.packs`, so that wrong models are refused before they load."""
        return False

    def quantized_refusal(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Why the method cannot prune quantized weights with this recipe; empty if it can. By default `needs_float`."""
        return self.needs_float

    def needs_memory(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Why the weights must be in memory for this recipe; empty if they can stay on disk.

        By default for the same reason that rules out quantized weights. It completes a message that begins with "the
        recipe".
        """
        return self.quantized_refusal(recipe, config)

    def held_out(self, recipe: Recipe) -> int:
        """The number of windows that the method needs to compare plans on, after the calibration windows."""
        return 0

    def plans(self, recipe: Recipe, inputs: MethodInputs) -> tuple[Plan, ...]:
        """The plans that trial trainings choose from, the best before healing first. Only `auto` has several."""
        return (self.plan(recipe, inputs),)

    @abstractmethod
    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Choose the layers to remove.

        Args:
            recipe: A recipe that `check` has accepted.
            inputs: The model, its calibration text and its scores.

        Returns:
            A plan for `inputs.layers` layers, with `recipe.resolved_replacement` as its replacement.

        Raises:
            StreamlineError: a fault that shows only with weights or text, such as a loss that is not finite.
        """

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Edit `model`, in place, as `plan` says.

        Args:
            model: The original. Its weights may be changed.
            plan: The plan that `plan` returned.
            edit_inputs: `calibration`: the calibration windows. `replacement`: the replacement, already trained, or
                `None`. `after_merge`: a function to call after a merge, for a `stepwise` method.

        Returns:
            The layers of the new model, and their skipped sublayers.
        """
        return apply_plan(model, plan, edit_inputs.replacement)


def first_choice(recipe: Recipe) -> int:
    """The first layer that may be removed: 1 with linear maps, which are folded into the layer before; otherwise 0."""
    return int(recipe.resolved_replacement == "linear")


def corrects(recipe: Recipe) -> bool:
    """Whether a greedy search compares removals with their corrections (replacement `corrected`)."""
    return recipe.resolved_replacement == "corrected"


def check_attention_stays(recipe: Recipe, length: int, total: int) -> None:
    """Refuse to replace all layers by one layer without attention.

    Args:
        recipe: The recipe.
        length: The number of layers that are replaced.
        total: The number of layers of the original.

    Raises:
        StreamlineError: no layer with attention would be left, and generation needs one for its cache.
    """
    if length == total and recipe.resolved_replacement in TRAINED and recipe.resolved_replacement != "layer":
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: no layer with attention would be left; "
            "replace fewer layers, or use replacement layer"
        )
