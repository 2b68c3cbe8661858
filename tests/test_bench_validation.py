"""`ci/bench validation`: that it tells intervals that hold from such that do not, and what its figures say of ours."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimum.streamline.evaluation.accuracy import Accuracy

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    return importlib.import_module("bench_validation")


def population(documents: int, each: int) -> tuple[Accuracy, Accuracy]:
    """Two models on windows that are alike within a document, and 100 tokens long."""
    chance = np.random.default_rng(0)
    numbers = np.repeat(np.arange(documents), each)
    level = chance.normal(size=documents)[numbers] + 0.5 * chance.normal(size=len(numbers))
    tokens, change = np.full(len(numbers), 100.0), 0.1 * chance.normal(size=len(numbers))
    ids = tuple(numbers.tolist())
    zeros = np.zeros(len(numbers))
    original = Accuracy(tokens * (3 + 0.3 * level), zeros, tokens, tokens, ids)
    return original, Accuracy(original.loss + tokens * change, tokens * change**2, tokens * 0.9, tokens, ids)


def test_windows_in_a_row_are_found_out(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DRAWS", 200)
    original, pruned = population(100, 10)
    anywhere = bench._held(original, pruned, bench.anywhere, 50, False)
    in_a_row = bench._held(original, pruned, bench.in_a_row, 50, False)
    assert 0.88 <= anywhere["perplexity"] <= 1
    assert in_a_row["perplexity"] < 0.8
    assert in_a_row["ratio"] > 0.85  # what the prune changes is not alike within a document


def test_the_page_has_every_row(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "validation.md"
    page.write_text((ROOT / "docs" / "validation.md").read_text(encoding="utf-8"))
    found = json.loads((ROOT / "docs" / "validation.json").read_text())
    monkeypatch.setattr("validation_page.PAGE", page)
    bench.write_page(found)
    assert page.read_text() == (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    for row in found["coverage"]["rows"]:
        assert f"| {row['way']} | {row['windows']} | {row['share']['perplexity']:.1%} |" in page.read_text()


def test_the_intervals_that_commands_give_hold() -> None:
    found = json.loads((ROOT / "docs" / "validation.json").read_text())["coverage"]
    shares = {(row["way"], row["windows"]): row["share"] for row in found["rows"]}
    for size in (64, 128):  # 64 is what the commands draw by default
        for figure, share in shares["at random, by document", size].items():
            assert share >= 0.92, (size, figure)  # of 400 draws, whose share has a standard error of a hundredth
        assert shares["one after another, by window", size]["perplexity"] < 0.8
    characters, whole = found["by_characters"], found["whole"]
    for figure, value in whole.items():
        assert characters[figure] == pytest.approx(value, rel=0.05), figure
