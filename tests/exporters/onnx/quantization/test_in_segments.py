"""A graph that is quantized a few layers at a time is the graph that is quantized as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization.neural_compressor import onnx_model

from optimum.exporters.streamline import export_checkpoint
from optimum.exporters.streamline.onnx.quantization import in_segments, int4
from optimum.exporters.streamline.onnx.runner import OnnxRunner
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, token_ids, wide_model

pytestmark = pytest.mark.onnx
TEXT = Windows(token_ids(3, 16), "some text")


@pytest.fixture
def weights_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of weights of each graph that a quantizer gets."""
    found, quantized = list[int](), in_segments._quantized

    def counted(model: ir.Model, *others: Any) -> ir.Model:
        found.append(sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value))
        return quantized(model, *others)

    monkeypatch.setattr(in_segments, "_quantized", counted)
    return found


def nodes(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What each node does: its operator, attributes, inputs and outputs, by its name."""
    return {
        str(node.name): (
            node.op_type,
            {name: attribute.value for name, attribute in node.attributes.items()},
            [value and value.name for value in node.inputs],
            [value.name for value in node.outputs],
        )
        for node in ir.load(folder / "model.onnx").graph
    }


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    graph = ir.load(folder / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}


def assert_alike(folder: Path, other: Path) -> None:
    """Two graphs have the same weights, and scales that differ by rounding at most."""
    expected, found = weights(other), weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    ids = token_ids(2, 9).numpy()
    logits, of_other = OnnxRunner(folder).prefill(ids)[0], OnnxRunner(other).prefill(ids)[0]
    np.testing.assert_allclose(logits, of_other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "quantizer"),
    [("llama", "int8"), ("llama", "int8-static"), ("qwen3", "int4-gptq"), ("gpt2", "int8-static")],
)
def test_layer_by_layer_gives_the_same_graph_as_all_at_once(
    architecture: str,
    quantizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights_at_once: list[int],
) -> None:
    wide_model(architecture).save_pretrained(tmp_path / "in")

    def export(name: str, most: int) -> Artifact:
        monkeypatch.setattr(in_segments, "SEGMENT", most)
        weights_at_once.clear()
        return export_checkpoint(str(tmp_path / "in"), tmp_path / name, quantize=quantizer, windows=TEXT)

    export("whole", 2**40)
    [whole] = weights_at_once
    export("parts", 0)
    assert len(weights_at_once) == LAYERS + 1
    assert max(weights_at_once) < whole / 2
    assert nodes(tmp_path / "parts") == nodes(tmp_path / "whole")
    assert_alike(tmp_path / "parts", tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )


def test_gptq_takes_a_segment_of_more_than_2_gb_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide_model().save_pretrained(tmp_path / "in")
    options = {"quantize": "int4-gptq", "windows": TEXT}
    export_checkpoint(str(tmp_path / "in"), tmp_path / "small", **options)
    for module in (int4, onnx_model):
        monkeypatch.setattr(module, "MAXIMUM_PROTOBUF", 10_000)  # in place of 2 GB
    export_checkpoint(str(tmp_path / "in"), tmp_path / "large", **options)
    assert nodes(tmp_path / "large") == nodes(tmp_path / "small")
    assert_alike(tmp_path / "large", tmp_path / "small")


def test_a_graph_that_cannot_be_cut_is_quantized_whole(
    tmp_path: Path, exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, weights_at_once: list[int]
) -> None:
    monkeypatch.setattr(in_segments, "SEGMENT", 0)
    model = ir.load(exported("llama").folder / "model.onnx")
    settings = in_segments.Quantization("int8", windows=TEXT)
    asked = []

    def quantizer(source: Path, target: Path, inputs: Any) -> None:
        asked.extend(inputs)
        target.write_bytes(source.read_bytes())
        source.with_name("model.onnx.data").rename(target.with_name("model.onnx.data"))

    result = in_segments.quantize_in_segments(model, settings, tmp_path, quantizer)
    assert len(weights_at_once) == 1
    assert [call["input_ids"].tolist() for call in asked] == TEXT.ids[:, None].tolist()
    assert [value.name for value in result.graph.outputs] == [value.name for value in model.graph.outputs]
