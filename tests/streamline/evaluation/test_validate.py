"""Validation end to end on tiny checkpoints, and the baseline of each model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.validate import ComparedModel, compared_models_of, mark_original_exports, validate
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.hub import fetch_checkpoint
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.recipe.recipe import Budget
from optimum.streamline.text.windows import Windows
from timer import Timer
from tiny import LAYERS, VOCABULARY, tiny_model, token_ids

COMMIT = "0" * 40
DATA = Windows(token_ids(6, 40), "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original`, `candidate` with one skipped attention, `broken` in fp16, and `other` of another vocabulary."""
    root = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(root / "original")
    model = tiny_model()
    plan = Plan(LAYERS, (1, 2, 3), "mlp")
    apply_plan(model, plan, build_replacement(model, plan))
    model.save_pretrained(root / "candidate")
    with torch.no_grad():
        model.lm_head.weight[5] = 3e38  # finite, but not what it computes
    model.save_pretrained(root / "broken")
    tiny_model(vocab_size=VOCABULARY + 1).save_pretrained(root / "other")
    return root


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    # `test_run.py` holds that real processes time them, in `test_one_command_does_the_whole_chain`.
    compared_models = compared_models_of(ModelSource(str(folder / "original")), [str(folder / "candidate")])
    limits = Budget(max_ppl_ratio=1000.0, max_kl=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum.streamline.evaluation.validate.time_alternating", Timer())
        return validate(compared_models, DATA, limits, rounds=3, prompt_length=24, decode_tokens=4)


def test_every_figure_has_its_pair(report: Report) -> None:
    original, candidate = report.rows
    assert (original.label, original.role, original.baseline) == ("original", "original", "original")
    assert (candidate.label, candidate.role, candidate.baseline) == ("candidate", "candidate", "original")
    assert original.perplexity_ratio.low == original.perplexity_ratio.high == 1.0
    assert original.kl.value == 0.0
    assert original.decode_speedup.low == original.decode_speedup.high == 1.0
    ratio = candidate.perplexity.value / original.perplexity.value
    assert math.isclose(candidate.perplexity_ratio.value, ratio, rel_tol=1e-9)
    assert candidate.kl.value > 0
    assert (candidate.layers, candidate.attention_layers) == (LAYERS - 2, LAYERS - 3)
    assert candidate.live_parameters < candidate.parameters < original.parameters
    assert candidate.size_ratio == candidate.disk_bytes / original.disk_bytes < 1
    assert candidate.ideal_decode_speedup > 1
    assert candidate.ideal_prefill_speedup > 1
    for row in report.rows:
        assert row.prefill_ms.value > 0
        assert row.decode_ms.value > 0
        assert row.peak_bytes > 0


def test_what_was_run_is_recorded(report: Report) -> None:
    assert report.data["fingerprint"] == DATA.fingerprint
    assert report.settings["prompt_length"] == 24
    assert report.settings["rounds"] == 3
    assert report.machine["torch"] == torch.__version__
    assert Report.from_json(report.to_json()) == report


def test_the_budget_decides(report: Report) -> None:
    assert [(limit.name, limit.passed) for limit in report.verdict.limits] == [
        ("max_ppl_ratio", True),
        ("max_kl", False),
    ]
    assert report.exit_code == 3


@pytest.mark.usefixtures("untimed")
def test_logits_that_are_not_numbers_fail_and_do_not_crash(folder: Path) -> None:
    compared_models = compared_models_of(ModelSource(str(folder / "original")), [str(folder / "broken")])
    result = validate(compared_models, DATA, Budget(), rounds=2, prompt_length=8, decode_tokens=2)
    assert not result.rows[1].finite
    assert result.exit_code == 3
    assert Report.from_json(result.to_json()).exit_code == 3


def test_prompt_is_clipped_to_what_the_models_take(folder: Path, untimed: Timer) -> None:
    compared_models = [ComparedModel("only", str(folder / "original"), "original")]
    result = validate(compared_models, DATA, Budget(), rounds=2, prompt_length=900, decode_tokens=10)
    # 64 positions, and 240 tokens of text.
    assert (untimed.tokens.shape, untimed.prompt_length) == ((1, 64), 54)
    assert (result.settings["prompt_length"], result.settings["decode_tokens"]) == (54, 10)
    assert (result.settings["prompt_length_asked"], result.settings["decode_tokens_asked"]) == (900, 10)


def test_bad_input_is_one_line(folder: Path) -> None:
    original = ComparedModel("original", str(folder / "original"), "original")
    other = ComparedModel("other", str(folder / "other"))

    def attempt(*compared_models: ComparedModel, data: Windows = DATA, rounds: int = 2) -> None:
        validate(compared_models, data, Budget(), rounds=rounds, prompt_length=8, decode_tokens=2)

    with pytest.raises(StreamlineError, match="other: has a vocabulary of 129 tokens, but original has 128"):
        attempt(original, other)
    with pytest.raises(StreamlineError, match="the first model must be the original"):
        attempt(other, original)
    with pytest.raises(StreamlineError, match="two models have one label"):
        attempt(original, replace(other, label="original"))
    with pytest.raises(StreamlineError, match="length 65: the models take windows of at most 64"):
        attempt(original, data=replace(DATA, ids=token_ids(3, 65)))
    with pytest.raises(StreamlineError, match="eval-samples 1"):
        attempt(original, data=replace(DATA, ids=token_ids(1, 40)))
    with pytest.raises(StreamlineError, match="rounds 1"):
        attempt(original, rounds=1)
    with pytest.raises(StreamlineError, match="no such folder"):
        attempt(original, ComparedModel("gone", str(folder / "gone")))


def test_an_export_of_the_original_is_recognised(folder: Path, tmp_path: Path) -> None:
    def export(name: str, source: str) -> str:
        (tmp_path / name).mkdir()
        source_fingerprint = fingerprint(ModelSource(str(folder / source)))
        Artifact(str(tmp_path / name), "onnx", "fp32", "gone", source_fingerprint, {}, (0,)).write(tmp_path / name)
        return str(tmp_path / name)

    paths = [str(folder / "candidate"), export("a", "original"), export("b", "candidate")]
    compared_models = mark_original_exports(compared_models_of(ModelSource(str(folder / "original")), paths))
    assert [compared.role for compared in compared_models] == ["original", "candidate", "original", "candidate"]
    assert json.loads((tmp_path / "a" / "artifact.json").read_text())["source"] == "gone"
    both_exported = mark_original_exports(compared_models_of(ModelSource(paths[1]), [paths[2]]))
    assert [compared.role for compared in both_exported] == ["original", "candidate"]


def test_an_export_of_the_original_that_was_edited_is_a_candidate(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("graph")
    source_fingerprint = fingerprint(ModelSource(str(folder / "original")))
    artifact = Artifact(str(tmp_path), "onnx", "fp32", "gone", source_fingerprint, {}, (0,))
    artifact.with_files(tmp_path).write(tmp_path)
    compared_models = compared_models_of(ModelSource(str(folder / "original")), [str(tmp_path)])
    assert mark_original_exports(compared_models)[1].role == "original"
    (tmp_path / "model.onnx").write_text("edited")
    assert mark_original_exports(compared_models)[1].role == "candidate"


def hub_cache(root: Path) -> str:
    """A cache folder in the Hub client's layout that holds `org/small`."""
    repository = root / "models--org--small"
    tiny_model().save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return str(root)


def test_a_model_of_the_hub_is_read_from_the_cache_it_was_put_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untimed: Timer
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch_checkpoint.cache_clear()  # other tests know a model of this name, too
    cache = hub_cache(tmp_path / "cache")
    compared_models = compared_models_of(ModelSource("org/small", cache), [str(folder / "candidate")])
    result = validate(compared_models, DATA, Budget(), rounds=2, prompt_length=8, decode_tokens=2)
    assert [row.label for row in result.rows] == ["small", "candidate"]
    assert result.rows[0].disk_bytes >= result.rows[0].parameters * 4
    assert Path(untimed.jobs[0].path).is_relative_to(cache)
    with pytest.raises(StreamlineError, match="model 'org/small': cannot be fetched"):
        validate(compared_models_of(ModelSource("org/small"), []), DATA, Budget())

    source_fingerprint = fingerprint(ModelSource("org/small", cache))
    Artifact(str(tmp_path), "onnx", "fp32", "org/small", source_fingerprint, {}, (0,)).write(tmp_path)
    export = mark_original_exports(compared_models_of(ModelSource("org/small", cache), [str(tmp_path)]))[1]
    assert export.role == "original"


CODE = """
import os
from pathlib import Path
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        (Path(os.environ["OWN_CODE_RAN"]) / str(os.getpid())).touch()
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint `own` with code, which leaves a file in the folder `processes` for each process that it runs in."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # for the worker
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    processes = tmp_path / "processes"
    processes.mkdir()
    monkeypatch.setenv("OWN_CODE_RAN", str(processes))
    model = tiny_model()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "modeling_own.py").write_text(CODE)
    return tmp_path


def test_trusted_code_of_a_checkpoint_runs(own_code: Path) -> None:
    compared_models = compared_models_of(ModelSource(str(own_code / "own"), trust_remote_code=True), [])
    validate(compared_models, DATA, Budget(), rounds=2, prompt_length=8, decode_tokens=2)
    # This process, for accuracy, and the one that was timed.
    assert len(list((own_code / "processes").iterdir())) == 2


def test_code_of_a_checkpoint_does_not_run_unless_it_is_trusted(own_code: Path, untimed: Timer) -> None:
    compared_models = compared_models_of(ModelSource(str(own_code / "own")), [])
    validate(compared_models, DATA, Budget(), rounds=2, prompt_length=8, decode_tokens=2)
    assert list((own_code / "processes").iterdir()) == []
    assert not untimed.jobs[0].trust_remote_code


def test_labels_tell_models_apart() -> None:
    assert [s.label for s in compared_models_of(ModelSource("/a/model"), ["/b/pruned"])] == ["model", "pruned"]
    assert [s.label for s in compared_models_of(ModelSource("/a/model"), ["/b/model", "/c"])] == [
        "/a/model",
        "/b/model",
        "c",
    ]
