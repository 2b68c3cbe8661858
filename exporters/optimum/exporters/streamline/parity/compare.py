"""Whether an exported graph computes what the model computes: `check_parity`, run at every export.

The reference is one torch forward over the whole text, without a cache: so prefill, continuation and decode
are each held to the model itself. Whatever answers calls can be checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.runtime.runner import Logits, TokenIds

from .calls import Call, CallFunction, token_positions

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of a logit allowed, as a share of the largest reference logit of the check.

Rounding gives 1e-6 and 1e-3 on shallow models and grows with depth; a wrong mask, position or weight gives 1e-1.
"""

PROMPT, CONTINUATION = 12, 3
LONGEST_TEXT = PROMPT + CONTINUATION + 1
"""Tokens of the longest text that is asked."""

MIN_CORRELATION = 0.5
"""Correlation of a quantized graph's logits with torch's. Four bits left 0.90 to 0.99, a lost scale none."""

PADDED_LENGTHS = (PROMPT, 7, 4)
"""Prompt lengths of the padded batch: three rows, where the graph was traced with two."""


@dataclass(frozen=True)
class ParityCheck:
    """What is asked of some places of some texts, and what torch answers there.

    Args:
        check: What is checked.
        call: What is asked.
        expected: Torch's logits, `[rows, length, vocabulary]`.
        positions: Where in its own text each place is, `[rows, length]`, from 0; nothing is promised for padding,
            which lies before 0 and is not compared.
    """

    check: str
    call: Call
    expected: Logits
    positions: npt.NDArray[np.int64]

    def judge(self, got: Logits, tolerance: float) -> float:
        """The largest absolute difference of a logit that was answered, `[rows, length, vocabulary]`.

        Raises:
            ParityError: it is beyond the tolerance.
        """
        difference, row, position, token = self.largest_difference(got)
        allowed = tolerance * self.scale
        if not difference <= allowed:  # not `>`: a NaN must fail
            raise ParityError(
                f"parity: {self.check} differs from torch by {difference:.3g} in a logit, allowed is {allowed:.3g}; "
                f"most at row {row}, position {position}, token {token}"
            )
        return difference

    @property
    def scale(self) -> float:
        """The largest logit that is compared."""
        rows, columns = np.nonzero(self.positions >= 0)
        return float(np.abs(self.expected[rows, columns]).max())

    def correlation(self, got: Logits) -> float:
        """How alike the logits are that are compared, -1 to 1: their correlation over all tokens and places."""
        rows, columns = np.nonzero(self.positions >= 0)
        pair = np.stack([got[rows, columns].ravel(), self.expected[rows, columns].ravel()]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # of constants it is not a number
            matrix: npt.NDArray[np.float64] = np.asarray(np.corrcoef(pair))
        return float(matrix[0, 1])

    def largest_difference(self, got: Logits) -> tuple[float, int, int, int]:
        """The largest absolute difference, and its row, position and token."""
        rows, columns = np.nonzero(self.positions >= 0)
        differences = np.abs(got[rows, columns] - self.expected[rows, columns])
        place, token = np.unravel_index(differences.argmax(), differences.shape)  # to `argmax`, a NaN is the largest
        row, position = int(rows[place]), int(self.positions[rows[place], columns[place]])
        return float(differences[place, token]), row, position, int(token)


def check_parity(model: PreTrainedModel, answer: CallFunction, tolerance: float) -> dict[str, float]:
    """Compare answers with those of `model` on prefill, continuation, decode and a left-padded batch.

    Args:
        model: The source, in evaluation mode, computed on the CPU.
        answer: What is to be judged.
        tolerance: As in `TOLERANCES`.

    Returns:
        The largest absolute logit difference, by check.

    Raises:
        ParityError: a difference is beyond the tolerance; says which check, the difference, what was allowed, and
            where it is largest: the row of the batch, the position in the row's text, the token id, all from 0.
    """
    return {question.check: question.judge(got, tolerance) for question, got in _answered(model, answer)}


def check_finite(model: PreTrainedModel, dtype: str) -> None:
    """Refuse a model that gives no numbers in the type it is to be exported in, before its graph is made.

    Raises:
        StreamlineError: its logits are not finite.
    """
    ids = _tokens(model, 1, LONGEST_TEXT)
    logits = _reference(model, ids, np.ones_like(ids))
    model.tie_weights()  # weights that stay on disk are put back one by one, shared ones as two
    if not np.isfinite(logits).all():
        raise StreamlineError(
            f"dtype {dtype!r}: the model's logits are not finite when it is computed in it"
            + ("; give dtype 'fp32', or 'bf16' on cuda" if dtype == "fp16" else "")
        )


def measure_divergence(model: PreTrainedModel, answer: CallFunction) -> dict[str, float]:
    """How far answers that need not be those of `model` are from them.

    Returns:
        The largest absolute logit difference as a share of the largest logit, by check.

    Raises:
        ParityError: an answer is not a number, or has little to do with the model's.
    """
    shares: dict[str, float] = {}
    for question, got in _answered(model, answer):
        share = question.largest_difference(got)[0] / question.scale
        if not np.isfinite(share):
            raise ParityError(f"parity: {question.check} gives what is not a number")
        alike = question.correlation(got)
        if not alike >= MIN_CORRELATION:
            raise ParityError(
                f"parity: {question.check} is not the model any more: its logits and torch's correlate by {alike:.2f}, "
                f"at least {MIN_CORRELATION} is needed"
            )
        shares[question.check] = share
    return shares


def _answered(model: PreTrainedModel, answer: CallFunction) -> Iterator[tuple[ParityCheck, Logits]]:
    questions = (*_one_row(model), *_padded_rows(model))
    return zip(questions, answer([question.call for question in questions]), strict=True)


def _one_row(model: PreTrainedModel) -> Iterator[ParityCheck]:
    ids = _tokens(model, 1, LONGEST_TEXT)
    mask, positions = np.ones_like(ids), np.arange(ids.shape[1])[None]
    expected = _reference(model, ids, mask)
    ends = (0, PROMPT, PROMPT + CONTINUATION, ids.shape[1])
    for place, check in enumerate(("prefill", "continuation", "decode")):
        part, end = slice(ends[place], ends[place + 1]), ends[place + 1]
        call = Call(ids[:, part], mask[:, :end], place - 1 if place else None)
        yield ParityCheck(check, call, expected[:, part], positions[:, part])


def _padded_rows(model: PreTrainedModel) -> Iterator[ParityCheck]:
    ids = _tokens(model, len(PADDED_LENGTHS), PROMPT + 1)
    positions = np.arange(PROMPT + 1) - (PROMPT - np.array(PADDED_LENGTHS)[:, None])
    mask = (positions >= 0).astype(np.int64)
    expected = _reference(model, ids, mask)
    prompt, token = slice(PROMPT), slice(PROMPT, PROMPT + 1)
    first = Call(ids[:, prompt], mask[:, prompt])
    yield ParityCheck("left-padded prefill", first, expected[:, prompt], positions[:, prompt])
    yield ParityCheck("left-padded decode", Call(ids[:, token], mask, 3), expected[:, token], positions[:, token])


def _tokens(model: PreTrainedModel, rows: int, length: int) -> TokenIds:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length), dtype=np.int64)


@torch.inference_mode()
def _reference(model: PreTrainedModel, ids: TokenIds, mask: npt.NDArray[np.int64]) -> Logits:
    """Logits `[batch, length, vocabulary]` of one forward without cache."""
    positions = token_positions(mask, mask.shape[1])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    output = model(**tensors, use_cache=False)
    logits: Logits = output.logits.float().cpu().numpy()
    return logits
