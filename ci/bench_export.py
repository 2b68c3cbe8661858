"""Exports to ONNX and what they run like, against the peers, on one checkpoint in one run.

    ci/bench export                    # everything, then the page
    ci/bench export --only export      # seconds, memory and bytes of the exports
    ci/bench export --only depth       # seconds by depth
    ci/bench export --only size        # memory of a checkpoint that is larger than it
    ci/bench export --only speed       # prefill and decode of what was exported
    ci/bench export --page             # measure nothing

Peers: onnxruntime-genai's model builder, and optimum-onnx 0.1.0 in an environment of its own, which
`--optimum PYTHON` names; without it, its rows stay as they are. Checkpoints are random, of the shape that
docs/performance.md names, and made anew in a scratch folder. Numbers go to docs/performance.json; the page is
written from that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import onnxruntime_genai
import torch

from optimum.streamline.checkpoint import load
from optimum.streamline.machine import describe_machine
from optimum.streamline.torch_runner import TorchRunner
from performance_page import write_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "performance.json"
TOKENIZER = ROOT / "examples" / "reference_model"
# Layers, width, inner width, heads, key-value heads, vocabulary.
SMALL = (12, 640, 1856, 10, 5, 32_000)
LARGE = (32, 2048, 8192, 16, 8, 32_000)
DEPTHS = (4, 8, 16, 32)
LARGE_MEMORY = 10**9
EXPORT_ROUNDS, SPEED_ROUNDS = 3, 12
PROMPT, DECODED = 128, 32

CLI = "from optimum.commands.optimum_cli import main; main()"
MAKE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
out, dtype = sys.argv[1], getattr(torch, sys.argv[2])
layers, width, inner, heads, kv, vocabulary = map(int, sys.argv[3:9])
config = AutoConfig.for_model(
    "llama", num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
    num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=True, dtype=dtype)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(out, max_shard_size="2GB")
AutoTokenizer.from_pretrained(sys.argv[9]).save_pretrained(out)
"""


def main() -> None:
    """Measure what was asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"export": measure_exports, "depth": measure_depth, "size": measure_size, "speed": measure_speed}
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--optimum", metavar="PYTHON", help="the interpreter of an environment with optimum-onnx 0.1.0")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.page:
        with tempfile.TemporaryDirectory() as scratch:
            for name in [args.only] if args.only else parts:
                found = parts[name](Path(scratch), args.optimum)
                results[name] = {**results.get(name, {}), **found}
                results["machine"] = describe_machine("cpu")
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


def make_checkpoint(folder: Path, shape: tuple[int, ...], dtype: str = "float32") -> Path:
    """A random Llama of this shape, with a tokenizer that GenAI's builder asks for."""
    command = [sys.executable, "-c", MAKE, str(folder), dtype, *map(str, shape), str(TOKENIZER)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def commands(checkpoint: Path, out: Path, optimum: str | None) -> Iterator[tuple[str, list[str]]]:
    """Each exporter's own command line for a checkpoint."""
    cli = [sys.executable, "-c", CLI]
    for how in ("none", "int4"):
        name = "streamline, fp32" if how == "none" else "streamline, int4"
        yield name, [*cli, "streamline", "export", "-m", str(checkpoint), str(out / name), "--quantize", how]
    for precision in ("fp32", "int4"):
        name = f"GenAI's builder, {precision}"
        builder = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(checkpoint),
            "-o",
            str(out / name),
        ]
        yield name, [*builder, "-p", precision, "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
    if optimum:
        name = "optimum-onnx, fp32"
        other = [optimum, "-c", CLI, "export", "onnx", "--task", "text-generation-with-past"]
        yield name, [*other, "-m", str(checkpoint), str(out / name)]


def run_measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a command, its interpreter's start included."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def measure_exports(scratch: Path, optimum: str | None) -> dict[str, Any]:
    """Median seconds and largest memory of each exporter, in turn, and the bytes it wrote."""
    checkpoint = make_checkpoint(scratch / "small", SMALL)
    taken: dict[str, list[tuple[float, float]]] = {}
    rows: dict[str, Any] = {}
    for turn in range(EXPORT_ROUNDS):
        out = scratch / f"exports-{turn}"
        for name, command in commands(checkpoint, out, optimum):
            taken.setdefault(name, []).append(run_measured(command))
            files = [file for file in (out / name).rglob("*.onnx*") if file.is_file()]
            rows[name] = {"bytes": sum(file.stat().st_size for file in files)}
    for name, measured in taken.items():
        seconds, memory = zip(*measured, strict=True)
        rows[name] |= {"seconds": statistics.median(seconds), "peak_bytes": max(memory)}
        print(name, rows[name], flush=True)
    return rows


def measure_depth(scratch: Path, optimum: str | None) -> dict[str, Any]:
    """Median seconds of an export by the number of layers, depths in turn."""
    folders = {depth: make_checkpoint(scratch / f"deep-{depth}", (depth, *SMALL[1:])) for depth in DEPTHS}
    taken: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for turn in range(EXPORT_ROUNDS):
        for depth, folder in folders.items():
            name, command = next(commands(folder, scratch / f"deep-exports-{turn}-{depth}", None))
            taken[depth].append(run_measured(command)[0])
            print(name, depth, taken[depth][-1], flush=True)
    return {str(depth): statistics.median(seconds) for depth, seconds in taken.items()}


def measure_size(scratch: Path, optimum: str | None) -> dict[str, Any]:
    """Seconds and memory of exporting a checkpoint in half precision that is larger than the memory it may take."""
    checkpoint = make_checkpoint(scratch / "large", LARGE, "float16")
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    name, command = next(commands(checkpoint, scratch / "large-export", None))
    seconds, memory = run_measured([*command, "--dtype", "fp16", "--max-memory", str(LARGE_MEMORY)])
    out = scratch / "large-export" / name
    row = {
        "checkpoint_bytes": weights,
        "layer_bytes": 2 * _layer_parameters(LARGE),
        "max_memory": LARGE_MEMORY,
        "seconds": seconds,
        "peak_bytes": memory,
        "export_bytes": sum(file.stat().st_size for file in out.glob("*.onnx*")),
    }
    print(row, flush=True)
    return row


def _layer_parameters(shape: tuple[int, ...]) -> int:
    _, width, inner, heads, kv, _ = shape
    return 2 * width * width + 2 * width * width * kv // heads + 3 * width * inner + 2 * width


def measure_speed(scratch: Path, optimum: str | None) -> dict[str, Any]:
    """Median milliseconds of a prompt and of a token after it, of everything that was exported, in turn."""
    checkpoint = make_checkpoint(scratch / "small", SMALL)
    out = scratch / "speed"
    names = []
    for name, command in commands(checkpoint, out, optimum):
        run_measured(command)
        names.append(name)
    runners: dict[str, Callable[[], tuple[float, float]]] = {}
    for name in names:
        runners[f"{name}, onnxruntime"] = partial(time_onnxruntime, open_onnxruntime(out / name))
        if "optimum" not in name:
            runners[f"{name}, GenAI"] = partial(time_genai, open_genai(out / name))
    runners["torch eager, fp32"] = partial(time_torch, TorchRunner(load(str(checkpoint), torch.float32)))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(SPEED_ROUNDS):
        for name, run in runners.items():
            taken[name].append(run())
    rows = {}
    for name, measured in taken.items():
        prefill, decode = np.median(measured[2:], axis=0)  # two rounds to warm up
        rows[name] = {"prefill_ms": 1e3 * float(prefill), "decode_ms": 1e3 * float(decode)}
        print(name, rows[name], flush=True)
    return rows


def open_onnxruntime(folder: Path) -> onnxruntime.InferenceSession:
    """A session as `onnxruntime` gives it, its log silent."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def time_onnxruntime(session: onnxruntime.InferenceSession) -> tuple[float, float]:
    """Seconds of the prompt, and the median of those of a token; the cache stays in the runtime's own buffers."""
    inputs = {value.name: value for value in session.get_inputs()}
    heads, size = SMALL[4], SMALL[1] // SMALL[3]
    none = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((1, heads, 0, size), np.float32))
    past = {name: none for name in inputs if name.startswith("past_key_values.")}
    seconds, fed = [], 0
    for tokens in _tokens():
        fed += tokens.shape[1]
        positions = np.arange(fed - tokens.shape[1], fed, dtype=np.int64)[None]
        feeds = {"input_ids": tokens, "attention_mask": np.ones((1, fed), np.int64), "position_ids": positions}
        start = time.perf_counter()
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in inputs:
                binding.bind_cpu_input(name, array)
        for name, state in past.items():
            binding.bind_ortvalue_input(name, state)
        outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        past = dict(zip(past, binding.get_outputs()[1:], strict=True))
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def open_genai(folder: Path) -> onnxruntime_genai.Model:
    """A model as GenAI gives it."""
    return onnxruntime_genai.Model(str(folder))


def time_genai(model: onnxruntime_genai.Model) -> tuple[float, float]:
    """The same, through GenAI."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=PROMPT + DECODED + 1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    seconds = []
    for tokens in _tokens():
        start = time.perf_counter()
        generator.append_tokens(tokens[0].astype(np.int32))
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def time_torch(runner: TorchRunner) -> tuple[float, float]:
    """The same, in torch."""
    seconds, cache = [], None
    for tokens in _tokens():
        start = time.perf_counter()
        _, cache = runner.prefill(tokens) if cache is None else runner.decode(tokens, cache)
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def _tokens() -> list[npt.NDArray[np.int64]]:
    """The prompt, and then each token alone."""
    ids = np.random.default_rng(0).integers(5, 1000, (1, PROMPT + DECODED), dtype=np.int64)
    return [ids[:, :PROMPT], *np.split(ids[:, PROMPT:], DECODED, axis=1)]


if __name__ == "__main__":
    main()
