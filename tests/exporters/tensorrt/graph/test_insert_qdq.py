"""Tests of quantized engines: the loss of their graphs, the types of their weights, and refused options."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from optimum.exporters.streamline import ENGINE_QUANTIZERS, EngineOptions, export_checkpoint
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.exporters.streamline.onnx.segmented_runner import SegmentedRunner
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.exporters.streamline.tensorrt import export
from optimum.exporters.streamline.tensorrt.engine_record import EngineRecord
from optimum.exporters.streamline.tensorrt.graph import insert_qdq
from optimum.exporters.streamline.tensorrt.graph.insert_qdq import quantize_engine_graph
from optimum.exporters.streamline.tensorrt.graph.reference_runner import StaticInputs, StaticOnnxRunner
from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.contamination import refuse_seen_text
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from stand_in import parse_only
from tiny import LAYERS, tiny_model, token_ids, wide_model

pytestmark = [pytest.mark.onnx, pytest.mark.tensorrt]

RTX = EngineOptions("tensorrt-rtx", (89, 120), max_length=128)
RTX_SHORT = EngineOptions("tensorrt-rtx", (89,), max_length=32)  # for tiny models
KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
# The largest perplexity ratio over the float graph. Measured on 16 windows: 1.004, 1.006, 1.033.
LIMITS = {"int8": 1.012, "fp8": 1.015, "int4": 1.05}
MATMULS = 16 * 7  # of the reference model, without its output projection, which is tied to the embedding


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """A function that exports the reference model for an engine with a quantizer, or with `none`, and builds none."""

    @cache
    def make(quantizer: str) -> Artifact:
        options: dict[str, Any] = {"engine": RTX, "quantize": quantizer, "windows": text("calibration", 8)}
        folder = tmp_path_factory.mktemp(quantizer) / "engine"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("optimum.exporters.streamline.tensorrt.export.build_engine", parse_only)
            return export_checkpoint(REFERENCE, folder, "tensorrt", "fp32", **options)

    return make


def text(part: str, count: int) -> Windows:
    return read_windows("stdlib", load_tokenizer(ModelSource(REFERENCE)), count, 128, 0, VOCABULARY, part)


def loss(artifact: Artifact) -> float:
    runner, losses = StaticOnnxRunner(Path(artifact.path), EngineRecord.read(Path(artifact.path)).masks), []
    for window in text("eval", 16).ids.numpy():
        logits, _ = runner.prefill(window[None])
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]), torch.from_numpy(window[1:])))
    return float(torch.stack(losses).mean())


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(Path(artifact.path) / "model.onnx").graph


@pytest.mark.parametrize("quantizer", ENGINE_QUANTIZERS)
def test_a_quantized_engine_keeps_the_function(engines: Callable[..., Artifact], quantizer: str) -> None:
    plain, small = engines("none"), engines(quantizer)
    assert 1e-4 < abs(loss(small) - loss(plain)) < math.log(LIMITS[quantizer])
    assert list(small.divergence) == list(small.parity)
    assert all(0 < share < 0.3 for share in small.divergence.values())
    assert all(difference < 1e-4 for difference in small.parity.values())  # of the graph before it was quantized
    assert (small.quantize, Artifact.read(Path(small.path))) == (quantizer, small)
    graph = graph_of(small)
    held = Counter(each.data_type for each in graph.initializer if math.prod(each.dims) > 1000)
    assert held[KINDS[quantizer]] == MATMULS
    operators = Counter(node.op_type for node in graph.node)
    # Queries, keys and values read the same activation, as do gate and up; each activation is quantized once.
    assert operators["QuantizeLinear"] == (16 * 4 if ENGINE_QUANTIZERS[quantizer].calibrated else 0)
    assert {node.domain for node in graph.node} == {""}
    bits = {"int8": 8, "fp8": 8, "int4": 4 + 32 / 64}[quantizer]  # a scale in 32 bits for 64 weights
    head = 4096 * 128 * 4
    assert small.weight_bytes == pytest.approx((3.67e6 - 4096 * 128) * bits / 8 + head, rel=0.03)


@pytest.mark.parametrize("quantizer", ENGINE_QUANTIZERS)
def test_every_weight_is_the_nearest_that_its_scale_allows(engines: Callable[..., Artifact], quantizer: str) -> None:
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph_of(engines(quantizer)).initializer}
    true = {each.name: onnx.numpy_helper.to_array(each) for each in graph_of(engines("none")).initializer}
    checked = 0
    for name in [name.removesuffix("_quantized") for name in arrays if name.endswith("_quantized")]:
        numbers, scale = (arrays[f"{name}_{part}"].astype(np.float32) for part in ("quantized", "scale"))
        steps = np.repeat(scale, len(numbers) // len(scale), axis=0) if scale.ndim == 2 else scale
        # A float with a 3-bit mantissa is rounded by at most a sixteenth of itself, or half the smallest step, 1/512.
        allowed = np.maximum(abs(numbers) / 16, 1 / 1024) if quantizer == "fp8" else 0.5
        assert (abs(numbers * steps - true[name]) <= (allowed + 1e-3) * steps).all(), name
        assert abs(numbers).max() == ENGINE_QUANTIZERS[quantizer].largest
        checked += 1
    assert checked == MATMULS


def test_what_is_excluded_stays_float(engines: Callable[..., Artifact], tmp_path: Path) -> None:
    plain = Path(engines("none").path)
    quantization = Quantization("int4", exclude=("0", "15", "*.v_proj"))
    quantize_engine_graph(plain, tmp_path, quantization, EngineRecord.read(plain).masks)
    graph = onnx.load(tmp_path / "model.onnx").graph
    held = Counter(each.data_type for each in graph.initializer if math.prod(each.dims) > 1000)
    assert held[TensorProto.INT4] == MATMULS - 2 * 7 - 14


@pytest.mark.parametrize("quantizer", ["int8", "fp8"])
def test_scales_are_of_the_text(engines: Callable[..., Artifact], quantizer: str) -> None:
    """The scale maps the activation's largest number on the text to the largest value of the 8-bit type."""
    plain = Path(engines("none").path)
    graph = onnx.load(plain / "model.onnx")
    read = next(node for node in graph.graph.node if node.name.startswith("model.layers.3.mlp.down_proj")).input[0]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(read))
    onnx.save(graph, plain / "with_inner.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(plain / "with_inner.onnx"))
    inputs = StaticInputs.of_model(ir.load(plain / "model.onnx"), EngineRecord.read(plain).masks)
    past = [each for each in session.get_inputs() if "past_key_values" in each.name]
    empty = {each.name: np.zeros((1, *each.shape[1:]), np.float32) for each in past}
    largest = 0.0
    for window in text("calibration", 8).ids.numpy():
        prompt = inputs.of(Call(window[None], np.ones_like(window[None])))
        largest = max(largest, np.abs(session.run([read], prompt | empty)[0]).max())
    [scale] = [each for each in graph_of(engines(quantizer)).initializer if each.name == f"{read}_scale"]
    assert onnx.numpy_helper.to_array(scale) * ENGINE_QUANTIZERS[quantizer].largest == pytest.approx(largest, rel=1e-4)


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of each graph that is run in parts in the test; there is no memory for a whole one."""
    counts = []

    class Counted(SegmentedRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            counts.append(len(self.segments))

    for module in (insert_qdq, export):
        monkeypatch.setattr(module, "SegmentedRunner", Counted)
    monkeypatch.setattr(insert_qdq, "SEGMENT", 1)
    monkeypatch.setattr(export, "free_memory", lambda: 0)
    monkeypatch.setattr(export, "build_engine", parse_only)
    return counts


def test_an_engine_is_quantized_alike_in_little_memory(
    engines: Callable[..., Artifact], tmp_path: Path, segments: list[int]
) -> None:
    plenty, options = engines("int8"), {"engine": RTX, "quantize": "int8", "windows": text("calibration", 8)}
    little = export_checkpoint(REFERENCE, tmp_path / "engine", "tensorrt", "fp32", **options)
    assert segments == [16 + 1] * 3  # compared with torch, calibrated, and compared again
    for name in ("model.onnx", "model.onnx.data"):
        assert (Path(little.path) / name).read_bytes() == (Path(plenty.path) / name).read_bytes()
    assert little.divergence == pytest.approx(plenty.divergence, rel=1e-3)
    for check, difference in plenty.parity.items():
        assert 0 < little.parity[check] < 3 * difference


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])  # biases split from products, and two masks
def test_every_layer_may_be_a_part(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(export, "build_engine", parse_only)
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    options = {"engine": RTX_SHORT, "quantize": "int8", "windows": Windows(token_ids(4, 32), "random")}
    plenty = export_checkpoint(str(tmp_path / "model"), tmp_path / "plenty", "tensorrt", "fp32", **options)
    counts = request.getfixturevalue("segments")
    little = export_checkpoint(str(tmp_path / "model"), tmp_path / "little", "tensorrt", "fp32", **options)
    assert counts == [LAYERS + 1] * 3
    for name in ("model.onnx", "model.onnx.data"):
        assert (Path(little.path) / name).read_bytes() == (Path(plenty.path) / name).read_bytes()
    for check, difference in plenty.parity.items():
        assert 0 < little.parity[check] < 4 * difference
    assert little.divergence == pytest.approx(plenty.divergence, rel=1e-3)


def test_in_bf16_the_graph_is_compared_with_rounded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "build_engine", parse_only)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")  # in float32
    rounded = export_checkpoint(str(tmp_path / "model"), tmp_path / "bf16", "tensorrt", "bf16", engine=RTX_SHORT)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow = export_checkpoint(str(tmp_path / "narrow"), tmp_path / "same", "tensorrt", "bf16", engine=RTX_SHORT)
    assert rounded.parity == pytest.approx(narrow.parity, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_graph_in_half_precision_is_judged_alike_in_little_memory(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(export, "build_engine", parse_only)
    plenty = export_checkpoint(REFERENCE, tmp_path / "plenty", "tensorrt", dtype, engine=RTX)
    counts = request.getfixturevalue("segments")
    little = export_checkpoint(REFERENCE, tmp_path / "little", "tensorrt", dtype, engine=RTX)
    assert counts == [16 + 1]
    for check, difference in plenty.parity.items():
        assert 0 < little.parity[check] < 3 * difference


# One is fast. int8 in fp16 is fast in `test_export.py`, and fp8 in the test before.
FAST = {("int4", "fp32")}


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in product(ENGINE_QUANTIZERS, ("fp32", "fp16", "bf16"))
    ],
)
def test_every_way_is_built_in_every_dtype(tmp_path: Path, quantizer: str, dtype: str) -> None:
    wide_model("gpt2", n_layer=2, vocab_size=4096).save_pretrained(tmp_path / "in")  # gpt2 has biases
    options = EngineOptions("tensorrt-rtx", (89,), max_length=32)
    windows = Windows(token_ids(2, 32), "random") if ENGINE_QUANTIZERS[quantizer].calibrated else None
    artifact = export_checkpoint(
        str(tmp_path / "in"), tmp_path / "out", "tensorrt", dtype, engine=options, quantize=quantizer, windows=windows
    )
    assert (tmp_path / "out" / "model.engine").stat().st_size > 10**6
    assert max(artifact.divergence.values()) < 1
    kinds = {each.data_type for each in graph_of(artifact).initializer}
    assert KINDS[quantizer] in kinds


def test_blocks_that_are_not_whole_are_refused_before_a_build(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "in")
    with pytest.raises(StreamlineError, match="has an input width of 32, no multiple of the block size 64"):
        export_checkpoint(str(tmp_path / "in"), tmp_path / "out", "tensorrt", engine=RTX_SHORT, quantize="int4")
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_calibration_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="windows None: quantize 'int8' needs calibration text"):
        export_checkpoint(REFERENCE, tmp_path / "out", "tensorrt", engine=RTX_SHORT, quantize="int8")


def test_what_it_was_calibrated_on_is_not_what_it_is_judged_on(engines: Callable[..., Artifact]) -> None:
    with pytest.raises(StreamlineError, match="calibration|quantization|same text|stands in"):
        refuse_seen_text(engines("int8").path, text("calibration", 8))


@pytest.mark.gpu
@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("quantizer", ENGINE_QUANTIZERS)
def test_a_quantized_engine_computes_its_graph_on_a_gpu(tmp_path: Path, quantizer: str, builder: str) -> None:
    windows = text("calibration", 8)
    options: dict[str, Any] = {
        "engine": EngineOptions(builder, max_length=128),
        "quantize": quantizer,
        "windows": windows,
    }
    artifact = export_checkpoint(REFERENCE, tmp_path / "out", "tensorrt", "fp16", **options)
    ids = text("eval", 1).ids[:, :64].numpy()
    runner: Any = open_runner(artifact.path, device="cuda")
    found, cache = runner.prefill(ids[:, :63])
    last, _ = runner.decode(ids[:, 63:], cache)
    masks = EngineRecord.read(tmp_path / "out").masks
    expected, _ = StaticOnnxRunner(tmp_path / "out", masks).prefill(ids)
    logits = np.concatenate([found, last], axis=1)
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.9
