"""The default: several methods choose, each plan is tried, and the one of lowest loss on held-out text is followed.

Which methods these are is what `docs/methods.md` measures: on each model and at each share another one is best.
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
"""What is tried, by method and replacement, as far as `Auto.candidates` allows; ties go to the first."""

HELD_OUT_TOKENS = 24_576
"""What plans are compared on. A quarter of it mistook two plans that are 2% apart in perplexity (`docs/methods.md`)."""


class Auto(Method):
    """The plan of lowest next-token loss on `MethodInputs.held_out` among those of `CANDIDATES`, all in `Plan.tried`.

    The candidates choose on the calibration text, and are compared on text that none of them has seen: a search by
    loss, or a fitted map, is better on its own text than elsewhere. Where something is trained afterwards, those with
    linear maps are left out: distillation does what the maps do and more, so that the loss before it can make too much
    of them, while the other two kept their order (measured: `docs/methods.md`). `heal`, left out, is `distill`.

    Not a paper's: each candidate is its own paper's method. Memory holds the model twice while plans are tried.
    """

    needs_float = "tries blockpruner, come-p and linear maps"
    replacements = ("none",)

    def held_out(self, recipe: Recipe) -> int:
        """Windows of about `HELD_OUT_TOKENS` tokens in all, but no more than four times the calibration windows."""
        return min(4 * recipe.calibration.samples, math.ceil(HELD_OUT_TOKENS / recipe.length))

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The best of the candidates' plans, with the candidate's name in `Plan.by`."""
        assert inputs.held_out is not None  # it asks for some
        plans, losses, refusals = list[Plan](), list[torch.Tensor](), dict[str, StreamlineError]()
        for name in self.candidates(recipe, inputs.model.config):
            try:
                plan = replace(CANDIDATES[name].plan(_recipe_of(recipe, name), inputs), by=name)
                losses.append(self._loss_sum(plan, inputs, inputs.held_out))
                plans.append(plan)
            except StreamlineError as error:  # some things only the weights show, such as an MLP that writes nothing
                refusals[name] = error
        if not plans:
            raise next(iter(refusals.values()))
        means = mean_losses(torch.stack(losses), inputs.held_out, "whichever method chooses")
        tried = [(plan.by, mean if math.isfinite(mean) else None) for plan, mean in zip(plans, means, strict=True)]
        best = plans[means.index(min(means))]
        return replace(best, tried=(*tried, *((name, None) for name in refusals)))

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """As the candidate that made the plan does."""
        return CANDIDATES[plan.by].apply(model, plan, edit_inputs)

    def candidates(self, recipe: Recipe, config: PreTrainedConfig) -> list[str]:
        """Those that are of use before this healing, and can be followed on a model of this config."""
        maps = not recipe.resolved_trainings and recipe.pruning.replacement is None
        useful = [name for name in CANDIDATES if maps or _recipe_of(recipe, name).resolved_replacement == "none"]
        return [name for name in useful if _possible(recipe, name, config)]

    def _loss_sum(self, plan: Plan, inputs: MethodInputs, windows: Windows) -> torch.Tensor:
        model = copy.deepcopy(inputs.model)
        replacement = build_replacement(model, plan, inputs.calibration)
        self.apply(model, plan, EditInputs(inputs.calibration, replacement))
        with torch.inference_mode():
            sums = [cross_entropy_sum(model, ids.to(model.device)).cpu() for ids in windows.ids.split(BATCH)]
        return torch.stack(sums).sum()


def _recipe_of(recipe: Recipe, name: str) -> Recipe:
    method, _, patch = name.partition(" + ")
    return recipe.with_options(method=method, replacement="linear" if patch else "none")


def _possible(recipe: Recipe, name: str, config: PreTrainedConfig) -> bool:
    try:
        CANDIDATES[name].check(_recipe_of(recipe, name), config)
    except StreamlineError:
        return False
    return True
