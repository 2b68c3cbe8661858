"""Compare an exported graph with the torch model; every export calls `check_parity`.

The reference is one torch forward pass over the whole text, without a cache. So prefill, continuation and decode of the
graph are each compared with the model itself.
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

from .model_calls import Call, CallFunction, token_positions

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""The largest difference of a logit that is allowed, as a share of the check's largest reference logit, by dtype.

On shallow models rounding gives about 1e-6 in fp32 and 1e-3 in fp16, and more on deeper ones. A wrong mask, position or
weight gives about 1e-1.
"""

PROMPT, CONTINUATION = 12, 3
LONGEST_TEXT = PROMPT + CONTINUATION + 1
"""The length in tokens of the longest text of the comparison."""

MIN_CORRELATION = 0.5
"""The least correlation of a quantized graph's logits with torch's.

Measured: 4-bit quantizers give 0.90 to 0.99; a graph whose scales are lost gives about 0.
"""

PADDED_LENGTHS = (PROMPT, 7, 4)
"""The prompt lengths of the padded batch, in tokens. It has three rows, and the graph was traced with four."""


@dataclass(frozen=True)
class ParityCheck:
    """One call and the logits that torch gives for it.

    Args:
        name: The name of the check, such as `prefill`.
        call: The call.
        expected: Torch's logits, `[batch, length, vocabulary]`.
        positions: The position of each token in its own text, `[batch, length]`, from 0. Padding has a negative
            position and is not compared.
    """

    name: str
    call: Call
    expected: Logits
    positions: npt.NDArray[np.int64]

    def judge(self, got: Logits, tolerance: float) -> float:
        """Compare logits with torch's; returns the largest absolute difference.

        Args:
            got: The logits to compare, `[batch, length, vocabulary]`.
            tolerance: The largest difference allowed, as a share of the largest reference logit.

        Raises:
            ParityError: the difference is larger than the tolerance allows, or is not a number.
        """
        difference, row, position, token = self.largest_difference(got)
        allowed = tolerance * self.scale
        if not difference <= allowed:  # not `>`, because a NaN must fail
            raise ParityError(
                f"parity: {self.name} differs from torch by {difference:.3g} in a logit, allowed is {allowed:.3g}; "
                f"most at row {row}, position {position}, token {token}"
            )
        return difference

    @property
    def scale(self) -> float:
        """The largest absolute reference logit among those that are compared."""
        rows, columns = np.nonzero(self.positions >= 0)
        return float(np.abs(self.expected[rows, columns]).max())

    def correlation(self, got: Logits) -> float:
        """The correlation of the compared logits with torch's, over all tokens and positions; from -1 to 1, or NaN."""
        rows, columns = np.nonzero(self.positions >= 0)
        pair = np.stack([got[rows, columns].ravel(), self.expected[rows, columns].ravel()]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # the correlation with a constant is NaN
            matrix: npt.NDArray[np.float64] = np.asarray(np.corrcoef(pair))
        return float(matrix[0, 1])

    def largest_difference(self, got: Logits) -> tuple[float, int, int, int]:
        """The largest absolute difference of a logit, and its row, position in the text, and token id."""
        rows, columns = np.nonzero(self.positions >= 0)
        differences = np.abs(got[rows, columns] - self.expected[rows, columns])
        index, token = np.unravel_index(differences.argmax(), differences.shape)  # `argmax` takes a NaN for the largest
        row, position = int(rows[index]), int(self.positions[rows[index], columns[index]])
        return float(differences[index, token]), row, position, int(token)


def check_parity(model: PreTrainedModel, answer: CallFunction, tolerance: float) -> dict[str, float]:
    """Compare a graph with `model` on prefill, continuation, decode, and prefill and decode of a left-padded batch.

    Args:
        model: The torch model, in evaluation mode, on the CPU.
        answer: The function that answers calls with the graph.
        tolerance: The largest difference of a logit allowed, as a share of the largest reference logit of the check.

    Returns:
        The largest absolute logit difference of each check, by its name.

    Raises:
        ParityError: a difference is larger than the tolerance allows. The message names the check, the difference,
            the allowed difference, and where it is largest: the row of the batch, the position in the row's text,
            and the token id, all from 0.
    """
    return {check.name: check.judge(got, tolerance) for check, got in _answered(model, answer)}


def check_finite(model: PreTrainedModel, dtype: str) -> None:
    """Refuse a model whose logits overflow in the dtype of the export, before it is traced.

    Args:
        model: The model, loaded in that dtype.
        dtype: The name of the dtype, for the message: `fp32`, `fp16` or `bf16`.

    Raises:
        StreamlineError: the logits are not finite.
    """
    ids = _tokens(model, 1, LONGEST_TEXT)
    logits = _reference(model, ids, np.ones_like(ids))
    model.tie_weights()  # offloading restores tied weights as two separate parameters after a forward pass
    if not np.isfinite(logits).all():
        raise StreamlineError(
            f"dtype {dtype!r}: in this dtype the model's logits are not finite"
            + ("; give dtype 'fp32', or 'bf16' on cuda" if dtype == "fp16" else "")
        )


def measure_divergence(model: PreTrainedModel, answer: CallFunction) -> dict[str, float]:
    """Measure how far a quantized graph is from `model`; only a broken graph is refused.

    Args:
        model: The torch model, in evaluation mode, on the CPU.
        answer: The function that answers calls with the graph.

    Returns:
        The largest absolute logit difference of each check, as a share of the check's largest logit, by its name.

    Raises:
        ParityError: a logit is not finite, or the logits correlate with torch's by less than `MIN_CORRELATION`.
    """
    shares: dict[str, float] = {}
    for check, got in _answered(model, answer):
        share = check.largest_difference(got)[0] / check.scale
        if not np.isfinite(share):
            raise ParityError(f"parity: {check.name} gives logits that are not finite")
        correlation = check.correlation(got)
        if not correlation >= MIN_CORRELATION:
            raise ParityError(
                f"parity: {check.name} differs too much from torch: the logits correlate by {correlation:.2f}, "
                f"at least {MIN_CORRELATION} is needed"
            )
        shares[check.name] = share
    return shares


def _answered(model: PreTrainedModel, answer: CallFunction) -> Iterator[tuple[ParityCheck, Logits]]:
    """Each check with the logits of its call."""
    checks = (*_one_row(model), *_padded_rows(model))
    return zip(checks, answer([check.call for check in checks]), strict=True)


def _one_row(model: PreTrainedModel) -> Iterator[ParityCheck]:
    """One text in three calls: a prompt, a few more tokens, and one token."""
    ids = _tokens(model, 1, LONGEST_TEXT)
    mask, positions = np.ones_like(ids), np.arange(ids.shape[1])[None]
    expected = _reference(model, ids, mask)
    ends = (0, PROMPT, PROMPT + CONTINUATION, ids.shape[1])
    for index, name in enumerate(("prefill", "continuation", "decode")):
        part, end = slice(ends[index], ends[index + 1]), ends[index + 1]
        call = Call(ids[:, part], mask[:, :end], index - 1 if index else None)
        yield ParityCheck(name, call, expected[:, part], positions[:, part])


def _padded_rows(model: PreTrainedModel) -> Iterator[ParityCheck]:
    """A left-padded batch in two calls: the prompts, and one token; the prompts are call 3 of all calls, from 0."""
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
    """Torch's logits `[batch, length, vocabulary]`, from one forward pass without a cache."""
    positions = token_positions(mask, mask.shape[1])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    output = model(**tensors, use_cache=False)
    logits: Logits = output.logits.float().cpu().numpy()
    return logits
