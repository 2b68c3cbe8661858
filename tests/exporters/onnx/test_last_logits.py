"""Tests of graphs that return the last token's logits only, unless `num_logits_to_keep` asks for more."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from console import optimum_cli
from optimum.exporters.streamline import GRAPH_QUANTIZERS, export_checkpoint
from optimum.exporters.streamline.onnx import last_logits
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.exporters.streamline.onnx.runner import OnnxRunner, token_inputs
from optimum.exporters.streamline.rewriting import public_names
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.text.windows import Windows
from tiny import token_ids, wide_model

pytestmark = pytest.mark.onnx

ROWS, LENGTH, WIDTH = 3, 9, 32
LEFT = np.array([[1] * 9, [0] * 3 + [1] * 6, [0] * 8 + [1]])
MASKS = {"no padding": np.ones_like(LEFT), "on the left": LEFT, "on the right": LEFT[:, ::-1]}


@pytest.fixture
def last_only(exported, tmp_path):
    def make(case: str) -> Path:
        folder = tmp_path / case
        shutil.copytree(exported(case).folder, folder)
        last_logits.keep_last_logits(folder, WIDTH)
        return folder

    return make


def nothing(cache, rows: int):
    _, heads, _, size = cache.shape
    return np.empty((rows, heads, 0, size), {"tensor(float)": np.float32, "tensor(float16)": np.float16}[cache.type])


def answer(folder: Path, ids, mask, keep: int | None, past: dict | None = None):
    """The logits and the cache that a plain session returns for tokens after `past`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    inputs = token_inputs(ids, mask) | (past or {value.name: nothing(value, len(ids)) for value in caches})
    if keep is not None:
        inputs["num_logits_to_keep"] = np.array(keep)
    outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))
    cache = {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}
    return outputs["logits"], cache


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "fp16",
        "gpt2",
        "gemma2",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("dead first", "opt")),
    ],
)
def test_what_is_given_is_that_of_the_last_token_of_each_row(exported, last_only, case, padding):
    ids, mask, folder = token_ids(ROWS, LENGTH).numpy(), MASKS[padding], last_only(case)
    every, states = answer(exported(case).folder, ids, mask, None)
    last = LENGTH - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(ROWS)[:, None]
    close = {"rtol": 0, "atol": 1e-5 * np.abs(every).max() if every.dtype == np.float32 else 1e-2}
    found, cache = answer(folder, ids, mask, None)
    np.testing.assert_allclose(found, every[rows, last[:, None]], **close)
    for name, value in states.items():
        np.testing.assert_array_equal(cache[name], value)
    np.testing.assert_allclose(answer(folder, ids, mask, 0)[0], every, **close)
    two = np.maximum(last[:, None] + [-1, 0], 0)
    np.testing.assert_allclose(answer(folder, ids, mask, 2)[0], every[rows, two], **close)
    # Decode one token, and continue with several, after a prompt with all logits and with the last ones only.
    for more in (1, 4):
        after = token_ids(ROWS, more, seed=1).numpy()
        longer = np.concatenate([mask, np.ones((ROWS, more), np.int64)], axis=1)
        expected, _ = answer(exported(case).folder, after, longer, None, states)
        np.testing.assert_allclose(answer(folder, after, longer, None, cache)[0], expected[:, -1:], **close)


@pytest.mark.parametrize("quantizer", ["none", "int8", "int8-static", "int4"])
def test_our_runner_is_given_all_logits_of_any_graph(exported, tmp_path, quantizer):
    ids, every = token_ids(2, 6).numpy(), exported("llama").folder
    if quantizer != "none":
        (tmp_path / "every").mkdir()
        GRAPH_QUANTIZERS[quantizer].run(
            every, tmp_path / "every", Quantization(quantizer, windows=Windows(token_ids(2, 16), "some text"))
        )
        every = tmp_path / "every"
    shutil.copytree(every, tmp_path / "last")
    last_logits.keep_last_logits(tmp_path / "last", WIDTH)
    expected, cache = OnnxRunner(every).prefill(ids)
    found, same = OnnxRunner(tmp_path / "last").prefill(ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    after = OnnxRunner(every).decode(ids, cache)[0]
    np.testing.assert_allclose(OnnxRunner(tmp_path / "last").decode(ids, same)[0], after, atol=1e-5)
    assert answer(tmp_path / "last", ids, np.ones_like(ids), None)[0].shape == (2, 1, expected.shape[2])


def test_the_command_quantizes_first(exported, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported("llama").checkpoint, checkpoint := tmp_path / "checkpoint")  # for its tokenizer
    wide_model(vocab_size=4096).save_pretrained(checkpoint)
    words = ("--quantize", "int4-gptq", "--last-logits", "--samples", "2", "--length", "16")
    words += ("--calibration", "stdlib")
    assert (
        optimum_cli(monkeypatch, capsys, "streamline", "export", "-m", checkpoint, tmp_path / "out", *words).code == 0
    )
    ids = token_ids(2, 6).numpy()
    found, _ = OnnxRunner(tmp_path / "out").prefill(ids)
    last, _ = answer(tmp_path / "out", ids, np.ones_like(ids), None)
    np.testing.assert_allclose(last, found[:, -1:], atol=1e-5)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert "MatMulNBits" in {node.op_type for node in graph.node}
    divergence = Artifact.read(tmp_path / "out").divergence
    assert 0 < max(divergence.values()) < 0.5


def test_the_projection_reads_what_is_kept(last_only):
    graph = onnx.load(last_only("llama") / "model.onnx", load_external_data=False).graph
    producers = {name: node for node in graph.node for name in node.output}
    head = producers["logits"]
    assert (head.op_type, producers[head.input[0]].op_type) == ("MatMul", "GatherND")
    [logits] = [value for value in graph.output if value.name == "logits"]
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1


@pytest.mark.parametrize(("case", "dtype"), [("llama", "fp32"), ("fp16", "fp16")])
def test_what_gives_other_logits_is_not_delivered(exported, tmp_path, monkeypatch, case, dtype):
    right = last_logits._kept_positions

    def one_too_early(graph, builder):
        return builder.add("Sub", right(graph, builder), builder.constant(1))

    monkeypatch.setattr(last_logits, "_kept_positions", one_too_early)
    with pytest.raises(ParityError, match=r"last-logits: with num_logits_to_keep 0 a logit differs from the whole"):
        export_checkpoint(str(exported(case).checkpoint), tmp_path / "out", dtype=dtype, last_logits=True)
    assert not (tmp_path / "out").exists()


def test_no_projection_is_an_error_and_no_export(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(public_names, "MATMUL_OPERATORS", ())
    with pytest.raises(StreamlineError, match=r"last-logits: the graph's output projection was not found"):
        export_checkpoint(str(exported("llama").checkpoint), tmp_path / "out", last_logits=True)
    assert not (tmp_path / "out").exists()
