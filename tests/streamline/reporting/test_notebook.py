"""Results as a line and as HTML: what they say of each layer, that they are well formed, and that they escape."""

from __future__ import annotations

import pytest

from html_reader import Page
from optimum.streamline import Artifact, Plan, Scores, Verdict
from optimum.streamline.editing.plan import Merge, merge_plan, packed_plan
from optimum.streamline.evaluation.results import Limit
from optimum.streamline.reporting.notebook import STATES, layer_map, layer_states

NASTY = '<script>alert("x")</script>&'


@pytest.mark.parametrize(
    ("plan", "drawn"),
    [
        (Plan(6, (1, 4)), "[#-##-#]"),
        (Plan(6, (2, 3), "layer"), "[##RR##]"),
        (Plan(6, (2, 3), "swiglu"), "[##RR##]"),
        (Plan(6, (2, 3), "linear"), "[#P--##]"),
        (Plan(6, (2, 3), "corrected"), "[#C--CC]"),
        (Plan(6, (), skipped=((0, "attention"), (0, "mlp"), (2, "mlp"), (3, "attention"))), "[0#ma##]"),
        (Plan.of(packed_plan(6, [(1, "mlp"), (2, "attention"), (4, "attention"), (4, "mlp")])), "[#ma#-#]"),
        (Plan.of(packed_plan(6, [(4, "attention"), (4, "mlp")], (), "linear")), "[###P-#]"),
        (Plan.of(merge_plan(6, [Merge(1, 0.5, 0.5), Merge(1, 0.5, 0.5)])), "[#MMM##]"),
    ],
)
def test_the_map_has_one_cell_a_layer(plan: Plan, drawn: str) -> None:
    assert layer_map(plan) == drawn
    assert repr(plan) == f"Plan({plan.describe()} {drawn})"
    page = Page(plan._repr_html_())
    assert page.rows == [[f"{character}{layer}" for layer, character in enumerate(drawn[1:-1])]]
    for state in layer_states(plan):
        assert STATES[state][2] in page.words


def test_scores_are_a_table_with_ranks() -> None:
    similarity = [[1.0] * 4 for _ in range(4)]
    for layer, influence in enumerate((0.5, 0.125, 0.25)):
        similarity[layer][layer + 1] = 1 - influence
    scores = Scores(tuple(tuple(row) for row in similarity))
    assert repr(scores) == "Scores(3 layers, Block Influence: least 1: 0.125, 2: 0.250, 0: 0.500; most 0: 0.500)"
    assert Page(scores._repr_html_()).rows == [
        ["layer", "Block Influence", "rank", ""],
        ["0", "0.50000", "3", ""],
        ["1", "0.12500", "1", ""],
        ["2", "0.25000", "2", ""],
    ]


def test_scores_of_layers_that_do_nothing_can_be_shown() -> None:
    assert len(Page(Scores(((1.0, 1.0), (1.0, 1.0)))._repr_html_()).rows) == 2


def test_a_verdict_says_each_limit() -> None:
    limits = (Limit("max_ppl_ratio", NASTY, 1.1, 1.05, None, 1.05), Limit("min_speedup", "b", 1.5, 1.2, None, 1.2))
    verdict = Verdict(limits)
    assert repr(verdict) == (
        f"Verdict(failed: {NASTY} perplexity ratio 1.050, <= 1.1: holds; "
        "b decode speed-up 1.200, >= 1.5: does not hold)"
    )
    page = Page(verdict._repr_html_())
    assert page.rows[1] == [NASTY, "perplexity ratio", "1.050", "<= 1.1", "holds"]
    assert repr(Verdict(())) == "Verdict(passed: no limit is set)"
    assert repr(Verdict((Limit("finite", "c", None, float("nan"), None, float("nan")),))) == (
        "Verdict(failed: c finite logits not a number, must be a number: does not hold)"
    )


def test_an_artifact_says_what_it_is() -> None:
    artifact = Artifact(
        NASTY, "onnx", "fp32", "model", "0", {"prefill": 0.00123, "decode": 0.0}, (0, 3), files={"a": ""}
    )
    assert repr(artifact) == f"Artifact(onnx, fp32, {NASTY!r}, largest difference from torch 0.0012)"
    page = Page(artifact._repr_html_())
    assert ["folder", NASTY] in page.rows
    assert ["layers traced", "0, 3"] in page.rows
    assert "script" not in page.tags
