"""Method `auto`, the default: several methods make a plan each, and the plan with the lowest held-out loss wins.

No single method is best on every model and at every share of layers (measured: `docs/methods.md`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.loss import cross_entropy_sum, mean_losses
from optimum.streamline.text.windows import BATCH, Windows

from .base import Method, MethodInputs
from .blockpruner import BlockPruner
from .come_p import CoMeP
from .shortgpt import ShortGPT
from .sleb import SLEB

CANDIDATES: dict[str, Method] = {
    "blockpruner": BlockPruner(),
    "come-p": CoMeP(),
    "sleb + linear": SLEB(),
    "shortgpt + linear": ShortGPT(),
}
"""The candidates by name: a method, or a method "+ linear" for the method with replacement `linear`.

`Auto.candidates` leaves out those that a recipe or model rules out. Among equal losses the first candidate wins.
"""

HELD_OUT_TOKENS = 24_576
"""The number of tokens that plans are compared on.

A quarter of it chose the worse of two plans whose perplexities differ by 2% (measured: `docs/methods.md`).
"""


class Auto(Method):
    """Choose the plan of lowest next-token loss on `MethodInputs.held_out`, among the plans of `CANDIDATES`.

    The candidates make their plans on the calibration text. They are compared on other text, because a search by loss
    and a fitted map do better on their own text than elsewhere. `Plan.tried` holds the loss of every candidate.

    If the recipe heals the model, candidates with linear maps are left out. Distillation achieves what a map does, so
    the loss before healing overrates the maps. The other candidates kept their order after healing (measured:
    `docs/methods.md`). Where the recipe leaves out `heal`, it is `distill`.

    This method is the program's own, and from no paper. Memory holds the model twice while plans are tried.
    """

    needs_float = "tries blockpruner, come-p and linear maps"
    replacements = ("none",)

    def held_out(self, recipe: Recipe) -> int:
        """As many windows as hold `HELD_OUT_TOKENS` tokens, but at most four times as many as for calibration."""
        return min(4 * recipe.calibration.samples, math.ceil(HELD_OUT_TOKENS / recipe.length))

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The plan of lowest held-out loss, with the candidate's name in `Plan.chosen_by`.

        Raises:
            StreamlineError: no candidate can make a plan, or no plan has a finite loss.
        """
        assert inputs.held_out is not None, "`held_out` asks for windows"
        plans, losses, refusals = list[Plan](), list[torch.Tensor](), dict[str, StreamlineError]()
        for name in self.candidates(recipe, inputs.model.config):
            try:
                plan = replace(CANDIDATES[name].plan(_recipe_of(recipe, name), inputs), chosen_by=name)
                losses.append(self._loss_sum(plan, inputs, inputs.held_out))
                plans.append(plan)
            except StreamlineError as error:  # a fault that only the weights show, such as an MLP that outputs zeros
                refusals[name] = error
        if not plans:
            raise next(iter(refusals.values()))
        means = mean_losses(torch.stack(losses), inputs.held_out, "method")
        tried = [
            (plan.chosen_by, mean if math.isfinite(mean) else None) for plan, mean in zip(plans, means, strict=True)
        ]
        best = plans[means.index(min(means))]
        return replace(best, tried=(*tried, *((name, None) for name in refusals)))

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Apply the plan as the candidate that made it would."""
        return CANDIDATES[plan.chosen_by].apply(model, plan, edit_inputs)

    def candidates(self, recipe: Recipe, config: PreTrainedConfig) -> list[str]:
        """The candidates to try on a model of this config: those with linear maps only if nothing heals the model."""
        with_maps = not recipe.resolved_trainings and recipe.pruning.replacement is None
        useful = [name for name in CANDIDATES if with_maps or _recipe_of(recipe, name).resolved_replacement == "none"]
        return [name for name in useful if _possible(recipe, name, config)]

    def _loss_sum(self, plan: Plan, inputs: MethodInputs, windows: Windows) -> torch.Tensor:
        model = copy.deepcopy(inputs.model)
        replacement = build_replacement(model, plan, inputs.calibration)
        self.apply(model, plan, EditInputs(inputs.calibration, replacement))
        with torch.inference_mode():
            sums = [cross_entropy_sum(model, ids.to(model.device)).cpu() for ids in windows.ids.split(BATCH)]
        return torch.stack(sums).sum()


def _recipe_of(recipe: Recipe, name: str) -> Recipe:
    method, _, replacement = name.partition(" + ")
    return recipe.with_options(method=method, replacement="linear" if replacement else "none")


def _possible(recipe: Recipe, name: str, config: PreTrainedConfig) -> bool:
    try:
        CANDIDATES[name].check(_recipe_of(recipe, name), config)
    except StreamlineError:
        return False
    return True
