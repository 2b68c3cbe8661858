"""The layers that each method chooses, compared with a direct implementation of the paper's rule."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.names import METHOD_SUMMARIES
from optimum.streamline.methods.registry import BUILT_IN, METHODS, method_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import Scores
from tiny import tiny_model

LAYERS = 7


def planned(method: str, scores: Scores, **fields: object) -> Plan:
    """What a method that goes by scores alone plans."""
    return METHODS[method].plan(make_recipe({"method": method, **fields}), MethodInputs(None, None, scores))


@pytest.fixture(params=range(5))
def scores(request: pytest.FixtureRequest) -> Scores:
    draw = random.Random(request.param)
    matrix = [[1.0] * (LAYERS + 1) for _ in range(LAYERS + 1)]
    for i, j in itertools.combinations(range(LAYERS + 1), 2):
        matrix[i][j] = matrix[j][i] = draw.random()
    return Scores(tuple(map(tuple, matrix)))


@pytest.mark.parametrize("count", range(1, LAYERS))
def test_shortgpt_takes_the_lowest_influence(scores: Scores, count: int) -> None:
    removed = planned("shortgpt", scores, remove=count).removed
    influence = {layer: 1 - scores.similarity[layer][layer + 1] for layer in range(LAYERS)}
    assert len(removed) == count
    assert max(influence[layer] for layer in removed) <= min(
        influence[layer] for layer in influence if layer not in removed
    )


@pytest.mark.parametrize("replacement", ["none", "layer", "mlp"])
@pytest.mark.parametrize("count", range(1, LAYERS))
def test_llm_streamline_takes_the_most_similar_block(scores: Scores, count: int, replacement: str) -> None:
    plan = planned("llm-streamline", scores, remove=count, replacement=replacement)
    length = count if replacement == "none" else count + 1
    best = max((scores.similarity[j][j + length], -j) for j in range(LAYERS - length + 1))
    assert plan.removed == tuple(range(-best[1], -best[1] + length))
    assert len(plan.new_layers) == LAYERS - count


@pytest.mark.parametrize("replacement", ["mlp", "ffn", "swiglu"])
@pytest.mark.parametrize(
    "fields", [{"layers": "0-4"}, {"method": "llm-streamline", "remove": 4}, {"method": "gromov", "remove": 4}]
)
def test_an_attention_has_to_stay(fields: dict[str, object], replacement: str) -> None:
    config = tiny_model().config
    with pytest.raises(StreamlineError, match=f"replacement '{replacement}': no layer with attention would be left"):
        method_of(make_recipe({**fields, "replacement": replacement}), config)
    method_of(make_recipe({**fields, "replacement": "layer"}), config)


@pytest.mark.parametrize(
    ("method", "replacement", "said"),
    [
        (
            "auto",
            "linear",
            "method auto supports none; linear needs another method, such as shortgpt",
        ),
        (
            "come",
            "linear",
            "method come supports none; linear needs another method, such as shortgpt",
        ),
        (
            "auto",
            "layer",
            "method auto supports none; layer needs a method that removes one block, such as llm-streamline",
        ),
        (
            "sleb",
            "ffn",
            "method sleb supports none or linear or corrected; ffn needs a method that removes one block, such as "
            "llm-streamline",
        ),
    ],
)
def test_a_replacement_without_a_place_is_refused(method: str, replacement: str, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        method_of(make_recipe({"method": method, "remove": 1, "replacement": replacement}), tiny_model().config)


def test_whose_choice_it_is_is_said() -> None:
    with pytest.raises(
        StreamlineError, match="does not have this option; shifted, shortened-ppl, shortened-taylor, sleb have"
    ):
        method_of(make_recipe({"method": "shortgpt", "remove": 1, "protect": "1,1"}), tiny_model().config)


def test_ties_go_to_the_first() -> None:
    flat = Scores(tuple((0.5,) * (LAYERS + 1) for _ in range(LAYERS + 1)))
    assert planned("shortgpt", flat, remove=2).removed == (0, 1)
    assert planned("llm-streamline", flat, remove=3, replacement="none").removed == (0, 1, 2)


def test_explicit_takes_what_it_is_told(scores: Scores) -> None:
    assert planned("explicit", scores, layers="1,4-5").removed == (1, 4, 5)


def test_places_name_the_originals() -> None:
    plan = Plan(6, (2, 3, 4), "mlp")
    assert [(layer.kind, layer.originals) for layer in plan.new_layers] == [
        ("kept", (0,)),
        ("kept", (1,)),
        ("mlp", (2, 3, 4)),
        ("kept", (5,)),
    ]
    zeros = "1 of them with zeros for a removed attention or MLP"
    assert plan.describe() == f"replace layers 2-4 by one mlp: 6 layers become 4, {zeros}"
    assert replace(plan, replacement="layer").describe() == "replace layers 2-4 by one layer: 6 layers become 4"
    assert Plan(6, (1, 3, 4)).describe() == "remove layers 1, 3-4: 6 layers become 3"


def test_the_help_lists_every_method() -> None:
    assert METHOD_SUMMARIES.keys() == BUILT_IN.keys()
