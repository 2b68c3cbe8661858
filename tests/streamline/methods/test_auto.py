"""Method `auto`: it takes the candidate whose plan has the lowest loss on held-out text."""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cases import make
from optimum.streamline.checkpoints.loading import load_on_disk, load_stock
from optimum.streamline.editing.apply import EditInputs, build_replacement
from optimum.streamline.editing.plan import Plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.trials import Trials
from optimum.streamline.methods import auto
from optimum.streamline.methods.auto import Auto, makes_trials
from optimum.streamline.methods.base import Method, MethodInputs, Recipe
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import prepare, prune
from optimum.streamline.pipeline.texts import read_texts
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.reporting.model_card import CITATIONS
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS, tiny_model, token_ids

CALIBRATION, HELD_OUT = Windows(token_ids(3, 12, seed=5), "random"), Windows(token_ids(8, 12, seed=6), "random")
SWAPS, COMPARED = HELD_OUT.part(0, 3), HELD_OUT.part(3, 8)
FEW = {"samples": 3, "length": 32, "heal": "none", "calibration": "stdlib", "eval_data": "stdlib"}
METHODS_OF_AUTO = dict(auto.CANDIDATES)
FIELDS = {"remove": 2, "samples": 3, "heal": "none"}
RECIPE = make_recipe({"method": "auto", **FIELDS})
ALL = [
    "shifted",
    "blockpruner",
    "come-p",
    "shifted + corrected",
    "sleb + corrected",
    "shortgpt + linear",
    "shortgpt iterative",
]


def inputs_of(model: PreTrainedModel) -> MethodInputs:
    return MethodInputs(model, CALIBRATION, measure_scores(model, CALIBRATION), HELD_OUT)


def literal_loss(model: PreTrainedModel, plan: Plan, method: str) -> float:
    edited = copy.deepcopy(model)
    METHODS[method].apply(edited, plan, EditInputs(CALIBRATION, build_replacement(edited, plan, CALIBRATION)))
    with torch.no_grad():
        logits = edited(COMPARED.ids).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), COMPARED.ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("seed", "best"),
    [
        (0, "shifted"),
        (1, "come-p"),
        (2, "shifted + corrected"),
        (3, "blockpruner"),
        (4, "shortgpt iterative"),
        (5, "sleb + corrected"),
        (10, "shortgpt + linear"),
    ],
)
def test_it_follows_the_plan_of_lowest_held_out_loss(seed: int, best: str) -> None:
    model = tiny_model("llama", seed)
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_of(model)
    losses: dict[str, float] = {}
    for name in ALL:
        method, *how = name.split()
        fields = {"replacement": how[-1] if "+" in how else "none", "iterative": "iterative" in how}
        recipe = make_recipe({"method": method, **FIELDS, **fields})
        plan = METHODS[method].plan(recipe, replace(inputs, held_out=SWAPS))
        losses[name] = literal_loss(model, plan, method)
    plan = METHODS["auto"].plan(RECIPE, inputs)
    assert plan.chosen_by == min(losses, key=losses.__getitem__) == best
    assert dict(plan.tried) == pytest.approx(losses, rel=1e-4)
    assert plan.describe().startswith(f"by {plan.chosen_by}: ")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("llama", ALL),
        ("gemma2", ["shifted", "blockpruner", "shortgpt iterative"]),
        ("qwen3_moe", ["shifted", "blockpruner", "sleb + linear", "shortgpt + linear", "shortgpt iterative"]),
        ("gpt_neox", ["shifted", "come-p", "sleb + linear", "shortgpt + linear", "shortgpt iterative"]),
    ],
)
def test_what_the_architecture_cannot_have_is_no_candidate(architecture: str, names: list[str]) -> None:
    model = tiny_model(architecture)
    assert Auto().candidates(RECIPE, model.config) == names
    plain = make_recipe({"method": "auto", **FIELDS, "replacement": "none"})
    assert Auto().candidates(plain, model.config) == [name for name in names if "+" not in name]
    assert plain.fingerprint != RECIPE.fingerprint
    assert "blockpruner" in Auto().candidates(make_recipe({"method": "auto", **FIELDS, "packed": False}), model.config)
    healed = make_recipe({"method": "auto", "remove": 2})
    assert healed.resolved_trainings == ("distill",)
    assert Auto().candidates(healed, model.config, for_trials=True) == names
    assert Auto().candidates(healed, model.config) == [name for name in names if "+" not in name]
    for trainings, trials in (("lm", False), ("lm+distill", False), ("distill+lm", True)):
        otherwise = make_recipe({"method": "auto", "remove": 2, "heal": trainings})
        assert makes_trials(otherwise) == trials
        assert Auto().candidates(otherwise, model.config) == [name for name in names if "+" not in name]


def test_without_trials_a_healed_model_has_no_corrections() -> None:
    model = tiny_model("llama", 5)  # the one where sleb + corrected is best
    healed = make_recipe({"method": "auto", "remove": 2, "samples": 3})
    plans = Auto().plans(healed, inputs_of(model))
    assert plans[0].chosen_by == "sleb + corrected"
    alone = Auto().plan(healed, inputs_of(model))
    assert alone.chosen_by == next(plan.chosen_by for plan in plans if plan.replacement == "none")
    assert all("+" not in name for name, _ in alone.tried)


def test_equal_plans_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Packing(Method):
        def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
            return packed_plan(inputs.layers, [(2, "attention"), (2, "mlp")])

    class Removing(Method):
        def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
            return Plan(inputs.layers, (2,), recipe.resolved_replacement)

    candidates = {"blockpruner": Packing(), "sleb": Removing(), "sleb + linear": Removing()}
    monkeypatch.setattr(auto, "CANDIDATES", {"shifted": METHODS["shifted"], **candidates})
    monkeypatch.setattr(Auto, "candidates", lambda *_, **__: list(candidates))
    plans = Auto().plans(make_recipe({"method": "auto", "remove": 1, "samples": 3}), inputs_of(tiny_model()))
    assert {plan.chosen_by for plan in plans} == {"blockpruner", "sleb + linear"}
    assert [name for name, _ in plans[0].tried] == list(candidates)


def test_a_candidate_that_the_weights_refuse_is_left_out() -> None:
    model = tiny_model("llama", 10)  # the one where shortgpt + linear is best
    with torch.no_grad():  # zeros that the config does not name
        for layer in model.model.layers[:-1]:
            layer.mlp.down_proj.weight.zero_()
    inputs = inputs_of(model)
    mapped = make_recipe({"method": "shortgpt", **FIELDS, "replacement": "linear"})
    with pytest.raises(StreamlineError, match="adds only zeros"):
        build_replacement(model, METHODS["shortgpt"].plan(mapped, inputs), CALIBRATION)
    plan = METHODS["auto"].plan(RECIPE, inputs)
    assert "linear" not in plan.chosen_by
    assert dict(plan.tried)["shortgpt + linear"] is None


def test_a_choice_that_none_can_make_is_refused() -> None:
    model = tiny_model("gemma2")  # it cannot be merged, so what merges or folds is no candidate
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(StreamlineError, match="is not finite for any method tried"):
        METHODS["auto"].plan(RECIPE, inputs_of(model))


def test_the_text_that_plans_are_compared_on_is_text_that_was_chosen_on() -> None:
    source = ModelSource(REFERENCE)
    recipe = make_recipe({"method": "auto", "remove": 1, **FEW})
    prepared = prepare(source, recipe, lambda message: None)
    both = read_windows("stdlib:calibration", AutoTokenizer.from_pretrained(REFERENCE), 18, 32, 0, VOCABULARY)
    assert torch.equal(prepared.chosen_on.ids, both.ids)
    assert torch.equal(prepared.calibration.ids, both.ids[:3])
    assert torch.equal(read_texts(source, recipe, False).chosen_on["calibration"].ids, both.ids)


def test_with_the_weights_on_disk_it_makes_and_compares_the_same_plans(tmp_path: Path) -> None:
    source = ModelSource(str(make(tmp_path / "in", num_hidden_layers=LAYERS)))
    scratch = tmp_path / "scratch"
    models = (load_stock(source, torch.float32), load_on_disk(source, scratch))
    recipe = make_recipe({"method": "auto", **FIELDS, "remove": 1})
    plans = [Auto().plan(recipe, inputs_of(model)) for model in models]
    assert plans[0] == plans[1]
    assert [name for name, loss in plans[1].tried if loss is not None] == ALL
    assert all(parameter.is_meta for parameter in models[1].parameters())
    gc.collect()
    # What a plan changed is deleted once it is tried, and so is what was kept in files meanwhile.
    assert not [each for each in scratch.iterdir() if each.is_dir() or each.name.startswith("kept")]


def test_a_large_calibration_text_asks_for_no_more_than_it_takes_to_compare() -> None:
    assert Auto().held_out(make_recipe({"remove": 1, "samples": 128, "length": 512})) == 48 + 48
    assert Auto().held_out(make_recipe({"remove": 1, "samples": 24, "length": 256})) == 24 + 96
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
    assert list(tried) == ALL
    best = min(tried, key=tried.__getitem__)
    assert record["plan"].startswith(f"by {best}: ")
    assert any(f"{best} {tried[best]:.4f}" in line for line in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by {CITATIONS[best.partition(' ')[0]]}, which had the lowest held-out loss of the methods" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def healed_by_trials(
    monkeypatch: pytest.MonkeyPatch, candidates: tuple[str, ...], data: str, out: Path
) -> tuple[PruningRecord, list[str]]:
    """What a run did that distils the plans of these candidates, and what it said."""
    monkeypatch.setattr(auto, "CANDIDATES", {name: METHODS_OF_AUTO[name] for name in candidates})
    fields = {**FEW, "samples": 2, "heal": "distill", "heal_data": data, "heal_tokens": 32 * 40, "heal_epochs": 1}
    recipe, said = make_recipe({"method": "auto", "remove": 4, **fields}), list[str]()
    record = prune(ModelSource(REFERENCE), recipe, out, overwrite=False, verbose=False, notify=said.append)
    return record, said


def test_trial_trainings_choose_and_are_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ("shifted", "shortgpt iterative")
    record, said = healed_by_trials(monkeypatch, two, "stdlib", tmp_path / "out")
    [(share, found)] = record.plan.trials
    best = min(found, key=lambda each: each[1])[0]
    assert record.plan.chosen_by == best
    written = json.loads((tmp_path / "out" / "streamline.json").read_text())
    assert written["trials"] == [{"share": share, "kl": dict(found)}]
    assert [line for line in said if line.startswith("by ")] == [record.plan.describe()]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by {CITATIONS[best.partition(' ')[0]]}, whose model healed best in trial trainings of the methods" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow  # fast are `Trials` after an interruption, and a resumed run on sampled text
def test_interrupted_trials_on_sampled_text_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = ("shifted", "shifted + corrected", "shortgpt + linear")
    record, _ = healed_by_trials(monkeypatch, three, "self", tmp_path / "out")

    def interrupt(*_: object) -> None:  # after the trials of two plans, of which the worse is out
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "_drop", interrupt)
        with pytest.raises(KeyboardInterrupt):
            healed_by_trials(monkeypatch, three, "self", tmp_path / "again")
    assert len([*tmp_path.iterdir()]) == 3  # with the sampled text and the training checkpoints
    resumed, said = healed_by_trials(monkeypatch, three, "self", tmp_path / "again")
    assert resumed.plan == record.plan
    assert any("continuing from the training checkpoints" in line for line in said)
    assert any("continuing from the text sampled before" in line for line in said)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert len([*tmp_path.iterdir()]) == 2


def test_too_little_text_is_an_error_that_says_why_it_is_so_much(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("for number in range(10):\n    print(number)\n" * 8)
    fields = {"method": "auto", "remove": 1, "samples": 6, "length": 32, "heal": "none"}
    recipe = make_recipe({**fields, "calibration": str(tmp_path / "text.txt")})
    with pytest.raises(StreamlineError, match=r"too short for 36 windows of 32; .*; samples is 6, and .* 30 more"):
        prepare(ModelSource(REFERENCE), recipe, lambda message: None)
