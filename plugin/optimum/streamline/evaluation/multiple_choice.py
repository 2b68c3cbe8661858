"""Multiple-choice questions: a model's accuracy, and its stability, a metric of the LLM-Streamline paper.

Stability measures how often a model and its original are both right or both wrong (arXiv 2403.19135). Questions come
from a JSON-lines file.
lm-eval scores one model on its own tasks; it does not compare two models.
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
        line: The line in its file, from 1.
        prompt: Tokens that come before every option.
        options: Tokens of each option.
        answer: The number of the correct option, from 0.
    """

    line: int
    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """The questions of a file.

    Args:
        file: The path of the file, as the user gave it.
        items: The questions, in order.
    """

    file: str
    items: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all tokens and answers. The same questions have the same fingerprint."""
        content = [(item.prompt, item.options, item.answer) for item in self.items]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check(self, positions: int, vocabulary: int) -> None:
        """Refuse questions that a model cannot read.

        Args:
            positions: The largest number of tokens in a sequence of the model.
            vocabulary: The size of the model's vocabulary.

        Raises:
            StreamlineError: a question is too long, or has a token outside the vocabulary.
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
    """The answers of one model to all questions.

    Args:
        losses: For each question, the mean log-loss of each option's tokens, in nats, `[options]`; NaN where the logits
            are NaN.
        right: The number of the correct option of each question, `[questions]`.
    """

    losses: tuple[Samples, ...]
    right: npt.NDArray[np.int64]

    @property
    def correct(self) -> Samples:
        """1 for each question whose correct option has the lowest perplexity, otherwise 0, `[questions]`.

        Among equal perplexities the first option is the answer. A question with a NaN loss counts as wrong.
        """
        chosen = [-1 if np.isnan(losses).any() else int(losses.argmin()) for losses in self.losses]
        return np.equal(chosen, self.right).astype(np.float64)

    @property
    def spread(self) -> Samples:
        """s_i: the population standard deviation of the perplexities exp(loss) of the options, `[questions]`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array([np.exp(losses).std() for losses in self.losses])

    @property
    def effective_questions(self) -> float:
        """The effective number of questions 1 / sum_i w_i^2, with the weights w of `stability` (Kish's formula)."""
        weights = np.exp(self.spread - self.spread.max())
        return float(weights.sum() ** 2 / (weights**2).sum())

    def accuracy(self, seed: int) -> Interval:
        """The share of questions answered correctly, 0 to 1, resampled over questions."""
        return mean_interval(self.correct, np.ones(len(self.losses)), seed)

    def stability(self, original: Answers, seed: int) -> Interval:
        """The stability against `original`, 0 to 1, as LLM-Streamline (arXiv 2403.19135) defines it.

            sum_i w_i * 1[(original right on i) == (this model right on i)],  w = softmax(s)

        s_i is the spread of the options' perplexities under the original (`spread`). Questions with a large spread
        count most. The spread is in units of perplexity, so a few questions can have nearly all the weight
        (`effective_questions`).

        Deviation: the authors' code counts the m questions that match and sums the first m weights, instead of the
        weights of these m questions. This is the formula of the paper.
        """
        return softmax_mean_interval((self.correct == original.correct).astype(np.float64), original.spread, seed)


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Read multiple-choice questions from a JSON-lines file, with one object on each line.

        {"question": "The capital of France is", "options": [" Paris", " London"], "answer": 0}

    Other keys are ignored. Question and option are joined without a space, so an option begins with its own space. They
    are tokenized together. The prompt is the longest start that the question and all joined texts have in common.

    Args:
        path: The file.
        tokenizer: The tokenizer of the models.

    Raises:
        StreamlineError: the file cannot be read, or a line is not such an object.
    """
    try:
        # Not `splitlines`, which also splits at characters that JSON text may contain, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StreamlineError(f"questions {path}: cannot be read ({reason}); give a file of lines {FORM}") from None
    items = [_read_line(path, number, line, tokenizer) for number, line in enumerate(lines, 1) if line.strip()]
    if len(items) < 2:
        raise StreamlineError(f"questions {path}: {len(items)} questions; give at least 2, one a line: {FORM}")
    return Questions(str(path), tuple(items))


def answer_questions(runners: Sequence[Runner], labels: Sequence[str], questions: Questions) -> list[Answers]:
    """Have every runner answer every question. Each option is read after the prompt in a sequence of its own.

    Args:
        runners: The runners, the original first.
        labels: The names of the runners in messages.
        questions: The questions.

    Returns:
        One `Answers` for each runner.

    Raises:
        StreamlineError: a perplexity of the original is not finite, so that the weights of stability are undefined.
    """
    losses: list[list[Samples]] = [[] for _ in runners]
    with progress_bar("asking questions", len(questions.items)) as bar:
        for item in questions.items:
            for runner, found in zip(runners, losses, strict=True):
                found.append(option_losses(runner, item))
            bar.advance()
    return answers_of(losses, labels, questions)


def answers_of(losses: Sequence[Sequence[Samples]], labels: Sequence[str], questions: Questions) -> list[Answers]:
    """The answers of models.

    Args:
        losses: For each model, `option_losses` of every question.
        labels: The names of the models.
        questions: The questions.

    Raises:
        StreamlineError: as `answer_questions`.
    """
    right = np.array([item.answer for item in questions.items], np.int64)
    answers = [Answers(tuple(found), right) for found in losses]
    broken = np.flatnonzero(~np.isfinite(answers[0].spread))
    if len(broken):
        line = questions.items[broken[0]].line
        raise StreamlineError(
            f"{labels[0]}: its perplexity is not finite on {questions.file}, line {line}; use dtype 'fp32'"
        )
    return answers


def option_losses(runner: Runner, question: Question) -> Samples:
    """The `option_loss` of each option of a question, `[options]`."""
    return np.array([option_loss(runner, question.prompt, option) for option in question.options])


def option_loss(runner: Runner, prompt: Sequence[int], option: Sequence[int]) -> float:
    """The mean log-loss of an option after a prompt: -1/n sum_t log p(option_t | prompt, option_<t), in nats."""
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
            path, number, f"answer {answer!r}: must be the number of the correct option, from 0 to {len(options) - 1}"
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
    for position, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, texts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _fault(file: Path | str, line: int, fault: str) -> StreamlineError:
    return StreamlineError(f"questions {file}, line {line}: {fault}")
