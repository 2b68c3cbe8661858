"""Pages in docs/ of which the tests write a part: one that is not what they find is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def check_part(page: str, mark: str, found: str, request: pytest.FixtureRequest) -> None:
    """Hold what stands between the marks of a page to what was found, or write it there with `--write-pages`."""
    file = DOCS / page
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = file.read_text(encoding="utf-8").partition(start)
    written, _, after = rest.partition(end)
    if request.config.getoption("--write-pages"):
        file.write_text(f"{before}{start}\n\n{found}\n\n{end}{after}", encoding="utf-8")
    else:
        test = request.path.relative_to(DOCS.parent)
        assert written.strip() == found, f"write {page} anew: ci/test {test} -k page --write-pages"
