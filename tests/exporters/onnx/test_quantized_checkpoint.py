"""Tests of exporting quantized checkpoints to ONNX: dequantized, exported, quantized again if asked, and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from console import optimum_cli
from optimum.exporters.streamline import export_checkpoint, open_hidden_states
from optimum.streamline.checkpoints.loading import load, load_stock, load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.quantize import quantize
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.scoring.similarity import measure_scores, scores_of
from optimum.streamline.text.windows import read_windows
from reference import LIBRARY, REFERENCE, VOCABULARY
from tiny import tiny_model, token_ids, wide_model

pytestmark = [pytest.mark.onnx, pytest.mark.quantizers]


def save_quantized(folder: Path, quantizer: str, architecture: str = "llama") -> str:
    depth = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    wide_model(architecture, vocab_size=4096, **{depth: 2}).save_pretrained(folder / "float")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / "float")
    quantize(ModelSource(str(folder / "float")), folder / "quantized", quantizer, notify=lambda _: None)
    return str(folder / "quantized")


@pytest.mark.parametrize(
    ("quantizer", "architecture"),
    [
        ("bnb-nf4", "llama"),
        ("bnb-int8", "llama"),
        ("torchao-int4", "llama"),
        pytest.param("bnb-nf4", "gpt2", marks=pytest.mark.slow),  # its linear modules are transposed
    ],
)
def test_a_quantized_checkpoint_becomes_a_float_graph(tmp_path: Path, quantizer: str, architecture: str) -> None:
    checkpoint = save_quantized(tmp_path, quantizer, architecture)
    artifact = export_checkpoint(checkpoint, tmp_path / "onnx")
    assert artifact.dequantized == quantizer
    ids = token_ids().numpy()
    found, _ = open_runner(artifact.path).prefill(ids)
    with torch.inference_mode():
        expected = load(checkpoint)(torch.from_numpy(ids)).logits.float().numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    # bitsandbytes' int8 matmuls round activations too; the other quantizers round weights only.
    assert error < (0.1 if quantizer == "bnb-int8" else 1e-5)
    assert max(artifact.dequantized_error.values()) < (0.1 if quantizer == "bnb-int8" else 1e-5)
    assert Artifact.read(tmp_path / "onnx") == artifact


def test_the_command_says_so_and_quantizes_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = save_quantized(tmp_path, "bnb-nf4")
    words = ("export", "-m", checkpoint, tmp_path / "onnx", "--quantize", "int4")
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    assert "a graph cannot hold bnb-nf4 weights: they were dequantized\n" in done.out
    assert "compared with the bnb-nf4 checkpoint, prefill: " in done.out
    artifact = Artifact.read(tmp_path / "onnx")
    assert (artifact.dequantized, artifact.quantize) == ("bnb-nf4", "int4")
    # The float model and the quantized checkpoint have the same weights, so the errors against both are equal.
    for check, share in artifact.dequantized_error.items():
        assert share == pytest.approx(artifact.divergence[check], rel=1e-3)
        assert share > 0.01


# The other order is fast for a quantized checkpoint, in `test_quantize.py`.
@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("steps", [pytest.param("prune,quantize", marks=pytest.mark.slow), "quantize,prune"])
def test_a_run_quantizes_its_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, steps: str
) -> None:
    wide_model(vocab_size=4096).save_pretrained(tmp_path / "in")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "in")
    few = ("--layers", "1,2") if steps == "prune,quantize" else ("--remove", "2", "--method", "shortgpt")
    few += (
        *LIBRARY["run"],
        "--samples",
        "2",
        "--eval-samples",
        "2",
        "--length",
        "16",
        "--heal",
        "none",
        "--format",
        "onnx",
    )
    flags = ("--quantize", "int4", "--quantize-exclude", "*.[04].mlp.*", "--steps", steps)
    done = optimum_cli(monkeypatch, capsys, "streamline", "run", "-m", tmp_path / "in", tmp_path / "out", *few, *flags)
    assert (done.code, done.err) == (0, "")
    artifact = Artifact.read(tmp_path / "out" / "onnx")
    layers = json.loads((tmp_path / "out" / "streamline.json").read_text())["layers"]
    kept = [each["layer"] for each in layers if {0, 4} & set(each["originals"])]
    names = sorted(f"model.layers.{layer}.mlp.{name}_proj" for layer in kept for name in ("down", "gate", "up"))
    assert (artifact.quantize, sorted(artifact.quantize_exclude)) == ("int4", names)
    assert kept


def test_memory_cannot_be_bounded_where_weights_are_made_float(tmp_path: Path) -> None:
    checkpoint = save_quantized(tmp_path, "bnb-nf4")
    with pytest.raises(
        StreamlineError, match=r"max-memory 1000000000: a quantized checkpoint \(bnb-nf4\) is dequantized in memory"
    ):
        export_checkpoint(checkpoint, tmp_path / "onnx", max_memory=10**9)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2", "opt"))]
)
def test_hidden_states_of_a_graph_are_those_of_torch(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out")
    states = open_hidden_states(artifact)(token_ids().numpy())
    with torch.inference_mode():
        expected = model(token_ids(), output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for found, right in list(zip(states, expected, strict=True))[:-1]:  # torch's last one has the final norm
        np.testing.assert_allclose(found, right.numpy(), atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize(("quantizer", "least", "most"), [("int8", 1e-6, 0.01), ("int4", 1e-4, 0.05)])
def test_layers_are_scored_in_a_quantized_graph(tmp_path: Path, quantizer: str, least: float, most: float) -> None:
    windows = read_windows("stdlib", load_tokenizer(ModelSource(REFERENCE)), 4, 64, 0, VOCABULARY, "calibration")
    float_scores = measure_scores(load_stock(ModelSource(REFERENCE), torch.float32), windows).block_influence
    states = open_hidden_states(export_checkpoint(REFERENCE, tmp_path / quantizer, quantize=quantizer))
    scores = scores_of(lambda batch: list(map(torch.from_numpy, states(batch.numpy()))), 16, windows)
    difference = max(map(abs, np.subtract(scores.block_influence, float_scores)))
    assert least <= difference < most


def test_a_graph_whose_layers_are_no_parts_is_not_scored(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out")
    unknown = Artifact(artifact.path, "onnx", "fp32", "", "", {}, ())
    with pytest.raises(StreamlineError, match="its hidden states cannot be read, the layers are not separable"):
        open_hidden_states(unknown)
