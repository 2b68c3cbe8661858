"""What docs/methods.md says holds for the measured figures in `docs/methods.json`, from `ci/bench methods`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimum.streamline.methods.auto import CANDIDATES

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "docs" / "methods.json").read_text())["rows"]
MODELS = ("reference", "qwen3", "gpt2")
SHARES = [pytest.param(model, removed, id=f"{model} {removed}") for model in MODELS for removed in (4, 8)]


def ratios(part: str, model: str, removed: int) -> dict[str, tuple[float, float, float]]:
    """The perplexity ratio, and its interval, of each row."""
    rows = [row for row in ROWS if (row["part"], row["model"], row["removed"]) == (part, model, removed)]
    return {row["name"]: tuple(row["ratio"]) for row in rows}


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_every_candidate_is_measured_before_and_after_healing(model: str, removed: int) -> None:
    assert ratios("unhealed", model, removed).keys() >= CANDIDATES.keys() | {
        "sleb",
        "come",
        "llm-streamline none",
        "gromov",
    }
    assert ratios("healed", model, removed).keys() >= CANDIDATES.keys()


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_corrected_searches_cost_least_before_healing(model: str, removed: int) -> None:
    before = ratios("unhealed", model, removed)
    best = min(before.pop(f"{search} + corrected") for search in ("shifted", "sleb"))
    before.pop("auto", None)
    leaves_zeros = before.pop("blockpruner --no-packed")
    assert best[0] < min(ratio for ratio, _, _ in before.values())
    assert (best[0] < leaves_zeros[0]) == ((model, removed) != ("reference", 4))
    assert best[1] < leaves_zeros[2]


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_concatenating_is_better_than_averaging(model: str, removed: int) -> None:
    before = ratios("unhealed", model, removed)
    assert before["come"][2] < before["average"][1]
    assert before["come-p"][0] < before["come"][0]


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_distillation_helps_every_candidate(model: str, removed: int) -> None:
    before, after = ratios("unhealed", model, removed), ratios("healed", model, removed)
    for name in CANDIDATES:
        assert after[name][2] < before[name][1], name


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_auto_is_level_with_the_best_healed_method_or_better(model: str, removed: int) -> None:
    after = ratios("healed", model, removed)
    auto, best = after.pop("auto"), min(after.values())
    assert auto[0] <= best[2]
    assert auto[1] <= best[0]


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_auto_is_level_with_the_best_corrected_search_before_healing(model: str, removed: int) -> None:
    before = ratios("unhealed", model, removed)
    auto, best = before["auto"], min(before[f"{search} + corrected"] for search in ("shifted", "sleb"))
    assert auto[0] <= best[2]
    assert auto[1] <= best[0]


@pytest.mark.parametrize(("removed", "of_0_1_0"), [(4, 1.153), (8, 1.572)])
def test_auto_costs_no_more_before_healing_than_with_zeros_in_0_1_0(removed: int, of_0_1_0: float) -> None:
    assert ratios("unhealed", "reference", removed)["auto"][2] < of_0_1_0


def test_the_default_costs_at_most_what_was_aimed_at() -> None:
    most = {4: 1.005, 5: 1.012, 8: 1.035}
    for removed, highest in most.items():
        [found] = ratios("default", "reference", removed).values()
        assert found[0] <= highest


def test_trial_trainings_take_at_most_half_the_time_of_a_training() -> None:
    measured = json.loads((Path(__file__).parents[1] / "docs" / "search.json").read_text())["cost"]
    assert measured["plans"] == 7
    assert measured["seconds_with_trials"] <= 1.5 * measured["seconds"]


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_come_p_heals_best_or_is_level_with_the_best(model: str, removed: int) -> None:
    after = ratios("healed", model, removed)
    after.pop("auto")  # which may choose it, from more windows
    best = min(after.values())
    assert after["come-p"][0] <= best[2]
    assert after["come-p"][1] <= best[0]
    if removed == 8 and model != "qwen3":
        others = [ratio for name, ratio in after.items() if name != "come-p"]
        assert after["come-p"][2] < min(ratio for ratio, _, _ in others)


def test_settings_that_take_less_memory_heal_as_well() -> None:
    rows = ratios("settings", "reference", 4)
    [default] = [ratio for name, (ratio, _, _) in ratios("healed", "reference", 4).items() if name == "come-p"]
    less = {name: ratio / default for name, (ratio, _, _) in rows.items()}
    for name in ("bf16, AdamW in 8 bits, micro-batches of 1", "cached outputs, top-64", "original in int8"):
        assert less.pop(name) <= 1.005
    assert max(less.values()) <= 1.012  # in 4 bits, and with adapters


@pytest.mark.parametrize(("model", "removed"), SHARES)
def test_text_of_the_original_heals_as_well_as_given_text(model: str, removed: int) -> None:
    given, own = (ratios(part, model, removed)["come-p"] for part in ("healed", "self"))
    assert own[0] <= given[0]
    if model == "reference":
        assert own[2] >= given[1]  # level


def test_searches_take_at_most_a_third_of_the_time_of_the_papers_algorithm_and_choose_the_same() -> None:
    rows = json.loads((Path(__file__).parents[1] / "docs" / "search.json").read_text())["literal"]
    assert {row["method"] for row in rows} == {"blockpruner", "sleb"}
    for row in rows:
        assert row["same"]
        assert row["seconds"] <= row["literal_seconds"] / 3


def test_estimates_of_pruning_are_within_a_factor_of_one_and_a_half() -> None:
    rows = json.loads((Path(__file__).parents[1] / "docs" / "scale.json").read_text())
    measured = [row[where] for row in rows.values() for where in ("memory", "disk") if "same" in row]
    compared = [each for each in measured if "estimated_seconds" in each]
    assert len(compared) >= 6
    for each in compared:
        for what in ("seconds", "bytes"):
            actual = each["seconds" if what == "seconds" else "peak_bytes"]
            assert 2 / 3 < each[f"estimated_{what}"] / actual < 1.5
