"""Trial trainings: the plan that heals best is found, and its training goes on where its trial stopped."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from optimum.streamline.editing.apply import EditInputs
from optimum.streamline.editing.plan import Plan, PlannedLayer, packed_plan
from optimum.streamline.healing import trials
from optimum.streamline.healing.losses import NotFiniteError, window_divergences
from optimum.streamline.healing.stages import Healer
from optimum.streamline.healing.trials import FIRST_SHARE, Trials, successive_halving
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

PLANS = [Plan(9, (layer,), chosen_by=f"plan {layer}") for layer in range(6)]


def halved(means: dict[float, list[float]]) -> tuple[Plan, list[tuple[str, float]], list[str]]:
    """The plan that is left if plan i has divergence `means[share][i]`; the trainings asked for; the plans dropped."""
    asked: list[tuple[str, float]] = []
    dropped: list[str] = []

    def divergence(plan: Plan, share: float) -> float:
        asked.append((plan.chosen_by, share))
        [layer] = plan.removed
        return means[share][layer]

    best = successive_halving(PLANS, divergence, lambda plan: dropped.append(plan.chosen_by), lambda _: None)
    return best, asked, dropped


def test_each_round_leaves_half_and_doubles_the_training() -> None:
    close = [0.301, 0.3, 0.302, 0.31, 0.32, 0.33]
    best, asked, dropped = halved({1 / 20: close, 1 / 10: [0.2, 0.25, 0.21, 0, 0, 0]})
    # Each is dropped as soon as three others, and then one other, are better.
    assert dropped == ["plan 3", "plan 4", "plan 5", "plan 1", "plan 2"]
    assert best.chosen_by == "plan 0"
    assert asked == [(f"plan {layer}", 1 / 20) for layer in range(6)] + [
        (f"plan {layer}", 1 / 10) for layer in range(3)
    ]
    assert [share for share, _ in best.trials] == [1 / 20, 1 / 10]
    assert dict(best.trials[0][1])["plan 4"] == 0.32
    # The cost, in trainings: what each share adds for those in the round, and the rest of the last one's.
    assert pytest.approx(1 + 7 / 20) == 6 / 20 + 3 / 20 + (1 - 1 / 10)


def test_a_plan_that_lies_behind_at_first_can_win() -> None:
    best, asked, _ = halved({1 / 20: [0.3, 0.1, 0.2, 0.4, 0.5, 0.6], 1 / 10: [0.08, 0.09, 0.1, 0, 0, 0]})
    assert best.chosen_by == "plan 0"
    assert len(asked) == 9


def test_failed_plans_in_the_better_half_are_dropped() -> None:
    best, _, dropped = halved({1 / 20: [math.inf, 0.3, math.inf, math.nan, math.inf, math.inf]})
    assert best.chosen_by == "plan 1"
    assert sorted(dropped) == ["plan 0", "plan 2", "plan 3", "plan 4", "plan 5"]


def test_equal_plans_leave_the_first_and_one_needs_no_trial() -> None:
    assert successive_halving(PLANS, lambda *_: 1.0, lambda _: None, lambda _: None).chosen_by == "plan 0"
    assert successive_halving(PLANS[:1], lambda *_: pytest.fail("trained"), lambda _: None, lambda _: None) == PLANS[0]


def test_a_plan_that_cannot_be_trained_is_out() -> None:
    failing = [math.inf, math.nan, 0.3, math.inf, 0.2, math.nan]
    assert halved({1 / 20: failing, 1 / 10: failing})[0].chosen_by == "plan 4"
    with pytest.raises(NotFiniteError, match="heal-lr: the loss is not finite in the trial training of any plan"):
        halved({1 / 20: [math.inf] * 6})


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
    [(share, found)] = best.trials
    assert (share, [name for name, _ in found]) == (FIRST_SHARE, list(NAMES))
    assert best.chosen_by == min(found, key=lambda each: each[1])[0]
    assert said[0] == "trial trainings of 3 plans"
    assert said[1].startswith("KL divergence from the original after 0.05 of the training: shortgpt iterative ")

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


@pytest.mark.parametrize("left", range(3))
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
    budget[0] = 3 - left
    assert runs.best(three_plans()) == alone
    assert trained == list(NAMES)


def test_a_training_that_diverges_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = tiny_model(), Healer.after_edit

    def exploding(self: Healer, new_layers: tuple[PlannedLayer, ...], stop_at: float = 1.0) -> None:
        if any(layer.kind == "patched" for layer in new_layers):
            self._recipe = self._recipe.with_options(heal_lr=1e30)
        original(self, new_layers, stop_at)

    monkeypatch.setattr(Healer, "after_edit", exploding)
    best = Trials(RECIPE, model, CALIBRATION, TEXT, lambda _: None, tmp_path).best(three_plans())
    [(_, found)] = best.trials
    assert dict(found)["sleb + linear"] is None
    assert best.chosen_by == min(found[:2], key=lambda each: each[1] or 0)[0]
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
