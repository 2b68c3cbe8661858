"""Packing: the same logits in fewer layers, for every architecture, in stock transformers, with and without a cache."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from behaviour import greedy, logits
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.editing.apply import apply_plan, planned_config, renamed_modules
from optimum.streamline.editing.packing import layer_count, new_zeros, packed, sublayers_left
from optimum.streamline.editing.plan import Plan, PlannedLayer, packed_plan
from optimum.streamline.models.architectures import ARCHITECTURES, can_pack, decoder_layers
from optimum.streamline.models.linear_modules import linear_modules_of
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, mark_skipped, replace_sublayer, skipped_of
from tiny import LAYERS, every, tiny_model, token_ids

A, M = ATTENTION, MLP
PACKABLE = [name for name in sorted(ARCHITECTURES) if can_pack(tiny_model(name).config)]
# Removed sublayers, and the layers that the others make. Halves of other layers meet in the first two. In the last two
# some find no partner.
REMOVED = {
    "shifted": (((1, M), (2, A)), ["0A 0M", "1A 2M", "3A 3M", "4A 4M"]),
    "around a removed layer": (((0, M), (1, A), (1, M), (2, A), (3, M), (4, A)), ["0A 2M", "3A 4M"]),
    "two attentions": (((1, M),), ["0A 0M", "1A", "2A 2M", "3A 3M", "4A 4M"]),
    "an attention first and an MLP last": (((0, M), (1, M), (2, M), (3, A), (4, A)), ["0A", "1A", "2A 3M", "4M"]),
}
Removed = tuple[tuple[int, str], ...]


def zeroed(model: PreTrainedModel, removed: Removed) -> PreTrainedModel:
    """The model with every removed sublayer replaced by one that adds nothing, each layer in its own place."""
    edited = copy.deepcopy(model)
    row = ARCHITECTURES[model.config.model_type]
    for layer, kind in removed:
        replace_sublayer(decoder_layers(edited, row)[layer], row, kind)
    return edited


def made(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    edited = copy.deepcopy(model)
    apply_plan(edited, plan, None)
    return edited


def test_the_architectures_that_cannot_be_packed_are_known() -> None:
    assert set(ARCHITECTURES) - set(PACKABLE) == {"gpt_neox"}
    assert not can_pack(tiny_model("opt", do_layer_norm_before=False).config)
    assert can_pack(tiny_model("gpt_neox", use_parallel_residual=False).config)


@pytest.mark.parametrize("case", REMOVED)
def test_an_attention_and_the_mlp_after_it_make_a_layer(case: str) -> None:
    removed, expected = REMOVED[case]
    layers = packed(sublayers_left(LAYERS, removed))
    assert [" ".join(f"{layer}{kind[0].upper()}" for layer, kind in each) for each in layers] == expected


def test_no_arrangement_has_fewer_layers() -> None:
    draw = random.Random(0)
    everything = sublayers_left(6, ())
    for _ in range(300):
        row = sublayers_left(6, draw.sample(everything, draw.randint(0, 11)))
        # Each sublayer starts a layer, or is an MLP that joins the attention before it.
        joins = [one[1] == A and other[1] == M for one, other in itertools.pairwise(row)]
        assert len(packed(row)) == len(row) - sum(joins)
        assert [sublayer for layer in packed(row) for sublayer in layer] == list(row)
        assert layer_count(row) == len(packed(row))
        assert new_zeros(row) == len(packed(row)) - sum(joins)


def test_a_layer_that_had_zeros_needs_no_new_ones() -> None:
    row = sublayers_left(LAYERS, ((1, M), (3, A)))
    assert packed(row)[1] == ((1, A),)
    assert packed(row)[3] == ((3, M),)
    assert (new_zeros(row), new_zeros(row, {(1, M)}), new_zeros(row, {(1, M), (3, A)})) == (2, 1, 0)


@pytest.mark.parametrize("case", REMOVED)
@pytest.mark.parametrize("architecture", every(PACKABLE))
def test_it_computes_what_the_model_with_zeros_computes(architecture: str, case: str, tmp_path: Path) -> None:
    removed, layers = REMOVED[case]
    model, ids = tiny_model(architecture), token_ids()
    expected = logits(zeroed(model, removed), ids)
    edited = made(model, packed_plan(LAYERS, removed))
    assert edited.config.num_hidden_layers == len(layers)
    torch.testing.assert_close(logits(edited, ids), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert planned_config(model.config, packed_plan(LAYERS, removed)).to_dict() == edited.config.to_dict()

    edited.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert greedy(stock, use_cache=True) == greedy(stock, use_cache=False)
    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_nothing_is_left_dead_where_all_find_a_partner() -> None:
    removed, _ = REMOVED["around a removed layer"]
    plan = packed_plan(LAYERS, removed)
    edited = made(tiny_model(), plan)
    assert skipped_of(edited.config) == frozenset()
    assert plan.removed == (1,)
    assert plan.new_layers == (PlannedLayer("packed", (0, 2)), PlannedLayer("packed", (3, 4)))
    assert plan.depths == (3, LAYERS)
    assert plan.describe() == (
        "remove layers 1; remove the attention of layers 2, 4; remove the mlp of layers 0, 3: 5 layers become 2"
    )


def test_what_finds_no_partner_keeps_its_layer_and_is_named() -> None:
    removed, _ = REMOVED["an attention first and an MLP last"]
    edited = made(tiny_model(), packed_plan(LAYERS, removed))
    assert skipped_of(edited.config) == {(0, M), (1, M), (3, A)}
    for layer, kind in skipped_of(edited.config):
        row = ARCHITECTURES["llama"]
        path = row.attention_out if kind == A else row.mlp_out[0]
        assert not decoder_layers(edited, row)[layer].get_parameter(f"{path}.weight").any()


def test_a_model_with_zeros_is_packed_anew() -> None:
    model = tiny_model()
    expected = logits(zeroed(model, ((0, M), (1, A))), token_ids())
    mark_skipped(model.config, {0: [M], 1: [A]})
    plan = packed_plan(LAYERS, (), skipped_of(model.config))
    assert plan.describe() == "pack what earlier edits left: 5 layers become 4"
    edited = made(model, plan)
    assert (edited.config.num_hidden_layers, skipped_of(edited.config)) == (LAYERS - 1, frozenset())
    torch.testing.assert_close(logits(edited, token_ids()), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_plan_that_forgets_the_zeros_of_the_model_is_a_defect() -> None:
    model = tiny_model()
    mark_skipped(model.config, {0: [M], 1: [A]})
    with pytest.raises(ValueError, match=r"the model skips \[\(0, 'mlp'\), \(1, 'attention'\)\]"):
        made(model, packed_plan(LAYERS, [(2, A), (2, M)]))


def test_only_what_is_removed_now_is_said_to_be() -> None:
    plan = packed_plan(LAYERS, [(1, M), (2, A)], already_skipped=[(3, M)])
    assert plan.describe() == (
        "remove the attention of layers 2; remove the mlp of layers 1: 5 layers become 4, "
        "1 of them with zeros for a removed attention or MLP"
    )


def test_settings_follow_the_part_they_speak_of() -> None:
    config = tiny_model("qwen2").config
    config.max_window_layers = 2
    config.per_layer_config = {
        1: {"sliding_window": 3, "intermediate_size": 40},
        2: {"sliding_window": 5, "intermediate_size": 56},
    }
    kinds = list(config.layer_types)
    removed, _ = REMOVED["shifted"]  # the second layer has the attention of layer 1 and the MLP of layer 2
    planned = planned_config(config, packed_plan(LAYERS, removed))
    assert planned.to_dict()["per_layer_config"] == {"1": {"sliding_window": 3, "intermediate_size": 56}}
    assert planned.layer_types == [kinds[layer] for layer in (0, 1, 3, 4)]
    assert planned.max_window_layers == 2  # windows are of attentions: of layers 0 and 1
    of_experts = tiny_model("qwen3_moe").config
    of_experts.mlp_only_layers = [2, 3]
    assert planned_config(of_experts, packed_plan(LAYERS, removed)).mlp_only_layers == [1, 2]


def test_modules_are_named_by_the_part_they_belong_to() -> None:
    removed, _ = REMOVED["shifted"]
    model = tiny_model()
    new_layers = packed_plan(LAYERS, removed).new_layers
    renamed = dict(renamed_modules(linear_modules_of(model), new_layers, model.config))
    assert renamed["model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn.q_proj"
    assert renamed["model.layers.1.mlp.up_proj"] == "model.layers.2.mlp.up_proj"
    assert renamed["model.layers.2.mlp.up_proj"] == "model.layers.3.mlp.up_proj"
    assert len(renamed) == (LAYERS - 1) * 7 + 1
    edited = made(model, packed_plan(LAYERS, removed))
    old, new = dict(model.named_modules()), dict(edited.named_modules())
    for name, before in renamed.items():
        assert torch.equal(new[name].weight, old[before].weight), name
