"""Tests of exporting engines: TensorRT-RTX builds them without a GPU, and their graphs are compared with torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from console import Outcome, optimum_cli
from optimum.exporters.streamline import EngineOptions, export_checkpoint, open_artifact
from optimum.exporters.streamline.tensorrt.engine_record import EngineRecord
from optimum.exporters.streamline.tensorrt.graph.reference_runner import StaticOnnxRunner
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.merging import average_layers, replace_pair
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import disk_bytes
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.models.bare_layers import bare_layers, save_bare
from optimum.streamline.text.windows import Windows
from pages import check_part
from reference import REFERENCE
from stand_in import parse_only
from tiny import LAYERS, tiny_model, token_ids

pytestmark = [pytest.mark.onnx, pytest.mark.tensorrt]

# As a share of the largest logit. Small, because the graph has torch's operations, in another order.
CLOSE = {"fp32": 4e-6, "fp16": 2e-3}
RTX = EngineOptions("tensorrt-rtx", (89, 120), max_batch=4, max_length=32, max_input=16)
Cli = Callable[..., Outcome]


def exported(model: PreTrainedModel, folder: Path, dtype: str) -> Artifact:
    """Export a model to an engine of a dtype; `int8` stands for fp16 quantized by the quantizer `int8`."""
    save = save_bare if bare_layers(model.config) else PreTrainedModel.save_pretrained
    save(model, folder / "checkpoint")
    options = {"engine": RTX, "quantize": "none", "windows": None}
    if dtype == "int8":
        dtype, options = "fp16", {"engine": RTX, "quantize": "int8", "windows": Windows(token_ids(4, 32), "random")}
    return export_checkpoint(str(folder / "checkpoint"), folder / "engine", "tensorrt", dtype, **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact | str]:
    """A function that exports an architecture; it returns the artifact, or the message of the refusal."""

    @cache
    def export(architecture: str) -> Artifact | str:
        try:
            return exported(tiny_model(architecture), tmp_path_factory.mktemp(architecture), "fp32")
        except StreamlineError as error:
            return str(error)

    return export


# GPT-2 with transposed linear modules, Qwen 2 with two kinds of attention and ERNIE 4.5, whose rotary embeddings repeat
# numbers, are fast. The others, and the page with all of them, are slow: Llama, which has less than Qwen 2, and
# Gemma 2, with its norms after sublayers and its softcap.
DIFFERENT = {"ernie4_5", "gpt2", "qwen2"}
OF_EXPERTS = {"mixtral", "qwen3_moe"}
# Their norms, and the scale of their queries, take operators that were not tried.
OF_OTHER_OPERATORS = {"helium", "ministral3"}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=() if each in DIFFERENT else pytest.mark.slow)
        for each in sorted(set(ARCHITECTURES) - OF_EXPERTS - OF_OTHER_OPERATORS)
    ],
)
def test_every_architecture_is_built_of_a_graph_that_is_what_torch_computes(found, architecture: str) -> None:
    artifact = found(architecture)
    assert isinstance(artifact, Artifact), artifact
    folder = Path(artifact.path)
    assert disk_bytes(folder) == (folder / "model.engine").stat().st_size > 10**6
    assert artifact.whole_because == ""
    record = EngineRecord.read(folder)
    scale = largest_logit(folder.parent / "checkpoint")
    assert len(artifact.parity) == 5
    assert max(artifact.parity.values()) < CLOSE["fp32"] * scale
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 24)]
    assert sum(node.op_type == "TensorScatter" for node in graph.graph.node) == 2 * LAYERS
    assert set(record.aliases.values()) == {each.name for each in graph.graph.input if "past_key" in each.name}
    assert set(record.aliases) == {each.name for each in graph.graph.output} - {"logits"}


def largest_logit(checkpoint: Path) -> float:
    model = load(str(checkpoint), torch.float32)
    with torch.inference_mode():
        return model(token_ids()).logits.abs().max().item()


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=() if each == "mixtral" else pytest.mark.slow)
        for each in sorted(OF_EXPERTS | OF_OTHER_OPERATORS)
    ],
)
def test_experts_and_other_operators_are_refused_before_any_builder(found, architecture: str) -> None:
    assert found(architecture).startswith("cannot be built for TensorRT: ")
    assert "is not among the operators that engines are built of" in found(architecture)


@pytest.mark.slow
def test_the_page_says_what_came_of_each(found, request: pytest.FixtureRequest) -> None:
    lines = ["| architecture | engine | masks |", "|---|---|---|"]
    for name in sorted(ARCHITECTURES):
        came = found(name)
        if isinstance(came, Artifact):
            masks = ", ".join(f"`{each.name}`" for each in EngineRecord.read(Path(came.path)).masks)
            lines.append(f"| `{name}` | built | {masks} |")
        else:
            lines.append(f"| `{name}` | refused: {came.rpartition(': ')[2]} |  |")
    check_part("architectures.md", "tensorrt", "\n".join(lines), request)


def pruned() -> PreTrainedModel:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (2, 3)), None)
    return model


def replaced(kind: str = "ffn") -> PreTrainedModel:
    model, plan = tiny_model(), Plan(LAYERS, (2, 3), kind)
    apply_plan(model, plan, build_replacement(model, plan))
    return model


def replaced_by_mlp() -> PreTrainedModel:
    return replaced("mlp")


def merged() -> PreTrainedModel:
    model = tiny_model()
    replace_pair(model, 2, average_layers(model, 2, 0.5))
    return model


# How many caches each leaves.
SHORTER = {pruned: 3, replaced: 3, replaced_by_mlp: 3, merged: 4}
# One edit, in int8, which is fp16 quantized. The other edits leave no other operators, and are fast in ONNX.
FAST = {(merged, "int8")}


@pytest.fixture(scope="module")
def of_a_dense_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineRecord]:
    @cache
    def export(dtype: str) -> EngineRecord:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("optimum.exporters.streamline.tensorrt.export.build_engine", parse_only)
            return EngineRecord.read(Path(exported(tiny_model(), tmp_path_factory.mktemp(dtype), dtype).path))

    return export


@pytest.mark.parametrize(
    ("make", "caches", "dtype"),
    [
        pytest.param(make, caches, dtype, marks=() if (make, dtype) in FAST else pytest.mark.slow)
        for make, caches in SHORTER.items()
        for dtype in ("fp16", "bf16", "int8")
    ],
)
def test_fewer_layers_make_a_smaller_engine(
    of_a_dense_model, tmp_path: Path, make: Callable[[], PreTrainedModel], caches: int, dtype: str
) -> None:
    artifact = exported(make(), tmp_path, dtype)
    folder = Path(artifact.path)
    record = EngineRecord.read(folder)
    assert len(record.aliases) == 2 * caches
    assert record.layers < of_a_dense_model(dtype).layers
    scale = largest_logit(tmp_path / "checkpoint")
    # For bf16, torch and the graph both compute in float32, with the same rounded weights.
    assert max(artifact.parity.values()) < CLOSE["fp16"] * scale
    kind = onnx.TensorProto.BFLOAT16 if dtype == "bf16" else onnx.TensorProto.FLOAT16
    assert artifact.precision == dtype
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert {each.type.tensor_type.elem_type for each in graph.input if "past" in each.name or "mask" in each.name} == {
        kind
    }


def test_a_command_exports_the_reference_model_and_says_what_was_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--builder", "tensorrt-rtx", "--compute-capability", "86", "--dtype", "fp16", "--max-length", "64")
    done = optimum_cli(
        monkeypatch, capsys, "streamline", "export", "--format", "tensorrt", "-m", REFERENCE, tmp_path / "out", *words
    )
    assert (done.code, done.err) == (0, "")
    assert "engine: tensorrt-rtx 1.7.1.116 for compute capability 86, " in done.out
    artifact, record = Artifact.read(tmp_path / "out"), EngineRecord.read(tmp_path / "out")
    assert (artifact.format, artifact.dtype) == ("tensorrt", "fp16")
    assert (record.limits.batch, record.limits.input, record.limits.length) == (1, 64, 64)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "artifact.json",
        "config.json",
        "engine.json",
        "export.json",
        "export.log",
        "generation_config.json",
        "model.engine",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    runner = StaticOnnxRunner(tmp_path / "out", record.masks)
    with pytest.raises(StreamlineError, match="length 65: must be at most 64, the tokens that the caches hold"):
        runner.prefill(np.ones((1, 65), np.int64))
    with pytest.raises(StreamlineError, match="device 'cpu': an engine runs on a GPU"):
        open_artifact(artifact)


BUILDER = ("--builder", "tensorrt-rtx", "--compute-capability", "89")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--builder", "trt"), "builder 'trt': unknown; one of tensorrt, tensorrt-rtx"),
        ((*BUILDER[:3], "90"), "compute-capability 90: tensorrt-rtx builds for 75, 80, 86, 89, 120, 121"),
        ((*BUILDER[:3], "8.9"), "compute-capability '8.9': must be numbers separated by commas, such as 89,120"),
        (("--compute-capability", "89"), "compute-capability 89: builder 'tensorrt' builds for this machine's GPU"),
        ((*BUILDER, "--max-length", "513"), "max-length 513: must be from 16 to 512, the model's positions"),
        ((*BUILDER, "--quantize", "int4-gptq"), "quantize 'int4-gptq': unknown for format 'tensorrt'; one of none"),
        (
            (*BUILDER[:3], "86", "--quantize", "fp8"),
            "quantize 'fp8': compute capability 86 does not support it; it must be at least 89",
        ),
        (
            (*BUILDER, "--quantize", "int4", "--samples", "4"),
            "samples 4: quantize 'int4' needs no calibration text; leave it",
        ),
        ((*BUILDER, "--quantize", "int8", "--max-length", "64", "--length", "65"), "length 65: must be from 8 to 64"),
        (
            (*BUILDER, "--quantize", "int4", "--quantize-exclude", "*.typo"),
            "quantize-exclude '*.typo': no linear module",
        ),
        ((*BUILDER, "--last-logits"), "last-logits True: format 'tensorrt' cannot do it; leave it out"),
        ((*BUILDER, "--opset", "23"), "opset 23: must be 24"),
        ((*BUILDER, "--dtype", "fp8"), "dtype 'fp8': unknown; one of fp32, fp16, bf16"),
        ((*BUILDER, "--format", "onnx"), "builder tensorrt-rtx: format 'onnx' has no engine; leave it out"),
    ],
)
def test_wrong_words_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    flags = ("--format", "tensorrt", *words)
    done = optimum_cli(monkeypatch, capsys, "streamline", "export", "-m", REFERENCE, tmp_path / "out", *flags)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_without_a_gpu_a_builder_for_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="builder 'tensorrt': this machine has no GPU to build for"):
        export_checkpoint(str(REFERENCE), tmp_path / "out", "tensorrt")
