"""`ci/bench methods`: that its rows can be measured, and what its page says of healing on text of the original."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from optimum.streamline.pipeline.preflight import check_recipe
from optimum.streamline.recipe.parsing import make_recipe

ROOT = Path(__file__).parents[1]

Importer = Callable[[str], Any]


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> Importer:
    """Imports a module as the scripts in ci/ import each other, which name files from the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module


def test_every_row_can_be_measured(ci: Importer) -> None:
    module, bench = ci("methods_cases"), ci("bench_methods")
    cases = [case for case in module.cases() if case.removed and not case.random]
    assert {case.part for case in cases} == {*get_args(module.Part)}
    for case in cases:
        check_recipe(bench.source_of(case.model), make_recipe(case.fields, case.name))


def test_no_two_rows_are_one(ci: Importer) -> None:
    assert max(Counter(case.key for case in ci("methods_cases").cases()).values()) == 1


def test_text_of_the_original_is_compared_with_as_much_given_text(ci: Importer) -> None:
    cases = list(ci("methods_cases").cases())
    own = [case for case in cases if case.part == "self"]
    assert len(own) == 3 * 2
    for case in own:
        place = (case.model, case.removed, case.name)
        [given] = [each for each in cases if each.part == "healed" and (each.model, each.removed, each.name) == place]
        assert {**given.fields, "heal_data": "self"} == case.fields


def row(ci: Importer, model: str, part: str, removed: int, ratio: float) -> Any:
    interval = (ratio, ratio - 0.01, ratio + 0.01)
    return ci("methods_cases").Row("", model, part, removed, "come-p", "", interval, interval, 1, 1.0, 1.0)


def test_the_table_of_text_of_the_original_has_the_rows_that_are_measured(ci: Importer) -> None:
    given = [row(ci, model, "healed", removed, 1.1) for model in ("gpt2", "qwen3") for removed in (4, 8)]
    table = ci("methods_page").self_text
    assert table(given) == "Not measured yet.\n"
    assert table([*given, row(ci, "gpt2", "self", 8, 1.05), row(ci, "reference", "self", 8, 1.02)]) == (
        "| model | removed | ratio on given text (95%) | ratio on the original's text (95%) |\n"
        "|---|---|---|---|\n"
        "| gpt2 | 8 of 16 | 1.100 (1.090 to 1.110) | 1.050 (1.040 to 1.060) |\n"
    )


@pytest.mark.slow
def test_a_row_of_text_of_the_original_is_measured(ci: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    module, bench = ci("methods_cases"), ci("bench_methods")
    case = next(case for case in module.cases() if case.part == "self")
    small = module.Case(case.model, case.part, case.removed, case.name, {**case.recipe, "heal_tokens": 2560})
    monkeypatch.setitem(module.COMMON, "samples", 1)
    measured = bench.measure(small)
    assert (measured.part, measured.layers.split()[0]) == ("self", "merge")
    assert 1 < measured.ratio[0] < 1.5
