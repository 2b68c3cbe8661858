"""Compare our exports to ONNX with other exporters: time, memory and size of an export, and the speed of the graph.

    ci/bench export                      # measure every part, then write the page
    ci/bench export --only export        # seconds, memory and bytes of the exports
    ci/bench export --only depth         # seconds by number of layers
    ci/bench export --only size          # peak memory for a checkpoint larger than the memory limit
    ci/bench export --only quantizing    # peak memory of quantized exports with a memory limit
    ci/bench export --only speed         # prefill and decode of the exports
    ci/bench export --only ideal         # speed-up by layers removed, beside the ideal speed-up
    ci/bench export --only compaction    # decode of graphs with and without the skipped sublayers
    ci/bench export --page               # write the page; measure nothing

The other exporters are onnxruntime-genai's model builder, and optimum-onnx in the environment that `ci/peer` makes. The
checkpoints are the reference model and random models of the shapes in `export_cases.py`. The figures go to
docs/performance.json, and the page docs/performance.md is written from them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from export_cases import (
    LARGE,
    MEDIUM,
    REFERENCE,
    ROOT,
    SMALL,
    commands,
    graph_bytes,
    last_logits_commands,
    make_checkpoint,
    run_measured,
    streamline,
)
from export_speed import DECODED, PROMPT, Timed, measure_in_turns
from measured_parts import measure_parts
from optimum.exporters.streamline import GRAPH_QUANTIZERS
from optimum.streamline.evaluation.theoretical_cost import Cost, cost_of
from optimum.streamline.models.architectures import head_size, key_value_heads
from performance_page import write_page

RESULTS = ROOT / "docs" / "performance.json"
DEPTHS = (4, 8, 16, 32)
REMOVED = ("12.5%", "25%", "50%")
# Little text is enough: it does not matter for speed which layers are chosen.
FEW = "--calibration stdlib --heal-data stdlib --samples 4 --length 64"
UNHEALED = f"{FEW} --heal none"
LARGE_MEMORY = 10**9
ROUNDS = 3


def main() -> None:
    """Measure the parts of the command line, and write the page."""
    parts = {
        "export": measure_exports,
        "depth": measure_depth,
        "size": measure_size,
        "quantizing": measure_quantizing,
        "speed": measure_speed,
        "ideal": measure_ideal,
        "compaction": measure_compaction,
    }
    measure_parts(__doc__, parts, RESULTS, write_page)


def _checkpoints(scratch: Path) -> dict[str, Path]:
    return {"small": make_checkpoint(scratch / "small", SMALL), "reference": REFERENCE}


def _peer() -> str:
    """The Python interpreter of the environment of optimum-onnx."""
    return subprocess.run(["bash", "ci/peer"], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.strip()


def measure_exports(scratch: Path) -> dict[str, Any]:
    """For each checkpoint and exporter: median seconds, peak memory, and bytes written; the exporters take turns."""
    peer = _peer()
    return {name: _exports_of(folder, scratch / name, peer) for name, folder in _checkpoints(scratch).items()}


def _exports_of(checkpoint: Path, scratch: Path, peer: str) -> dict[str, Any]:
    taken: dict[str, list[tuple[float, float]]] = {}
    rows: dict[str, Any] = {}
    for turn in range(ROUNDS):
        out = scratch / f"exports-{turn}"
        for name, command in commands(checkpoint, out, peer):
            taken.setdefault(name, []).append(run_measured(command))
            rows[name] = {"bytes": graph_bytes(out / name)}
        shutil.rmtree(out)
    for name, measured in taken.items():
        seconds, memory = zip(*measured, strict=True)
        rows[name] |= {"seconds": statistics.median(seconds), "peak_bytes": max(memory)}
        print(name, rows[name], flush=True)
    return rows


def measure_depth(scratch: Path) -> dict[str, Any]:
    """The median seconds of an export by the number of layers; the depths take turns."""
    folders = {depth: make_checkpoint(scratch / f"deep-{depth}", (depth, *SMALL[1:])) for depth in DEPTHS}
    taken: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(ROUNDS):
        for depth, folder in folders.items():
            taken[depth].append(run_measured(streamline("export", "-m", folder, scratch / "out", "--overwrite"))[0])
            print(depth, taken[depth][-1], flush=True)
    return {str(depth): statistics.median(seconds) for depth, seconds in taken.items()}


def measure_size(scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory of the export of a half-precision checkpoint that is larger than the memory limit."""
    checkpoint, out = make_checkpoint(scratch / "large", LARGE, "float16"), scratch / "export"
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    command = streamline("export", "-m", checkpoint, out, "--dtype", "fp16", "--max-memory", LARGE_MEMORY)
    seconds, memory = run_measured(command)
    row = {
        "checkpoint_bytes": weights,
        "layer_bytes": 2 * _layer_parameters(LARGE),
        "max_memory": LARGE_MEMORY,
        "seconds": seconds,
        "peak_bytes": memory,
        "export_bytes": graph_bytes(out),
    }
    print(row, flush=True)
    return row


def measure_quantizing(scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory of each quantized export with a memory limit below the size of the fp32 graph."""
    checkpoint, rows = make_checkpoint(scratch / "medium", MEDIUM, "float16"), dict[str, Any]()
    text = ("--calibration", "stdlib:calibration", "--samples", 4, "--length", 128)
    for quantizer, how in GRAPH_QUANTIZERS.items():
        command = streamline("export", "-m", checkpoint, scratch / quantizer, "--max-memory", LARGE_MEMORY)
        seconds, memory = run_measured([*command, "--quantize", quantizer, *map(str, text * how.calibrated)])
        rows[quantizer] = {"seconds": seconds, "peak_bytes": memory, "export_bytes": graph_bytes(scratch / quantizer)}
        print(quantizer, rows[quantizer], flush=True)
        shutil.rmtree(scratch / quantizer)
    parameters = MEDIUM[0] * _layer_parameters(MEDIUM) + MEDIUM[1] * (MEDIUM[-1] + 1)
    return {"fp32_bytes": 4 * parameters, "max_memory": LARGE_MEMORY, "rows": rows}


def _layer_parameters(shape: tuple[int, ...]) -> int:
    _, width, inner, heads, kv, _ = shape
    return 2 * width * width + 2 * width * width * kv // heads + 3 * width * inner + 2 * width


def measure_speed(scratch: Path) -> dict[str, Any]:
    """For each checkpoint and export: median milliseconds of a prompt and of a token after it."""
    peer = _peer()
    return {name: _speed_of(folder, scratch / f"{name}-out", peer) for name, folder in _checkpoints(scratch).items()}


def _speed_of(checkpoint: Path, out: Path, peer: str) -> dict[str, Any]:
    timed = {}
    for name, command in commands(checkpoint, out, peer):
        run_measured(command)
        for runtime in ("onnxruntime",) if "optimum" in name else ("onnxruntime", "GenAI"):
            timed[f"{name}, {runtime}"] = _timed(runtime, out / name, checkpoint)
    for name, command in last_logits_commands(checkpoint, out):
        run_measured(command)
        timed[f"{name}, GenAI"] = _timed("GenAI", out / name, checkpoint)
    timed["torch eager, fp32"] = _timed("torch", checkpoint, checkpoint)
    return measure_in_turns(timed)


def _timed(runtime: str, folder: Path, checkpoint: Path) -> Timed:
    config = AutoConfig.from_pretrained(checkpoint)
    return Timed(runtime, folder, key_value_heads(config), head_size(config))


def measure_ideal(scratch: Path) -> dict[str, Any]:
    """Prefill and decode by the share of layers removed, and the ideal speed-up by FLOPs and bytes."""
    dense = make_checkpoint(scratch / "small", SMALL)
    checkpoints = {"0": dense}
    for share in REMOVED:
        checkpoints[share] = scratch / f"less-{share}"
        _prune(dense, checkpoints[share], f"--method shortgpt --remove {share} {UNHEALED}")
    return _compare(checkpoints, scratch)


def measure_compaction(scratch: Path) -> dict[str, Any]:
    """The same for checkpoints with skipped sublayers, compared with graphs that compute those sublayers' zeros."""
    return {name: _compaction_of(folder, scratch / f"{name}-out") for name, folder in _checkpoints(scratch).items()}


def _compaction_of(dense: Path, scratch: Path) -> dict[str, Any]:
    prunings = {
        "blockpruner, 25% of the sublayers": f"--method blockpruner --no-packed --remove 25% {UNHEALED}",
        "llm-streamline, 25%, an MLP instead": (
            f"--method llm-streamline --replacement mlp --remove 25% {FEW} --heal-tokens 512"
        ),
    }
    checkpoints = {"dense": dense}
    for index, (name, choice) in enumerate(prunings.items()):
        pruned = scratch / f"pruned-{index}"
        _prune(dense, pruned, choice)
        checkpoints[name] = pruned
        checkpoints[f"{name}, not compacted"] = _unmarked(pruned, scratch / f"unmarked-{index}")
    return _compare(checkpoints, scratch)


def _prune(dense: Path, out: Path, choice: str) -> None:
    run_measured(streamline("prune", "-m", dense, out, *choice.split()))


def _unmarked(checkpoint: Path, out: Path) -> Path:
    """A copy of the checkpoint without the marks of skipped sublayers, so that the graph computes their zeros."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    del config["per_layer_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def _compare(checkpoints: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """The measured times of each checkpoint's graph, and its ideal speed-up over the first checkpoint."""
    timed, costs = {}, {}
    for index, (name, folder) in enumerate(checkpoints.items()):
        out = scratch / f"graph-{index}"
        run_measured(streamline("export", "-m", folder, out))
        timed[name] = _timed("onnxruntime", out, folder)
        costs[name] = cost_of(AutoConfig.from_pretrained(folder), "fp32")
    rows: dict[str, Any] = measure_in_turns(timed)
    first = next(iter(costs.values()))
    for name, row in rows.items():
        row |= {"layers": costs[name].layers, **_ideal(first, costs[name])}
    return rows


def _ideal(dense: Cost, pruned: Cost) -> dict[str, float]:
    context = PROMPT + DECODED / 2
    return {
        "ideal_prefill": dense.prefill_flops(PROMPT) / pruned.prefill_flops(PROMPT),
        "ideal_decode": dense.decode_bytes(context) / pruned.decode_bytes(context),
    }


if __name__ == "__main__":
    main()
