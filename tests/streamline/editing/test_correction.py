"""Corrected MLPs, compared with the solution of the same least-squares problem by torch.linalg.lstsq."""

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
from optimum.streamline.editing.correction import (
    STRENGTH,
    Corrections,
    add_corrections,
    fit_candidates,
    fit_corrections,
)
from optimum.streamline.editing.packing import mlps_after_gaps, packed, sublayers_left
from optimum.streamline.editing.plan import Plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.methods.shifted import pairs_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.kept_tensor import KeptTensor
from optimum.streamline.models.removed_sublayers import SublayerSet, whole_layer
from optimum.streamline.models.skipped_sublayers import skipped_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.ablation import corrected_losses, cross_fitted_losses, removal_losses
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS, tiny_model, token_ids

TEXT = Windows(token_ids(9, 20), "random")
FEW = Windows(token_ids(6, 20), "random")  # one batch, so that no removal leaves a race before its end
REFUSED = {"mixtral": "mixtures of experts", "qwen3_moe": "mixtures of experts", "gpt_neox": "parallel residual"}
REFUSED |= dict.fromkeys(("gemma2", "olmo2"), "a norm between its MLP and the residual stream")
# What each architecture needs to be corrected; the others cannot be.
FIELDS = {name: {} for name in ARCHITECTURES if name not in REFUSED} | {
    "gpt_neox": {"use_parallel_residual": False},
    "granite": {"residual_multiplier": 0.4},
}
ONE_GAP, TWO_GAPS = Plan(LAYERS, (1, 2), "corrected"), Plan(LAYERS, (0, 3), "corrected")
# The MLP of one layer and the attention of the next go. One layer is made of two originals, and its MLP is corrected.
SHIFTED = packed_plan(LAYERS, [(1, "mlp"), (2, "attention")], (), "corrected")


def correctable(architecture: str = "llama") -> PreTrainedModel:
    return tiny_model(architecture, **FIELDS[architecture])


def of_layer(model: PreTrainedModel, layer: int, ids: torch.Tensor = TEXT.ids) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output projection of a layer's MLP reads, and the layer's output, as rows in float64."""
    architecture = architecture_of(model.config)
    module, seen = decoder_layers(model, architecture)[layer], {}
    hooks = [
        module.register_forward_hook(lambda _, args, out: seen.update(after=out)),
        module.get_submodule(architecture.mlp_out[0]).register_forward_pre_hook(
            lambda _, args: seen.update(read=args[0])
        ),
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen["read"].flatten(0, -2).double(), seen["after"].flatten(0, -2).double()


def best_correction(pruned: PreTrainedModel, place: int, original: PreTrainedModel, layer: int) -> torch.Tensor:
    """min_D |y + X D - h|^2 + lambda |D|^2, as rows of one longer least-squares problem."""
    read, after = of_layer(pruned, place)
    read = read * getattr(pruned.config, "residual_multiplier", 1.0)
    inner = read.shape[1]
    ridge = (STRENGTH * read.square().sum() / inner).sqrt() * torch.eye(inner)
    missing = of_layer(original, layer)[1] - after
    longer = torch.cat([missing, torch.zeros(inner, missing.shape[1])])
    return torch.linalg.lstsq(torch.cat([read, ridge.double()]), longer.double()).solution


def weight_of(model: PreTrainedModel, layer: int) -> torch.Tensor:
    """The weight of the MLP's output projection, `[inner, width]`."""
    architecture = architecture_of(model.config)
    module = decoder_layers(model, architecture)[layer].get_submodule(architecture.mlp_out[0])
    weight = module.weight.detach().clone()
    return weight if isinstance(module, Conv1D) else weight.T


def loss(model: PreTrainedModel, windows: Windows) -> float:
    found = logits(model, windows.ids).double()
    return float(functional.cross_entropy(found[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten()))


@pytest.mark.parametrize("architecture", sorted(FIELDS))
def test_a_correction_is_the_least_squares_solution(architecture: str) -> None:
    original, pruned = correctable(architecture), correctable(architecture)
    apply_plan(pruned, replace(ONE_GAP, replacement="none"), None)
    expected = best_correction(pruned, 1, original, 3)
    replacement = build_replacement(original, ONE_GAP, TEXT)
    assert list(replacement.corrections) == [3]
    torch.testing.assert_close(replacement.corrections[3].read().double(), expected, atol=2e-4, rtol=1e-3)

    corrected = copy.deepcopy(original)
    apply_plan(corrected, ONE_GAP, replacement)
    torch.testing.assert_close(
        weight_of(corrected, 1), weight_of(original, 3) + expected, atol=2e-4, rtol=1e-3, check_dtype=False
    )
    before, after, target = (of_layer(m, n)[1] for m, n in ((pruned, 1), (corrected, 1), (original, 3)))
    assert (after - target).square().sum() < 0.9 * (before - target).square().sum()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite"])
def test_the_second_gap_is_fitted_to_the_original_behind_the_first_correction(architecture: str) -> None:
    original, pruned = correctable(architecture), correctable(architecture)
    fitted = fit_corrections(original, frozenset(TWO_GAPS.sublayers_removed), TEXT)
    assert list(fitted) == [1, 4]
    apply_plan(pruned, replace(TWO_GAPS, replacement="none"), None)
    naive = best_correction(pruned, 2, original, 4)
    add_corrections(pruned, {0: KeptTensor(pruned, best_correction(pruned, 0, original, 1))})
    expected = best_correction(pruned, 2, original, 4)
    torch.testing.assert_close(fitted[4].read().double(), expected, atol=2e-4, rtol=1e-3)
    assert (naive - expected).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", sorted(FIELDS))
def test_a_packed_corrected_model_is_a_plain_checkpoint_and_the_original_is_left_alone(
    architecture: str, tmp_path: Path
) -> None:
    model, ids, plan = correctable(architecture), token_ids(), SHIFTED
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replacement = build_replacement(model, plan, TEXT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    change = apply_plan(model, plan, replacement)
    marked = [layer.mlp_originals[0] for layer in change.new_layers if layer.corrected]
    assert tuple(marked) == plan.corrected == tuple(replacement.corrections)
    edited = logits(model, ids)
    model.save_pretrained(tmp_path)
    stock = stock_model(tmp_path)
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load(str(tmp_path)), ids), edited, atol=1e-5, rtol=0)


def test_a_packed_layer_keeps_its_corrected_mlp() -> None:
    """Between the attention of layer 1 and the MLP of layer 3 all goes: they make a layer, its MLP corrected."""
    original, corrected, removed = (
        tiny_model(),
        tiny_model(),
        [(1, "mlp"), (2, "attention"), (2, "mlp"), (3, "attention")],
    )
    plan = packed_plan(LAYERS, removed, (), "corrected")
    assert plan.corrected == (3,)
    assert [layer.originals for layer in plan.new_layers] == [(0,), (1, 3), (4,)]
    replacement = build_replacement(corrected, plan, TEXT)
    apply_plan(corrected, plan, replacement)
    expected = weight_of(original, 3) + replacement.corrections[3].read()
    torch.testing.assert_close(weight_of(corrected, 1), expected)


def test_on_the_reference_model_the_original_is_nearer_on_unseen_text() -> None:
    source = ModelSource(REFERENCE)
    model, tokenizer = load_stock(source, torch.float32), load_tokenizer(source)
    parts = ("stdlib:calibration", "stdlib:eval")
    calibration, unseen = (read_windows(part, tokenizer, 16, 128, 0, VOCABULARY) for part in parts)
    plain = packed_plan(16, [(3, "mlp"), (4, "attention"), (9, "attention"), (9, "mlp")])
    plan = replace(plain, replacement="corrected")
    removed, corrected = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(removed, plain, None)
    apply_plan(corrected, plan, build_replacement(model, plan, calibration))
    mlps = [layer.mlp_originals[0] for layer in plan.new_layers]
    assert plan.corrected == (4, 10)
    for layer in plan.corrected:
        place = mlps.index(layer)
        target, without, with_it = (
            of_layer(each, number, unseen.ids)[1]
            for each, number in ((model, layer), (removed, place), (corrected, place))
        )
        assert (with_it - target).square().sum() < 0.97 * (without - target).square().sum()
    assert loss(model, unseen) < loss(corrected, unseen) < loss(removed, unseen) - 0.01


def test_endless_strength_is_plain_removal() -> None:
    fitted = fit_corrections(tiny_model(), frozenset(TWO_GAPS.sublayers_removed), TEXT, strength=1e12)
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
        all_of_it = fit_corrections(model, removed | candidate, FEW)
        own = max(mlps_after_gaps(LAYERS, candidate, removed), default=-1)
        # Gaps after the candidate's own keep the corrections of the model without it.
        expected = {layer: all_of_it[layer] if layer <= own else fitted.before[layer] for layer in found}
        assert set(found) == set(all_of_it)
        for layer, correction in found.items():
            torch.testing.assert_close(correction.read(), expected[layer].read(), atol=1e-5, rtol=1e-4)
        assert tried == pytest.approx(literally(model, removed | candidate, expected), abs=1e-5)
    [again] = corrected_losses(model, FEW, [removed | candidates[0]], FEW)
    whole = fit_corrections(model, removed | candidates[0], FEW)
    assert again == pytest.approx(literally(model, removed | candidates[0], whole), abs=1e-5)


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
        found.append(([fitted.before, *fitted.candidates], losses, cross_fitted_losses(model, TEXT, candidates[:1])))
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
        losses = cross_fitted_losses(model, FEW, candidates)
        best = candidates[losses.index(min(losses))]
        chosen = {}
        for replacement in ("corrected", "none"):
            fields = {"remove": 1} | ({} if method == "blockpruner" else {"protect": "0,0"})
            plan = METHODS[method].plan(make_recipe({"method": method, **fields, "replacement": replacement}), inputs)
            assert plan.replacement == replacement
            chosen[replacement] = frozenset(plan.sublayers_removed)
        if method == "blockpruner":  # its plan takes two steps, the second of those that complete a layer
            pairs = [best | {sublayer} for sublayer in sublayers_left(LAYERS, best)]
            complete = [pair for pair in pairs if len(packed(sublayers_left(LAYERS, pair))) == LAYERS - 1]
            losses = cross_fitted_losses(model, FEW, complete)
            assert chosen["corrected"] == complete[losses.index(min(losses))]
        else:
            assert chosen["corrected"] == best
        differ += chosen["corrected"] != chosen["none"]
    assert differ or method == "blockpruner"


def test_an_mlp_that_is_skipped_already_is_not_corrected() -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((2, "mlp"),)), None)
    plan = with_skips(Plan(LAYERS, (1,), "corrected"), model.config)
    assert plan.corrected == (3,)
    replacement = build_replacement(model, plan, TEXT)
    assert list(replacement.corrections) == [3]
    change = apply_plan(model, plan, replacement)
    assert change.skipped == {1: ["mlp"]}
    assert skipped_of(model.config) == {(1, "mlp")}
    assert [layer.corrected for layer in change.new_layers] == [False, False, True, False]
    with pytest.raises(ValueError, match="already_skipped"):
        apply_plan(model, Plan(LAYERS - 1, (0,), "corrected"), Replacement())


@pytest.mark.parametrize("architecture", sorted(REFUSED))
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
    last = make_recipe({"layers": "3,4", "replacement": "corrected"})
    with pytest.raises(StreamlineError, match=r"no MLP is left after what is removed \(remove layers 3-4"):
        method_of(last, tiny_model().config)
    with pytest.raises(StreamlineError, match="no MLP is left after"):
        build_replacement(tiny_model(), Plan(LAYERS, (3, 4), "corrected"), TEXT)
    both = Plan(LAYERS, (1, 4), "corrected")
    assert both.describe() == "remove layers 1, 4, the mlp of layers 2 corrected: 5 layers become 3"
    assert list(build_replacement(tiny_model(), both, TEXT).corrections) == [2]
    silent = tiny_model()
    nn.init.zeros_(silent.model.layers[3].mlp.up_proj.weight)
    with pytest.raises(StreamlineError, match="the MLP of layer 3 computes only zeros"):
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
    assert [(layer["layer"], layer["originals"], layer["corrected"]) for layer in corrected] == [
        (4, [6], True),
        (7, [10], True),
    ]
    assert record["plan"] == "remove layers 4-5, 9, the mlp of layers 6, 10 corrected: 16 layers become 13"
    assert record["plan"] in outcome.out
    assert record["recipe"]["pruning"]["replacement"] == "corrected"
    card = (out / "README.md").read_text()
    assert "| 4 | 6 | kept, MLP corrected |" in card
    assert "| 5 | 7 | kept |" in card
    assert "arXiv 2506.03510" in card
