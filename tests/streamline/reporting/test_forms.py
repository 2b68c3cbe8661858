"""Reports: the verdict, the JSON round trip, and the terminal, Markdown and HTML forms."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from optimum.streamline.editing.plan import PlannedLayer, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.intervals import Interval, mean_interval
from optimum.streamline.evaluation.results import Limit, Measurement, Report
from optimum.streamline.evaluation.verdict import judge, more_to_settle
from optimum.streamline.recipe.recipe import Budget, Judge
from optimum.streamline.reporting.files import write_report
from optimum.streamline.reporting.html import layer_outcomes, to_html
from optimum.streamline.reporting.plots import KEPT, OUTCOMES, comparison_svg, layer_importance_svg
from optimum.streamline.reporting.text_forms import comparison_table, to_markdown
from optimum.streamline.reporting.wording import headline, limit_sentence, note, sentences, table_rows

ONE = Interval(1.0, 1.0, 1.0)
NAN = Interval(math.nan, math.nan, math.nan)
ORIGINAL = Measurement(
    label="original",
    path="/models/original",
    role="original",
    runtime="torch",
    dtype="fp32",
    baseline="original",
    parameters=4_000_000,
    live_parameters=4_000_000,
    layers=16,
    attention_layers=16,
    kv_bytes_per_token=8192,
    disk_bytes=8_000_000,
    size_ratio=1.0,
    perplexity=Interval(12.31, 11.9, 12.8),
    perplexity_ratio=ONE,
    kl=Interval(0.0, 0.0, 0.0),
    agreement=ONE,
    prefill_ms=Interval(198.2, 190.0, 205.1),
    decode_ms=Interval(23.4, 22.8, 24.1),
    prefill_speedup=ONE,
    decode_speedup=ONE,
    ideal_prefill_speedup=1.0,
    ideal_decode_speedup=1.0,
    peak_bytes=400_000_000,
)
CANDIDATE = replace(
    ORIGINAL,
    label="candidate",
    role="candidate",
    live_parameters=2_900_000,
    parameters=3_000_000,
    layers=12,
    attention_layers=11,
    disk_bytes=6_000_000,
    size_ratio=0.75,
    perplexity=Interval(14.02, 13.5, 14.5),
    perplexity_ratio=Interval(1.139, 1.128, 1.151),
    kl=Interval(0.1423, 0.1399, 0.1451),
    agreement=Interval(0.823, 0.815, 0.83),
    decode_ms=Interval(18.0, 17.6, 18.5),
    decode_speedup=Interval(1.3, 1.27, 1.33),
    ideal_decode_speedup=1.325,
)
BROKEN = replace(CANDIDATE, perplexity=NAN, perplexity_ratio=NAN, kl=NAN, agreement=Interval(0.0, 0.0, 0.0))


def exported(row: Measurement) -> Measurement:
    baseline = f"{row.baseline}, onnx"
    return replace(row, label=f"{row.label}, onnx", runtime="onnxruntime", baseline=baseline)


def report(*rows: Measurement, budget: Budget | None = None, by: Judge = "bound") -> Report:
    rows = rows or (ORIGINAL, CANDIDATE)
    return Report(
        rows=rows,
        verdict=judge(rows, budget or Budget(), by),
        settings={"device": "cpu", "prompt_length": 256, "decode_tokens": 32, "rounds": 10},
        machine={"processor": "a processor", "cores": 2, "memory_bytes": 8_000_000_000},
        data={"spec": "stdlib:eval", "windows": 64, "length": 256, "fingerprint": "abc"},
        seed=0,
    )


def with_layers(origin: Report) -> Report:
    new_layers = [PlannedLayer("kept", (0,)), PlannedLayer("mlp", (1, 2)), PlannedLayer("kept", (4,))]
    return replace(origin, scores=(0.4, 0.1, 0.05, 0.06, 0.3), layers=tuple(new_layers), steps={"heal": 101.2})


class TestVerdict:
    @pytest.mark.parametrize(
        ("by", "field", "at", "beyond"),
        [
            ("bound", "max_ppl_ratio", 1.151, 1.1509),
            ("bound", "max_kl", 0.1451, 0.145),
            ("bound", "min_speedup", 1.27, 1.2701),
            ("bound", "max_size_ratio", 0.75, 0.7499),
            ("point", "max_ppl_ratio", 1.139, 1.1389),
            ("point", "max_kl", 0.1423, 0.1422),
            ("point", "min_speedup", 1.3, 1.3001),
            ("point", "max_size_ratio", 0.75, 0.7499),
        ],
    )
    def test_at_the_limit_is_within_it(self, by: Judge, field: str, at: float, beyond: float) -> None:
        assert report(budget=Budget(**{field: at}), by=by).exit_code == 0
        over = report(budget=Budget(**{field: beyond}), by=by)
        assert over.exit_code == 3
        assert [(limit.name, limit.passed) for limit in over.verdict.limits] == [(field, False)]

    def test_no_budget_is_not_exceeded(self) -> None:
        assert report().exit_code == 0
        assert headline(report()) == "No budget was set"

    def test_one_limit_of_many_is_enough_to_fail(self) -> None:
        verdict = report(budget=Budget(max_ppl_ratio=2.0, max_kl=0.1, min_speedup=1.1)).verdict
        assert [limit.passed for limit in verdict.limits] == [True, False, True]
        assert not verdict.passed

    @pytest.mark.parametrize(
        "budget", [Budget(), Budget(max_ppl_ratio=1e9), Budget(max_kl=1e9), Budget(min_speedup=1.0)]
    )
    def test_not_a_number_fails_whatever_the_budget(self, budget: Budget) -> None:
        broken = report(ORIGINAL, BROKEN, budget=budget)
        assert broken.exit_code == 3
        assert broken.verdict.limits[0].name == "finite"
        assert all(limit.passed == (limit.name == "min_speedup") for limit in broken.verdict.limits)

    def test_infinite_fails_too(self) -> None:
        infinite = replace(
            CANDIDATE, perplexity=Interval(math.inf, 9.0, math.inf), perplexity_ratio=Interval(math.inf, 1, 1)
        )
        assert report(ORIGINAL, infinite).exit_code == 3

    def test_a_speedup_that_is_not_a_number_is_not_fast(self) -> None:
        assert report(ORIGINAL, replace(CANDIDATE, decode_speedup=NAN), budget=Budget(min_speedup=0.1)).exit_code == 3

    def test_every_candidate_must_be_accurate_and_the_exported_one_fast(self) -> None:
        slow_in_torch = replace(CANDIDATE, decode_speedup=Interval(0.9, 0.8, 1.0))
        rows = (ORIGINAL, slow_in_torch, exported(ORIGINAL), exported(CANDIDATE))
        limits = report(*rows, budget=Budget(max_ppl_ratio=1.2, min_speedup=1.2)).verdict.limits
        assert [(limit.name, limit.label) for limit in limits] == [
            ("max_ppl_ratio", "candidate"),
            ("max_ppl_ratio", "candidate, onnx"),
            ("min_speedup", "candidate, onnx"),
        ]
        slow_in_onnx = (ORIGINAL, CANDIDATE, exported(ORIGINAL), exported(slow_in_torch))
        assert report(*slow_in_onnx, budget=Budget(min_speedup=1.2)).exit_code == 3

    def test_the_original_is_not_judged(self) -> None:
        assert report(ORIGINAL, budget=Budget(min_speedup=2.0)).verdict.limits == ()

    def test_where_the_figure_is_judged_doubt_is_said(self) -> None:
        doubtful = report(budget=Budget(max_ppl_ratio=1.14), by="point")
        (limit,) = doubtful.verdict.limits
        assert limit.passed
        assert limit.interval == CANDIDATE.perplexity_ratio
        assert "holds, but its interval reaches past the limit" in limit_sentence(limit, doubtful)
        clear = report(budget=Budget(max_ppl_ratio=1.2), by="point")
        assert limit_sentence(clear.verdict.limits[0], clear).endswith(": holds")

    @pytest.mark.parametrize(
        ("field", "limit", "said"),
        [
            # The interval's end is twice as far off as the limit: four times as many.
            ("max_ppl_ratio", 1.3125, "about 192 more windows (--eval-samples 256) would settle it"),
            ("max_kl", 1.3125, "about 192 more windows (--eval-samples 256) would settle it"),
            ("min_speedup", 1.1875, "about 30 more rounds (validate --rounds 40) would settle it"),
            ("max_ppl_ratio", 1.25, "the figure equals the limit, so no number of windows would settle it"),
            ("min_speedup", 1.25, "the figure equals the limit, so no number of rounds would settle it"),
        ],
    )
    def test_an_undecided_limit_says_what_would_settle_it(self, field: str, limit: float, said: str) -> None:
        figure = Interval(1.25, 1.125, 1.375)
        candidate = replace(CANDIDATE, perplexity_ratio=figure, kl=figure, decode_speedup=figure)
        found = report(ORIGINAL, candidate, budget=Budget(**{field: limit}))
        assert (found.exit_code, headline(found)) == (3, "Not shown to be within budget")
        sentence = limit_sentence(found.verdict.limits[0], found)
        assert "undecided, because the figure is within the limit but its interval is not" in sentence
        assert said in sentence
        over = report(ORIGINAL, candidate, budget=Budget(max_ppl_ratio=1.2))
        assert limit_sentence(over.verdict.limits[0], over).endswith(": does not hold")
        assert headline(over) == "Over budget"

    def test_no_more_windows_are_advised_than_the_text_has(self) -> None:
        candidate = replace(CANDIDATE, kl=Interval(1.25, 1.125, 1.375))
        found = report(ORIGINAL, candidate, budget=Budget(max_kl=1.3125))
        short = replace(found, data={**found.data, "possible": 200, "read_characters": 9000, "whole": False})
        sentence = limit_sentence(found.verdict.limits[0], short)
        assert sentence.endswith("192 more windows would settle it, but this text has only 200 in all: give more text")
        assert "drawn at random from 200 windows in its first 9,000 characters" in note(short)

    def test_as_many_windows_as_it_says_do_settle_it(self) -> None:
        losses = np.random.default_rng(0).normal(1.0, 0.5, 4000)
        few = mean_interval(losses[:64], np.ones(64), 0)
        limit = Limit("max_kl", "candidate", few.value + (few.high - few.value) / 3, few.value, few, few.high)
        more = more_to_settle(limit, 64)
        assert more == pytest.approx(64 * 8, rel=0.01)
        many = mean_interval(losses[: 64 + more], np.ones(64 + more), 0)
        assert many.high - many.value == pytest.approx((few.high - few.value) / 3, rel=0.2)

    def test_an_interval_without_an_end_is_within_nothing(self) -> None:
        endless = replace(CANDIDATE, kl=Interval(0.1, 0.05, math.inf))
        found = report(ORIGINAL, endless, budget=Budget(max_kl=1.0))
        assert found.exit_code == 3
        assert limit_sentence(found.verdict.limits[0], found).endswith(": does not hold")


class TestJson:
    @pytest.mark.parametrize("rows", [(ORIGINAL, CANDIDATE), (ORIGINAL,)])
    def test_round_trip(self, rows: tuple[Measurement, ...]) -> None:
        origin = with_layers(report(*rows, budget=Budget(max_kl=0.1)))
        assert Report.from_json(origin.to_json()) == origin
        assert Report.from_json(report(*rows).to_json()) == report(*rows)

    def test_what_is_not_a_number_survives_strict_json(self) -> None:
        infinite = replace(BROKEN, kl=Interval(math.inf, -math.inf, math.inf))

        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} is not JSON")

        text = report(ORIGINAL, infinite, budget=Budget(max_kl=0.1)).to_json()
        json.loads(text, parse_constant=refuse)
        back = Report.from_json(text)
        assert math.isnan(back.rows[1].perplexity.value)
        assert back.rows[1].kl == Interval(math.inf, -math.inf, math.inf)
        assert back.exit_code == 3

    def test_the_outcome_stands_in_it(self) -> None:
        fields = json.loads(report(budget=Budget(max_kl=0.1)).to_json())
        assert (fields["passed"], fields["exit_code"]) == (False, 3)
        assert fields["verdict"]["judge"] == "bound"
        [limit] = fields["verdict"]["limits"]
        assert (limit["measured"], limit["judged"], limit["passed"]) == (0.1423, 0.1451, False)
        point = json.loads(report(budget=Budget(max_kl=0.1), by="point").to_json())["verdict"]
        assert (point["judge"], point["limits"][0]["judged"]) == ("point", 0.1423)

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("rows", 1, "kl", "value"), 0.01),
            (("rows", 1, "files", "model.safetensors"), "0" * 64),
            (("verdict", "limits", 0, "limit"), 0.5),
            (("verdict", "judge"), "point"),
            (("exit_code",), 0),
            (("digest",), ""),
        ],
    )
    def test_a_tampered_report_is_refused(self, place: tuple[str | int, ...], value: object) -> None:
        text = report(
            ORIGINAL, replace(CANDIDATE, files={"model.safetensors": "1"}), budget=Budget(max_kl=0.1)
        ).to_json()
        Report.from_json(text)
        fields = json.loads(text)
        inside = fields
        for step in place[:-1]:
            inside = inside[step]
        inside[place[-1]] = value
        with pytest.raises(StreamlineError, match="not the report that was written"):
            Report.from_json(json.dumps(fields))

    @pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', "[" * 100_000])
    def test_something_else_is_refused(self, text: str) -> None:
        with pytest.raises(StreamlineError, match="not a report"):
            Report.from_json(text)


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "srcset"}]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "td":
            self.cells.append(data.strip())


class TestForms:
    def test_page_needs_nothing_from_outside(self) -> None:
        text = to_html(with_layers(report()))
        page = Page(text)
        assert [link for link in page.links if not link.startswith("#")] == []
        assert not re.search(r"@import|url\((?!#)", text)
        assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
        assert page.tags.count("svg") == 2
        assert text.count("<!DOCTYPE") + text.count("<!doctype") == 1

    def test_page_without_scores_has_no_plot_of_them(self) -> None:
        assert Page(to_html(report())).tags.count("svg") == 1

    def test_every_figure_stands_beside_the_originals(self) -> None:
        cells = [cell for cell in Page(to_html(report())).cells if cell]
        assert cells == [line.cell(row) for line in table_rows(report()) for row in (ORIGINAL, CANDIDATE)]

    def test_questions_are_shown_where_there_were_some(self) -> None:
        asked = replace(
            report(
                replace(ORIGINAL, question_accuracy=Interval(0.71, 0.66, 0.76), stability=ONE),
                replace(CANDIDATE, question_accuracy=Interval(0.6, 0.55, 0.65), stability=Interval(0.845, 0.81, 0.88)),
            ),
            questions={"questions_file": "q.jsonl", "questions": 40, "questions_effective": 3.25},
        )
        assert Report.from_json(asked.to_json()) == asked
        console = Console(record=True, width=160)
        console.print(comparison_table(asked))
        for text in (to_html(asked), to_markdown(asked), console.export_text()):
            for words in ("Correct answers", "71.0% [66.0, 76.0]", "60.0% [55.0, 65.0]", "Stability", "84.5% [81"):
                assert words in text
        assert "It answers 60.0% [55.0, 65.0] of the questions correctly, and original answers 71.0%" in to_markdown(
            asked
        )
        assert "| effective number of questions for the stability | 3.25 |" in to_markdown(asked)
        for text in (to_html(report()), to_markdown(report())):
            assert "Stability" not in text
            assert "Correct answers" not in text

    def test_names_from_outside_are_text(self) -> None:
        named = replace(CANDIDATE, label="<script>alert(1)</script>|[red]", baseline="original")
        page = to_html(report(ORIGINAL, named))
        assert "<script" not in page
        assert "\\|[red]" in to_markdown(report(ORIGINAL, named))
        console = Console(record=True, width=200)
        console.print(comparison_table(report(ORIGINAL, named)))
        assert "|[red]" in console.export_text()

    def test_light_and_dark(self) -> None:
        text = to_html(with_layers(report()))
        assert "prefers-color-scheme: dark" in text
        assert "currentColor" in text
        assert "#010203" not in text

    def test_markdown_table_is_one(self) -> None:
        text = to_markdown(with_layers(report(budget=Budget(max_kl=0.1))))
        assert text.startswith("# Over budget\n")
        rows = [line for line in text.splitlines() if line.startswith("| ") or line.startswith("| --- ")]
        table = rows[: len(table_rows(report())) + 1]
        assert {line.count("|") for line in table} == {4}
        assert "| Decode speed-up | 1.00x | 1.30x [1.27, 1.33] |" in text
        assert "| Ideal decode speed-up | 1.00x | 1.32x (98% reached) |" in text

    def test_terminal_shows_table_and_verdict(self) -> None:
        console = Console(record=True, width=120)
        console.print(comparison_table(report(budget=Budget(max_kl=0.1))))
        text = console.export_text()
        assert "1.139x [1.128, 1.151]" in text
        assert text.rstrip().endswith("Over budget.")

    @pytest.mark.parametrize("form", [to_html, to_markdown])
    def test_broken_models_are_shown_as_such(self, form: object) -> None:
        text = form(with_layers(report(ORIGINAL, BROKEN)))  # type: ignore[operator]
        assert "not a number" in text
        assert "broken on this text" in text
        assert "Over budget" in text

    def test_a_change_of_runtime_is_said(self) -> None:
        unpaired = replace(exported(CANDIDATE), baseline="original")
        assert "change of runtime" in sentences(report(ORIGINAL, unpaired))[0]
        assert "change of runtime" not in sentences(report())[0]

    def test_a_model_that_is_not_what_its_record_says_is_said(self) -> None:
        edited = report(ORIGINAL, replace(CANDIDATE, changed=("model.safetensors is not what was written",)))
        line = (
            "candidate: model.safetensors is not what was written. "
            "The record does not describe the model that was measured."
        )
        console = Console(record=True, width=160)
        console.print(comparison_table(edited))
        assert line in console.export_text()
        for form in (to_html, to_markdown):
            assert line in form(edited)
            assert "The record does" not in form(report())

    def test_no_difference_is_said(self) -> None:
        same = replace(CANDIDATE, decode_speedup=Interval(1.05, 0.97, 1.12))
        assert "no difference in speed was shown" in sentences(report(ORIGINAL, same))[0]

    def test_all_forms_are_written(self, tmp_path: Path) -> None:
        origin = with_layers(report())
        write_report(origin, tmp_path / "out")
        assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.html"}
        assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == origin


class TestPlots:
    def test_fates_of_layers(self) -> None:
        assert layer_outcomes(with_layers(report())) == {
            0: "kept",
            1: "replaced",
            2: "replaced",
            3: "removed",
            4: "kept",
        }
        assert layer_outcomes(report()) == {}

    def test_halves_of_a_packed_layer_lost_the_others(self) -> None:
        layers = packed_plan(5, [(1, "mlp"), (2, "attention"), (3, "attention"), (3, "mlp")]).new_layers
        outcomes = layer_outcomes(replace(with_layers(report()), layers=layers))
        assert outcomes == {0: "kept", 1: "thinned", 2: "thinned", 3: "removed", 4: "kept"}

    def test_layers_are_coloured_by_fate(self) -> None:
        becomes = {0: "kept", 1: "replaced", 2: "merged", 3: "removed", 4: "thinned"}
        svg = layer_importance_svg([0.4, 0.1, 0.05, 0.06, 0.3], becomes)
        fills = re.findall(r'<g id="patch_\d+">\s*<path d="[^"]*" clip-path="[^"]*" style="fill: ([^;"]+)', svg)
        patterns = re.findall(r'<pattern id="(\w+)"[^>]*>\s*<rect[^>]* fill="(#\w+)"', svg)
        hatched = {f"url(#{name})": colour for name, colour in patterns}
        bars = [hatched.get(fill, fill) for fill in fills]
        assert bars == [OUTCOMES[outcome][0] if outcome in OUTCOMES else KEPT for outcome in becomes.values()]
        for word in ("kept", *(words for _, _, words in OUTCOMES.values())):
            assert f">{word}<" in svg
        assert ">removed<" not in layer_importance_svg([0.4, 0.1], {1: "replaced"})

    def test_one_towering_layer_does_not_flatten_the_others(self) -> None:
        assert "(log scale)" in layer_importance_svg([1.05, 0.02, 0.03, 0.01], {})
        assert "(log scale)" not in layer_importance_svg([0.05, 0.02, 0.03, 0.01], {})
        assert "(log scale)" not in layer_importance_svg([1.05, 0.02, 0.03, -1e-9], {})  # has no logarithm

    def test_same_figures_same_text(self) -> None:
        rows = (ORIGINAL, CANDIDATE)
        assert comparison_svg(rows) == comparison_svg(rows)

    def test_many_layers_and_models_are_drawn(self) -> None:
        assert "<svg" in layer_importance_svg([0.01] * 126, dict.fromkeys(range(60, 90), "removed"))
        rows = [replace(CANDIDATE, label=f"/a/long/path/to/some/candidate-{number}") for number in range(9)]
        svg = comparison_svg(rows)
        assert all(f"candidate-{number}" in svg for number in range(9))

    def test_what_is_not_a_number_is_written(self) -> None:
        assert "not a finite number" in comparison_svg((ORIGINAL, BROKEN))
        assert "not a finite number" not in comparison_svg((ORIGINAL, CANDIDATE))
