"""What is said of the default holds for the figures measured: `docs/methods.json`, written by `ci/bench methods`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "docs" / "methods.json").read_text())["rows"]
# The four papers' methods, by what their rows begin with.
SEEDS = ("shortgpt", "llm-streamline", "come", "layerchop")
# What `auto` follows on the reference model, under the name that has healed rows of one pass.
FOLLOWED = "blockpruner"


def rows_of(part: str, model: str = "reference") -> list[dict[str, Any]]:
    """The first seed's rows in which layers were removed."""
    return [row for row in ROWS if (row["part"], row["model"], row["seed"]) == (part, model, 0) and row["removed"]]


@pytest.mark.parametrize(
    ("part", "model"),
    [("unhealed", "reference"), ("unhealed", "qwen3"), ("unhealed", "gpt2"), ("healed", "reference")],
)
def test_the_default_is_as_good_as_every_seed_method(part: str, model: str) -> None:
    chosen = "auto" if part == "unhealed" else f"{FOLLOWED}: distill"
    rows = rows_of(part, model)
    ours = {row["removed"]: row["ratio"][0] for row in rows if row["name"] == chosen}
    assert sorted(ours) == ([2, 4, 6, 8] if part == "unhealed" else [4, 8])
    for seed in SEEDS:
        others = [row for row in rows if row["name"].startswith(seed)]
        assert {row["removed"] for row in others} == set(ours)
        for row in others:
            assert ours[row["removed"]] <= row["ratio"][2], row["name"]


@pytest.mark.parametrize(("removed", "limit"), [(4, 1.01), (5, 1.02), (8, 1.05)])
def test_the_default_heals(removed: int, limit: float) -> None:
    [row] = [row for row in rows_of("default") if row["removed"] == removed]
    assert row["ratio"][0] <= limit


def test_the_default_follows_the_choice_that_has_healed_rows() -> None:
    rows = rows_of("default")
    assert [row["removed"] for row in rows] == [4, 5, 8]
    assert all(row["layers"].startswith(f"by {FOLLOWED}") for row in rows)


@pytest.mark.parametrize("model", ["reference", "qwen3", "gpt2"])
@pytest.mark.parametrize("removed", [4, 8])
def test_the_candidates_of_the_default_keep_their_order_when_distilled(model: str, removed: int) -> None:
    before, after = (
        {
            row["name"].removesuffix(": distill"): row["ratio"][0]
            for row in rows_of(part, model)
            if row["removed"] == removed
        }
        for part in ("unhealed", "healed")
    )
    assert (before["blockpruner"] < before["come-p"]) == (after["blockpruner"] < after["come-p"])
