"""Trial trainings: several plans are distilled for a share of the training, and the one that heals best goes on.

The plan of lowest loss before healing is often not the best after it (measured: `docs/methods.md`).
"""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.apply import EditInputs, build_replacement
from optimum.streamline.editing.plan import FITTED, Plan
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.atomic_output import write_file
from optimum.streamline.system.distributed import from_main, is_main
from optimum.streamline.system.notify import Notify, silent
from optimum.streamline.text.windows import BATCH, Windows

from .losses import NotFiniteError, window_divergences
from .output_cache import OutputCache
from .stages import Healer
from .trainer import split_windows
from .training_checkpoints import plan_folder

FIRST_SHARE, SECOND_SHARE = 1 / 40, 1 / 5
"""The shares of the training after which all plans are compared, and then the best two."""
RESULTS_FILE = "trials.json"

Divergence = Callable[[Plan, float], float]
"""A function that trains a plan's model up to a share of the training, and returns its divergence from the original on
the held-out windows, in nats per token."""


class Trials:
    """The trial trainings of one run, and their results.

    Args:
        recipe: A recipe that distils.
        model: The original; it is unchanged.
        calibration: The calibration windows, for linear maps and merges.
        text: The healing windows.
        notify: Gets one line for each round.
        workspace: The folder of the training checkpoints, in which the training of the plan that is chosen goes on.
        cache: The cache of the original's outputs for all trainings, if there is one.
        versions: As in `Healer`.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        calibration: Windows,
        text: Windows,
        notify: Notify,
        workspace: Path,
        cache: OutputCache | None = None,
        versions: torch.Tensor | None = None,
    ) -> None:
        self._recipe, self._model, self._calibration, self._text = recipe, model, calibration, text
        self._notify, self._workspace, self._cache, self._versions = notify, workspace, cache, versions

    def best(self, plans: Sequence[Plan]) -> Plan:
        """The plan that heals best (`choose_by_trials`), with the results in `Plan.trials`.

        Args:
            plans: The plans, the same in all processes.

        Raises:
            StreamlineError: a training of each plan fails.
        """
        if len(plans) > 1:
            self._notify(f"trial trainings of {len(plans)} plans")
        return choose_by_trials(plans, self.divergence, self._drop, self._notify)

    def _drop(self, plan: Plan) -> None:
        """Delete the checkpoints of a plan that is out."""
        if is_main():
            shutil.rmtree(plan_folder(self._workspace, plan), ignore_errors=True)

    def divergence(self, plan: Plan, share: float) -> float:
        """Train a plan's model, or go on with its training, until a share of the training is done.

        Args:
            plan: The plan.
            share: The share, above 0 and at most 1; not less than in an earlier call for this plan.

        Returns:
            Its divergence from the original on the held-out windows, in nats per token; infinite if its loss is not
            finite.
        """
        folder = plan_folder(self._workspace, plan)
        file, key = self._workspace / RESULTS_FILE, f"{folder.name} {share}"
        results = from_main(json.loads(file.read_text()) if is_main() and file.is_file() else {})
        if key not in results:  # an interrupted run goes on where it was
            results[key] = from_main(self._trained(plan, share, folder))
            gc.collect()  # reference cycles hold the optimizer state, which would be in memory in the next training
            if is_main():
                write_file(file, json.dumps(results))
        return float(results[key])

    def _trained(self, plan: Plan, share: float, folder: Path) -> float:
        recipe, student = self._recipe, copy.deepcopy(self._model)
        replacement = build_replacement(student, plan, self._calibration, recipe.seed)
        changed = METHODS[recipe.resolved_method].apply(student, plan, EditInputs(self._calibration, replacement))
        healer = Healer(recipe, student, plan, self._text, silent, folder, self._model, self._cache, self._versions)
        held_out = split_windows(self._text)[1]
        try:
            healer.after_edit(changed.new_layers, stop_at=share)
        except NotFiniteError:  # other plans may train
            return math.inf
        return float(torch.cat([window_divergences(self._model, student, ids) for ids in held_out.split(BATCH)]).mean())


def choose_by_trials(
    plans: Sequence[Plan], divergence: Divergence, drop: Callable[[Plan], None], notify: Notify
) -> Plan:
    """Find the plan that heals best, by two rounds of training.

    In the first round, each plan's model is trained for `FIRST_SHARE` of the training. The best two go on to
    `SECOND_SHARE`, and the better of them to the end. One of the two is a plan without linear maps or corrections, if
    there is one: a fit has its gain at once, and others catch up (measured: `docs/methods.md`). With seven plans, the
    updates of all trials and of the rest of the last plan's training are 1.325 times those of one training. Fits and
    measurements come on top.

    Source: successive halving (Jamieson and Talwalkar, arXiv 1502.07943, Figure 3), with other sizes of the rounds.

    Args:
        plans: The plans; among equal divergences the first wins.
        divergence: The function that trains.
        drop: A function that is called with each plan that is out.
        notify: Gets one line for each round.

    Returns:
        The plan that is left, with the results of all rounds in `Plan.trials`.

    Raises:
        NotFiniteError: no plan's divergence is finite.
    """
    left, rounds = list(plans), list[tuple[float, tuple[tuple[str, float | None], ...]]]()
    for share, go_on in ((FIRST_SHARE, 2), (SECOND_SHARE, 1)):
        if len(left) > go_on:
            racing = left
            left, means = _round(racing, share, go_on, divergence, drop)
            rounds.append((share, tuple((plan.chosen_by, mean) for plan, mean in zip(racing, means, strict=True))))
            values = ", ".join(f"{name} {'failed' if mean is None else f'{mean:.4f}'}" for name, mean in rounds[-1][1])
            notify(f"KL divergence from the original after {share:.3g} of the training: {values}")
    return replace(left[0], trials=tuple(rounds))


def _round(
    racing: Sequence[Plan], share: float, go_on: int, divergence: Divergence, drop: Callable[[Plan], None]
) -> tuple[list[Plan], list[float | None]]:
    """The plans that go on after a round, `go_on` at most, and the divergence of each plan, `None` if it failed."""
    means, leaders = list[float](), list[int]()  # the places in `racing` of those that go on, so far
    for place, plan in enumerate(racing):
        means.append(divergence(plan, share))
        finite = [each for each in [*leaders, place] if math.isfinite(means[each])]
        ranked = sorted(finite, key=means.__getitem__)
        best, unfitted = ranked[:go_on], [each for each in ranked if racing[each].replacement not in FITTED]
        if go_on > 1 and unfitted and not set(best) & set(unfitted):
            best[-1] = unfitted[0]
        for each in {*leaders, place} - set(best):
            drop(racing[each])  # at once, because checkpoints take much room
        leaders = best
    if not leaders:
        raise NotFiniteError(
            "heal-lr: the loss is not finite in the trial training of any plan; use a lower rate, or remove fewer"
        )
    return [racing[each] for each in sorted(leaders)], [mean if math.isfinite(mean) else None for mean in means]
