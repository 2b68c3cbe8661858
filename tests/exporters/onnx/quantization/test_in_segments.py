"""A graph that is quantized a few layers at a time is the graph that is quantized as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization.neural_compressor import onnx_model

from optimum.exporters.streamline import GRAPH_QUANTIZERS, export_checkpoint
from optimum.exporters.streamline.onnx.quantization import in_segments, int4
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.exporters.streamline.onnx.runner import OnnxRunner, open_session
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, mark_skipped, zero_output
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


def nodes(folder: Path) -> list[tuple[Any, ...]]:
    """The name of each node, and what it does: its operator, attributes, inputs and outputs; in the order of names."""
    found = [
        (
            str(node.name),
            node.op_type,
            {name: attribute.value for name, attribute in node.attributes.items()},
            [value and value.name for value in node.inputs],
            [value.name for value in node.outputs],
        )
        for node in ir.load(folder / "model.onnx").graph
    ]
    return sorted(found, key=lambda each: each[0])


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
    ("architecture", "quantizer", "fields", "exclude"),
    [
        ("llama", "int8", {}, ()),
        ("llama", "int8-static", {}, ("lm_head", "2")),
        ("qwen3", "int4-gptq", {}, ()),
        ("llama", "int4-gptq", {"tie_word_embeddings": True}, ("2",)),  # two segments without a product to quantize
        ("gpt2", "int8-static", {}, ("*.c_proj",)),
    ],
)
def test_layer_by_layer_gives_the_same_graph_as_all_at_once(
    architecture: str,
    quantizer: str,
    fields: dict[str, Any],
    exclude: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights_at_once: list[int],
) -> None:
    wide_model(architecture, **fields).save_pretrained(tmp_path / "in")
    plain = export_checkpoint(str(tmp_path / "in"), tmp_path / "plain")
    monkeypatch.setattr(in_segments, "SEGMENT", 0)
    whole, parts = Quantization(quantizer, exclude, TEXT), Quantization(quantizer, exclude, TEXT, plain.hidden[1:])
    for name, how in (("whole", whole), ("parts", parts)):
        (tmp_path / name).mkdir()
        GRAPH_QUANTIZERS[quantizer].run(tmp_path / "plain", tmp_path / name, how)
    assert len(weights_at_once) == 1 + (LAYERS + 1)
    assert max(weights_at_once[1:]) < weights_at_once[0] / 2
    assert nodes(tmp_path / "parts") == nodes(tmp_path / "whole")
    assert_alike(tmp_path / "parts", tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("quantizer", ["int8", "int8-static"])
def test_layers_with_zeros_are_quantized_in_segments_too(
    quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, skipped = wide_model(), {1: [ATTENTION], 2: [ATTENTION, MLP]}
    row = architecture_of(model.config)
    for index, sublayers in skipped.items():
        for sublayer in sublayers:
            zero_output(decoder_layers(model, row)[index], row, sublayer)
    mark_skipped(model.config, skipped)
    model.save_pretrained(tmp_path / "in")
    for name, most in (("whole", 2**40), ("parts", 0)):
        monkeypatch.setattr(in_segments, "SEGMENT", most)
        export_checkpoint(str(tmp_path / "in"), tmp_path / name, quantize=quantizer, windows=TEXT)
    assert_alike(tmp_path / "parts", tmp_path / "whole")


def test_calibration_text_is_not_run_where_it_is_not_needed(
    tmp_path: Path, exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_segments, "calibration_inputs", lambda *_: pytest.fail("reads the text"))
    GRAPH_QUANTIZERS["int8"].run(exported("llama").folder, tmp_path, Quantization("int8", (), TEXT))
    assert (tmp_path / "model.onnx").is_file()


def part_with(weight: float, scale: float, reads: str, gives: str) -> ir.Model:
    """A part of a graph that multiplies by `weight` and by `scale`, with the same names in each part."""
    text = (
        f"<ir_version: 10, opset_import: ['' : 18]> part (float[2] {reads}) => (float[2] {gives})"
        f"<float[1] same = {{{weight}}}, float[1] other = {{{scale}}}>"
        f"{{ inner = Mul({reads}, same)\n {gives} = Mul(inner, other) }}".replace("'", '"')
    )
    proto = onnx.parser.parse_model(text)
    for node, name in zip(proto.graph.node, ("first", "second"), strict=True):
        node.name = name
    return ir.from_proto(proto)


def test_names_that_two_parts_share_are_told_apart(tmp_path: Path) -> None:
    whole = part_with(1, 1, "x", "y")
    parts = [part_with(2, 3, "x", "between"), part_with(2, 5, "between", "y")]
    joined = in_segments._joined(whole, parts)
    assert len({node.name for node in joined.graph}) == 4
    assert sorted(joined.graph.initializers) == ["other", "other.1", "same"]
    ir.save(joined, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", "cpu")
    [result] = session.run(["y"], {"x": np.array([1, 10], np.float32)})
    assert result.tolist() == [60, 600]


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
    settings = Quantization("int8", windows=TEXT)
    asked = []

    def quantizer(source: Path, target: Path, inputs: Any) -> None:
        asked.extend(inputs)
        target.write_bytes(source.read_bytes())
        source.with_name("model.onnx.data").rename(target.with_name("model.onnx.data"))

    result = in_segments.quantize_in_segments(model, settings, tmp_path, quantizer)
    assert len(weights_at_once) == 1
    assert [call["input_ids"].tolist() for call in asked] == TEXT.ids[:, None].tolist()
    assert [value.name for value in result.graph.outputs] == [value.name for value in model.graph.outputs]
