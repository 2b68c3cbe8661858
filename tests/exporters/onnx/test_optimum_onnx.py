"""Tests that optimum-onnx, which needs transformers 4, exports a pruned checkpoint correctly."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenizer_seen
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from reference import REFERENCE
from tiny import LAYERS, tiny_model, token_ids

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

CLI = "from optimum.commands.optimum_cli import main; main()"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def exported_logits(interpreter: str, checkpoint: Path, out: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of a prompt from the graph that optimum-onnx exports from a checkpoint."""
    words = ["export", "onnx", "--task", "text-generation-with-past", "-m", str(checkpoint), str(out)]
    subprocess.run([interpreter, "-c", CLI, *words], check=True, capture_output=True)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    rows, length = ids.shape
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    heads, size = config.num_key_value_heads, config.head_dim
    past = np.zeros((rows, heads, 0, size), np.float32)
    positions = np.tile(np.arange(length), (rows, 1))
    named = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    feeds = {value.name: named.get(value.name, past) for value in session.get_inputs()}
    return session.run(["logits"], feeds)[0]


def expected_logits(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_the_pruned_reference_model(pruned_reference, optimum_onnx: str, tmp_path: Path) -> None:
    ids = token_ids(2, 60).numpy()
    got = exported_logits(optimum_onnx, pruned_reference.checkpoint, tmp_path / "onnx", ids)
    expected = expected_logits(pruned_reference.checkpoint, ids)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_the_tokenizers_of_a_checkpoint_and_of_its_export(pruned_reference, optimum_onnx: str) -> None:
    folders = [str(pruned_reference.checkpoint), str(pruned_reference.folder)]
    words = [optimum_onnx, tokenizer_seen.__file__, *folders]
    older = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    expected = tokenizer_seen.seen(REFERENCE)
    assert [older[folder] for folder in folders] == [expected, expected]


def test_a_model_whose_rotary_embeddings_are_scaled(optimum_onnx: str, tmp_path: Path) -> None:
    model = tiny_model(rope_parameters={"rope_type": "llama3", "rope_theta": 50_000.0, **LLAMA3})
    apply_plan(model, Plan(LAYERS, (1, 3)), None)
    save_model(model, AutoTokenizer.from_pretrained(REFERENCE), torch.float32, tmp_path / "checkpoint")
    ids = token_ids(2, 40).numpy()
    got = exported_logits(optimum_onnx, tmp_path / "checkpoint", tmp_path / "onnx", ids)
    expected = expected_logits(tmp_path / "checkpoint", ids)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
