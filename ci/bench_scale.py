"""Measure the memory and the time of pruning a model whose weights stay on disk, beside the same model in memory.

Beside both stand the estimates that `--dry-run` prints.

    ci/bench scale                       # measure all rows, then write the page; the larger size takes 24 GiB of memory
    ci/bench scale --only "0.6B, come"   # one row
    ci/bench scale --only "growth, sleb" # how memory and time grow
    ci/bench scale --page                # write the page; measure nothing

The checkpoints are random Llamas in bf16, made for the measurement. The figures go to docs/scale.json, and the table of
docs/scale.md is written from them.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bench_memory import flags
from export_cases import ROOT, make_checkpoint, run_measured, streamline
from marked_page import replace_part
from measured_parts import measure_parts
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.weight_files import WeightFiles, find_weights
from optimum.streamline.pipeline.estimating import estimated_costs
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.memory import free_memory

PAGE, RESULTS = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.json"
# Layers, hidden size, intermediate size, heads, key-value heads, vocabulary; the second is the shape of Llama 3.2 3B.
SHAPES = {"0.6B": (24, 1536, 4096, 12, 4, 4096), "3B": (28, 3072, 8192, 24, 8, 128_256)}
LIMITS = {"0.6B": "1GB", "3B": "1.5GB"}
# A search by loss computes hundreds of times as much as a score, so it gets little text; so does the larger model.
TEXT = {"0.6B": {"samples": 8, "length": 256}, "3B": {"samples": 4, "length": 128}}
LITTLE = {"samples": 4, "length": 64}
LOCAL = {"heal": "local", "heal_data": "stdlib:calibration", "heal_tokens": 4096, "heal_epochs": 1}
EDITS: dict[str, dict[str, Any]] = {
    "named layers": {"layers": "3,7,9-12"},
    "shortgpt": {"method": "shortgpt", "remove": 6},
    "come": {"method": "come", "remove": 2},
    "sleb, two steps": {"method": "sleb", "remove": 2, **LITTLE},
    "named layers, healed by local": {"layers": "3,7,9-12", **LOCAL},
}
# A model whose weights stay on disk; it grows.
GROWING, GROWING_LIMIT = (16, 1024, 2816, 16, 8, 4096), "700MB"
GROWTH: dict[str, dict[str, Any]] = {
    "as it is": {},
    "twice the layers": {"shape": (32, *GROWING[1:])},
    "twice the width": {"shape": (16, 2048, 5632, 16, 8, 4096)},
    "twice the windows": {"windows": 2},
}
GROWING_EDITS = {"shortgpt": EDITS["shortgpt"], "sleb": EDITS["sleb, two steps"]}


def main() -> None:
    """Measure the rows of the command line, and write the page."""
    rows = {f"{size}, {edit}": partial(measure, size, edit) for size in SHAPES for edit in EDITS}
    rows |= {f"growth, {edit}": partial(measure_growth, edit) for edit in GROWING_EDITS}
    measure_parts(__doc__, rows, RESULTS, write)


def measure(size: str, edit: str, folder: Path) -> dict[str, Any]:
    """Prune a checkpoint of one size in memory and on disk. Making it has put it into the page cache."""
    checkpoint = make_checkpoint(folder / "in", SHAPES[size], "bfloat16")
    row: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))}
    for where, limit in (("memory", {}), ("disk", {"max_memory": LIMITS[size]})):
        fields = {**TEXT[size], **EDITS[edit], "calibration": "stdlib:calibration", **limit}
        # In a process of its own: a process that is started begins with the peak memory of the one that starts it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another:
            expected_seconds, expected_bytes = another.submit(estimate, checkpoint, fields).result()
        if expected_bytes > free_memory():
            continue
        seconds, peak = run_measured(streamline("prune", "-m", checkpoint, folder / where, *flags(fields)))
        row[where] = {
            "seconds": seconds,
            "peak_bytes": peak,
            "estimated_seconds": expected_seconds,
            "estimated_bytes": expected_bytes,
        }
    if "memory" in row:
        row["same"] = same_tensors(folder / "memory", folder / "disk")
    print(size, edit, row, flush=True)
    return row


def estimate(checkpoint: Path, fields: dict[str, Any]) -> tuple[float | None, int]:
    """The seconds of all steps, `None` if unknown, and the largest memory of a step, in bytes."""
    steps = estimated_costs(ModelSource(str(checkpoint)), make_recipe(fields)).steps
    seconds = [step.seconds for step in steps if step.seconds is not None]
    return sum(seconds) if len(seconds) == len(steps) else None, max(step.memory for step in steps)


def measure_growth(edit: str, folder: Path) -> dict[str, Any]:
    """Choose layers with the weights on disk: the memory and the time for twice the layers, width or windows."""
    found: dict[str, Any] = {}
    for name, change in GROWTH.items():
        checkpoint = make_checkpoint(folder / name.replace(" ", "-"), change.get("shape", GROWING), "bfloat16")
        fields = {
            **TEXT["0.6B"],
            **GROWING_EDITS[edit],
            "calibration": "stdlib:calibration",
            "max_memory": GROWING_LIMIT,
        }
        fields["samples"] *= change.get("windows", 1)
        seconds, peak = run_measured(
            streamline("prune", "-m", checkpoint, folder / "out", "--overwrite", *flags(fields))
        )
        found[name] = {"seconds": seconds, "peak_bytes": peak}
        print(edit, name, found[name], flush=True)
    return found


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit, in whatever files."""
    places = [
        {each.name: file for file in find_weights(folder).files for each in WeightFiles((file,)).tensors()}
        for folder in (one, other)
    ]
    return places[0].keys() == places[1].keys() and all(
        bool((tensor(places[0][name], name) == tensor(places[1][name], name)).all()) for name in places[0]
    )


def tensor(file: Path, name: str) -> Any:
    """One tensor of a file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def write(results: dict[str, Any]) -> None:
    """Write the table of docs/scale.md."""
    lines = [
        "| checkpoint | edit | peak: in memory, on disk | estimated | seconds: in memory, on disk | estimated | same |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, edit in ((size, edit) for size in SHAPES for edit in EDITS if f"{size}, {edit}" in results):
        row = results[f"{size}, {edit}"]
        peaks, expected_peaks = (both(row, key, 1e9, "{:.2f} GB") for key in ("peak_bytes", "estimated_bytes"))
        seconds, expected_seconds = (both(row, key, 1, "{:.0f}") for key in ("seconds", "estimated_seconds"))
        if "memory" in row:
            seconds += f" ({row['disk']['seconds'] / row['memory']['seconds']:.2f} times)"
        same = {True: "yes", False: "no", None: ""}[row.get("same")]
        lines.append(
            f"| {size}, {row['bytes'] / 1e9:.1f} GB in bf16 | {edit} | {peaks} | {expected_peaks} | {seconds} | "
            f"{expected_seconds} | {same} |"
        )
    replace_part(PAGE, "scale", lines)
    replace_part(PAGE, "growth", growth_lines(results))


def growth_lines(results: dict[str, Any]) -> list[str]:
    """The table of how memory and time grow."""
    lines = ["| edit | model and text | peak | seconds | of the first |", "|---|---|---|---|---|"]
    for edit in GROWING_EDITS:
        rows = results.get(f"growth, {edit}", {})
        for name, row in rows.items():
            share = row["seconds"] / rows["as it is"]["seconds"]
            lines.append(f"| {edit} | {name} | {row['peak_bytes'] / 1e9:.2f} GB | {row['seconds']:.0f} | {share:.2f} |")
    return lines


def both(row: dict[str, Any], key: str, unit: float, form: str) -> str:
    """A figure of a row, in memory and on disk: a dash where the model did not fit; empty if it was not measured."""
    if key not in row["disk"]:
        return ""
    values = [row[where][key] if where in row else None for where in ("memory", "disk")]
    return ", ".join("-" if value is None else form.format(value / unit) for value in values)


if __name__ == "__main__":
    main()
