"""Write the tables of docs/performance.md from the figures of `ci/bench export`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from marked_page import replace_part

PAGE = Path("docs/performance.md")
CHECKPOINTS = {"small": "78M", "reference": "reference model"}


def write_page(results: dict[str, Any]) -> None:
    """Write each table between its marks."""
    tables: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
        "export": _exports,
        "depth": _depth,
        "size": _size,
        "quantizing": _quantizing,
        "speed": _speed,
        "ideal": lambda rows: _compared("removed", rows),
        "compaction": _compaction,
        "machine": _machine,
    }
    for name, table in tables.items():
        if name in results:
            replace_part(PAGE, name, table(results[name]))


def _exports(checkpoints: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| checkpoint | export | seconds | peak memory, MB | files, MB |", "|---|---|---|---|---|"]
    return lines + [
        f"| {CHECKPOINTS[key]} | {name} | {row['seconds']:.1f} "
        f"| {row['peak_bytes'] / 1e6:.0f} | {row['bytes'] / 1e6:.1f} |"
        for key, rows in checkpoints.items()
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


def _quantizing(measured: dict[str, Any]) -> list[str]:
    lines = ["| quantizer | peak memory, MB | of the graph in fp32 | files, MB | seconds |", "|---|---|---|---|---|"]
    return lines + [
        f"| {name} | {row['peak_bytes'] / 1e6:.0f} | {row['peak_bytes'] / measured['fp32_bytes']:.2f} "
        f"| {row['export_bytes'] / 1e6:.0f} | {row['seconds']:.0f} |"
        for name, row in measured["rows"].items()
    ]


def _speed(checkpoints: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| checkpoint | graph, runtime | prefill, ms | decode, ms a token |", "|---|---|---|---|"]
    return lines + [
        f"| {CHECKPOINTS[key]} | {name} | {row['prefill_ms']:.1f} | {row['decode_ms']:.2f} |"
        for key, rows in checkpoints.items()
        for name, row in rows.items()
    ]


def _compared(first: str, rows: dict[str, Any]) -> list[str]:
    """A table that compares each row with the first one: times, speed-up, ideal speed-up, and the share reached."""
    dense = next(iter(rows.values()))
    head = [first, "layers"]
    for phase in ("prefill", "decode"):
        head += [f"{phase}, ms", "speed-up", "ideal", "of the ideal"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        cells = [name, str(row["layers"])]
        for phase in ("prefill", "decode"):
            speedup, ideal = dense[f"{phase}_ms"] / row[f"{phase}_ms"], row[f"ideal_{phase}"]
            cells += [f"{row[f'{phase}_ms']:.2f}", f"{speedup:.2f}", f"{ideal:.2f}", f"{speedup / ideal:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _compaction(checkpoints: dict[str, dict[str, Any]]) -> list[str]:
    return [line for key, rows in checkpoints.items() for line in ("", *_compared(CHECKPOINTS[key], rows))][1:]


def _machine(facts: dict[str, Any]) -> list[str]:
    return ["; ".join(f"{name} {value}" for name, value in facts.items() if name != "memory_bytes")]
