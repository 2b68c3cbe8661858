"""Tests of running an engine: with a stand-in library that computes the graph on the CPU, and on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from console import optimum_cli
from optimum.exporters.streamline import EngineOptions, export_checkpoint, open_artifact
from optimum.exporters.streamline.parity.compare import check_parity
from optimum.exporters.streamline.parity.model_calls import answer_with
from optimum.exporters.streamline.tensorrt.engine_record import EngineRecord
from optimum.exporters.streamline.tensorrt.runner import TensorrtRunner
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from reference import LIBRARY, REFERENCE
from stand_in import Library, export_qwen2, here
from tiny import tiny_model, token_ids

pytestmark = [pytest.mark.onnx, pytest.mark.tensorrt]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with two mask inputs: full attention and a sliding window."""
    return export_qwen2(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("most", [16, 5, 1])
def test_an_engine_is_called_to_what_torch_computes(exported: Path, most: int) -> None:
    model, runner = load(str(exported / "checkpoint"), torch.float32), here(exported, most)
    parity = check_parity(model, answer_with(runner), 1e-4)
    assert len(parity) == 5
    run = runner._trt.shapes_run
    assert max(new for _, new in run) == min(most, 12)
    # A prompt runs in parts of at most the tokens that a call takes; a single token uses the decode profile.
    assert runner._trt.profiles_used == ([0] if most == 1 else [0, 1])
    if most == 5:
        assert [new for _, new in run[:3]] == [5, 5, 2]


def test_a_cache_is_written_where_it_lies(exported: Path) -> None:
    runner = here(exported)
    ids = token_ids(1, 6).numpy()
    _, cache = runner.prefill(ids)
    states = cache.states
    lies = {name: tensor.data_ptr() for name, tensor in states.items()}
    filled = [int(tensor.abs().sum((0, 1, 3)).count_nonzero()) for tensor in states.values()]
    assert filled == [6] * len(states)
    for _ in range(3):
        _, cache = runner.decode(ids[:, :1], cache)
    assert {name: tensor.data_ptr() for name, tensor in cache.states.items()} == lies
    assert [int(tensor.abs().sum((0, 1, 3)).count_nonzero()) for tensor in cache.states.values()] == [9] * len(states)
    assert len(cache.steps) == 2  # one call for the prompt's length, one for all decode steps


def test_requests_beyond_the_engine_are_refused_by_name(exported: Path) -> None:
    runner = here(exported)
    with pytest.raises(StreamlineError, match=r"input input_ids \[5, 3\]: axis 0 is 5, not from 1 to 4"):
        runner.prefill(np.ones((5, 3), np.int64))
    with pytest.raises(StreamlineError, match="length 33: must be at most 32, the tokens that the caches hold"):
        runner.prefill(np.ones((1, 33), np.int64))
    _, cache = runner.prefill(np.ones((1, 31), np.int64))
    _, cache = runner.decode(np.ones((1, 1), np.int64), cache)
    with pytest.raises(StreamlineError, match="length 33: must be at most 32, the tokens that the caches hold"):
        runner.decode(np.ones((1, 1), np.int64), cache)


def test_an_engine_that_is_not_of_this_machine_is_refused(exported: Path) -> None:
    folder = exported / "engine"
    library = here(exported)._trt
    record = EngineRecord.read(folder)
    replace(record, gpu="", capabilities=(89,)).write(folder)
    with pytest.raises(StreamlineError, match=r"engine for compute capability 89: cannot be run on cpu"):
        TensorrtRunner(folder, library, "cpu")
    replace(record, version="1.0").write(folder)
    with pytest.raises(StreamlineError, match=r"engine of tensorrt-rtx 1\.0: cannot be run by version 1\.7\.1\.116"):
        TensorrtRunner(folder, library, "cpu")
    record.write(folder)
    with pytest.raises(StreamlineError, match=r"model\.engine: tensorrt-rtx cannot read it: made by another version"):
        TensorrtRunner(folder, Library(folder, fails=True), "cpu")


def test_an_artifact_is_opened_on_a_gpu_alone(exported: Path) -> None:
    with pytest.raises(StreamlineError, match="device 'cpu': an engine runs on a GPU; give device 'cuda'"):
        open_artifact(Artifact.read(exported / "engine"))


@pytest.mark.gpu
@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_torch_does_on_a_gpu(tmp_path: Path, builder: str, dtype: str) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "checkpoint")
    options = EngineOptions(builder, max_batch=4, max_length=32, max_input=8)
    artifact = export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "engine", "tensorrt", dtype, engine=options)
    runner: Any = open_artifact(artifact, "cuda")
    model = load(str(tmp_path / "checkpoint"), torch.float32)
    assert len(check_parity(model, answer_with(runner), {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}[dtype])) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
def test_engines_of_original_and_candidate_are_validated_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, builder: str
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "report"
    cli = partial(optimum_cli, monkeypatch, capsys, "streamline")
    few = ("--method", "shortgpt", "--remove", "25%", "--heal", "none", "--samples", "4", "--length", "64")
    assert cli("prune", "-m", REFERENCE, pruned, *LIBRARY["prune"], *few).code == 0
    for model, name in ((REFERENCE, "original"), (pruned, "candidate")):
        words = ("--format", "tensorrt", "--builder", builder, "--dtype", "fp16", "--max-length", "512")
        assert cli("export", "-m", model, tmp_path / name, *words).code == 0
    candidates = (tmp_path / "original", tmp_path / "candidate", "--output", out, "--eval-samples", "4")
    done = cli("validate", REFERENCE, *candidates, *LIBRARY["validate"], "--length", "128", "--device", "cuda")
    assert (done.code, done.err) == (0, "")
    _, original, candidate = json.loads((out / "report.json").read_text())["rows"]
    assert (original["role"], candidate["role"]) == ("original", "candidate")
    assert original["runtime"] == candidate["runtime"] == builder
    assert candidate["baseline"] == "original"
    assert candidate["perplexity_ratio"]["value"] > 1.05
