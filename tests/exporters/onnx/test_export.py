"""Tests of `export_checkpoint` to ONNX: the folder, refused options, and that a wrong graph leaves no folder."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from optimum.exporters.streamline import export_checkpoint, graph_files, open_artifact
from optimum.exporters.streamline.onnx import export
from optimum.exporters.streamline.onnx.runner import open_session
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import packed_plan
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.removed_sublayers import without
from optimum.streamline.runtime.opening import open_runner
from tiny import LAYERS, tiny_model, token_ids
from tokenizer_seen import seen

pytestmark = pytest.mark.onnx

CHECKS = ["prefill", "continuation", "decode", "left-padded prefill", "left-padded decode"]


def test_the_folder_says_what_it_is(exported):
    made = exported("llama")
    assert Artifact.read(made.folder) == made.artifact
    assert made.artifact.source_fingerprint == fingerprint(ModelSource(str(made.checkpoint)))
    assert list(made.artifact.parity) == CHECKS
    assert all(0 <= difference < 1e-4 for difference in made.artifact.parity.values())
    assert {file.name for file in made.folder.iterdir()} >= {
        "artifact.json", "config.json", "export.log", "genai_config.json", "generation_config.json",
        "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    written = {file.name for file in made.folder.iterdir()} - {"artifact.json", "export.log"}
    assert made.artifact.files.keys() == written
    graph = hashlib.sha256((made.folder / "model.onnx").read_bytes()).hexdigest()
    assert made.artifact.files["model.onnx"] == graph


def test_what_lies_beside_the_graph_is_for_readers_of_transformers_4_too(exported):
    folder = exported("llama").folder
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in tokenizer
    assert seen(str(folder)) == seen(str(exported("llama").checkpoint))


@pytest.mark.slow  # a process that really traces; `test_library_logs.py` holds it of any library
def test_what_libraries_say_goes_to_the_log_and_not_to_the_terminal(exported, tmp_path):
    script = """
import sys
from pathlib import Path
from optimum.exporters.streamline import export_checkpoint
export_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, str(exported("gpt2").checkpoint), str(tmp_path / "onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    log = (tmp_path / "onnx" / "export.log").read_text()
    assert "[torch.onnx]" in log
    assert "OnnxExporter is experimental" in log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "gguf"}, "format 'gguf': unknown; one of onnx, tensorrt"),
        ({"dtype": "bf16"}, "dtype 'bf16'"),
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, options, said):
    with pytest.raises(StreamlineError, match=said) as refusal:
        export_checkpoint("no such model", tmp_path / "onnx", **options)
    assert refusal.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("gpt2", {"n_positions": 15}, "max_position_embeddings 15: must be at least 16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_by_name(tmp_path, architecture, fields, said):
    tiny_model(architecture, **fields).save_pretrained(tmp_path / "in")
    with pytest.raises(StreamlineError, match=said):
        export_checkpoint(str(tmp_path / "in"), tmp_path / "onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_left_alone(exported):
    made = exported("llama")
    with pytest.raises(StreamlineError, match="exists already"):
        export_checkpoint(str(made.checkpoint), made.folder)


def test_a_graph_whose_weights_are_not_the_models_is_not_kept(exported, tmp_path, monkeypatch):
    def write_and_corrupt(graph, model, folder):
        write_graph(graph, model, folder)
        file = folder / graph_files.WEIGHTS_FILE
        weights = np.fromfile(file, np.float32)
        weights[: len(weights) // 2] *= 1.01
        weights.tofile(file)

    write_graph = export.write_graph
    monkeypatch.setattr(export, "write_graph", write_and_corrupt)
    said = r"prefill differs from torch by [\d.e-]+ in a logit, allowed is .*; most at row 0, position \d+, token \d+$"
    with pytest.raises(ParityError, match=said) as refusal:
        export_checkpoint(str(exported("gpt2").checkpoint), tmp_path / "onnx")
    assert refusal.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_runner_needs_neither_torch_nor_transformers(exported):
    script = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np
from optimum.streamline.runtime.opening import open_runner
runner = open_runner(sys.argv[1])
logits, cache = runner.prefill(np.array([[5, 6, 7]]))
logits, cache = runner.decode(np.array([[8]]), cache)
print(runner.runtime, logits.shape, logits.dtype)
"""
    command = [sys.executable, "-c", script, str(exported("llama").folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "onnxruntime (1, 1, 128) float32\n"


def test_a_packed_checkpoint_is_exported_as_any(tmp_path):
    model, removed = tiny_model(), ((1, "mlp"), (2, "attention"))
    with without(model, frozenset(removed)), torch.inference_mode():
        expected = model(token_ids()).logits.numpy()
    apply_plan(model, packed_plan(LAYERS, removed), None)
    model.save_pretrained(tmp_path / "in")
    artifact = export_checkpoint(str(tmp_path / "in"), tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == LAYERS - 1
    found, _ = open_artifact(artifact).prefill(token_ids().numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_artifact_and_its_checkpoint_answer_alike_through_the_protocol(exported):
    made = exported("dead middle")
    ids = np.random.default_rng(1).integers(2, 128, (3, 11))
    runners = [open_artifact(made.artifact), open_runner(str(made.checkpoint))]
    answers = []
    for runner in runners:
        prompt, cache = runner.prefill(ids[:, :6])
        more, cache = runner.decode(ids[:, 6:10], cache)
        last, _ = runner.decode(ids[:, 10:], cache)
        answers.append(np.concatenate([prompt, more, last], axis=1))
    assert answers[0].shape == (3, 11, 128)
    np.testing.assert_allclose(*answers, atol=5e-5)


def test_a_folder_without_its_graph_is_refused_in_one_line(exported, tmp_path):
    artifact = exported("llama").artifact
    artifact.write(tmp_path)
    with pytest.raises(StreamlineError, match=r"model\.onnx: ONNX Runtime cannot open it"):
        open_artifact(Artifact.read(Path(tmp_path)))


def test_a_cuda_session_does_not_round_fp32_to_tf32(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: asked.extend(providers))
    open_session(tmp_path / "model.onnx", "cuda")
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"})]
