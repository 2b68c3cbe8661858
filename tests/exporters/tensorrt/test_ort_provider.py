"""Tests of ONNX Runtime's TensorRT provider: the converted graph, the shapes and the options; on a GPU also a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from optimum.exporters.streamline import EngineOptions, export_checkpoint
from optimum.exporters.streamline.onnx.runner import OnnxRunner
from optimum.exporters.streamline.parity.compare import check_parity
from optimum.exporters.streamline.parity.model_calls import answer_with
from optimum.exporters.streamline.tensorrt.build_engine import build_engine, open_builder
from optimum.exporters.streamline.tensorrt.graph.growing_cache import write_growing_graph
from optimum.exporters.streamline.tensorrt.ort_provider import PROVIDER, TensorrtProviderRunner, growing_profile
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.opening import open_runner
from tiny import tiny_model, token_ids

pytestmark = pytest.mark.onnx

OPTIONS = EngineOptions(max_batch=4, max_length=32, max_input=16)
# With and without rotary embeddings, grouped-query heads, and sliding windows.
ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma2"]


def exported(folder: Path, architecture: str, dtype: str = "fp32", **options: Any) -> Path:
    tiny_model(architecture).save_pretrained(folder / "checkpoint")
    return Path(export_checkpoint(str(folder / "checkpoint"), folder / "onnx", dtype=dtype, **options).path)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES[:3], pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_graph_with_appending_outside_computes_the_same(tmp_path: Path, architecture: str) -> None:
    folder = exported(tmp_path, architecture)
    graph = write_growing_graph(folder)
    nodes = onnx.load(graph, load_external_data=False).graph.node
    assert {len(node.output) for node in nodes if node.op_type == "Attention"} <= {1}
    assert not [node for node in nodes if node.op_type == "Attention" and len(node.input) > 4]
    onnx.checker.check_model(str(graph))

    def opened(folder: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    model = load(str(tmp_path / "checkpoint"), torch.float32)
    assert max(check_parity(model, answer_with(OnnxRunner(folder, open=opened)), 1e-4).values()) > 0
    assert graph.stat().st_size < (folder / "model.onnx.data").stat().st_size  # it uses that weight file


class Session:
    """An ONNX Runtime session on the CPU that pretends to use the TensorRT provider."""

    opened: dict[str, str]

    def __init__(self, graph: str, providers: list[Any]) -> None:
        (name, Session.opened), cuda = providers
        assert (name, cuda) == (PROVIDER, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        self._session = _SESSION(graph, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]


_SESSION = onnxruntime.InferenceSession


def opened_as_if_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> TensorrtProviderRunner:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return TensorrtProviderRunner(folder, OPTIONS, "cpu")


def test_every_request_is_within_the_shapes_that_engines_are_built_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = exported(tmp_path, "llama")
    runner = opened_as_if_there(monkeypatch, folder)
    model = load(str(tmp_path / "checkpoint"), torch.float32)
    assert len(check_parity(model, answer_with(runner), 1e-4)) == 5
    options = Session.opened
    ranges = [options[f"trt_profile_{kind}_shapes"] for kind in ("min", "opt", "max")]
    names = [each.name for each in runner.session.get_inputs()]
    assert [[part.partition(":")[0] for part in each.split(",")] for each in ranges] == [names] * 3
    least, _, most = (dict(part.split(":") for part in each.split(",")) for each in ranges)
    assert (least["past_key_values.0.key"], most["past_key_values.0.key"]) == ("1x2x0x8", "4x2x32x8")
    # The provider requires that the largest past and new lengths add up to the largest total length.
    assert (most["input_ids"], most["attention_mask"]) == ("4x16", "4x48")
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder / "engines")
    assert not [name for name in options if "16" in name]
    for shape, said in (((5, 1), "axis 0 is 5, not from 1 to 4"), ((1, 17), "axis 1 is 17, not from 1 to 16")):
        with pytest.raises(StreamlineError, match=rf"input input_ids \[{shape[0]}, {shape[1]}\]: {said}"):
            runner.prefill(np.ones(shape, np.int64))


def test_half_precision_is_asked_for_where_the_graph_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = opened_as_if_there(monkeypatch, exported(tmp_path, "llama", "fp16"))
    assert {name: value for name, value in Session.opened.items() if "16" in name} == {"trt_fp16_enable": "1"}
    assert runner.runtime == "onnxruntime-tensorrt"


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("llama", {"quantize": "int4"}, "has operators that TensorRT is not known to take (MatMulNBits, Skip"),
        ("llama", {"quantize": "int8"}, "has operators that TensorRT is not known to take (DynamicQuantizeLinear"),
        ("mixtral", {}, "has operators that TensorRT is not known to take (Clip, CumSum, "),
        ("llama", {"last_logits": True}, "gives the last logits only; export it without last-logits for TensorRT"),
    ],
)
def test_graphs_that_are_not_for_it_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, options: dict[str, Any], said: str
) -> None:
    folder = exported(tmp_path, architecture, **options)
    with pytest.raises(StreamlineError, match=re.escape(said)):
        opened_as_if_there(monkeypatch, folder)


def test_without_the_provider_it_says_so(tmp_path: Path) -> None:
    folder = exported(tmp_path, "llama")
    with pytest.raises(StreamlineError, match="TensorrtExecutionProvider: the installed ONNX Runtime has none"):
        open_runner(str(folder), device="cuda", tensorrt=OPTIONS)
    with pytest.raises(StreamlineError, match="device 'cpu': TensorRT runs on a GPU; give device 'cuda'"):
        open_runner(str(folder), tensorrt=OPTIONS)
    with pytest.raises(StreamlineError, match="is a checkpoint; export it to ONNX or TensorRT first"):
        open_runner(str(tmp_path / "checkpoint"), device="cuda", tensorrt=OPTIONS)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "fp16"), ("gpt2", "fp32"), ("qwen2", "fp32"), pytest.param("gemma2", "fp32", marks=pytest.mark.slow)]
    + [pytest.param(name, "fp16", marks=pytest.mark.slow) for name in ARCHITECTURES[1:]],
)
def test_tensorrt_takes_the_graph_whole_within_these_shapes(tmp_path: Path, architecture: str, dtype: str) -> None:
    """TensorRT-RTX builds an engine from the graph without a GPU, which fails if it refuses any node."""
    folder = exported(tmp_path, architecture, dtype)
    graph = write_growing_graph(folder)
    inputs = _SESSION(str(graph), providers=["CPUExecutionProvider"]).get_inputs()
    profile = growing_profile({each.name: tuple(each.shape) for each in inputs}, OPTIONS.limits(64))
    trt = open_builder("tensorrt-rtx", (89,))
    assert build_engine(trt, graph, tmp_path / "engine", (profile,), (89,), None).layers > 0
    assert (tmp_path / "engine").stat().st_size > 10**6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_is_built_once_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    folder = exported(tmp_path, "llama", dtype)
    model = load(str(tmp_path / "checkpoint"), torch.float32)

    def engines() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (folder / "engines").glob("*.engine")}

    runner = open_runner(str(folder), device="cuda", tensorrt=OPTIONS)
    check_parity(model, answer_with(runner), {"fp32": 1e-3, "fp16": 2e-2}[dtype])
    built = engines()
    assert len(built) == 1
    _, cache = runner.prefill(token_ids(2, 7).numpy())
    for _ in range(8):
        _, cache = runner.decode(np.ones((2, 1), np.int64), cache)
    again = open_runner(str(folder), device="cuda", tensorrt=OPTIONS)
    again.prefill(token_ids(1, 16).numpy())
    assert engines() == built
