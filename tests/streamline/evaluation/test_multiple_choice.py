"""Multiple-choice accuracy and stability: the formula, faulty files, and the command."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from console import optimum_cli
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.intervals import mean_interval, softmax_mean_interval
from optimum.streamline.evaluation.multiple_choice import (
    Answers,
    Question,
    Questions,
    answer_questions,
    option_loss,
    read_questions,
)
from optimum.streamline.evaluation.validate import compared_models_of, validate
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.recipe.recipe import Budget
from optimum.streamline.runtime.torch_runner import TorchRunner
from optimum.streamline.text.sources import open_text
from optimum.streamline.text.windows import Windows
from reference import LIBRARY, REFERENCE
from tiny import VOCABULARY, tiny_model, token_ids

TOKENIZER = load_tokenizer(ModelSource(REFERENCE))


def random_questions(count: int, seed: int = 0) -> Questions:
    """Questions of 2 to 4 options of 1 to 5 random tokens."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most)))

    items = []
    for line in range(1, count + 1):
        options = tuple(tokens(1, 5) for _ in range(draw.randint(2, 4)))
        items.append(Question(line, tokens(1, 6), options, draw.randrange(len(options))))
    return Questions("random", tuple(items))


def perplexities(model: torch.nn.Module, question: Question) -> list[float]:
    """exp of the mean log-loss of each option, one token at a time."""
    found = []
    for option in question.options:
        loss = 0.0
        for place, token in enumerate(option):
            before = torch.tensor([[*question.prompt, *option[:place]]])
            with torch.no_grad():
                logits = model(before).logits[0, -1].double()
            loss -= math.log(math.exp(logits[token]) / sum(math.exp(logit) for logit in logits.tolist()))
        found.append(math.exp(loss / len(option)))
    return found


def test_stability_and_accuracy_are_the_formula() -> None:
    questions = random_questions(12)
    original, candidate = tiny_model(), tiny_model(seed=1)
    theirs, mine = answer_questions([TorchRunner(original), TorchRunner(candidate)], ["a", "b"], questions)
    tables = [[perplexities(model, item) for item in questions.items] for model in (original, candidate)]
    right = [
        [found.index(min(found)) == item.answer for found, item in zip(table, questions.items, strict=True)]
        for table in tables
    ]
    spread = [statistics.pstdev(found) for found in tables[0]]
    matches = [a == b for a, b in zip(*right, strict=True)]
    assert 0 < sum(matches) < 12
    assert mine.accuracy(0).value == pytest.approx(sum(right[1]) / 12)
    assert theirs.accuracy(0).value == pytest.approx(sum(right[0]) / 12)
    assert theirs.spread == pytest.approx(spread, rel=1e-5)
    # Perplexities of random models lie far apart, and one question has all weight: the formula on milder ones too.
    for scale in (1.0, 1e-2):
        total = sum(Decimal(s * scale).exp() for s in spread)
        expected = sum(Decimal(s * scale).exp() / total for s, match in zip(spread, matches, strict=True) if match)
        found = softmax_mean_interval(np.array(matches, float), theirs.spread * scale, 0).value
        assert found == pytest.approx(float(expected), rel=1e-3)
    assert mine.stability(theirs, 0).value == softmax_mean_interval(np.array(matches, float), theirs.spread, 0).value
    same = theirs.stability(theirs, 0)
    assert (same.low, same.value, same.high) == (1, 1, 1)


def answers(*questions: tuple[list[float], int]) -> Answers:
    return Answers(tuple(np.array(losses) for losses, _ in questions), np.array([right for _, right in questions]))


def test_it_is_not_the_first_weights() -> None:
    original = answers(([0.1, 0.9], 0), ([0.5, 1.6], 0), ([1.2, 0.3], 1))
    candidate = answers(([0.9, 0.1], 0), ([0.5, 1.1], 0), ([1.1, 0.2], 1))
    spread = [abs(math.exp(a) - math.exp(b)) / 2 for a, b in ((0.1, 0.9), (0.5, 1.6), (1.2, 0.3))]
    weights = [math.exp(s) / sum(map(math.exp, spread)) for s in spread]
    found = candidate.stability(original, 0).value
    assert found == pytest.approx(weights[1] + weights[2])
    # The public code's sum(weights[:matches]).
    assert abs(found - sum(weights[:2])) > 0.05
    assert original.effective_questions == pytest.approx(1 / sum(w * w for w in weights))


def test_being_wrong_in_another_way_is_stable() -> None:
    original, candidate = answers(([1, 0, 2], 0), ([0, 1, 2], 0)), answers(([2, 1, 0], 0), ([0, 2, 1], 0))
    assert candidate.stability(original, 0).value == 1


def test_perplexities_far_apart_do_not_overflow() -> None:
    # exp of these spreads is beyond any float; their softmax is not.
    original = answers(([0.0, 12.0], 0), ([0.0, 12.00001], 0), ([0.0, 3.0], 0))
    candidate = answers(([0.0, 12.0], 0), ([12.0, 0.0], 0), ([0.0, 3.0], 0))
    spreads = [Decimal(statistics.pstdev([1.0, math.exp(loss)])) for loss in (12.0, 12.00001, 3.0)]
    total = sum(s.exp() for s in spreads)
    interval = candidate.stability(original, 0)
    assert interval.value == pytest.approx(float((spreads[0].exp() + spreads[2].exp()) / total), rel=1e-9)
    # A resample may hold none of the heavy ones: the rest then share all weight, and there is still a figure.
    assert (interval.low, interval.high) == (0, 1)
    assert original.effective_questions == pytest.approx(1.7, abs=0.3)


def test_of_equal_options_the_first_is_the_answer() -> None:
    assert answers(([1.0, 1.0], 0), ([1.0, 1.0], 1)).correct.tolist() == [1, 0]


def test_what_is_not_a_number_is_no_answer() -> None:
    broken = answers(([math.nan, math.nan], 0), ([0.0, math.nan], 0))
    whole = answers(([0.0, 1.0], 0), ([0.0, 1.0], 0))
    assert broken.correct.tolist() == [0, 0]
    assert broken.stability(whole, 0).value == 0
    assert broken.accuracy(0).value == 0


def test_a_broken_original_is_refused_and_a_broken_candidate_is_not() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    runners, labels = [TorchRunner(tiny_model()), TorchRunner(broken)], ["whole", "broken"]
    assert answer_questions(runners, labels, random_questions(3))[1].accuracy(0).value == 0
    with pytest.raises(StreamlineError, match="broken: its perplexity is not finite on random, line 1"):
        answer_questions(runners[::-1], labels[::-1], random_questions(3))


def test_equal_weights_are_the_plain_mean() -> None:
    values = np.random.default_rng(1).random(30)
    weighted, plain = softmax_mean_interval(values, np.zeros(30), 7), mean_interval(values, np.ones(30), 7)
    assert (weighted.value, weighted.low, weighted.high) == pytest.approx((plain.value, plain.low, plain.high))


def written(folder: Path, *lines: object) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


GOOD = {"question": "def main", "options": ["():", " import os"], "answer": 0, "id": 7}


def test_questions_are_put_into_tokens_as_one_text(tmp_path: Path) -> None:
    questions = read_questions(written(tmp_path, GOOD, "", {**GOOD, "answer": 1}), TOKENIZER)
    assert [(item.line, item.answer) for item in questions.items] == [(1, 0), (3, 1)]
    for item, option in itertools.product(questions.items, (0, 1)):
        assert [*item.prompt, *item.options[option]] == TOKENIZER("def main" + GOOD["options"][option])["input_ids"]
    # Where a token reaches over the seam, it counts to the options: "imp" and "ort" are one token.
    seam = {"question": "import os\nimp", "options": ["ort sys", "air"], "answer": 0}
    item = read_questions(written(tmp_path, seam, GOOD), TOKENIZER).items[0]
    assert TOKENIZER.decode(item.prompt + item.options[0]).endswith("import sys")
    assert TOKENIZER.decode(item.prompt + item.options[1]).endswith("impair")
    assert item.options[0][0] != item.options[1][0]
    again = read_questions(written(tmp_path, GOOD, {**GOOD, "answer": 1}), TOKENIZER)
    other = read_questions(written(tmp_path, GOOD, GOOD), TOKENIZER)
    assert again.fingerprint == questions.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: must be one JSON object, such as"),
        ("[]", "line 2: must be one JSON object"),
        ({**GOOD, "question": ""}, "line 2: question '': must be text"),
        ({"options": ["a", "b"], "answer": 0}, "line 2: question None: must be text"),
        ({**GOOD, "options": ["a"]}, "line 2: options ['a']: must be a list of at least 2 texts"),
        ({**GOOD, "options": ["a", 3]}, "line 2: options ['a', 3]: must be"),
        ({**GOOD, "options": "ab"}, "line 2: options 'ab': must be"),
        ({**GOOD, "answer": 2}, "line 2: answer 2: must be the number of the correct option, from 0 to 1"),
        ({**GOOD, "answer": -1}, "line 2: answer -1: must be"),
        ({**GOOD, "answer": True}, "line 2: answer True: must be"),
        ({**GOOD, "answer": "A"}, "line 2: answer 'A': must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, part: str) -> None:
    file = written(tmp_path, GOOD, line)
    with pytest.raises(StreamlineError) as error:
        read_questions(file, TOKENIZER)
    assert f"questions {file}, {part}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"no\.jsonl: cannot be read \(No such file or directory\)"):
        read_questions(tmp_path / "no.jsonl", TOKENIZER)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(StreamlineError, match=r"latin: cannot be read \('utf-8' codec"):
        read_questions(tmp_path / "latin", TOKENIZER)
    with pytest.raises(StreamlineError, match="1 questions; give at least 2"):
        read_questions(written(tmp_path, GOOD), TOKENIZER)


def test_questions_that_no_model_can_read_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    data, compared_models = Windows(token_ids(2, 8), "random"), compared_models_of(ModelSource(str(tmp_path)), [])

    def attempt(*options: tuple[int, ...]) -> None:
        items = (Question(4, (5, 6), options, 0), Question(9, (5,), ((2,), (3,)), 0))
        validate(compared_models, data, Budget(), questions=Questions("q", items), rounds=2)

    with pytest.raises(StreamlineError, match="questions q, line 4: 65 tokens with its longest option, at most 64 fit"):
        attempt((5,), (5,) * 63)
    with pytest.raises(
        StreamlineError, match="questions q, line 4: token 128 is outside the models' vocabulary of 128"
    ):
        attempt((5,), (VOCABULARY,))


def continuations(count: int) -> list[dict[str, object]]:
    """What comes next, among three from elsewhere: code of the standard library's evaluation part."""
    texts = [text for text in open_text("stdlib:eval").documents if len(text) > 4000]
    questions: list[dict[str, object]] = []
    for number in range(count):
        before, right = texts[number % len(texts)][2000:2300], texts[number % len(texts)][2300:2450]
        others = [texts[(number + step) % len(texts)][3000:3150] for step in (1, 2, 3)]
        options = [*others[: number % 4], right, *others[number % 4 :]]
        questions.append({"question": before, "options": options, "answer": number % 4})
    return questions


@pytest.mark.slow
def test_the_command_reports_them_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_stock(ModelSource(REFERENCE), torch.float32)
    asked = continuations(8)
    file = written(tmp_path, *asked)
    questions = read_questions(file, TOKENIZER)
    kept = TorchRunner(model)
    losses = [[option_loss(kept, item.prompt, option) for option in item.options] for item in questions.items]
    apply_plan(model, Plan(16, tuple(range(3, 13))), None)
    model.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "pruned")

    words = ("streamline", "validate", REFERENCE, tmp_path / "pruned", "--questions", file, "--eval-samples", 2)
    outcome = optimum_cli(
        monkeypatch, capsys, *words, *LIBRARY["validate"], "--length", 32, "--output", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    original, pruned = report["rows"]
    correct = [found.index(min(found)) == item.answer for found, item in zip(losses, questions.items, strict=True)]
    assert original["question_accuracy"]["value"] == pytest.approx(sum(correct) / len(correct))
    assert original["question_accuracy"]["value"] > 0.4  # guessing gives a quarter
    assert original["stability"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0 <= pruned["stability"]["low"] <= pruned["stability"]["value"] <= pruned["stability"]["high"] <= 1
    assert report["questions"]["questions"] == len(questions.items)
    assert report["questions"]["questions_file"] == str(file)
    assert 1 <= report["questions"]["questions_effective"] <= len(questions.items)
    for text in (outcome.out, *((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))):
        assert "Correct answers" in text
        assert "Stability" in text


def test_the_command_names_a_bad_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, GOOD, {**GOOD, "answer": 5})
    words = ("streamline", "validate", REFERENCE, REFERENCE, "--questions", file, "--output", tmp_path / "out")
    outcome = optimum_cli(monkeypatch, capsys, *words, *LIBRARY["validate"])
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: questions {file}, line 2: answer 5: must be")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
