"""`ci/bench memory`: that its page has what was measured and what the formula says, and that the two are near."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
ROWS: dict[str, Any] = json.loads((DOCS / "memory.json").read_text())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS.parent / "ci"))
    return importlib.import_module("bench_memory")


def test_every_setting_takes_what_is_estimated(bench: Any) -> None:
    config = bench.llama(bench.MEASURED, tied=True)
    for name, fields in bench.CASES.items():
        taken = ROWS[name]["peak_bytes"] - ROWS[name]["program_bytes"]
        assert taken / 1.5 < bench.estimate(fields, bench.FEW_UPDATES, config) < taken * 1.5, name


def test_the_page_has_what_was_measured_and_what_the_formula_says(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, written = tmp_path / "memory.md", (DOCS / "memory.md").read_text(encoding="utf-8")
    page.write_text(written, encoding="utf-8")
    monkeypatch.setattr(bench, "PAGE", page)
    bench.write(ROWS)
    assert page.read_text(encoding="utf-8") == written


def test_a_setting_is_written_as_its_flags(bench: Any) -> None:
    assert bench.label(bench.SETTINGS["checkpointing"]) == (
        "`--heal distill --gradient-checkpointing --heal-micro-batch 1`"
    )
    assert "--max-memory" not in bench.label(bench.SETTINGS["local"])
