"""Quantized checkpoints in ONNX: made float, exported, quantized anew if asked, and what that changed measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from console import optimum_cli
from optimum.exporters.streamline import export_checkpoint, open_hidden_states
from optimum.streamline.checkpoint import load, load_stock, load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.quantize import quantize
from optimum.streamline.runner import Artifact, open_runner
from optimum.streamline.scores import measure_scores, scores_of
from optimum.streamline.source import Source
from optimum.streamline.windows import read_windows
from reference import LIBRARY, REFERENCE, VOCABULARY
from tiny import tiny_model, token_ids, wide_model

pytestmark = [pytest.mark.onnx, pytest.mark.quantizers]


def save_quantized(folder: Path, how: str, architecture: str = "llama") -> str:
    depth = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    wide_model(architecture, vocab_size=4096, **{depth: 2}).save_pretrained(folder / "float")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / "float")
    quantize(Source(str(folder / "float")), folder / "quantized", how, say=lambda _: None)
    return str(folder / "quantized")


@pytest.mark.parametrize(
    ("how", "architecture"),
    [("bnb-nf4", "llama"), ("bnb-int8", "llama"), ("torchao-int4", "llama"), ("bnb-nf4", "gpt2")],
)
def test_a_quantized_checkpoint_becomes_a_float_graph(tmp_path: Path, how: str, architecture: str) -> None:
    checkpoint = save_quantized(tmp_path, how, architecture)
    artifact = export_checkpoint(checkpoint, tmp_path / "onnx")
    assert artifact.dequantized == how
    ids = token_ids().numpy()
    found, _ = open_runner(artifact.path).prefill(ids)
    with torch.inference_mode():
        expected = load(checkpoint)(torch.from_numpy(ids)).logits.float().numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    # bitsandbytes' 8-bit products round what they multiply, too; of the others only the weights are rounded.
    assert error < (0.1 if how == "bnb-int8" else 1e-5)
    assert max(artifact.dequantized_error.values()) < (0.1 if how == "bnb-int8" else 1e-5)
    assert Artifact.read(tmp_path / "onnx") == artifact


def test_the_command_says_so_and_quantizes_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = save_quantized(tmp_path, "bnb-nf4")
    words = ("export", "-m", checkpoint, tmp_path / "onnx", "--quantize", "int4")
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    assert "a graph cannot hold bnb-nf4 weights: they were made float numbers again\n" in done.out
    assert "against the weights as bnb-nf4 has them, prefill: " in done.out
    artifact = Artifact.read(tmp_path / "onnx")
    assert (artifact.dequantized, artifact.quantize) == ("bnb-nf4", "int4")
    # Against the float numbers and against the quantized checkpoint: the same weights, so the same error.
    for check, share in artifact.dequantized_error.items():
        assert share == pytest.approx(artifact.divergence[check], rel=1e-3)
        assert share > 0.01


@pytest.mark.parametrize("steps", ["prune,quantize", "quantize,prune"])
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
        StreamlineError, match=r"max-memory 1000000000: the weights of a quantized checkpoint \(bnb-nf4\)"
    ):
        export_checkpoint(checkpoint, tmp_path / "onnx", max_memory=10**9)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "opt"))]
)
def test_hidden_states_of_a_graph_are_those_of_torch(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out")
    states = open_hidden_states(artifact)(token_ids().numpy())
    with torch.inference_mode():
        expected = model(token_ids(), output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for found, right in list(zip(states, expected, strict=True))[:-1]:  # torch's last is normalised
        np.testing.assert_allclose(found, right.numpy(), atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize(("how", "least", "most"), [("int8", 1e-6, 0.01), ("int4", 1e-4, 0.05)])
def test_layers_are_scored_in_a_quantized_graph(tmp_path: Path, how: str, least: float, most: float) -> None:
    windows = read_windows("stdlib", load_tokenizer(Source(REFERENCE)), 4, 64, 0, VOCABULARY, "calibration")
    float_scores = measure_scores(load_stock(Source(REFERENCE), torch.float32), windows).block_influence
    states = open_hidden_states(export_checkpoint(REFERENCE, tmp_path / how, quantize=how))
    scores = scores_of(lambda batch: list(map(torch.from_numpy, states(batch.numpy()))), 16, windows)
    difference = max(map(abs, np.subtract(scores.block_influence, float_scores)))
    assert least <= difference < most


def test_a_graph_whose_layers_are_no_parts_is_not_scored(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out")
    unknown = Artifact(artifact.path, "onnx", "fp32", "", "", {}, ())
    with pytest.raises(StreamlineError, match="its layers are no parts of the graph, so they cannot be scored in it"):
        open_hidden_states(unknown)
