"""Tests of quantized ONNX exports: the loss and size with each quantizer, excluded modules, and refused options."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from console import Outcome, optimum_cli
from optimum.exporters.streamline import GRAPH_QUANTIZERS, export_checkpoint, open_artifact
from optimum.exporters.streamline.onnx.quantization.quantizers import GraphQuantizer
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer, read_config
from optimum.streamline.checkpoints.record_file import RECORD_FILE, RECORD_KEYS
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.evaluation.contamination import refuse_seen_text
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.evaluation.validate import ComparedModel, validate
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.layer_list import set_decoder_layers
from optimum.streamline.recipe.recipe import Budget
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.text.windows import Windows, read_windows, seen_text
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS, tiny_model, token_ids

pytestmark = pytest.mark.onnx

# The largest perplexity ratio and the largest file-size ratio over the float export. Measured on 16 windows: 1.004,
# 1.005, 1.032, 1.029, 1.032; 0.41, 0.41, 0.16, 0.19, 0.17.
LIMITS = {
    "int8": (1.01, 0.45),
    "int8-static": (1.012, 0.45),
    "int4": (1.05, 0.18),
    "int4-hqq": (1.05, 0.21),
    "int4-gptq": (1.05, 0.19),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """A function that exports the reference model with a quantizer, or with `none`."""

    @cache
    def make(quantizer: str, *exclude: str) -> Artifact:
        folder = tmp_path_factory.mktemp(quantizer) / "onnx"
        return export_checkpoint(REFERENCE, folder, quantize=quantizer, quantize_exclude=exclude, windows=calibration())

    return make


def calibration() -> Windows:
    return read_windows("stdlib", load_tokenizer(ModelSource(REFERENCE)), 8, 128, 0, VOCABULARY, "calibration")


@pytest.fixture(scope="module")
def judged_on() -> Windows:
    return read_windows("stdlib", load_tokenizer(ModelSource(REFERENCE)), 8, 512, 0, VOCABULARY, "eval")


def loss(artifact: Artifact, windows: Windows) -> float:
    runner, losses = open_artifact(artifact), []
    for window in windows.ids.numpy():
        logits, _ = runner.prefill(window[None])
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]), torch.from_numpy(window[1:])))
    return float(torch.stack(losses).mean())


def bytes_of(artifact: Artifact) -> int:
    return sum(file.stat().st_size for file in Path(artifact.path).glob("*.onnx*"))


def operators(artifact: Artifact) -> Counter[str]:
    graph = onnx.load(Path(artifact.path) / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


# GPTQ takes half a minute; `test_last_logits.py` asks of a small model whether it keeps the function. HQQ writes the
# operators of int4.
@pytest.mark.parametrize(
    "quantizer",
    [
        pytest.param(each, marks=() if each in ("int8", "int8-static", "int4") else pytest.mark.slow)
        for each in GRAPH_QUANTIZERS
    ],
)
def test_each_way_keeps_the_function_and_takes_less_room(
    quantized: Callable[..., Artifact], judged_on: Windows, quantizer: str
) -> None:
    plain, small = quantized("none"), quantized(quantizer)
    ratio, size = LIMITS[quantizer]
    assert np.exp(loss(small, judged_on) - loss(plain, judged_on)) < ratio
    assert bytes_of(small) / bytes_of(plain) < size
    assert list(small.divergence) == list(small.parity)
    assert all(0 < share < 0.5 for share in small.divergence.values())
    assert all(difference < 1e-4 for difference in small.parity.values())  # of the graph before it was quantized
    assert Artifact.read(Path(small.path)) == small
    assert small.precision == quantizer
    assert (Path(small.path) / "genai_config.json").is_file()
    assert open_runner(small.path).runtime == "onnxruntime"


def test_four_bits_hold_a_tied_embedding_once(quantized: Callable[..., Artifact]) -> None:
    found = operators(quantized("int4"))
    assert found["GatherBlockQuantized"] == 1
    assert found["MatMul"] == found["Gather"] == found["Transpose"] == 0
    assert found["MatMulNBits"] == 16 * 4 + 1  # queries, keys and values are one matmul; gate and up another
    assert found["SkipSimplifiedLayerNormalization"] == 2 * 16
    # Each of the 3.67 million weights takes half a byte, and its share of a 4-byte scale per 32 weights.
    assert quantized("int4").weight_bytes == pytest.approx(3.67e6 * (0.5 + 4 / 32), rel=0.02)


@pytest.mark.parametrize("quantizer", ["int4", pytest.param("int4-gptq", marks=pytest.mark.slow), "int8"])
def test_what_is_excluded_stays_in_float(quantized: Callable[..., Artifact], quantizer: str) -> None:
    found = operators(quantized(quantizer, "0", "15", "*.v_proj", "lm_head"))
    # All seven matmuls of two layers, one of the other fourteen, and the output projection.
    assert found["MatMul"] == 2 * 7 + 14 + 1
    assert found["GatherBlockQuantized"] == 0


@pytest.mark.parametrize("quantizer", ["int4", "int8"])
def test_the_layers_of_a_pruned_model_become_what_they_become_in_the_original(
    quantized: Callable[..., Artifact], tmp_path: Path, quantizer: str
) -> None:
    model = load_stock(ModelSource(REFERENCE))
    row, kept = architecture_of(model.config), [0, 1, 2, 7, 8, 15]
    set_decoder_layers(model, row, [decoder_layers(model, row)[layer] for layer in kept], kept)
    model.save_pretrained(tmp_path / "pruned")
    pruned = weights(export_checkpoint(str(tmp_path / "pruned"), tmp_path / "onnx", quantize=quantizer))
    original = weights(quantized(quantizer))
    of_layers = [name for name in pruned if ".layers." in name]
    assert len(of_layers) >= 7 * len(kept)  # values and scales of each matmul, and norms
    for name in of_layers:
        place = int(re.search(r"\.layers\.(\d+)\.", name)[1])  # type: ignore[index]
        older = name.replace(f".layers.{place}.", f".layers.{kept[place]}.")
        np.testing.assert_array_equal(pruned[name], original[older], err_msg=name)


def weights(artifact: Artifact) -> dict[str, np.ndarray]:
    graph = onnx.load(Path(artifact.path) / "model.onnx").graph
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


def test_an_exclusion_that_names_nothing_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    for what, said in (
        ("7", "there is no layer 7; the model has layers 0 to 0"),
        ("*.typo", "no linear module has this name"),
    ):
        with pytest.raises(StreamlineError, match=re.escape(f"quantize-exclude {what!r}: {said}")):
            export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "x", quantize="int8", quantize_exclude=[what])
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("architecture", "matmuls"),
    [
        ("gpt2", LAYERS * 4 + 1),  # its linear modules have biases
        pytest.param("qwen3", LAYERS * 4 + 1, marks=pytest.mark.slow),
        ("mixtral", LAYERS * (2 + 4 * 2) + 1),  # four experts with two matmuls each; the router stays in float
        pytest.param("gemma2", LAYERS * 4 + 1, marks=pytest.mark.slow),
        pytest.param("opt", LAYERS * 4 + 1, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_in_four_bits(architecture: str, matmuls: int, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out", quantize="int4")
    assert operators(artifact)["MatMulNBits"] == matmuls
    assert all(0 < share < 0.5 for share in artifact.divergence.values())


def test_of_quantized_experts_a_token_reads_its_share(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "out", quantize="int4")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    sizes = {each.name: onnx.numpy_helper.to_array(each).nbytes for each in graph.initializer}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    looked_up = model.get_input_embeddings().weight.numel() * 4
    read = sum(sizes.values()) - looked_up - experts / 2  # two experts of four
    assert artifact.weight_bytes == pytest.approx(read, abs=32)  # a constant of the graph is looked up too


def test_a_quantized_graph_that_gives_no_numbers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize_to_nothing(source: Path, target: Path, quantization: Quantization) -> None:
        model = onnx.load(source / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name == "model.norm.weight":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(32, np.nan, np.float32), tensor.name))
        onnx.save(model, target / "model.onnx")

    tiny_model().save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setitem(GRAPH_QUANTIZERS, "int4", GraphQuantizer(quantize_to_nothing, "all of it nothing"))
    with pytest.raises(ParityError, match="prefill gives logits that are not finite"):
        export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "onnx", quantize="int4")
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.usefixtures("untimed")
def test_validation_names_the_quantization_and_counts_its_bytes(
    quantized: Callable[..., Artifact], judged_on: Windows, tmp_path: Path
) -> None:
    plain, small = quantized("none"), quantized("int4")
    compared_models = [
        ComparedModel("a", REFERENCE, "original"),
        ComparedModel("b", plain.path, "candidate"),
        ComparedModel("c", small.path, "candidate"),
    ]
    report = validate(compared_models, judged_on, Budget(), prompt_length=16, decode_tokens=4, rounds=2)
    rows = {row.label: row for row in report.rows}
    assert (rows["b"].dtype, rows["c"].dtype) == ("fp32", "int4")
    cost = cost_of(read_config(ModelSource(REFERENCE)), "fp32")
    cached = cost.kv_bytes_per_token * (16 + 2.5)
    assert rows["c"].ideal_decode_speedup == pytest.approx(cost.decode_bytes(18.5) / (small.weight_bytes + cached))


def test_an_odd_number_of_blocks_is_refused_for_gptq(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, exported: Callable
) -> None:
    words = (
        "export",
        "-m",
        exported("llama").checkpoint,
        tmp_path / "out",
        "--quantize",
        "int4-gptq",
        "--calibration",
        "stdlib",
        "--length",
        "16",
    )
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert done.code == 2
    assert "quantize 'int4-gptq': model.layers.0.self_attn.q_proj has an input width of 32, an odd number" in done.err
    assert list(tmp_path.iterdir()) == []


def test_experts_are_refused_for_gptq(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "in")
    options = {"windows": Windows(token_ids(1, 8), "some text"), "quantize_exclude": ["*.self_attn.*", "lm_head"]}
    with pytest.raises(
        StreamlineError, match=r"'int4-gptq': .*experts.* is in an expert, .* use 'int4', or quantize-ex"
    ):
        export_checkpoint(str(tmp_path / "in"), tmp_path / "out", quantize="int4-gptq", **options)


def test_calibration_without_text_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="windows None: quantize 'int8-static' needs calibration text"):
        export_checkpoint("no such model", tmp_path / "out", quantize="int8-static")


def test_what_it_was_calibrated_on_is_not_what_it_is_judged_on(
    quantized: Callable[..., Artifact], judged_on: Windows
) -> None:
    artifact = quantized("int8-static")
    assert artifact.data["quantization"]["fingerprint"] == calibration().fingerprint
    with pytest.raises(StreamlineError, match="stdlib"):
        refuse_seen_text(artifact.path, calibration())
    refuse_seen_text(artifact.path, judged_on)
    refuse_seen_text(quantized("int4").path, calibration())  # made without text


def test_an_export_remembers_the_text_of_its_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "in")
    record = {key: {} for key in RECORD_KEYS} | {"data": {"calibration": seen_text(calibration())}}
    (tmp_path / "in" / RECORD_FILE).write_text(json.dumps(record))
    export_checkpoint(str(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(StreamlineError, match="stdlib"):
        refuse_seen_text(str(tmp_path / "out"), calibration())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--quantize", "int3"), "quantize 'int3': unknown; one of none, int8, int8-static, int4, int4-hqq, int4-gptq"),
        (("--quantize", "int4", "--dtype", "fp16"), "quantize 'int4': starts from dtype 'fp32', not 'fp16'"),
        (("--quantize-exclude", "lm_head"), "quantize-exclude 'lm_head': nothing is quantized; give quantize too"),
        (
            ("--quantize", "int4", "--samples", "8"),
            "samples 8: quantize 'int4' needs no calibration text; leave it out",
        ),
        (("--calibration", "stdlib"), "calibration stdlib: quantize 'none' needs no calibration text; leave it out"),
        (("--quantize", "int4-gptq", "--samples", "0"), "samples 0: must be from 1 to 1000000"),
        (("--quantize", "int8-static", "--length", "4096"), "length 4096: must be from 8 to 512"),
        (("--quantize", "int8-static", "--calibration", "no/such.txt"), "'no/such.txt': no such file or folder"),
    ],
)
def test_wrong_flags_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: tuple[str, ...],
    said: str,
) -> None:
    done: Outcome = optimum_cli(monkeypatch, capsys, "streamline", "export", "-m", REFERENCE, tmp_path / "out", *flags)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
