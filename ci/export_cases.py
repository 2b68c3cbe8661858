"""The checkpoints and the exporters' commands of `ci/bench export`, and the measurement of a command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "examples" / "reference_model"
# Shapes: layers, hidden size, intermediate size, heads, key-value heads, vocabulary.
SMALL = (12, 640, 1856, 10, 5, 32_000)
MEDIUM = (24, 1024, 4096, 16, 8, 32_000)
LARGE = (32, 2048, 8192, 16, 8, 32_000)

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


def make_checkpoint(folder: Path, shape: tuple[int, ...], dtype: str = "float32") -> Path:
    """Make a random Llama of this shape, unless the folder exists; it has a tokenizer, which GenAI's builder needs."""
    if not folder.exists():
        run_measured([sys.executable, "-c", MAKE, str(folder), dtype, *map(str, shape), str(REFERENCE)])
    return folder


def streamline(*words: object) -> list[str]:
    """The command line of one of our own commands."""
    return [sys.executable, "-c", CLI, "streamline", *map(str, words)]


def commands(checkpoint: Path, out: Path, optimum: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the command line of each exporter for a checkpoint; it writes into the folder of its name in `out`.

    Args:
        checkpoint: The checkpoint's folder.
        out: The folder of all exports.
        optimum: The Python interpreter of the environment of optimum-onnx.
    """
    for name, quantizer in (("streamline, fp32", "none"), ("streamline, int4", "int4")):
        yield name, streamline("export", "-m", checkpoint, out / name, "--quantize", quantizer)
    for precision in ("fp32", "int4"):
        name = f"GenAI's builder, {precision}"
        yield name, _builder(checkpoint, out / name, precision, "int4_accuracy_level=4")
    name = "optimum-onnx, fp32"
    other = [optimum, "-c", CLI, "export", "onnx", "--task", "text-generation-with-past"]
    yield name, [*other, "-m", str(checkpoint), str(out / name)]


def last_logits_commands(checkpoint: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """The same for graphs that return the last token's logits only, of the exporters that have the option."""
    name = "streamline, fp32, last logits"
    yield name, streamline("export", "-m", checkpoint, out / name, "--last-logits")
    name = "GenAI's builder, fp32, last logits"
    yield name, _builder(checkpoint, out / name, "fp32", "prune_lm_head=true")


def _builder(checkpoint: Path, out: Path, precision: str, option: str) -> list[str]:
    words = ["-m", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu", "--extra_options", option]
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", *words]


def run_measured(command: list[str]) -> tuple[float, float]:
    """Run a command; returns its seconds, with the start of the interpreter, and its peak resident bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def graph_bytes(folder: Path) -> int:
    """The bytes of a graph and its weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.onnx*") if file.is_file())
