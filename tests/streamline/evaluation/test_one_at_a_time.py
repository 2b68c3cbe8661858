"""Models that do not fit into memory together: the same figures, one model open at a time."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from console import optimum_cli
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation import one_at_a_time
from optimum.streamline.evaluation.accuracy import measure_accuracy
from optimum.streamline.evaluation.multiple_choice import Question, Questions, answer_questions
from optimum.streamline.evaluation.one_at_a_time import NOTE, fit_together, measure_one_at_a_time
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.validate import compared_models_of, validate
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.recipe.recipe import Budget
from optimum.streamline.reporting.wording import note
from optimum.streamline.runtime.runner import Runner
from optimum.streamline.runtime.torch_runner import TorchRunner
from optimum.streamline.system import disk
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from timer import Timer
from tiny import VOCABULARY, tiny_model, token_ids

DATA = Windows(token_ids(5, 12), "random", documents=(0, 0, 1, 1, 2))
LABELS = ["original", "second", "third"]
QUESTIONS = Questions("q.jsonl", tuple(Question(line, (1, line), ((3, 4), (5,)), line % 2) for line in range(1, 5)))


def test_the_figures_are_those_of_models_in_memory_together() -> None:
    def opened(seed: int) -> Runner:
        return TorchRunner(tiny_model(seed=seed))

    runners = [opened(seed) for seed in range(3)]
    expected = measure_accuracy(runners, LABELS, DATA)
    expected_answers = answer_questions(runners, LABELS, QUESTIONS)
    models = [lambda seed=seed: opened(seed) for seed in range(3)]
    runtimes, accuracies, answers = measure_one_at_a_time(models, LABELS, DATA, QUESTIONS)
    assert runtimes == [runner.runtime for runner in runners]
    for found, wanted in zip(accuracies, expected, strict=True):
        for name in ("loss", "kl", "agreement", "tokens"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
        assert found.documents == wanted.documents
    assert accuracies[1].kl.min() > 0
    for mine, theirs in zip(answers, expected_answers, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(mine.losses, theirs.losses, strict=True))
    assert measure_one_at_a_time(models, LABELS, DATA, None)[2] == [None] * 3


def test_one_model_is_open_at_a_time() -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []

    def opening(seed: int) -> Callable[[], Runner]:
        def open_model() -> Runner:
            assert all(ref() is None for ref in alive), "the model before is still in memory"
            model = tiny_model(seed=seed)
            alive.append(weakref.ref(model))
            return TorchRunner(model)

        return open_model

    measure_one_at_a_time([opening(seed) for seed in range(3)], LABELS, DATA, QUESTIONS)
    assert len(alive) == 3


def test_models_that_cannot_be_compared_are_refused() -> None:
    small, large = lambda: TorchRunner(tiny_model()), lambda: TorchRunner(tiny_model(vocab_size=VOCABULARY + 1))
    with pytest.raises(StreamlineError, match=r"^second: has a vocabulary of \d+ tokens, but original has"):
        measure_one_at_a_time([small, large], LABELS[:2], DATA, None)
    broken = tiny_model()
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(StreamlineError, match="^original: its logits are not finite"):
        measure_one_at_a_time([lambda: TorchRunner(broken), small], LABELS[:2], DATA, None)


def test_a_disk_without_room_for_the_logits_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = r"^eval-samples 5: the models do not fit into memory together, and .* take 0\.0 GB in .*\(No space left"
    models = [lambda: TorchRunner(tiny_model())] * 2

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StreamlineError, match=wanted):
        patch.setattr(disk.os, "posix_fallocate", full)
        measure_one_at_a_time(models, LABELS[:2], DATA, None)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(StreamlineError, match=wanted):
        measure_one_at_a_time(models, LABELS[:2], DATA, None)


def test_the_memory_that_is_free_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_at_a_time, "free_memory", lambda: 1200)
    monkeypatch.setattr(one_at_a_time, "taken_memory", lambda: 1000)
    monkeypatch.setattr(one_at_a_time, "PROGRAM", 100)
    assert fit_together([500, 333], "cpu", None)
    assert not fit_together([500, 335], "cpu", None)
    assert fit_together([10**9], "cpu", None)  # one model cannot be divided
    assert fit_together([500, 333], "cpu", 2200)
    assert not fit_together([500, 333], "cpu", 2100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    emptied = list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 10**9))
    assert not fit_together([600, 400], "cuda", None)
    assert emptied  # what torch keeps for later is free


def test_a_report_says_that_models_were_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("original", "candidate")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    models = compared_models_of(ModelSource(str(tmp_path / "original")), [str(tmp_path / "candidate")])
    timer, said = Timer(), list[str]()
    timed: list[int] = []
    monkeypatch.setattr(
        "optimum.streamline.evaluation.validate.time_alternating",
        lambda jobs, *rest: timed.append(len(jobs)) or timer(jobs, *rest),
    )

    def report(limit: int | None) -> Report:
        size = {"prompt_length": 8, "decode_tokens": 2, "rounds": 3}
        return validate(models, DATA, Budget(), max_memory=limit, notify=said.append, **size)

    together, alone = report(None), report(1)
    assert timed == [2, 1, 1]
    assert said == [NOTE]
    assert "took turns on the same machine" in note(together)
    assert "were timed one after another, so ratios of times are not paired" in note(alone)
    assert alone.settings == {**together.settings, "in_memory": "one at a time"}
    for one, other in zip(alone.rows, together.rows, strict=True):
        assert (one.perplexity, one.kl, one.agreement) == (other.perplexity, other.kl, other.agreement)


@pytest.mark.slow
def test_the_command_takes_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    candidate, text = tmp_path / "candidate", ("--eval-data", "stdlib:eval", "--eval-samples", 4, "--length", 32)
    shutil.copytree(REFERENCE, candidate)
    words = ("--max-memory", "1MB", "--rounds", 2, *text, "--output", tmp_path / "report")
    done = optimum_cli(monkeypatch, capsys, "streamline", "validate", REFERENCE, candidate, *words)
    assert (done.code, done.err) == (0, "")
    assert f"{NOTE}\n" in done.out
