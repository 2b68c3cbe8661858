"""Write docs/gpu.md from the figures of `ci/bench gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum.streamline.reporting.numbers import number, size

HEAD = "| weights | run | layers | ms | tokens/s | of the limit | peak memory | times faster pruned | ideal |"
BOTH = ("dense", "pruned")
RULE = "|---|---|---|---|---|---|---|---|---|"


def write_page(results: Path) -> None:
    """Write the page beside the file of figures, with the same name and the suffix `.md`."""
    text = page_text(json.loads(results.read_text(encoding="utf-8")))
    results.with_suffix(".md").write_text(text, encoding="utf-8")


def page_text(results: dict[str, Any]) -> str:
    """The text of the page."""
    lines = ["# On a GPU", "", *_about(results), "", *_limits(results["limits"])]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["shape"] == shape]
        lines += ["", *_heading(shape, results["plan"]), "", *table(rows), *_captured(rows)]
    return "\n".join(lines) + "\n"


def _about(results: dict[str, Any]) -> list[str]:
    machine, plan = results["machine"], results["plan"]
    named = ("driver", "cuda", "torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {machine[name]}" for name in named if name in machine)
    batches = " and ".join(str(batch) for batch in plan["batches"])
    return [
        f"Measured by `ci/bench gpu` on {machine.get('gpu', machine['processor'])}, {machine['date']}; {versions}.",
        "",
        "The weights are random. Only the shapes of the models matter here; their answers mean nothing. The pruned",
        "model is the dense model without its last quarter of layers. The two took turns, round by round.",
        f"Prefill reads {plan['prompt']} tokens; decode writes tokens after as many, at batch {batches}, in a static",
        "cache. Times are taken by the device's clock: the median, and in brackets the quartiles. The speed-up is the",
        "ratio of rounds that followed each other. The ideal speed-up follows from the limits. Only the layers are",
        "quantized; the embedding and the output projection stay in bf16. No activation here is above bnb-int8's",
        "threshold of 6. It multiplies such activations separately, so it is slower with a trained model.",
        "",
        "The limit of prefill is its operations at the measured speed of a bf16 matmul, although int8 weights might be",
        "multiplied faster. The limit of decode is the bytes of weights, keys and values that it reads, at the",
        "measured bandwidth, the larger of the two below. Peak memory is the weights and the most that was allocated",
        "beside them: the cache and temporary tensors; for decode, without the prefill of the prompt. Exports are in",
        "fp16. Their time goes from tokens to logits in host memory, with all copies and calls.",
        *(["", results["note"]] if "note" in results else []),
    ]


def _limits(limits: dict[str, Any]) -> list[str]:
    if "error" in limits:
        return [f"The limits could not be measured: {limits['error']}."]
    return [
        "| limit, measured in the same run | |",
        "|---|---|",
        f"| bandwidth, copying (read and written) | {size(limits['copy_bytes_per_second'])}/s |",
        f"| bandwidth, a bf16 matrix times a vector (read) | {size(limits['read_bytes_per_second'])}/s |",
        f"| bf16 matmul | {number(limits['bf16_flops_per_second'] / 1e12)} TFLOP/s |",
    ]


def _heading(shape: str, plan: dict[str, Any]) -> list[str]:
    facts = (plan["shapes"] | plan["exported"])[shape]
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    return [f"## {shape}", "", f"{said[0].upper()}{said[1:]}."]


def _captured(rows: list[dict[str, Any]]) -> list[str]:
    """A line on how much the logits of CUDA graphs differ from those of eager mode."""
    captured = [row[layers] for row in rows if "dense" in row and row["runtime"] == "cuda-graph" for layers in BOTH]
    if not captured:
        return []
    largest = max(each["graph_max_difference"] / each["largest_logit"] for each in captured)
    return ["", f"The logits of CUDA graphs differ from eager mode by at most {largest:.1g} of the largest logit."]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A table with two rows per case, dense and pruned; a case without figures has one row, which says why."""
    return [HEAD, RULE, *(f"| {' | '.join(cells)} |" for row in rows for cells in _cells(row))]


def _cells(row: dict[str, Any]) -> list[list[str]]:
    run = f"{row['phase']}, batch {row['batch']}" + (", CUDA graph" if row["runtime"] == "cuda-graph" else "")
    named = [row["weights"], run]
    if "dense" not in row:
        why = f"failed: {row['error']}" if "error" in row else f"not run: {row['not_run']}"
        return [[*named, "", why.replace("|", "\\|"), "", "", "", "", ""]]
    low, median, high = row["dense_over_pruned"]
    ideal = row.get("ideal_dense_over_pruned")
    gained = [f"{median:.2f} [{low:.2f}, {high:.2f}]", "" if ideal is None else f"{ideal:.2f}"]
    return [
        [*named, "dense", *_figures(row["dense"]), "", ""],
        [*named, "pruned", *_figures(row["pruned"]), *gained],
    ]


def _figures(measured: dict[str, Any]) -> list[str]:
    low, median, high = (number(value) for value in measured["ms"])
    share, peak = measured.get("share_of_limit"), measured["peak_bytes"]
    return [
        f"{median} [{low}, {high}]",
        f"{measured['tokens_per_second']:,.0f}",
        "" if share is None else f"{100 * share:.0f} %",
        "" if peak is None else size(peak),
    ]
