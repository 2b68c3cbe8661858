"""Corrected projections, compared with the solution of the same least-squares problem by torch.linalg.lstsq."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from behaviour import logits, stock_model
from cases import make
from console import optimum_cli
from optimum.streamline.checkpoints.loading import load, load_on_disk, load_stock, load_tokenizer
from optimum.streamline.editing.apply import Replacement, apply_plan, build_replacement, with_skips
from optimum.streamline.editing.candidate_corrections import fit_candidates
from optimum.streamline.editing.correction import STRENGTH, Corrections, add_corrections, fit_corrections
from optimum.streamline.editing.packing import mlps_after_gaps, packed, sublayers_left
from optimum.streamline.editing.plan import Plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.methods.shifted import pairs_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet, whole_layer
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, replace_sublayer, skipped_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.ablation import corrected_losses, cross_fitted_losses, removal_losses
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from tiny import KIN, LAYERS, NORM_AFTER, every, tiny_model, token_ids

TEXT = Windows(token_ids(9, 20), "random")
FEW = Windows(token_ids(6, 20), "random")  # one batch, so that no removal leaves a race before its end
REFUSED = {"mixtral": "mixtures of experts", "qwen3_moe": "mixtures of experts", "gpt_neox": "parallel residual"}
REFUSED |= dict.fromkeys(NORM_AFTER, "a norm between its MLP and the residual stream")
# What each architecture needs to be corrected; the others cannot be.
FIELDS = {name: {} for name in ARCHITECTURES if name not in REFUSED} | {
    "gpt_neox": {"use_parallel_residual": False},
    "granite": {"residual_multiplier": 0.4},
}
A, M = ATTENTION, MLP
ONE_GAP = Plan(LAYERS, (1, 2), "corrected")
# The MLP of one layer and the attention of the next go. One layer is made of two originals.
SHIFTED = packed_plan(LAYERS, [(1, M), (2, A)], (), "corrected")
# What is removed, and of each sublayer that is corrected the one after which its target is, in the original.
CASES: dict[str, tuple[SublayerSet, dict[SublayerKey, SublayerKey]]] = {
    "a block": (
        whole_layer(1) | whole_layer(2),
        {(0, M): (2, M), **{each: each for each in ((3, A), (3, M), (4, A), (4, M))}},
    ),
    "the first layer and another": (
        whole_layer(0) | whole_layer(3),
        {(1, A): (1, A), (1, M): (1, M), (2, A): (2, A), (2, M): (3, M), (4, A): (4, A), (4, M): (4, M)},
    ),
    "the last layer": (whole_layer(4), {(3, M): (4, M)}),
    "of two layers": (
        frozenset({(1, M), (2, A)}),
        {(1, A): (2, A), **{each: each for each in ((2, M), (3, A), (3, M), (4, A), (4, M))}},
    ),
    "an attention and an MLP": (
        frozenset({(2, A), (3, M)}),
        {(1, M): (2, A), (2, M): (2, M), (3, A): (3, M), (4, A): (4, A), (4, M): (4, M)},
    ),
}


def correctable(architecture: str = "llama") -> PreTrainedModel:
    return tiny_model(architecture, **FIELDS[architecture])


def without(model: PreTrainedModel, removed: SublayerSet) -> PreTrainedModel:
    """A copy in which each of these sublayers adds nothing, in its own place."""
    copied, architecture = copy.deepcopy(model), architecture_of(model.config)
    for layer, kind in removed:
        replace_sublayer(decoder_layers(copied, architecture)[layer], architecture, kind)
    return copied


def projection_of(model: PreTrainedModel, sublayer: SublayerKey) -> nn.Module:
    architecture, (layer, kind) = architecture_of(model.config), sublayer
    path = architecture.attention_out if kind == A else architecture.mlp_out[0]
    return decoder_layers(model, architecture)[layer].get_submodule(path)


def at(model: PreTrainedModel, sublayer: SublayerKey) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sublayer's output projection reads, and the residual stream after it, as rows in float64."""
    layer, kind = sublayer
    model, seen = without(model, frozenset({(layer, M)})) if kind == A else model, {}
    module = decoder_layers(model, architecture_of(model.config))[layer]
    hooks = [
        module.register_forward_hook(lambda _, args, out: seen.update(after=out)),
        projection_of(model, sublayer).register_forward_pre_hook(lambda _, args: seen.update(read=args[0])),
    ]
    logits(model, TEXT.ids)
    for hook in hooks:
        hook.remove()
    return seen["read"].flatten(0, -2).double(), seen["after"].flatten(0, -2).double()


def best_correction(pruned: PreTrainedModel, sublayer: SublayerKey, target: torch.Tensor) -> torch.Tensor:
    """min_D |y + X D - h|^2 + lambda |D|^2, as rows of one longer least-squares problem."""
    read, after = at(pruned, sublayer)
    read = read * getattr(pruned.config, "residual_multiplier", 1.0)
    inner = read.shape[1]
    ridge = (STRENGTH * read.square().sum() / inner).sqrt() * torch.eye(inner)
    longer = torch.cat([target - after, torch.zeros(inner, target.shape[1])])
    return torch.linalg.lstsq(torch.cat([read, ridge.double()]), longer.double()).solution


def check_solutions(
    original: PreTrainedModel, removed: SublayerSet, fitted: Corrections, targets: dict[SublayerKey, SublayerKey]
) -> None:
    """Each correction is the best in the pruned model with the earlier ones in place."""
    assert list(fitted) == list(targets)
    pruned = without(original, removed)
    for sublayer, target in targets.items():
        expected = best_correction(pruned, sublayer, at(original, target)[1])
        torch.testing.assert_close(fitted[sublayer].read().double(), expected, atol=2e-4, rtol=1e-3)
        assert expected.abs().max() > 1e-2
        add_corrections(pruned, {sublayer: fitted[sublayer]})


def weight_of(model: PreTrainedModel, sublayer: SublayerKey) -> torch.Tensor:
    """The weight of a sublayer's output projection, `[inner, width]`."""
    module = projection_of(model, sublayer)
    weight = module.weight.detach().clone()
    return weight if isinstance(module, Conv1D) else weight.T


def loss(model: PreTrainedModel, windows: Windows) -> float:
    found = logits(model, windows.ids).double()
    return float(functional.cross_entropy(found[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        pytest.param(each, case, marks=pytest.mark.slow if each in KIN else ())
        for each in sorted(FIELDS)
        for case in CASES
        if case == "of two layers" or each in ("llama", "gpt2")
    ],
)
def test_each_projection_is_the_ridge_solution_for_its_own_inputs_and_target(architecture: str, case: str) -> None:
    original, (removed, targets) = correctable(architecture), CASES[case]
    fitted = fit_corrections(original, removed, TEXT)
    check_solutions(original, removed, fitted, targets)
    assert packed_plan(LAYERS, removed, (), "corrected").corrected == tuple(targets)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite"])
def test_a_search_corrects_the_first_mlp_after_each_gap(architecture: str) -> None:
    original, (removed, _) = correctable(architecture), CASES["the first layer and another"]
    [fitted] = fit_candidates(original, TEXT, [removed], frozenset()).candidates
    check_solutions(original, removed, fitted, {(1, M): (1, M), (4, M): (4, M)})


@pytest.mark.parametrize("architecture", every(FIELDS))
def test_only_the_weights_of_output_projections_change(architecture: str) -> None:
    original = correctable(architecture)
    plain, corrected = copy.deepcopy(original), copy.deepcopy(original)
    apply_plan(plain, replace(ONE_GAP, replacement="none"), None)
    replacement = build_replacement(original, ONE_GAP, TEXT)
    apply_plan(corrected, ONE_GAP, replacement)
    # Layers 1 and 2 are gone.
    places = {(0, M): (0, M), (1, A): (3, A), (1, M): (3, M), (2, A): (4, A), (2, M): (4, M)}
    for place, sublayer in places.items():
        expected = weight_of(original, sublayer) + replacement.corrections[sublayer].read()
        torch.testing.assert_close(weight_of(corrected, place), expected)
    weights = [projection_of(corrected, place).weight for place in places]
    names = {name for name, each in corrected.named_parameters() if any(each is weight for weight in weights)}
    before = plain.state_dict()
    assert {name for name, each in corrected.state_dict().items() if not torch.equal(each, before[name])} == names


@pytest.mark.parametrize("architecture", every(FIELDS))
def test_a_packed_corrected_model_is_a_plain_checkpoint_and_the_original_is_left_alone(
    architecture: str, tmp_path: Path
) -> None:
    model, ids, plan = correctable(architecture), token_ids(), SHIFTED
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replacement = build_replacement(model, plan, TEXT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    change = apply_plan(model, plan, replacement)
    assert [layer.corrected for layer in change.new_layers] == [False, True, True, True]
    assert plan.corrected == tuple(replacement.corrections)
    edited = logits(model, ids)
    model.save_pretrained(tmp_path)
    stock = stock_model(tmp_path)
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load(str(tmp_path)), ids), edited, atol=1e-5, rtol=0)


def test_a_packed_layer_keeps_its_corrected_halves() -> None:
    """Between the attention of layer 1 and the MLP of layer 3 all goes: they make a layer, both corrected."""
    original, corrected, removed = (
        tiny_model(),
        tiny_model(),
        [(1, "mlp"), (2, "attention"), (2, "mlp"), (3, "attention")],
    )
    plan = packed_plan(LAYERS, removed, (), "corrected")
    assert plan.corrected == ((1, A), (3, M), (4, A), (4, M))
    assert [layer.originals for layer in plan.new_layers] == [(0,), (1, 3), (4,)]
    replacement = build_replacement(corrected, plan, TEXT)
    apply_plan(corrected, plan, replacement)
    for kind, layer in ((A, 1), (M, 3)):
        expected = weight_of(original, (layer, kind)) + replacement.corrections[layer, kind].read()
        torch.testing.assert_close(weight_of(corrected, (1, kind)), expected)


def test_on_the_reference_model_all_corrections_lower_the_loss_on_unseen_text_more_than_those_of_a_search() -> None:
    source = ModelSource(REFERENCE)
    model, tokenizer = load_stock(source, torch.float32), load_tokenizer(source)
    parts = ("stdlib:calibration", "stdlib:eval")
    calibration, unseen = (read_windows(part, tokenizer, 16, 128, 0, VOCABULARY) for part in parts)
    plan = packed_plan(16, [*whole_layer(1), *whole_layer(3), *whole_layer(12), (4, M), (5, A)], (), "corrected")
    removed = frozenset(plan.sublayers_removed)
    [first_mlps] = fit_candidates(model, calibration, [removed], frozenset()).candidates
    assert list(first_mlps) == [(2, M), (5, M), (13, M)]
    losses = []
    for corrections in (fit_corrections(model, removed, calibration), first_mlps, {}):
        edited = copy.deepcopy(model)
        apply_plan(edited, plan, Replacement(corrections=corrections))
        losses.append(loss(edited, unseen))
    best, some, none = losses
    assert loss(model, unseen) < best < some - 0.01 < none - 0.02


def test_endless_strength_is_plain_removal() -> None:
    for removed, _ in CASES.values():
        fitted = fit_corrections(tiny_model(), removed, TEXT, strength=1e12)
        assert all(correction.read().abs().max() < 1e-9 for correction in fitted.values())


def literally(model: PreTrainedModel, removed: SublayerSet, corrections: Corrections) -> float:
    """The loss on `FEW` of a model that is edited for good."""
    edited = copy.deepcopy(model)
    add_corrections(edited, corrections)
    apply_plan(edited, packed_plan(LAYERS, removed), None)
    return loss(edited, FEW)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("removed", [frozenset(), whole_layer(2), frozenset({(1, "mlp"), (2, "attention")})])
def test_candidates_are_tried_with_the_corrections_they_would_have(removed: SublayerSet, architecture: str) -> None:
    model = correctable(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidates = pairs_of(model.config, removed, range(LAYERS))
    fitted = fit_candidates(model, FEW, candidates, removed)
    losses = removal_losses(model, FEW, candidates, removed, fitted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for candidate, tried, found in zip(candidates, losses, fitted.candidates, strict=True):
        [all_of_it] = fit_candidates(model, FEW, [removed | candidate], frozenset()).candidates
        own = max(mlps_after_gaps(LAYERS, candidate, removed), default=-1)
        # Gaps after the candidate's own keep the corrections of the model without it.
        expected = {each: all_of_it[each] if each[0] <= own else fitted.before[each] for each in found}
        assert set(found) == set(all_of_it)
        for sublayer, correction in found.items():
            torch.testing.assert_close(correction.read(), expected[sublayer].read(), atol=1e-5, rtol=1e-4)
        assert tried == pytest.approx(literally(model, removed | candidate, expected), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_whole_plans_are_judged_with_all_their_corrections(case: str, architecture: str) -> None:
    model, (removed, _) = correctable(architecture), CASES[case]
    [judged] = corrected_losses(model, FEW, [removed], FEW)
    assert judged == pytest.approx(literally(model, removed, fit_corrections(model, removed, FEW)), abs=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in ("gpt2", "llama") else pytest.mark.slow) for each in sorted(FIELDS)],
)
def test_corrections_and_losses_on_disk_are_the_same_to_the_bit(architecture: str, tmp_path: Path) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS, **FIELDS[architecture])
    found = []
    for model in (
        load_stock(ModelSource(str(source)), torch.float32),
        load_on_disk(ModelSource(str(source)), tmp_path),
    ):
        candidates, removed = pairs_of(model.config, whole_layer(1), range(LAYERS)), whole_layer(1)
        fitted = fit_candidates(model, TEXT, candidates, removed)
        losses = removal_losses(model, TEXT, candidates, removed, fitted)
        whole = [fit_corrections(model, removal, TEXT) for removal, _ in CASES.values()]
        judged = cross_fitted_losses(model, TEXT, candidates[:2])
        found.append(([fitted.before, *fitted.candidates, *whole], losses, judged))
    (one, *losses), (other, *losses_on_disk) = found
    assert losses == losses_on_disk
    assert [list(each) for each in one] == [list(each) for each in other]
    values = [[each.read() for corrections in some for each in corrections.values()] for some in (one, other)]
    assert all(torch.equal(*pair) for pair in zip(*values, strict=True))


def test_each_half_of_the_text_judges_what_was_fitted_on_the_other() -> None:
    model, removed = tiny_model(), whole_layer(2)
    one, other = FEW.part(0, 3), FEW.part(3, 6)
    each = [corrected_losses(model, judged, [removed], fitted)[0] for judged, fitted in ((one, other), (other, one))]
    assert cross_fitted_losses(model, FEW, [removed]) == pytest.approx([sum(each) / 2])
    single = FEW.part(0, 1)
    assert cross_fitted_losses(model, single, [removed]) == corrected_losses(model, single, [removed], single)


def searched_losses(
    model: PreTrainedModel, candidates: list[SublayerSet], removed: SublayerSet = frozenset()
) -> list[float]:
    """The losses on each half of `FEW` with the corrections of a search that are fitted on the other half."""
    one, other = FEW.halves()
    losses = [
        removal_losses(model, judged, candidates, removed, fit_candidates(model, fitted, candidates, removed))
        for judged, fitted in ((one, other), (other, one))
    ]
    return [sum(each) / 2 for each in zip(*losses, strict=True)]


@pytest.mark.parametrize("method", ["sleb", "shifted", "blockpruner"])
def test_a_greedy_search_takes_the_removal_that_is_best_after_its_correction(method: str) -> None:
    """One step, tried one by one; without corrections the choice is another on some models."""
    differ = 0
    for seed in range(1 if method == "blockpruner" else 3):
        model = tiny_model("llama", seed)
        inputs = MethodInputs(model, FEW, measure_scores(model, FEW))
        candidates = {
            "sleb": [whole_layer(layer) for layer in range(LAYERS)],
            "shifted": pairs_of(model.config, frozenset(), range(LAYERS)),
            "blockpruner": [frozenset({sublayer}) for sublayer in sublayers_left(LAYERS, ())],
        }[method]
        losses = searched_losses(model, candidates)
        best = candidates[losses.index(min(losses))]
        chosen = {}
        for replacement in ("corrected", "none"):
            fields = {"remove": 1} | ({} if method == "blockpruner" else {"protect": "0,0"})
            plan = METHODS[method].plan(make_recipe({"method": method, **fields, "replacement": replacement}), inputs)
            assert plan.replacement == replacement
            chosen[replacement] = frozenset(plan.sublayers_removed)
        if method == "blockpruner":  # its plan takes two steps, the second of those that complete a layer
            seconds = [frozenset({sublayer}) for sublayer in sublayers_left(LAYERS, best)]
            complete = [each for each in seconds if len(packed(sublayers_left(LAYERS, best | each))) == LAYERS - 1]
            losses = searched_losses(model, complete, best)
            assert chosen["corrected"] == best | complete[losses.index(min(losses))]
        else:
            assert chosen["corrected"] == best
        differ += chosen["corrected"] != chosen["none"]
    assert differ or method == "blockpruner"


def test_an_mlp_that_is_skipped_already_is_not_corrected() -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((2, "mlp"),)), None)
    plan = with_skips(Plan(LAYERS, (1,), "corrected"), model.config)
    assert plan.corrected == ((0, M), (2, A), (3, A), (3, M), (4, A), (4, M))
    replacement = build_replacement(model, plan, TEXT)
    assert tuple(replacement.corrections) == plan.corrected
    change = apply_plan(model, plan, replacement)
    assert change.skipped == {1: ["mlp"]}
    assert skipped_of(model.config) == {(1, "mlp")}
    assert [layer.corrected for layer in change.new_layers] == [True, True, True, True]
    assert not weight_of(model, (1, M)).any()
    with pytest.raises(ValueError, match="already_skipped"):
        apply_plan(model, Plan(LAYERS - 1, (0,), "corrected"), Replacement())


@pytest.mark.parametrize("architecture", every(REFUSED))
def test_what_no_correction_fits_is_refused_by_name(architecture: str) -> None:
    recipe = make_recipe({"layers": "1", "replacement": "corrected"})
    with pytest.raises(StreamlineError, match=f"architecture '{architecture}' has .*{REFUSED[architecture]}"):
        method_of(recipe, tiny_model(architecture).config)
    with pytest.raises(StreamlineError, match="replacement 'corrected'.*use replacement none"):
        build_replacement(tiny_model(architecture), ONE_GAP, TEXT)


def test_other_impossible_corrections_are_refused() -> None:
    post_norm = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(StreamlineError, match="architecture 'opt' has a norm"):
        build_replacement(post_norm, ONE_GAP, TEXT)
    with pytest.raises(StreamlineError, match="has no calibration text"):
        build_replacement(tiny_model(), ONE_GAP)
    nothing = Plan(LAYERS, (2,), "corrected", already_skipped=((2, A), (2, M)))
    with pytest.raises(StreamlineError, match=r"adds nothing in the original \(remove layers 2: .* nothing can be"):
        build_replacement(tiny_model(), nothing, TEXT)
    both = Plan(LAYERS, (1, 4), "corrected")
    assert both.describe() == "remove layers 1, 4, corrected from the mlp of layer 0 on: 5 layers become 3"
    silent = tiny_model()
    nn.init.zeros_(silent.model.layers[3].mlp.up_proj.weight)
    with pytest.raises(StreamlineError, match="the mlp of layer 3 computes only zeros"):
        build_replacement(silent, ONE_GAP, TEXT)


def test_the_command_says_and_records_what_it_corrects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--layers", "4,5,9", "--replacement", "corrected", "--heal", "none")
    quick = ("--calibration", "stdlib", "--samples", 4, "--length", 32)
    out = tmp_path / "out"
    outcome = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", REFERENCE, *words, *quick, out)
    assert outcome.code == 0, outcome.err
    record = json.loads((out / "streamline.json").read_text())
    corrected = [layer for layer in record["layers"] if "corrected" in layer]
    assert [layer["layer"] for layer in corrected] == list(range(3, 13))
    assert all(layer["corrected"] is True for layer in corrected)
    assert record["plan"] == "remove layers 4-5, 9, corrected from the mlp of layer 3 on: 16 layers become 13"
    assert record["plan"] in outcome.out
    assert record["recipe"]["pruning"]["replacement"] == "corrected"
    card = (out / "README.md").read_text()
    assert "| 2 | 2 | kept |" in card
    assert "| 4 | 6 | kept, corrected |" in card
    assert "all attentions and MLPs that stayed, from the mlp of original layer 3 on, were fitted again" in card
    assert "arXiv 2506.03510" in card
