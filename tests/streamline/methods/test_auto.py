"""Method `auto`: it takes the candidate whose plan has the lowest loss on held-out text."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum.streamline.editing.apply import EditInputs, apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.auto import Auto
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import prepare, prune
from optimum.streamline.pipeline.texts import read_texts
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.reporting.model_card import CITATIONS
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS, tiny_model, token_ids

CALIBRATION, HELD_OUT = Windows(token_ids(3, 12, seed=5), "random"), Windows(token_ids(5, 12, seed=6), "random")
FEW = {"samples": 3, "length": 32, "heal": "none", "calibration": "stdlib", "eval_data": "stdlib"}
RECIPE = make_recipe({"method": "auto", "remove": 2, "heal": "none"})


def inputs_of(model: PreTrainedModel) -> MethodInputs:
    return MethodInputs(model, CALIBRATION, measure_scores(model, CALIBRATION), HELD_OUT)


def literal_loss(model: PreTrainedModel, plan: Plan, method: str) -> float:
    edited = copy.deepcopy(model)
    METHODS[method].apply(edited, plan, EditInputs(CALIBRATION, build_replacement(edited, plan, CALIBRATION)))
    with torch.no_grad():
        logits = edited(HELD_OUT.ids).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), HELD_OUT.ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("seed", "best"), [(0, "sleb + linear"), (1, "shortgpt + linear"), (2, "blockpruner"), (4, "come-p")]
)
def test_it_follows_the_plan_of_lowest_held_out_loss(seed: int, best: str) -> None:
    model = tiny_model("llama", seed)
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_of(model)
    losses: dict[str, float] = {}
    for name in ("blockpruner", "come-p", "sleb + linear", "shortgpt + linear"):
        method, _, replacement = name.partition(" + ")
        recipe = make_recipe({"method": method, "remove": 2, "replacement": replacement or "none", "heal": "none"})
        losses[name] = literal_loss(model, METHODS[method].plan(recipe, inputs), method)
    plan = METHODS["auto"].plan(RECIPE, inputs)
    assert plan.chosen_by == min(losses, key=losses.__getitem__) == best
    assert dict(plan.tried) == pytest.approx(losses, rel=1e-4)
    assert plan.describe().startswith(f"by {plan.chosen_by}: ")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("llama", ["blockpruner", "come-p", "sleb + linear", "shortgpt + linear"]),
        ("gemma2", ["blockpruner"]),
        ("qwen3_moe", ["blockpruner", "sleb + linear", "shortgpt + linear"]),
    ],
)
def test_what_the_architecture_cannot_have_is_no_candidate(architecture: str, names: list[str]) -> None:
    model = tiny_model(architecture)
    assert Auto().candidates(RECIPE, model.config) == names
    plain = make_recipe({"method": "auto", "remove": 2, "heal": "none", "replacement": "none"})
    assert Auto().candidates(plain, model.config) == [name for name in names if "linear" not in name]
    assert plain.fingerprint != RECIPE.fingerprint
    healed = make_recipe({"method": "auto", "remove": 2})
    assert healed.resolved_trainings == ("distill",)
    assert Auto().candidates(healed, model.config) == [name for name in names if "linear" not in name]


def test_a_candidate_that_the_weights_refuse_is_left_out() -> None:
    model = tiny_model("llama", 1)  # the one where shortgpt + linear is best
    apply_plan(model, Plan(LAYERS, (), skipped=tuple((layer, "mlp") for layer in range(LAYERS - 1))), None)
    inputs = inputs_of(model)
    sleb = make_recipe({"method": "sleb", "remove": 2, "replacement": "linear"})
    with pytest.raises(StreamlineError, match="adds only zeros"):
        build_replacement(model, METHODS["sleb"].plan(sleb, inputs), CALIBRATION)
    plan = METHODS["auto"].plan(RECIPE, inputs)
    assert "linear" not in plan.chosen_by
    assert dict(plan.tried)["sleb + linear"] is None


def test_a_choice_that_none_can_make_is_refused() -> None:
    model = tiny_model("gemma2")  # it cannot be merged, so blockpruner is the only candidate
    attentions = [(layer, "attention") for layer in range(LAYERS - 1)]
    mlps = [(layer, "mlp") for layer in range(LAYERS)]
    apply_plan(model, Plan(LAYERS, (), skipped=tuple(sorted(attentions + mlps))), None)
    recipe = make_recipe({"method": "auto", "remove": 4})
    with pytest.raises(StreamlineError, match="the last attention must stay"):
        METHODS["auto"].plan(recipe, inputs_of(model))


def test_the_text_that_plans_are_compared_on_is_text_that_was_chosen_on() -> None:
    source = ModelSource(REFERENCE)
    recipe = make_recipe({"method": "auto", "remove": 1, **FEW})
    prepared = prepare(source, recipe, lambda message: None)
    both = read_windows("stdlib:calibration", AutoTokenizer.from_pretrained(REFERENCE), 15, 32, 0, VOCABULARY)
    assert torch.equal(prepared.chosen_on.ids, both.ids)
    assert torch.equal(prepared.calibration.ids, both.ids[:3])
    assert torch.equal(read_texts(source, recipe).chosen_on["calibration"].ids, both.ids)


def test_a_large_calibration_text_asks_for_no_more_than_it_takes_to_compare() -> None:
    assert Auto().held_out(make_recipe({"remove": 1, "samples": 128, "length": 512})) == 48
    assert Auto().held_out(make_recipe({"remove": 1, "samples": 24, "length": 256})) == 96
    assert METHODS["sleb"].held_out(make_recipe({"method": "sleb", "remove": 1})) == 0


def test_what_is_followed_is_printed_and_on_record(tmp_path: Path) -> None:
    fields = {"method": "auto", "remove": 1, **FEW, "samples": 2}
    said: list[str] = []
    prune(
        ModelSource(REFERENCE),
        make_recipe(fields),
        tmp_path / "out",
        overwrite=False,
        verbose=False,
        notify=said.append,
    )
    record = json.loads((tmp_path / "out" / "streamline.json").read_text())
    tried = record["tried"]
    assert list(tried) == ["blockpruner", "come-p", "sleb + linear", "shortgpt + linear"]
    best = min(tried, key=tried.__getitem__)
    assert record["plan"].startswith(f"by {best}: ")
    assert any(f"{best} {tried[best]:.4f}" in line for line in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by {CITATIONS[best.partition(' + ')[0]]}, which had the lowest held-out loss of the methods" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_too_little_text_is_an_error_that_says_why_it_is_so_much(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("for number in range(10):\n    print(number)\n" * 8)
    fields = {"method": "auto", "remove": 1, "samples": 6, "length": 32, "heal": "none"}
    recipe = make_recipe({**fields, "calibration": str(tmp_path / "text.txt")})
    with pytest.raises(StreamlineError, match=r"too short for 30 windows of 32; .*; samples is 6, and .* 24 more"):
        prepare(ModelSource(REFERENCE), recipe, lambda message: None)
