"""Measure whether pruning and quantizing are independent: whether their losses add and their gains multiply.

    ci/bench orthogonality                   # measure both parts, then write the page
    ci/bench orthogonality --only table      # losses and interactions on the reference model, three seeds
    ci/bench orthogonality --only product    # bytes and speed of a 78M-parameter model in ONNX Runtime
    ci/bench orthogonality --page            # write the page; measure nothing

The figures go to docs/quantization.json, and the tables of docs/quantization.md are written from them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from export_cases import REFERENCE, ROOT, SMALL, graph_bytes, make_checkpoint, run_measured, streamline
from export_speed import Timed, measure_in_turns
from measured_parts import measure_parts
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import head_size, key_value_heads
from optimum.streamline.pipeline.orthogonality import orthogonality
from optimum.streamline.recipe.parsing import make_recipe
from quantization_page import write_page

RESULTS = ROOT / "docs" / "quantization.json"
QUANTIZERS = ("int8", "int4", "bnb-nf4", "bnb-int8")
SEEDS = (0, 1, 2)
TURNS = 25  # many, because the compared figure combines three ratios and has the noise of all of them
RECIPES: dict[str, dict[str, Any]] = {
    "unhealed": {"heal": "none"},
    "healed": {"heal": "distill", "heal_tokens": 100_000, "heal_epochs": 2, "heal_batch": 4},
}
COMMON: dict[str, Any] = {
    "method": "shortgpt",
    "remove": "25%",
    "calibration": "stdlib",
    "heal_data": "stdlib",
    "eval_data": "stdlib",
    "samples": 64,
    "eval_samples": 64,
    "length": 256,
}
FEW = "--calibration stdlib --method shortgpt --remove 25% --heal none --samples 4 --length 64"


def main() -> None:
    """Measure the parts of the command line, and write the page."""
    parts = {"table": measure_table, "product": measure_product}
    measure_parts(__doc__, parts, RESULTS, write_page)


def measure_table(scratch: Path) -> list[dict[str, Any]]:
    """For every recipe and seed: the losses and sizes of all models, and the interactions."""
    runs = []
    for name, own in RECIPES.items():
        for seed in SEEDS:
            print(name, "seed", seed, flush=True)
            recipe = make_recipe({**COMMON, **own, "seed": seed})
            report = orthogonality(
                ModelSource(str(REFERENCE)), recipe, QUANTIZERS, scratch / f"{name}-{seed}", notify=print
            )
            rows = [_row(asdict(row)) for row in report.rows]
            interactions = [asdict(each) for each in report.interactions]
            runs.append({"recipe": name, "seed": seed, "rows": rows, "interactions": interactions})
    return runs


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("label", "runtime", "dtype", "layers", "disk_bytes", "size_ratio", "perplexity", "perplexity_ratio", "kl")
    return {name: row[name] for name in (*kept, "prefill_ms", "decode_ms", "decode_speedup", "peak_bytes")}


def measure_product(scratch: Path) -> dict[str, Any]:
    """Bytes and milliseconds per token of a 78M-parameter model, dense and pruned, in fp32 and int4."""
    dense = make_checkpoint(scratch / "dense", SMALL)
    run_measured(streamline("prune", "-m", dense, scratch / "pruned", *FEW.split()))
    timed, rows = {}, {}
    for name in ("dense", "pruned"):
        for quantizer in ("none", "int4"):
            precision = "fp32" if quantizer == "none" else quantizer
            label, folder = f"{name}, {precision}", scratch / f"{name}-{quantizer}"
            run_measured(streamline("export", "-m", scratch / name, folder, "--quantize", quantizer))
            config = AutoConfig.from_pretrained(scratch / name)
            timed[label] = Timed("onnxruntime", folder, key_value_heads(config), head_size(config))
            rows[label] = {"bytes": graph_bytes(folder), "layers": config.num_hidden_layers}
    for label, taken in measure_in_turns(timed, TURNS).items():
        rows[label] |= taken
    return rows


if __name__ == "__main__":
    main()
