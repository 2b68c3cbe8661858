"""Tests of bfloat16 graphs: converted to float32 for a CPU, and unchanged on a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from optimum.exporters.streamline import export_checkpoint
from optimum.exporters.streamline.onnx.export import write_graph
from optimum.exporters.streamline.onnx.runner import OnnxRunner
from optimum.exporters.streamline.parity.compare import check_parity
from optimum.exporters.streamline.parity.model_calls import answer_with
from optimum.exporters.streamline.rewriting.to_float32 import write_float32
from optimum.exporters.streamline.tracing.build import build_graph
from optimum.exporters.streamline.tracing.skeleton import layers_to_trace
from optimum.streamline.checkpoints.loading import DTYPES, load
from optimum.streamline.errors import StreamlineError
from reference import REFERENCE

pytestmark = pytest.mark.onnx


def written(checkpoint: str, folder: Path) -> None:
    folder.mkdir()
    model = load(checkpoint, DTYPES["bf16"], offload=folder)
    write_graph(build_graph(model, layers_to_trace(model)).model, model, folder)


# GPT-2 needs more tolerance, because a constant of its activation is rounded too: 0.7969 for 0.7979.
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        pytest.param("llama", 1e-4, marks=pytest.mark.slow),
        ("gpt2", 1e-3),
        pytest.param("gemma2", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_the_graph_is_the_model_with_weights_in_bfloat16(exported, tmp_path, case, tolerance):
    checkpoint = str(exported(case).checkpoint)
    written(checkpoint, tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    (tmp_path / "wide").mkdir()
    write_float32(tmp_path / "onnx" / "model.onnx", tmp_path / "wide" / "model.onnx")
    rounded = load(checkpoint, DTYPES["bf16"]).float()
    assert len(check_parity(rounded, answer_with(OnnxRunner(tmp_path / "wide")), tolerance)) == 5
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    assert {kind for name, kind in types.items() if "." in name} == {onnx.TensorProto.BFLOAT16}
    matrices = {each.data_type for each in graph.initializer if len(each.dims) > 1 and each.data_type != 7}
    assert matrices == {onnx.TensorProto.BFLOAT16}


def test_the_cpu_provider_has_no_kernels_for_it(tmp_path):
    with pytest.raises(StreamlineError, match=r"dtype 'bf16': ONNX Runtime's CPU provider cannot .* or device 'cuda'"):
        export_checkpoint(str(REFERENCE), tmp_path / "onnx", dtype="bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_exports_are_compared_on_a_gpu(tmp_path, dtype):
    artifact = export_checkpoint(str(REFERENCE), tmp_path / "onnx", dtype=dtype, device="cuda")
    assert len(artifact.parity) == 5
    assert artifact.dtype == dtype
