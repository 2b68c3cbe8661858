"""Show which of the packages' files the tests leave out, and refuse a total under the floor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FLOOR = 90.0
"""Percent of all lines; a little under what was measured last."""

SHOWN = 90.0
"""Files that are covered less than this, in percent, get a line."""


def main(measured: str) -> None:
    """Print the table of a measurement.

    Args:
        measured: What slipcover wrote, as JSON.
    """
    found = json.loads(Path(measured).read_text())
    total = found["summary"]["percent_covered"]
    print(table(found))
    if total < FLOOR:
        sys.exit(
            f"coverage {total:.1f}%: must be at least {FLOOR:g}%; test what was added, or lower ci/coverage_table.py"
        )


def table(found: dict[str, Any]) -> str:
    """A line for each file that is covered little, the least first, and one for the total."""
    shares = {name: each["summary"]["percent_covered"] for name, each in found["files"].items()}
    little = sorted((share, name) for name, share in shares.items() if share < SHOWN)
    lines = [f"{share:5.1f}%  {name}, {missing(found['files'][name])}" for share, name in little]
    summary = found["summary"]
    lines.append(
        f"{summary['percent_covered']:5.1f}%  of {summary['covered_lines'] + summary['missing_lines']} lines in "
        f"{len(shares)} files; {len(little)} of them under {SHOWN:g}%"
    )
    return "\n".join(lines)


def missing(file: dict[str, Any]) -> str:
    """How many lines no test ran, and where the first of them is."""
    lines = file["missing_lines"]
    return f"{len(lines)} lines, the first {lines[0]}"


if __name__ == "__main__":
    main(sys.argv[1])
