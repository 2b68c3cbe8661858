"""The numbers of `ci/bench export` as tables: the generated parts of docs/performance.md. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimum.streamline.outputs import write_file

PAGE = Path("docs/performance.md")


def write_page(results: dict[str, Any]) -> None:
    """Write every generated part between its marks."""
    tables = {"export": _exports, "depth": _depth, "size": _size, "speed": _speed, "machine": _machine}
    for name, table in tables.items():
        if name in results:
            _replace(name, table(results[name]))


def _replace(mark: str, lines: Iterable[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    write_file(PAGE, "\n".join([before + start, "", *lines, "", end + after]))


def _exports(rows: dict[str, Any]) -> list[str]:
    lines = ["| export | seconds | peak memory, MB | files, MB |", "|---|---|---|---|"]
    return lines + [
        f"| {name} | {row['seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} | {row['bytes'] / 1e6:.1f} |"
        for name, row in rows.items()
    ]


def _depth(rows: dict[str, float]) -> list[str]:
    lines = ["| layers | seconds | of those for 4 layers |", "|---|---|---|"]
    return lines + [f"| {depth} | {seconds:.1f} | {seconds / rows['4']:.2f} |" for depth, seconds in rows.items()]


def _size(row: dict[str, float]) -> list[str]:
    names = {
        "checkpoint_bytes": "checkpoint",
        "layer_bytes": "one of its layers",
        "max_memory": "`--max-memory`",
        "peak_bytes": "peak memory of the process",
        "export_bytes": "what was written",
    }
    lines = ["| | MB |", "|---|---|", *(f"| {text} | {row[key] / 1e6:.0f} |" for key, text in names.items())]
    return [*lines, f"| seconds | {row['seconds']:.0f} |"]


def _speed(rows: dict[str, Any]) -> list[str]:
    lines = ["| graph, runtime | prefill, ms | decode, ms a token |", "|---|---|---|"]
    return lines + [f"| {name} | {row['prefill_ms']:.1f} | {row['decode_ms']:.2f} |" for name, row in rows.items()]


def _machine(facts: dict[str, Any]) -> list[str]:
    return ["; ".join(f"{name} {value}" for name, value in facts.items() if name != "memory_bytes")]
