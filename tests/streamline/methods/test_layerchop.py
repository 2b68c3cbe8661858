"""LayerChop's patterns: tables made by hand, and properties for every number of layers."""

from __future__ import annotations

import itertools

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.layerchop import PATTERNS
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import Scores
from tiny import tiny_model

TWELVE_TO_SIX = {
    "max-gap": [0, 2, 4, 7, 9, 11],
    "input": [0, 7, 8, 9, 10, 11],
    "output": [0, 1, 2, 3, 4, 11],
    "middle": [0, 1, 2, 9, 10, 11],
    "both": [0, 4, 5, 6, 7, 11],
}
TWENTY_FOUR_TO_TWELVE = {
    "max-gap": [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23],
    "input": [0, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
    "output": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 23],
    "middle": [0, 1, 2, 3, 4, 5, 18, 19, 20, 21, 22, 23],
    "both": [0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 23],
}
FIVE_TO_THREE = {
    "max-gap": [0, 2, 4],
    "input": [0, 3, 4],
    "output": [0, 1, 4],
    "middle": [0, 1, 4],
    "both": [0, 2, 4],
}
SEVEN_TO_FOUR = {
    "max-gap": [0, 2, 4, 6],
    "input": [0, 4, 5, 6],
    "output": [0, 1, 2, 6],
    "middle": [0, 1, 5, 6],
    "both": [0, 2, 3, 6],
}
SIX_TO_FIVE = {
    "max-gap": [0, 1, 3, 4, 5],  # 0, 1.25, 2.5, 3.75, 5: halves up
    "input": [0, 2, 3, 4, 5],
    "output": [0, 1, 2, 3, 5],
    "middle": [0, 1, 2, 4, 5],
    "both": [0, 1, 2, 3, 5],
}
TABLES = [(12, TWELVE_TO_SIX), (24, TWENTY_FOUR_TO_TWELVE), (5, FIVE_TO_THREE), (7, SEVEN_TO_FOUR), (6, SIX_TO_FIVE)]
CASES = [(total, pattern, kept) for total, table in TABLES for pattern, kept in table.items()]


def kept_of(total: int, remove: int | str, pattern: str | None) -> list[int]:
    recipe = make_recipe({"method": "layerchop", "remove": remove, "pattern": pattern})
    blank = tuple((0.0,) * (total + 1) for _ in range(total + 1))
    plan = METHODS["layerchop"].plan(recipe, MethodInputs(None, None, Scores(blank)))
    return [layer for layer in range(total) if layer not in plan.removed]


@pytest.mark.parametrize(("total", "pattern", "kept"), CASES)
def test_patterns_by_hand(total: int, pattern: str, kept: list[int]) -> None:
    assert kept_of(total, total - len(kept), pattern) == kept


def test_evenly_spread_is_the_default() -> None:
    assert kept_of(12, "50%", None) == TWELVE_TO_SIX["max-gap"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_number_of_any_number(pattern: str) -> None:
    for total in range(3, 34):
        for count in range(2, total):
            kept = kept_of(total, total - count, pattern)
            assert len(kept) == count
            assert kept[0] == 0
            assert kept[-1] == total - 1
            gaps = [after - before for before, after in itertools.pairwise(kept)]
            if pattern == "max-gap":
                assert max(gaps) - min(gaps) <= 1
            else:
                assert sum(gap > 1 for gap in gaps) <= (2 if pattern == "both" else 1)
            if pattern == "both" and count > 2:
                assert 0 <= gaps[-1] - gaps[0] <= 1


def test_the_first_and_the_last_always_stay() -> None:
    config = tiny_model(num_hidden_layers=6).config
    method_of(make_recipe({"method": "layerchop", "remove": 4, "pattern": "input"}), config)
    with pytest.raises(
        StreamlineError, match="remove 5: method layerchop keeps the first and the last of 6 layers; remove at most 4"
    ):
        method_of(make_recipe({"method": "layerchop", "remove": 5}), config)


def test_a_pattern_is_layerchops_alone() -> None:
    with pytest.raises(StreamlineError, match="pattern 'both': method gromov does not have this option; layerchop has"):
        method_of(make_recipe({"method": "gromov", "remove": 2, "pattern": "both"}), tiny_model().config)
    with pytest.raises(StreamlineError, match="pattern is 'top': Input should be 'max-gap'"):
        make_recipe({"method": "layerchop", "remove": 2, "pattern": "top"})
