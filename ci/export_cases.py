"""What `ci/bench export` exports, and with whose command: checkpoints, exporters, and what a command takes."""

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
# Layers, width, inner width, heads, key-value heads, vocabulary.
SMALL = (12, 640, 1856, 10, 5, 32_000)
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
    """A random Llama of this shape, with a tokenizer that GenAI's builder asks for; made once."""
    if not folder.exists():
        run_measured([sys.executable, "-c", MAKE, str(folder), dtype, *map(str, shape), str(REFERENCE)])
    return folder


def streamline(*words: object) -> list[str]:
    """The command line of one of our own commands."""
    return [sys.executable, "-c", CLI, "streamline", *map(str, words)]


def commands(checkpoint: Path, out: Path, optimum: str) -> Iterator[tuple[str, list[str]]]:
    """Each exporter's own command line for a checkpoint, and the name under which it goes below `out`."""
    for name, how in (("streamline, fp32", "none"), ("streamline, int4", "int4")):
        yield name, streamline("export", "-m", checkpoint, out / name, "--quantize", how)
    for precision in ("fp32", "int4"):
        name = f"GenAI's builder, {precision}"
        yield name, _builder(checkpoint, out / name, precision, "int4_accuracy_level=4")
    name = "optimum-onnx, fp32"
    other = [optimum, "-c", CLI, "export", "onnx", "--task", "text-generation-with-past"]
    yield name, [*other, "-m", str(checkpoint), str(out / name)]


def last_logits_commands(checkpoint: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """The same for graphs that project the last token only: those of the exporters that have a choice."""
    name = "streamline, fp32, last logits"
    yield name, streamline("export", "-m", checkpoint, out / name, "--last-logits")
    name = "GenAI's builder, fp32, last logits"
    yield name, _builder(checkpoint, out / name, "fp32", "prune_lm_head=true")


def _builder(checkpoint: Path, out: Path, precision: str, option: str) -> list[str]:
    words = ["-m", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu", "--extra_options", option]
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", *words]


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


def graph_bytes(folder: Path) -> int:
    """Bytes of a graph and its weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.onnx*") if file.is_file())
