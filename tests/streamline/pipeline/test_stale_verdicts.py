"""A verdict is repeated for the very bytes that it was found of, and for no others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optimum.commands.optimum_cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from console import Outcome, optimum_cli
from optimum.streamline.evaluation import validate
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.timing_processes import WorkerResult
from optimum.streamline.pipeline import run
from optimum.streamline.system import environment
from optimum.streamline.text.sources import open_text
from reference import REFERENCE
from timer import Timer
from tiny import tiny_model

Cli = Callable[..., Outcome]
WEIGHTS = "model.safetensors"
RUN = ("run", "-m", "source", "out", "--layers", 3, "--calibration", "stdlib", "--samples", 2, "--length", 32)
JUDGED = ("--eval-data", "eval.txt", "--eval-samples", 8, "--max-kl", 50)
AGAIN = "report.json exists already, for the same files"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `source`, `eval.txt`, and `out`, which a run made of them."""
    root = tmp_path_factory.mktemp("finished")
    tiny_model(vocab_size=4096).save_pretrained(root / "source")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(root / "source")
    (root / "eval.txt").write_text("".join(list(open_text("stdlib:eval").documents)[:20]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(root)
        patch.setattr(validate, "time_alternating", Timer())
        patch.setattr("sys.argv", ["optimum-cli", "streamline", *map(str, (*RUN, *JUDGED))])
        main()
    assert end.value.code == 0
    return root


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    timer = Timer()
    monkeypatch.setattr(validate, "time_alternating", timer)
    return timer


@pytest.fixture
def cli(
    finished: Path, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """The commands, called in a copy of that folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "copy"))
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


def state(folder: str = "out") -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(folder).rglob("*")}


def edit_weights(file: str = f"out/{WEIGHTS}") -> None:
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, file, metadata={"format": "pt"})


def truncate_weights() -> None:
    file = Path("out", WEIGHTS)
    file.write_bytes(file.read_bytes()[:-1000])


def edit_json(name: str, **fields: Any) -> None:
    file = Path("out", name)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_report(change: Callable[[dict[str, Any]], object], sign: bool = False) -> None:
    fields = json.loads(Path("out/report.json").read_text())
    del fields["digest"]
    change(fields)
    fields["digest"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest() if sign else "0" * 64
    Path("out/report.json").write_text(json.dumps(fields))


def test_untouched_nothing_is_written_or_measured_again(cli: Cli, timer: Timer) -> None:
    before = state()
    outcome = cli(*RUN, *JUDGED)
    assert (outcome.code, outcome.err, timer.asked) == (0, "", 0)
    assert AGAIN in outcome.out
    assert "Within budget." in outcome.out
    assert state() == before


def test_another_limit_of_memory_measures_nothing_again(cli: Cli, timer: Timer) -> None:
    outcome = cli(*RUN, *JUDGED, "--max-memory", "64GB")
    assert (outcome.code, outcome.err, timer.asked) == (0, "", 0)
    assert AGAIN in outcome.out


CHANGED = "is not what streamline.json says was written"
OUTPUT_EDITS: dict[str, tuple[Callable[[], object], str]] = {
    "edited weights": (edit_weights, f"{WEIGHTS} {CHANGED}"),
    "truncated weights": (truncate_weights, f"{WEIGHTS} {CHANGED}"),
    "edited config": (lambda: edit_json("config.json", rms_norm_eps=0.5), f"config.json {CHANGED}"),
    "deleted config": (
        lambda: Path("out/config.json").unlink(),
        "config.json, which streamline.json says was written, is gone",
    ),
    "edited tokenizer": (lambda: edit_json("tokenizer.json", version="2"), f"tokenizer.json {CHANGED}"),
    "added code": (
        lambda: Path("out/modeling_own.py").touch(),
        "modeling_own.py is not among the files that streamline.json says were written",
    ),
    "record without hashes": (
        lambda: edit_json("streamline.json", files=None),
        "streamline.json has no hashes of the files, so changed files would not be noticed",
    ),
}


@pytest.mark.parametrize("kind", OUTPUT_EDITS)
def test_an_output_that_is_not_what_was_written_is_refused(cli: Cli, timer: Timer, kind: str) -> None:
    edit, said = OUTPUT_EDITS[kind]
    edit()
    before = state()
    outcome = cli(*RUN, *JUDGED)
    assert (outcome.code, timer.asked) == (2, 0)
    assert outcome.err == f"error: output out: {said}; choose another folder, or pass --overwrite\n"
    assert state() == before


def test_overwriting_makes_an_edited_output_anew(cli: Cli, timer: Timer) -> None:
    made = Path("out", WEIGHTS).read_bytes()
    edit_weights()
    assert cli(*RUN, *JUDGED, "--overwrite").code == 0
    assert (Path("out", WEIGHTS).read_bytes(), timer.asked) == (made, 1)


def test_source_weights_replaced_by_others_of_the_same_size_are_another_model(cli: Cli) -> None:
    size = Path("source", WEIGHTS).stat().st_size
    tiny_model(vocab_size=4096, seed=1).save_pretrained("source")
    assert Path("source", WEIGHTS).stat().st_size == size
    outcome = cli(*RUN, *JUDGED)
    assert outcome.code == 2
    assert "out: made from another model; choose another folder, or pass --overwrite" in outcome.err


def test_a_source_whose_tokenizer_was_edited_is_measured_anew(cli: Cli, timer: Timer) -> None:
    file = Path("source/tokenizer_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    outcome = cli(*RUN, *JUDGED)
    assert (outcome.code, timer.asked) == (0, 1)
    assert "report.json describes other files, text, settings, machine or versions; measuring again" in outcome.out


REPORT_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows": lambda report: report["rows"][1].update(kl={"value": 0.0, "low": 0.0, "high": 0.0}),
    "verdict flag": lambda report: report.update(passed=False, exit_code=3),
}


@pytest.mark.parametrize("kind", REPORT_EDITS)
def test_a_tampered_report_is_not_believed(cli: Cli, timer: Timer, kind: str) -> None:
    rows = Report.from_json(Path("out/report.json").read_text()).rows
    edit_report(REPORT_EDITS[kind])
    outcome = cli(*RUN, *JUDGED)
    assert (outcome.code, timer.asked) == (0, 1)
    assert "not the report that was written: its digest does not match its content; measuring again" in outcome.out
    assert Report.from_json(Path("out/report.json").read_text()).rows == rows


def test_a_report_of_other_files_is_made_anew_though_its_digest_fits(cli: Cli, timer: Timer) -> None:
    edit_report(lambda report: report["rows"][1]["files"].update({WEIGHTS: "0" * 64}), sign=True)
    assert "describes other files, text, settings, machine or versions; measuring again" in cli(*RUN, *JUDGED).out
    assert timer.asked == 1


def test_a_verdict_is_judged_again_from_the_rows(cli: Cli, timer: Timer) -> None:
    strict = (*RUN, *JUDGED[:-1], 1e-9)
    assert cli(*strict).code == 3
    edit_report(lambda report: report["verdict"].update(limits=[]), sign=True)  # with none, all hold
    assert Report.from_json(Path("out/report.json").read_text()).verdict.passed
    outcome = cli(*strict)
    assert (outcome.code, timer.asked) == (3, 0)
    assert "judged again" in outcome.out


def test_a_bound_that_is_past_the_limit_fails_unless_the_point_is_judged(cli: Cli, timer: Timer) -> None:
    kl = Report.from_json(Path("out/report.json").read_text()).rows[1].kl
    limit = (*RUN, *JUDGED[:-1], (kl.value + kl.high) / 2)
    outcome = cli(*limit)
    assert outcome.code == 3
    assert "undecided" in outcome.out
    assert " more windows (--eval-samples " in outcome.out
    assert "Not shown to be within budget." in outcome.out
    outcome = cli(*limit, "--judge", "point")
    assert outcome.code == 0
    assert "holds, but its interval reaches past the limit" in outcome.out
    assert timer.asked == 0


def test_other_text_of_the_same_name_is_measured_anew(cli: Cli, timer: Timer) -> None:
    fingerprint = Report.from_json(Path("out/report.json").read_text()).data["fingerprint"]
    text = Path("eval.txt").read_text()
    Path("eval.txt").write_text(text[200:])
    assert "measuring again" in cli(*RUN, *JUDGED).out
    assert timer.asked == 1
    assert Report.from_json(Path("out/report.json").read_text()).data["fingerprint"] != fingerprint


def test_an_edited_page_is_written_as_the_report_has_it(cli: Cli, timer: Timer) -> None:
    page, words = Path("out/report.html"), Path("out/report.md")
    before = page.read_text(), words.read_text()
    page.write_text("All is well.")
    words.unlink()
    assert cli(*RUN, *JUDGED).code == 0
    assert ((page.read_text(), words.read_text()), timer.asked) == (before, 0)


def test_validate_says_that_a_candidate_was_edited_since_it_was_made(cli: Cli) -> None:
    words = ("validate", "source", "out", "--eval-data", "eval.txt", "--eval-samples", 8, "--length", 32)
    said = f"out: {WEIGHTS} {CHANGED}. The record does not describe the model that was measured."
    assert "that record" not in cli(*words, "--output", "before").out
    edit_weights()
    outcome = cli(*words, "--output", "after")
    assert (outcome.code, outcome.out.count(said)) == (0, 1)
    assert said in Path("after/report.html").read_text()
    assert said in Path("after/report.md").read_text()
    [_, row] = json.loads(Path("after/report.json").read_text())["rows"]
    assert row["changed"] == [f"{WEIGHTS} {CHANGED}"]
    assert row["files"][WEIGHTS] == hashlib.sha256(Path("out", WEIGHTS).read_bytes()).hexdigest()


def test_a_model_that_changes_while_it_is_measured_is_refused(
    cli: Cli, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit_and_time(*how: Any) -> list[WorkerResult]:
        edit_weights(f"source/{WEIGHTS}")
        return timer(*how)

    monkeypatch.setattr(validate, "time_alternating", edit_and_time)
    words = ("validate", "source", "out", "--eval-data", "eval.txt", "--eval-samples", 8, "--length", 32)
    outcome = cli(*words, "--output", "report")
    assert outcome.code == 2
    assert outcome.err == f"error: source: {WEIGHTS} was changed while it was measured; measure it again\n"
    assert not Path("report").exists()


def test_validate_times_as_many_rounds_as_it_is_asked_to(cli: Cli, timer: Timer) -> None:
    words = ("validate", "source", "out", "--eval-data", "eval.txt", "--eval-samples", 8, "--length", 32)
    assert cli(*words, "--output", "report", "--rounds", 17).code == 0
    assert json.loads(Path("report/report.json").read_text())["settings"]["rounds"] == 17
    outcome = cli(*words, "--output", "few", "--rounds", 1)
    assert (outcome.code, outcome.err) == (2, "error: rounds 1: must be at least 2\n")


def test_figures_of_another_machine_are_measured_anew(cli: Cli, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.describe_machine("cpu")
    monkeypatch.setattr(run, "describe_machine", lambda device: {**here, "processor": "another"})
    outcome = cli(*RUN, *JUDGED)
    assert outcome.code == 0
    assert "describes other files, text, settings, machine or versions; measuring again" in outcome.out
    assert timer.asked == 1
