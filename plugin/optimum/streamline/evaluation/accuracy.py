"""Accuracy of models on the same tokens: log-loss, KL(original || model), and agreement of the most likely tokens.

All models read a window before the next one, so that the original's logits are computed once, and memory does not grow
with the number of windows. Models that are not in memory together are compared by `one_at_a_time.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Logits, Runner, TokenIds
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import Windows

from .intervals import Interval, Samples, mean_interval

# The largest number of logits that are converted to float64 and compared at a time.
CHUNK_LOGITS = 1 << 22


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The accuracy of one model: sums over the predicted tokens of each window. Every array is `[windows]`.

    Args:
        loss: The next-token log-loss, in nats.
        kl: KL(original || this model), in nats.
        agreement: The number of tokens for which both models predict the same most likely next token.
        tokens: The number of predicted tokens: n - 1 for a window of n tokens.
        documents: The document that each window comes from; empty if that is not known.
    """

    loss: Samples
    kl: Samples
    agreement: Samples
    tokens: Samples
    documents: tuple[int, ...] = ()

    def perplexity(self, seed: int) -> Interval:
        """The perplexity: exp of the mean log-loss over all tokens."""
        return mean_interval(self.loss, self.tokens, seed, self.documents).map(np.exp)

    def perplexity_ratio(self, original: Accuracy, seed: int) -> Interval:
        """This perplexity divided by the original's. The interval is paired: it resamples both on the same windows."""
        return mean_interval(self.loss - original.loss, self.tokens, seed, self.documents).map(np.exp)

    def mean_kl(self, seed: int) -> Interval:
        """The mean KL(original || this model), in nats per token."""
        return mean_interval(self.kl, self.tokens, seed, self.documents)

    def mean_agreement(self, seed: int) -> Interval:
        """The share of tokens, 0 to 1, for which the most likely next token is the same as the original's."""
        return mean_interval(self.agreement, self.tokens, seed, self.documents)


def measure_accuracy(runners: Sequence[Runner], labels: Sequence[str], windows: Windows) -> list[Accuracy]:
    """Compare every runner with the first one, which is the original, on the same tokens.

    Args:
        runners: The runners, the original first.
        labels: The names of the runners in messages.
        windows: The evaluation text.

    Returns:
        One `Accuracy` for each runner. If logits of a candidate are not finite, its sums are NaN or infinite.

    Raises:
        StreamlineError: the vocabularies differ in size, a token is outside them, or logits of the original are not
            finite.
    """
    check_vocabularies([vocabulary_size(runner) for runner in runners], labels, windows)
    sums = np.zeros((len(runners), 3, len(windows.ids)))
    with progress_bar("measuring accuracy", len(windows.ids)) as bar:
        for index, window in enumerate(windows.ids):
            ids: TokenIds = window[None].numpy()
            reference, _ = runners[0].prefill(ids)
            for number, runner in enumerate(runners):
                logits = runner.prefill(ids)[0] if number else reference
                sums[number, :, index] = compare(reference[0], logits[0], ids[0])
            check_finite(sums[0, :, index], labels[0])
            bar.advance()
    return [accuracy_of(each, windows) for each in sums]


def check_finite(sums: Samples, label: str) -> None:
    """Refuse an original whose logits on a window are not finite.

    Args:
        sums: What `compare` gives for the original and itself.
        label: Its name.

    Raises:
        StreamlineError: a sum is not finite.
    """
    if not np.isfinite(sums).all():
        raise StreamlineError(f"{label}: its logits are not finite, and cannot be compared with; use dtype 'fp32'")


def accuracy_of(sums: Samples, windows: Windows) -> Accuracy:
    """The accuracy of a model.

    Args:
        sums: What `compare` gives on each window, `[3, windows]`.
        windows: The evaluation text.
    """
    loss, kl, agreement = sums
    tokens = np.full(len(windows.ids), windows.ids.shape[1] - 1, np.float64)
    return Accuracy(loss, kl, agreement, tokens, windows.documents)


def compare(original: Logits, candidate: Logits, ids: TokenIds) -> tuple[float, float, float]:
    """Compare the logits of two models on one window.

    Args:
        original: Logits `[length, vocabulary]`.
        candidate: Logits `[length, vocabulary]`.
        ids: Token ids `[length]`. The logits of the last token predict none of them, and are not used.

    Returns:
        Sums over the window: the candidate's log-loss in nats, KL(original || candidate) in nats, and the number of
        tokens for which both predict the same most likely next token.
    """
    rows = max(1, CHUNK_LOGITS // original.shape[-1])
    # Sums of loss, KL and agreement. A NaN of one token makes the sum NaN.
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(ids) - 1, rows):
        chunk = slice(start, min(start + rows, len(ids) - 1))
        p = torch.from_numpy(original[chunk]).double().log_softmax(-1)
        q = torch.from_numpy(candidate[chunk]).double().log_softmax(-1)
        following = torch.from_numpy(ids[start + 1 : chunk.stop + 1])
        loss = -q.gather(-1, following[:, None])
        # A token of probability 0 in the original adds 0. Without this it would add 0 x infinity, which is NaN.
        kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        # argmax takes NaN for the largest value, and such a token is no prediction.
        agreed = (p.argmax(-1) == q.argmax(-1)) & ~q.isnan().any(-1)
        total += torch.stack([loss.sum(), kl.sum(), agreed.sum().double()])
    return total[0].item(), total[1].item(), total[2].item()


def vocabulary_size(runner: Runner) -> int:
    """The number of tokens for which a runner gives logits."""
    logits, _ = runner.prefill(np.zeros((1, 1), np.int64))
    return int(logits.shape[-1])


def check_vocabularies(sizes: Sequence[int], labels: Sequence[str], windows: Windows) -> None:
    """Refuse models that cannot be compared on a text.

    Args:
        sizes: The `vocabulary_size` of the first models, the original first.
        labels: The names of all models.
        windows: The evaluation text.

    Raises:
        StreamlineError: the vocabularies differ in size, or a token of the text is outside them.
    """
    for label, size in zip(labels, sizes, strict=False):
        if size != sizes[0]:
            raise StreamlineError(
                f"{label}: has a vocabulary of {size} tokens, but {labels[0]} has {sizes[0]}; compare models with the "
                "same vocabulary"
            )
    if (largest := int(windows.ids.max())) >= sizes[0]:
        raise StreamlineError(f"eval-data: token {largest} is outside {labels[0]}'s vocabulary of {sizes[0]}")
