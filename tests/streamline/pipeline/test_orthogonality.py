"""The whole of `orthogonality`, and runs that quantize, on the trained reference model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from console import Outcome, optimum_cli
from optimum.streamline.evaluation.results import Report
from optimum.streamline.model_files.artifact import Artifact
from reference import LIBRARY, REFERENCE

pytestmark = [pytest.mark.onnx, pytest.mark.quantizers]

SMALL = (*LIBRARY["run"], "--remove", "25%", "--samples", "4", "--eval-samples", "4", "--length", "64")
SHORTGPT = ("--method", "shortgpt", *SMALL)
Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


def weights(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


@pytest.mark.slow
def test_every_model_is_measured_and_every_interaction_told(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("orthogonality", "-m", REFERENCE, "--output", out, "--quantizers", "int4,bnb-nf4", *SHORTGPT)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the models were scratch
    report = Report.from_json((out / "report.json").read_text())
    assert [row.label for row in report.rows] == [
        "dense",
        "pruned",
        "dense, onnx",
        "pruned, onnx",
        "int4",
        "pruned, int4",
        "int4, pruned",
        "bnb-nf4",
        "pruned, bnb-nf4",
        "bnb-nf4, pruned",
    ]
    rows = {row.label: row for row in report.rows}
    assert [rows[name].layers for name in ("dense", "pruned", "int4, pruned", "bnb-nf4, pruned")] == [16, 12, 12, 12]
    assert (rows["int4"].baseline, rows["bnb-nf4"].baseline) == ("dense, onnx", "dense")
    assert (rows["int4"].role, rows["dense, onnx"].role) == ("candidate", "original")
    orders = [(each.quantizer, each.steps) for each in report.interactions]
    assert orders == [
        (quantizer, steps) for quantizer in ("int4", "bnb-nf4") for steps in ("prune,quantize", "quantize,prune")
    ]
    for each in report.interactions:
        assert each.term is not None
        assert each.pruning is not None
        assert each.quantizing is not None
        assert each.together is not None
        expected = each.together.value - each.pruning.value - each.quantizing.value
        assert each.term.value == pytest.approx(expected, abs=1e-9)
        # The rows say the same of the same models.
        ratio = np.log(rows[each.both].perplexity_ratio.value)
        assert each.together.value == pytest.approx(ratio, abs=1e-4)
        assert each.pruning.value > 0.05
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Pruning and quantizing together" in page
    assert "## Pruning and quantizing together" in (out / "report.md").read_text()


@pytest.mark.slow
def test_an_order_that_is_not_possible_says_why(cli: Cli, tmp_path: Path) -> None:
    words = ("--quantizers", "bnb-nf4", "--method", "average", *SMALL)
    done = cli("orthogonality", "-m", REFERENCE, "--output", tmp_path / "out", *words)
    assert (done.code, done.err) == (0, "")
    first, second = Report.from_json((tmp_path / "out" / "report.json").read_text()).interactions
    assert first.term is not None
    assert second.term is None
    assert second.missing.startswith("method 'average': merges weights, so it needs float weights")
    assert "not measured: method" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quantizers", "int3"), "quantize 'int3': unknown; one of none, bnb-int8"),
        (("--quantizers", "int4,int4"), "quantizers 'int4,int4': must be different names of quantizers"),
        (("--quantizers", ""), "quantizers '': must be different names of quantizers"),
        (("--quantizers", "int4", "--quantize", "int4"), "unrecognized arguments: --quantize"),
        (("--quantizers", "int4", "--dtype", "fp16"), "quantize 'int4': starts from dtype 'fp32', not 'fp16'"),
    ],
)
def test_wrong_words_are_one_line(cli: Cli, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = cli("orthogonality", "-m", REFERENCE, "--output", tmp_path / "out", *words, *SHORTGPT)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_quantizes_is_refused_there(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: shortgpt\nremove: 25%\nquantize: bnb-nf4\n")
    words = ("orthogonality", "-m", REFERENCE, tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert "quantize 'bnb-nf4': orthogonality sets this itself" in cli(*words).err
    (tmp_path / "recipe.yaml").write_text("method: shortgpt\nremove: 25%\nquantize_exclude: 3\n")
    assert "quantize-exclude '3': orthogonality sets this itself" in cli(*words).err


def test_a_model_that_is_quantized_already_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert cli("quantize", "-m", REFERENCE, tmp_path / "model", "--quantize", "bnb-nf4").code == 0
    words = ("--quantizers", "int4", "--method", "shortgpt", "--remove", "1", "--heal", "none")
    done = cli("orthogonality", "-m", tmp_path / "model", "--output", tmp_path / "out", *words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is quantized (bnb-nf4) already; give the float model" in done.err
    assert not (tmp_path / "out").exists()


LAYER_11 = tuple(
    f"model.layers.11.{each}_proj"
    for each in (*(f"mlp.{name}" for name in ("down", "gate", "up")), *(f"self_attn.{name}" for name in "koqv"))
)
RUN = (*SHORTGPT, "--format", "onnx", "--quantize", "int8", "--quantize-exclude", "15")


@pytest.mark.slow
def test_a_run_scores_the_quantized_graph_where_that_comes_first(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "-m", REFERENCE, tmp_path / "not" / "there" / "out", *RUN, "--steps", "quantize,prune")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "not" / "there" / "out").rename(tmp_path / "out")
    assert "quantized (int8), prefill: " in done.out
    artifact = Artifact.read(tmp_path / "out" / "onnx")
    assert (artifact.quantize, artifact.quantize_exclude) == ("int8", LAYER_11)
    assert Artifact.read(tmp_path / "out" / "onnx-original").quantize == "none"
    scores = json.loads((tmp_path / "out" / "streamline.json").read_text())["scores"]["block_influence"]
    cli("score", "-m", REFERENCE, tmp_path / "scores", *LIBRARY["score"], "--samples", "4", "--length", "64")
    of_the_float_model = json.loads((tmp_path / "scores" / "scores.json").read_text())["block_influence"]
    assert scores != of_the_float_model
    assert scores == pytest.approx(of_the_float_model, abs=0.01)


@pytest.mark.slow
def test_a_run_quantizes_its_export_in_either_order(cli: Cli, tmp_path: Path) -> None:
    for name, steps in (("a", "prune,quantize"), ("b", "quantize,prune")):
        done = cli("run", "-m", REFERENCE, tmp_path / name, *RUN, "--steps", steps)
        assert (done.code, done.err) == (0, "")
    records = [json.loads((tmp_path / name / "streamline.json").read_text()) for name in "ab"]
    assert records[0]["removed"] == records[1]["removed"]  # so that it is one model
    artifacts = [Artifact.read(tmp_path / name / "onnx") for name in "ab"]
    assert [(each.quantize, each.quantize_exclude) for each in artifacts] == [("int8", LAYER_11)] * 2
    one, other = (weights(tmp_path / name / "onnx") for name in "ab")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    # Quantized otherwise, the checkpoint stays and the export is made anew.
    before = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    done = cli("run", "-m", REFERENCE, tmp_path / "a", *SHORTGPT, "--format", "onnx", "--quantize", "int4")
    assert (done.code, done.err) == (0, "")
    assert Artifact.read(tmp_path / "a" / "onnx").quantize == "int4"
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == before
    assert re.search(r"exporting .*onnx\n", done.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--quantize", "int4", "--method", "sleb", "--steps", "quantize,prune"),
            "method 'sleb': edits and runs the model to choose layers, which a quantized graph does not allow",
        ),
        (
            ("--quantize", "int8-static", "--method", "shortgpt", "--steps", "quantize,prune"),
            "steps 'quantize,prune': int8-static is calibrated on the inputs of each layer",
        ),
        (("--quantize", "bnb-nf4", "--method", "shortgpt"), "format 'onnx': quantize 'bnb-nf4' makes a checkpoint"),
        (("--quantize", "int4", "--quantize-exclude", "16"), "there is no layer 16; the model has layers 0 to 15"),
        (
            ("--quantize", "int4", "--quantize-exclude", "*.typo"),
            "quantize-exclude '*.typo': no linear module has this name",
        ),
        (("--quantize", "int4", "--dtype", "fp16"), "quantize 'int4': starts from dtype 'fp32', not 'fp16'"),
        (
            ("--quantize", "int4", "--method", "shortgpt", "--steps", "quantize,prune", "--dry-run"),
            "dry-run: with steps 'quantize,prune' the layers are scored in an export, which a dry run does not make",
        ),
    ],
)
def test_what_a_run_cannot_quantize_is_one_line(cli: Cli, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = cli("run", "-m", REFERENCE, tmp_path / "out", *SMALL, "--format", "onnx", *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert list(tmp_path.iterdir()) == []
