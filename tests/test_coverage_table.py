"""What is shown of coverage, and that too little of it is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def coverage_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    return importlib.import_module("coverage_table")


def measured(file: Path, covered: int) -> str:
    """A measurement in which so many lines of a hundred were run."""
    few, all_of_them = (
        {"missing_lines": missing, "summary": {"percent_covered": share}}
        for missing, share in ((list(range(7, 107 - covered)), float(covered)), ([], 100.0))
    )
    summary = {"percent_covered": float(covered), "covered_lines": covered, "missing_lines": 100 - covered}
    found: dict[str, Any] = {"files": {"a.py": few, "b.py": all_of_them}, "summary": summary}
    file.write_text(json.dumps(found))
    return str(file)


def test_a_file_that_is_covered_little_gets_a_line(
    coverage_table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"coverage 10\.0%: must be at least"):
        coverage_table.main(measured(tmp_path / "found.json", 10))
    lines = [" 10.0%  a.py, 90 lines, the first 7", " 10.0%  of 100 lines in 2 files; 1 of them under 90%"]
    assert capsys.readouterr().out.splitlines() == lines


def test_enough_is_no_error(coverage_table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage_table.main(measured(tmp_path / "found.json", 99))
    assert capsys.readouterr().out == " 99.0%  of 100 lines in 2 files; 0 of them under 90%\n"
    assert coverage_table.FLOOR < 99
