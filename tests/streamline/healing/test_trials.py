"""Trial trainings: the plan that heals best is found, and its training goes on where its trial stopped."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from optimum.streamline.costs import steps
from optimum.streamline.editing.apply import EditInputs
from optimum.streamline.editing.plan import Plan, PlannedLayer, packed_plan
from optimum.streamline.healing import trials
from optimum.streamline.healing.losses import NotFiniteError, window_divergences
from optimum.streamline.healing.stages import Healer
from optimum.streamline.healing.trials import FIRST_SHARE, SECOND_SHARE, Trials, choose_by_trials
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

FITS = ("corrected", "corrected", "none", "linear", "none", "none")
PLANS = [Plan(9, (layer,), fit, chosen_by=f"plan {layer}") for layer, fit in enumerate(FITS)]
FIRST, SECOND = FIRST_SHARE, SECOND_SHARE


def tried(means: dict[float, list[float]]) -> tuple[Plan, list[tuple[str, float]], list[str]]:
    """The plan that is left if plan i has divergence `means[share][i]`; the trainings asked for; the plans dropped."""
    asked: list[tuple[str, float]] = []
    dropped: list[str] = []

    def divergence(plan: Plan, share: float) -> float:
        asked.append((plan.chosen_by, share))
        [layer] = plan.removed
        return means[share][layer]

    best = choose_by_trials(PLANS, divergence, lambda plan: dropped.append(plan.chosen_by), lambda _: None)
    return best, asked, dropped


def test_the_best_two_go_on_and_then_the_better_one() -> None:
    best, asked, dropped = tried({FIRST: [0.301, 0.31, 0.3, 0.302, 0.32, 0.33], SECOND: [0.2, 0, 0.25, 0, 0, 0]})
    # Each is dropped as soon as two others, and then one other, are better.
    assert dropped == ["plan 1", "plan 3", "plan 4", "plan 5", "plan 2"]
    assert best.chosen_by == "plan 0"
    assert asked == [(f"plan {layer}", FIRST) for layer in range(6)] + [("plan 0", SECOND), ("plan 2", SECOND)]
    assert [share for share, _ in best.trials] == [FIRST, SECOND]
    assert dict(best.trials[0][1])["plan 4"] == 0.32
    # The cost of seven plans, in trainings: what each share adds for those in the round, and the rest of the last one.
    assert pytest.approx(steps.TRIALS) == 7 * FIRST + 2 * (SECOND - FIRST) + (1 - SECOND)


def test_one_of_the_two_has_no_fit() -> None:
    fits_first = [0.1, 0.2, 0.6, 0.3, 0.5, 0.4]
    best, asked, dropped = tried({FIRST: fits_first, SECOND: [0.09, 0, 0, 0, 0, 0.08]})
    assert best.chosen_by == "plan 5"
    assert asked[6:] == [("plan 0", SECOND), ("plan 5", SECOND)]
    assert dropped == ["plan 1", "plan 3", "plan 2", "plan 4", "plan 0"]
    without_fits = [0.6, 0.5, 0.1, 0.4, 0.3, 0.2]
    assert tried({FIRST: without_fits, SECOND: [0, 0, 2, 0, 0, 1]})[0].chosen_by == "plan 5"
    only_fits = [0.3, 0.2, math.inf, 0.1, math.nan, math.inf]
    assert tried({FIRST: only_fits, SECOND: [0, 1, 0, 2, 0, 0]})[0].chosen_by == "plan 1"


def test_failed_plans_are_dropped() -> None:
    best, asked, dropped = tried({FIRST: [math.inf, 0.3, math.inf, math.nan, math.inf, math.inf]})
    assert best.chosen_by == "plan 1"
    assert sorted(dropped) == ["plan 0", "plan 2", "plan 3", "plan 4", "plan 5"]
    assert len(asked) == 6


def test_equal_plans_leave_the_first_and_one_needs_no_trial() -> None:
    assert choose_by_trials(PLANS, lambda *_: 1.0, lambda _: None, lambda _: None).chosen_by == "plan 0"
    assert choose_by_trials(PLANS[:1], lambda *_: pytest.fail("trained"), lambda _: None, lambda _: None) == PLANS[0]


def test_a_plan_that_cannot_be_trained_is_out() -> None:
    first = [math.inf, math.nan, 0.3, math.inf, 0.2, math.nan]
    assert tried({FIRST: first, SECOND: [0, 0, 0.3, 0, math.inf, 0]})[0].chosen_by == "plan 2"
    for failing in ({FIRST: [math.inf] * 6}, {FIRST: first, SECOND: [math.nan] * 6}):
        with pytest.raises(NotFiniteError, match="heal-lr: the loss is not finite in the trial training of any plan"):
            tried(failing)


RECIPE = make_recipe({"method": "auto", "remove": 1, "heal_epochs": 4, "heal_batch": 2})
TEXT = Windows((torch.arange(42)[:, None] + torch.arange(16)) % 50 + 2, "counting")
CALIBRATION = Windows(token_ids(4, 12), "random")
THREE = (
    Plan(LAYERS, (1,), chosen_by="shortgpt iterative"),
    packed_plan(LAYERS, [(1, "mlp"), (2, "attention")]),
    Plan(LAYERS, (3,), "linear"),
)
NAMES = ("shortgpt iterative", "shifted", "sleb + linear")


def three_plans() -> list[Plan]:
    return [trials.replace(plan, chosen_by=name) for plan, name in zip(THREE, NAMES, strict=True)]


def test_the_training_of_the_best_goes_on_from_its_trial(tmp_path: Path) -> None:
    model, said = tiny_model(), list[str]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    best = Trials(RECIPE, model, CALIBRATION, TEXT, said.append, tmp_path).best(three_plans())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [folder for folder in tmp_path.iterdir() if folder.is_dir()] == [trials.plan_folder(tmp_path, best)]
    [(share, first), (later, found)] = best.trials
    assert (share, [name for name, _ in first]) == (FIRST_SHARE, list(NAMES))
    assert (later, len(found)) == (SECOND_SHARE, 2)
    assert best.chosen_by == min(found, key=lambda each: each[1])[0]
    assert said[0] == "trial trainings of 3 plans"
    assert said[1].startswith("KL divergence from the original after 0.025 of the training: shortgpt iterative ")

    logs = []
    for workspace in (trials.plan_folder(tmp_path, best), tmp_path / "anew"):
        edited = copy.deepcopy(model)
        replacement = trials.build_replacement(edited, best, CALIBRATION)
        changed = METHODS["auto"].apply(edited, best, EditInputs(CALIBRATION, replacement))
        healer = Healer(RECIPE, edited, best, TEXT, lambda _: None, workspace, teacher=model)
        healer.after_edit(changed.new_layers)
        logs.append(healer.results[0].log)
    assert logs[0] == logs[1]  # as of a training without a trial


class Stop(Exception):
    """The power went off."""


@pytest.mark.parametrize("left", range(5))
def test_an_interrupted_run_trains_only_what_it_had_not(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trained, budget = tiny_model(), list[str](), [left]
    alone = Trials(RECIPE, model, CALIBRATION, TEXT, lambda _: None, tmp_path / "alone").best(three_plans())
    original = Trials._trained

    def stopping(self: Trials, plan: Plan, share: float, folder: Path) -> float:
        if not budget[0]:
            raise Stop
        budget[0] -= 1
        trained.append(plan.chosen_by)
        return original(self, plan, share, folder)

    monkeypatch.setattr(Trials, "_trained", stopping)
    runs = Trials(RECIPE, model, CALIBRATION, TEXT, lambda _: None, tmp_path / "stopped")
    with pytest.raises(Stop):
        runs.best(three_plans())
    budget[0] = 5 - left
    assert runs.best(three_plans()) == alone
    assert trained == [name for _, found in alone.trials for name, _ in found]


def test_a_training_that_diverges_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = tiny_model(), Healer.after_edit

    def exploding(self: Healer, new_layers: tuple[PlannedLayer, ...], stop_at: float = 1.0) -> None:
        if any(layer.kind == "patched" for layer in new_layers):
            self._recipe = self._recipe.with_options(heal_lr=1e30)
        original(self, new_layers, stop_at)

    monkeypatch.setattr(Healer, "after_edit", exploding)
    best = Trials(RECIPE, model, CALIBRATION, TEXT, lambda _: None, tmp_path).best(three_plans())
    [(_, first), (_, found)] = best.trials
    assert dict(first)["sleb + linear"] is None
    assert [name for name, _ in found] == list(NAMES[:2])
    assert best.chosen_by == min(found, key=lambda each: each[1] or 0)[0]
    json.dumps(best.trials, allow_nan=False)


def test_if_all_trainings_diverge_the_rate_is_named(tmp_path: Path) -> None:
    recipe = make_recipe({"method": "auto", "remove": 1, "heal_lr": 1e30, "heal_batch": 2})
    with pytest.raises(NotFiniteError, match="in the trial training of any plan"):
        Trials(recipe, tiny_model(), CALIBRATION, TEXT, lambda _: None, tmp_path).best(three_plans())


def test_the_divergence_of_each_window_is_that_of_its_tokens() -> None:
    one, other, ids = tiny_model(), tiny_model("llama", 1), token_ids(3, 12)
    found = window_divergences(one, other, ids)
    p, q = (model(ids).logits.double().log_softmax(-1) for model in (one, other))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-4, atol=0)
    assert float(window_divergences(one, one, ids).abs().max()) < 1e-6
