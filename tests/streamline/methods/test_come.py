"""CoMe and its variants: their plans, their merged models, and the models that they refuse."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from behaviour import stock_model
from optimum.streamline.editing.apply import EditInputs, apply_plan, planned_config
from optimum.streamline.editing.merging import merge_layers, replace_pair
from optimum.streamline.editing.plan import Merge, Plan, PlannedLayer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.come import CoMe
from optimum.streamline.methods.come_p import CoMeP
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.channels import Channels
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.channel_sensitivity import measure_channels
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, UNMERGEABLE, every, tiny_model, token_ids

MERGEABLE = sorted(set(ARCHITECTURES) - UNMERGEABLE)
NAMES = ("average", "come", "come-mp", "come-p", "come-sp")
FULL = {"layer_types": ["full_attention"] * LAYERS}
WINDOWS = Windows(token_ids(6, 16, seed=9), "random")


def model_of(architecture: str, seed: int = 0) -> PreTrainedModel:
    return tiny_model(architecture, seed, **(FULL if architecture == "qwen2" else {}))


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return decoder_layers(model, architecture_of(model.config))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS.ids, use_cache=False).logits


def loss(model: PreTrainedModel) -> float:
    log = logits(model).double().log_softmax(-1)[:, :-1]
    return -float(log.gather(-1, WINDOWS.ids[:, 1:, None]).mean())


def recipe_of(method: str, remove: int) -> Recipe:
    return make_recipe({"method": method, "remove": remove})


def planned(method: str, model: PreTrainedModel, remove: int) -> Plan:
    recipe = recipe_of(method, remove)
    METHODS[method].check(recipe, model.config)
    return METHODS[method].plan(recipe, MethodInputs(model, WINDOWS, measure_scores(model, WINDOWS)))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_every_step_is_planned_on_the_model_the_last_one_left(architecture: str) -> None:
    merges = planned("come", model_of(architecture), 3).merges
    model = model_of(architecture)
    for merge in merges:
        scores, channels = measure_channels(model, WINDOWS)
        depth = model.config.num_hidden_layers
        angles = {first: scores.last_angle[first][first + 2] for first in range(depth - 1)}
        assert merge.first == min(angles, key=angles.__getitem__)
        influence = [1 - scores.similarity[i][i + 1] for i in (merge.first, merge.first + 1)]
        ratios = [part / sum(influence) for part in influence]
        for kind, share in (("attention", merge.attention), ("mlp", merge.mlp)):
            count = len(channels[0][kind])
            most = ratios.index(max(ratios))
            kept = [int(ratio * count) for ratio in ratios]
            kept[most] = count - kept[1 - most]
            assert share == kept[0] / count
            assert round(share * count) == kept[0]
        replace_pair(model, merge.first, merge_layers(model, merge, channels))
    assert len(layers_of(model)) == LAYERS - 3


class Watched(CoMe):
    """Keeps what it merges."""

    def __init__(self) -> None:
        self.made: list[dict[str, torch.Tensor]] = []

    def merged(self, model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
        layer = super().merged(model, merge, channels)
        self.made.append(state(layer))
        return layer


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_what_is_planned_is_what_is_made(architecture: str) -> None:
    model, method = model_of(architecture), Watched()
    plan = method.plan(recipe_of("come", 3), MethodInputs(model, WINDOWS, measure_scores(model, WINDOWS)))
    expected = planned_config(model.config, plan).to_dict()
    change = method.apply(model, plan, EditInputs(WINDOWS))
    assert (change.new_layers, change.skipped) == (plan.new_layers, {})
    assert model.config.to_dict() == expected
    assert len(method.made) == 6
    for ours, theirs in zip(method.made[:3], method.made[3:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["average", "come", "come-p"])
def test_planning_leaves_the_model(method: str) -> None:
    model = model_of("llama")
    before, config, modules = state(model), model.config.to_dict(), list(model.modules())
    parameters = list(model.parameters())
    planned(method, model, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert all(ours is theirs for ours, theirs in zip(modules, model.modules(), strict=True))
    assert all(ours is theirs for ours, theirs in zip(parameters, model.parameters(), strict=True))
    assert [layer.self_attn.layer_idx for layer in layers_of(model)] == list(range(LAYERS))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_merges_see_what_was_healed_in_between() -> None:
    model = model_of("llama")
    plan = Plan(LAYERS, (2, 3), merges=(Merge(1, 0.5, 0.5), Merge(1, 0.5, 0.5)))
    seen: list[tuple[PlannedLayer, ...]] = []

    def heal(new_layers: tuple[PlannedLayer, ...]) -> None:
        seen.append(new_layers)
        with torch.no_grad():
            layers_of(model)[1].mlp.down_proj.weight[:, :24] = 0

    CoMe().apply(model, plan, EditInputs(WINDOWS, after_merge=heal))
    kept, merged = PlannedLayer("kept", (0,)), PlannedLayer("merged", (1, 2))
    assert seen == [(kept, merged, PlannedLayer("kept", (3,)), PlannedLayer("kept", (4,)))]
    # The second merge takes the 24 neurons that healing left alive, and none that it silenced.
    assert bool((layers_of(model)[1].mlp.down_proj.weight[:, :24].abs().sum(0) > 0).all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(2))
def test_come_p_takes_the_ratio_of_lowest_loss(architecture: str, seed: int) -> None:
    model = model_of(architecture, seed)
    (merge,) = planned("come-p", model, 1).merges
    (by_influence,) = planned("come", model, 1).merges
    assert merge.first == by_influence.first
    _, channels = measure_channels(model, WINDOWS)
    heads, neurons = (len(channels[0][kind]) for kind in ("attention", "mlp"))
    losses: dict[tuple[float, float], float] = {}
    for step in range(21):
        # int(r N) from the layer of the smaller part, in whole numbers; at a half, from the second.
        kept = [min(step, 20 - step) * count // 20 for count in (heads, neurons)]
        kept = kept if step < 10 else [heads - kept[0], neurons - kept[1]]
        merged = copy.deepcopy(model)
        tried = Merge(merge.first, kept[0] / heads, kept[1] / neurons)
        replace_pair(merged, merge.first, merge_layers(merged, tried, channels))
        losses[tried.attention, tried.mlp] = loss(merged)
    assert losses[merge.attention, merge.mlp] == pytest.approx(min(losses.values()), abs=1e-7)
    applied = copy.deepcopy(model)
    CoMeP().apply(applied, Plan(LAYERS, (merge.first + 1,), merges=(merge,)), EditInputs(WINDOWS))
    for layer in (merge.first, merge.first + 1):
        removed = copy.deepcopy(model)
        apply_plan(removed, Plan(LAYERS, (layer,)), None)
        assert loss(applied) <= loss(removed) + 1e-6


def test_average_weighs_by_influence() -> None:
    model = model_of("llama")
    (merge,) = planned("average", model, 1).merges
    (by_channel,) = planned("come", model, 1).merges
    influence = measure_scores(model, WINDOWS).block_influence
    share = influence[merge.first] / (influence[merge.first] + influence[merge.first + 1])
    assert merge.first == by_channel.first
    assert merge.attention == merge.mlp == pytest.approx(share, rel=1e-12)
    expected = [
        layer.mlp.down_proj.weight.detach().clone() for layer in layers_of(model)[merge.first : merge.first + 2]
    ]
    METHODS["average"].apply(model, Plan(LAYERS, (merge.first + 1,), merges=(merge,)), EditInputs(WINDOWS))
    found = layers_of(model)[merge.first].mlp.down_proj.weight
    torch.testing.assert_close(found, share * expected[0] + (1 - share) * expected[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["come", "average"])
@pytest.mark.parametrize("architecture", every(MERGEABLE))
def test_a_merged_model_is_one_that_stock_transformers_loads(architecture: str, method: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    plan = planned(method, model, 1)
    METHODS[method].apply(model, plan, EditInputs(WINDOWS))
    model.save_pretrained(tmp_path)
    stock = stock_model(tmp_path)
    assert stock.config.num_hidden_layers == LAYERS - 1
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)
    ids = WINDOWS.ids[:1]
    generated = [stock.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*generated)


def test_a_merged_model_can_be_trained() -> None:
    model = model_of("llama")
    METHODS["come"].apply(model, planned("come", model, 2), EditInputs(WINDOWS))
    model(WINDOWS.ids, labels=WINDOWS.ids).loss.backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "fields", "why"),
    [
        ("mixtral", {}, "mixtral model cannot be merged, its MLPs are mixtures of experts"),
        ("qwen3_moe", {}, "qwen3_moe model cannot be merged, its MLPs are mixtures of experts"),
        ("gemma2", {}, "gemma2 model cannot be merged, its norms come after"),
        ("olmo2", {}, "olmo2 model cannot be merged, its norms come after"),
        ("opt", {"do_layer_norm_before": False}, "opt model cannot be merged, its norms come after"),
        ("opt", {"enable_bias": False}, "config.enable_bias is false"),
        ("gpt_neox", {"attention_bias": False}, "config.attention_bias is false"),
        ("starcoder2", {"use_bias": False}, "config.use_bias is false"),
        (
            "llama",
            {"per_layer_config": {2: {"skip": ["attention"]}}},
            "config.per_layer_config makes its layers differ",
        ),
        ("llama", {"bare_layers": {"2": "ffn"}}, "has bare layers .*, which cannot be pruned"),
        ("qwen2", {}, r"remove 1: method .* the same kind of attention, .* at most 0 layers of this model;"),
    ],
)
@pytest.mark.parametrize("method", NAMES)
def test_models_without_channels_to_merge_are_refused_by_name(
    method: str, architecture: str, fields: dict[str, Any], why: str
) -> None:
    config = copy.deepcopy(tiny_model(architecture).config)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(StreamlineError, match=why) as refused:
        METHODS[method].check(recipe_of(method, 1), config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", NAMES)
def test_only_as_many_merges_as_one_kind_of_attention_allows(method: str) -> None:
    config = tiny_model("smollm3", no_rope_layers=[1, 1, 0, 0, 0]).config
    METHODS[method].check(recipe_of(method, 3), config)
    with pytest.raises(StreamlineError, match="at most 3"):
        METHODS[method].check(recipe_of(method, 4), config)


@pytest.mark.parametrize("method", NAMES)
def test_nothing_stands_in_for_a_merged_layer(method: str) -> None:
    recipe = make_recipe({"method": method, "remove": 1, "replacement": "linear"})
    with pytest.raises(StreamlineError, match="replacement 'linear'"):
        METHODS[method].check(recipe, tiny_model("llama").config)


def test_kinds_of_attention_stay_with_their_layers() -> None:
    model = tiny_model("smollm3", no_rope_layers=[1, 1, 0, 0, 0])
    plan = planned("come", model, 3)
    METHODS["come"].apply(model, plan, EditInputs(WINDOWS))
    assert [layer.originals for layer in plan.new_layers] == [(0, 1), (2, 3, 4)]
    assert model.config.no_rope_layers == [1, 0]
    assert [bool(layer.self_attn.use_rope) for layer in layers_of(model)] == [True, False]


@pytest.mark.parametrize(("method", "other"), [("come-sp", "come"), ("come-mp", "come")])
def test_variants_by_healing_choose_and_merge_as_come(method: str, other: str) -> None:
    model = model_of("llama")
    assert planned(method, model, 2) == planned(other, model, 2)
    assert recipe_of(method, 2).resolved_trainings == ("distill",)
