"""LLM-Streamline's stability: does a model answer multiple-choice questions right and wrong where its original does?

Questions come from a JSON-lines file; models are asked through the `Runner` protocol. lm-eval, an extra, scores tasks
of its own, and not one model against another. This file knows neither what runs behind a runner nor how the figures are
shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Runner
from optimum.streamline.system.progress import progress_bar

from .intervals import Interval, Samples, mean_interval, softmax_mean_interval

FORM = '{"question": "...", "options": ["...", "..."], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """One multiple-choice question, in tokens.

    Args:
        line: Where it stands in its file, counted from 1.
        prompt: Tokens that come before every option.
        options: Tokens of each option.
        answer: Which option is right, counted from 0.
    """

    line: int
    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """Questions, and where they come from.

    Args:
        file: Their file, as it was named.
        items: The questions, in its order.
    """

    file: str
    items: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and answers: the same questions have the same one."""
        told = [(item.prompt, item.options, item.answer) for item in self.items]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def check(self, positions: int, vocabulary: int) -> None:
        """Refuse questions that a model cannot read.

        Args:
            positions: Tokens it takes at once.
            vocabulary: Tokens it knows.

        Raises:
            StreamlineError: a question is too long, or a token is unknown.
        """
        for item in self.items:
            longest = len(item.prompt) + max(len(option) for option in item.options)
            if longest > positions:
                raise _fault(self.file, item.line, f"{longest} tokens with its longest option, at most {positions} fit")
            largest = max(max(tokens) for tokens in (item.prompt, *item.options))
            if largest >= vocabulary:
                raise _fault(self.file, item.line, f"token {largest} is outside the models' vocabulary of {vocabulary}")


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model makes of every question.

    Args:
        losses: For each question the mean log-loss of each option's tokens after the prompt, nats, `[options]`; NaN
            where the model's logits are.
        right: For each question the right option, `[questions]`.
    """

    losses: tuple[Samples, ...]
    right: npt.NDArray[np.int64]

    @property
    def correct(self) -> Samples:
        """1 where the option of lowest perplexity is the right one, else 0, `[questions]`.

        Of equal ones the first is the answer; where a loss is not a number there is none.
        """
        chosen = [-1 if np.isnan(losses).any() else int(losses.argmin()) for losses in self.losses]
        return np.equal(chosen, self.right).astype(np.float64)

    @property
    def spread(self) -> Samples:
        """s_i, the standard deviation (over the population) of the options' perplexities exp(loss), `[questions]`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array([np.exp(losses).std() for losses in self.losses])

    @property
    def effective(self) -> float:
        """How many equally weighing questions the weights w amount to: 1 / sum_i w_i^2 (Kish's effective size)."""
        weights = np.exp(self.spread - self.spread.max())
        return float(weights.sum() ** 2 / (weights**2).sum())

    def accuracy(self, seed: int) -> Interval:
        """Share of questions answered right, 0 to 1, resampled over questions."""
        return mean_interval(self.correct, np.ones(len(self.losses)), seed)

    def stability(self, original: Answers, seed: int) -> Interval:
        """Stability against `original`, 0 to 1, as LLM-Streamline (arXiv 2403.19135) defines it.

            sum_i w_i * 1[(original right on i) == (this right on i)],  w = softmax_i(s_i),

        with s_i the spread of the options' perplexities under the original: questions it is decided on weigh most.
        The authors' code counts the matches m and sums the first m weights, whichever questions they belong to; this
        is the formula. The softmax is over perplexities, so a few questions can hold all weight: see `effective`.
        """
        return softmax_mean_interval((self.correct == original.correct).astype(np.float64), original.spread, seed)


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Multiple-choice questions of a JSON-lines file, one object a line; further keys are let be.

        {"question": "The capital of France is", "options": [" Paris", " London"], "answer": 0}

    An option follows its question with nothing put between, so a space stands where the text has one. Question and
    option are put into tokens together; the prompt is what the tokens of all of them have in common with the
    question's own.

    Raises:
        StreamlineError: the file cannot be read, or a line is not such an object: names the file and the line.
    """
    try:
        # Not `splitlines`: JSON text may hold what that takes for the end of a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StreamlineError(f"questions {path}: cannot be read ({reason}); give a file of lines {FORM}") from None
    items = [_read_line(path, number, line, tokenizer) for number, line in enumerate(lines, 1) if line.strip()]
    if len(items) < 2:
        raise StreamlineError(f"questions {path}: {len(items)} questions; give at least 2, one a line: {FORM}")
    return Questions(str(path), tuple(items))


def ask(runners: Sequence[Runner], labels: Sequence[str], questions: Questions) -> list[Answers]:
    """Put every question to every runner; each option is read after its prompt on its own.

    Args:
        runners: The original first.
        labels: What messages call the runners.

    Raises:
        StreamlineError: a perplexity of the first runner is not finite, so that nothing can be weighed by it.
    """
    losses: list[list[Samples]] = [[] for _ in runners]
    with progress_bar("asking questions", len(questions.items)) as bar:
        for item in questions.items:
            for runner, found in zip(runners, losses, strict=True):
                found.append(np.array([option_loss(runner, item.prompt, option) for option in item.options]))
            bar.advance()
    right = np.array([item.answer for item in questions.items], np.int64)
    answers = [Answers(tuple(found), right) for found in losses]
    broken = np.flatnonzero(~np.isfinite(answers[0].spread))
    if len(broken):
        line = questions.items[broken[0]].line
        raise StreamlineError(
            f"{labels[0]}: its perplexity is not finite on {questions.file}, line {line}; try dtype 'fp32'"
        )
    return answers


def option_loss(runner: Runner, prompt: Sequence[int], option: Sequence[int]) -> float:
    """Mean log-loss of an option's tokens after a prompt's, nats: -1/n sum_t log p(option_t | prompt, option_<t)."""
    logits, _ = runner.prefill(np.array([[*prompt, *option]], np.int64))
    log_p = torch.from_numpy(logits[0, len(prompt) - 1 : -1]).double().log_softmax(-1)
    return -log_p.gather(-1, torch.tensor(option)[:, None]).mean().item()


def _read_line(path: Path, number: int, line: str, tokenizer: PreTrainedTokenizerBase) -> Question:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise _fault(path, number, f"must be one JSON object, such as {FORM}")
    question, options, answer = (fields.get(key) for key in ("question", "options", "answer"))
    if not _is_text(question):
        raise _fault(path, number, f"question {question!r}: must be text")
    if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
        raise _fault(path, number, f"options {options!r}: must be a list of at least 2 texts")
    if type(answer) is not int or not 0 <= answer < len(options):
        raise _fault(
            path, number, f"answer {answer!r}: must be the right option's place, a number from 0 to {len(options) - 1}"
        )
    own = _tokens(tokenizer, question)
    texts = [_tokens(tokenizer, question + option) for option in options]
    shared = _shared_start([own, *texts])
    if not shared:
        raise _fault(path, number, f"question {question!r}: gives no token that comes before every option")
    if any(len(text) == shared for text in texts):
        raise _fault(path, number, f"options {options!r}: one of them gives no token of its own")
    return Question(number, tuple(own[:shared]), tuple(tuple(text[shared:]) for text in texts), answer)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: Any) -> list[int]:
    tokens: list[int] = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return tokens


def _shared_start(texts: Sequence[Sequence[int]]) -> int:
    for place, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, texts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _fault(file: Path | str, line: int, fault: str) -> StreamlineError:
    return StreamlineError(f"questions {file}, line {line}: {fault}")
