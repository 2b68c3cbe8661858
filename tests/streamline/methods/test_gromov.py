"""The block that `gromov` chooses, compared with distances computed in float64, window by window."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import Scores, measure_scores
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

DATA = Windows(token_ids(7, 12), "random")


def distance(model: PreTrainedModel, first: int, last: int) -> float:
    """Mean of arccos(cos(h_first, h_last)) / pi on the last token, one window at a time."""
    stream: dict[int, torch.Tensor] = {}
    layers, total = model.model.layers, 0.0

    def keep(place: int, hidden: torch.Tensor) -> None:
        stream[place] = hidden[0, -1].double()

    hooks = [layers[0].register_forward_pre_hook(lambda _, args: keep(0, args[0]))]
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(lambda _, args, output, place=number + 1: keep(place, output)))
    with torch.no_grad():
        for window in DATA.ids:
            model(window[None], use_cache=False)
            a, b = stream[first].tolist(), stream[last].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            total += math.acos(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))) / math.pi
    for hook in hooks:
        hook.remove()
    return total / len(DATA.ids)


@pytest.mark.parametrize(("architecture", "seed"), [("llama", 0), ("llama", 1), ("qwen2", 2), ("qwen3", 3)])
def test_the_block_is_the_one_of_least_distance(architecture: str, seed: int) -> None:
    model = tiny_model(architecture, seed)
    scores = measure_scores(model, DATA)
    for length in range(1, LAYERS):
        expected = [distance(model, first, first + length) for first in range(LAYERS - length + 1)]
        assert scores.block_angle(length) == pytest.approx(expected, abs=1e-7)
        first = expected.index(min(expected))
        plan = METHODS["gromov"].plan(
            make_recipe({"method": "gromov", "remove": length}), MethodInputs(model, DATA, scores)
        )
        assert plan.removed == tuple(range(first, first + length))


def test_it_is_not_llm_streamlines_measure() -> None:
    # All tokens against the last one alone: some random model tells them apart.
    choices = set()
    for seed in range(6):
        model = tiny_model(seed=seed)
        inputs = MethodInputs(model, DATA, measure_scores(model, DATA))
        for count in (1, 2, 3):
            recipe = make_recipe({"remove": count})
            choices.add(tuple(METHODS[name].plan(recipe, inputs).removed for name in ("gromov", "llm-streamline")))
    assert any(mine != theirs for mine, theirs in choices)


def angles(*steps: float) -> Scores:
    """A stream that turns by `steps`, all in one direction."""
    new_layers = [sum(steps[:depth]) for depth in range(len(steps) + 1)]
    angle = tuple(tuple(abs(a - b) for b in new_layers) for a in new_layers)
    return Scores(tuple((0.0,) * len(new_layers) for _ in new_layers), angle)


@pytest.mark.parametrize(
    ("replacement", "removed"), [("none", (0, 1)), ("linear", (1, 2)), *((kind, (0, 1, 2)) for kind in TRAINED)]
)
def test_a_replacement_has_its_place(replacement: str, removed: tuple[int, ...]) -> None:
    scores = angles(0.01, 0.01, 0.015, 0.02, 0.02, 0.2, 0.01, 0.3)
    recipe = make_recipe({"method": "gromov", "remove": 2, "replacement": replacement})
    method_of(recipe, tiny_model(num_hidden_layers=8).config)
    plan = METHODS["gromov"].plan(recipe, MethodInputs(None, None, scores))
    assert plan.removed == removed
    assert len(plan.new_layers) == 8 - 2


def test_ties_go_to_the_first_block() -> None:
    recipe = make_recipe({"method": "gromov", "remove": 2})
    assert METHODS["gromov"].plan(recipe, MethodInputs(None, None, angles(*[0.0] * 6))).removed == (0, 1)


def test_layers_that_change_nothing_are_at_distance_zero() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    scores = measure_scores(model, Windows(token_ids(64, 5), "random"))
    # Unclamped, a cosine of 1 and a bit has no arccos.
    assert all(0 <= value < 1e-7 for row in scores.last_angle for value in row)
