"""The whole chain on the reference model, by the command and from Python: resuming, the verdict, the exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from console import Outcome, optimum_cli
from optimum.streamline import StreamlineConfig, StreamlineError, Streamliner
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.evaluation.results import Report
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.pipeline import prune, texts
from optimum.streamline.text.sources import open_text
from reference import LIBRARY, REFERENCE

ROOT = Path(__file__).parents[3]
RECIPE = """
remove: 25%
replacement: mlp
calibration: stdlib
heal_data: stdlib
eval_data: stdlib
heal_tokens: 4096
samples: 4
eval_samples: 8
length: 64
"""

Cli = Callable[..., Outcome]
pytestmark = pytest.mark.onnx


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", "run", "-m", REFERENCE, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for the tests below, which go through a run's life in order."""
    return tmp_path_factory.mktemp("run")


def made_at(out: Path) -> dict[str, int]:
    files = ("model.safetensors", "onnx/model.onnx", "onnx-original/model.onnx", "report.json")
    return {name: (out / name).stat().st_mtime_ns for name in files}


@pytest.mark.usefixtures("untimed")
def test_one_command_does_the_whole_chain(cli: Cli, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE + "format: onnx\nbudget: {max_ppl_ratio: 100}\n")
    outcome = cli(folder / "recipe.yaml", folder / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "16 layers become 12" in outcome.out
    assert outcome.out.count("largest difference from torch, prefill: ") == 2
    assert str(folder / "out" / "report.html") in outcome.out
    report = Report.from_json((folder / "out" / "report.json").read_text())
    assert [(row.role, row.runtime, row.layers) for row in report.rows] == [
        ("original", "torch", 16),
        ("candidate", "torch", 12),
        ("original", "onnxruntime", 16),
        ("candidate", "onnxruntime", 12),
    ]
    original, candidate, original_onnx, candidate_onnx = report.rows
    assert original.perplexity_ratio.value == 1
    assert original_onnx.perplexity.value == pytest.approx(original.perplexity.value, rel=1e-4)
    assert candidate_onnx.perplexity.value == pytest.approx(candidate.perplexity.value, rel=1e-4)
    assert candidate_onnx.baseline == original_onnx.label
    assert candidate_onnx.kl.value > original_onnx.kl.value
    assert candidate.kv_bytes_per_token * 16 == original.kv_bytes_per_token * 11
    assert candidate_onnx.disk_bytes < 0.85 * original_onnx.disk_bytes
    html = (folder / "out" / "report.html").read_text()
    assert "<svg" in html
    assert not re.search(r"(src|href)=[\"']?https?:", html)
    assert len(report.scores or ()) == 16


def test_called_again_it_does_nothing_twice(cli: Cli, folder: Path) -> None:
    before = made_at(folder / "out")
    again = cli(folder / "recipe.yaml", folder / "out")
    assert again.code == 0
    assert made_at(folder / "out") == before


@pytest.mark.usefixtures("untimed")
def test_it_resumes_at_the_first_step_that_is_missing(cli: Cli, folder: Path) -> None:
    before = made_at(folder / "out")
    (folder / "out" / "report.json").unlink()
    assert cli(folder / "recipe.yaml", folder / "out").code == 0
    after = made_at(folder / "out")
    assert after.pop("report.json") > before.pop("report.json")
    assert after == before


@pytest.mark.usefixtures("untimed")
def test_an_edited_graph_and_a_broken_report_are_made_again(cli: Cli, folder: Path) -> None:
    out = folder / "out"
    before = made_at(out)
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    graph.doc_string = "edited"
    onnx.save(graph, out / "onnx" / "model.onnx")
    (out / "report.json").write_text("{")
    (out / "steps.json").write_text("{")
    outcome = cli(folder / "recipe.yaml", out)
    assert outcome.code == 0, outcome.err
    assert onnx.load(out / "onnx" / "model.onnx", load_external_data=False).doc_string != "edited"
    after = made_at(out)
    for name in ("onnx/model.onnx", "report.json"):
        assert after.pop(name) > before.pop(name)
    assert after == before


def test_a_checkpoint_that_is_broken_is_said_so(cli: Cli, folder: Path, tmp_path: Path) -> None:
    for name, text, message in (
        ("streamline.json", "{", "not a record of this program"),
        ("model.safetensors", None, "model.safetensors, which streamline.json says was written, is gone"),
    ):
        out = shutil.copytree(folder / "out", tmp_path / name)
        (out / name).unlink()
        if text is not None:
            (out / name).write_text(text)
        outcome = cli(folder / "recipe.yaml", out)
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_other_text_of_the_same_name_is_another_run(cli: Cli, tmp_path: Path) -> None:
    texts = list(open_text("stdlib:train").documents)
    (tmp_path / "text.txt").write_text(texts[0] + texts[1] + texts[2])
    words = (
        "--layers",
        5,
        "--calibration",
        tmp_path / "text.txt",
        "--eval-data",
        "stdlib",
        "--samples",
        4,
        "--eval-samples",
        8,
    )
    words += ("--length", 32)
    assert cli(*words, tmp_path / "out").code == 0
    (tmp_path / "text.txt").write_text(texts[3] + texts[4] + texts[5])
    outcome = cli(*words, tmp_path / "out")
    assert outcome.code == 2
    assert "made from another calibration text of the same name" in outcome.err


@pytest.mark.usefixtures("untimed")
def test_the_default_calibration_text_is_read_only_if_it_is_needed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: object) -> None:
        raise StreamlineError("the calibration text is read")

    monkeypatch.setattr(texts, "text_of_choice", unread)
    monkeypatch.setattr(prune, "text_of_choice", unread)
    judged = ("--eval-data", "stdlib:eval", "--eval-samples", 4, "--length", 64)
    outcome = cli(tmp_path / "out", "--layers", "3,5", *judged)
    assert outcome.code == 0, outcome.err
    assert "calibration" not in json.loads((tmp_path / "out" / "streamline.json").read_text())["data"]
    assert cli(tmp_path / "out", "--layers", "3,5", *judged).code == 0  # it resumes
    quantized, given = ("--format", "onnx", "--quantize", "int8-static"), ("--calibration", "stdlib:calibration")
    for needs in (("--replacement", "corrected"), quantized, given):
        refused = cli(tmp_path / "other", "--layers", "3,5", *judged, *needs)
        assert refused.code == 2
        assert "the calibration text is read" in refused.err


@pytest.mark.usefixtures("untimed")
def test_what_a_quantizer_was_calibrated_on_is_noticed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(open_text("stdlib:calibration").documents)
    (tmp_path / "text.txt").write_text("".join(found[:2]))
    for module in (texts, prune):  # as if this were the default text
        monkeypatch.setattr(module, "reads_calibration", lambda recipe: False)
    text = ("--calibration", tmp_path / "text.txt", "--samples", 2, "--eval-data", "stdlib:eval", "--eval-samples", 4)
    words = ("--layers", "3,5", *text, "--length", 32, "--format", "onnx", "--quantize", "int8-static")
    first = cli(tmp_path / "out", *words)
    assert first.code == 0, first.err
    assert f"calibration text: {tmp_path / 'text.txt'}, 2 windows" in first.out
    before = made_at(tmp_path / "out")
    assert cli(tmp_path / "out", *words).code == 0
    assert made_at(tmp_path / "out") == before
    (tmp_path / "text.txt").write_text("".join(found[2:4]))
    assert cli(tmp_path / "out", *words).code == 0
    after = made_at(tmp_path / "out")
    assert {name for name in before if after[name] > before[name]} == {"onnx/model.onnx", "report.json"}
    overlapping = cli(tmp_path / "other", *words, "--eval-data", tmp_path / "text.txt")
    assert overlapping.code == 2
    assert "text.txt" in overlapping.err


def test_another_budget_judges_the_same_figures_anew(cli: Cli, folder: Path) -> None:
    before = made_at(folder / "out")
    outcome = cli(folder / "recipe.yaml", folder / "out", "--max-kl", 1e-6)
    assert outcome.code == 3
    assert "judged again" in outcome.out
    assert "validating" not in outcome.out
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["passed"], report["exit_code"]) == (False, 3)
    after = made_at(folder / "out")
    assert after.pop("report.json") > before.pop("report.json")
    assert after == before


def test_another_recipe_is_refused(cli: Cli, folder: Path) -> None:
    before = fingerprint(ModelSource(str(folder / "out")))
    outcome = cli(folder / "recipe.yaml", folder / "out", "--remove", 5)
    assert outcome.code == 2
    assert "made from another recipe; choose another folder, or pass --overwrite" in outcome.err
    assert fingerprint(ModelSource(str(folder / "out"))) == before


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(("limit", "code"), [pytest.param(100, 0, marks=pytest.mark.slow), (1.0001, 3)])
def test_validate_pairs_each_with_the_original_in_its_runtime(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    limit: float,
    code: int,
) -> None:
    out = folder / "out"
    words = (REFERENCE, out, out / "onnx-original", out / "onnx", "--output", tmp_path / "report")
    settings = (*LIBRARY["validate"], "--eval-samples", 8, "--length", 64, "--max-ppl-ratio", limit)
    outcome = optimum_cli(monkeypatch, capsys, "streamline", "validate", *words, *settings)
    assert outcome.code == code, outcome.err
    report = Report.from_json((tmp_path / "report" / "report.json").read_text())
    assert report.exit_code == code
    assert [row.role for row in report.rows] == ["original", "candidate", "original", "candidate"]
    assert [row.baseline for row in report.rows] == [report.rows[i].label for i in (0, 0, 2, 2)]
    assert (tmp_path / "report" / "report.md").is_file()


def test_validate_refuses_the_text_a_candidate_was_made_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    # The text of the healing, under a name of its own.
    (tmp_path / "text.txt").write_text("".join(list(open_text("stdlib:train").documents)[:20]))
    words = (REFERENCE, folder / "out", "--eval-data", tmp_path / "text.txt", "--output", tmp_path / "report")
    outcome = optimum_cli(monkeypatch, capsys, "streamline", "validate", *words, "--length", 64, "--eval-samples", 32)
    assert outcome.code == 2
    assert "of its text with 'stdlib:train', which is used to make the model; give other text" in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.usefixtures("untimed")
def test_the_example_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    [example] = re.findall(r"## From Python\n\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    report = names["report"]
    assert isinstance(report, Report)
    assert [row.layers for row in report.rows] == [16, 12]
    assert load("out").config.num_hidden_layers == 12
    saved = json.loads((tmp_path / "out" / "streamline_config.json").read_text())
    assert StreamlineConfig(**saved).recipe == StreamlineConfig.from_pretrained(tmp_path / "out").recipe
    assert saved["pruning"]["remove"] == "25%"


def test_python_gets_errors_not_exits(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="unknown key 'remov'"):
        StreamlineConfig(remov=1)
    with pytest.raises(StreamlineError, match="no such folder"):
        Streamliner.from_pretrained(tmp_path / "none")


def report_of(cli: Cli, out: Path, *words: object) -> Report:
    """The report of a run with the recipe above and more options."""
    (out.parent / "recipe.yaml").write_text(RECIPE)
    outcome = cli(out.parent / "recipe.yaml", out, *words)
    assert outcome.code == 0, outcome.err
    return Report.from_json((out / "report.json").read_text())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [
        ("--replacement", "mlp"),
        ("--replacement", "linear", "--heal", "none"),
        ("--replacement", "corrected", "--heal", "none"),
        ("--replacement", "none", "--heal", "distill"),
        ("--replacement", "none", "--heal", "lm", "--lora"),
        ("--replacement", "none", "--method", "come", "--heal", "none"),
    ],
    ids=" ".join,
)
def test_a_gpu_makes_the_model_that_a_cpu_makes(cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
    on_cpu = report_of(cli, tmp_path / "on-cpu", *words, "--dtype", "fp32")
    on_gpu = report_of(cli, tmp_path / "on-gpu", *words, "--dtype", "fp32", "--device", "cuda")
    assert "gpu" in on_gpu.machine
    for expected, found in zip(on_cpu.rows, on_gpu.rows, strict=True):
        assert (found.role, found.layers) == (expected.role, expected.layers)
        assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=0.02)
    plans = [json.loads((tmp_path / name / "streamline.json").read_text())["plan"] for name in ("on-cpu", "on-gpu")]
    assert plans[0] == plans[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [("--dtype", "bf16"), ("--dtype", "bf16", "--quantize", "bnb-nf4"), ("--dtype", "fp16", "--format", "onnx")],
    ids=" ".join,
)
def test_the_whole_chain_runs_on_a_gpu(cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
    report = report_of(cli, tmp_path / "out", *words, "--device", "cuda")
    original, candidate = report.rows[:2]
    assert (original.layers, candidate.layers) == (16, 12)
    assert 1 < candidate.perplexity_ratio.value < 3
    assert candidate.peak_bytes > 0
    for row in report.rows[2:]:
        assert row.perplexity.value == pytest.approx(report.rows[report.rows.index(row) - 2].perplexity.value, rel=0.05)
