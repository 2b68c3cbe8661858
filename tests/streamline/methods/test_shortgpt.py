"""Iterative ShortGPT, compared with a copy whose layers are deleted one by one and measured token by token."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.models.architectures import ARCHITECTURES, decoder_layers
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

DATA = Windows(token_ids(3, 12), "random")
MODELS = [("llama", 1), ("llama", 2), ("qwen2", 0), ("qwen3", 0)]


def inputs_of(model: PreTrainedModel) -> MethodInputs:
    return MethodInputs(model, DATA, measure_scores(model, DATA))


def chosen(inputs: MethodInputs, count: int, **fields: object) -> tuple[int, ...]:
    recipe = make_recipe({"method": "shortgpt", "remove": count, **fields})
    return METHODS["shortgpt"].plan(recipe, inputs).removed


def influence_of(model: PreTrainedModel) -> list[float]:
    """BI of every layer, each token's cosine on its own."""
    stream: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: stream.append(args[0].double()))]
    hooks += [layer.register_forward_hook(lambda _, args, output: stream.append(output.double())) for layer in layers]
    with torch.no_grad():
        model(DATA.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for a, b in itertools.pairwise(stream):
        pairs = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
        found.append(1 - sum(float(x @ y / (x.norm() * y.norm())) for x, y in pairs) / DATA.ids.numel())
    return found


def by_hand(original: PreTrainedModel, count: int) -> tuple[int, ...]:
    model, kept = copy.deepcopy(original), list(range(LAYERS))
    for _ in range(count):
        influence = influence_of(model)
        place = influence.index(min(influence))
        del kept[place]
        model.model.layers = nn.ModuleList([copy.deepcopy(original.model.layers[layer]) for layer in kept])
        model.config.num_hidden_layers = len(kept)
        if getattr(original.config, "layer_types", None):
            model.config.layer_types = [original.config.layer_types[layer] for layer in kept]
    return tuple(layer for layer in range(LAYERS) if layer not in kept)


@pytest.mark.parametrize(("architecture", "seed"), MODELS)
def test_one_by_one_is_what_one_does_by_hand(architecture: str, seed: int) -> None:
    model = tiny_model(architecture, seed)
    inputs = inputs_of(model)
    for count in range(1, LAYERS):
        assert chosen(inputs, count, iterative=True) == by_hand(model, count)


def test_one_by_one_is_another_choice_than_at_once() -> None:
    inputs = [inputs_of(tiny_model(*each)) for each in MODELS]
    assert any(chosen(each, n) != chosen(each, n, iterative=True) for each in inputs for n in range(2, LAYERS))
    assert all(chosen(each, 1) == chosen(each, 1, iterative=True) for each in inputs)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen2", "qwen3_moe", "smollm3"])
def test_the_model_is_left_as_it_was(architecture: str) -> None:
    model = tiny_model(architecture)
    model.config.per_layer_config = {2: {"skip": ["attention"]}}
    untouched, numbers = copy.deepcopy(model), layer_numbers(model)
    modules = list(model.modules())
    chosen(inputs_of(model), 3, iterative=True)
    assert_same(model, untouched)
    assert layer_numbers(model) == numbers
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_the_model_is_left_as_it_was_when_measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    inputs, untouched, numbers = inputs_of(model), copy.deepcopy(model), layer_numbers(model)
    seen: list[PreTrainedModel] = []

    def fail(shortened: PreTrainedModel, _: Windows) -> None:
        seen.append(shortened)
        raise StreamlineError("no")

    monkeypatch.setattr("optimum.streamline.methods.shortgpt.measure_scores", fail)
    with pytest.raises(StreamlineError, match="no"):
        chosen(inputs, 3, iterative=True)
    assert seen == [model]
    assert_same(model, untouched)
    assert layer_numbers(model) == numbers


def layer_numbers(model: PreTrainedModel) -> list[object]:
    layers = decoder_layers(model, ARCHITECTURES[model.config.model_type])
    return [getattr(module, "layer_idx", None) for module in layers.modules()]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert model.config.to_dict() == other.config.to_dict()
    assert vars(model.config).keys() == vars(other.config).keys()
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(model(DATA.ids).logits, other(DATA.ids).logits)
    written = [each.generate(DATA.ids[:1, :4], min_new_tokens=3, max_new_tokens=3) for each in (model, other)]
    assert torch.equal(*written)


def test_ties_go_to_the_first_layer() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert chosen(inputs_of(model), 3, iterative=True) == (0, 1, 2)
    # There is nothing before layer 0 to fold a map into.
    assert chosen(inputs_of(model), 3, iterative=True, replacement="linear") == (1, 2, 3)
    assert chosen(inputs_of(model), 3, replacement="linear") == (1, 2, 3)


def test_only_shortgpt_goes_one_by_one() -> None:
    recipe = make_recipe({"method": "gromov", "remove": 1, "iterative": True})
    with pytest.raises(StreamlineError, match=r"iterative True: method gromov does not have this option; .*shortgpt"):
        method_of(recipe, tiny_model().config)
    method_of(make_recipe({"method": "shortgpt", "remove": 1, "iterative": True}), tiny_model().config)
