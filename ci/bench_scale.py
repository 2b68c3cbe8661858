"""Measure the memory and the time of pruning a model whose weights stay on disk, beside the same model in memory.

    ci/bench scale                       # measure all rows, then write the page; the larger size takes 24 GiB of memory
    ci/bench scale --only "0.6B, come"   # one row
    ci/bench scale --page                # write the page; measure nothing

The checkpoints are random Llamas in bf16, made for the measurement. The figures go to docs/scale.json, and the table of
docs/scale.md is written from them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from export_cases import ROOT, make_checkpoint, run_measured, streamline
from marked_page import replace_part
from measured_parts import measure_parts
from optimum.streamline.model_files.weight_files import WeightFiles, find_weights

PAGE, RESULTS = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.json"
# Layers, hidden size, intermediate size, heads, key-value heads, vocabulary; the second is the shape of Llama 3.2 3B.
SHAPES = {"0.6B": (24, 1536, 4096, 12, 4, 4096), "3B": (28, 3072, 8192, 24, 8, 128_256)}
LIMITS = {"0.6B": "1GB", "3B": "1.5GB"}
# A search by loss computes hundreds of times as much as a score, so it gets little text; so does the larger model.
TEXT = {"0.6B": ("--samples", 8, "--length", 256), "3B": ("--samples", 4, "--length", 128)}
LITTLE = ("--samples", 4, "--length", 64)
LOCAL = ("--heal", "local", "--heal-data", "stdlib:calibration", "--heal-tokens", 4096, "--heal-epochs", 1)
EDITS: dict[str, tuple[object, ...]] = {
    "named layers": ("--layers", "3,7,9-12"),
    "shortgpt": ("--method", "shortgpt", "--remove", 6),
    "come": ("--method", "come", "--remove", 2),
    "sleb, two steps": ("--method", "sleb", "--remove", 2, *LITTLE),
    "named layers, healed by local": ("--layers", "3,7,9-12", *LOCAL),
}


def main() -> None:
    """Measure the rows of the command line, and write the page."""
    rows = {f"{size}, {edit}": partial(measure, size, edit) for size in SHAPES for edit in EDITS}
    measure_parts(__doc__, rows, RESULTS, write)


def measure(size: str, edit: str, folder: Path) -> dict[str, Any]:
    """Prune a checkpoint of one size in memory and on disk. Making it has put it into the page cache."""
    checkpoint = make_checkpoint(folder / "in", SHAPES[size], "bfloat16")
    row: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))}
    words = (*TEXT[size], *EDITS[edit], "--calibration", "stdlib:calibration")
    for where, limit in (("memory", ()), ("disk", ("--max-memory", LIMITS[size]))):
        command = streamline("prune", "-m", checkpoint, folder / where, *words, *limit)
        row[where] = dict(zip(("seconds", "peak_bytes"), run_measured(command), strict=True))
    row["same"] = same_tensors(folder / "memory", folder / "disk")
    print(size, edit, row, flush=True)
    return row


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
        "| checkpoint | edit | peak memory: in memory, on disk | seconds: in memory, on disk | same bytes |",
        "|---|---|---|---|---|",
    ]
    for size, edit in ((size, edit) for size in SHAPES for edit in EDITS if f"{size}, {edit}" in results):
        row = results[f"{size}, {edit}"]
        peaks = ", ".join(f"{row[where]['peak_bytes'] / 1e9:.2f} GB" for where in ("memory", "disk"))
        seconds = [row[where]["seconds"] for where in ("memory", "disk")]
        lines.append(
            f"| {size}, {row['bytes'] / 1e9:.1f} GB in bf16 | {edit} | {peaks} | "
            f"{seconds[0]:.0f}, {seconds[1]:.0f} ({seconds[1] / seconds[0]:.2f} times) | "
            f"{'yes' if row['same'] else 'no'} |"
        )
    replace_part(PAGE, "scale", lines)


if __name__ == "__main__":
    main()
