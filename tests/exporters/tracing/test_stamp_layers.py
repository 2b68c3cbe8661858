"""Tests of stamping: copying a few traced layers to the whole graph, and refusing layers that cannot be copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum.exporters.streamline import export_checkpoint, graph_files
from optimum.exporters.streamline.onnx import export, segmented_runner
from optimum.exporters.streamline.onnx.runner import OnnxRunner
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.exporters.streamline.rewriting import prune_unused
from optimum.exporters.streamline.tracing import build, skeleton, stamp_layers
from optimum.exporters.streamline.tracing.stamp_layers import CannotStampError, LayerMap
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, mark_skipped, zero_output
from optimum.streamline.runtime.runner import Logits
from tiny import LAYERS, tiny_model, token_ids

pytestmark = pytest.mark.onnx


def saved(
    folder: Path, architecture: str = "llama", skipped: tuple[tuple[int, str], ...] = (), **fields: object
) -> str:
    model = tiny_model(architecture, **fields)
    row, marks = architecture_of(model.config), {}
    for index, sublayer in skipped:
        zero_output(decoder_layers(model, row)[index], row, sublayer)
        marks.setdefault(index, []).append(sublayer)
    mark_skipped(model.config, marks)
    model.save_pretrained(folder)
    return str(folder)


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("skipped", "traced"),
    [
        pytest.param([(3, ATTENTION), (5, ATTENTION)], (0, 1, 3), marks=pytest.mark.slow),
        ([(0, ATTENTION), (4, ATTENTION), (2, MLP), (6, MLP)], (0, 1, 2, 4)),
        pytest.param([(2, ATTENTION), (2, MLP), (6, ATTENTION), (6, MLP)], (0, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_layers_with_dead_sublayers_are_kinds_of_their_own(
    skipped: list[tuple[int, str]], traced: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path / "checkpoint", skipped=tuple(skipped), num_hidden_layers=8)
    artifact = export_checkpoint(checkpoint, tmp_path / "onnx")
    assert (artifact.traced_layers, artifact.whole_because) == (traced, "")
    attentions, mlps = (8 - sum(sublayer == which for _, sublayer in skipped) for which in (ATTENTION, MLP))
    found = operators(tmp_path / "onnx")
    assert found["Attention"] == attentions
    assert found["MatMul"] == 4 * attentions + 3 * mlps + 1
    # The logits equal stock transformers', which computes the skipped sublayers' zeros.
    ids = token_ids().numpy()
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        expected = stock(torch.from_numpy(ids)).logits.numpy()
    got, _ = OnnxRunner(tmp_path / "onnx").prefill(ids)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# As many as rows, past or new tokens, and all tokens, of the trace. The fast exports have 2 heads in a cache, or 4.
@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 3, 4, 5])
def test_a_number_of_heads_freezes_no_length(heads: int, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 8 * heads, "head_dim": 8}
    artifact = export_checkpoint(saved(tmp_path / "checkpoint", num_hidden_layers=3, **sizes), tmp_path / "onnx")
    assert artifact.whole_because == ""


def test_what_all_layers_share_is_computed_once(tmp_path: Path) -> None:
    export_checkpoint(saved(tmp_path / "checkpoint"), tmp_path / "onnx")
    found = operators(tmp_path / "onnx")
    assert (found["Cos"], found["Sin"], found["RotaryEmbedding"]) == (1, 1, 2 * LAYERS)


FEW = 3  # of which two are traced and one is stamped out


@cache
def whole_and_stamped(folder: Path) -> tuple[ir.Model, ir.Model]:
    model = load(saved(folder / "checkpoint", num_hidden_layers=FEW), torch.float32, offload=folder / "offload")
    every, few = range(FEW), skeleton.layers_to_trace(model)
    return build.build_graph(model, every).model, build.build_graph(model, few).model


def test_a_stamped_graph_is_the_traced_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    whole, stamped = whole_and_stamped(tmp_path_factory.mktemp("both"))
    assert [value.name for value in stamped.graph.inputs] == [value.name for value in whole.graph.inputs]
    assert [value.name for value in stamped.graph.outputs] == [value.name for value in whole.graph.outputs]
    assert Counter(node.op_type for node in stamped.graph) == Counter(node.op_type for node in whole.graph)
    assert {str(node.name) for node in stamped.graph} == {str(node.name) for node in whole.graph}
    weights = [name for name in whole.graph.initializers if name.endswith("weight")]
    assert len(weights) == 9 * FEW + 3
    for name in weights:
        expected, got = whole.graph.initializers[name].const_value, stamped.graph.initializers[name].const_value
        assert expected is not None
        assert got is not None
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_a_stamp_that_computes_something_else_is_noticed_and_every_layer_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stamp_wrongly(model: ir.Model, layers: stamp_layers.LayerMap) -> list[ir.Value]:
        hidden = right(model, layers)
        if len(layers.traced) == FEW:
            return hidden
        first, second = (f"model.layers.{index}.self_attn.q_proj.weight" for index in (1, 2))
        one, other = model.graph.initializers.pop(first), model.graph.initializers.pop(second)
        one.name, other.name = second, first
        model.graph.initializers[second], model.graph.initializers[first] = one, other
        return hidden

    right = stamp_layers.stamp
    monkeypatch.setattr(build, "stamp", stamp_wrongly)
    artifact = export_checkpoint(saved(tmp_path / "checkpoint", num_hidden_layers=FEW), tmp_path / "onnx")
    assert artifact.traced_layers == tuple(range(FEW))
    assert artifact.whole_because.startswith("parity: prefill differs from torch by")


@pytest.mark.slow
def test_layers_that_pass_on_more_than_a_hidden_state_are_all_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune_and_tie(model: ir.Model) -> None:
        right(model)
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        # The second layer now reads the first layer's norm, in addition to its hidden state.
        add = ir.node("Add", [norms[2].outputs[0], norms[0].outputs[0]])
        add.outputs[0].dtype = ir.DataType.FLOAT
        norms[2].outputs[0].replace_all_uses_with(add.outputs[0])
        add.replace_input_with(0, norms[2].outputs[0])
        model.graph.insert_after(norms[2], add)

    right = prune_unused.remove_unused
    monkeypatch.setattr(build, "remove_unused", prune_and_tie)
    with pytest.raises(ParityError):  # the graph of all layers has the planted fault too
        export_checkpoint(saved(tmp_path / "checkpoint"), tmp_path / "onnx")
    model = load(str(tmp_path / "checkpoint"), torch.float32, offload=tmp_path / "offload")
    with pytest.raises(CannotStampError, match="layer 0 should have one output, it has"):
        build.build_graph(model, skeleton.layers_to_trace(model))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of segments of each segmented comparison in the test."""
    counts = []

    class Counted(segmented_runner.SegmentedRunner):
        def answer(self, calls: Sequence[Call]) -> list[Logits]:
            counts.append(len(self.segments))
            return super().answer(calls)

    monkeypatch.setattr(segmented_runner, "SegmentedRunner", Counted)
    return counts


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_an_export_in_little_memory_is_judged_alike(dtype: str, tmp_path: Path, opened: list[int]) -> None:
    checkpoint = saved(tmp_path / "checkpoint", skipped=((1, ATTENTION),), num_hidden_layers=6)
    plenty = export_checkpoint(checkpoint, tmp_path / "plenty", dtype=dtype)
    assert opened == []
    little = export_checkpoint(checkpoint, tmp_path / "little", dtype=dtype, max_memory=1)
    assert opened == [6 + 1]  # one segment per layer, and one for the nodes after the last layer
    for check, difference in plenty.parity.items():
        assert 0 < little.parity[check] < 3 * difference
    files = [tmp_path / name / graph_files.WEIGHTS_FILE for name in ("plenty", "little")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
def test_a_quantized_export_in_little_memory_is_judged_alike(quantizer: str, tmp_path: Path, opened: list[int]) -> None:
    checkpoint = saved(tmp_path / "checkpoint")
    plenty = export_checkpoint(checkpoint, tmp_path / "plenty", quantize=quantizer)
    little = export_checkpoint(checkpoint, tmp_path / "little", quantize=quantizer, max_memory=1)
    assert opened == [LAYERS + 1, LAYERS + 1]  # before and after it is quantized
    assert little.divergence == pytest.approx(plenty.divergence, rel=1e-3)


def test_in_little_memory_a_layer_may_be_wholly_dead(tmp_path: Path, opened: list[int]) -> None:
    checkpoint = saved(tmp_path / "checkpoint", skipped=((2, ATTENTION), (2, MLP)))
    export_checkpoint(checkpoint, tmp_path / "onnx", max_memory=1)
    assert opened == [LAYERS - 1 + 1]


def test_in_little_memory_a_model_that_is_traced_whole_is_run_in_parts_too(tmp_path: Path, opened: list[int]) -> None:
    artifact = export_checkpoint(saved(tmp_path / "in", num_hidden_layers=2), tmp_path / "out", max_memory=1)
    assert (artifact.traced_layers, opened) == ((0, 1), [2 + 1])


def test_what_has_no_parts_is_refused_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "in", num_hidden_layers=2)
    build_graph = build.build_graph
    monkeypatch.setattr(build, "build_graph", lambda *inputs: replace(build_graph(*inputs), hidden=()))
    assert_refused_in_little_memory(checkpoint, tmp_path)


@pytest.mark.slow
def test_a_graph_whose_first_layer_is_skipped_whole_has_no_parts(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "in", skipped=((0, ATTENTION), (0, MLP)), num_hidden_layers=2)
    assert_refused_in_little_memory(checkpoint, tmp_path)


def assert_refused_in_little_memory(checkpoint: str, folder: Path) -> None:
    with pytest.raises(StreamlineError, match=r"max-memory 1: the layers of this model cannot be run one by one"):
        export_checkpoint(checkpoint, folder / "out", max_memory=1)
    assert [each.name for each in folder.iterdir()] == ["in"]


@pytest.mark.slow
def test_a_stamped_graph_that_cannot_be_opened_is_traced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stamp_and_spoil(graph: ir.Model, layers: LayerMap) -> list[ir.Value]:
        hidden = stamp_layers.stamp(graph, layers)
        if len(layers.traced) < LAYERS:
            next(iter(graph.graph)).op_type = "NoSuchOperator"
        return hidden

    monkeypatch.setattr(build, "stamp", stamp_and_spoil)
    artifact = export_checkpoint(saved(tmp_path / "checkpoint"), tmp_path / "onnx")
    assert artifact.whole_because.startswith("parity: ONNX Runtime cannot open the graph (")
    assert artifact.traced_layers == tuple(range(LAYERS))


@pytest.mark.slow
def test_in_little_memory_a_wrong_weight_is_found_too(
    tmp_path: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_corrupt(graph: ir.Model, model: PreTrainedModel, folder: Path) -> None:
        write_graph(graph, model, folder)
        weights = np.fromfile(folder / graph_files.WEIGHTS_FILE, np.float32)
        weights[len(weights) // 2 :] *= 1.01
        weights.tofile(folder / graph_files.WEIGHTS_FILE)

    write_graph = export.write_graph
    monkeypatch.setattr(export, "write_graph", write_and_corrupt)
    with pytest.raises(ParityError, match="prefill differs from torch by"):
        export_checkpoint(saved(tmp_path / "checkpoint"), tmp_path / "onnx", max_memory=1)
    assert opened == [LAYERS + 1] * 2  # the stamped graph, and then the graph of all layers
