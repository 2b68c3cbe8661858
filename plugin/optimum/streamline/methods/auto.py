"""Method `auto`, the default: several methods make a plan each, and the one that heals best is followed.

No single method is best on every model and at every share of layers (measured: `docs/methods.md`).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs, build_replacement, with_skips
from optimum.streamline.editing.plan import FITTED, Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import can_pack
from optimum.streamline.models.offloaded_weights import copy_sharing_disk, device_of
from optimum.streamline.models.skipped_sublayers import skipped_of
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.loss import cross_entropy_sum, mean_losses
from optimum.streamline.text.windows import BATCH, Windows

from .base import Method, MethodInputs
from .blockpruner import BlockPruner
from .come_p import CoMeP
from .shifted import Shifted
from .shortgpt import ShortGPT
from .sleb import SLEB

CANDIDATES: dict[str, Method] = {
    "shifted": Shifted(),
    "blockpruner": BlockPruner(),
    "come-p": CoMeP(),
    "shifted + corrected": Shifted(),
    "sleb + corrected": SLEB(),
    "sleb + linear": SLEB(),
    "shortgpt + linear": ShortGPT(),
    "shortgpt iterative": ShortGPT(),
}
"""The candidates by name: a method, "+ linear" and "+ corrected" for these replacements, "iterative" for this option.

`Auto.candidates` leaves out those that a recipe or model rules out, and a search with linear maps where the same search
with corrections is possible, which costs less before healing (measured: `docs/methods.md`). Among equal losses
the first one wins.
"""

HELD_OUT_TOKENS = 24_576
"""The number of tokens that plans are compared on.

A quarter of it chose the worse of two plans whose perplexities differ by 2% (measured: `docs/methods-0.1.0.md`).
"""


class Auto(Method):
    """Choose the plan of lowest next-token loss on `MethodInputs.held_out`, among the plans of `CANDIDATES`.

    The candidates make their plans on the calibration text, and `shifted` judges its swaps on the first windows of
    `MethodInputs.held_out`. They are compared on the other windows, because a search by loss and a fitted map do better
    on their own text than elsewhere. `Plan.tried` holds the loss of every candidate.

    The order of plans changes with healing (measured: `docs/methods.md`). So if the recipe distils the model, as it
    does where it leaves out `heal`, trial trainings choose among the plans (`healing.trials`). If it heals in another
    way, candidates with a replacement are left out, because the loss before healing overrates what is fitted.

    This method is the program's own, and from no paper. Memory holds the model twice while plans are tried. If the
    weights are on disk, those that a plan changes are written there too.
    """

    needs_float = "tries merges, linear maps and corrections"
    replacements = ("none",)
    options = ("packed",)

    def may_pack(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Whether the model can be packed: its candidate `shifted` packs."""
        return can_pack(config)

    def needs_memory(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Nothing to make and compare the plans, because no candidate needs the weights in memory."""
        return ""

    def held_out(self, recipe: Recipe) -> int:
        """Windows to judge swaps on, and as many to compare plans on as hold `HELD_OUT_TOKENS` tokens.

        The latter are at most four times as many as for calibration.
        """
        return _for_swaps(recipe) + min(4 * recipe.calibration.samples, math.ceil(HELD_OUT_TOKENS / recipe.length))

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The plan of lowest held-out loss, with the candidate's name in `Plan.chosen_by`.

        Raises:
            StreamlineError: no candidate can make a plan, or no plan has a finite loss.
        """
        return self._plans(recipe, inputs, self.candidates(recipe, inputs.model.config))[0]

    def plans(self, recipe: Recipe, inputs: MethodInputs) -> tuple[Plan, ...]:
        """The plans that trial trainings choose from, the one of lowest held-out loss first. Equal plans count once.

        Raises:
            StreamlineError: as `plan`.
        """
        return self._plans(recipe, inputs, self.candidates(recipe, inputs.model.config, for_trials=True))

    def _plans(self, recipe: Recipe, inputs: MethodInputs, candidates: Sequence[str]) -> tuple[Plan, ...]:
        assert inputs.held_out is not None, "`held_out` asks for windows"
        for_swaps = _for_swaps(recipe)
        of_candidates = replace(inputs, held_out=inputs.held_out.part(0, for_swaps))
        compared_on = inputs.held_out.part(for_swaps, len(inputs.held_out.ids))
        plans, losses, refusals = list[Plan](), list[torch.Tensor](), dict[str, StreamlineError]()
        for name in candidates:
            try:
                made = CANDIDATES[name].plan(recipe_of(recipe, name), of_candidates)
                plan = replace(with_skips(made, inputs.model.config), chosen_by=name)
                losses.append(self._loss_sum(plan, inputs, compared_on))
                plans.append(plan)
                gc.collect()  # reference cycles hold the model that was compared
            except StreamlineError as error:  # a fault that only the weights show, such as an MLP that outputs zeros
                refusals[name] = error
        if not plans:
            raise next(iter(refusals.values()))
        means = mean_losses(torch.stack(losses), compared_on, "method")
        tried = [
            (plan.chosen_by, mean if math.isfinite(mean) else None) for plan, mean in zip(plans, means, strict=True)
        ]
        tried += [(name, None) for name in refusals]
        by_loss = sorted(zip(means, plans, strict=True), key=lambda each: each[0])
        ranked = [plan for mean, plan in by_loss if math.isfinite(mean)]
        different = {_computed(plan, inputs.model.config): plan for plan in reversed(ranked)}
        return tuple(replace(plan, tried=tuple(tried)) for plan in reversed(different.values()))

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Apply the plan as the candidate that made it would."""
        return CANDIDATES[plan.chosen_by].apply(model, plan, edit_inputs)

    def candidates(self, recipe: Recipe, config: PreTrainedConfig, for_trials: bool = False) -> list[str]:
        """The candidates to try on a model of this config.

        Those with a replacement only if nothing heals the model, or trial trainings show what healing makes of it: the
        loss before healing overrates what is fitted.
        """
        with_maps = recipe.pruning.replacement is None and (for_trials or not recipe.resolved_trainings)
        useful = [name for name in CANDIDATES if with_maps or recipe_of(recipe, name).resolved_replacement == "none"]
        possible = [name for name in useful if _possible(recipe, name, config)]
        beaten = {name.replace("corrected", "linear") for name in possible if "corrected" in name}
        return [name for name in possible if name not in beaten]

    def _loss_sum(self, plan: Plan, inputs: MethodInputs, windows: Windows) -> torch.Tensor:
        model = copy_sharing_disk(inputs.model)
        replacement = build_replacement(model, plan, inputs.calibration)
        self.apply(model, plan, EditInputs(inputs.calibration, replacement))
        with torch.inference_mode():
            sums = [cross_entropy_sum(model, ids.to(device_of(model))).cpu() for ids in windows.ids.split(BATCH)]
        return torch.stack(sums).sum()


def makes_trials(recipe: Recipe) -> bool:
    """Whether trial trainings choose among the plans of `auto`: if its healing begins with distillation."""
    return recipe.resolved_method == "auto" and recipe.resolved_trainings[:1] == ("distill",)


def _computed(plan: Plan, config: PreTrainedConfig) -> tuple[object, ...]:
    """What the model of a plan computes: two plans with the same are one."""
    return plan.replacement, plan.merges, frozenset(plan.sublayers_left) - skipped_of(config)


def _for_swaps(recipe: Recipe) -> int:
    return CANDIDATES["shifted"].held_out(recipe)


def recipe_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the method and the options of a candidate, one of `CANDIDATES`."""
    method, *how = name.replace("+ ", "").split()
    replacement = next((each for each in FITTED if each in how), "none")
    return recipe.with_options(method=method, replacement=replacement, iterative="iterative" in how)


def _possible(recipe: Recipe, name: str, config: PreTrainedConfig) -> bool:
    try:
        CANDIDATES[name].check(recipe_of(recipe, name), config)
    except StreamlineError:
        return False
    return True
