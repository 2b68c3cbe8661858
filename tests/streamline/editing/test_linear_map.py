"""Linear maps, compared with the solution of the same least-squares problem by numpy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from behaviour import stock_model
from optimum.streamline.checkpoints.loading import load, load_stock, load_tokenizer
from optimum.streamline.editing.apply import Replacement, apply_plan, build_replacement, with_skips
from optimum.streamline.editing.linear_map import STRENGTH, check_linear, fit_maps
from optimum.streamline.editing.plan import Plan, PlannedLayer, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.llm_streamline import LLMStreamline
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, can_pack, decoder_layers
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS, NORM_AFTER, every, tiny_model, token_ids

TEXT = Windows(token_ids(9, 20), "random")
ONE_RUN = Plan(LAYERS, (2, 3), "linear")
TWO_RUNS = Plan(LAYERS, (1, 3, 4), "linear")
FOLDABLE = sorted(set(ARCHITECTURES) - NORM_AFTER)
PACKABLE = [architecture for architecture in FOLDABLE if can_pack(tiny_model(architecture).config)]
# Where the stream is found that a layer's MLP is added to: the module whose input it is, or whose output it is.
MLP_NORM = {"gpt2": "ln_2", "opt": "final_layer_norm"}

Rows = npt.NDArray[np.float64]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def rows_of(model: PreTrainedModel, layer: int, what: str, ids: torch.Tensor = TEXT.ids) -> Rows:
    """Rows `[tokens, width]`: a layer's output, or what goes into a module of it."""
    seen: list[torch.Tensor] = []
    module: nn.Module = decoder_layers(model, architecture_of(model.config))[layer]
    if what == "output":
        hook = module.register_forward_hook(lambda _, args, out: seen.append(out))
    else:
        hook = module.get_submodule(what).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, ids)
    hook.remove()
    return seen[0].flatten(0, -2).double().numpy()


def added_by_mlp(model: PreTrainedModel, layer: int) -> Rows:
    """M by subtraction: the stream after the layer less the stream its MLP's norm reads."""
    if model.config.model_type == "gpt_neox":  # parallel: the stream after less the stream with the MLP silent
        silent = copy.deepcopy(model)
        last = decoder_layers(silent, architecture_of(silent.config))[layer].mlp.dense_4h_to_h
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return rows_of(model, layer, "output") - rows_of(silent, layer, "output")
    norm = MLP_NORM.get(model.config.model_type, "post_attention_layernorm")
    return rows_of(model, layer, "output") - rows_of(model, layer, norm)


def best_map(written: Rows, stream: Rows, target: Rows, strength: float) -> Rows:
    """min_T |(x - M) + M T - h|^2 + lambda |T - I|^2, as rows of one longer least-squares problem."""
    width = written.shape[1]
    ridge = np.sqrt(strength * np.mean([written[:, i] @ written[:, i] for i in range(width)]))
    longer = np.concatenate([written, ridge * np.eye(width)])
    sought = np.concatenate([target - (stream - written), ridge * np.eye(width)])
    solved: Rows = np.linalg.lstsq(longer, sought, rcond=None)[0]
    return solved


@pytest.mark.parametrize("architecture", every(FOLDABLE))
def test_map_is_the_least_squares_solution_and_the_folded_stream_its_formula(architecture: str) -> None:
    original = tiny_model(architecture)
    written, stream, target = added_by_mlp(original, 1), rows_of(original, 1, "output"), rows_of(original, 3, "output")
    expected = best_map(written, stream, target, STRENGTH)
    replacement = build_replacement(original, ONE_RUN, TEXT)
    assert list(replacement.maps) == [(1, "mlp")]
    np.testing.assert_allclose(replacement.maps[1, "mlp"], expected, atol=2e-4)

    patched = copy.deepcopy(original)
    apply_plan(patched, ONE_RUN, replacement)
    cut = stream - written + written @ expected
    np.testing.assert_allclose(rows_of(patched, 1, "output"), cut, atol=2e-4 * abs(cut).max())
    assert ((cut - target) ** 2).sum() < ((stream - target) ** 2).sum()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite", "mixtral"])
def test_second_gap_is_fitted_to_the_original_behind_the_first_patch(architecture: str) -> None:
    original = tiny_model(architecture, **({"residual_multiplier": 0.4} if architecture == "granite" else {}))
    maps = fit_maps(original, TWO_RUNS, TEXT)
    assert list(maps) == [(0, "mlp"), (2, "mlp")]
    first = best_map(
        added_by_mlp(original, 0), rows_of(original, 0, "output"), rows_of(original, 1, "output"), STRENGTH
    )
    np.testing.assert_allclose(maps[0, "mlp"], first, atol=2e-4)
    # The first gap closed and patched by hand; original layer 2 is layer 1 then.
    patched = copy.deepcopy(original)
    apply_plan(patched, Plan(LAYERS, (1,)), None)
    out = decoder_layers(patched, architecture_of(patched.config))[0]
    with torch.no_grad():
        if architecture == "gpt2":
            out.mlp.c_proj.weight.copy_(torch.from_numpy(out.mlp.c_proj.weight.double().numpy() @ first))
            out.mlp.c_proj.bias.copy_(torch.from_numpy(out.mlp.c_proj.bias.double().numpy() @ first))
        elif architecture == "mixtral":
            for expert in out.mlp.experts.down_proj:
                expert.copy_(torch.from_numpy(first.T @ expert.double().numpy()))
        else:
            out.mlp.down_proj.weight.copy_(torch.from_numpy(first.T @ out.mlp.down_proj.weight.double().numpy()))
    second = best_map(added_by_mlp(patched, 1), rows_of(patched, 1, "output"), rows_of(original, 4, "output"), STRENGTH)
    np.testing.assert_allclose(maps[2, "mlp"], second, atol=5e-4)
    naive = best_map(
        added_by_mlp(original, 2), rows_of(original, 2, "output"), rows_of(original, 4, "output"), STRENGTH
    )
    assert abs(naive - second).max() > 1e-2


@pytest.mark.parametrize("architecture", every(PACKABLE))
def test_before_a_gap_within_layers_the_map_is_folded_into_the_attention(architecture: str) -> None:
    """Between the attention of layer 1 and the MLP of layer 2 all goes: they make a layer."""
    fields = {"residual_multiplier": 0.4} if architecture == "granite" else {}
    original = tiny_model(architecture, **fields)
    norm = MLP_NORM.get(architecture, "post_attention_layernorm")
    stream, target = rows_of(original, 1, norm), rows_of(original, 2, norm)
    expected = best_map(stream - rows_of(original, 0, "output"), stream, target, STRENGTH)
    plan = packed_plan(LAYERS, [(1, "mlp"), (2, "attention")], (), "linear")
    replacement = build_replacement(original, plan, TEXT)
    assert list(replacement.maps) == [(1, "attention")]
    np.testing.assert_allclose(replacement.maps[1, "attention"], expected, atol=5e-4)
    patched = copy.deepcopy(original)
    change = apply_plan(patched, plan, replacement)
    assert change.new_layers[1] == PlannedLayer("packed", (1, 2), mapped=("attention",))
    cut = rows_of(original, 0, "output") + (stream - rows_of(original, 0, "output")) @ expected
    np.testing.assert_allclose(rows_of(patched, 1, norm), cut, atol=5e-4 * abs(cut).max())


def test_every_gap_is_fitted_behind_the_patches_before_it() -> None:
    """Gaps of half layers and of a whole one; the last ends with the model."""
    original = tiny_model(num_hidden_layers=7)
    removed = [(1, "mlp"), (2, "attention"), (4, "attention"), (4, "mlp"), (6, "mlp")]
    plan = packed_plan(7, removed, (), "linear")
    maps = fit_maps(original, plan, TEXT)
    assert list(maps) == [(1, "attention"), (3, "mlp"), (6, "attention")]
    norm = "post_attention_layernorm"

    def patched(gaps: int, sublayers: int) -> PreTrainedModel:
        model = copy.deepcopy(original)
        so_far = Replacement(maps={each: maps[each] for each in list(maps)[:gaps]})
        apply_plan(model, packed_plan(7, removed[:sublayers], (), "linear"), so_far)
        return model

    first = patched(1, 2)  # the original layer 3 is layer 2 then
    second = best_map(added_by_mlp(first, 2), rows_of(first, 2, "output"), rows_of(original, 4, "output"), STRENGTH)
    np.testing.assert_allclose(maps[3, "mlp"], second, atol=5e-4)
    both = patched(2, 4)  # the original layer 6 is layer 4 then
    stream, entering = rows_of(both, 4, norm), rows_of(both, 3, "output")
    third = best_map(stream - entering, stream, rows_of(original, 6, "output"), STRENGTH)
    np.testing.assert_allclose(maps[6, "attention"], third, atol=5e-4)


def skipping(*skipped: tuple[int, str]) -> PreTrainedModel:
    """A model that skips these sublayers already."""
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=skipped), None)
    return model


def test_before_a_gap_what_the_original_skips_takes_no_map() -> None:
    """The MLP of layer 1 is skipped: the map is folded into its attention. All of layer 1 is: into the MLP of 0."""
    for skipped, before, kinds in (
        (((1, "mlp"),), (1, "attention"), [("kept", (0,)), ("patched", (1, 2)), ("kept", (3,)), ("kept", (4,))]),
        (
            ((1, "attention"), (1, "mlp")),
            (0, "mlp"),
            [("patched", (0,)), ("kept", (1,)), ("kept", (3,)), ("kept", (4,))],
        ),
    ):
        original = skipping(*skipped)
        plan = with_skips(Plan(LAYERS, (2,), "linear"), original.config)
        assert [(layer.kind, layer.originals) for layer in plan.new_layers] == kinds
        stream, entering = rows_of(original, 1, "output"), rows_of(original, before[0], "input_layernorm")
        if before == (0, "mlp"):
            entering = rows_of(original, 0, "post_attention_layernorm")
        expected = best_map(stream - entering, stream, rows_of(original, 2, "output"), STRENGTH)
        maps = fit_maps(original, plan, TEXT)
        assert list(maps) == [before]
        np.testing.assert_allclose(maps[before], expected, atol=2e-4)
        patched = copy.deepcopy(original)
        apply_plan(patched, plan, Replacement(maps=maps))
        assert rows_of(patched, 1, "output") == pytest.approx(entering + (stream - entering) @ expected, abs=2e-3)


def test_a_packed_original_that_skips_sublayers_takes_maps() -> None:
    original = skipping((1, "mlp"))
    plan = with_skips(packed_plan(LAYERS, [(2, "attention")], [(1, "mlp")], "linear"), original.config)
    assert plan.new_layers[1] == PlannedLayer("packed", (1, 2), mapped=("attention",))
    stream, entering = rows_of(original, 1, "output"), rows_of(original, 1, "input_layernorm")
    target = rows_of(original, 2, "post_attention_layernorm")
    maps = fit_maps(original, plan, TEXT)
    assert list(maps) == [(1, "attention")]
    expected = best_map(stream - entering, stream, target, STRENGTH)
    np.testing.assert_allclose(maps[1, "attention"], expected, atol=2e-4)


@pytest.mark.parametrize("architecture", every(PACKABLE))
def test_a_packed_patched_model_is_a_plain_checkpoint_nearer_to_the_original(architecture: str, tmp_path: Path) -> None:
    original, ids = tiny_model(architecture), token_ids()
    removed = [(1, "mlp"), (2, "attention"), (3, "attention"), (3, "mlp")]
    plain, patched = copy.deepcopy(original), copy.deepcopy(original)
    apply_plan(plain, packed_plan(LAYERS, removed), None)
    plan = packed_plan(LAYERS, removed, (), "linear")
    apply_plan(patched, plan, build_replacement(original, plan, TEXT))
    edited = logits(patched, ids)
    patched.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(stock_model(tmp_path), ids), edited, atol=1e-5, rtol=0)
    last = [rows_of(model, -1, "output") for model in (original, plain, patched)]
    assert ((last[2] - last[0]) ** 2).sum() < ((last[1] - last[0]) ** 2).sum()


@pytest.mark.parametrize("architecture", every(FOLDABLE))
def test_patched_model_is_a_plain_checkpoint_and_the_original_is_left_alone(architecture: str, tmp_path: Path) -> None:
    model, ids = tiny_model(architecture), token_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replacement = build_replacement(model, TWO_RUNS, TEXT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    change = apply_plan(model, TWO_RUNS, replacement)
    assert [(layer.kind, layer.originals) for layer in change.new_layers] == [
        ("patched", (0, 1)),
        ("patched", (2, 3, 4)),
    ]
    edited = logits(model, ids)
    model.save_pretrained(tmp_path)
    stock = stock_model(tmp_path)
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load(str(tmp_path)), ids), edited, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_endless_strength_is_plain_removal(architecture: str) -> None:
    removed, patched, original = (tiny_model(architecture) for _ in range(3))
    apply_plan(removed, Plan(LAYERS, TWO_RUNS.removed), None)
    maps = fit_maps(original, TWO_RUNS, TEXT, strength=1e12)
    for transform in maps.values():
        np.testing.assert_allclose(transform, np.eye(32), atol=1e-9)
    apply_plan(patched, TWO_RUNS, Replacement(maps=maps))
    torch.testing.assert_close(logits(patched, TEXT.ids), logits(removed, TEXT.ids), atol=1e-5, rtol=0)
    weak = fit_maps(original, TWO_RUNS, TEXT, strength=1e-6)[0, "mlp"]
    assert (weak - torch.eye(32)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", every(NORM_AFTER))
def test_a_norm_behind_the_mlp_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(StreamlineError, match=f"architecture '{architecture}' has a norm between its MLP and"):
        check_linear(tiny_model(architecture).config)
    with pytest.raises(StreamlineError, match="use replacement none or layer"):
        build_replacement(tiny_model(architecture), ONE_RUN, TEXT)


def test_other_impossible_maps_are_refused() -> None:
    with pytest.raises(StreamlineError, match="architecture 'opt' has a norm"):
        check_linear(tiny_model("opt", do_layer_norm_before=False).config)
    with pytest.raises(StreamlineError, match="keep layer 0"):
        fit_maps(tiny_model(), Plan(LAYERS, (0, 1), "linear"), TEXT)
    with pytest.raises(StreamlineError, match="has no calibration text"):
        build_replacement(tiny_model(), ONE_RUN)
    silent = tiny_model()
    nn.init.zeros_(silent.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(StreamlineError, match="the mlp of layer 1 adds only zeros.*; keep what comes after"):
        fit_maps(silent, ONE_RUN, TEXT)


def test_on_the_reference_model_it_beats_plain_removal_on_unseen_text() -> None:
    source = ModelSource(REFERENCE)
    model, tokenizer = load_stock(source, torch.float32), load_tokenizer(source)
    parts = ("stdlib:calibration", "stdlib:eval")
    calibration, unseen = (read_windows(part, tokenizer, 32, 128, 0, VOCABULARY) for part in parts)
    recipe = make_recipe({"method": "llm-streamline", "remove": 4, "replacement": "linear"})
    plan = LLMStreamline().plan(recipe, MethodInputs(model, calibration, measure_scores(model, calibration)))
    removed, patched = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(removed, Plan(plan.total, plan.removed), None)
    apply_plan(patched, plan, build_replacement(patched, plan, calibration))
    assert len(decoder_layers(patched, architecture_of(patched.config))) == 12

    def loss(candidate: PreTrainedModel) -> float:
        with torch.no_grad():
            return float(candidate(unseen.ids, labels=unseen.ids).loss)

    dense, without, with_map = loss(model), loss(removed), loss(patched)
    assert dense < with_map < without - 0.02
